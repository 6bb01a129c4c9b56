"""Sums over many rows: split into parts that are added in a fixed order, so that they never differ.

out[n] = finish(sum_s partials[s, n] + bias[n mod columns])        partials [S, n] float32
finish: identity, or multiplied by the slope of an activation at x[n].
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._activation import slope
from ._launch import launch
from ._precision import cast

PROGRAMS = 256  # wanted at least, so that every multiprocessor of a large GPU (132 to 160) has work
BLOCK = 1024


@triton.jit
def _sum_partials_kernel(
    partials_ptr,  # [S, n] float32
    bias_ptr,  # [columns] or None
    x_ptr,  # [n] or None
    out_ptr,  # [n]
    n,
    S,
    columns,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    part = partials_ptr + at
    for _ in range(0, S):
        acc += tl.load(part, mask=inside, other=0.0)
        part += n
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + at % columns, mask=inside, other=0.0).to(tl.float32)
    if x_ptr is not None:
        acc *= slope(tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    tl.store(out_ptr + at, cast(acc, out_ptr.dtype.element_ty), mask=inside)


def sum_partials(
    partials: Tensor, out: Tensor, bias: Tensor | None = None, x: Tensor | None = None, activation: int = 0
) -> Tensor:
    """``partials`` [S, *out.shape] added up into ``out``, which is returned."""
    n = out.numel()
    columns = out.shape[-1] if out.dim() else 1
    args = (partials, bias, x, out, n, partials.shape[0], columns)
    launch(_sum_partials_kernel, (triton.cdiv(n, BLOCK),), *args, ACTIVATION=activation, BLOCK=BLOCK)
    return out


def split_rows(rows: int, tiles: int, block: int, most: int) -> tuple[int, int]:
    """(parts, rows of each): enough parts of a reduction over ``rows`` for PROGRAMS programs.

    Args:
        tiles: programs that there are without a split.
        block: rows that a program reads at a time; each part is a multiple of it, four at least.
        most: parts at the most, for the memory of the partial sums.
    """
    blocks = max(triton.cdiv(rows, block), 1)
    parts = max(1, min(triton.cdiv(PROGRAMS, max(tiles, 1)), blocks // 4, most))
    each = triton.cdiv(blocks, parts) * block
    return max(triton.cdiv(rows, each), 1), each


def empty_parts(parts: int, out: Tensor) -> Tensor:
    """Where the programs write: ``out`` itself if there is one part."""
    return out if parts == 1 else torch.empty((parts, *out.shape), dtype=torch.float32, device=out.device)
