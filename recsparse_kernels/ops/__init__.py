"""Public functions: argument checks, autograd and fake functions, and the choice of a backend."""

from .masked_embedding import (
    FusedOptimizer,
    masked_embedding,
    masked_embedding_bag,
    masked_embedding_matmul_t,
    masked_embedding_pack,
    masked_embedding_propagate,
    masked_embedding_repack,
    masked_embedding_unpack,
)
from .masked_embedding_records import (
    MaskedRecords,
    masked_embedding_bag_frozen,
    masked_embedding_freeze,
    masked_embedding_frozen,
    masked_embedding_thaw,
)
from .masked_embedding_table import MaskedTable

__all__ = [
    "FusedOptimizer",
    "MaskedRecords",
    "MaskedTable",
    "masked_embedding",
    "masked_embedding_bag",
    "masked_embedding_bag_frozen",
    "masked_embedding_freeze",
    "masked_embedding_frozen",
    "masked_embedding_matmul_t",
    "masked_embedding_pack",
    "masked_embedding_propagate",
    "masked_embedding_repack",
    "masked_embedding_thaw",
    "masked_embedding_unpack",
]
