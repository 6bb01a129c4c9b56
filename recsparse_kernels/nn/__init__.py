"""Drop-in layers."""

from .low_rank import LowRankLinear
from .low_rank_cross import CrossNet, LowRankCross, LowRankCrossNet
from .low_rank_embedding import LowRankEmbedding, LowRankEmbeddingBag
from .low_rank_fields import LowRankFields

__all__ = [
    "CrossNet",
    "LowRankCross",
    "LowRankCrossNet",
    "LowRankEmbedding",
    "LowRankEmbeddingBag",
    "LowRankFields",
    "LowRankLinear",
]
