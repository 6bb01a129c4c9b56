"""Topology update of a fixed fan-in layer on Triton, in place: drop the smallest connections, regrow as
many at random inputs. Scores, ties and random numbers: reference/fan_in.py, bit for bit.

Four passes, none of which the host waits for:
    limit    "the n smallest of the layer": a radix select, 8 bits at a time, over the keys
             score bits (31) | random tie (32); a float >= 0 orders as its bits do
    drop     which connections go: below the threshold, before the limit, or among the n smallest of a row
    regrow   one program a row: draws in rounds until no two connections read the same input
    reset    weights and moments of what was dropped
"""

from functools import partial
from typing import List  # noqa: UP035  (read by torch.library.infer_schema)

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.fan_in import DRAW_ROUNDS, FRACTION, LAYER, ROW, THRESHOLD
from ._device import device_function
from ._launch import NO_SPILL, checked_indices, launch, launcher
from ._precision import cast
from .fan_in_cases import layers
from .fan_in_random import GOLDEN, ROUND, halves, hash64, hashed, whole

BINS = 256
SELECT_CONFIG = dict(BLOCK=1024, num_warps=8, num_stages=1, **NO_SPILL)
ROW_CONFIG = dict(BLOCK=64, num_warps=4, num_stages=1)  # two positions of a row against each other
RESET_CONFIG = dict(BLOCK=1024, num_warps=4, num_stages=1)


@device_function
def _score_bits(weight_ptr, position, live, O, F, G, ONE: tl.constexpr):
    """int32 bits of the root mean square of a connection's weights over the labels of its group."""
    row = position // F
    if ONE:  # of each group
        score = tl.load(weight_ptr + position, mask=live, other=0.0).to(tl.float32)
    else:
        total = tl.load(weight_ptr + row * G * F + position % F, mask=live, other=0.0).to(tl.float64)
        total = total * total
        for member in range(1, G):
            label = row * G + member
            where = weight_ptr + label * F + position % F
            w = tl.load(where, mask=live & (label < O), other=0.0).to(tl.float64)
            total += w * w
        count = tl.minimum(O - row * G, G)
        score = tl.sqrt(total / tl.maximum(count, 1).to(tl.float64)).to(tl.float32)
    return score.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@device_function
def _keys(weight_ptr, position, live, key, O, F, G, ONE: tl.constexpr):
    """int64: score, then a random tie."""
    bits = _score_bits(weight_ptr, position, live, O, F, G, ONE)
    tie = hashed(key - position.to(tl.uint64) * GOLDEN) >> 32
    return (bits.to(tl.int64) << 32) | tie.to(tl.int64)


@triton.jit(do_not_specialize=["key_low", "key_high"])
def _histogram_kernel(
    weight_ptr,  # [O, F]
    limit_ptr,  # [2] int64: the limit's bits above ``shift``, its rank among the keys that have them
    bins_ptr,  # [256] int64, added to
    key_low, key_high,
    rows, O, F, G,
    SHIFT: tl.constexpr, ONE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = position // F < rows
    keys = _keys(weight_ptr, position, live, whole(key_low, key_high), O, F, G, ONE)
    if SHIFT < 56:
        live = live & (keys >> (SHIFT + 8) == tl.load(limit_ptr) >> (SHIFT + 8))
    digit = ((keys >> SHIFT) & 255).to(tl.int32)
    counts = tl.histogram(digit, 256, mask=live)  # whole numbers: atomics in any order give the same
    tl.atomic_add(bins_ptr + tl.arange(0, 256), counts.to(tl.int64), mask=counts > 0)


@triton.jit
def _digit_kernel(limit_ptr, bins_ptr, SHIFT: tl.constexpr):
    """The digit that holds the limit's rank; the bins are cleared."""
    bins = bins_ptr + tl.arange(0, 256)
    counts = tl.load(bins)
    upto = tl.cumsum(counts, axis=0)
    rank = tl.load(limit_ptr + 1)
    before = upto < rank
    digit = tl.sum(before.to(tl.int64), axis=0)
    rank -= tl.sum(tl.where(before, counts, 0), axis=0)
    tl.debug_barrier()
    tl.store(limit_ptr, tl.load(limit_ptr) | (digit << SHIFT))
    tl.store(limit_ptr + 1, rank)
    tl.store(bins, tl.zeros((256,), dtype=tl.int64))


@triton.jit(do_not_specialize=["key_low", "key_high"])
def _count_equal_kernel(
    weight_ptr, limit_ptr,
    equal_ptr,  # [programs] int64
    key_low, key_high,
    rows, O, F, G,
    ONE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    position = pid * BLOCK + tl.arange(0, BLOCK)
    live = position // F < rows
    keys = _keys(weight_ptr, position, live, whole(key_low, key_high), O, F, G, ONE)
    equal = live & (keys == tl.load(limit_ptr))
    tl.store(equal_ptr + pid, tl.sum(equal.to(tl.int64), axis=0))


@triton.jit(do_not_specialize=["key_low", "key_high"])
def _drop_kernel(
    weight_ptr,
    limit_ptr,
    equal_ptr,  # [programs] int64: keys at the limit up to the end of each program
    dropped_ptr,  # [rows, F] int8
    key_low, key_high, threshold,
    rows, O, F, G,
    THRESHOLD: tl.constexpr, ONE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    position = pid * BLOCK + tl.arange(0, BLOCK)
    live = position // F < rows
    if THRESHOLD:
        bits = _score_bits(weight_ptr, position, live, O, F, G, ONE)
        dropped = bits.to(tl.float32, bitcast=True) < threshold
    else:
        keys = _keys(weight_ptr, position, live, whole(key_low, key_high), O, F, G, ONE)
        limit = tl.load(limit_ptr)
        equal = (live & (keys == limit)).to(tl.int64)
        upto = tl.load(equal_ptr + pid) - tl.sum(equal, axis=0) + tl.cumsum(equal, axis=0)
        dropped = (keys < limit) | ((keys == limit) & (upto <= tl.load(limit_ptr + 1)))
    tl.store(dropped_ptr + position, dropped.to(tl.int8), mask=live)


@triton.jit(do_not_specialize=["key_low", "key_high"])
def _drop_of_row_kernel(
    weight_ptr,
    dropped_ptr,  # [rows, F] int8
    key_low, key_high,
    count,  # dropped in each row
    O, F, G,
    ONE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # one program: BLOCK connections of a row; each counts those before it in (key, position)
    steps = tl.cdiv(F, BLOCK)
    pid = tl.program_id(0)
    first = (pid // steps).to(tl.int64) * F
    f = pid % steps * BLOCK + tl.arange(0, BLOCK)
    key = whole(key_low, key_high)
    keys = _keys(weight_ptr, first + f, f < F, key, O, F, G, ONE)
    before = tl.zeros((BLOCK,), dtype=tl.int32)
    for f0 in range(0, F, BLOCK):
        other = f0 + tl.arange(0, BLOCK)
        others = _keys(weight_ptr, first + other, other < F, key, O, F, G, ONE)
        less = others[None, :] < keys[:, None]
        same = (others[None, :] == keys[:, None]) & (other[None, :] < f[:, None])
        before += tl.sum(((less | same) & (other < F)[None, :]).to(tl.int32), axis=1)
    tl.store(dropped_ptr + first + f, (before < count).to(tl.int8), mask=f < F)


@device_function
def _draw(key, position, attempt, I):
    """int32, uniform in [0, I)."""
    bits = hashed(key + position.to(tl.uint64) * GOLDEN + attempt * ROUND) >> 32
    return ((bits * I) >> 32).to(tl.int32)


@triton.jit(do_not_specialize=["key_low", "key_high"])
def _redraw_kernel(
    dropped_ptr,  # [rows, F] int8
    indices_ptr,  # [rows, F], changed
    key_low, key_high,
    rows, I, F,
    BLOCK: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = position // F < rows
    dropped = tl.load(dropped_ptr + position, mask=live, other=0) != 0
    drawn = _draw(whole(key_low, key_high), position, tl.zeros((BLOCK,), dtype=tl.uint64), I)
    tl.store(indices_ptr + position, drawn, mask=dropped)


@triton.jit(do_not_specialize=["key_low", "key_high"])
def _regrow_kernel(
    dropped_ptr,  # [rows, F] int8
    indices_ptr,  # [rows, F], changed
    key_low, key_high,
    I, F,
    ROUNDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # one program: a row. Its indices are the working state, -1 where none is found yet, BLOCK at a
    # time; the barriers keep a block's reads before its writes, and those before the next block's reads.
    key = whole(key_low, key_high)
    first = tl.program_id(0).to(tl.int64) * F
    lane = tl.arange(0, BLOCK)
    waiting = 0
    for f0 in range(0, F, BLOCK):
        dropped = tl.load(dropped_ptr + first + f0 + lane, mask=f0 + lane < F, other=0) != 0
        tl.store(indices_ptr + first + f0 + lane, -1, mask=dropped)
        waiting += tl.sum(dropped.to(tl.int32), axis=0)
    tl.debug_barrier()
    attempt = tl.zeros((BLOCK,), dtype=tl.uint64)
    rounds = 0
    while (waiting > 0) & (rounds < ROUNDS):
        waiting = 0
        for f0 in range(0, F, BLOCK):
            f = f0 + lane
            waits = tl.load(indices_ptr + first + f, mask=f < F, other=-2) == -1
            drawn = _draw(key, first + f, attempt, I)
            clash = lane * 0
            for e0 in range(0, F, BLOCK):
                e = e0 + lane
                column = tl.load(indices_ptr + first + e, mask=e < F, other=-2).to(tl.int32)
                rival = _draw(key, first + e, attempt, I)
                taken = column[None, :] == drawn[:, None]
                earlier = (e[None, :] < f[:, None]) & (rival[None, :] == drawn[:, None])
                clash += tl.sum((taken | (earlier & (column == -1)[None, :])).to(tl.int32), axis=1)
            tl.debug_barrier()
            tl.store(indices_ptr + first + f, drawn, mask=waits & (clash == 0))
            waiting += tl.sum((waits & (clash > 0)).to(tl.int32), axis=0)
            tl.debug_barrier()
        attempt += 1
        rounds += 1
    while waiting > 0:  # the next free input above the last draw, lowest position first
        lowest = F
        for f0 in range(0, F, BLOCK):
            f = f0 + lane
            waits = tl.load(indices_ptr + first + f, mask=f < F, other=-2) == -1
            lowest = tl.minimum(lowest, tl.min(tl.where(waits, f, F), axis=0))
        place = first + lowest + tl.zeros((1,), dtype=tl.int64)
        column = tl.max(_draw(key, place, tl.zeros((1,), dtype=tl.uint64) + (ROUNDS - 1), I), axis=0)
        found = 1
        while found > 0:
            found = 0
            for f0 in range(0, F, BLOCK):
                f = f0 + lane
                own = tl.load(indices_ptr + first + f, mask=f < F, other=-2).to(tl.int32)
                found += tl.sum((own == column).to(tl.int32), axis=0)
            column = tl.where(found > 0, (column + 1) % I, column)
        tl.debug_barrier()
        tl.store(indices_ptr + place, column)
        tl.debug_barrier()
        waiting -= 1


@triton.jit(do_not_specialize=["key_low", "key_high"])
def _reset_kernel(
    values_ptr,  # [O, F], changed
    dropped_ptr,  # [rows, F] int8
    key_low, key_high, scale,
    O, F, G,
    RANDOM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # zero, or uniform in (-scale, scale)
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    label = element // F
    dropped = tl.load(dropped_ptr + label // G * F + element % F, mask=label < O, other=0) != 0
    value = tl.zeros((BLOCK,), dtype=tl.float32)
    if RANDOM:
        bits = hashed(~whole(key_low, key_high) + element.to(tl.uint64) * GOLDEN) >> 40
        value = (2.0 * (bits.to(tl.float32) * (2.0**-24)) - 1.0) * scale
    tl.store(values_ptr + element, cast(value, values_ptr.dtype.element_ty), mask=dropped)


@launcher
def fan_in_rewire(
    weight: Tensor,
    indices: Tensor,
    state: List[Tensor],  # noqa: UP006
    in_features: int,
    group_size: int,
    criterion: int,
    scope: int,
    amount: float,
    init_scale: float,
    allow_duplicates: bool,
    seed: int,
) -> Tensor:
    checked_indices("indices", indices, in_features)  # they are compared, never used as offsets
    (rows, fan_in), out_features = indices.shape, weight.shape[0]
    if not allow_duplicates and fan_in > in_features:
        raise ValueError(
            f"a row of {fan_in} distinct indices needs as many inputs; in_features is {in_features}"
        )
    key = halves(hash64(seed))
    dropped = _dropped(weight, rows, group_size, criterion, scope, amount, key)
    if allow_duplicates:
        grid = (-(-rows * fan_in // RESET_CONFIG["BLOCK"]),)
        launch(_redraw_kernel, grid, dropped, indices, *key, rows, in_features, fan_in, **RESET_CONFIG)
    else:
        launch(
            _regrow_kernel,
            (rows if fan_in else 0,),
            dropped, indices, *key, in_features, fan_in, ROUNDS=DRAW_ROUNDS, **ROW_CONFIG,
        )  # fmt: skip
    for values, scale in ((weight, init_scale), *((moments, 0.0) for moments in state)):
        launch(
            _reset_kernel,
            (-(-out_features * fan_in // RESET_CONFIG["BLOCK"]),),
            values, dropped, *key, scale, out_features, fan_in, group_size,
            RANDOM=scale != 0, **RESET_CONFIG,
        )  # fmt: skip
    return dropped.sum(dtype=torch.int64)


def _dropped(weight, rows, group_size, criterion, scope, amount, key) -> Tensor:
    """[rows, F] int8"""
    out_features, fan_in = weight.shape
    size, one = rows * fan_in, {"ONE": group_size == 1}
    dropped = torch.zeros((rows, fan_in), dtype=torch.int8, device=weight.device)
    sizes = (out_features, fan_in, group_size)
    if criterion == FRACTION and scope == ROW:
        grid = (rows * -(-fan_in // ROW_CONFIG["BLOCK"]),)
        count = int(amount * fan_in + 0.5)
        launch(_drop_of_row_kernel, grid, weight, dropped, *key, count, *sizes, **one, **ROW_CONFIG)
        return dropped
    grid = (-(-size // SELECT_CONFIG["BLOCK"]),)
    limit = torch.zeros(2, dtype=torch.int64, device=weight.device)
    equal = torch.zeros(grid, dtype=torch.int64, device=weight.device)
    if criterion == FRACTION:
        count = int(amount * size + 0.5)
        if count == 0:
            return dropped
        limit[1] = count
        bins = torch.zeros(BINS, dtype=torch.int64, device=weight.device)
        for shift in range(56, -1, -8):
            launch(
                _histogram_kernel,
                grid,
                weight, limit, bins, *key, rows, *sizes, SHIFT=shift, **one, **SELECT_CONFIG,
            )  # fmt: skip
            launch(_digit_kernel, (1,), limit, bins, SHIFT=shift)
        launch(_count_equal_kernel, grid, weight, limit, equal, *key, rows, *sizes, **one, **SELECT_CONFIG)
        equal = equal.cumsum(0)
    launch(
        _drop_kernel,
        grid,
        weight, limit, equal, dropped, *key, float(amount), rows, *sizes,
        THRESHOLD=criterion == THRESHOLD, **one, **SELECT_CONFIG,
    )  # fmt: skip
    return dropped


def compile_cases():
    """(name, call) of every kernel and configuration, for `recsparse_kernels.triton.compile`."""
    for name, (_, weight, indices, _, group) in layers([(torch.bfloat16, 1, 1), (torch.float32, 16, 1)]):
        moments = [torch.empty_like(weight, dtype=torch.float32)]
        for what, criterion, scope, amount, scale, duplicates in (
            ("threshold", THRESHOLD, LAYER, 0.1, 0.0, False),
            ("layer", FRACTION, LAYER, 0.3, 0.2, False),
            ("row, duplicates", FRACTION, ROW, 0.3, 0.0, True),
        ):
            rest = (criterion, scope, amount, scale, duplicates, 7)
            yield f"rewire {what} {name}", partial(fan_in_rewire, weight, indices, moments, 768, group, *rest)
