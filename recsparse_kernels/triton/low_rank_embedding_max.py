"""Low-rank embedding bags in Triton: the elementwise maximum of the rows of a bag, and the lookup that won.

row(v) = table[v] up^T + mean                                   table [V, R]   up [D, R]   mean [D]

Every row is projected, since the maximum is of what is projected. The gradient to the table is a sum over
sorted pairs of a bag and a column (_segments.py).
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import NO_SPILL, launch, launcher
from ._partials import empty_parts, split_rows, sum_partials
from ._precision import cast, dot
from ._segments import Runs, sum_runs
from .low_rank_embedding import bag_inputs, clamped, rank_block

MAX_CONFIG = dict(BLOCK_L=16, BLOCK_D=64, num_warps=4)
MAX_GRAD_CONFIG = dict(BLOCK_D=16, UNROLL=4, num_warps=4, **NO_SPILL)


@triton.jit
def _max_kernel(
    table_ptr,  # [V, R]
    up_ptr,  # [D, R]
    mean_ptr,  # [D] or None
    indices_ptr,  # [N]
    starts_ptr,  # [B + 1]
    output_ptr,  # [B, D]
    winner_ptr,  # [B, D] int64
    V,
    R,
    D,
    N,
    padding_idx,
    BLOCK_R: tl.constexpr,
    BLOCKS_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # one program: one bag x BLOCK_D columns; the first of equal rows wins, NaN wins nothing but shows
    b = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    d_inside = d < D
    start = tl.maximum(tl.load(starts_ptr + b).to(tl.int64), 0)
    end = tl.minimum(tl.load(starts_ptr + b + 1).to(tl.int64), N)
    best = tl.full((BLOCK_D,), float("-inf"), dtype=tl.float32)
    winner = tl.full((BLOCK_D,), -1, dtype=tl.int64)
    nan = tl.zeros((BLOCK_D,), dtype=tl.int32)
    r = tl.arange(0, BLOCK_R)
    up = tl.load(
        up_ptr + d[None, :].to(tl.int64) * R + r[:, None],
        mask=d_inside[None, :] & (r < R)[:, None],
        other=0.0,
    )
    for at0 in range(start, end, BLOCK_L):
        at = at0 + tl.arange(0, BLOCK_L)
        index = tl.load(indices_ptr + at, mask=at < end, other=-1).to(tl.int64)
        kept = (at < end) & (index != padding_idx) & (index >= 0) & (index < V)
        rows = tl.zeros((BLOCK_L, BLOCK_D), dtype=tl.float32)
        for block in tl.static_range(BLOCKS_R):
            r = block * BLOCK_R + tl.arange(0, BLOCK_R)
            low = tl.load(
                table_ptr + index[:, None] * R + r[None, :], mask=kept[:, None] & (r < R)[None, :], other=0.0
            )
            if BLOCKS_R > 1:  # one block is held all along
                up = tl.load(
                    up_ptr + d[None, :].to(tl.int64) * R + r[:, None],
                    mask=d_inside[None, :] & (r < R)[:, None],
                    other=0.0,
                )
            rows = dot(low, up, rows)
        is_nan = (rows != rows) & kept[:, None]
        nan = tl.maximum(nan, tl.max(is_nan.to(tl.int32), axis=0))
        rows = tl.where(kept[:, None] & (rows == rows), rows, float("-inf"))
        top = tl.max(rows, axis=0)
        reached = kept[:, None] & (rows == top[None, :])
        first = tl.min(tl.where(reached, at[:, None], N), axis=0)
        better = (first < N) & ((top > best) | (winner < 0))
        best = tl.where(better, top, best)
        winner = tl.where(better, first, winner)
    winner = tl.where(nan > 0, -1, winner)
    best = tl.where(winner >= 0, best, tl.where(nan > 0, float("nan"), 0.0))
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + d, mask=d_inside, other=0.0).to(tl.float32)
        best += tl.where(winner >= 0, mean, 0.0)
    tl.store(output_ptr + b * D + d, cast(best, output_ptr.dtype.element_ty), mask=d_inside)
    tl.store(winner_ptr + b * D + d, winner, mask=d_inside)


@triton.jit
def _max_grad_up_kernel(
    grad_output_ptr,  # [B, D]
    table_ptr,  # [V, R]
    indices_ptr,  # [N]
    winner_ptr,  # [B, D] int64
    grad_up_ptr,  # [D, R] or [S, D, R] float32
    grad_mean_ptr,  # [D] or [S, D] float32, or None
    V,
    R,
    D,
    B,
    N,
    b_each,  # bags that a part sums
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
):
    # one program: BLOCK_D rows of up x BLOCK_R, over one part of the bags
    d = tl.program_id(0).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    part = tl.program_id(2).to(tl.int64)
    acc = tl.zeros((BLOCK_D, BLOCK_R), dtype=tl.float32)
    sums = tl.zeros((BLOCK_D,), dtype=tl.float32)
    end = tl.minimum((part + 1) * b_each, B)
    for b0 in range(part * b_each, end, UNROLL):
        for b1 in tl.static_range(UNROLL):
            b = b0 + b1 + tl.zeros((BLOCK_D,), dtype=tl.int64)
            inside = (d < D) & (b < end)
            winner = tl.load(winner_ptr + b * D + d, mask=inside, other=-1)
            won = (winner >= 0) & (winner < N)
            index = tl.load(indices_ptr + winner, mask=won, other=-1).to(tl.int64)
            grad = tl.load(grad_output_ptr + b * D + d, mask=won, other=0.0).to(tl.float32)
            mask = ((index >= 0) & (index < V))[:, None] & (r < R)[None, :]
            row = tl.load(table_ptr + index[:, None] * R + r[None, :], mask=mask, other=0.0)
            acc += grad[:, None] * row.to(tl.float32)
            sums += grad
    up_at = part * D * R + d[:, None].to(tl.int64) * R + r[None, :]
    up_mask = (d < D)[:, None] & (r < R)[None, :]
    tl.store(grad_up_ptr + up_at, cast(acc, grad_up_ptr.dtype.element_ty), mask=up_mask)
    if grad_mean_ptr is not None:
        if tl.program_id(1) == 0:
            tl.store(grad_mean_ptr + part * D + d, cast(sums, grad_mean_ptr.dtype.element_ty), mask=d < D)


@launcher
def low_rank_embedding_bag_max(
    table: Tensor,
    up: Tensor,
    mean: Tensor | None,
    indices: Tensor,
    offsets: Tensor,
    padding_idx: int,
    include_last_offset: bool,
) -> tuple[Tensor, Tensor]:
    table, up, mean, indices, starts, _, B = bag_inputs(
        table, up, mean, indices, offsets, None, include_last_offset
    )
    (V, R), D, N = table.shape, up.shape[0], indices.shape[0]
    output = table.new_empty(B, D)
    winner = torch.empty((B, D), dtype=torch.int64, device=table.device)
    grid = (B, triton.cdiv(D, MAX_CONFIG["BLOCK_D"]))
    args = (table, up, mean, indices, starts, output, winner, V, R, D, N, padding_idx)
    block_r = rank_block(R)
    blocks = max(1, triton.cdiv(R, block_r))
    launch(_max_kernel, grid, *args, BLOCK_R=block_r, BLOCKS_R=blocks, **MAX_CONFIG)
    return output, winner


@launcher
def low_rank_embedding_bag_max_grad(
    grad_output: Tensor, table: Tensor, up: Tensor, indices: Tensor, positions: Tensor, needs_mean: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_output, table, up = grad_output.contiguous(), table.contiguous(), up.contiguous()
    indices, positions = clamped(indices, table.shape[0]).contiguous(), positions.contiguous()
    (B, D), (V, R), N = grad_output.shape, table.shape, indices.shape[0]
    grad_up, grad_mean = torch.empty_like(up), up.new_empty(D if needs_mean else 0)
    config, block_r = MAX_GRAD_CONFIG, rank_block(R)
    tiles_d, tiles_r = triton.cdiv(D, config["BLOCK_D"]), max(1, triton.cdiv(R, block_r))
    parts, each = split_rows(B, tiles_d * tiles_r, config["UNROLL"], max(1, B // max(R, 1)))
    up_parts = empty_parts(parts, grad_up)
    mean_parts = empty_parts(parts, grad_mean) if needs_mean else None
    args = (grad_output, table, indices, positions, up_parts, mean_parts, V, R, D, B, N, each)
    launch(_max_grad_up_kernel, (tiles_d, tiles_r, parts), *args, BLOCK_R=block_r, **config)
    if parts > 1:
        sum_partials(up_parts, grad_up)
        if needs_mean:
            sum_partials(mean_parts, grad_mean)
    grad_table = torch.zeros_like(table)
    if N and B and D:
        # each pair (bag, column) adds grad_output * up[column] to the row that won it
        rows = indices[positions.clamp(0, N - 1)].long()
        keys = torch.where((positions >= 0) & (positions < N), rows, V).reshape(-1)
        sum_runs(Runs(keys, V), up, grad_table, weights=grad_output)
    return grad_table, grad_up, grad_mean


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that between them launch every kernel and configuration of this file."""
    V, D, N, B = 1_000_000, 128, 200_000, 10_000
    for dtype in (torch.bfloat16, torch.float32):
        for R, index_dtype in ((13, torch.int64), (64, torch.int32), (128, torch.int64), (320, torch.int64)):

            def empty(*shape, dtype=dtype):
                return torch.empty(shape, dtype=dtype, device="meta")

            table, up, mean, grad = empty(V, R), empty(D, R), empty(D), empty(B, D)
            indices, offsets = empty(N, dtype=index_dtype), empty(B, dtype=torch.int64)
            label = f"rank {R}, {str(dtype).removeprefix('torch.')}"
            args = (table, up, mean, indices, offsets, 7, False)
            yield f"max, {label}", partial(low_rank_embedding_bag_max, *args)
            winner = empty(B, D, dtype=torch.int64)
            args = (grad, table, up, indices, winner, True)
            yield f"max grad, {label}", partial(low_rank_embedding_bag_max_grad, *args)
