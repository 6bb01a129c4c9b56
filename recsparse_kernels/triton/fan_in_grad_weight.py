"""Fixed fan-in on Triton: the gradients to weight and bias, stored, or used at once by an optimizer.

    grad_weight[o, f] = sum_b grad[o, b] * input[b, indices[o // G, f]]
    grad_bias[o] = sum_b grad[o, b]

One program owns an element's sum over the batch. With an optimizer no gradient reaches memory.
"""

import dataclasses

import triton
import triton.language as tl
from torch import Tensor

from ..reference.fan_in import ADAMW, SGD
from ._configs import Configs
from ._device import device_function
from ._launch import NO_SPILL, launch
from ._precision import cast, dot
from .fan_in_random import GOLDEN, halves, hash64, mix32
from .fan_in_tiles import Chunk, Tiles, load_inputs

STORE = 3  # beside the optimizers of reference.fan_in: write the gradient itself

# By label: weights of a chunk, flat, x rows. By group: labels of a group x inputs, tl.dot over rows.
LABEL_CONFIGS = Configs(
    "fan_in_grad_weight_label",
    {
        "16 rows": dict(BLOCK_E=128, BLOCK_B=16, num_warps=4, num_stages=1),
        "many rows": dict(BLOCK_E=64, BLOCK_B=64, num_warps=4, num_stages=1),
    },
)
GROUP_CONFIGS = Configs(
    "fan_in_grad_weight",
    {
        "group of 16": dict(BLOCK_O=16, BLOCK_B=64, BLOCK_F=64, num_warps=4, num_stages=2),
        "group of 32": dict(BLOCK_O=32, BLOCK_B=64, BLOCK_F=64, num_warps=8, num_stages=2, **NO_SPILL),
        "group of 64": dict(BLOCK_O=64, BLOCK_B=64, BLOCK_F=64, num_warps=8, num_stages=2),
    },
)
BIAS_CONFIG = dict(BLOCK_E=64, BLOCK_B=64, num_warps=4, num_stages=1)

# Arguments that change from chunk to chunk or step to step: one kernel for all their values.
VARYING = ["first_label", "labels", "key_low", "key_high"]


@device_function
def _step(
    grad,  # float32, any shape
    element,  # int64, of the same shape: number within the tensor
    live,
    out_ptr,  # parameter, or where STORE its gradient
    first_ptr, second_ptr,  # moments, float32
    number,  # of the tensor's first element, in the stochastic rounding
    lr, decay, beta1, beta2, rest1, rest2, eps, correction,
    key_low, key_high,
    OPTIMIZER: tl.constexpr, MOMENTS: tl.constexpr, DECAY: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Ends a gradient: stores it, or steps the parameter (formulas: `_update` of reference.fan_in)."""
    if OPTIMIZER == 3:
        tl.store(out_ptr + element, cast(grad, out_ptr.dtype.element_ty), mask=live)
    else:
        w = tl.load(out_ptr + element, mask=live, other=0.0).to(tl.float32)
        if DECAY:
            if OPTIMIZER == 2:  # AdamW: 1 - lr * weight_decay
                w = w * decay
            else:
                grad += decay * w
        if MOMENTS == 0:
            w = w - lr * grad
        else:
            first = tl.load(first_ptr + element, mask=live, other=0.0) * beta1
            if MOMENTS == 1:
                first += grad
                w = w - lr * first
            else:
                first += rest1 * grad
                second = tl.load(second_ptr + element, mask=live, other=0.0) * beta2 + rest2 * grad * grad
                tl.store(second_ptr + element, second, mask=live)
                w = w - lr * first / (tl.sqrt(second / correction) + eps)
            tl.store(first_ptr + element, first, mask=live)
        if ROUND:
            w = _round_stochastically(w, number + element, key_low, key_high)
        tl.store(out_ptr + element, cast(w, out_ptr.dtype.element_ty), mask=live)


@device_function
def _round_stochastically(w, element, key_low, key_high):
    """float32 whose low 16 bits are 0: up with the probability of the distance."""
    low = element.to(tl.uint32) ^ key_low.to(tl.uint32)
    x = mix32(mix32(low) + ((element >> 32).to(tl.uint32) ^ key_high.to(tl.uint32)))
    bits = w.to(tl.uint32, bitcast=True)
    rounded = ((bits + (x >> 16)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where((bits & 0x7F800000) != 0x7F800000, rounded, w)


@triton.jit(do_not_specialize=VARYING)
def _grad_weight_label_kernel(
    grad_ptr,  # [labels, B] of the chunk
    input_ptr,  # [I, B]
    indices_ptr,  # [rows, F]
    out_ptr,  # [O, F]
    first_ptr, second_ptr,
    first_label, labels,
    B, I, F, G,
    lr, decay, beta1, beta2, rest1, rest2, eps, correction, key_low, key_high,
    BLOCK_E: tl.constexpr, BLOCK_B: tl.constexpr,
    OPTIMIZER: tl.constexpr, MOMENTS: tl.constexpr, DECAY: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    # one program: BLOCK_E successive weights of the chunk; all rows
    entry = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    label = entry // F
    live = label < labels
    number = (first_label + label) * F + (entry - label * F)  # within the whole weight
    col = tl.load(indices_ptr + (first_label + label) // G * F + (entry - label * F), mask=live, other=-1)
    acc = tl.zeros((BLOCK_E, BLOCK_B), dtype=tl.float32)
    for b0 in range(0, B, BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B)
        where = grad_ptr + label[:, None] * B + b[None, :]
        g = tl.load(where, mask=live[:, None] & (b < B)[None, :], other=0.0).to(tl.float32)
        acc = tl.fma(g, load_inputs(input_ptr, col, live, b, B, I).to(tl.float32), acc)
    _step(
        tl.sum(acc, axis=1), number, live, out_ptr, first_ptr, second_ptr, 0,
        lr, decay, beta1, beta2, rest1, rest2, eps, correction, key_low, key_high,
        OPTIMIZER, MOMENTS, DECAY, ROUND,
    )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def _grad_weight_group_kernel(
    grad_ptr,  # [labels, B] of the chunk
    input_ptr,  # [I, B]
    indices_ptr,  # [rows, F]
    out_ptr,  # [O, F]
    first_ptr, second_ptr,
    first_label, labels,
    B, I, F, G, tiles_of_group,
    lr, decay, beta1, beta2, rest1, rest2, eps, correction, key_low, key_high,
    BLOCK_O: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_F: tl.constexpr,
    OPTIMIZER: tl.constexpr, MOMENTS: tl.constexpr, DECAY: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    # one program: BLOCK_O labels of a group x BLOCK_F inputs; all rows. The chunk begins with a group.
    steps = tl.cdiv(F, BLOCK_F)
    pid = tl.program_id(0)
    f = (pid % steps) * BLOCK_F + tl.arange(0, BLOCK_F)
    tile = (pid // steps).to(tl.int64)
    row = tile // tiles_of_group
    member = (tile - row * tiles_of_group) * BLOCK_O + tl.arange(0, BLOCK_O)
    label = row * G + member
    inside = (member < G) & (label < labels)
    col = tl.load(indices_ptr + (first_label // G + row) * F + f, mask=f < F, other=-1)
    acc = tl.zeros((BLOCK_O, BLOCK_F), dtype=tl.float32)
    for b0 in range(0, B, BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B)
        where = grad_ptr + label[:, None] * B + b[None, :]
        g = tl.load(where, mask=inside[:, None] & (b < B)[None, :], other=0.0)
        x = load_inputs(input_ptr, col, f < F, b, B, I).to(g.dtype)
        acc = dot(g, tl.trans(x), acc)
    number = (first_label + label)[:, None] * F + f[None, :]
    _step(
        acc, number, inside[:, None] & (f < F)[None, :], out_ptr, first_ptr, second_ptr, 0,
        lr, decay, beta1, beta2, rest1, rest2, eps, correction, key_low, key_high,
        OPTIMIZER, MOMENTS, DECAY, ROUND,
    )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def _grad_bias_kernel(
    grad_ptr,  # [labels, B] of the chunk
    out_ptr,  # [O]
    first_ptr, second_ptr,
    first_label, labels, number,
    B,
    lr, decay, beta1, beta2, rest1, rest2, eps, correction, key_low, key_high,
    BLOCK_E: tl.constexpr, BLOCK_B: tl.constexpr,
    OPTIMIZER: tl.constexpr, MOMENTS: tl.constexpr, DECAY: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    # one program: BLOCK_E labels, all rows; the rounding numbers the bias's elements from ``number``
    label = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    live = label < labels
    acc = tl.zeros((BLOCK_E, BLOCK_B), dtype=tl.float32)
    for b0 in range(0, B, BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B)
        where = grad_ptr + label[:, None] * B + b[None, :]
        acc += tl.load(where, mask=live[:, None] & (b < B)[None, :], other=0.0).to(tl.float32)
    _step(
        tl.sum(acc, axis=1), first_label + label, live, out_ptr, first_ptr, second_ptr, number,
        lr, decay, beta1, beta2, rest1, rest2, eps, correction, key_low, key_high,
        OPTIMIZER, MOMENTS, DECAY, ROUND,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Ending:
    """What becomes of the gradients: the optimizer's arguments of the op, or nothing, to store them."""

    optimizer: int = STORE
    lr: float = 0.0
    weight_decay: float = 0.0
    beta1: float = 0.0
    beta2: float = 0.0
    eps: float = 0.0
    step: int = 1
    stochastic_rounding: bool = False
    seed: int = 0
    state: tuple[Tensor, ...] = ()  # moments of the weight, then those of the bias
    moments: int = 0  # of each

    def arguments(self) -> tuple:
        adam = self.optimizer not in (STORE, SGD)
        lr = self.lr / (1 - self.beta1**self.step) if adam else self.lr
        decay = 1 - self.lr * self.weight_decay if self.optimizer == ADAMW else self.weight_decay
        key = hash64(self.seed + self.step * GOLDEN.value)
        return (
            float(lr), float(decay), float(self.beta1), float(self.beta2),
            1.0 - self.beta1, 1.0 - self.beta2, float(self.eps),
            1.0 - self.beta2**self.step if adam else 1.0, *halves(key),
        )  # fmt: skip

    def constants(self) -> dict:
        return {
            "OPTIMIZER": self.optimizer, "MOMENTS": self.moments,
            "DECAY": bool(self.weight_decay), "ROUND": self.stochastic_rounding,
        }  # fmt: skip

    def of_weight(self, out: Tensor) -> tuple[Tensor, Tensor]:
        return self._pair(self.state[: self.moments], out)

    def of_bias(self, out: Tensor) -> tuple[Tensor, Tensor]:
        return self._pair(self.state[self.moments :], out)

    @staticmethod
    def _pair(moments: tuple[Tensor, ...], out: Tensor) -> tuple[Tensor, Tensor]:
        """Two tensors for the kernels; those that are missing are never read."""
        return (*moments, out, out)[0], (*moments, out, out)[1]


def end_gradients(
    tiles: Tiles, chunk: Chunk, grad: Tensor, input: Tensor, indices: Tensor,
    weight: Tensor, bias: Tensor | None, ending: Ending,
) -> None:  # fmt: skip
    """``grad`` [labels of the chunk, B] gives the rows of ``weight`` and ``bias`` that belong to the chunk.

    They are the parameters, or (`Ending` without an optimizer) their gradients. ``input`` [I, B].
    """
    arguments, constants = ending.arguments(), ending.constants()
    sizes = (chunk.first_label, chunk.labels)
    few = "16 rows" if tiles.batch <= 16 else "many rows"
    if tiles.grouped:
        options = dict(GROUP_CONFIGS[f"group of {tiles.block}"])
        if grad.element_size() == 4:  # no tensor cores: tl.dot holds BLOCK_B operands in registers
            options["BLOCK_B"] = 32
        steps = -(-tiles.fan_in // options["BLOCK_F"])
        launch(
            _grad_weight_group_kernel,
            (chunk.tile_count * steps,),
            grad, input, indices, weight, *ending.of_weight(weight), *sizes,
            tiles.batch, tiles.in_features, tiles.fan_in, tiles.group_size, tiles.tiles_of_group,
            *arguments, **options, **constants,
        )  # fmt: skip
    else:
        options = LABEL_CONFIGS[few]
        launch(
            _grad_weight_label_kernel,
            (-(-chunk.labels * tiles.fan_in // options["BLOCK_E"]),),
            grad, input, indices, weight, *ending.of_weight(weight), *sizes,
            tiles.batch, tiles.in_features, tiles.fan_in, tiles.group_size,
            *arguments, **options, **constants,
        )  # fmt: skip
    if bias is not None:
        launch(
            _grad_bias_kernel,
            (-(-chunk.labels // BIAS_CONFIG["BLOCK_E"]),),
            grad, bias, *ending.of_bias(bias), *sizes, tiles.out_features * tiles.fan_in, tiles.batch,
            *arguments, **BIAS_CONFIG, **constants,
        )  # fmt: skip
