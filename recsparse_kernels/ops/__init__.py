"""Public functions: argument checks, autograd and fake functions, and the choice of a backend."""

from .fan_in import (
    FanInUpdate,
    fan_in_linear,
    fan_in_linear_update,
    fan_in_loss,
    fan_in_loss_step,
    fan_in_rewire,
    fan_in_score,
    fan_in_topk,
)

__all__ = [
    "FanInUpdate",
    "fan_in_linear",
    "fan_in_linear_update",
    "fan_in_loss",
    "fan_in_loss_step",
    "fan_in_rewire",
    "fan_in_score",
    "fan_in_topk",
]
