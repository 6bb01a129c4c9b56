"""The embedding bags of all fields of a recommender model, in one packed table."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..config import get_check_indices
from ..ops._check import INDEX_DTYPES, check_device, check_dtype, check_shape
from ._base import PackedModule, copy_requires_grad
from .masked_embedding import MaskedEmbeddingBag


class MaskedFields(PackedModule):
    r"""F tables of one dimension, pruned and packed as one: a lookup in all of them is one kernel.

    ``output[b, k]`` pools the rows of field k that bag b of the field names. The rows of the tables lie one
    after the other in ``bag``, a `MaskedEmbeddingBag`: its `freeze`, `fuse_optimizer`, `repack` and the
    training methods work on all fields at once, and one density shares the budget out by magnitude.

    Args:
        num_embeddings: rows of each field's table.
        embedding_dim: D, the same for all fields.
        mode: "sum", "mean" or "max".
        sparse, device, dtype: as in ``nn.EmbeddingBag``.
        density, layout: as in `MaskedEmbeddingBag`, over all tables together.

    State: that of ``bag``, ``starts [F + 1]`` int64.

    >>> tables = nn.ModuleList(nn.EmbeddingBag(rows, 16, mode="sum") for rows in (1000, 20, 300))
    >>> MaskedFields.from_dense(tables, density=0.2)(torch.zeros(64, 3, dtype=torch.int64)).shape
    torch.Size([64, 3, 16])
    """

    dense_type = nn.ModuleList  # of nn.EmbeddingBag or nn.Embedding

    def __init__(
        self,
        num_embeddings: Sequence[int],
        embedding_dim: int,
        mode: str = "sum",
        *,
        sparse: bool = False,
        density: float = 0.2,
        layout: str = "bitmask",
        device=None,
        dtype=None,
        _weight: Tensor | None = None,
        _mask: Tensor | None = None,
    ):
        super().__init__()
        self.num_embeddings = tuple(int(n) for n in num_embeddings)
        if not self.num_embeddings or min(self.num_embeddings) < 0:
            raise ValueError(
                f"num_embeddings must hold the rows of at least one field; got {self.num_embeddings}"
            )
        self.embedding_dim = embedding_dim
        self.bag = MaskedEmbeddingBag(
            sum(self.num_embeddings), embedding_dim, mode=mode, sparse=sparse, _weight=_weight, _mask=_mask,
            density=density, layout=layout, device=device, dtype=dtype,
        )  # fmt: skip
        self.register_buffer("starts", torch.empty(self.fields + 1, dtype=torch.int64, device=device))
        self._set_starts()

    def _set_starts(self) -> None:
        self.starts.copy_(torch.tensor((0, *self.num_embeddings)).cumsum(0))

    def reset_parameters(self) -> None:
        """As a new layer; the mask stays."""
        self._set_starts()
        self.bag.reset_parameters()

    @property
    def fields(self) -> int:
        return len(self.num_embeddings)

    def forward(
        self,
        input: Tensor | Sequence[Tensor],
        offsets: Tensor | Sequence[Tensor] | None = None,
        per_sample_weights: Tensor | Sequence[Tensor] | None = None,
    ) -> Tensor:
        """``[B, F, D]``.

        Args:
            input: rows within each field's table, int32 or int64, in one of three forms:
                ``[B, F]``, one row a field, without ``offsets``;
                ``[N]``, field after field, with ``offsets [F * B]``, bag b of field k beginning at
                ``offsets[k * B + b]`` (``[F * B + 1]`` with the end, as fbgemm's table-batched lookups);
                F tensors, with ``offsets`` F tensors ``[B]`` or one ``[F, B]`` that begin at 0 in each field.
            per_sample_weights: as ``input``.

        Raises:
            ValueError: shapes that do not fit. IndexError: a row outside its field's table.
        """
        if isinstance(input, (list, tuple)):
            input, offsets, per_sample_weights = self._joined(input, offsets, per_sample_weights)
        check_dtype("input", input, INDEX_DTYPES)
        check_device("input", input, "starts", self.starts)
        if offsets is None:
            check_shape("input", input, (None, self.fields), "[B, F]")
            rows = self._rows(input, self.starts[:-1], self.starts[1:]).view(-1, 1)
            if per_sample_weights is not None:
                check_shape("per_sample_weights", per_sample_weights, tuple(input.shape), "that of input")
                per_sample_weights = per_sample_weights.reshape(-1, 1)
            return self._lookup(rows, None, per_sample_weights).view(*input.shape, self.embedding_dim)
        check_shape("input", input, (None,), "[N] with offsets")
        check_dtype("offsets", offsets, INDEX_DTYPES)
        check_shape("offsets", offsets, (None,), "[F * B] or [F * B + 1]")
        check_device("offsets", offsets, "input", input)
        bags = offsets.shape[0] // self.fields * self.fields
        if offsets.shape[0] - bags > (self.fields > 1):
            raise ValueError(
                f"offsets must have F * B or F * B + 1 elements, F = {self.fields}; got {offsets.shape[0]}"
            )
        batch = bags // self.fields
        if batch == 0:
            return self._lookup(input[:0], offsets[:0], None).view(0, self.fields, self.embedding_dim)
        offsets = offsets[:bags]
        end = offsets.new_full((1,), input.shape[0])
        counts = torch.cat([offsets[::batch], end]).diff()
        first, last = (
            t.repeat_interleave(counts, output_size=input.shape[0])
            for t in (self.starts[:-1], self.starts[1:])
        )
        output = self._lookup(self._rows(input, first, last), offsets, per_sample_weights)
        return output.view(self.fields, batch, self.embedding_dim).transpose(0, 1)

    def _joined(self, input, offsets, weights) -> tuple[Tensor, Tensor, Tensor | None]:
        """One tensor each for F."""
        if offsets is None or len(input) != self.fields or len(offsets) != self.fields:
            got = None if offsets is None else len(offsets)
            raise ValueError(
                f"input and offsets must hold one tensor for each of the {self.fields} fields; "
                f"got {len(input)} and {got}"
            )
        before, moved = 0, []
        for rows, begins in zip(input, offsets, strict=True):
            check_shape("offsets", begins, tuple(offsets[0].shape), "the same [B] for every field")
            moved.append(begins + before)
            before += rows.shape[0]
        if isinstance(weights, (list, tuple)):
            weights = torch.cat(tuple(weights))
        return torch.cat(tuple(input)), torch.cat(moved), weights

    def _rows(self, input: Tensor, first: Tensor, last: Tensor) -> Tensor:
        """Rows of the whole table. One outside its field becomes one outside the table, or the nearest of
        the field (``set_check_indices("clamp")``)."""
        rows = input + first
        if get_check_indices() == "clamp":
            return torch.minimum(torch.maximum(rows, first), last - 1)
        return torch.where((rows >= first) & (rows < last), rows, self.bag.num_embeddings)

    def _lookup(self, rows: Tensor, offsets: Tensor | None, weights: Tensor | None) -> Tensor:
        if torch.compiler.is_compiling():
            return self.bag(rows, offsets, weights)
        try:
            return self.bag(rows, offsets, weights)
        except IndexError:
            raise IndexError(
                f"input must hold rows within the tables of its fields, {self.num_embeddings}; "
                f"{int((rows == self.bag.num_embeddings).sum())} of {rows.numel()} are outside"
            ) from None

    @classmethod
    def from_dense(
        cls,
        module: Iterable[nn.EmbeddingBag | nn.Embedding],
        *,
        density: float | None = None,
        mask: Tensor | None = None,
        layout: str = "bitmask",
    ) -> "MaskedFields":
        """The packed tables of all fields.

        Args:
            module: the fields' tables (an ``nn.ModuleList``, or any iterable), all of one dimension, mode and
                dtype; left as they are.
            density: keep exactly ``round(density * sum of V * D)`` elements, the largest of all tables.
            mask, layout: as in `MaskedEmbeddingBag.from_dense`, for the tables one after the other.

        Raises:
            ValueError: no table, tables that differ, or an option that a joint table has no place for.
        """
        tables = list(module)
        if not tables or any(not isinstance(t, (nn.EmbeddingBag, nn.Embedding)) for t in tables):
            raise ValueError(
                f"module must hold nn.EmbeddingBag or nn.Embedding; got {[type(t).__name__ for t in tables]}"
            )
        modes = {getattr(t, "mode", "sum") for t in tables}
        dims = {(t.weight.shape[1], t.weight.dtype) for t in tables}
        if len(modes) > 1 or len(dims) > 1:
            raise ValueError(f"module's tables must have one mode and dimension; got {modes} and {dims}")
        for name in ("padding_idx", "max_norm"):
            if any(getattr(t, name) is not None for t in tables):
                raise ValueError(
                    f"module's tables must not set {name}; got {[getattr(t, name) for t in tables]}"
                )
        weight = torch.cat([t.weight.detach() for t in tables])
        dense = nn.EmbeddingBag(*weight.shape, mode=modes.pop(), sparse=tables[0].sparse, _weight=weight)
        bag = MaskedEmbeddingBag.from_dense(dense, density=density, mask=mask, layout=layout)
        own = cls([t.num_embeddings for t in tables], weight.shape[1], bag.mode, device="meta")
        own.bag = bag
        own.starts = torch.empty(own.fields + 1, dtype=torch.int64, device=weight.device)
        own._set_starts()
        copy_requires_grad(own, tables[0])
        return own.train(tables[0].training)

    def dense_weight(self) -> Tensor:
        """The fields' dense tables one after the other, ``[sum of V, D]``."""
        return self.bag.dense_weight()

    def _empty_dense(self) -> nn.ModuleList:
        options = dict(mode=self.bag.mode, sparse=self.bag.sparse)
        factory = dict(dtype=self.bag.dtype, device=self.starts.device)
        return nn.ModuleList(
            nn.EmbeddingBag(
                rows, self.embedding_dim, **options, _weight=torch.empty(rows, self.embedding_dim, **factory)
            )
            for rows in self.num_embeddings
        )

    @torch.no_grad()
    def to_dense(self) -> nn.ModuleList:
        """An ``nn.EmbeddingBag`` for each field."""
        dense = self._empty_dense()
        for table, weight in zip(dense, self.dense_weight().split(self.num_embeddings), strict=True):
            table.weight.copy_(weight)
        return dense.train(self.training)

    def _load_dense(self, dense: nn.ModuleList) -> None:
        weight = torch.cat([t.weight.detach() for t in dense])
        self.bag._load_dense(nn.EmbeddingBag(*weight.shape, _weight=weight))

    def dense_bytes(self) -> int:
        return self.bag.dense_bytes()

    def memory_report(self, optimizer: torch.optim.Optimizer | None = None):
        return self.bag.memory_report(optimizer)

    def _load_from_state_dict(self, *args):
        # bag checks its tensors itself: another mask has other sizes, and fits
        nn.Module._load_from_state_dict(self, *args)

    def extra_repr(self) -> str:
        return f"fields={self.fields}, rows={sum(self.num_embeddings)}, embedding_dim={self.embedding_dim}"
