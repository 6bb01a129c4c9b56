"""Public functions: argument checks, autograd and fake functions, and the choice of a backend."""

from .low_rank import low_rank_cross, low_rank_linear

__all__ = [
    "low_rank_cross",
    "low_rank_linear",
]
