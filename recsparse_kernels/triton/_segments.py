"""Sums of rows that share a key, in a fixed order: a stable sort, then a sum over each run of equal keys.

out[destination(key)] = sum over n with that key, in rising order, of weight_n * source[source_n]

A run is cut where a chunk of CHUNK sorted positions ends, so that one popular row is the work of many
programs. Pieces that are whole runs are written at once; of the others each chunk has at most two, one
that came from before (slot 0) and one that begins in it and goes on (slot 1), which a second kernel adds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import NO_SPILL, launch
from ._precision import cast

CHUNK = 32
CONFIGS = {"pieces": dict(BLOCK_P=16, num_warps=2), "join": dict(BLOCK_C=16, num_warps=2)}
MAX_COLUMNS = 64  # columns that a program sums


@triton.jit
def _pieces_kernel(
    source_ptr,  # [S, R]
    keys_ptr,  # [N] sorted
    order_ptr,  # [N] where each was before
    begins_ptr,  # [N + 1] sorted position where each piece begins, N for those that are not
    source_of_ptr,  # [N] row of source, or None: n, modulo S
    weights_ptr,  # [N] or None
    scale_ptr,  # [S] float32 or None
    rank_ptr,  # [N] row of out, or None: the key
    out_ptr,  # [rows, R]
    parts_ptr,  # [2 * chunks, R] float32
    N,
    S,
    R,
    limit,  # keys from here on do not count
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # one program: BLOCK_P pieces x BLOCK_R columns
    piece = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    begin = tl.load(begins_ptr + piece, mask=piece < N, other=N).to(tl.int64)
    end = tl.load(begins_ptr + piece + 1, mask=piece < N, other=N).to(tl.int64)
    key = tl.load(keys_ptr + begin, mask=begin < N, other=-1).to(tl.int64)
    counts = (key >= 0) & (key < limit)
    length = tl.where(counts, end - begin, 0)
    acc = tl.zeros((BLOCK_P, BLOCK_R), dtype=tl.float32)
    for step in range(0, tl.max(length, axis=0)):
        inside = step < length
        n = tl.load(order_ptr + begin + step, mask=inside, other=0).to(tl.int64)
        source = n % S
        if source_of_ptr is not None:
            source = tl.load(source_of_ptr + n, mask=inside, other=0).to(tl.int64)
        mask = inside[:, None] & (r < R)[None, :]
        row = tl.load(source_ptr + source[:, None] * R + r[None, :], mask=mask, other=0.0).to(tl.float32)
        if weights_ptr is not None:
            row *= tl.load(weights_ptr + n, mask=inside, other=0.0).to(tl.float32)[:, None]
        if scale_ptr is not None:
            row *= tl.load(scale_ptr + source, mask=inside, other=0.0)[:, None]
        acc += row
    before = tl.load(keys_ptr + begin - 1, mask=counts & (begin > 0), other=-1).to(tl.int64) == key
    after = tl.load(keys_ptr + end, mask=counts & (end < N), other=-1).to(tl.int64) == key
    row = key
    if rank_ptr is not None:
        row = tl.load(rank_ptr + begin, mask=counts, other=0).to(tl.int64)
    whole = (counts & (before == 0) & (after == 0))[:, None] & (r < R)[None, :]
    tl.store(out_ptr + row[:, None] * R + r[None, :], cast(acc, out_ptr.dtype.element_ty), mask=whole)
    slot = begin // CHUNK * 2 + tl.where(before, 0, 1)
    cut = (counts & (before | after))[:, None] & (r < R)[None, :]
    tl.store(parts_ptr + slot[:, None] * R + r[None, :], acc, mask=cut)


@triton.jit
def _join_kernel(
    keys_ptr,  # [N] sorted
    rank_ptr,  # [N] or None
    parts_ptr,  # [2 * chunks, R] float32
    out_ptr,  # [rows, R]
    N,
    R,
    limit,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # one program: the run that begins in a chunk and goes on behind it, if there is one
    chunk = tl.program_id(0).to(tl.int64)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    first = chunk * CHUNK
    end = first + CHUNK
    key = tl.load(keys_ptr + end - 1, mask=end < N, other=-1).to(tl.int64)
    next_key = tl.load(keys_ptr + end, mask=end < N, other=-2).to(tl.int64)
    last_key = tl.load(keys_ptr + first - 1, mask=(first > 0) & (end < N), other=-2).to(tl.int64)
    if (key == next_key) & (key != last_key) & (key >= 0) & (key < limit):
        acc = tl.load(parts_ptr + (2 * chunk + 1) * R + r, mask=r < R, other=0.0)
        follower = chunk + 1
        more = 1
        while more > 0:
            c = follower + tl.arange(0, BLOCK_C)
            same = tl.load(keys_ptr + c * CHUNK, mask=c * CHUNK < N, other=-1).to(tl.int64) == key
            mask = same[:, None] & (r < R)[None, :]
            tile = tl.load(parts_ptr + 2 * c[:, None] * R + r[None, :], mask=mask, other=0.0)
            acc += tl.sum(tile, axis=0)
            follower += BLOCK_C
            more = tl.min(same.to(tl.int32), axis=0)
        row = key
        if rank_ptr is not None:
            row = tl.load(rank_ptr + end - 1).to(tl.int64)
        tl.store(out_ptr + row * R + r, cast(acc, out_ptr.dtype.element_ty), mask=r < R)


class Runs:
    """The runs of equal keys: what the sort and a few prefix sums say, without a host sync.

    Args:
        keys: ``[N]`` integers; those outside [0, limit) do not count (give them ``limit``).
    """

    def __init__(self, keys: Tensor, limit: int):
        self.limit = limit
        narrow = keys.to(torch.int32) if limit < 2**31 - 1 else keys  # half the passes of the sort
        self.keys, self.order = torch.sort(narrow, stable=True)
        N = keys.numel()
        position = torch.arange(N + 1, device=keys.device)
        self.begins_run = torch.ones(N, dtype=torch.bool, device=keys.device)
        torch.ne(self.keys[1:], self.keys[:-1], out=self.begins_run[1:])
        begins_piece = self.begins_run | (position[:-1] % CHUNK == 0)
        self.begins = torch.searchsorted(begins_piece.cumsum(0), position + 1)

    def unique(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys [N], each once and rising, the last repeated; row of each sorted position; how many [1]."""
        N = self.keys.numel()
        run = self.begins_run.cumsum(0)
        valid = self.keys < self.limit
        count = (self.begins_run & valid).sum().view(1)
        first = torch.searchsorted(run, torch.arange(1, N + 1, device=run.device))
        last = valid.sum() - 1
        keys = self.keys[first.minimum(last).clamp(min=0)].long()
        return torch.where(count > 0, keys, 0), run - 1, count


def sum_runs(
    runs: Runs,
    source: Tensor,
    out: Tensor,
    *,
    source_of: Tensor | None = None,
    weights: Tensor | None = None,
    scale: Tensor | None = None,
    rank: Tensor | None = None,
) -> Tensor:
    """Writes the sums to their rows of ``out``, which is zero elsewhere, and returns it."""
    N, (S, R) = runs.keys.numel(), source.shape
    if N == 0 or S == 0 or R == 0:
        return out
    chunks = triton.cdiv(N, CHUNK)
    parts = torch.empty((2 * chunks, R), dtype=torch.float32, device=out.device)
    block_r = min(MAX_COLUMNS, triton.next_power_of_2(R))
    tiles_r = triton.cdiv(R, block_r)
    config = CONFIGS["pieces"]
    launch(
        _pieces_kernel,
        (triton.cdiv(N, config["BLOCK_P"]), tiles_r),
        *(source, runs.keys, runs.order, runs.begins, source_of, weights, scale, rank, out, parts),
        *(N, S, R, runs.limit),
        CHUNK=CHUNK,
        BLOCK_R=block_r,
        **config,
        **NO_SPILL,
    )
    if chunks > 1:
        args = (runs.keys, rank, parts, out, N, R, runs.limit)
        launch(_join_kernel, (chunks, tiles_r), *args, CHUNK=CHUNK, BLOCK_R=block_r, **CONFIGS["join"])
    return out
