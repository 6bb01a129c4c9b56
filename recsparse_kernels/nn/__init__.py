"""Drop-in layers."""

from .sparse24 import (
    SemiSparseLinear,
    Sparse24Linear,
    Sparse24LinearSTE,
    swap_linear_with_semi_sparse_linear,
    swap_semi_sparse_linear_with_linear,
)

__all__ = [
    "SemiSparseLinear",
    "Sparse24Linear",
    "Sparse24LinearSTE",
    "swap_linear_with_semi_sparse_linear",
    "swap_semi_sparse_linear_with_linear",
]
