"""Drop-in layers."""

from .masked_embedding import MaskedEmbedding, MaskedEmbeddingBag

__all__ = ["MaskedEmbedding", "MaskedEmbeddingBag"]
