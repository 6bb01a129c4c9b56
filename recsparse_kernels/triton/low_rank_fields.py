"""Multi-field low-rank lookups in Triton.

z[b, k] = table[starts[k] + indices[b, k]],  x[b, k] = z[b, k] projections[k] + bias[k],
fm[b] = 1/2 sum_d ((sum_k x)^2 - sum_k x^2)

table [V, R]   starts [F + 1]   projections [F, R, D]   bias [F, D]   indices [B, F]   z [B, F, R]   x [B, F, D]

One kernel looks z up; one projects and sums it, and writes x only when asked for. The gradient at x is
grad_x + grad_fm * (sum_k x - x): its kernels compute x again from z, and never write that gradient.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..config import get_check_indices
from ._configs import Configs
from ._device import device_function
from ._launch import NO_SPILL, launch, launcher
from ._partials import empty_parts, split_rows, sum_partials
from ._precision import cast, dot

CONFIGS = Configs(
    "low_rank_fields",
    {
        "forward": dict(BLOCK_B=32, BLOCK_D=64, num_warps=4, num_stages=2),
        "total": dict(BLOCK_B=32, BLOCK_D=64, num_warps=4, num_stages=2),
        "rows": dict(BLOCK_B=32, BLOCK_D=64, num_warps=4, num_stages=2),
        "projections": dict(BLOCK_B=32, BLOCK_D=64, num_warps=4, num_stages=2, **NO_SPILL),
        "forward, float32": dict(BLOCK_B=16, BLOCK_D=32, num_warps=4, num_stages=2),
        "total, float32": dict(BLOCK_B=16, BLOCK_D=32, num_warps=4, num_stages=2),
        "rows, float32": dict(BLOCK_B=16, BLOCK_D=32, num_warps=4, num_stages=2),
        "projections, float32": dict(BLOCK_B=16, BLOCK_D=32, num_warps=4, num_stages=2),
    },
)
LOOKUP_CONFIG = dict(BLOCK_N=64, num_warps=4)
MAX_BLOCK_R = 64  # ranks are 2 to 24 here; a larger one takes several blocks


@device_function
def _project(
    z_ptr,  # rows of R values
    row,  # [BLOCK_B] which
    row_mask,  # [BLOCK_B]
    projections_ptr,  # [F, R, D]
    bias_ptr,  # [F, D] or None
    k,
    d,
    R,
    D,
    BLOCK_R: tl.constexpr,
    BLOCKS_R: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """x of field k at the columns d, float32, zero in what is masked."""
    d_inside = d < D
    x = tl.zeros((BLOCK_B, BLOCK_D), dtype=tl.float32)
    for block in tl.static_range(BLOCKS_R):
        r = block * BLOCK_R + tl.arange(0, BLOCK_R)
        z_mask = row_mask[:, None] & (r < R)[None, :]
        z = tl.load(z_ptr + row[:, None] * R + r[None, :], mask=z_mask, other=0.0)
        p_mask = (r < R)[:, None] & d_inside[None, :]
        p_at = (k.to(tl.int64) * R + r[:, None]) * D + d[None, :]
        x = dot(z, tl.load(projections_ptr + p_at, mask=p_mask, other=0.0), x)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + k.to(tl.int64) * D + d, mask=d_inside, other=0.0).to(tl.float32)[None, :]
    return tl.where(row_mask[:, None] & d_inside[None, :], x, 0.0)


@triton.jit
def _lookup_kernel(
    table_ptr,  # [V, R]
    starts_ptr,  # [F + 1]
    indices_ptr,  # [B, F]
    mid_ptr,  # [B, F, R]
    V,
    F,
    R,
    lookups,  # B * F
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # one program: BLOCK_N lookups x BLOCK_R columns
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = n < lookups
    index = tl.load(indices_ptr + n, mask=inside, other=-1).to(tl.int64)
    row = tl.load(starts_ptr + n % F, mask=inside, other=0) + index
    end = tl.minimum(tl.load(starts_ptr + n % F + 1, mask=inside, other=0), V)
    fetched = inside & (index >= 0) & (row >= 0) & (row < end)
    mask = fetched[:, None] & (r < R)[None, :]
    z = tl.load(table_ptr + row[:, None] * R + r[None, :], mask=mask, other=0.0)
    tl.store(mid_ptr + n[:, None] * R + r[None, :], z, mask=inside[:, None] & (r < R)[None, :])


@triton.jit
def _fields_kernel(
    mid_ptr,  # [B, F, R]
    projections_ptr,  # [F, R, D]
    bias_ptr,  # [F, D] or None
    output_ptr,  # [B, F, D] or None
    interaction_ptr,  # [B] or None
    B,
    F,
    R,
    D,
    BLOCK_R: tl.constexpr,
    BLOCKS_R: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # one program: BLOCK_B rows, all fields, all columns
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    b_inside = b < B
    term = tl.zeros((BLOCK_B,), dtype=tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        total = tl.zeros((BLOCK_B, BLOCK_D), dtype=tl.float32)
        squares = tl.zeros((BLOCK_B, BLOCK_D), dtype=tl.float32)
        for k in range(0, F):
            x = _project(
                mid_ptr, b * F + k, b_inside, projections_ptr, bias_ptr, tl.cast(k, tl.int32), d, R, D,
                BLOCK_R, BLOCKS_R, BLOCK_B, BLOCK_D,
            )  # fmt: skip
            if output_ptr is not None:
                mask = b_inside[:, None] & (d < D)[None, :]
                at = (b * F + k)[:, None] * D + d[None, :]
                tl.store(output_ptr + at, cast(x, output_ptr.dtype.element_ty), mask=mask)
            if interaction_ptr is not None:
                total += x
                squares += x * x
        if interaction_ptr is not None:
            term += tl.sum(total * total - squares, axis=1)
    if interaction_ptr is not None:
        tl.store(interaction_ptr + b, cast(0.5 * term, interaction_ptr.dtype.element_ty), mask=b_inside)


@triton.jit
def _total_kernel(
    mid_ptr,  # [B, F, R]
    projections_ptr,  # [F, R, D]
    bias_ptr,  # [F, D] or None
    total_ptr,  # [B, D] float32: sum_k x
    B,
    F,
    R,
    D,
    BLOCK_R: tl.constexpr,
    BLOCKS_R: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_B, BLOCK_D), dtype=tl.float32)
    for k in range(0, F):
        total += _project(
            mid_ptr, b * F + k, b < B, projections_ptr, bias_ptr, tl.cast(k, tl.int32), d, R, D,
            BLOCK_R, BLOCKS_R, BLOCK_B, BLOCK_D,
        )  # fmt: skip
    tl.store(total_ptr + b[:, None] * D + d[None, :], total, mask=(b < B)[:, None] & (d < D)[None, :])


@device_function
def _grad_x(
    grad_output_ptr,  # [B, F, D] or None
    grad_interaction_ptr,  # [B] or None
    total_ptr,  # [B, D] float32, or None
    mid_ptr,
    projections_ptr,
    bias_ptr,
    b,
    b_inside,
    k,
    d,
    F,
    R,
    D,
    BLOCK_R: tl.constexpr,
    BLOCKS_R: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient at x of field k, float32: grad_x + grad_fm * (sum_k x - x)."""
    mask = b_inside[:, None] & (d < D)[None, :]
    grad = tl.zeros((BLOCK_B, BLOCK_D), dtype=tl.float32)
    if grad_output_ptr is not None:
        grad = tl.load(grad_output_ptr + (b * F + k)[:, None] * D + d[None, :], mask=mask, other=0.0)
        grad = grad.to(tl.float32)
    if grad_interaction_ptr is not None:
        x = _project(
            mid_ptr, b * F + k, b_inside, projections_ptr, bias_ptr, k, d, R, D,
            BLOCK_R, BLOCKS_R, BLOCK_B, BLOCK_D,
        )  # fmt: skip
        factor = tl.load(grad_interaction_ptr + b, mask=b_inside, other=0.0).to(tl.float32)
        total = tl.load(total_ptr + b[:, None] * D + d[None, :], mask=mask, other=0.0)
        grad += tl.where(mask, factor[:, None] * (total - x), 0.0)
    return grad


@triton.jit
def _grad_rows_kernel(
    grad_mid_ptr,  # [B, F, R] or None
    grad_output_ptr,  # [B, F, D] or None
    grad_interaction_ptr,  # [B] or None
    total_ptr,  # [B, D] float32, or None
    mid_ptr,  # [B, F, R]
    projections_ptr,  # [F, R, D]
    bias_ptr,  # [F, D] or None
    grad_rows_ptr,  # [B, F, R]
    B,
    F,
    R,
    D,
    BLOCK_R: tl.constexpr,
    BLOCKS_R: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # one program: BLOCK_B rows x BLOCK_R of one field.  grad_z = grad_x projections[k]^T + grad_mid
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    k = tl.program_id(1)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    b_inside = b < B
    acc = tl.zeros((BLOCK_B, BLOCK_R), dtype=tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        grad = _grad_x(
            grad_output_ptr, grad_interaction_ptr, total_ptr, mid_ptr, projections_ptr, bias_ptr,
            b, b_inside, k, d, F, R, D, BLOCK_R, BLOCKS_R, BLOCK_B, BLOCK_D,
        )  # fmt: skip
        p_at = (k.to(tl.int64) * R + r[None, :]) * D + d[:, None]
        p = tl.load(projections_ptr + p_at, mask=(r < R)[None, :] & (d < D)[:, None], other=0.0)
        acc = dot(cast(grad, projections_ptr.dtype.element_ty), p, acc)
    at = (b * F + k)[:, None] * R + r[None, :]
    mask = b_inside[:, None] & (r < R)[None, :]
    if grad_mid_ptr is not None:
        acc += tl.load(grad_mid_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(grad_rows_ptr + at, cast(acc, grad_rows_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _grad_projections_kernel(
    grad_output_ptr,  # [B, F, D] or None
    grad_interaction_ptr,  # [B] or None
    total_ptr,  # [B, D] float32, or None
    mid_ptr,  # [B, F, R]
    projections_ptr,  # [F, R, D]
    bias_ptr,  # [F, D] or None
    grad_projections_ptr,  # [F, R, D] or [S, F, R, D] float32
    grad_bias_ptr,  # [F, D] or [S, F, D] float32, or None
    B,
    F,
    R,
    D,
    b_each,  # rows that a part sums
    tiles_d,
    BLOCK_R: tl.constexpr,
    BLOCKS_R: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # one program: BLOCK_R x BLOCK_D of one field, over one part of the rows.  z^T grad_x
    k = tl.program_id(0) // tiles_d
    d = tl.program_id(0) % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    part = tl.program_id(2).to(tl.int64)
    acc = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    sums = tl.zeros((BLOCK_D,), dtype=tl.float32)
    end = tl.minimum((part + 1) * b_each, B)
    for b0 in range(part * b_each, end, BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B)
        b_inside = b < end
        grad = _grad_x(
            grad_output_ptr, grad_interaction_ptr, total_ptr, mid_ptr, projections_ptr, bias_ptr,
            b, b_inside, k, d, F, R, D, BLOCK_R, BLOCKS_R, BLOCK_B, BLOCK_D,
        )  # fmt: skip
        z_mask = b_inside[:, None] & (r < R)[None, :]
        z = tl.load(mid_ptr + (b * F + k)[:, None] * R + r[None, :], mask=z_mask, other=0.0)
        acc = dot(tl.trans(z), cast(grad, mid_ptr.dtype.element_ty), acc)
        sums += tl.sum(grad, axis=0)
    field = part * F + k
    at = (field * R + r[:, None]) * D + d[None, :]
    mask = (r < R)[:, None] & (d < D)[None, :]
    tl.store(grad_projections_ptr + at, cast(acc, grad_projections_ptr.dtype.element_ty), mask=mask)
    if grad_bias_ptr is not None:
        if tl.program_id(1) == 0:
            narrow = cast(sums, grad_bias_ptr.dtype.element_ty)
            tl.store(grad_bias_ptr + field * D + d, narrow, mask=d < D)


def _config(name: str, like: Tensor, R: int) -> dict:
    block_r = min(MAX_BLOCK_R, max(16, triton.next_power_of_2(R)))
    config = CONFIGS[name + ", float32" * (like.element_size() == 4)]
    return config | {"BLOCK_R": block_r, "BLOCKS_R": max(1, triton.cdiv(R, block_r))}


def _checked_fields(indices: Tensor, starts: Tensor) -> Tensor:
    """Row within each field, as `checked_indices` has it for one table.

    Raises:
        IndexError: on CPU tensors (the interpreter); on a GPU the device asserts.
    """
    mode = get_check_indices()
    if mode == "none" or indices.numel() == 0 or indices.is_meta:
        return indices
    sizes = starts.diff()
    if mode == "clamp":
        return torch.minimum(indices, sizes - 1).clamp(min=0)
    inside = (indices >= 0) & (indices < sizes)
    if indices.device.type == "cpu":
        if not bool(inside.all()):
            b, k = (~inside).nonzero()[0].tolist()
            raise IndexError(
                f"indices of field {k} must be in [0, {int(sizes[k])}); got {int(indices[b, k])}"
            )
    else:
        torch._assert_async(inside.all(), "indices must be within the rows of their field")
    return indices


@launcher
def low_rank_fields(
    table: Tensor,
    starts: Tensor,
    projections: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    with_output: bool,
    with_interaction: bool,
    sparse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    table, projections = table.contiguous(), projections.contiguous()
    starts, indices = starts.contiguous(), _checked_fields(indices, starts).contiguous()
    bias = None if bias is None else bias.contiguous()
    (B, F), (V, R), D = indices.shape, table.shape, projections.shape[2]
    mid = table.new_empty(B, F, R)
    output = table.new_empty(B if with_output else 0, F, D)
    interaction = table.new_empty(B if with_interaction else 0, 1)
    config = LOOKUP_CONFIG
    block_r = min(MAX_BLOCK_R, triton.next_power_of_2(max(R, 1)))
    grid = (triton.cdiv(B * F, config["BLOCK_N"]), triton.cdiv(R, block_r))
    launch(_lookup_kernel, grid, table, starts, indices, mid, V, F, R, B * F, BLOCK_R=block_r, **config)
    if with_output or with_interaction:
        config = _config("forward", table, R)
        targets = (output if with_output else None, interaction if with_interaction else None)
        grid = (triton.cdiv(B, config["BLOCK_B"]),)
        launch(_fields_kernel, grid, mid, projections, bias, *targets, B, F, R, D, **config)
    return mid, output, interaction


@launcher
def low_rank_fields_grad(
    grad_mid: Tensor | None,
    grad_output: Tensor | None,
    grad_interaction: Tensor | None,
    mid: Tensor,
    projections: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    (B, F, R), D = mid.shape, projections.shape[2]
    given = (grad_mid, grad_output, grad_interaction, mid, projections, bias)
    grad_mid, grad_output, grad_interaction, mid, projections, bias = (
        None if t is None else t.contiguous() for t in given
    )
    grad_rows, grad_projections = torch.empty_like(mid), torch.empty_like(projections)
    grad_bias = mid.new_empty(0 if bias is None else F, D)
    total = None
    if grad_interaction is not None:
        total = torch.empty((B, D), dtype=torch.float32, device=mid.device)
        config = _config("total", mid, R)
        grid = (triton.cdiv(B, config["BLOCK_B"]), triton.cdiv(D, config["BLOCK_D"]))
        launch(_total_kernel, grid, mid, projections, bias, total, B, F, R, D, **config)
    inputs = (grad_output, grad_interaction, total, mid, projections, bias)
    config = _config("rows", mid, R)
    grid = (triton.cdiv(B, config["BLOCK_B"]), F, triton.cdiv(R, config["BLOCK_R"]))
    launch(_grad_rows_kernel, grid, grad_mid, *inputs, grad_rows, B, F, R, D, **config)
    config = _config("projections", mid, R)
    tiles_d, tiles_r = triton.cdiv(D, config["BLOCK_D"]), config["BLOCKS_R"]
    # parts take [S, F, R, D] float32: no more than grad_output, [B, F, D], would
    parts, each = split_rows(B, F * tiles_d * tiles_r, config["BLOCK_B"], max(1, B // max(R, 1)))
    target = empty_parts(parts, grad_projections)
    bias_target = None if bias is None else empty_parts(parts, grad_bias)
    launch(
        _grad_projections_kernel,
        (F * tiles_d, tiles_r, parts),
        *(*inputs, target, bias_target, B, F, R, D, each, tiles_d),
        **config,
    )
    if parts > 1:
        sum_partials(target, grad_projections)
        if bias is not None:
            sum_partials(bias_target, grad_bias)
    return grad_rows, grad_projections, grad_bias


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that between them launch every kernel and configuration of this file."""
    B, F, V, D = 16384, 39, 1_000_000, 128
    for dtype in (torch.bfloat16, torch.float32):
        for R, index_dtype in ((10, torch.int64), (24, torch.int32), (96, torch.int64)):

            def empty(*shape, dtype=dtype):
                return torch.empty(shape, dtype=dtype, device="meta")

            table, projections, bias, mid = empty(V, R), empty(F, R, D), empty(F, D), empty(B, F, R)
            starts, indices = empty(F + 1, dtype=torch.int64), empty(B, F, dtype=index_dtype)
            label = f"rank {R}, {str(dtype).removeprefix('torch.')}"
            for output, interaction in ((True, True), (True, False), (False, True)):
                args = (table, starts, projections, bias, indices, output, interaction, False)
                yield f"fields {output} {interaction}, {label}", partial(low_rank_fields, *args)
                grad_output = empty(B, F, D) if output else None
                args = (mid, grad_output, empty(B, 1) if interaction else None, mid, projections, bias)
                yield f"fields grad {output} {interaction}, {label}", partial(low_rank_fields_grad, *args)
