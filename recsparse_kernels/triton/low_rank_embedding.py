"""Low-rank embedding bags in Triton.

row(v) = table[v] up^T + mean                                   table [V, R]   up [D, R]   mean [D]
bag:     sum or mean of weight * row(index) = pooled up^T + total * mean

Sums and means pool rows of rank R in registers and project once for each bag. The gradient to the table
is a sum over sorted lookups (_segments.py), so that it does not depend on any order of execution. The
maximum is in low_rank_embedding_max.py.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..config import get_check_indices
from ..reference.low_rank_embedding import MEAN, SUM
from ._configs import Configs
from ._device import device_function
from ._launch import NO_SPILL, checked_indices, launch, launcher
from ._linear import linear, weight_grad
from ._precision import cast, dot
from ._segments import Runs, sum_runs

MAX_RANK = 128  # pooled and projected in one kernel up to here
CONFIGS = Configs(
    "low_rank_embedding",
    {
        # UNROLL lookups of a bag are in flight at a time; a single lookup has no more than one
        "bags": dict(BLOCK_B=16, BLOCK_D=64, UNROLL=4, num_warps=2),
        "single lookups": dict(BLOCK_B=64, BLOCK_D=64, UNROLL=1, num_warps=4, **NO_SPILL),
        "bags, rank 128": dict(BLOCK_B=16, BLOCK_D=64, UNROLL=4, num_warps=4),
        "single lookups, rank 128": dict(BLOCK_B=32, BLOCK_D=64, UNROLL=1, num_warps=4),
        "bags, float32": dict(BLOCK_B=16, BLOCK_D=32, UNROLL=4, num_warps=2),
        "single lookups, float32": dict(BLOCK_B=32, BLOCK_D=32, UNROLL=1, num_warps=4),
        "bags, rank 128, float32": dict(BLOCK_B=16, BLOCK_D=32, UNROLL=4, num_warps=4),
        "single lookups, rank 128, float32": dict(BLOCK_B=32, BLOCK_D=32, UNROLL=1, num_warps=8),
    },
)
WEIGHTS_CONFIG = dict(BLOCK_B=128, num_warps=4)
GRAD_WEIGHTS_CONFIG = dict(BLOCK_B=16, BLOCK_D=64, num_warps=4)


@device_function
def bag_range(starts_ptr, b, B, N):
    """First lookup and number of lookups of the bags ``b``; one each where there are no starts."""
    if starts_ptr is None:
        start = b
        length = tl.where(b < B, 1, 0)
    else:  # clamped, so that wrong offsets read nothing outside
        start = tl.load(starts_ptr + b, mask=b < B, other=0).to(tl.int64)
        end = tl.load(starts_ptr + b + 1, mask=b < B, other=0).to(tl.int64)
        start = tl.maximum(start, 0)
        length = tl.maximum(tl.minimum(end, N) - start, 0)
    return start, length


@triton.jit
def _bag_kernel(
    table_ptr,  # [V, R]
    up_ptr,  # [D, R]
    mean_ptr,  # [D] or None
    indices_ptr,  # [N]
    starts_ptr,  # [B + 1]; None: bag b is lookup b
    weights_ptr,  # [N] or None
    pooled_ptr,  # [B, R] or None
    output_ptr,  # [B, D], or None: pool only
    V,
    R,
    D,
    B,
    N,
    padding_idx,
    IS_MEAN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
):
    # one program: BLOCK_B bags x BLOCK_R columns of the table, then all D of the output
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    b_inside = b < B
    r_inside = r < R
    start, length = bag_range(starts_ptr, b, B, N)
    pooled = tl.zeros((BLOCK_B, BLOCK_R), dtype=tl.float32)
    total = tl.zeros((BLOCK_B,), dtype=tl.float32)
    count = tl.zeros((BLOCK_B,), dtype=tl.float32)
    for step0 in range(0, tl.max(length, axis=0), UNROLL):
        for step1 in tl.static_range(UNROLL):
            step = step0 + step1
            inside = step < length
            index = tl.load(indices_ptr + start + step, mask=inside, other=-1).to(tl.int64)
            kept = inside & (index != padding_idx)
            fetched = kept & (index >= 0) & (index < V)
            if starts_ptr is None:  # the padding row is looked up, but without mean and gradient
                fetched = inside & (index >= 0) & (index < V)
            row = tl.load(
                table_ptr + index[:, None] * R + r[None, :],
                mask=fetched[:, None] & r_inside[None, :],
                other=0.0,
            ).to(tl.float32)
            weight = kept.to(tl.float32)
            count += weight
            if weights_ptr is not None:
                weight = tl.load(weights_ptr + start + step, mask=kept, other=0.0).to(tl.float32)
                row *= weight[:, None]
            total += weight
            pooled += row
    if IS_MEAN:
        count = tl.maximum(count, 1.0)
        total = total / count
        pooled = pooled / count[:, None]
    narrow = cast(pooled, table_ptr.dtype.element_ty)
    if pooled_ptr is not None:
        pooled_mask = b_inside[:, None] & r_inside[None, :]
        tl.store(pooled_ptr + b[:, None] * R + r[None, :], narrow, mask=pooled_mask)
    if output_ptr is not None:
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            d_inside = d < D
            up = tl.load(
                up_ptr + d[None, :].to(tl.int64) * R + r[:, None],
                mask=d_inside[None, :] & r_inside[:, None],
                other=0.0,
            )
            y = dot(narrow, up, tl.zeros((BLOCK_B, BLOCK_D), dtype=tl.float32))
            if mean_ptr is not None:
                mean = tl.load(mean_ptr + d, mask=d_inside, other=0.0).to(tl.float32)
                y += total[:, None] * mean[None, :]
            mask = b_inside[:, None] & d_inside[None, :]
            tl.store(
                output_ptr + b[:, None] * D + d[None, :], cast(y, output_ptr.dtype.element_ty), mask=mask
            )


@triton.jit
def _bag_weights_kernel(
    indices_ptr,  # [N]
    starts_ptr,  # [B + 1]
    weights_ptr,  # [N] or None
    total_ptr,  # [B] float32 or None: sum of the weights, divided by the count in mode mean
    inverse_ptr,  # [B] float32 or None: 1 / count, 1 where nothing counts
    B,
    N,
    padding_idx,
    IS_MEAN: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    start, length = bag_range(starts_ptr, b, B, N)
    total = tl.zeros((BLOCK_B,), dtype=tl.float32)
    count = tl.zeros((BLOCK_B,), dtype=tl.float32)
    for step in range(0, tl.max(length, axis=0)):
        inside = step < length
        index = tl.load(indices_ptr + start + step, mask=inside, other=0).to(tl.int64)
        kept = inside & (index != padding_idx)
        count += kept.to(tl.float32)
        if weights_ptr is not None:
            total += tl.load(weights_ptr + start + step, mask=kept, other=0.0).to(tl.float32)
    if weights_ptr is None:
        total = count
    count = tl.maximum(count, 1.0)
    if IS_MEAN:
        total = total / count
    if total_ptr is not None:
        tl.store(total_ptr + b, total, mask=b < B)
    if inverse_ptr is not None:
        tl.store(inverse_ptr + b, 1.0 / count, mask=b < B)


@triton.jit
def _grad_weights_kernel(
    grad_output_ptr,  # [B, D]
    grad_pooled_ptr,  # [B, R]
    table_ptr,  # [V, R]
    mean_ptr,  # [D] or None
    indices_ptr,  # [N]
    starts_ptr,  # [B + 1]
    inverse_ptr,  # [B] float32 or None: mode mean
    grad_weights_ptr,  # [N]
    V,
    R,
    D,
    B,
    N,
    padding_idx,
    BLOCK_R: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # one program: BLOCK_B bags.  grad_weight = (table[index] . grad_pooled + grad_output . mean) / count
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    b_inside = b < B
    start, length = bag_range(starts_ptr, b, B, N)
    same = tl.zeros((BLOCK_B,), dtype=tl.float32)  # what all weights of the bag have in common
    if mean_ptr is not None:
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            mask = b_inside[:, None] & (d < D)[None, :]
            grad = tl.load(grad_output_ptr + b[:, None] * D + d[None, :], mask=mask, other=0.0)
            mean = tl.load(mean_ptr + d, mask=d < D, other=0.0).to(tl.float32)
            same += tl.sum(grad.to(tl.float32) * mean[None, :], axis=1)
    inverse = tl.full((BLOCK_B,), 1.0, dtype=tl.float32)
    if inverse_ptr is not None:
        inverse = tl.load(inverse_ptr + b, mask=b_inside, other=0.0)
    for step in range(0, tl.max(length, axis=0)):
        inside = step < length
        index = tl.load(indices_ptr + start + step, mask=inside, other=-1).to(tl.int64)
        kept = inside & (index != padding_idx) & (index >= 0) & (index < V)
        each = same
        for r0 in range(0, R, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)
            mask = kept[:, None] & (r < R)[None, :]
            row = tl.load(table_ptr + index[:, None] * R + r[None, :], mask=mask, other=0.0).to(tl.float32)
            grad = tl.load(grad_pooled_ptr + b[:, None] * R + r[None, :], mask=mask, other=0.0)
            each += tl.sum(row * grad.to(tl.float32), axis=1)
        each = cast(each * inverse, grad_weights_ptr.dtype.element_ty)
        tl.store(grad_weights_ptr + start + step, each, mask=kept)


def rank_block(R: int) -> int:
    return min(MAX_RANK, max(16, triton.next_power_of_2(R)))


def checked_starts(offsets: Tensor, lookups: int, include_last_offset: bool) -> Tensor:
    """[B + 1] int64 from offsets.

    Raises:
        ValueError: on CPU tensors (the interpreter), as the reference does; on a GPU the device asserts.
    """
    starts = offsets.long()
    if not include_last_offset:
        starts = torch.cat([starts, starts.new_full((1,), lookups)])
    if get_check_indices() == "none" or starts.is_meta or starts.numel() < 2:
        return starts.contiguous()
    if starts.device.type == "cpu":
        if starts[0] != 0:
            raise ValueError(f"offsets must begin with 0; got {int(starts[0])}")
        if bool((starts[1:] < starts[:-1]).any()) or int(starts[-1]) > lookups:
            raise ValueError(
                f"offsets must not decrease or pass the end of {lookups} indices; got {starts.tolist()}"
            )
    else:
        rising = (starts[1:] >= starts[:-1]).all() & (starts[0] == 0) & (starts[-1] <= lookups)
        torch._assert_async(rising, f"offsets must begin with 0 and not decrease or pass {lookups}")
    return starts.contiguous()


def clamped(indices: Tensor, size: int) -> Tensor:
    """What the forward looked up; checked there, so not again."""
    return checked_indices("indices", indices, size) if get_check_indices() == "clamp" else indices


def bag_inputs(table, up, mean, indices, offsets, weights, include_last_offset):
    """Contiguous tensors, starts or None, number of bags."""
    if offsets is None and weights is not None:
        raise ValueError("per_sample_weights needs offsets; got None")
    indices = checked_indices("indices", indices, table.shape[0]).contiguous()
    starts = None
    if offsets is not None:
        starts = checked_starts(offsets, indices.shape[0], include_last_offset)
    mean = None if mean is None else mean.contiguous()
    weights = None if weights is None else weights.contiguous()
    bags = indices.shape[0] if starts is None else starts.shape[0] - 1
    return table.contiguous(), up.contiguous(), mean, indices, starts, weights, bags


def _bag_weights(indices, starts, weights, bags, mode, padding_idx, *, total: bool, inverse: bool):
    """total [B] and 1 / count [B], float32, None where not wanted."""
    totals = torch.empty(bags, dtype=torch.float32, device=indices.device) if total else None
    inverses = torch.empty(bags, dtype=torch.float32, device=indices.device) if inverse else None
    if total or inverse:
        grid = (triton.cdiv(bags, WEIGHTS_CONFIG["BLOCK_B"]),)
        args = (indices, starts, weights, totals, inverses, bags, indices.shape[0], padding_idx)
        launch(_bag_weights_kernel, grid, *args, IS_MEAN=mode == MEAN, **WEIGHTS_CONFIG)
    return totals, inverses


@launcher
def low_rank_embedding_bag(
    table: Tensor,
    up: Tensor,
    mean: Tensor | None,
    indices: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    pooling_mode: int,
    padding_idx: int,
    include_last_offset: bool,
    scale_grad_by_freq: bool,
    sparse: bool,
    keep_pooled: bool,
) -> tuple[Tensor, Tensor]:
    table, up, mean, indices, starts, weights, B = bag_inputs(
        table, up, mean, indices, offsets, per_sample_weights, include_last_offset
    )
    (V, R), D, N = table.shape, up.shape[0], indices.shape[0]
    fused = R <= MAX_RANK
    output = table.new_empty(B, D)
    pooled = table.new_empty(B if keep_pooled or not fused else 0, R)
    name = ("single lookups" if starts is None else "bags") + ", rank 128" * (R > 64)
    config = CONFIGS[name + ", float32" * (table.element_size() == 4)]
    block_r = rank_block(R)
    launch(
        _bag_kernel,
        (triton.cdiv(B, config["BLOCK_B"]), 1 if fused else triton.cdiv(R, block_r)),
        *(table, up, mean, indices, starts, weights, pooled if keep_pooled or not fused else None),
        *(output if fused else None, V, R, D, B, N, padding_idx),
        IS_MEAN=pooling_mode == MEAN,
        BLOCK_R=block_r,
        **config,
    )
    if fused:
        return output, pooled
    total = None
    if mean is not None and starts is None:
        total = (indices != padding_idx).to(torch.float32)
    elif mean is not None:
        total, _ = _bag_weights(
            indices, starts, weights, B, pooling_mode, padding_idx, total=True, inverse=False
        )
    linear(pooled, up, output, mean, bias_scale=total)
    return output, pooled if keep_pooled else pooled.new_empty(0, R)


@launcher
def low_rank_embedding_bag_grad(
    grad_output: Tensor,
    table: Tensor,
    up: Tensor,
    mean: Tensor | None,
    indices: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    pooled: Tensor,
    pooling_mode: int,
    padding_idx: int,
    include_last_offset: bool,
    needs_sample_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if needs_sample_weights and offsets is None:
        raise ValueError("a gradient to sample weights needs offsets; got None")
    table, up, mean, indices, starts, weights, B = bag_inputs(
        table, up, mean, indices, offsets, per_sample_weights, include_last_offset
    )
    grad_output, pooled = grad_output.contiguous(), pooled.contiguous()
    (V, R), D, N = table.shape, up.shape[0], indices.shape[0]
    grad_pooled, grad_up = torch.empty_like(pooled), torch.empty_like(up)
    grad_mean = table.new_empty(0 if mean is None else D)
    grad_weights = table.new_zeros(N if needs_sample_weights else 0)
    row_mask = total = inverse = None
    if starts is None:
        row_mask = indices != padding_idx if padding_idx >= 0 else None
    else:
        need_inverse = needs_sample_weights and pooling_mode == MEAN
        total, inverse = _bag_weights(
            indices,
            starts,
            weights,
            B,
            pooling_mode,
            padding_idx,
            total=mean is not None,
            inverse=need_inverse,
        )
    linear(grad_output, up.t(), grad_pooled, row_mask=row_mask)
    sums = None if mean is None else grad_mean
    weight_grad(grad_output, pooled, grad_up, sums, scale=total, row_mask=row_mask)
    if needs_sample_weights:
        config = GRAD_WEIGHTS_CONFIG
        launch(
            _grad_weights_kernel,
            (triton.cdiv(B, config["BLOCK_B"]),),
            *(grad_output, grad_pooled, table, mean, indices, starts, inverse, grad_weights),
            *(V, R, D, B, N, padding_idx),
            BLOCK_R=rank_block(R),
            **config,
        )
    return grad_pooled, grad_up, grad_mean, grad_weights


def _lookups(indices, starts, weights, bags, num_embeddings, mode, padding_idx):
    """Key of each lookup (num_embeddings: does not count), its bag and 1 / count of each bag."""
    N = indices.shape[0]
    counts = (indices != padding_idx) & (indices >= 0) & (indices < num_embeddings)
    bag = inverse = None
    if starts is not None:
        position = torch.arange(N, device=indices.device)
        bag = torch.searchsorted(starts, position, right=True) - 1
        counts = counts & (bag >= 0) & (bag < bags)
        if mode == MEAN:
            _, inverse = _bag_weights(
                indices, starts, None, bags, mode, padding_idx, total=False, inverse=True
            )
    return torch.where(counts, indices.long(), num_embeddings), bag, inverse


@launcher
def low_rank_rows_grad(
    grad_pooled: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    num_embeddings: int,
    pooling_mode: int,
    padding_idx: int,
    include_last_offset: bool,
) -> Tensor:
    grad_pooled = grad_pooled.contiguous()
    indices = clamped(indices, num_embeddings).contiguous()
    starts = None if offsets is None else checked_starts(offsets, indices.shape[0], include_last_offset)
    weights = None if per_sample_weights is None else per_sample_weights.contiguous()
    args = (indices, starts, weights, grad_pooled.shape[0], num_embeddings, pooling_mode, padding_idx)
    keys, bag, scale = _lookups(*args)
    out = grad_pooled.new_zeros(num_embeddings, grad_pooled.shape[1])
    runs = Runs(keys, num_embeddings)
    return sum_runs(runs, grad_pooled, out, source_of=bag, weights=weights, scale=scale)


@launcher
def low_rank_rows_grad_sparse(
    grad_pooled: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    num_embeddings: int,
    pooling_mode: int,
    padding_idx: int,
    include_last_offset: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_pooled = grad_pooled.contiguous()
    indices = clamped(indices, num_embeddings).contiguous()
    starts = None if offsets is None else checked_starts(offsets, indices.shape[0], include_last_offset)
    weights = None if per_sample_weights is None else per_sample_weights.contiguous()
    N, R = indices.shape[0], grad_pooled.shape[1]
    out = grad_pooled.new_zeros(N, R)
    if N == 0:
        none = torch.zeros(1, dtype=torch.int64, device=indices.device)
        return none[:0].clone(), out, none
    args = (indices, starts, weights, grad_pooled.shape[0], num_embeddings, pooling_mode, padding_idx)
    keys, bag, scale = _lookups(*args)
    runs = Runs(keys, num_embeddings)
    rows, rank, count = runs.unique()
    sum_runs(runs, grad_pooled, out, source_of=bag, weights=weights, scale=scale, rank=rank)
    return rows, out, count


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that between them launch every kernel and configuration of this file and of _segments."""
    V, D, N, B = 1_000_000, 128, 200_000, 10_000
    for dtype in (torch.bfloat16, torch.float32):
        for R, index_dtype in ((13, torch.int64), (64, torch.int32), (128, torch.int64), (320, torch.int64)):

            def empty(*shape, dtype=dtype):
                return torch.empty(shape, dtype=dtype, device="meta")

            table, up, mean, weights = empty(V, R), empty(D, R), empty(D), empty(N)
            indices, offsets = empty(N, dtype=index_dtype), empty(B, dtype=torch.int64)
            grad, pooled = empty(B, D), empty(B, R)
            label = f"rank {R}, {str(dtype).removeprefix('torch.')}"
            rest = (7, False)
            for mode, w in ((SUM, None), (MEAN, weights)):
                lookups = (indices, offsets, w)
                args = (table, up, mean, *lookups, mode, *rest, False, False, True)
                yield f"bag {mode}, {label}", partial(low_rank_embedding_bag, *args)
                args = (grad, table, up, mean, *lookups, pooled, mode, *rest, True)
                yield f"bag grad {mode}, {label}", partial(low_rank_embedding_bag_grad, *args)
                args = (pooled, *lookups, V, mode, *rest)
                yield f"rows grad {mode}, {label}", partial(low_rank_rows_grad, *args)
                yield f"rows grad sparse {mode}, {label}", partial(low_rank_rows_grad_sparse, *args)
            single = (indices[:B], None, None)
            args = (table, up, mean, *single, SUM, *rest, False, False, True)
            yield f"single, {label}", partial(low_rank_embedding_bag, *args)
            args = (grad, table, up, mean, *single, pooled, SUM, *rest, False)
            yield f"single grad, {label}", partial(low_rank_embedding_bag_grad, *args)
            args = (pooled, *single, V, SUM, *rest)
            yield f"single rows grad, {label}", partial(low_rank_rows_grad, *args)
