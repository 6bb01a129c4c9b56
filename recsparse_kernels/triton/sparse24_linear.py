"""2:4 linear in Triton: bandwidth, not sparse tensor cores.

output = act(input W^T + bias)     grad_input = grad_sum W     grad_values = (grad_sum^T input) where kept

input [B, I]   values [O, P / 2]   metadata [O, P / 8]   output, grad_sum [B, O]

Triton has no sparse matrix instruction: a tile of W is read packed (9/16 of its bytes at 16 bit, 17/32 at
32 bit), expanded in registers and multiplied as dense. That saves bytes, not operations: it pays where
the weight's bytes are the time, at small batch; at large batch it runs as fast as a dense product, at best.
The gradient to the values is made a dense tile at a time, of which only what is kept is written.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.sparse24 import padded
from ._activation import activate
from ._configs import Configs
from ._device import device_function
from ._launch import NO_SPILL, launch, launcher
from ._partials import empty_parts, split_rows, sum_partials
from ._precision import cast, dot
from .sparse24 import join_groups, kept_positions, scatter, select, split_groups

LINEAR_CONFIGS = Configs(
    "sparse24_linear",
    {  # by rows of input; few rows are padded to the 16 of a tensor core in registers
        "16 rows": dict(BLOCK_B=16, BLOCK_O=16, BLOCK_I=256, num_warps=4, num_stages=3),
        "64 rows": dict(BLOCK_B=64, BLOCK_O=32, BLOCK_I=128, num_warps=4, num_stages=3),
        "many rows": dict(BLOCK_B=128, BLOCK_O=64, BLOCK_I=64, num_warps=8, num_stages=3),
        "16 rows, float32": dict(BLOCK_B=16, BLOCK_O=32, BLOCK_I=32, num_warps=4, num_stages=3),
        "64 rows, float32": dict(BLOCK_B=32, BLOCK_O=32, BLOCK_I=32, num_warps=4, num_stages=3),
        "many rows, float32": dict(BLOCK_B=64, BLOCK_O=64, BLOCK_I=32, num_warps=8, num_stages=2),
    },
    others={
        "16 rows": {"short": dict(BLOCK_B=16, BLOCK_O=16, BLOCK_I=128, num_warps=4, num_stages=4)},
        "64 rows": {"short": dict(BLOCK_B=64, BLOCK_O=32, BLOCK_I=64, num_warps=4, num_stages=4)},
        "many rows": {"half": dict(BLOCK_B=64, BLOCK_O=64, BLOCK_I=64, num_warps=4, num_stages=3)},
    },
)
GRAD_INPUT_CONFIGS = Configs(
    "sparse24_grad_input",
    {
        "16 rows": dict(BLOCK_B=16, BLOCK_O=64, BLOCK_I=64, num_warps=4, num_stages=3),
        "64 rows": dict(BLOCK_B=64, BLOCK_O=64, BLOCK_I=64, num_warps=4, num_stages=3),
        "many rows": dict(BLOCK_B=128, BLOCK_O=64, BLOCK_I=64, num_warps=8, num_stages=3, **NO_SPILL),
        "16 rows, float32": dict(BLOCK_B=16, BLOCK_O=32, BLOCK_I=64, num_warps=4, num_stages=2),
        "64 rows, float32": dict(BLOCK_B=32, BLOCK_O=32, BLOCK_I=64, num_warps=4, num_stages=2),
        "many rows, float32": dict(BLOCK_B=64, BLOCK_O=32, BLOCK_I=64, num_warps=8, num_stages=2),
    },
    others={
        "many rows": {"half": dict(BLOCK_B=64, BLOCK_O=64, BLOCK_I=64, num_warps=4, num_stages=3)},
    },
)
GRAD_VALUES_CONFIGS = Configs(
    "sparse24_grad_values",
    {
        "16 bit": dict(BLOCK_B=64, BLOCK_O=64, BLOCK_I=64, num_warps=4, num_stages=3),
        "float32": dict(BLOCK_B=16, BLOCK_O=32, BLOCK_I=32, num_warps=4, num_stages=2),
    },
)


def _config(table: dict, rows: int, like: Tensor) -> dict:
    name = "16 rows" if rows <= 16 else "64 rows" if rows <= 64 else "many rows"
    return table[name + ", float32" * (like.element_size() == 4)]


@device_function
def _weight_tile(
    values_ptr, metadata_ptr, o, o_inside, group0, row_bytes, BLOCK_O: tl.constexpr, GROUPS: tl.constexpr
):
    """[BLOCK_O, 4 * GROUPS] of W from group ``group0`` on, expanded in registers; zero outside."""
    at = group0 * 2 + tl.arange(0, 2 * GROUPS)
    mask = o_inside[:, None] & (at < 4 * row_bytes)[None, :]
    values = tl.load(values_ptr + o[:, None] * (4 * row_bytes) + at[None, :], mask=mask, other=0.0)
    # As whole numbers of the same bits until the tile is whole: triton 3.6 would put a reshape that feeds a
    # product on Hopper into shared memory, in a layout that it then finds illegal. A bit cast in between,
    # which costs nothing, keeps the reshape in registers.
    BITS: tl.constexpr = tl.int16 if values_ptr.dtype.element_ty.primitive_bitwidth == 16 else tl.int32
    v0, v1 = tl.split(tl.reshape(values.to(BITS, bitcast=True), (BLOCK_O, GROUPS, 2)))
    group = group0 + tl.arange(0, GROUPS)
    mask = o_inside[:, None] & (group < 2 * row_bytes)[None, :]
    bits = tl.load(metadata_ptr + o[:, None] * row_bytes + (group // 2)[None, :], mask=mask, other=0)
    first, second = kept_positions(bits, (group % 2 * 4)[None, :])
    c0, c1 = scatter(first, second, v0, v1, 0), scatter(first, second, v0, v1, 1)
    c2, c3 = scatter(first, second, v0, v1, 2), scatter(first, second, v0, v1, 3)
    tile = join_groups(c0, c1, c2, c3, BLOCK_O, GROUPS)
    return tile.to(values_ptr.dtype.element_ty, bitcast=True)


@triton.jit
def _linear_kernel(
    input_ptr,  # [B, I]
    values_ptr,  # [O, 4 * row_bytes]
    metadata_ptr,  # [O, row_bytes] uint8
    bias_ptr,  # [O] or None
    sum_ptr,  # [B, O] or None: before the activation
    output_ptr,  # [B, O]
    B,
    I,
    O,
    row_bytes,
    ACTIVATION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    # one program: BLOCK_B x BLOCK_O outputs; programs next to each other read the same weight
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    o = tl.program_id(1).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    acc = tl.zeros((BLOCK_B, BLOCK_O), dtype=tl.float32)
    for i0 in range(0, I, BLOCK_I):
        i = i0 + tl.arange(0, BLOCK_I)
        x_mask = (b < B)[:, None] & (i < I)[None, :]
        x = tl.load(input_ptr + b[:, None] * I + i[None, :], mask=x_mask, other=0.0)
        w = _weight_tile(values_ptr, metadata_ptr, o, o < O, i0 // 4, row_bytes, BLOCK_O, BLOCK_I // 4)
        acc = dot(x, tl.trans(w), acc)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
    at = b[:, None] * O + o[None, :]
    mask = (b < B)[:, None] & (o < O)[None, :]
    dtype = output_ptr.dtype.element_ty
    if sum_ptr is not None:
        tl.store(sum_ptr + at, cast(acc, dtype), mask=mask)
    tl.store(output_ptr + at, cast(activate(acc, ACTIVATION), dtype), mask=mask)


@triton.jit
def _grad_input_kernel(
    grad_ptr,  # [B, O]
    values_ptr,  # [O, 4 * row_bytes]
    metadata_ptr,  # [O, row_bytes] uint8
    out_ptr,  # [B, I]
    B,
    I,
    O,
    row_bytes,
    BLOCK_B: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    # one program: BLOCK_B x BLOCK_I of the gradient
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    i0 = tl.program_id(1) * BLOCK_I
    acc = tl.zeros((BLOCK_B, BLOCK_I), dtype=tl.float32)
    for o0 in range(0, O, BLOCK_O):
        o = o0 + tl.arange(0, BLOCK_O).to(tl.int64)
        mask = (b < B)[:, None] & (o < O)[None, :]
        grad = tl.load(grad_ptr + b[:, None] * O + o[None, :], mask=mask, other=0.0)
        w = _weight_tile(values_ptr, metadata_ptr, o, o < O, i0 // 4, row_bytes, BLOCK_O, BLOCK_I // 4)
        acc = dot(grad, w, acc)
    i = i0 + tl.arange(0, BLOCK_I)
    mask = (b < B)[:, None] & (i < I)[None, :]
    tl.store(out_ptr + b[:, None] * I + i[None, :], cast(acc, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _grad_values_kernel(
    grad_ptr,  # [B, O]
    input_ptr,  # [B, I]
    metadata_ptr,  # [O, row_bytes] uint8
    out_ptr,  # [O, 4 * row_bytes], or [S, O, 4 * row_bytes] float32
    B,
    I,
    O,
    row_bytes,
    b_each,  # rows that a part sums
    BLOCK_B: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    # one program: BLOCK_O x BLOCK_I of the dense gradient in registers, over one part of the rows
    o = tl.program_id(0).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    i0 = tl.program_id(1) * BLOCK_I
    part = tl.program_id(2).to(tl.int64)
    i = i0 + tl.arange(0, BLOCK_I)
    acc = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    end = tl.minimum((part + 1) * b_each, B)
    for b0 in range(part * b_each, end, BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B)
        grad_mask = (b < end)[:, None] & (o < O)[None, :]
        grad = tl.load(grad_ptr + b[:, None] * O + o[None, :], mask=grad_mask, other=0.0)
        x_mask = (b < end)[:, None] & (i < I)[None, :]
        x = tl.load(input_ptr + b[:, None] * I + i[None, :], mask=x_mask, other=0.0)
        acc = dot(tl.trans(grad), x, acc)
    c0, c1, c2, c3 = split_groups(acc, BLOCK_O, BLOCK_I // 4)
    group = i0 // 4 + tl.arange(0, BLOCK_I // 4)
    mask = (o < O)[:, None] & (group < 2 * row_bytes)[None, :]
    bits = tl.load(metadata_ptr + o[:, None] * row_bytes + (group // 2)[None, :], mask=mask, other=0)
    first, second = kept_positions(bits, (group % 2 * 4)[None, :])
    values = tl.join(select(first, c0, c1, c2, c3), select(second, c0, c1, c2, c3))
    values = tl.reshape(values, (BLOCK_O, BLOCK_I // 2))
    at = i0 // 2 + tl.arange(0, BLOCK_I // 2)
    mask = (o < O)[:, None] & (at < 4 * row_bytes)[None, :]
    out_at = (part * O + o)[:, None] * (4 * row_bytes) + at[None, :]
    tl.store(out_ptr + out_at, cast(values, out_ptr.dtype.element_ty), mask=mask)


@launcher
def sparse24_linear(
    input: Tensor,
    values: Tensor,
    metadata: Tensor,
    bias: Tensor | None,
    activation: int,
    keep_sum: bool,
    transposable: bool,
) -> tuple[Tensor, Tensor]:
    input, values, metadata = input.contiguous(), values.contiguous(), metadata.contiguous()
    bias = None if bias is None else bias.contiguous()
    (B, I), (O, row_bytes) = input.shape, metadata.shape
    output = input.new_empty(B, O)
    total = input.new_empty((B, O) if keep_sum else (0,))
    config = _config(LINEAR_CONFIGS, B, input)
    launch(
        _linear_kernel,
        (triton.cdiv(B, config["BLOCK_B"]), triton.cdiv(O, config["BLOCK_O"])),
        *(input, values, metadata, bias, total if keep_sum else None, output, B, I, O, row_bytes),
        ACTIVATION=activation,
        **config,
    )
    return output, total


@launcher
def sparse24_linear_ste(
    input: Tensor,
    weight: Tensor,
    values: Tensor,
    metadata: Tensor,
    values_t: Tensor | None,
    metadata_t: Tensor | None,
    bias: Tensor | None,
    activation: int,
    keep_sum: bool,
    decay: float,
) -> tuple[Tensor, Tensor]:
    return sparse24_linear(input, values, metadata, bias, activation, keep_sum, False)


@launcher
def sparse24_linear_grad_input(
    grad_sum: Tensor, values: Tensor, metadata: Tensor, in_features: int
) -> Tensor:
    grad_sum, values, metadata = grad_sum.contiguous(), values.contiguous(), metadata.contiguous()
    (B, O), I, row_bytes = grad_sum.shape, in_features, metadata.shape[1]
    out = grad_sum.new_empty(B, I)
    config = _config(GRAD_INPUT_CONFIGS, B, grad_sum)
    grid = (triton.cdiv(B, config["BLOCK_B"]), triton.cdiv(I, config["BLOCK_I"]))
    launch(_grad_input_kernel, grid, grad_sum, values, metadata, out, B, I, O, row_bytes, **config)
    return out


@launcher
def sparse24_linear_grad_values(grad_sum: Tensor, input: Tensor, metadata: Tensor) -> Tensor:
    grad_sum, input, metadata = grad_sum.contiguous(), input.contiguous(), metadata.contiguous()
    (B, I), (O, row_bytes) = input.shape, metadata.shape
    out = input.new_empty(O, 4 * row_bytes)
    config = GRAD_VALUES_CONFIGS["float32" if input.element_size() == 4 else "16 bit"]
    tiles_o = triton.cdiv(O, config["BLOCK_O"])
    tiles_i = triton.cdiv(8 * row_bytes, config["BLOCK_I"])
    # parts take [S, O, I / 2] float32: no more than grad_sum and input do
    most = B * (O + I) // max(O * I, 1)
    parts, each = split_rows(B, tiles_o * tiles_i, config["BLOCK_B"], max(1, most))
    target = empty_parts(parts, out)
    grid = (tiles_o, tiles_i, parts)
    launch(_grad_values_kernel, grid, grad_sum, input, metadata, target, B, I, O, row_bytes, each, **config)
    return out if parts == 1 else sum_partials(target, out)


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that between them launch every kernel and configuration of this file."""
    for dtype in (torch.bfloat16, torch.float32):
        for B, I, O in ((16, 4096, 4096), (64, 1024, 1024), (8192, 512, 256), (8192, 479, 1023)):

            def empty(*shape, dtype=dtype):
                return torch.empty(shape, dtype=dtype, device="meta")

            input, values, bias, grad = empty(B, I), empty(O, padded(I) // 2), empty(O), empty(B, O)
            metadata = empty(O, padded(I) // 8, dtype=torch.uint8)
            label = f"{B} x {I} x {O}, {str(dtype).removeprefix('torch.')}"
            for code in (0, 1, 2):
                args = (input, values, metadata, bias, code, code == 2, False)
                yield f"linear {code}, {label}", partial(sparse24_linear, *args)
            args = (grad, values, metadata, I)
            yield f"grad input, {label}", partial(sparse24_linear_grad_input, *args)
            yield f"grad values, {label}", partial(sparse24_linear_grad_values, grad, input, metadata)
