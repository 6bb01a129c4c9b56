"""The embeddings of all fields of a click-through model, each stored at rank R."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..ops import low_rank_fields
from ..ops.low_rank_embedding import LowRankFieldsOutput
from ._base import PackedModule, copy_requires_grad
from ._factorize import choose_rank, project_table, table_basis


class LowRankFields(PackedModule):
    r"""One table of rank R for each of F fields, looked up and projected up in one pass.

    ``z[b, k] = table_k[input[b, k]]`` and ``x[b, k] = z[b, k] @ projections[k] + bias[k]``. The first
    fully connected layer can take ``z`` (see `fold_linear`); interactions take ``x``; the
    factorisation-machine term comes without writing ``x``.

    Args:
        num_embeddings: rows of each field's table.
        embedding_dim: D.
        rank: R, the same for all fields.
        bias: a mean row for each field.
        output, interaction: what `forward` gives besides ``z``.
        sparse: the gradient of ``table`` is a sparse COO tensor over the rows looked up.

    State: ``table [sum of V, R]``, ``projections [F, R, D]``, ``bias [F, D]``, ``starts [F + 1]`` int64.
    Source: arXiv 2405.18146.
    """

    lookup_names = ("table",)

    dense_type = nn.ModuleList  # of nn.Embedding

    def __init__(
        self,
        num_embeddings: Sequence[int],
        embedding_dim: int,
        rank: int,
        bias: bool = True,
        *,
        output: bool = True,
        interaction: bool = False,
        sparse: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank must be at least 1; got {rank}")
        self.num_embeddings = tuple(int(n) for n in num_embeddings)
        if not self.num_embeddings or min(self.num_embeddings) < 0:
            raise ValueError(
                f"num_embeddings must hold the rows of at least one field; got {self.num_embeddings}"
            )
        self.embedding_dim, self.rank = embedding_dim, rank
        self.output, self.interaction, self.sparse = output, interaction, sparse
        factory = {"device": device, "dtype": dtype}
        fields = len(self.num_embeddings)
        self.table = nn.Parameter(torch.empty(sum(self.num_embeddings), rank, **factory))
        self.projections = nn.Parameter(torch.empty(fields, rank, embedding_dim, **factory))
        self.bias = nn.Parameter(torch.empty(fields, embedding_dim, **factory)) if bias else None
        self.register_buffer("starts", torch.empty(fields + 1, dtype=torch.int64, device=device))
        self._place_tables()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Elements of ``x`` get the variance of ``nn.Embedding``'s rows, 1."""
        self.starts.copy_(torch.tensor((0, *self.num_embeddings)).cumsum(0))
        nn.init.normal_(self.table)
        nn.init.normal_(self.projections, std=1 / math.sqrt(self.rank))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> LowRankFieldsOutput:
        """``(z [B, F, R], x [B, F, D] or None, interaction [B, 1] or None)``."""
        return low_rank_fields(
            input,
            self.table,
            self.starts,
            self.projections,
            self.bias,
            output=self.output,
            interaction=self.interaction,
            sparse=self.sparse,
        )

    @classmethod
    def from_dense(
        cls,
        module: Iterable[nn.Embedding],
        rank: int | None = None,
        *,
        energy: float | None = None,
        multiple_of: int = 1,
        center: bool = True,
        counts: Sequence[Tensor] | None = None,
        output: bool = True,
        interaction: bool = False,
    ) -> "LowRankFields":
        """Each field's table at its best approximation of the rank, about its mean row.

        Args:
            module: the fields' embeddings (an ``nn.ModuleList``, or any iterable), all of one dimension
                and dtype; left as they are.
            rank: R in [1, D]; or
            energy: the share of each table's variance to keep, in (0, 1]: the rank that suffices for
                every field, rounded up to a multiple of ``multiple_of``.
            center: about the mean row; False: about zero, and the layer has no bias.
            counts: for each field ``[V]``, how often each row is looked up, to weigh the error by.
            output, interaction: as in the constructor.

        Raises:
            ValueError: no field, different dimensions, or rank and energy both or neither given.
        """
        tables = list(module)
        if not tables or any(t.weight.shape[1] != tables[0].weight.shape[1] for t in tables):
            shapes = [tuple(t.weight.shape) for t in tables]
            raise ValueError(f"module must hold at least one embedding, all of one dimension; got {shapes}")
        dim = tables[0].weight.shape[1]
        if (rank is None) == (energy is None):
            raise ValueError(f"give either rank or energy; got rank={rank}, energy={energy}")
        counts = counts or [None] * len(tables)
        bases = [table_basis(t.weight, center=center, counts=c) for t, c in zip(tables, counts, strict=True)]
        if rank is None:
            rank = max(choose_rank(values, energy, multiple_of) for values, _, _ in bases)
        if not 1 <= rank <= dim:
            raise ValueError(f"rank must be in [1, {dim}], the embedding dimension; got {rank}")
        weight = tables[0].weight
        layer = cls(
            [t.weight.shape[0] for t in tables],
            dim,
            rank,
            center,
            output=output,
            interaction=interaction,
            sparse=tables[0].sparse,
            device=weight.device,
            dtype=weight.dtype,
        )
        layer._fill(tables, bases)
        copy_requires_grad(layer, tables[0])
        return layer.train(tables[0].training)

    def _fill(self, tables: Sequence[nn.Embedding], bases: Sequence[tuple]) -> None:
        kept = min(self.rank, self.embedding_dim)
        with torch.no_grad():
            self.table.zero_()
            self.projections.zero_()
            for k, (embedding, (_, vectors, mean)) in enumerate(zip(tables, bases, strict=True)):
                rows = slice(int(self.starts[k]), int(self.starts[k + 1]))
                basis = vectors[:, :kept]
                self.table[rows, :kept] = project_table(embedding.weight, basis, mean)
                self.projections[k, :kept] = basis.t()
                if self.bias is not None:
                    self.bias[k] = mean

    def fold_linear(self, linear: nn.Linear) -> nn.Linear:
        """The layer on ``z.flatten(1) [B, F R]`` that equals ``linear`` on ``x.flatten(1) [B, F D]``.

        Raises:
            ValueError: ``linear`` does not take F * D features.
        """
        fields, rank, dim = self.projections.shape
        if linear.in_features != fields * dim:
            raise ValueError(f"linear must take F * D = {fields * dim} features; got {linear.in_features}")
        weight = linear.weight.detach().reshape(-1, fields, dim)
        has_bias = linear.bias is not None or self.bias is not None
        folded = nn.Linear(
            fields * rank, linear.out_features, has_bias, device=weight.device, dtype=weight.dtype
        )
        with torch.no_grad():
            folded.weight.copy_(torch.einsum("okd,krd->okr", weight, self.projections).flatten(1))
            if has_bias:
                bias = torch.zeros_like(folded.bias) if linear.bias is None else linear.bias
                shift = 0 if self.bias is None else weight.flatten(1) @ self.bias.flatten()
                folded.bias.copy_(bias + shift)
        copy_requires_grad(folded, linear)
        return folded.train(linear.training)

    def _field_weights(self) -> list[Tensor]:
        tables = self.table.split(self.num_embeddings)
        out = [table @ projection for table, projection in zip(tables, self.projections, strict=True)]
        return out if self.bias is None else [w + b for w, b in zip(out, self.bias, strict=True)]

    def dense_weight(self) -> Tensor:
        """The fields' dense tables one after the other, ``[sum of V, D]``."""
        return torch.cat(self._field_weights())

    def _empty_dense(self) -> nn.ModuleList:
        factory = {"device": self.table.device, "dtype": self.table.dtype}
        return nn.ModuleList(
            nn.Embedding(rows, self.embedding_dim, sparse=self.sparse, **factory)
            for rows in self.num_embeddings
        )

    def to_dense(self) -> nn.ModuleList:
        """An ``nn.Embedding`` for each field, whose lookups give ``x``."""
        dense = self._empty_dense()
        with torch.no_grad():
            for embedding, weight in zip(dense, self._field_weights(), strict=True):
                embedding.weight.copy_(weight)
        return dense.train(self.training)

    def _load_dense(self, dense: nn.ModuleList) -> None:
        self._fill(list(dense), [table_basis(e.weight, center=self.bias is not None) for e in dense])

    def dense_bytes(self) -> int:
        return sum(self.num_embeddings) * self.embedding_dim * self.table.element_size()

    def extra_repr(self) -> str:
        text = f"fields={len(self.num_embeddings)}, rows={sum(self.num_embeddings)}, "
        text += f"embedding_dim={self.embedding_dim}, rank={self.rank}, bias={self.bias is not None}"
        return (
            text
            + ("" if self.output else ", output=False")
            + (", interaction=True" if self.interaction else "")
        )
