"""Low-rank embeddings, bags and multi-field lookups: public functions, autograd and fake functions."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..config import get_check_indices
from ..reference import low_rank_embedding as reference
from ._backend import Op
from ._check import INDEX_DTYPES, check_device, check_dtype, check_like, check_shape
from ._lookup import check_bags, check_mode, check_sample_weights, padding_index

MODES = {"sum": reference.SUM, "mean": reference.MEAN, "max": reference.MAX}


def _bags(indices: Tensor, offsets: Tensor | None, include_last_offset: bool):
    return indices.shape[0] if offsets is None else offsets.shape[0] - bool(include_last_offset)


# ---- gradients: primitives of their own -----------------------------------------------------------

_bag_grad = Op(
    reference.low_rank_embedding_bag_grad,
    fake=lambda grad_output,
    table,
    up,
    mean,
    indices,
    offsets,
    weights,
    pooled,
    mode,
    padding,
    last,
    needs_weights: (
        pooled.new_empty(pooled.shape),
        up.new_empty(up.shape),
        up.new_empty(0 if mean is None else up.shape[0]),
        up.new_empty(indices.shape[0] if needs_weights else 0),
    ),
    autocast=False,
)
_max_grad = Op(
    reference.low_rank_embedding_bag_max_grad,
    fake=lambda grad_output, table, up, indices, positions, needs_mean: (
        table.new_empty(table.shape),
        up.new_empty(up.shape),
        up.new_empty(up.shape[0] if needs_mean else 0),
    ),
    autocast=False,
)
_rows_grad = Op(
    reference.low_rank_rows_grad,
    fake=lambda grad_pooled,
    indices,
    offsets,
    weights,
    num_embeddings,
    mode,
    padding,
    last: grad_pooled.new_empty(num_embeddings, grad_pooled.shape[1]),
    autocast=False,
)
_rows_grad_sparse = Op(
    reference.low_rank_rows_grad_sparse,
    fake=lambda grad_pooled, indices, offsets, weights, num_embeddings, mode, padding, last: (
        indices.new_empty(indices.shape, dtype=torch.int64),
        grad_pooled.new_empty(indices.shape[0], grad_pooled.shape[1]),
        indices.new_empty(1, dtype=torch.int64),
    ),
    autocast=False,
)
_fields_grad = Op(
    reference.low_rank_fields_grad,
    fake=lambda grad_mid, grad_output, grad_interaction, mid, projections, bias: (
        mid.new_empty(mid.shape),
        projections.new_empty(projections.shape),
        mid.new_empty(0 if bias is None else projections.shape[0], projections.shape[2]),
    ),
    autocast=False,
)


def _grad_table(grad_pooled: Tensor, num_embeddings: int, *lookups, sparse: bool, backend: str) -> Tensor:
    """Gradient to the table, dense or (sparse) COO over the rows looked up, each once and in order."""
    indices, offsets, weights, *options = lookups
    args = (grad_pooled, indices, offsets, weights, num_embeddings, *options)
    if not sparse:
        return _rows_grad(*args, backend=backend)
    rows, values, count = _rows_grad_sparse(*args, backend=backend)
    coalesced = not torch.compiler.is_compiling()
    if coalesced:  # a traced graph keeps the rest, which adds zeros: its sizes must not depend on data
        found = int(count)  # waits for a GPU, once
        rows, values = rows[:found], values[:found]
    size = (num_embeddings, grad_pooled.shape[1])
    return torch.sparse_coo_tensor(rows[None], values, size, is_coalesced=coalesced, check_invariants=False)


# ---- sum and mean, and single lookups -------------------------------------------------------------


def _bag_context(ctx, inputs, output):
    table, up, mean, indices, offsets, weights, *ctx.options, ctx.by_frequency, ctx.sparse, _ = inputs
    ctx.save_for_backward(table, up, mean, indices, offsets, weights, output[1])
    ctx.set_materialize_grads(False)


def _bag_backward(ctx, grad_output, _, *, backend):
    if grad_output is None:
        return (None,) * 12
    table, up, mean, indices, offsets, weights, pooled = ctx.saved_tensors
    needs_table, needs_up, needs_mean, _, _, needs_weights = ctx.needs_input_grad[:6]
    if ctx.by_frequency:  # a row looked up n times in the batch gets 1 / n of its gradient
        ones = table.new_ones(indices.shape[0])
        frequency = table.new_zeros(table.shape[0]).index_add(0, indices, ones)[indices]
        if offsets is None:
            grad_output = grad_output / frequency[:, None]
        else:
            weights = (ones if weights is None else weights) / frequency
            args = (table, up, mean, indices, offsets, weights, *ctx.options, False, False, True)
            pooled = _bag(*args, backend=backend)[1]
    args = (grad_output, table, up, mean, indices, offsets, weights, pooled, *ctx.options, needs_weights)
    grad_pooled, grad_up, grad_mean, grad_weights = _bag_grad(*args, backend=backend)
    grad_table = None
    if needs_table:
        lookups = (indices, offsets, weights, *ctx.options)
        grad_table = _grad_table(grad_pooled, table.shape[0], *lookups, sparse=ctx.sparse, backend=backend)
    return (
        grad_table,
        grad_up if needs_up else None,
        grad_mean if needs_mean else None,
        None,
        None,
        grad_weights if needs_weights else None,
        *(None,) * 6,
    )


def _bag_fake(
    table, up, mean, indices, offsets, weights, mode, padding, last, by_frequency, sparse, keep_pooled
):
    bags = _bags(indices, offsets, last)
    return table.new_empty(bags, up.shape[0]), table.new_empty(bags if keep_pooled else 0, table.shape[1])


_bag = Op(
    reference.low_rank_embedding_bag,
    fake=_bag_fake,
    backward=_bag_backward,
    setup_context=_bag_context,
    autocast=False,  # as torch: lookups keep the dtype of the table
)


# ---- max ------------------------------------------------------------------------------------------


def _max_context(ctx, inputs, output):
    table, up, mean, indices, *_ = inputs
    ctx.save_for_backward(table, up, indices, output[1])
    ctx.has_mean = mean is not None
    ctx.set_materialize_grads(False)


def _max_backward(ctx, grad_output, _, *, backend):
    if grad_output is None:
        return (None,) * 7
    grads = _max_grad(grad_output, *ctx.saved_tensors, ctx.has_mean, backend=backend)
    needed = (grad if needs else None for grad, needs in zip(grads, ctx.needs_input_grad[:3], strict=True))
    return (*needed, None, None, None, None)


_max = Op(
    reference.low_rank_embedding_bag_max,
    fake=lambda table, up, mean, indices, offsets, padding, last: (
        table.new_empty(_bags(indices, offsets, last), up.shape[0]),
        indices.new_empty(_bags(indices, offsets, last), up.shape[0], dtype=torch.int64),
    ),
    backward=_max_backward,
    setup_context=_max_context,
    autocast=False,
)


# ---- fields ---------------------------------------------------------------------------------------


def _fields_context(ctx, inputs, output):
    table, starts, projections, bias, indices, _, _, ctx.sparse = inputs
    ctx.save_for_backward(starts, projections, bias, indices, output[0])
    ctx.num_embeddings = table.shape[0]
    ctx.set_materialize_grads(False)


def _rows_of_fields(indices: Tensor, starts: Tensor, grad_rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the whole table, ``[B * F]``, and their gradients; out of a field as `set_check_indices` says."""
    mode = get_check_indices()
    if mode != "raise":
        last = starts.diff() - 1
        nearest = torch.minimum(indices, last).clamp(min=0)
        if mode == "none":
            grad_rows = torch.where((nearest == indices)[:, :, None], grad_rows, 0)
        indices = nearest
    return (indices + starts[:-1]).reshape(-1), grad_rows.reshape(-1, grad_rows.shape[2])


def _fields_backward(ctx, grad_mid, grad_output, grad_interaction, *, backend):
    if grad_mid is None and grad_output is None and grad_interaction is None:
        return (None,) * 8
    starts, projections, bias, indices, mid = ctx.saved_tensors
    if grad_output is not None and grad_output.shape[0] != mid.shape[0]:
        grad_output = None  # of an output that was not asked for
    if grad_interaction is not None and grad_interaction.shape[0] != mid.shape[0]:
        grad_interaction = None
    grads = _fields_grad(grad_mid, grad_output, grad_interaction, mid, projections, bias, backend=backend)
    grad_table = None
    if ctx.needs_input_grad[0]:
        rows, grad_rows = _rows_of_fields(indices, starts, grads[0])
        lookups = (rows, None, None, reference.SUM, -1, False)
        grad_table = _grad_table(grad_rows, ctx.num_embeddings, *lookups, sparse=ctx.sparse, backend=backend)
    grad_projections = grads[1] if ctx.needs_input_grad[2] else None
    grad_bias = grads[2] if ctx.needs_input_grad[3] else None
    return grad_table, None, grad_projections, grad_bias, None, None, None, None


_fields = Op(
    reference.low_rank_fields,
    fake=lambda table, starts, projections, bias, indices, with_output, with_interaction, sparse: (
        table.new_empty(*indices.shape, table.shape[1]),
        table.new_empty(indices.shape[0] if with_output else 0, *projections.shape[::2]),
        table.new_empty(indices.shape[0] if with_interaction else 0, 1),
    ),
    backward=_fields_backward,
    setup_context=_fields_context,
    autocast=False,
)


# ---- public ---------------------------------------------------------------------------------------


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _check_table(input: Tensor, table: Tensor, up: Tensor, mean: Tensor | None) -> None:
    check_dtype("table", table)
    check_shape("table", table, (None, None), "[V, R]")
    check_shape("up", up, (None, table.shape[1]), "[D, R]")
    check_like("up", up, "table", table)
    if mean is not None:
        check_shape("mean", mean, (up.shape[0],), "[D]")
        check_like("mean", mean, "table", table)
    check_dtype("input", input, INDEX_DTYPES)
    check_device("input", input, "table", table)


def low_rank_embedding(
    input: Tensor,
    table: Tensor,
    up: Tensor,
    mean: Tensor | None = None,
    *,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""Lookup in a table of rank R: ``F.embedding(input, table @ up.T + mean)`` without that product.

    Args:
        input: indices of any shape, int32 or int64.
        table: ``[V, R]``, float32, float16, bfloat16 or (reference backend) float64.
        up: ``[D, R]``, same dtype.
        mean: ``[D]``, added to every row but that of ``padding_idx``; or None.
        padding_idx: lookups of this row add nothing to any gradient.
        scale_grad_by_freq: divide the gradient of a row by how often the batch looks it up.
        sparse: the gradient of ``table`` is a sparse COO tensor over the rows looked up, each once.
        backend: "native", "triton" or "reference"; None takes the first available.

    Returns:
        ``[*input.shape, D]``.

    Raises:
        ValueError: shapes or devices that do not fit. TypeError: a dtype. IndexError: an index out of range.

    Source: per-field low-rank tables of arXiv 2405.18146.
    """
    _check_table(input, table, up, mean)
    options = (
        reference.SUM,
        padding_index(padding_idx, table.shape[0]),
        False,
        bool(scale_grad_by_freq),
        bool(sparse),
    )
    keep_pooled = _wants_grad(table, up, mean)
    output, _ = _bag(table, up, mean, input.reshape(-1), None, None, *options, keep_pooled, backend=backend)
    return output.reshape(*input.shape, up.shape[0])


def low_rank_embedding_bag(
    input: Tensor,
    table: Tensor,
    up: Tensor,
    mean: Tensor | None = None,
    offsets: Tensor | None = None,
    *,
    mode: str = "mean",
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""Bags of rows of a rank-R table: ``F.embedding_bag(input, table @ up.T + mean, ...)``.

    Sum and mean pool rows of rank R and project once for each bag. Max does not commute with the
    projection: every row is projected, a block at a time in cache, so it costs R multiply-adds for
    each of D values looked up.

    Args:
        input: int32 or int64; ``[N]`` with ``offsets``, or ``[B, L]``: bags of L.
        table: ``[V, R]``, float32, float16, bfloat16 or (reference backend) float64.
        up: ``[D, R]``, same dtype.
        mean: ``[D]``, part of every row looked up, or None. Empty bags stay zero.
        offsets: ``[B]`` (``[B + 1]`` with ``include_last_offset``), int32 or int64, not necessarily
            the type of ``input``: where each bag begins.
        mode: "sum", "mean" or "max".
        per_sample_weights: the shape of ``input``, any floating dtype, in modes sum and mean; the mean
            divides by the number of lookups, not by the sum of weights.
        include_last_offset: the last offset is the end of the last bag.
        padding_idx: lookups of this row are left out, of the mean's divisor too.
        scale_grad_by_freq: divide the gradient of a row by how often the batch looks it up; not for max.
        sparse: the gradient of ``table`` is a sparse COO tensor over the rows looked up, each
            once; not for max.
        backend: "native", "triton" or "reference"; None takes the first available.

    Returns:
        ``[B, D]``.

    Raises:
        ValueError: shapes, devices or options that do not fit. TypeError: a dtype.
        IndexError: an index out of range.
    """
    _check_table(input, table, up, mean)
    weighted = per_sample_weights is not None
    check_mode(mode, per_sample_weights=weighted, scale_grad_by_freq=scale_grad_by_freq, sparse=sparse)
    check_bags(input, offsets, include_last_offset)
    check_sample_weights(per_sample_weights, input)
    if weighted:
        per_sample_weights = per_sample_weights.reshape(-1).to(table.dtype)
    if input.dim() == 2:
        offsets = torch.arange(input.shape[0], device=input.device) * input.shape[1]
        input = input.reshape(-1)
    padding = padding_index(padding_idx, table.shape[0])
    if mode == "max":
        return _max(table, up, mean, input, offsets, padding, bool(include_last_offset), backend=backend)[0]
    options = (MODES[mode], padding, bool(include_last_offset), bool(scale_grad_by_freq), bool(sparse))
    keep_pooled = _wants_grad(table, up, mean, per_sample_weights)
    args = (table, up, mean, input, offsets, per_sample_weights, *options, keep_pooled)
    return _bag(*args, backend=backend)[0]


class LowRankFieldsOutput(NamedTuple):
    """What `low_rank_fields` gives: ``z [B, F, R]``, ``x [B, F, D]`` and ``interaction [B, 1]`` or None."""

    z: Tensor
    x: Tensor | None
    interaction: Tensor | None


def low_rank_fields(
    input: Tensor,
    table: Tensor,
    starts: Tensor,
    projections: Tensor,
    bias: Tensor | None = None,
    *,
    output: bool = True,
    interaction: bool = False,
    sparse: bool = False,
    backend: str | None = None,
) -> LowRankFieldsOutput:
    r"""Lookup of one row in each of F fields, the projection of each, and the FM term.

    ``z[b, k] = table[starts[k] + input[b, k]]``, ``x[b, k] = z[b, k] @ projections[k] + bias[k]`` and
    ``interaction[b] = 0.5 * sum_d((sum_k x)^2 - sum_k x^2)``; the last without writing ``x`` when it is
    not asked for.

    Args:
        input: ``[B, F]`` int32 or int64, row within the field's table.
        table: ``[sum of V_k, R]``, the fields' tables one after the other; float32, float16, bfloat16
            or (reference backend) float64.
        starts: ``[F + 1]`` int64, first row of each field, and the end.
        projections: ``[F, R, D]``, same dtype as ``table``.
        bias: ``[F, D]`` (the fields' mean rows) or None.
        output: give ``x``.
        interaction: give the FM term.
        sparse: the gradient of ``table`` is a sparse COO tensor over the rows looked up, each once.
        backend: "native", "triton" or "reference"; None takes the first available.

    Returns:
        `LowRankFieldsOutput`; gradients flow from all three.

    Raises:
        ValueError: shapes or devices that do not fit. TypeError: a dtype. IndexError: an index out of range.

    Source: arXiv 2405.18146, its DeepFM and DCN variants.
    """
    check_dtype("table", table)
    check_shape("table", table, (None, None), "[sum of V, R]")
    check_shape("projections", projections, (None, table.shape[1], None), "[F, R, D]")
    check_like("projections", projections, "table", table)
    fields, _, dim = projections.shape
    check_dtype("starts", starts, (torch.int64,))
    check_shape("starts", starts, (fields + 1,), "[F + 1]")
    check_device("starts", starts, "table", table)
    if bias is not None:
        check_shape("bias", bias, (fields, dim), "[F, D]")
        check_like("bias", bias, "table", table)
    check_dtype("input", input, INDEX_DTYPES)
    check_shape("input", input, (None, fields), "[B, F]")
    check_device("input", input, "table", table)
    args = (table, starts, projections, bias, input, bool(output), bool(interaction), bool(sparse))
    z, x, term = _fields(*args, backend=backend)
    return LowRankFieldsOutput(z, x if output else None, term if interaction else None)
