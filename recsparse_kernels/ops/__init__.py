"""Public functions: argument checks, autograd and fake functions, and the choice of a backend."""

from .low_rank import low_rank_cross, low_rank_linear
from .low_rank_embedding import low_rank_embedding, low_rank_embedding_bag, low_rank_fields

__all__ = [
    "low_rank_cross",
    "low_rank_embedding",
    "low_rank_embedding_bag",
    "low_rank_fields",
    "low_rank_linear",
]
