"""Public functions: argument checks, autograd and fake functions, and the choice of a backend."""

from .low_rank import low_rank_cross, low_rank_linear
from .low_rank_embedding import low_rank_embedding, low_rank_embedding_bag, low_rank_fields
from .sparse24 import (
    sparse24_compress,
    sparse24_decompress,
    sparse24_from_torch,
    sparse24_gather,
    sparse24_linear,
    sparse24_linear_ste,
    sparse24_mask,
)
