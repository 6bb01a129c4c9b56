"""Fixed fan-in linear on Triton: the layer, its gradients, the step fused into the weight's gradient.

    output[b, o] = sum_f weight[o, f] * input[b, indices[o // G, f]] + bias[o]

    input [B, I]   weight [O, F]   bias [O] or None   indices [ceil(O / G), F] int16 or int32

Definitions: reference/fan_in.py. Tiles: fan_in_tiles.py.
"""

from functools import partial
from typing import List  # noqa: UP035  (read by torch.library.infer_schema)

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import checked_indices, launch, launcher
from ._precision import cast
from .fan_in_cases import OPTIMIZERS, layers, step_arguments, step_state
from .fan_in_grad_input import InputGradient
from .fan_in_grad_weight import Ending, end_gradients
from .fan_in_tiles import Tiles, logits_tile, scratch_budget


@triton.jit
def _linear_kernel(
    input_ptr,  # [I, B]
    weight_ptr,  # [O, F]
    indices_ptr,  # [ceil(O / G), F]
    bias_ptr,  # [O]
    output_ptr,  # [B, O]
    B, I, O, F, G, tiles_of_group,
    BLOCK_O: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_F: tl.constexpr, UNROLL: tl.constexpr,
    GROUPED: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    # one program: one tile of labels x BLOCK_B rows; the rows of a tile run side by side
    across = tl.cdiv(B, BLOCK_B)
    pid = tl.program_id(0)
    b = (pid % across) * BLOCK_B + tl.arange(0, BLOCK_B)
    z, label, inside = logits_tile(
        input_ptr, weight_ptr, indices_ptr, bias_ptr, (pid // across).to(tl.int64), b,
        B, I, O, F, G, tiles_of_group, BLOCK_O, BLOCK_B, BLOCK_F, UNROLL, GROUPED, HAS_BIAS,
    )  # fmt: skip
    where = output_ptr + b.to(tl.int64)[None, :] * O + label[:, None]
    tl.store(where, cast(z, output_ptr.dtype.element_ty), mask=inside[:, None] & (b < B)[None, :])


@launcher
def fan_in_linear(
    input: Tensor, weight: Tensor, indices: Tensor, bias: Tensor | None, group_size: int
) -> Tensor:
    indices = checked_indices("indices", indices, input.shape[1]).contiguous()
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    tiles = Tiles(*input.shape, *weight.shape, group_size)
    output = input.new_empty(tiles.batch, tiles.out_features)
    launch(
        _linear_kernel,
        (tiles.count * tiles.across,),
        input.t().contiguous(), weight, indices, weight if bias is None else bias, output, *tiles.sizes,
        **tiles.options(weight, bias),
    )  # fmt: skip
    return output


@launcher
def fan_in_linear_grad_input(
    grad_output: Tensor, weight: Tensor, indices: Tensor, in_features: int, group_size: int
) -> Tensor:
    indices = checked_indices("indices", indices, in_features).contiguous()
    weight = weight.contiguous()
    tiles = Tiles(grad_output.shape[0], in_features, *weight.shape, group_size)
    total = InputGradient(tiles, weight)
    for chunk in tiles.chunks(scratch_budget(grad_output, weight, indices), total.entry_bytes()):
        total.add(chunk, _of_chunk(grad_output, chunk), weight, indices)
    return total.result(grad_output.dtype)


@launcher
def fan_in_linear_grad_weight(grad_output: Tensor, input: Tensor, indices: Tensor, group_size: int) -> Tensor:
    indices = checked_indices("indices", indices, input.shape[1]).contiguous()
    grad_weight = input.new_empty(grad_output.shape[1], indices.shape[1])
    tiles = Tiles(*input.shape, *grad_weight.shape, group_size)
    x = input.t().contiguous()
    for chunk in tiles.chunks(scratch_budget(grad_output, grad_weight, indices)):
        grad = _of_chunk(grad_output, chunk)
        end_gradients(tiles, chunk, grad, x, indices, grad_weight, None, Ending())
    return grad_weight


@launcher
def fan_in_linear_update(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    state: List[Tensor],  # noqa: UP006
    group_size: int,
    optimizer: int,
    lr: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    stochastic_rounding: bool,
    seed: int,
) -> None:
    indices = checked_indices("indices", indices, input.shape[1]).contiguous()
    tiles = Tiles(*input.shape, *weight.shape, group_size)
    ending = Ending(
        optimizer, lr, weight_decay, beta1, beta2, eps, step, stochastic_rounding, seed,
        tuple(state), len(state) // (1 if bias is None else 2),
    )  # fmt: skip
    x = input.t().contiguous()
    for chunk in tiles.chunks(scratch_budget(grad_output, weight, indices)):
        grad = _of_chunk(grad_output, chunk)
        end_gradients(tiles, chunk, grad, x, indices, weight, bias, ending)


def _of_chunk(grad_output: Tensor, chunk) -> Tensor:
    """[labels, B]"""
    return grad_output[:, chunk.first_label : chunk.end_label].t().contiguous()


def compile_cases():
    """(name, call) of every kernel and configuration, for `recsparse_kernels.triton.compile`."""
    for name, (x, weight, indices, bias, group) in layers():
        grad = x.new_empty(x.shape[0], weight.shape[0])
        yield f"linear {name}", partial(fan_in_linear, x, weight, indices, bias, group)
        yield (
            f"linear_grad_input {name}",
            partial(fan_in_linear_grad_input, grad, weight, indices, 768, group),
        )
        yield f"linear_grad_weight {name}", partial(fan_in_linear_grad_weight, grad, x, indices, group)
        for optimizer in OPTIMIZERS:
            if "rounding" in optimizer and weight.dtype != torch.bfloat16:
                continue
            state = step_state(optimizer, weight, bias)
            arguments = (grad, x, weight, indices, bias, state, group, *step_arguments(optimizer))
            yield f"linear_update {optimizer} {name}", partial(fan_in_linear_update, *arguments)
