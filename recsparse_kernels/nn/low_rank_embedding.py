"""Embeddings and embedding bags stored at rank R and projected up after pooling."""

import math

import torch
from torch import Tensor, nn

from ..ops import low_rank_embedding, low_rank_embedding_bag
from ._base import PackedModule, copy_requires_grad
from ._factorize import pick_rank, project_table, table_basis


class _LowRankTable(PackedModule):
    """What `LowRankEmbedding` and `LowRankEmbeddingBag` share: the table, its projection and its mean row."""

    lookup_names = ("table",)

    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None

    def _set_up(self, rank: int, mean: bool, device, dtype) -> None:
        if rank < 1:
            raise ValueError(f"rank must be at least 1; got {rank}")
        if mean and self.max_norm is not None:
            raise ValueError(
                "max_norm scales rows of the table, which a mean row does not allow; got mean=True"
            )
        if self.padding_idx is not None:
            rows = self.num_embeddings
            if not -rows <= self.padding_idx < rows:
                raise ValueError(f"padding_idx must be in [{-rows}, {rows}); got {self.padding_idx}")
            self.padding_idx %= rows
        self.rank = rank
        factory = {"device": device, "dtype": dtype}
        self.table = nn.Parameter(torch.empty(self.num_embeddings, rank, **factory))
        self.up = nn.Parameter(torch.empty(self.embedding_dim, rank, **factory))
        self.mean = nn.Parameter(torch.empty(self.embedding_dim, **factory)) if mean else None
        self._place_tables()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Elements of a row get the variance of ``nn.Embedding``'s, 1; the padding row is zero."""
        nn.init.normal_(self.table)
        nn.init.normal_(self.up, std=1 / math.sqrt(self.rank))
        if self.mean is not None:
            nn.init.zeros_(self.mean)
        if self.padding_idx is not None:
            with torch.no_grad():
                self.table[self.padding_idx].zero_()

    def _fill(self, basis: Tensor, mean: Tensor | None, weight: Tensor) -> None:
        """Become the projection of ``weight`` on the columns of ``basis``, about ``mean``."""
        with torch.no_grad():
            self.table.zero_()
            self.table[:, : basis.shape[1]] = project_table(weight, basis, mean, self.padding_idx)
            self.up.zero_()
            self.up[:, : basis.shape[1]] = basis
            if self.mean is not None:
                self.mean.copy_(mean)

    @classmethod
    def _from_dense(cls, module, rank, energy, multiple_of, center, counts, **options):
        if center is None:
            center = module.max_norm is None
        values, vectors, mean = table_basis(
            module.weight, center=center, counts=counts, skip_row=module.padding_idx
        )
        rank = pick_rank(values, rank, energy, multiple_of)
        layer = cls(
            module.num_embeddings,
            module.embedding_dim,
            padding_idx=module.padding_idx,
            max_norm=module.max_norm,
            norm_type=module.norm_type,
            scale_grad_by_freq=module.scale_grad_by_freq,
            sparse=module.sparse,
            device=module.weight.device,
            dtype=module.weight.dtype,
            rank=rank,
            mean=center,
            **options,
        )
        layer._fill(vectors[:, :rank], mean, module.weight)
        copy_requires_grad(layer, module)
        return layer.train(module.training)

    def _load_dense(self, dense: nn.Module) -> None:
        center = self.mean is not None
        _, vectors, mean = table_basis(dense.weight, center=center, skip_row=self.padding_idx)
        self._fill(vectors[:, : self.rank], mean, dense.weight)

    def dense_weight(self) -> Tensor:
        """``table @ up.T + mean``, ``[V, D]``; the row of padding_idx without the mean."""
        dense = self.table @ self.up.t()
        if self.mean is None:
            return dense
        if self.padding_idx is None:
            return dense + self.mean
        times = torch.ones(self.num_embeddings, 1, device=dense.device, dtype=dense.dtype)
        times[self.padding_idx] = 0
        return dense + times * self.mean

    def _renormalize(self, input: Tensor) -> None:
        """Rows looked up whose dense form is longer than max_norm are scaled down in place, as torch does."""
        with torch.no_grad():
            rows = torch.unique(input.long())
            norms = (self.table[rows] @ self.up.t()).norm(p=self.norm_type, dim=1, keepdim=True)
            scale = torch.where(norms > self.max_norm, self.max_norm / (norms + 1e-7), 1)
            self.table[rows] *= scale

    def dense_bytes(self) -> int:
        return self.num_embeddings * self.embedding_dim * self.table.element_size()

    def _repr_options(self) -> str:
        text = f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}"
        if self.mean is not None:
            text += ", mean=True"
        if self.padding_idx is not None:
            text += f", padding_idx={self.padding_idx}"
        if self.max_norm is not None:
            text += f", max_norm={self.max_norm}, norm_type={self.norm_type}"
        for name in ("scale_grad_by_freq", "sparse"):
            if getattr(self, name):
                text += f", {name}=True"
        dense = self.num_embeddings * self.embedding_dim
        kept = self.rank * (self.num_embeddings + self.embedding_dim)
        return text + (f", weights={kept / dense:.3g} of dense" if dense else "")


class LowRankEmbedding(_LowRankTable):
    r"""``nn.Embedding`` with rows of rank R: ``table[input] @ up.T + mean``.

    Args:
        num_embeddings, ..., dtype: as in ``nn.Embedding``. ``padding_idx``: its row gets no gradient and
            no ``mean``, so a zero row stays zero. ``max_norm`` needs ``mean=False``.
        rank: R.
        mean: a row ``[D]`` added to all rows.

    State: ``table [V, R]``, ``up [D, R]``, ``mean [D]``.
    Source: per-field tables of arXiv 2405.18146.
    """

    dense_type = nn.Embedding

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        device=None,
        dtype=None,
        *,
        rank: int,
        mean: bool = False,
    ):
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx, self.max_norm, self.norm_type = padding_idx, max_norm, norm_type
        self.scale_grad_by_freq, self.sparse = scale_grad_by_freq, sparse
        self._set_up(rank, mean, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        if self.max_norm is not None:
            self._renormalize(input)
        return low_rank_embedding(
            input,
            self.table,
            self.up,
            self.mean,
            padding_idx=self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
        )

    @classmethod
    def from_dense(
        cls,
        module: nn.Embedding,
        rank: int | None = None,
        *,
        energy: float | None = None,
        multiple_of: int = 1,
        center: bool | None = None,
        counts: Tensor | None = None,
    ) -> "LowRankEmbedding":
        """The best approximation of the table's rows at a rank (principal component analysis).

        Args:
            module: an ``nn.Embedding``; left as it is.
            rank: R in [1, D]; or
            energy: the share of the rows' squared distance from their mean to keep, in (0, 1], rounded
                up to a multiple of ``multiple_of``.
            center: about the mean row, which the layer then adds back; False: about zero. None: True
                unless the module has a max_norm.
            counts: ``[V]``, how often each row is looked up, to weigh the error by.

        Raises:
            ValueError: both or none of rank and energy are given, or out of range.
        """
        return cls._from_dense(module, rank, energy, multiple_of, center, counts)

    def _empty_dense(self) -> nn.Embedding:
        return nn.Embedding(
            self.num_embeddings,
            self.embedding_dim,
            padding_idx=self.padding_idx,
            max_norm=self.max_norm,
            norm_type=self.norm_type,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
            device=self.table.device,
            dtype=self.table.dtype,
        )

    def extra_repr(self) -> str:
        return self._repr_options()


class LowRankEmbeddingBag(_LowRankTable):
    r"""``nn.EmbeddingBag`` with rows of rank R: rows are pooled at rank R and projected once for each bag.

    Args:
        num_embeddings, ..., dtype: as in ``nn.EmbeddingBag``. With ``mode="max"`` every row is projected
            before it is compared. ``max_norm`` needs ``mean=False``.
        rank: R.
        mean: a row ``[D]`` that is part of every row.

    State: ``table [V, R]``, ``up [D, R]``, ``mean [D]``.
    """

    dense_type = nn.EmbeddingBag

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        device=None,
        dtype=None,
        *,
        rank: int,
        mean: bool = False,
    ):
        super().__init__()
        if mode not in ("sum", "mean", "max"):
            raise ValueError(f"mode must be 'sum', 'mean' or 'max'; got {mode!r}")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx, self.max_norm, self.norm_type = padding_idx, max_norm, norm_type
        self.scale_grad_by_freq, self.sparse = scale_grad_by_freq, sparse
        self.mode, self.include_last_offset = mode, include_last_offset
        self._set_up(rank, mean, device, dtype)

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        if self.max_norm is not None:
            self._renormalize(input)
        return low_rank_embedding_bag(
            input,
            self.table,
            self.up,
            self.mean,
            offsets,
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
        )

    @classmethod
    def from_dense(
        cls,
        module: nn.EmbeddingBag,
        rank: int | None = None,
        *,
        energy: float | None = None,
        multiple_of: int = 1,
        center: bool | None = None,
        counts: Tensor | None = None,
    ) -> "LowRankEmbeddingBag":
        """As `LowRankEmbedding.from_dense`, from an ``nn.EmbeddingBag``."""
        options = {"mode": module.mode, "include_last_offset": module.include_last_offset}
        return cls._from_dense(module, rank, energy, multiple_of, center, counts, **options)

    def _empty_dense(self) -> nn.EmbeddingBag:
        return nn.EmbeddingBag(
            self.num_embeddings,
            self.embedding_dim,
            max_norm=self.max_norm,
            norm_type=self.norm_type,
            scale_grad_by_freq=self.scale_grad_by_freq,
            mode=self.mode,
            sparse=self.sparse,
            include_last_offset=self.include_last_offset,
            padding_idx=self.padding_idx,
            device=self.table.device,
            dtype=self.table.dtype,
        )

    def extra_repr(self) -> str:
        text = f"{self._repr_options()}, mode={self.mode!r}"
        return text + (", include_last_offset=True" if self.include_last_offset else "")
