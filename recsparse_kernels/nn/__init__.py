"""Drop-in layers."""

from .fan_in import FixedFanInLinear
from .fan_in_head import FanInHead, label_order
from .low_rank import LowRankLinear
from .low_rank_cross import CrossNet, LowRankCross, LowRankCrossNet
from .low_rank_embedding import LowRankEmbedding, LowRankEmbeddingBag
from .low_rank_fields import LowRankFields
from .masked_embedding import MaskedEmbedding, MaskedEmbeddingBag
from .masked_fields import MaskedFields
from .masked_linear import MaskedLinear
from .sparse24 import (
    SemiSparseLinear,
    Sparse24Linear,
    Sparse24LinearSTE,
    swap_linear_with_semi_sparse_linear,
    swap_semi_sparse_linear_with_linear,
)
