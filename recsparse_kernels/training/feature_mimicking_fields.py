"""The embeddings of all fields of a click-through model, dense, with the output of `nn.LowRankFields`."""

from collections.abc import Mapping, Sequence

import torch
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


def field_tables(name: str, module: nn.Module) -> list[nn.Embedding]:
    """The tables inside a module, in order of the fields.

    TypeError where they are not of one dimension, or of a kind that `nn.LowRankFields` is not.
    """
    tables = [m for m in module.modules() if type(m) is nn.Embedding]
    if not tables or len({t.embedding_dim for t in tables}) > 1:
        dims = [t.embedding_dim for t in tables]
        raise TypeError(f"fields {name!r} must hold nn.Embedding tables of one dimension; got {dims}")
    for table in tables:
        for option in ("padding_idx", "max_norm"):
            if getattr(table, option) is not None:
                raise TypeError(
                    f"fields {name!r} must hold tables without padding_idx and max_norm, which low-rank fields "
                    f"do not have; got {table}"
                )
    return tables


def check_readers(
    fields: Mapping[str, str | None],
    tables: Mapping[str, list[nn.Embedding]],
    modules: Mapping[str, nn.Module],
) -> None:
    """TypeError or ValueError unless each reader is a linear layer over all features of its fields."""
    for name, reader in fields.items():
        if reader is None:
            continue
        if type(modules[reader]) is not nn.Linear:
            got = type(modules[reader]).__name__
            raise TypeError(f"the reader {reader!r} of {name!r} must be an nn.Linear; got {got}")
        wanted = sum(t.embedding_dim for t in tables[name])
        if modules[reader].in_features != wanted:
            raise ValueError(
                f"the reader {reader!r} of {name!r} must take its {wanted} features; "
                f"it takes {modules[reader].in_features}"
            )
