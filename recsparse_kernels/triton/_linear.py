"""Tiled products that the low-rank launchers are made of when a kernel of their own does not fit.

linear:       out[m, n] = finish(sum_k load(a)[m, k] * w[n, k] + bias[n])     a [M, K]  w [N, K]  out [M, N]
weight grad:  out[n, r] = sum_b load(p)[b, n] * act(q)[b, r]                  p [B, N]  q [B, R]
              sums[n] = sum_b scale[b] * load(p)[b, n]

Weights come with strides, so that their transpose is no copy.
"""

import triton
import triton.language as tl
from torch import Tensor

from ._activation import activate, slope, slope_of_output
from ._configs import Configs
from ._device import device_function
from ._launch import NO_SPILL, launch
from ._partials import empty_parts, split_rows, sum_partials
from ._precision import cast, dot

# What is done to a (or p) as it is loaded ...
PLAIN = tl.constexpr(0)
ACTIVATED = tl.constexpr(1)  # act(a)
SLOPE_OF_OUTPUT = tl.constexpr(2)  # a * slope at the output `factor`
TIMES = tl.constexpr(3)  # a * factor
SLOPE_OF_SUM = tl.constexpr(4)  # p * slope at the sum act(q) w^T + bias, computed again
# ... and to the sum at the end, with e and f of the shape of the output
SUM = tl.constexpr(0)  # act(sum)
CROSS = tl.constexpr(1)  # e * sum + f
GRAD_SUM = tl.constexpr(2)  # e * slope(sum)
TIMES_SLOPE = tl.constexpr(3)  # sum * slope(e)
PRODUCT = tl.constexpr(4)  # e * sum
PLUS = tl.constexpr(5)  # sum + e

LINEAR_CONFIGS = Configs(
    "linear",
    {
        "few rows": dict(BLOCK_M=16, BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=4),
        "many rows": dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3),
        "few rows, float32": dict(BLOCK_M=16, BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=2),
        "many rows, float32": dict(BLOCK_M=64, BLOCK_N=32, BLOCK_K=32, num_warps=8, num_stages=2),
    },
    others={
        "few rows": {"long": dict(BLOCK_M=16, BLOCK_N=32, BLOCK_K=128, num_warps=4, num_stages=3)},
        "many rows": {"narrow": dict(BLOCK_M=128, BLOCK_N=64, BLOCK_K=64, num_warps=8, num_stages=3)},
    },
)
WEIGHT_GRAD_CONFIGS = Configs(
    "weight_grad",
    {
        "rank 64": dict(BLOCK_N=64, BLOCK_B=64, num_warps=4, num_stages=3),
        "rank 64, p or q changed": dict(BLOCK_N=64, BLOCK_B=32, num_warps=4, num_stages=3),
        "rank 128": dict(BLOCK_N=64, BLOCK_B=64, num_warps=8, num_stages=3),
        "rank 64, float32": dict(BLOCK_N=32, BLOCK_B=16, num_warps=4, num_stages=2),
        "rank 128, float32": dict(BLOCK_N=32, BLOCK_B=16, num_warps=4, num_stages=2),
    },
)
WEIGHT_GRAD_RANK = 128  # columns of q that a program of the weight gradient takes, at most


@device_function
def load_factored(
    ptr, factor_ptr, at, mask, LOAD: tl.constexpr, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr
):
    """One tile of a (or p): changed as LOAD says, in DTYPE."""
    tile = tl.load(ptr + at, mask=mask, other=0.0)
    if LOAD == ACTIVATED:  # some activations are not 0 at 0
        tile = cast(tl.where(mask, activate(tile.to(tl.float32), ACTIVATION), 0.0), DTYPE)
    elif LOAD != PLAIN:
        factor = tl.load(factor_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if LOAD == SLOPE_OF_OUTPUT:
            factor = slope_of_output(factor, ACTIVATION)
        tile = cast(tile.to(tl.float32) * factor, DTYPE)
    return tile


@triton.jit
def _linear_kernel(
    a_ptr,  # [M, K]
    factor_ptr,  # [M, K] or None
    w_ptr,  # [N, K] by its strides
    bias_ptr,  # [N] or None
    e_ptr,  # [M, N] or None
    f_ptr,  # [M, N] or None
    bias_scale_ptr,  # [M] float32 or None: how often each row takes the bias
    row_mask_ptr,  # [M] bool or None: rows of zeros where False
    out_ptr,  # [M, N], or [S, M, N] float32 parts
    M,
    N,
    K,
    stride_wn,
    stride_wk,
    k_each,  # columns of K that a part sums
    LOAD: tl.constexpr,
    LOAD_ACTIVATION: tl.constexpr,
    FINISH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # one program: BLOCK_M x BLOCK_N outputs, over one part of K
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2).to(tl.int64)
    m_inside = m < M
    n_inside = n < N
    dtype = a_ptr.dtype.element_ty
    a_inside = m_inside
    if row_mask_ptr is not None:
        a_inside = m_inside & (tl.load(row_mask_ptr + m, mask=m_inside, other=0) != 0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    end = tl.minimum((part + 1) * k_each, K)
    for k0 in range(part * k_each, end, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        k_inside = k < end
        a_mask = a_inside[:, None] & k_inside[None, :]
        a = load_factored(
            a_ptr, factor_ptr, m[:, None] * K + k[None, :], a_mask, LOAD, LOAD_ACTIVATION, dtype
        )
        w = tl.load(
            w_ptr + n[None, :] * stride_wn + k[:, None] * stride_wk,
            mask=n_inside[None, :] & k_inside[:, None],
            other=0.0,
        )
        acc = dot(a, w, acc)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + n, mask=n_inside, other=0.0).to(tl.float32)[None, :]
        if bias_scale_ptr is not None:
            bias = bias * tl.load(bias_scale_ptr + m, mask=m_inside, other=0.0)[:, None]
        acc += bias
    at = (part * M + m)[:, None] * N + n[None, :]
    mask = m_inside[:, None] & n_inside[None, :]
    if FINISH == SUM:
        acc = activate(acc, ACTIVATION)
    else:
        e = tl.load(e_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if FINISH == CROSS:
            acc = e * acc + tl.load(f_ptr + at, mask=mask, other=0.0).to(tl.float32)
        elif FINISH == GRAD_SUM:
            acc = e * slope(acc, ACTIVATION)
        elif FINISH == TIMES_SLOPE:
            acc = acc * slope(e, ACTIVATION)
        elif FINISH == PRODUCT:
            acc = e * acc
        else:
            acc = acc + e
    tl.store(out_ptr + at, cast(acc, out_ptr.dtype.element_ty), mask=mask)


def linear(
    a: Tensor,
    w: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    *,
    load: int = PLAIN.value,
    factor: Tensor | None = None,
    load_activation: int = 0,
    finish: int = SUM.value,
    e: Tensor | None = None,
    f: Tensor | None = None,
    activation: int = 0,
    bias_scale: Tensor | None = None,
    row_mask: Tensor | None = None,
) -> Tensor:
    """``out`` [M, N], written; ``w`` [N, K] with any strides."""
    (M, K), N = a.shape, w.shape[0]
    name = "few rows" if M <= 64 else "many rows"
    config = LINEAR_CONFIGS[name + ", float32" * (a.element_size() == 4)]
    tiles_m, tiles_n = triton.cdiv(M, config["BLOCK_M"]), triton.cdiv(N, config["BLOCK_N"])
    # parts are worth their second launch where the output alone cannot fill the GPU
    splittable = bias_scale is None and (
        finish == TIMES_SLOPE.value or (finish == SUM.value and activation == 0)
    )
    wanted = K // (8 * config["BLOCK_K"]) if splittable and tiles_m * tiles_n < 64 else 1
    parts, each = split_rows(K, tiles_m * tiles_n, config["BLOCK_K"], max(1, min(8, wanted)))
    target = empty_parts(parts, out)
    whole = parts == 1
    launch(
        _linear_kernel,
        (tiles_m, tiles_n, parts),
        *(a, factor, w, bias if whole else None, e if whole else None, f, bias_scale),
        *(row_mask, target),
        *(M, N, K, w.stride(0), w.stride(1), each),
        LOAD=load,
        LOAD_ACTIVATION=load_activation,
        FINISH=finish if whole else SUM.value,
        ACTIVATION=activation if whole else 0,
        **config,
    )
    if not whole:
        sum_partials(target, out, bias, e, activation)
    return out


@triton.jit
def _weight_grad_kernel(
    p_ptr,  # [B, N]
    factor_ptr,  # [B, N] or None
    q_ptr,  # [B, R]
    w_ptr,  # [N, R] or None: to compute the sum again
    bias_ptr,  # [N] or None: likewise
    scale_ptr,  # [B] float32 or None: weight of each row in the sums
    row_mask_ptr,  # [B] bool or None: rows of p that count
    out_ptr,  # [N, R] by its strides, or as many float32 parts
    sums_ptr,  # [N] or [S, N] float32, or None
    B,
    N,
    R,
    stride_n,
    stride_r,
    b_each,  # rows that a part sums
    LOAD: tl.constexpr,
    Q_ACTIVATION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    # one program: BLOCK_N x BLOCK_R of the gradient, over one part of the rows
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    part = tl.program_id(2).to(tl.int64)
    n_inside = n < N
    r_inside = r < R
    dtype = q_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    sums = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if LOAD == SLOPE_OF_SUM:
        w_mask = n_inside[None, :] & r_inside[:, None]
        w = tl.load(w_ptr + n[None, :] * R + r[:, None], mask=w_mask, other=0.0)
        bias = tl.zeros((BLOCK_N,), dtype=tl.float32)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + n, mask=n_inside, other=0.0).to(tl.float32)
    end = tl.minimum((part + 1) * b_each, B)
    for b0 in range(part * b_each, end, BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B)
        b_inside = b < end
        q_mask = b_inside[:, None] & r_inside[None, :]
        if Q_ACTIVATION == 0:
            q = tl.load(q_ptr + b[:, None] * R + r[None, :], mask=q_mask, other=0.0)
        else:
            q = load_factored(
                q_ptr, None, b[:, None] * R + r[None, :], q_mask, ACTIVATED, Q_ACTIVATION, dtype
            )
        if row_mask_ptr is not None:
            b_inside = b_inside & (tl.load(row_mask_ptr + b, mask=b_inside, other=0) != 0)
        at = b[:, None] * N + n[None, :]
        mask = b_inside[:, None] & n_inside[None, :]
        if LOAD == SLOPE_OF_SUM:
            again = dot(q, w, tl.zeros((BLOCK_B, BLOCK_N), dtype=tl.float32)) + bias[None, :]
            p = tl.load(p_ptr + at, mask=mask, other=0.0).to(tl.float32) * slope(again, ACTIVATION)
            p = cast(tl.where(mask, p, 0.0), dtype)
        else:
            p = load_factored(p_ptr, factor_ptr, at, mask, LOAD, ACTIVATION, dtype)
        acc = dot(tl.trans(p), q, acc)
        if sums_ptr is not None:
            weighted = p.to(tl.float32)
            if scale_ptr is not None:
                scale = tl.load(scale_ptr + b, mask=b_inside, other=0.0)
                weighted = weighted * scale[:, None]
            sums += tl.sum(weighted, axis=0)
    out_at = part * N * R + n[:, None] * stride_n + r.to(tl.int64)[None, :] * stride_r
    out_mask = n_inside[:, None] & r_inside[None, :]
    tl.store(out_ptr + out_at, cast(acc, out_ptr.dtype.element_ty), mask=out_mask)
    if sums_ptr is not None:
        if tl.program_id(1) == 0:
            tl.store(sums_ptr + part * N + n, cast(sums, sums_ptr.dtype.element_ty), mask=n_inside)


def weight_grad(
    p: Tensor,
    q: Tensor,
    out: Tensor,
    sums: Tensor | None = None,
    *,
    transposed: bool = False,
    load: int = PLAIN.value,
    factor: Tensor | None = None,
    activation: int = 0,
    q_activation: int = 0,
    w: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    row_mask: Tensor | None = None,
) -> None:
    """Writes ``out`` [N, R] ([R, N] if ``transposed``) and, if given, ``sums`` [N].

    With SLOPE_OF_SUM, R is at most WEIGHT_GRAD_RANK: a program holds whole rows of ``w``.
    """
    (B, N), R = p.shape, q.shape[1]
    name = "rank 64" if R <= 64 else "rank 128"
    if p.element_size() == 4:
        name += ", float32"
    elif R <= 64 and (load != PLAIN.value or q_activation):
        name += ", p or q changed"
    config = WEIGHT_GRAD_CONFIGS[name]
    block_r = min(WEIGHT_GRAD_RANK, max(16, triton.next_power_of_2(R)))
    tiles_n, tiles_r = triton.cdiv(N, config["BLOCK_N"]), max(1, triton.cdiv(R, block_r))
    # parts take [S, N, R] float32: no more than p, [B, N], does
    parts, each = split_rows(B, tiles_n * tiles_r, config["BLOCK_B"], max(1, B // max(R, 1)))
    out_parts = empty_parts(parts, out)
    sums_parts = None if sums is None else empty_parts(parts, sums)
    launch(
        _weight_grad_kernel,
        (tiles_n, tiles_r, parts),
        *(p, factor, q, w, bias, scale, row_mask, out_parts, sums_parts),
        *(B, N, R, 1 if transposed else R, N if transposed else 1, each),
        LOAD=load,
        Q_ACTIVATION=q_activation,
        ACTIVATION=activation,
        BLOCK_R=block_r,
        **config,
        **NO_SPILL,
    )
    if parts > 1:
        sum_partials(out_parts, out)
        if sums is not None:
            sum_partials(sums_parts, sums)
