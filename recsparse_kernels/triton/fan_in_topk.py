"""Best labels, and scores of given labels, of fixed fan-in layers on Triton.

Top-k without the [B, O] logits: of each tile of labels and each row only the best logit is kept. The k best
tiles of a row hold its k best labels, since each of those is beaten by fewer than k others, and so is its
tile; the logits of these tiles are computed again. Logits compare as int64 keys

    value in an order that integers have (32 bits), 2^32 - 1 - label (32 bits)

all different, so that equal logits come lowest label first, and any way of selecting gives the same.
"""

from functools import partial
from typing import Tuple  # noqa: UP035  (read by torch.library.infer_schema)

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import device_function
from ._launch import checked_indices, launch, launcher
from ._precision import cast
from .fan_in_cases import layers
from .fan_in_tiles import Tiles, logits_tile, tile_labels

MAX_KEYS = 2**23  # of one step, 8 bytes each
CANDIDATE_CONFIGS = {  # by labels of a tile
    "up to 64": dict(BLOCK_F=32, num_warps=4, num_stages=1),
    "more": dict(BLOCK_F=16, num_warps=8, num_stages=1),
}
SCORE_CONFIG = dict(BLOCK_C=64, BLOCK_F=32, num_warps=4, num_stages=1)
# By input: all entries of the row's candidates are compared with BLOCK_I inputs.
SCORE_INPUT_CONFIG = dict(BLOCK_E=64, BLOCK_I=128, num_warps=4, num_stages=1)
SCORE_WEIGHT_CONFIG = dict(BLOCK_O=16, BLOCK_F=32, num_warps=4, num_stages=1)


@device_function
def _order(z, inside):
    """int32 in the order of the logits, NaN above all; the least, which no logit has, where not ``inside``."""
    bits = tl.where(z == 0, 0.0, z).to(tl.int32, bitcast=True)  # -0 equals 0
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    bits = tl.where(z != z, 0x7FFFFFFF, bits)
    return tl.where(inside, bits, -0x80000000)


@device_function
def _keys(order, label):
    """int64: order of the logits, then labels downwards."""
    return (order.to(tl.int64) << 32) | (0xFFFFFFFF - label)


def _from_keys(keys: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits and labels."""
    bits = (keys >> 32).to(torch.int32)
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return bits.view(torch.float32).to(dtype), 0xFFFFFFFF - (keys & 0xFFFFFFFF)


@triton.jit(do_not_specialize=["first_tile", "first_column", "columns"])
def _best_of_tiles_kernel(
    input_ptr,  # [I, B]
    weight_ptr,  # [O, F]
    indices_ptr,  # [ceil(O / G), F]
    bias_ptr,  # [O]
    keys_ptr,  # [B, columns] int64: one column for each tile, from ``first_column``
    first_tile, first_column, columns,
    B, I, O, F, G, tiles_of_group,
    BLOCK_O: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_F: tl.constexpr, UNROLL: tl.constexpr,
    GROUPED: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    # one program: one tile of labels x BLOCK_B rows
    across = tl.cdiv(B, BLOCK_B)
    pid = tl.program_id(0)
    b = (pid % across) * BLOCK_B + tl.arange(0, BLOCK_B)
    z, label, inside = logits_tile(
        input_ptr, weight_ptr, indices_ptr, bias_ptr, first_tile + (pid // across).to(tl.int64), b,
        B, I, O, F, G, tiles_of_group, BLOCK_O, BLOCK_B, BLOCK_F, UNROLL, GROUPED, HAS_BIAS,
    )  # fmt: skip
    # in two steps of 32 bits each: keys of the whole tile would take four registers an element
    order = _order(z, inside[:, None])
    best = tl.max(order, axis=0)
    lane = tl.min(tl.where(order == best[None, :], tl.arange(0, BLOCK_O)[:, None], BLOCK_O), axis=0)
    keys = _keys(best, tl.min(label, axis=0) + lane)
    tl.store(keys_ptr + b.to(tl.int64) * columns + first_column + pid // across, keys, mask=b < B)


@device_function
def _score_labels(
    input_ptr,  # the row of the input, [I]
    weight_ptr, indices_ptr, bias_ptr,
    label, inside,  # [BLOCK_C]
    I, F, G,
    BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Logits of one row: [BLOCK_C] float32."""
    acc = tl.zeros((BLOCK_C, BLOCK_F), dtype=tl.float32)
    for f0 in range(0, F, BLOCK_F):
        f = f0 + tl.arange(0, BLOCK_F)
        mask = inside[:, None] & (f < F)[None, :]
        col = tl.load(indices_ptr + (label // G * F)[:, None] + f[None, :], mask=mask, other=-1)
        w = tl.load(weight_ptr + (label * F)[:, None] + f[None, :], mask=mask, other=0.0)
        x = tl.load(input_ptr + col, mask=(col >= 0) & (col < I), other=0.0)
        acc += w.to(tl.float32) * x.to(tl.float32)
    z = tl.sum(acc, axis=1)
    if HAS_BIAS:
        z += tl.load(bias_ptr + label, mask=inside, other=0.0).to(tl.float32)
    return z


@triton.jit
def _candidate_tiles_kernel(
    input_ptr,  # [rows, I]
    weight_ptr,  # [O, F]
    indices_ptr,  # [ceil(O / G), F]
    bias_ptr,  # [O]
    tiles_ptr,  # [rows, T] int64
    keys_ptr,  # [rows, T, BLOCK_O] int64
    T, I, O, F, G, tiles_of_group,
    BLOCK_O: tl.constexpr, BLOCK_F: tl.constexpr, GROUPED: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    # one program: the labels of one tile of one row
    pid = tl.program_id(0).to(tl.int64)
    tile = tl.load(tiles_ptr + pid)
    label, inside = tile_labels(tile, O, G, tiles_of_group, GROUPED, BLOCK_O)
    z = _score_labels(
        input_ptr + pid // T * I, weight_ptr, indices_ptr, bias_ptr, label, inside, I, F, G,
        BLOCK_O, BLOCK_F, HAS_BIAS,
    )  # fmt: skip
    tl.store(keys_ptr + pid * BLOCK_O + tl.arange(0, BLOCK_O), _keys(_order(z, inside), label))


@launcher
def fan_in_topk(
    input: Tensor, weight: Tensor, indices: Tensor, bias: Tensor | None, k: int, group_size: int
) -> Tuple[Tensor, Tensor]:  # noqa: UP006
    indices = checked_indices("indices", indices, input.shape[1]).contiguous()
    input, weight = input.contiguous(), weight.contiguous()
    bias_or_any = weight if bias is None else bias.contiguous()
    tiles = Tiles(*input.shape, *weight.shape, group_size)
    if k == 0 or tiles.batch == 0:
        return input.new_empty(tiles.batch, k), input.new_empty(tiles.batch, k, dtype=torch.int64)
    x = input.t().contiguous()
    options = tiles.options(weight, bias)
    wanted = min(k, tiles.count)
    step = max(1, MAX_KEYS // tiles.batch)  # tiles looked at between two selections
    best = x.new_empty((tiles.batch, 0), dtype=torch.int64)
    for first in range(0, tiles.count, step):
        count, kept = min(step, tiles.count - first), best.shape[1]
        keys = best.new_empty(tiles.batch, kept + count)
        keys[:, :kept] = best
        launch(
            _best_of_tiles_kernel,
            (count * tiles.across,),
            x, weight, indices, bias_or_any, keys, first, kept, kept + count, *tiles.sizes,
            **options,
        )  # fmt: skip
        best = keys.topk(min(wanted, kept + count), dim=1, sorted=False).values
    chosen = tiles.tile_of(0xFFFFFFFF - (best & 0xFFFFFFFF))
    rows = max(1, MAX_KEYS // (wanted * tiles.block))
    config = CANDIDATE_CONFIGS["up to 64" if tiles.block <= 64 else "more"]
    result = best.new_empty(tiles.batch, k)
    for begin in range(0, tiles.batch, rows):
        some = chosen[begin : begin + rows]
        keys = best.new_empty(some.shape[0], wanted * tiles.block)
        launch(
            _candidate_tiles_kernel,
            (some.numel(),),
            input[begin : begin + rows], weight, indices, bias_or_any, some, keys, wanted, *tiles.sizes[1:],
            BLOCK_O=tiles.block, GROUPED=tiles.grouped, HAS_BIAS=bias is not None, **config,
        )  # fmt: skip
        result[begin : begin + rows] = keys.topk(k, dim=1).values
    return _from_keys(result, input.dtype)


# ---- scores of given labels ----


@triton.jit
def _score_kernel(
    input_ptr,  # [B, I]
    weight_ptr,  # [O, F]
    indices_ptr,  # [ceil(O / G), F]
    bias_ptr,  # [O]
    candidates_ptr,  # [B, C]
    output_ptr,  # [B, C]
    C, I, O, F, G,
    BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    # one program: BLOCK_C candidates of one row
    steps = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    row = (pid // steps).to(tl.int64)
    c = pid % steps * BLOCK_C + tl.arange(0, BLOCK_C)
    label = tl.load(candidates_ptr + row * C + c, mask=c < C, other=-1).to(tl.int64)
    inside = (label >= 0) & (label < O)
    z = _score_labels(
        input_ptr + row * I, weight_ptr, indices_ptr, bias_ptr, label, inside, I, F, G,
        BLOCK_C, BLOCK_F, HAS_BIAS,
    )  # fmt: skip
    tl.store(output_ptr + row * C + c, cast(z, output_ptr.dtype.element_ty), mask=c < C)


@triton.jit
def _score_grad_input_kernel(
    grad_ptr,  # [B, C]
    weight_ptr,  # [O, F]
    indices_ptr,  # [ceil(O / G), F]
    candidates_ptr,  # [B, C]
    grad_input_ptr,  # [B, I]
    C, I, O, F, G,
    BLOCK_E: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    # one program: BLOCK_I inputs of one row, each summing the entries that read it, in order
    steps = tl.cdiv(I, BLOCK_I)
    pid = tl.program_id(0)
    row = (pid // steps).to(tl.int64)
    i = pid % steps * BLOCK_I + tl.arange(0, BLOCK_I)
    acc = tl.zeros((BLOCK_I,), dtype=tl.float32)
    for e0 in range(0, C * F, BLOCK_E):
        e = e0 + tl.arange(0, BLOCK_E)
        c = e // F
        label = tl.load(candidates_ptr + row * C + c, mask=c < C, other=-1).to(tl.int64)
        live = (label >= 0) & (label < O)
        g = tl.load(grad_ptr + row * C + c, mask=live, other=0.0).to(tl.float32)
        w = tl.load(weight_ptr + label * F + e % F, mask=live, other=0.0).to(tl.float32)
        col = tl.load(indices_ptr + label // G * F + e % F, mask=live, other=-1)
        acc += tl.sum(tl.where(col[:, None] == i[None, :], (g * w)[:, None], 0.0), axis=0)
    tl.store(grad_input_ptr + row * I + i, cast(acc, grad_input_ptr.dtype.element_ty), mask=i < I)


@triton.jit
def _score_grad_weight_kernel(
    grad_ptr,  # [B, C]
    input_ptr,  # [B, I]
    indices_ptr,  # [ceil(O / G), F]
    order_ptr,  # [B * C] int64: places in ``grad``, sorted by label
    starts_ptr,  # [O + 1] int64
    grad_weight_ptr,  # [O, F]
    C, I, O, F, G,
    BLOCK_O: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    # one program: BLOCK_O labels x BLOCK_F inputs, each summing the places that ask for the label
    steps = tl.cdiv(F, BLOCK_F)
    pid = tl.program_id(0)
    f = pid % steps * BLOCK_F + tl.arange(0, BLOCK_F)
    label = (pid // steps).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    begin = tl.load(starts_ptr + label, mask=label < O, other=0)
    count = tl.load(starts_ptr + label + 1, mask=label < O, other=0) - begin
    mask = (label < O)[:, None] & (f < F)[None, :]
    col = tl.load(indices_ptr + (label // G * F)[:, None] + f[None, :], mask=mask, other=-1)
    acc = tl.zeros((BLOCK_O, BLOCK_F), dtype=tl.float32)
    for j in range(0, tl.max(count, axis=0)):
        place = tl.load(order_ptr + begin + j, mask=count > j, other=0)
        g = tl.load(grad_ptr + place, mask=count > j, other=0.0).to(tl.float32)
        live = (count > j)[:, None] & (col >= 0) & (col < I)
        x = tl.load(input_ptr + (place // C * I)[:, None] + col, mask=live, other=0.0)
        acc += g[:, None] * x.to(tl.float32)
    where = grad_weight_ptr + label[:, None] * F + f[None, :]
    tl.store(where, cast(acc, grad_weight_ptr.dtype.element_ty), mask=mask)


@launcher
def fan_in_score(
    input: Tensor,
    weight: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    candidates: Tensor,
    group_size: int,
) -> Tensor:
    indices = checked_indices("indices", indices, input.shape[1]).contiguous()
    candidates = checked_indices("candidates", candidates, weight.shape[0]).contiguous()
    input, weight = input.contiguous(), weight.contiguous()
    output = input.new_empty(candidates.shape)
    (rows, count), (labels, fan_in) = candidates.shape, weight.shape
    launch(
        _score_kernel,
        (rows * -(-count // SCORE_CONFIG["BLOCK_C"]),),
        input, weight, indices, weight if bias is None else bias.contiguous(), candidates, output,
        count, input.shape[1], labels, fan_in, group_size, HAS_BIAS=bias is not None, **SCORE_CONFIG,
    )  # fmt: skip
    return output


@launcher
def fan_in_score_grad_input(
    grad_output: Tensor,
    weight: Tensor,
    indices: Tensor,
    candidates: Tensor,
    in_features: int,
    group_size: int,
) -> Tensor:
    indices = checked_indices("indices", indices, in_features).contiguous()
    candidates = checked_indices("candidates", candidates, weight.shape[0]).contiguous()
    grad_output, weight = grad_output.contiguous(), weight.contiguous()
    rows, count = candidates.shape
    grad_input = grad_output.new_empty(rows, in_features)
    launch(
        _score_grad_input_kernel,
        (rows * -(-in_features // SCORE_INPUT_CONFIG["BLOCK_I"]),),
        grad_output, weight, indices, candidates, grad_input,
        count, in_features, *weight.shape, group_size, **SCORE_INPUT_CONFIG,
    )  # fmt: skip
    return grad_input


@launcher
def fan_in_score_grad_weight(
    grad_output: Tensor,
    input: Tensor,
    indices: Tensor,
    candidates: Tensor,
    out_features: int,
    group_size: int,
) -> Tensor:
    indices = checked_indices("indices", indices, input.shape[1]).contiguous()
    candidates = checked_indices("candidates", candidates, out_features)
    fan_in = indices.shape[1]
    labels, order = torch.sort(candidates.flatten(), stable=True)
    bounds = torch.arange(out_features + 1, dtype=labels.dtype, device=labels.device)
    grad_weight = input.new_empty(out_features, fan_in)
    config = SCORE_WEIGHT_CONFIG
    launch(
        _score_grad_weight_kernel,
        (-(-out_features // config["BLOCK_O"]) * -(-fan_in // config["BLOCK_F"]),),
        grad_output.contiguous(), input.contiguous(), indices, order,
        torch.searchsorted(labels, bounds), grad_weight,
        candidates.shape[1], input.shape[1], out_features, fan_in, group_size, **config,
    )  # fmt: skip
    return grad_weight


def compile_cases():
    """(name, call) of every kernel and configuration, for `recsparse_kernels.triton.compile`."""
    for name, (x, weight, indices, bias, group) in layers():
        yield f"topk {name}", partial(fan_in_topk, x, weight, indices, bias, 100, group)
    for name, (x, weight, indices, bias, group) in layers(
        [(torch.bfloat16, 1, 256), (torch.float32, 16, 256)]
    ):
        candidates = x.new_empty((x.shape[0], 200), dtype=torch.int64)
        grad = x.new_empty(candidates.shape)
        yield f"score {name}", partial(fan_in_score, x, weight, indices, bias, candidates, group)
        arguments = (grad, weight, indices, candidates, x.shape[1], group)
        yield f"score_grad_input {name}", partial(fan_in_score_grad_input, *arguments)
        arguments = (grad, x, indices, candidates, weight.shape[0], group)
        yield f"score_grad_weight {name}", partial(fan_in_score_grad_weight, *arguments)
