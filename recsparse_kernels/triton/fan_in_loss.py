"""Multi-label loss of fixed fan-in layers on Triton; the logits exist as tiles only.

    z[b, o] as in fan_in.py, t[b, o] = 1 where o is among the labels of row b
    BCE             sum of log(1 + e^z) - t z
    squared hinge   sum of max(0, 1 - (2 t - 1) z)^2

The positives are sorted by tile, so that a tile finds its own. Gradients go chunk by chunk of labels: one
kernel computes the logits again and leaves their gradient, [labels of the chunk, B], for the kernels of
the linear layer.
"""

from functools import partial
from typing import List, Tuple  # noqa: UP035  (read by torch.library.infer_schema)

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import fan_in as reference
from ._device import device_function
from ._launch import checked_indices, launch, launcher
from ._precision import cast
from .fan_in_cases import layers, positives, step_arguments, step_state
from .fan_in_grad_input import InputGradient
from .fan_in_grad_weight import Ending, end_gradients
from .fan_in_tiles import Chunk, Tiles, logits_tile, scratch_budget, unchecked


@device_function
def _log1p(e):
    """log(1 + e) for e in [0, 1], to float32's last bits also where e is small: 2 atanh(e / (2 + e))."""
    s = e / (2.0 + e)
    q = s * s  # at most 1/9
    series = 1.0 / 15 + q * (1.0 / 17)
    series = 1.0 / 11 + q * (1.0 / 13 + q * series)
    series = 1.0 / 7 + q * (1.0 / 9 + q * series)
    series = 1.0 / 3 + q * (1.0 / 5 + q * series)
    return 2.0 * s * (1.0 + q * series)


@device_function
def _terms(z, target, KIND: tl.constexpr):
    """Terms of the loss and their derivatives by z; ``target`` is 0.0 or 1.0. NaN stays NaN."""
    positive = target > 0.0
    if KIND == 0:
        e = tl.exp(-tl.abs(z))
        term = tl.where(z > 0, z, 0.0) - tl.where(positive, z, 0.0) + _log1p(e)
        towards = tl.where(positive, -z, z)  # sigmoid(z) - 1 = -sigmoid(-z), without cancellation
        slope = tl.where(towards >= 0, 1.0, e) / (1.0 + e)
        slope = tl.where(positive, -slope, slope)
    else:
        sign = tl.where(positive, -1.0, 1.0)
        margin = 1.0 + sign * z
        margin = tl.where(margin < 0, 0.0, margin)
        term = margin * margin
        slope = 2.0 * sign * margin
    return term, slope


@triton.jit(do_not_specialize=["first_tile", "first_label"])
def _loss_kernel(
    input_ptr,  # [I, B]
    weight_ptr,  # [O, F]
    indices_ptr,  # [ceil(O / G), F]
    bias_ptr,  # [O]
    positive_row_ptr,  # [nnz] int32, sorted by tile
    positive_label_ptr,  # [nnz]
    starts_ptr,  # [tiles * across + 1]: the positives of each tile
    scale_ptr,  # gradient to the loss, a scalar
    sums_ptr,  # [tiles * across] float64
    grad_ptr,  # [labels of the chunk, B]
    factor,  # of the reduction
    first_tile, first_label,  # of the chunk
    B, I, O, F, G, tiles_of_group,
    BLOCK_O: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_F: tl.constexpr, UNROLL: tl.constexpr,
    GROUPED: tl.constexpr, HAS_BIAS: tl.constexpr,
    KIND: tl.constexpr, SUM: tl.constexpr, GRAD: tl.constexpr,
):  # fmt: skip
    # one program: one tile of labels x BLOCK_B rows
    across = tl.cdiv(B, BLOCK_B)
    pid = tl.program_id(0)
    b = (pid % across) * BLOCK_B + tl.arange(0, BLOCK_B)
    tile = first_tile + (pid // across).to(tl.int64)
    z, label, inside = logits_tile(
        input_ptr, weight_ptr, indices_ptr, bias_ptr, tile, b,
        B, I, O, F, G, tiles_of_group, BLOCK_O, BLOCK_B, BLOCK_F, UNROLL, GROUPED, HAS_BIAS,
    )  # fmt: skip
    target = tl.zeros((BLOCK_O, BLOCK_B), dtype=tl.float32)
    own = tile * across + pid % across
    for p in range(tl.load(starts_ptr + own), tl.load(starts_ptr + own + 1)):
        same_label = label == tl.load(positive_label_ptr + p)
        same_row = b == tl.load(positive_row_ptr + p)
        target = tl.where(same_label[:, None] & same_row[None, :], 1.0, target)
    term, slope = _terms(z, target, KIND)
    live = inside[:, None] & (b < B)[None, :]
    if SUM:
        by_row = tl.sum(tl.where(live, term, 0.0), axis=0)
        tl.store(sums_ptr + own, tl.sum(by_row.to(tl.float64), axis=0))
    if GRAD:
        slope = slope * (tl.load(scale_ptr) * factor)
        where = grad_ptr + (label - first_label)[:, None] * B + b[None, :]
        tl.store(where, cast(slope, grad_ptr.dtype.element_ty), mask=live)


class _Loss:
    """What the three ops share: the batch, its positives by tile, and the launch over a chunk."""

    def __init__(self, input, weight, indices, bias, offsets, labels, kind, reduction, group_size):
        self.tiles = Tiles(*input.shape, *weight.shape, group_size)
        self.indices = checked_indices("indices", indices, input.shape[1]).contiguous()
        self.positives = _positives_by_tile(self.tiles, offsets, labels)
        self.x = input.t().contiguous()
        self.weight, self.bias = weight, bias
        self.kind = kind
        self.factor = reference._scale(reduction, self.tiles.batch, self.tiles.out_features)
        # float16 would lose the gradients of most logits, 1e-6 and less
        self.grad_dtype = torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float32
        self.sums = input.new_zeros(self.tiles.count * self.tiles.across, dtype=torch.float64)

    def run(self, chunk: Chunk | None, grad_loss: Tensor | None = None, *, sum: bool) -> Tensor:
        """Over all tiles, or those of a chunk; with ``grad_loss`` gives the gradient to its logits."""
        tiles, weight, bias = self.tiles, self.weight, self.bias
        first_tile, count, first_label = 0, tiles.count, 0
        grad = weight
        if chunk is not None:
            first_tile, count, first_label = chunk.first_tile, chunk.tile_count, chunk.first_label
            grad = weight.new_empty((chunk.labels, tiles.batch), dtype=self.grad_dtype)
        launch(
            _loss_kernel,
            (count * tiles.across,),
            self.x, weight, self.indices, weight if bias is None else bias, *self.positives,
            self.sums if grad_loss is None else grad_loss, self.sums, grad,
            self.factor, first_tile, first_label, *tiles.sizes,
            KIND=self.kind, SUM=sum, GRAD=grad_loss is not None,
            **tiles.options(weight, bias),
        )  # fmt: skip
        return grad

    def value(self, dtype: torch.dtype) -> Tensor:
        return (self.sums.sum() * self.factor).to(dtype)


def _positives_by_tile(tiles: Tiles, offsets: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and labels of the positives, sorted by tile, and where each tile's begin."""
    if not unchecked():
        _check_offsets(offsets, labels)
    labels = checked_indices("labels", labels, tiles.out_features)
    item = torch.arange(labels.numel(), device=labels.device, dtype=offsets.dtype)
    row = torch.searchsorted(offsets.contiguous(), item, right=True) - 1
    tile = tiles.tile_of(labels.long()) * tiles.across + row // tiles.config["BLOCK_B"]
    tile, order = torch.sort(tile, stable=True)
    bounds = torch.arange(tiles.count * tiles.across + 1, device=labels.device)
    return row[order].to(torch.int32), labels[order], torch.searchsorted(tile, bounds)


def _check_offsets(offsets: Tensor, labels: Tensor) -> None:
    """On the CPU as the reference; on a GPU the device asserts."""
    good = (offsets[0] == 0) & (offsets[-1] == labels.numel()) & (offsets[1:] >= offsets[:-1]).all()
    wanted = f"offsets must start at 0, never decrease and end at the number of labels, {labels.numel()}"
    if offsets.device.type == "cpu":
        if not bool(good):
            raise ValueError(f"{wanted}; got {offsets.tolist()[:8]}... ending at {int(offsets[-1])}")
    else:
        torch._assert_async(good, wanted)


@launcher
def fan_in_loss(
    input: Tensor,
    weight: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    labels: Tensor,
    kind: int,
    reduction: int,
    group_size: int,
) -> Tensor:
    bias = None if bias is None else bias.contiguous()
    loss = _Loss(input, weight.contiguous(), indices, bias, offsets, labels, kind, reduction, group_size)
    loss.run(None, sum=True)
    return loss.value(torch.float32)


@launcher
def fan_in_loss_grad(
    grad_loss: Tensor,
    input: Tensor,
    weight: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    labels: Tensor,
    kind: int,
    reduction: int,
    group_size: int,
    input_grad: bool,
    weight_grad: bool,
) -> Tuple[Tensor, Tensor, Tensor]:  # noqa: UP006
    empty, grad_input, grad_weight, grad_bias = input.new_empty(0), None, None, None
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    loss = _Loss(input, weight, indices, bias, offsets, labels, kind, reduction, group_size)
    if weight_grad:
        grad_weight = torch.empty_like(weight)
        grad_bias = None if bias is None else torch.empty_like(bias)
    if input_grad or weight_grad:
        grad_input = _backward(loss, grad_loss, input_grad, grad_weight, grad_bias, Ending())
    return tuple(empty.clone() if grad is None else grad for grad in (grad_input, grad_weight, grad_bias))


@launcher
def fan_in_loss_step(
    grad_loss: Tensor,
    input: Tensor,
    weight: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    labels: Tensor,
    state: List[Tensor],  # noqa: UP006
    kind: int,
    reduction: int,
    group_size: int,
    input_grad: bool,
    optimizer: int,
    lr: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    stochastic_rounding: bool,
    seed: int,
) -> Tuple[Tensor, Tensor]:  # noqa: UP006
    loss = _Loss(input, weight, indices, bias, offsets, labels, kind, reduction, group_size)
    ending = Ending(
        optimizer, lr, weight_decay, beta1, beta2, eps, step, stochastic_rounding, seed,
        tuple(state), len(state) // (1 if bias is None else 2),
    )  # fmt: skip
    grad_input = _backward(loss, grad_loss, input_grad, weight, bias, ending, sum=True)
    return loss.value(torch.float32), input.new_empty(0) if grad_input is None else grad_input


def _backward(
    loss: _Loss,
    grad_loss: Tensor,
    input_grad: bool,
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    ending: Ending,
    *,
    sum: bool = False,
) -> Tensor | None:
    """Gradient to the input if asked for, and those of the weight and bias as ``ending`` says."""
    tiles, weight = loss.tiles, loss.weight
    total = InputGradient(tiles, weight) if input_grad else None
    budget = scratch_budget(weight, loss.indices, loss.x, out_weight, *ending.state)
    for chunk in tiles.chunks(budget, total.entry_bytes() if input_grad else 4):
        grad = loss.run(chunk, grad_loss, sum=sum)
        if input_grad:  # before an optimizer steps this chunk's weights
            total.add(chunk, grad, weight, loss.indices)
        if out_weight is not None:
            end_gradients(tiles, chunk, grad, loss.x, loss.indices, out_weight, out_bias, ending)
    return total.result(loss.x.dtype) if input_grad else None


def compile_cases():
    """(name, call) of every kernel and configuration, for `recsparse_kernels.triton.compile`."""
    half = layers([(torch.float16, 1, 256), (torch.float16, 32, 256)])
    for name, (x, weight, indices, bias, group) in [*layers(), *half]:
        arguments = (x, weight, indices, bias, *positives(x.shape[0]))
        one = x.new_empty((), dtype=torch.float32)
        for kind in (0, 1) if (group, x.shape[0]) == (1, 256) else (0,):
            codes = (kind, reference.MEAN, group)
            yield f"loss kind {kind} {name}", partial(fan_in_loss, *arguments, *codes)
            yield (
                f"loss_grad kind {kind} {name}",
                partial(fan_in_loss_grad, one, *arguments, *codes, True, True),
            )
        state = step_state("adamw", weight, bias)
        step = (one, *arguments, state, reference.BCE, reference.MEAN, group, True, *step_arguments("adamw"))
        yield f"loss_step adamw {name}", partial(fan_in_loss_step, *step)
