"""Drop-in layers."""

from .fan_in import FixedFanInLinear
from .fan_in_head import FanInHead, label_order
from .sparse24 import (
    SemiSparseLinear,
    Sparse24Linear,
    Sparse24LinearSTE,
    swap_linear_with_semi_sparse_linear,
    swap_semi_sparse_linear_with_linear,
)

__all__ = [
    "FanInHead",
    "FixedFanInLinear",
    "SemiSparseLinear",
    "Sparse24Linear",
    "Sparse24LinearSTE",
    "label_order",
    "swap_linear_with_semi_sparse_linear",
    "swap_semi_sparse_linear_with_linear",
]
