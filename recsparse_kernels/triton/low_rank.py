"""Low-rank linear and DCN-v2 cross layers in Triton.

linear: mid = input down^T + mid_bias,  output = act(act_mid(mid) up^T + bias)
cross:  mid = x down^T,                 output = x0 * (mid up^T + bias) + x

input, x, x0 [B, I]   down [R, I]   up [O, R]   mid [B, R]

Up to MAX_RANK one kernel makes a block of rows of mid and projects it up without leaving the chip
(R padded to a power of two in registers only); the gradients to mid, input and x0 likewise. Larger
ranks, and batches too small to give every multiprocessor a block of rows, go through mid in memory.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.low_rank import NEEDS_BIAS, NEEDS_DOWN, NEEDS_INPUT, NEEDS_MID_BIAS, NEEDS_UP, NEEDS_X0
from . import _linear as tiled
from ._activation import activate, slope, slope_of_output
from ._configs import Configs
from ._launch import NO_SPILL, launch, launcher
from ._linear import linear, weight_grad
from ._precision import cast, dot

MAX_RANK = 128  # [32, 128] float32 sums take 32 registers of each of 128 threads
SMALL = 1024  # I + O up to which one launch beats two whatever the batch

CONFIGS = Configs(
    "low_rank",
    {
        "few rows": dict(BLOCK_B=16, BLOCK_I=64, BLOCK_O=64, num_warps=4, num_stages=3),
        "many rows": dict(BLOCK_B=64, BLOCK_I=64, BLOCK_O=64, num_warps=4, num_stages=3, **NO_SPILL),
        "many rows, rank 128": dict(BLOCK_B=64, BLOCK_I=64, BLOCK_O=64, num_warps=8, num_stages=2),
        "few rows, float32": dict(BLOCK_B=16, BLOCK_I=32, BLOCK_O=32, num_warps=4, num_stages=2),
        "many rows, float32": dict(BLOCK_B=32, BLOCK_I=32, BLOCK_O=32, num_warps=8, num_stages=2, **NO_SPILL),
        "many rows, rank 128, float32": dict(
            BLOCK_B=32, BLOCK_I=16, BLOCK_O=16, num_warps=8, num_stages=2, **NO_SPILL
        ),
    },
)


def _config(B: int, R: int, like: Tensor) -> dict:
    name = "few rows"
    if B >= 64 * 132:  # 64 rows for each of 132 multiprocessors
        name = "many rows, rank 128" if R > 64 else "many rows"
    return CONFIGS[name + ", float32" * (like.element_size() == 4)]


def _on_chip(B: int, I: int, R: int, O: int) -> bool:
    """Whether one kernel does both factors: see the top of the file."""
    return R <= MAX_RANK and (I + O <= SMALL or B >= 2048)


def _block_r(R: int) -> int:
    return max(16, triton.next_power_of_2(R))


@triton.jit
def _forward_kernel(
    input_ptr,  # [B, I]
    down_ptr,  # [R, I]
    up_ptr,  # [O, R]
    mid_bias_ptr,  # [R] or None
    bias_ptr,  # [O] or None
    x0_ptr,  # [B, O]; None: linear
    mid_ptr,  # [B, R] or None
    output_ptr,  # [B, O]
    B,
    I,
    R,
    O,
    MID_ACTIVATION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    # one program: BLOCK_B rows, all columns
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    r = tl.arange(0, BLOCK_R)
    b_inside = (b < B)[:, None]
    r_inside = r < R
    mid = tl.zeros((BLOCK_B, BLOCK_R), dtype=tl.float32)
    for i0 in range(0, I, BLOCK_I):
        i = i0 + tl.arange(0, BLOCK_I)
        i_inside = i < I
        x = tl.load(input_ptr + b[:, None] * I + i[None, :], mask=b_inside & i_inside[None, :], other=0.0)
        down = tl.load(
            down_ptr + r[None, :].to(tl.int64) * I + i[:, None],
            mask=r_inside[None, :] & i_inside[:, None],
            other=0.0,
        )
        mid = dot(x, down, mid)
    if mid_bias_ptr is not None:
        mid += tl.load(mid_bias_ptr + r, mask=r_inside, other=0.0).to(tl.float32)[None, :]
    mid_mask = b_inside & r_inside[None, :]
    if mid_ptr is not None:
        tl.store(mid_ptr + b[:, None] * R + r[None, :], cast(mid, mid_ptr.dtype.element_ty), mask=mid_mask)
    # the padding must be zero: an infinite input made it NaN, and some activations are not 0 at 0
    mid = cast(tl.where(mid_mask, activate(mid, MID_ACTIVATION), 0.0), up_ptr.dtype.element_ty)
    for o0 in range(0, O, BLOCK_O):
        o = o0 + tl.arange(0, BLOCK_O)
        o_inside = o < O
        up = tl.load(
            up_ptr + o[None, :].to(tl.int64) * R + r[:, None],
            mask=o_inside[None, :] & r_inside[:, None],
            other=0.0,
        )
        y = dot(mid, up, tl.zeros((BLOCK_B, BLOCK_O), dtype=tl.float32))
        if bias_ptr is not None:
            y += tl.load(bias_ptr + o, mask=o_inside, other=0.0).to(tl.float32)[None, :]
        at = b[:, None] * O + o[None, :]
        mask = b_inside & o_inside[None, :]
        if x0_ptr is not None:
            x0 = tl.load(x0_ptr + at, mask=mask, other=0.0).to(tl.float32)
            y = x0 * y + tl.load(input_ptr + at, mask=mask, other=0.0).to(tl.float32)
        else:
            y = activate(y, ACTIVATION)
        tl.store(output_ptr + at, cast(y, output_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    grad_output_ptr,  # [B, O]
    output_ptr,  # [B, O]: where the slope follows from it, else None
    x0_ptr,  # [B, O]: cross, else None
    down_ptr,  # [R, I]
    up_ptr,  # [O, R]
    mid_ptr,  # [B, R]
    bias_ptr,  # [O] or None
    grad_x0_ptr,  # [B, O] or None
    grad_mid_ptr,  # [B, R]
    grad_input_ptr,  # [B, I] or None
    B,
    I,
    R,
    O,
    MID_ACTIVATION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    # one program: BLOCK_B rows.  grad_sum = grad_output * slope (cross: * x0)
    #   grad_mid = (grad_sum up) * slope_mid,  grad_input = grad_mid down (cross: + grad_output)
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    r = tl.arange(0, BLOCK_R)
    b_inside = (b < B)[:, None]
    r_inside = r < R
    mid_at = b[:, None] * R + r[None, :]
    mid_mask = b_inside & r_inside[None, :]
    dtype = up_ptr.dtype.element_ty
    again: tl.constexpr = grad_x0_ptr is not None or (
        ACTIVATION != 0 and output_ptr is None
    )  # the sum is needed
    if again:
        mid = tl.load(mid_ptr + mid_at, mask=mid_mask, other=0.0).to(tl.float32)
        mid = cast(tl.where(mid_mask, activate(mid, MID_ACTIVATION), 0.0), dtype)
    grad_mid = tl.zeros((BLOCK_B, BLOCK_R), dtype=tl.float32)
    for o0 in range(0, O, BLOCK_O):
        o = o0 + tl.arange(0, BLOCK_O)
        o_inside = o < O
        at = b[:, None] * O + o[None, :]
        mask = b_inside & o_inside[None, :]
        grad = tl.load(grad_output_ptr + at, mask=mask, other=0.0)
        up = tl.load(
            up_ptr + o[:, None].to(tl.int64) * R + r[None, :],
            mask=o_inside[:, None] & r_inside[None, :],
            other=0.0,
        )
        if again:
            sums = dot(mid, tl.trans(up), tl.zeros((BLOCK_B, BLOCK_O), dtype=tl.float32))
            if bias_ptr is not None:
                sums += tl.load(bias_ptr + o, mask=o_inside, other=0.0).to(tl.float32)[None, :]
        if x0_ptr is not None:
            grad = grad.to(tl.float32)
            if grad_x0_ptr is not None:
                grad_x0 = cast(grad * sums, grad_x0_ptr.dtype.element_ty)
                tl.store(grad_x0_ptr + at, grad_x0, mask=mask)
            grad = cast(grad * tl.load(x0_ptr + at, mask=mask, other=0.0).to(tl.float32), dtype)
        elif output_ptr is not None:
            y = tl.load(output_ptr + at, mask=mask, other=0.0).to(tl.float32)
            grad = cast(grad.to(tl.float32) * slope_of_output(y, ACTIVATION), dtype)
        elif ACTIVATION != 0:
            grad = cast(tl.where(mask, grad.to(tl.float32) * slope(sums, ACTIVATION), 0.0), dtype)
        grad_mid = dot(grad, up, grad_mid)
    if MID_ACTIVATION != 0:
        before = tl.load(mid_ptr + mid_at, mask=mid_mask, other=0.0).to(tl.float32)
        grad_mid = grad_mid * slope(before, MID_ACTIVATION)
    grad_mid = cast(tl.where(mid_mask, grad_mid, 0.0), dtype)
    tl.store(grad_mid_ptr + mid_at, grad_mid, mask=mid_mask)
    if grad_input_ptr is not None:
        for i0 in range(0, I, BLOCK_I):
            i = i0 + tl.arange(0, BLOCK_I)
            i_inside = i < I
            down = tl.load(
                down_ptr + r[:, None].to(tl.int64) * I + i[None, :],
                mask=r_inside[:, None] & i_inside[None, :],
                other=0.0,
            )
            grad_input = dot(grad_mid, down, tl.zeros((BLOCK_B, BLOCK_I), dtype=tl.float32))
            at = b[:, None] * I + i[None, :]
            mask = b_inside & i_inside[None, :]
            if x0_ptr is not None:
                grad_input += tl.load(grad_output_ptr + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(grad_input_ptr + at, cast(grad_input, grad_input_ptr.dtype.element_ty), mask=mask)


def _forward(
    input: Tensor,
    down: Tensor,
    up: Tensor,
    mid_bias: Tensor | None,
    bias: Tensor | None,
    x0: Tensor | None,
    mid_activation: int,
    activation: int,
    keep_mid: bool,
) -> tuple[Tensor, Tensor]:
    """Linear, or cross where x0 is given."""
    input, down, up = input.contiguous(), down.contiguous(), up.contiguous()
    mid_bias = None if mid_bias is None else mid_bias.contiguous()
    bias = None if bias is None else bias.contiguous()
    (B, I), (O, R) = input.shape, up.shape
    output = input.new_empty(B, O)
    on_chip = _on_chip(B, I, R, O)
    mid = input.new_empty(B if keep_mid or not on_chip else 0, R)
    if on_chip:
        config = _config(B, R, input)
        launch(
            _forward_kernel,
            (triton.cdiv(B, config["BLOCK_B"]),),
            *(input, down, up, mid_bias, bias, x0, mid if keep_mid else None, output, B, I, R, O),
            MID_ACTIVATION=mid_activation,
            ACTIVATION=activation,
            BLOCK_R=_block_r(R),
            **config,
        )
        return output, mid
    linear(input, down, mid, mid_bias)
    load = tiled.ACTIVATED.value if mid_activation else tiled.PLAIN.value
    options = {"load": load, "load_activation": mid_activation, "activation": activation}
    if x0 is not None:
        options |= {"finish": tiled.CROSS.value, "e": x0, "f": input}
    linear(mid, up, output, bias, **options)
    return output, mid if keep_mid else mid.new_empty(0, R)


@launcher
def low_rank_linear(
    input: Tensor,
    down: Tensor,
    up: Tensor,
    mid_bias: Tensor | None,
    bias: Tensor | None,
    mid_activation: int,
    activation: int,
    keep_mid: bool,
) -> tuple[Tensor, Tensor]:
    return _forward(input, down, up, mid_bias, bias, None, mid_activation, activation, keep_mid)


@launcher
def low_rank_cross(
    x0: Tensor, x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, keep_mid: bool
) -> tuple[Tensor, Tensor]:
    return _forward(x, down, up, None, bias, x0.contiguous(), 0, 0, keep_mid)


def _grad_rows(
    grad_output: Tensor,
    output: Tensor | None,
    x0: Tensor | None,
    down: Tensor,
    up: Tensor,
    mid: Tensor,
    bias: Tensor | None,
    mid_activation: int,
    activation: int,
    grad_x0: Tensor | None,
    grad_input: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Writes grad_x0 and grad_input where given; returns grad_mid, and grad_sum if it was made."""
    (B, O), (R, I) = grad_output.shape, down.shape
    grad_mid = torch.empty_like(mid)
    if _on_chip(B, I, R, O):
        config = _config(B, R, mid)
        launch(
            _backward_kernel,
            (triton.cdiv(B, config["BLOCK_B"]),),
            *(grad_output, output, x0, down, up, mid, bias, grad_x0, grad_mid, grad_input, B, I, R, O),
            MID_ACTIVATION=mid_activation,
            ACTIVATION=activation,
            BLOCK_R=_block_r(R),
            **config,
        )
        return grad_mid, None
    load = tiled.ACTIVATED.value if mid_activation else tiled.PLAIN.value
    active = {"load": load, "load_activation": mid_activation}
    grad_sum, load, factor = grad_output, tiled.PLAIN.value, None
    if x0 is not None:
        load, factor = tiled.TIMES.value, x0
        if grad_x0 is not None:
            linear(mid, up, grad_x0, bias, finish=tiled.PRODUCT.value, e=grad_output)
    elif output is not None:
        load, factor = tiled.SLOPE_OF_OUTPUT.value, output
    elif activation:
        grad_sum = torch.empty_like(grad_output)
        options = {"finish": tiled.GRAD_SUM.value, "e": grad_output, "activation": activation}
        linear(mid, up, grad_sum, bias, **active, **options)
    options = {"load": load, "factor": factor, "load_activation": activation}
    if mid_activation:
        options |= {"finish": tiled.TIMES_SLOPE.value, "e": mid, "activation": mid_activation}
    linear(grad_sum, up.t(), grad_mid, **options)
    if grad_input is not None:
        options = {} if x0 is None else {"finish": tiled.PLUS.value, "e": grad_output}
        linear(grad_mid, down.t(), grad_input, **options)
    return grad_mid, grad_sum if grad_sum is not grad_output else None


def _grads(
    grad_output: Tensor,
    input: Tensor,
    down: Tensor,
    up: Tensor,
    mid: Tensor,
    bias: Tensor | None,
    output: Tensor | None,
    x0: Tensor | None,
    mid_activation: int,
    activation: int,
    needs: int,
) -> dict[int, Tensor]:
    """The gradients by their bit of ``needs``."""
    grad_output, input, mid = grad_output.contiguous(), input.contiguous(), mid.contiguous()
    down, up = down.contiguous(), up.contiguous()
    bias = None if bias is None else bias.contiguous()
    output = None if output is None or activation == 0 else output.contiguous()
    shapes = {
        NEEDS_INPUT: input.shape,
        NEEDS_DOWN: down.shape,
        NEEDS_UP: up.shape,
        NEEDS_MID_BIAS: down.shape[:1],
        NEEDS_BIAS: up.shape[:1],
        NEEDS_X0: input.shape,
    }
    grads = {bit: input.new_empty(shape if needs & bit else 0) for bit, shape in shapes.items()}
    grad_sum = None
    if needs & (NEEDS_INPUT | NEEDS_DOWN | NEEDS_MID_BIAS | NEEDS_X0) or not _on_chip(
        input.shape[0], input.shape[1], *up.shape[::-1]
    ):
        grad_mid, grad_sum = _grad_rows(
            *(grad_output, output, x0, down, up, mid, bias, mid_activation, activation),
            grads[NEEDS_X0] if needs & NEEDS_X0 else None,
            grads[NEEDS_INPUT] if needs & NEEDS_INPUT else None,
        )
    if needs & NEEDS_DOWN:
        weight_grad(input, grad_mid, grads[NEEDS_DOWN], transposed=True)
    if needs & NEEDS_MID_BIAS:
        grads[NEEDS_MID_BIAS] = grad_mid.sum(0)
    if needs & (NEEDS_UP | NEEDS_BIAS):
        options = {"q_activation": mid_activation, "activation": activation}
        if grad_sum is not None:
            pass
        elif x0 is not None:
            options |= {"load": tiled.TIMES.value, "factor": x0}
        elif output is not None:
            options |= {"load": tiled.SLOPE_OF_OUTPUT.value, "factor": output}
        elif activation:
            options |= {"load": tiled.SLOPE_OF_SUM.value, "w": up, "bias": bias}
        grad_up = grads[NEEDS_UP] if needs & NEEDS_UP else torch.empty_like(up)
        grad_bias = grads[NEEDS_BIAS] if needs & NEEDS_BIAS else None
        weight_grad(grad_output if grad_sum is None else grad_sum, mid, grad_up, grad_bias, **options)
    return grads


@launcher
def low_rank_linear_grad(
    grad_output: Tensor,
    input: Tensor,
    down: Tensor,
    up: Tensor,
    mid: Tensor,
    bias: Tensor | None,
    output: Tensor | None,
    mid_activation: int,
    activation: int,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    codes = mid_activation, activation
    grads = _grads(grad_output, input, down, up, mid, bias, output, None, *codes, needs)
    return tuple(grads[bit] for bit in (NEEDS_INPUT, NEEDS_DOWN, NEEDS_UP, NEEDS_MID_BIAS, NEEDS_BIAS))


@launcher
def low_rank_cross_grad(
    grad_output: Tensor,
    x0: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    mid: Tensor,
    bias: Tensor | None,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = _grads(grad_output, x, down, up, mid, bias, None, x0.contiguous(), 0, 0, needs)
    return tuple(grads[bit] for bit in (NEEDS_X0, NEEDS_INPUT, NEEDS_DOWN, NEEDS_UP, NEEDS_BIAS))


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that between them launch every kernel and configuration of this file and of _linear."""
    shapes = {  # B, I, R, O
        "rank 64": (16384, 400, 64, 400),
        "rank 16, few rows": (4096, 429, 13, 429),
        "rank 128": (16384, 3456, 128, 3456),
        "rank 320": (4096, 2000, 320, 2000),
        "rank 320, split": (64, 4096, 320, 4096),
    }
    for dtype in (torch.bfloat16, torch.float32):
        for name, (B, I, R, O) in shapes.items():

            def empty(*shape, dtype=dtype):
                return torch.empty(shape, dtype=dtype, device="meta")

            x, down, up, mid = empty(B, I), empty(R, I), empty(O, R), empty(B, R)
            y, mid_bias, bias = empty(B, O), empty(R), empty(O)
            label = f"{name}, {str(dtype).removeprefix('torch.')}"
            for code, mid_code in ((0, 0), (1, 1), (2, 2)):
                codes = mid_code, code
                kept = y if code in (1, 5) else None
                yield (
                    f"linear {codes}, {label}",
                    partial(low_rank_linear, x, down, up, mid_bias, bias, *codes, True),
                )
                args = (y, x, down, up, mid, bias, kept, *codes, 31)
                yield f"linear grad {codes}, {label}", partial(low_rank_linear_grad, *args)
            if I == O:
                yield f"cross, {label}", partial(low_rank_cross, x, x, down, up, bias, True)
                yield f"cross grad, {label}", partial(low_rank_cross_grad, y, x, x, down, up, mid, bias, 63)
