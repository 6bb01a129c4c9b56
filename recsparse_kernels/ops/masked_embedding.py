"""Lookups in masked (element-wise pruned) embedding tables that store only what is kept."""

import dataclasses

import torch
from torch import Tensor

from ..config import place_table
from ..reference import masked_embedding as reference
from ._backend import Op
from ._check import INDEX_DTYPES, check_device, check_dtype, check_shape, check_tensor, in_autocast, shape
from ._lookup import check_bags, check_mode, check_sample_weights, padding_index
from .masked_embedding_table import (
    MAX_EMBEDDING_DIM,
    MaskedTable,
    check_mask,
    index_from_bits,
    pack_bits,
    resolve_layout,
    row_counts,
)

MODES = {"sum": 0, "mean": 1, "max": 2}
EACH = 3  # the ops' mode for unpooled lookups
OPTIMIZERS = {"sgd": 0, "rowwise_adagrad": 1, "adam": 2}


# ---- ops: fake functions, autograd formulas ----


def _bag_count(indices, offsets, mode, include_last_offset) -> int:
    if mode == EACH:
        return indices.numel()
    return indices.shape[0] if offsets is None else offsets.shape[0] - int(include_last_offset)


def _fake_embedding(values, rows, bases, starts, columns, indices, V, D, padding_idx, by_freq, sparse):
    return values.new_empty((*indices.shape, D))


def _fake_bag(
    values,
    rows,
    bases,
    starts,
    columns,
    indices,
    offsets,
    weights,
    V,
    D,
    mode,
    padding_idx,
    last,
    by_freq,
    sparse,
):
    bags = _bag_count(indices, offsets, mode, last)
    return values.new_empty((bags, D)), values.new_empty((bags if mode == 2 else 0, D), dtype=torch.int32)


def _fake_grad_weights(
    grad_output, values, rows, bases, starts, columns, indices, offsets, V, D, mode, padding_idx, last
):
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    return values.new_empty(indices.shape, dtype=wide)


def _fake_touched(
    grad_output,
    values,
    rows,
    bases,
    starts,
    columns,
    indices,
    offsets,
    weights,
    V,
    D,
    mode,
    padding_idx,
    last,
    by_freq,
):
    count = torch.library.get_ctx().new_dynamic_size()
    return values.new_empty((count,), dtype=torch.int64), values.new_empty((count, *values.shape[1:]))


_GRAD_VALUES = Op(
    reference.masked_embedding_bag_grad_values,
    fake=lambda grad_output, values, *rest: torch.empty_like(values),
    autocast=False,
)
_GRAD_WEIGHTS = Op(
    reference.masked_embedding_bag_grad_per_sample_weights, fake=_fake_grad_weights, autocast=False
)
_GRAD_TOUCHED = Op(reference.masked_embedding_bag_grad_touched, fake=_fake_touched, autocast=False)
_UPDATE = Op(
    reference.masked_embedding_bag_update,
    fake=lambda *arguments: None,
    mutates=("values", "state", "second_state"),
    autocast=False,
)
_RENORM = Op(
    reference.masked_embedding_renorm, fake=lambda *arguments: None, mutates=("values",), autocast=False
)


def _values_gradient(grad_output, values, index, lookups, sizes, options, sparse, backend) -> Tensor:
    """Dense of the shape of ``values``, or sparse COO over the touched rows."""
    indices, offsets, weights, argmax = lookups
    grad_output = grad_output.contiguous()
    if not sparse:
        return _GRAD_VALUES(
            grad_output, values, *index, indices, offsets, weights, argmax, *sizes, *options, backend=backend
        )
    where, grads = _GRAD_TOUCHED(
        grad_output, values, *index, indices, offsets, weights, *sizes, *options, backend=backend
    )
    return torch.sparse_coo_tensor(
        where.unsqueeze(0), grads, values.shape, is_coalesced=True, check_invariants=False
    )


def _setup_embedding(ctx, inputs, output):
    values, rows, bases, starts, columns, indices, V, D, padding_idx, by_freq, sparse = inputs
    ctx.save_for_backward(values, rows, bases, starts, columns, indices)
    ctx.sizes, ctx.padding_idx, ctx.by_freq, ctx.sparse = (V, D), padding_idx, by_freq, sparse


def _backward_embedding(ctx, grad_output, *, backend):
    values, *index, indices = ctx.saved_tensors
    grad = None
    if ctx.needs_input_grad[0]:
        grad = _values_gradient(
            grad_output.reshape(-1, ctx.sizes[1]), values, index, (indices, None, None, None), ctx.sizes,
            (EACH, ctx.padding_idx, False, ctx.by_freq), ctx.sparse, backend,
        )  # fmt: skip
    return (grad, *[None] * 10)


def _setup_bag(ctx, inputs, output):
    (values, rows, bases, starts, columns, indices, offsets, weights, V, D, mode, padding_idx, last, by_freq,
     sparse) = inputs  # fmt: skip
    argmax = output[1] if mode == 2 else None
    ctx.save_for_backward(values, rows, bases, starts, columns, indices, offsets, weights, argmax)
    ctx.mark_non_differentiable(output[1])
    ctx.sizes, ctx.options, ctx.sparse = (V, D), (mode, padding_idx, last, by_freq), sparse


def _backward_bag(ctx, grad_output, grad_argmax, *, backend):
    values, *index, indices, offsets, weights, argmax = ctx.saved_tensors
    grad_values = grad_weights = None
    if ctx.needs_input_grad[0]:
        grad_values = _values_gradient(
            grad_output, values, index, (indices, offsets, weights, argmax), ctx.sizes, ctx.options,
            ctx.sparse, backend,
        )  # fmt: skip
    if ctx.needs_input_grad[7]:
        grad_weights = _GRAD_WEIGHTS(
            grad_output.contiguous(),
            values,
            *index,
            indices,
            offsets,
            *ctx.sizes,
            *ctx.options[:3],
            backend=backend,
        )
    return (grad_values, *[None] * 6, grad_weights, *[None] * 7)


_EMBEDDING = Op(
    reference.masked_embedding,
    fake=_fake_embedding,
    backward=_backward_embedding,
    setup_context=_setup_embedding,
    autocast=False,
)
_BAG = Op(
    reference.masked_embedding_bag,
    fake=_fake_bag,
    backward=_backward_bag,
    setup_context=_setup_bag,
    autocast=False,
)


def _setup_unpack(ctx, inputs, output):
    values, *index, V, D = inputs
    ctx.save_for_backward(values, *index)
    ctx.sizes = V, D


def _backward_unpack(ctx, grad_output, *, backend):
    values, *index = ctx.saved_tensors
    grad = _GATHER(grad_output.contiguous(), values, *index, *ctx.sizes, backend=backend)
    return (grad, *[None] * 6)


def _setup_gather(ctx, inputs, output):
    _, values, *index, V, D = inputs
    ctx.save_for_backward(*index)
    ctx.sizes = V, D


def _backward_gather(ctx, grad_values, *, backend):
    dense = _UNPACK(grad_values.contiguous(), *ctx.saved_tensors, *ctx.sizes, backend=backend)
    return (dense, *[None] * 7)


_GATHER = Op(
    reference.masked_embedding_unpack_grad_values,
    fake=lambda grad_output, values, *rest: torch.empty_like(values, memory_format=torch.contiguous_format),
    backward=_backward_gather,
    setup_context=_setup_gather,
    autocast=False,
)
_UNPACK = Op(
    reference.masked_embedding_unpack,
    fake=lambda values, rows, bases, starts, columns, V, D: values.new_empty((V, D)),
    backward=_backward_unpack,
    setup_context=_setup_unpack,
    autocast=False,
)
_REPACK = Op(
    reference.masked_embedding_repack,
    fake=lambda values, rows, bases, starts, columns, new_values, *rest: torch.empty_like(new_values),
    autocast=False,
)


def _setup_matmul(ctx, inputs, output):
    input, values, *index, V, D = inputs
    ctx.save_for_backward(input, values, *index)
    ctx.sizes = V, D


def _backward_matmul(ctx, grad_output, *, backend):
    input, values, *index = ctx.saved_tensors
    grad_output = grad_output.contiguous()
    grad_input = grad_values = None
    if ctx.needs_input_grad[0]:
        grad_input = _MATMUL_GRAD_INPUT(grad_output, values, *index, *ctx.sizes, backend=backend)
    if ctx.needs_input_grad[1]:
        grad_values = _MATMUL_GRAD_VALUES(grad_output, input, values, *index, *ctx.sizes, backend=backend)
    return (grad_input, grad_values, *[None] * 6)


_MATMUL_GRAD_INPUT = Op(
    reference.masked_embedding_matmul_t_grad_input,
    fake=lambda grad_output, values, rows, bases, starts, columns, V, D: grad_output.new_empty(
        (grad_output.shape[0], D)
    ),
    autocast=False,
)
_MATMUL_GRAD_VALUES = Op(
    reference.masked_embedding_matmul_t_grad_values,
    fake=lambda grad_output, input, values, *rest: torch.empty_like(values),
    autocast=False,
)
_MATMUL = Op(
    reference.masked_embedding_matmul_t,
    fake=lambda input, values, rows, bases, starts, columns, V, D: input.new_empty((input.shape[0], V)),
    backward=_backward_matmul,
    setup_context=_setup_matmul,
    autocast=False,
)


# ---- checks ----


def _check_table(table: MaskedTable) -> None:
    if not isinstance(table, MaskedTable):
        raise TypeError(
            f"table must be a MaskedTable, from masked_embedding_pack; got {type(table).__name__}"
        )
    check_dtype("table.values", table.values)


def check_lookup(
    input: Tensor,
    values: Tensor,
    num_embeddings: int,
    padding_idx: int | None = None,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
    mode: str = "sum",
    include_last_offset: bool = False,
    *,
    bags: bool = False,
) -> tuple:
    """``input, offsets, per_sample_weights, padding_idx`` as the ops take them; raises as the public
    functions say."""
    check_dtype("input", input, INDEX_DTYPES)
    check_device("input", input, "table.values", values)
    check_mode(mode, per_sample_weights=per_sample_weights is not None)
    if bags:
        check_bags(input, offsets, include_last_offset)
    check_sample_weights(per_sample_weights, input)
    weights = None
    if per_sample_weights is not None:  # float32; float64 for a float64 table
        wide = torch.float64 if values.dtype == torch.float64 else torch.float32
        weights = per_sample_weights.to(wide).contiguous()
    padding = padding_index(padding_idx, num_embeddings)
    return input.contiguous(), offsets.contiguous() if offsets is not None else None, weights, padding


# ---- fused optimizers ----


@dataclasses.dataclass
class FusedOptimizer:
    """An optimizer that runs inside backward and leaves no gradient. Its state is packed like the table.

    Attributes:
        kind: "sgd"; "rowwise_adagrad", with one sum a row in ``state [V]``; or "adam", lazy as
            ``torch.optim.SparseAdam``, with both moments, float32 of the shape of ``values``.
        step: steps done (each backward through a lookup is one).
    """

    kind: str
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    state: Tensor | None = None
    second_state: Tensor | None = None
    step: int = 0

    @classmethod
    def create(
        cls,
        kind: str,
        table: MaskedTable,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> "FusedOptimizer":
        """Raises ValueError for an unknown kind or values outside their range."""
        if kind not in OPTIMIZERS:
            raise ValueError(f"kind must be one of {tuple(OPTIMIZERS)}; got {kind!r}")
        if lr < 0 or eps < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"lr and eps must not be negative and betas in [0, 1); got {lr}, {eps}, {betas}")
        wide = torch.float64 if table.values.dtype == torch.float64 else torch.float32
        shapes = {"sgd": ((0,), (0,)), "rowwise_adagrad": ((table.num_embeddings,), (0,))}
        first, second = shapes.get(kind, (table.values.shape, table.values.shape))
        moments = [table.values.new_zeros(shape, dtype=wide) for shape in (first, second)]
        place_table(*moments)
        return cls(kind, lr, tuple(betas), eps, *moments)


class _UpdatingLookup(torch.autograd.Function):
    """A pooled (or, in mode EACH, plain) lookup whose backward steps the optimizer."""

    @staticmethod
    def forward(ctx, values, weights, index, lookups, sizes, options, optimizer, backend):
        indices, offsets = lookups
        mode, padding_idx, last, by_freq = options
        argmax = None
        if mode == EACH:
            output = _EMBEDDING(values, *index, indices, *sizes, padding_idx, by_freq, False, backend=backend)
        else:
            output, places = _BAG(
                values, *index, indices, offsets, weights, *sizes, *options, False, backend=backend
            )
            argmax = places if mode == 2 else None
        # values go around save_for_backward: they are meant to change before a second lookup's backward
        ctx.values = values
        ctx.lookups = index, indices, offsets, weights, argmax
        ctx.rest = sizes, options, optimizer, backend
        return output

    @staticmethod
    def backward(ctx, grad_output):
        index, indices, offsets, weights, argmax = ctx.lookups
        sizes, options, optimizer, backend = ctx.rest
        grad_output = grad_output.reshape(-1, sizes[1]).contiguous()
        values, grad_weights = ctx.values.detach(), None
        if ctx.needs_input_grad[1]:
            grad_weights = _GRAD_WEIGHTS(
                grad_output, values, *index, indices, offsets, *sizes, *options[:3], backend=backend
            )
        if ctx.needs_input_grad[0]:
            optimizer.step += 1
            _UPDATE(
                values, optimizer.state, optimizer.second_state, grad_output, *index, indices, offsets,
                weights, argmax, *sizes, *options, OPTIMIZERS[optimizer.kind], optimizer.lr, *optimizer.betas,
                optimizer.eps, optimizer.step, backend=backend,
            )  # fmt: skip
        return None, grad_weights, None, None, None, None, None, None


# ---- public functions ----


def masked_embedding_pack(
    weight: Tensor, mask: Tensor | None = None, *, layout: str = "bitmask", backend: str | None = None
) -> MaskedTable:
    """Pack what a mask keeps of a dense table.

    Args:
        weight: ``[V, D]``; the values of the result are differentiable with respect to it.
        mask: bool ``[V, D]``, True means kept, or mask bits ``[V, ceil(D/8)]`` uint8, low bit first; None
            keeps what is not 0.
        layout: "bitmask": any mask. "fixed_k": every row keeps equally many; no row starts.
            "row_remap": nearly empty tables, ``D <= 256``. "auto": row_remap or bitmask, by density.

    Raises:
        ValueError: shapes differ, ``D`` too large, the layout is unknown or does not allow the mask.
    """
    check_dtype("weight", weight)
    check_shape("weight", weight, (None, None), "[V, D]")
    num_rows, dim = weight.shape
    if not 1 <= dim <= MAX_EMBEDDING_DIM:
        raise ValueError(f"weight must have 1 to {MAX_EMBEDDING_DIM} columns; got {dim}")
    if mask is None:
        mask = weight.detach() != 0
    bits = _bits_of(mask, num_rows, dim)
    layout = resolve_layout(layout, float(row_counts(bits).sum()) / max(num_rows * dim, 1), dim)
    index, values_shape = index_from_bits(bits, dim, layout)
    template = weight.detach().new_empty(values_shape)
    values = _GATHER(weight.contiguous(), template, *index, num_rows, dim, backend=backend)
    place_table(values, *index)
    return MaskedTable(values, *index, num_rows, dim)


def _bits_of(mask: Tensor, num_rows: int, dim: int) -> Tensor:
    """Mask bits of a mask that is either; checked."""
    if mask.dtype != torch.uint8:
        check_mask(mask, num_rows, dim)
        return pack_bits(mask)
    check_shape("mask", mask, (num_rows, (dim + 7) // 8), "[V, ceil(D/8)]")
    if dim % 8 and bool((mask[:, -1] >> (dim % 8)).any()):
        raise ValueError(f"mask has bits past the {dim} columns of the table")
    return mask


def masked_embedding_unpack(table: MaskedTable, *, backend: str | None = None) -> Tensor:
    """The dense table ``[V, D]``, 0 where nothing is kept; differentiable in ``table.values``."""
    _check_table(table)
    return _UNPACK(table.values, *table.index, *table.sizes, backend=backend)


def masked_embedding_repack(
    table: MaskedTable, mask: Tensor, *, layout: str | None = None, backend: str | None = None
) -> MaskedTable:
    """The table with another mask: kept values stay, newly kept ones are 0. No dense copy is made.

    Args:
        mask: bool ``[V, D]``, or mask bits ``[V, ceil(D/8)]`` uint8, low bit first.
        layout: of the result; None: as before.

    Raises:
        ValueError, TypeError: shape or dtype of the mask.
    """
    _check_table(table)
    check_tensor("mask", mask)
    num_rows, dim = table.sizes
    bits = _bits_of(mask, num_rows, dim)
    index, values_shape = index_from_bits(bits, dim, layout or table.layout)
    new = MaskedTable(table.values.detach().new_empty(values_shape), *index, num_rows, dim)
    return new._replace(values=carry(table.values.detach(), table, new, backend))


def carry(values: Tensor, table: MaskedTable, new: MaskedTable, backend: str | None = None) -> Tensor:
    """``values``, or anything packed like them (optimizer moments), in the places of ``new``."""
    template = values.new_empty(new.values.shape)
    return _REPACK(values, *table.index, template, *new.index, *table.sizes, backend=backend)


def masked_embedding(
    input: Tensor,
    table: MaskedTable,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    *,
    fused: FusedOptimizer | None = None,
    backend: str | None = None,
) -> Tensor:
    """``F.embedding`` on a packed table: bit for bit ``F.embedding(input, weight * mask)``.

    Args:
        input: int32 or int64, any shape.
        table: from `masked_embedding_pack`.
        padding_idx: row that gets no gradient; negative counts from the end.
        max_norm, norm_type: looked-up rows are first scaled down to this norm, in place.
        scale_grad_by_freq: a row's gradient is divided by how often it was looked up.
        sparse: the gradient of ``table.values`` is a sparse COO tensor over the touched rows (inside
            ``torch.compile`` it is dense).
        fused: optimizer to run in backward; ``table.values`` then gets no gradient.

    Returns:
        ``[*input.shape, D]``, dtype of ``table.values``.

    Raises:
        IndexError: an index outside the table.
        ValueError, TypeError: dtypes, ``padding_idx``; a table that contradicts itself.
    """
    _check_table(table)
    input, _, _, padding = check_lookup(input, table.values, table.num_embeddings, padding_idx)
    if max_norm is not None:
        renorm(input, table, max_norm, norm_type, backend)
    if fused is not None:
        options = (EACH, padding, False, scale_grad_by_freq)
        return _UpdatingLookup.apply(
            table.values, None, table.index, (input, None), table.sizes, options, fused, backend
        )
    sparse = sparse and not torch.compiler.is_compiling()  # COO tensors have no place in a compiled graph
    return _EMBEDDING(
        table.values, *table.index, input, *table.sizes, padding, scale_grad_by_freq, sparse, backend=backend
    )


def masked_embedding_bag(
    input: Tensor,
    table: MaskedTable,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    *,
    fused: FusedOptimizer | None = None,
    backend: str | None = None,
) -> Tensor:
    """``F.embedding_bag`` on a packed table.

    Args:
        input: int32 or int64; ``[N]`` with offsets, or ``[B, L]``.
        table: from `masked_embedding_pack`.
        offsets: int32 or int64 ``[B]`` (``[B + 1]`` with ``include_last_offset``): where bags begin, from 0,
            not descending.
        mode: "sum", "mean" or "max". The mean divides by the number of lookups, padding not counted.
        per_sample_weights: floating, of the shape of ``input``, for sum and mean.
        padding_idx: row left out of bags and of the gradient; negative counts from the end.
        max_norm, norm_type, scale_grad_by_freq, sparse, fused: see `masked_embedding`.

    Returns:
        ``[B, D]``, dtype of ``table.values``, accumulated in float32; 0 for an empty bag.

    Raises:
        IndexError: an index outside the table.
        ValueError, TypeError: shapes, dtypes, offsets; ``mode="max"`` with ``sparse``,
            ``scale_grad_by_freq`` or ``per_sample_weights``; a table that contradicts itself.
    """
    _check_table(table)
    input, offsets, weights, padding = check_lookup(
        input, table.values, table.num_embeddings, padding_idx, offsets, per_sample_weights, mode,
        include_last_offset, bags=True,
    )  # fmt: skip
    check_mode(mode, sparse=sparse, scale_grad_by_freq=scale_grad_by_freq)
    if max_norm is not None:
        renorm(input, table, max_norm, norm_type, backend)
    options = (MODES[mode], padding, include_last_offset, scale_grad_by_freq)
    if fused is not None:
        return _UpdatingLookup.apply(
            table.values, weights, table.index, (input, offsets), table.sizes, options, fused, backend
        )
    sparse = sparse and not torch.compiler.is_compiling()  # COO tensors have no place in a compiled graph
    output, _ = _BAG(
        table.values, *table.index, input, offsets, weights, *table.sizes, *options, sparse, backend=backend
    )
    return output


def renorm(
    input: Tensor, table: MaskedTable, max_norm: float, norm_type: float, backend: str | None = None
) -> None:
    """Scale the looked-up rows down to ``max_norm``, in place."""
    if max_norm <= 0 or norm_type <= 0:
        raise ValueError(f"max_norm and norm_type must be positive; got {max_norm} and {norm_type}")
    values = table.values.detach()
    _RENORM(values, *table.index, input, *table.sizes, float(max_norm), float(norm_type), backend=backend)


def masked_embedding_matmul_t(input: Tensor, table: MaskedTable, *, backend: str | None = None) -> Tensor:
    """``input @ W.T`` against the whole table, without a dense copy: one multiply-add for each kept value.

    Args:
        input: ``[..., D]``, dtype of ``table.values``.

    Returns:
        ``[..., V]``, differentiable with respect to ``input`` and ``table.values``. Inside autocast any
        floating ``input`` will do, the product is computed in the table's dtype and given in autocast's.

    Raises:
        ValueError, TypeError: shape, dtype.
    """
    _check_table(table)
    check_tensor("input", input)
    given = None
    if in_autocast(input) and input.is_floating_point():
        if torch.float64 not in (input.dtype, table.values.dtype):  # as torch, which leaves these alone
            given, input = torch.get_autocast_dtype(input.device.type), input.to(table.values.dtype)
    if input.dtype != table.values.dtype:
        raise TypeError(f"input must have the dtype of table.values, {table.values.dtype}; got {input.dtype}")
    check_device("input", input, "table.values", table.values)
    if input.dim() < 1 or input.shape[-1] != table.embedding_dim:
        raise ValueError(f"input must have shape [..., {table.embedding_dim}]; got {shape(input)}")
    flat = input.reshape(-1, table.embedding_dim)
    output = _MATMUL(flat.contiguous(), table.values, *table.index, *table.sizes, backend=backend)
    output = output if given is None else output.to(given)
    return output.reshape(*input.shape[:-1], table.num_embeddings)


def masked_embedding_propagate(
    adjacency: Tensor, table: MaskedTable, *, backend: str | None = None
) -> Tensor:
    """``adjacency @ W``, as in graph propagation, without a dense copy.

    Args:
        adjacency: sparse CSR ``[M, V]``; its values are differentiable.

    Returns:
        ``[M, D]``, dtype of ``table.values``.

    Raises:
        ValueError, TypeError: not CSR, or the wrong number of columns.
    """
    check_tensor("adjacency", adjacency)
    if adjacency.layout != torch.sparse_csr:
        raise TypeError(f"adjacency must be sparse CSR; got {adjacency.layout}")
    if adjacency.shape[1] != table.num_embeddings:
        raise ValueError(f"adjacency must have {table.num_embeddings} columns; got shape {shape(adjacency)}")
    return masked_embedding_bag(
        adjacency.col_indices(), table, adjacency.crow_indices(), mode="sum",
        per_sample_weights=adjacency.values(), include_last_offset=True, backend=backend,
    )  # fmt: skip
