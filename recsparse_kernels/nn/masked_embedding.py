"""Embedding layers whose table is pruned element by element and stores only what is kept."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops._lookup import padding_index
from ..ops.masked_embedding import (
    MODES,
    FusedOptimizer,
    carry,
    masked_embedding,
    masked_embedding_bag,
    masked_embedding_matmul_t,
    masked_embedding_pack,
    masked_embedding_propagate,
    masked_embedding_repack,
    masked_embedding_unpack,
    renorm,
)
from ..ops.masked_embedding_records import (
    MaskedRecords,
    check_records,
    masked_embedding_bag_frozen,
    masked_embedding_freeze,
    masked_embedding_frozen,
    masked_embedding_thaw,
)
from ..ops.masked_embedding_table import (
    MaskedTable,
    check_mask,
    check_table,
    index_from_bits,
    magnitude_mask,
    mask_bits,
    random_mask_bits,
    resolve_layout,
    row_counts,
    row_magnitude_mask,
    unpack_bits,
)
from ..reference.masked_embedding import row_positions
from ._base import PackedModule, copy_requires_grad, replace_data

INDEX_NAMES = ("rows", "bases", "starts", "columns")
RECORD_NAMES = ("records", "record_starts", "record_bases")


class _MaskedBase(PackedModule):
    """What `MaskedEmbedding` and `MaskedEmbeddingBag` share: the table and all that happens to it."""

    lookup_names = ("values", "rows", "starts", "columns", "records", "record_starts")

    # Called with each output that needs a gradient, the name of its op and the op's inputs: a training
    # method that scores elements which are not stored looks at the output's gradient through it.
    tap: Callable[..., None] | None = None

    def _init_table(
        self, num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse,
        weight, mask, device, dtype, density, layout,
    ) -> None:  # fmt: skip
        if not 0 <= density <= 1:
            raise ValueError(f"density must be in [0, 1]; got {density}")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        if padding_idx is not None:
            padding_idx = padding_index(padding_idx, num_embeddings)
        self.padding_idx = padding_idx
        self.max_norm, self.norm_type = max_norm, norm_type
        self.scale_grad_by_freq, self.sparse = scale_grad_by_freq, sparse
        self.layout = resolve_layout(layout, density, embedding_dim)
        self.prunes_by: float | None = None  # density of magnitude pruning, when that chose the mask
        self.fused: FusedOptimizer | None = None
        self.frozen_as: tuple[torch.dtype, int, int] | None = None  # dtype, k of fixed_k, nnz
        self.values: Tensor
        for name in RECORD_NAMES:
            self._set_buffer(name, None)
        if weight is not None:
            if tuple(weight.shape) != (num_embeddings, embedding_dim):
                wanted = (num_embeddings, embedding_dim)
                raise ValueError(f"_weight must have shape {wanted}; got {tuple(weight.shape)}")
            with torch.no_grad():
                table = masked_embedding_pack(weight, mask, layout=self.layout)
            self._take(table)
            return
        if torch.device(device or torch.get_default_device()).type == "meta":
            index, shape = self._meta_index(density)
        else:
            bits = random_mask_bits(num_embeddings, embedding_dim, density, self.layout)
            index, shape = index_from_bits(bits, embedding_dim, self.layout)
            index = tuple(None if t is None else t.to(device) for t in index)
        values = torch.empty(shape, device=device, dtype=dtype)
        self._take(MaskedTable(values, *index, num_embeddings, embedding_dim))
        self.reset_parameters()

    def _meta_index(self, density: float) -> tuple[tuple, tuple[int, ...]]:
        """Shapes without data. In layout row_remap the number of kept rows is not known: none."""
        V, D = self.num_embeddings, self.embedding_dim
        nnz, mask_bytes = round(density * V * D), (D + 7) // 8

        def empty(*shape, dtype=torch.uint8):
            return torch.empty(shape, dtype=dtype, device="meta")

        if self.layout == "fixed_k":
            return (empty(V, mask_bytes), None, None, None), (V, round(density * D))
        if self.layout == "bitmask":
            bases = empty((max(V, 1) + 65535) // 65536, dtype=torch.int64)
            return (empty(V, mask_bytes + 4), bases, None, None), (nnz,)
        starts, bases = empty(1, dtype=torch.int32), empty(1, dtype=torch.int64)
        return (empty((V + 63) // 64, 12), bases, starts, empty(nnz)), (nnz,)

    def _set_buffer(self, name: str, tensor: Tensor | None) -> None:
        """A buffer, or an ordinary None where this layout has none (torch.export trips over None buffers)."""
        if hasattr(self, name):
            delattr(self, name)
        if tensor is None:
            setattr(self, name, None)
        else:
            self.register_buffer(name, tensor)

    def _take(self, table: MaskedTable) -> None:
        """Hold the table. A Parameter that is already there stays the same object."""
        if isinstance(getattr(self, "values", None), nn.Parameter):
            same = self.values.shape == table.values.shape and self.values.dtype == table.values.dtype
            if same and self.values.device == table.values.device:
                with torch.no_grad():
                    self.values.copy_(table.values)
            else:
                replace_data(self.values, table.values.detach())
                self.values.grad = None
        else:
            self.values = nn.Parameter(table.values.detach())
        for name, tensor in zip(INDEX_NAMES, table.index, strict=True):
            self._set_buffer(name, tensor)
        self._place_tables()

    def reset_parameters(self) -> None:
        """Standard normal values, as ``nn.Embedding``; 0 in the padding row. The mask stays."""
        nn.init.normal_(self.values)
        if self.padding_idx is None or self.values.is_meta or self.values.numel() == 0:
            return
        row = torch.tensor([self.padding_idx], device=self.values.device)
        kept, at = row_positions(*self.table[:5], self.embedding_dim, row)
        with torch.no_grad():
            self.values.view(-1)[at[kept]] = 0

    @property
    def table(self) -> MaskedTable:
        """The packed table; of a frozen layer a copy, made on every read."""
        if self.frozen:
            return masked_embedding_thaw(self._records)
        return MaskedTable(
            self.values,
            self.rows,
            self.bases,
            self.starts,
            self.columns,
            self.num_embeddings,
            self.embedding_dim,
        )

    @property
    def mask(self) -> Tensor:
        """Bool ``[V, D]``, built on every read; `mask_bits` is eight times smaller."""
        return unpack_bits(self.mask_bits, self.embedding_dim)

    @property
    def mask_bits(self) -> Tensor:
        """``[V, ceil(D/8)]`` uint8, low bit first."""
        return mask_bits(self.table)

    @property
    def frozen(self) -> bool:
        return self.frozen_as is not None

    @property
    def dtype(self) -> torch.dtype:
        return self.frozen_as[0] if self.frozen else self.values.dtype

    @property
    def nnz(self) -> int:
        return self.frozen_as[2] if self.frozen else self.values.numel()

    @property
    def density(self) -> float:
        """Kept over all elements."""
        return self.nnz / max(1, self.num_embeddings * self.embedding_dim)

    # ---- to and from dense ----

    @classmethod
    def _options_of(cls, module: nn.Module) -> dict[str, Any]:
        """Constructor arguments that a dense module has set."""
        raise NotImplementedError

    @classmethod
    def from_dense(
        cls,
        module: nn.Module,
        *,
        density: float | None = None,
        mask: Tensor | None = None,
        layout: str = "bitmask",
    ) -> "_MaskedBase":
        """The packed layer for a dense one.

        Args:
            density: keep exactly ``round(density * V * D)`` elements, the largest magnitudes of the table
                (layout fixed_k: ``round(density * D)`` of each row).
            mask: bool ``[V, D]``, or mask bits ``[V, ceil(D/8)]`` uint8: what to keep; not together with
                ``density``. With neither, a mask of
                ``torch.nn.utils.prune`` if the module has one, else what is not 0.
            layout: see `recsparse_kernels.ops.masked_embedding_pack`.

        Raises:
            TypeError: the module is not of the dense type.
            ValueError: both ``density`` and ``mask``; shape of the mask.
        """
        if not isinstance(module, cls.dense_type):
            raise TypeError(f"module must be an nn.{cls.dense_type.__name__}; got {type(module).__name__}")
        if density is not None and mask is not None:
            raise ValueError("give density or mask, not both")
        weight = module.weight.detach()
        if density is not None and not 0 <= density <= 1:
            raise ValueError(f"density must be in [0, 1]; got {density}")
        if density is not None:
            mask = _choose(weight, density, layout)
        elif mask is None:
            mask = getattr(module, "weight_mask", weight) != 0
        else:
            if mask.dtype != torch.uint8:
                check_mask(mask, *weight.shape)
            mask = mask.to(weight.device)
        kept = int((row_counts(mask) if mask.dtype == torch.uint8 else mask).sum())
        own = cls(
            *weight.shape, **cls._options_of(module), device=weight.device, dtype=weight.dtype,
            _weight=weight, _mask=mask, density=min(1.0, kept / max(1, weight.numel())), layout=layout,
        )  # fmt: skip
        own.prunes_by = density
        copy_requires_grad(own, module)
        return own.train(module.training)

    def dense_weight(self) -> Tensor:
        return masked_embedding_unpack(self.table)

    def _empty_dense(self) -> nn.Module:
        options = self._options_of(self)
        # _weight: without it the constructor would draw a whole normal table
        device = (self.records if self.frozen else self.values).device
        weight = torch.empty(self.num_embeddings, self.embedding_dim, dtype=self.dtype, device=device)
        return self.dense_type(self.num_embeddings, self.embedding_dim, **options, _weight=weight)

    def _load_dense(self, dense: nn.Module) -> None:
        weight = dense.weight.detach()
        if self.prunes_by is not None:
            mask = _choose(weight, self.prunes_by, self.layout)
        else:
            mask = self.mask
        frozen = self.frozen
        self.unfreeze() if frozen else None
        self._take(masked_embedding_pack(weight, mask, layout=self.layout))
        self.freeze() if frozen else None

    def dense_bytes(self) -> int:
        return self.num_embeddings * self.embedding_dim * self.dtype.itemsize

    # ---- inference ----

    @property
    def _records(self) -> MaskedRecords:
        dtype, kept, _ = self.frozen_as
        like = torch.empty(0, dtype=dtype, device=self.records.device)
        return MaskedRecords(
            like,
            self.records,
            self.record_starts,
            self.record_bases,
            self.num_embeddings,
            self.embedding_dim,
            kept,
        )

    @torch.no_grad()
    def freeze(self) -> "_MaskedBase":
        """Repack for inference, in place: mask and values of a row side by side, so that a lookup touches one
        place less. The layer then has no parameters; `unfreeze` undoes it. With ``max_norm`` all rows are
        brought below it first, which is what their lookups would do.

        A table of layout row_remap stays as it is (only its gradient goes): it has no better form.
        """
        if self.frozen:
            return self
        if self.max_norm is not None:
            every = torch.arange(self.num_embeddings, device=self.values.device)
            masked_embedding(every[:0], self.table)  # checks before the table is written to
            renorm(every, self.table, self.max_norm, self.norm_type)
        if self.layout == "row_remap":
            self.requires_grad_(False)
            return self
        records = masked_embedding_freeze(self.table)
        self.frozen_as = self.values.dtype, records.kept, self.nnz
        self.fused = None
        del self.values
        self.values = None
        for name in INDEX_NAMES:
            self._set_buffer(name, None)
        for name, tensor in zip(RECORD_NAMES, records[1:4], strict=True):
            self._set_buffer(name, tensor)
        self._place_tables()
        return self

    def unfreeze(self) -> "_MaskedBase":
        """Back to a table that trains; its Parameter is a new one."""
        if not self.frozen:
            return self.requires_grad_(True)
        table = self.table
        self.frozen_as = None
        for name in RECORD_NAMES:
            self._set_buffer(name, None)
        self._take(table)
        return self

    # ---- the mask changes ----

    @torch.no_grad()
    def repack(self, mask: Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Another mask, in place: what both keep stays, what is newly kept starts at 0.

        The Parameter stays the same object, and with as many elements kept also its memory. State shaped
        like it (moments of ``optimizer`` or of the fused one) moves along.

        Args:
            mask: bool ``[V, D]`` or mask bits ``[V, ceil(D/8)]`` uint8.
        """
        if self.frozen:
            raise RuntimeError("a frozen layer keeps its mask: call unfreeze() first")
        old = self.table
        new = masked_embedding_repack(old, mask)
        shape = old.values.shape
        states = [optimizer.state[self.values]] if optimizer and self.values in optimizer.state else []
        moved = [
            (state, key, carry(moment.contiguous(), old, new))
            for state in states
            for key, moment in state.items()
            if isinstance(moment, Tensor) and moment.shape == shape and moment.dim()
        ]
        if self.fused is not None and self.fused.kind == "adam":
            self.fused.state = carry(self.fused.state, old, new)
            self.fused.second_state = carry(self.fused.second_state, old, new)
        for state, key, moment in moved:
            state[key] = moment
        self._take(new)

    @torch.no_grad()
    def refresh(self, weight: Tensor, mask: Tensor) -> bool:
        """Take new values and a new mask from a dense weight, in place; no dense copy is made.

        Args:
            weight: ``[V, D]``.
            mask: bool ``[V, D]`` or mask bits ``[V, ceil(D/8)]`` uint8.

        Returns:
            True where every tensor kept its memory: as many elements are kept as before. The Parameter
            is the same object either way.

        Raises:
            ValueError, TypeError: shapes or dtypes; nothing has changed.
        """
        if self.frozen:
            raise RuntimeError("a frozen layer keeps its mask: call unfreeze() first")
        if tuple(weight.shape) != self.table.sizes:
            raise ValueError(f"weight must have shape {self.table.sizes}; got {tuple(weight.shape)}")
        return self.put(masked_embedding_pack(weight.detach(), mask, layout=self.layout))

    @torch.no_grad()
    def put(self, table: MaskedTable) -> bool:
        """Hold the values and the mask of another table of the same size and layout; see `refresh`."""
        old = self.table
        if table.sizes != old.sizes or table.layout != old.layout:
            raise ValueError(
                f"table must be {old.layout} of sizes {old.sizes}; got {table.layout} {table.sizes}"
            )
        pairs = [(old.values, table.values), *zip(old.index, table.index, strict=True)]
        pairs = [(own, new) for own, new in pairs if own is not None]
        if any(own.shape != new.shape for own, new in pairs):
            self._take(table._replace(values=table.values.to(old.values)))
            return False
        for own, new in pairs:
            own.copy_(new)
        return True

    # ---- the optimizer inside backward ----

    def fuse_optimizer(
        self, kind: str, lr: float, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> FusedOptimizer:
        """From now on backward itself steps the table: "sgd", "rowwise_adagrad" or "adam" (lazy, as
        ``torch.optim.SparseAdam``). ``values`` gets no gradient, so other optimizers pass over it.

        Returns:
            The optimizer; set its ``lr`` to follow a schedule. Its state is no part of ``state_dict``.
        """
        if self.frozen:
            raise RuntimeError("a frozen layer does not train: call unfreeze() first")
        self.fused = FusedOptimizer.create(kind, self.table, lr, betas, eps)
        return self.fused

    # ---- the whole table ----

    def all_rows(self) -> Tensor:
        """All rows as a dense ``[V, D]``, for one use; the gradient that comes back is packed."""
        return self._watched(self.dense_weight(), "all_rows")

    def matmul_t(self, input: Tensor) -> Tensor:
        """``input [..., D] @ weight.T``, scores against the whole table, without a dense copy."""
        return self._watched(masked_embedding_matmul_t(input, self.table), "matmul_t", input)

    def propagate(self, adjacency: Tensor) -> Tensor:
        """``adjacency [M, V] @ weight`` for a sparse CSR matrix, without a dense copy."""
        return self._watched(masked_embedding_propagate(adjacency, self.table), "propagate", adjacency)

    def _watched(self, output: Tensor, op: str, *inputs) -> Tensor:
        if self.tap is not None and output.requires_grad:
            self.tap(output, op, *inputs)
        return output

    # ---- state ----

    def memory_report(self, optimizer: torch.optim.Optimizer | None = None):
        report = super().memory_report(optimizer)
        if self.fused is None:
            return report
        held = sum(
            t.numel() * t.element_size() for t in (self.fused.state, self.fused.second_state) if t is not None
        )
        dense = {"sgd": 0, "rowwise_adagrad": held, "adam": held * self.dense_bytes()}[self.fused.kind]
        if self.fused.kind == "adam":
            dense //= max(1, self.nnz * self.values.element_size())
        return type(report)(report.dense_bytes, report.own_bytes, held, dense)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        """A table of the same size with another mask, or more or fewer values, fits; one whose tensors
        contradict each other, or that has another layout, changes nothing."""
        names = RECORD_NAMES if self.frozen else ("values", *INDEX_NAMES)
        own = {name for name in names if getattr(self, name) is not None}
        given = {name for name in names if prefix + name in state_dict}
        missing_keys.extend(prefix + name for name in sorted(own - given) if strict or given)
        if own - given:
            return
        if strict:
            unexpected_keys.extend(
                key for key in state_dict if key.startswith(prefix) and key[len(prefix) :] not in own
            )
        if self.frozen:
            self._load_records(state_dict, prefix, error_msgs)
            return
        values = state_dict[prefix + "values"]
        loaded = MaskedTable(
            values, *(state_dict[prefix + name] if name in own else None for name in INDEX_NAMES),
            self.num_embeddings, self.embedding_dim,
        )  # fmt: skip
        try:
            check_table(loaded)
        except (ValueError, RuntimeError, IndexError) as error:
            error_msgs.append(self._misfit(error, state_dict, prefix, sorted(own)))
            return
        assign = local_metadata.get("assign_to_params_buffers", False)
        if assign:
            if not isinstance(values, nn.Parameter):
                values = nn.Parameter(values, requires_grad=self.values.requires_grad)
            self.values = values
            for name, tensor in zip(INDEX_NAMES, loaded.index, strict=True):
                self._set_buffer(name, tensor)
            return
        if self.values.is_meta:  # as torch: copying into meta tensors does nothing
            return
        place = {"device": self.values.device}
        self._take(
            MaskedTable(
                values.detach().to(**place, dtype=self.values.dtype, copy=True),
                *(None if t is None else t.to(**place, copy=True) for t in loaded.index), *self.table.sizes,
            )
        )  # fmt: skip

    def _load_records(self, state_dict, prefix, error_msgs) -> None:
        dtype, kept, _ = self.frozen_as
        given = [state_dict[prefix + name] for name in RECORD_NAMES]
        loaded = self._records._replace(
            records=given[0],
            starts=given[1],
            bases=given[2],
            like=torch.empty(0, dtype=dtype, device=given[0].device),
        )
        try:
            nnz = check_records(loaded)
        except (ValueError, RuntimeError, IndexError) as error:
            error_msgs.append(self._misfit(error, state_dict, prefix, RECORD_NAMES))
            return
        self.frozen_as = dtype, kept, nnz
        for name, tensor in zip(RECORD_NAMES, given, strict=True):
            self._set_buffer(name, tensor.detach().to(self.records.device, copy=True))
        self._place_tables()

    def _misfit(self, error, state_dict, prefix, names) -> str:
        sizes = ", ".join(f"{prefix + name} {tuple(state_dict[prefix + name].shape)}" for name in names)
        have = ", ".join(f"{name} {tuple(getattr(self, name).shape)}" for name in names)
        return f"{prefix}{names[-1]}: {error}; the state_dict has {sizes}; this layer has {have}"

    def extra_repr(self) -> str:
        text = (
            f"{self.num_embeddings}, {self.embedding_dim}, density={self.density:.4g}, layout={self.layout!r}"
        )
        if self.padding_idx is not None:
            text += f", padding_idx={self.padding_idx}"
        if self.max_norm is not None:
            text += f", max_norm={self.max_norm}"
        if self.scale_grad_by_freq:
            text += ", scale_grad_by_freq=True"
        if self.sparse:
            text += ", sparse=True"
        if self.frozen:
            text += ", frozen"
        return text


def _choose(weight: Tensor, density: float, layout: str) -> Tensor:
    if layout == "fixed_k":
        return row_magnitude_mask(weight, round(density * weight.shape[1]))
    return magnitude_mask(weight, density)


class MaskedEmbedding(_MaskedBase):
    """``nn.Embedding`` over a packed table.

    Args:
        num_embeddings ... dtype: as ``nn.Embedding``.
        density: of the random mask to start with; exactly ``round(density * V * D)`` elements are kept.
        layout: "bitmask", "fixed_k", "row_remap" or "auto"; see `ops.masked_embedding_pack`.

    Attributes:
        values: Parameter, the kept elements. Gradient and optimizer state have its size.
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
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device=None,
        dtype=None,
        *,
        density: float = 0.2,
        layout: str = "bitmask",
        _mask: Tensor | None = None,
    ):
        super().__init__()
        self._init_table(
            num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse,
            _weight, _mask, device, dtype, density, layout,
        )  # fmt: skip
        self.values.requires_grad_(not _freeze)

    @classmethod
    def from_pretrained(
        cls, embeddings, freeze=True, padding_idx=None, max_norm=None, norm_type=2.0,
        scale_grad_by_freq=False, sparse=False, *, density: float | None = None,
        mask: Tensor | None = None, layout: str = "bitmask",
    ) -> "MaskedEmbedding":  # fmt: skip
        """As ``nn.Embedding.from_pretrained``, then `from_dense`."""
        dense = nn.Embedding.from_pretrained(
            embeddings, freeze, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
        )
        return cls.from_dense(dense, density=density, mask=mask, layout=layout)

    @classmethod
    def _options_of(cls, module) -> dict[str, Any]:
        names = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
        return {name: getattr(module, name) for name in names}

    def forward(self, input: Tensor) -> Tensor:
        if self.frozen:
            return masked_embedding_frozen(input, self._records)
        output = masked_embedding(
            input, self.table, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq,
            self.sparse, fused=self.fused,
        )  # fmt: skip
        return self._watched(output, "lookup", input)


class MaskedEmbeddingBag(_MaskedBase):
    """``nn.EmbeddingBag`` over a packed table.

    Args:
        num_embeddings ... dtype: as ``nn.EmbeddingBag``.
        density, layout: see `MaskedEmbedding`.

    ``per_sample_weights`` may also be given in mode "mean", and in any floating dtype.
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
        _weight: Tensor | None = None,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        device=None,
        dtype=None,
        *,
        density: float = 0.2,
        layout: str = "bitmask",
        _mask: Tensor | None = None,
    ):
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode must be one of {tuple(MODES)}; got {mode!r}")
        self.mode, self.include_last_offset = mode, include_last_offset
        self._init_table(
            num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse,
            _weight, _mask, device, dtype, density, layout,
        )  # fmt: skip

    @classmethod
    def from_pretrained(
        cls, embeddings, freeze=True, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, mode="mean",
        sparse=False, include_last_offset=False, padding_idx=None, *, density: float | None = None,
        mask: Tensor | None = None, layout: str = "bitmask",
    ) -> "MaskedEmbeddingBag":  # fmt: skip
        """As ``nn.EmbeddingBag.from_pretrained``, then `from_dense`."""
        dense = nn.EmbeddingBag.from_pretrained(
            embeddings,
            freeze,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            mode,
            sparse,
            include_last_offset,
            padding_idx,
        )
        return cls.from_dense(dense, density=density, mask=mask, layout=layout)

    @classmethod
    def _options_of(cls, module) -> dict[str, Any]:
        names = (
            "max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse", "include_last_offset",
            "padding_idx",
        )  # fmt: skip
        return {name: getattr(module, name) for name in names}

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        if self.frozen:
            return masked_embedding_bag_frozen(
                input, self._records, offsets, self.mode, per_sample_weights, self.include_last_offset,
                self.padding_idx,
            )  # fmt: skip
        output = masked_embedding_bag(
            input, self.table, offsets, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.mode,
            self.sparse, per_sample_weights, self.include_last_offset, self.padding_idx, fused=self.fused,
        )  # fmt: skip
        return self._watched(output, "bag", input, offsets, per_sample_weights)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mode={self.mode!r}"
