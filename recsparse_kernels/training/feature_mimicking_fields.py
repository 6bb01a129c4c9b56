"""The embeddings of all fields of a click-through model, dense, with the output of `nn.LowRankFields`."""

from collections.abc import Sequence

from torch import Tensor, nn

from ..ops.low_rank_embedding import LowRankFieldsOutput


class FieldEmbeddings(nn.Module):
    """An ``nn.Embedding`` for each field; the dense counterpart of `nn.LowRankFields`, with its output.

    A model that takes ``z`` for its first linear layer and ``x`` (or ``interaction``) for everything else
    can be compressed with `FeatureMimicking`'s ``fields``, the projection folded into that layer.

    Args:
        num_embeddings: rows of each field's table.
        embedding_dim: D.
        interaction: give the factorisation-machine term.
        sparse: as in ``nn.Embedding``.
    """

    def __init__(
        self, num_embeddings: Sequence[int], embedding_dim: int, *, interaction=False, sparse=False, **factory
    ):
        super().__init__()
        self.interaction = interaction
        self.tables = nn.ModuleList(
            nn.Embedding(rows, embedding_dim, sparse=sparse, **factory) for rows in num_embeddings
        )

    def forward(self, input: Tensor) -> LowRankFieldsOutput:
        """``input [B, F]`` -> ``(z [B, F, D], x [B, F, D], interaction [B, 1] or None)``, z the same as x."""
        x = torch.stack([table(ids) for table, ids in zip(self.tables, input.unbind(1), strict=True)], 1)
        term = None
        if self.interaction:
            term = 0.5 * (x.sum(1).square() - x.square().sum(1)).sum(1, keepdim=True)
        return LowRankFieldsOutput(x, x, term)
