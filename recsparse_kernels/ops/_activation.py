"""Names of the fused activations and the numbers that the ops take (csrc/cpu/types.h)."""

import torch
from torch import Tensor

ACTIVATIONS = {None: 0, "relu": 1, "gelu": 2, "silu": 3, "sigmoid": 4, "tanh": 5}


def activation_code(name: str | None, argument: str = "activation") -> int:
    """The op's number for an activation name.

    Raises:
        ValueError: the name is none of `ACTIVATIONS`.
    """
    if name not in ACTIVATIONS:
        known = ", ".join(repr(known) for known in ACTIVATIONS)
        raise ValueError(f"{argument} must be one of {known}; got {name!r}")
    return ACTIVATIONS[name]


def needs_sum(code: int) -> bool:
    """Whether the derivative needs the sum before the activation (GELU, SiLU); else the output does."""
    return code in (2, 3)


def activation_backward(grad_output: Tensor, saved: Tensor | None, code: int) -> Tensor:
    """Gradient before the activation; ``saved`` is the sum where `needs_sum`, else the output."""
    if code == 0:
        return grad_output
    if code == 1:
        return torch.ops.aten.threshold_backward(grad_output, saved, 0)
    backward = (torch.ops.aten.gelu_backward, torch.ops.aten.silu_backward,
                torch.ops.aten.sigmoid_backward, torch.ops.aten.tanh_backward)  # fmt: skip
    return backward[code - 2](grad_output, saved)
