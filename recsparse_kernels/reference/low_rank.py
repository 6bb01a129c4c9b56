"""Low-rank linear and DCN-v2 cross layers.

linear: mid = input down^T + mid_bias,  output = act(act_mid(mid) up^T + bias)
cross:  mid = x down^T,                 output = x0 * (mid up^T + bias) + x

input, x, x0 [B, I]   down [R, I]   up [O, R]   mid [B, R]
"""

import torch
from torch import Tensor

from ._activation import activate, activate_grad

NEEDS_INPUT, NEEDS_DOWN, NEEDS_UP, NEEDS_MID_BIAS, NEEDS_BIAS, NEEDS_X0 = (1 << i for i in range(6))


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
    """Output [B, O], and mid [B, R] before its activation (empty unless keep_mid), for the gradients."""
    mid = torch.nn.functional.linear(input, down, mid_bias)
    pre = torch.nn.functional.linear(activate(mid, mid_activation), up, bias)
    return activate(pre, activation), mid if keep_mid else mid.new_empty(0, mid.shape[1])


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
    """Gradients to input, down, up, mid_bias, bias; empty where the bit of ``needs`` is not set.

    ``output`` is given for ReLU, sigmoid and tanh, whose derivative follows from it.
    """
    active = activate(mid, mid_activation)
    if activation == 0:
        grad_pre = grad_output.contiguous()
    elif output is not None:
        slope = {1: lambda y: (y > 0).to(y.dtype), 4: lambda y: y * (1 - y), 5: lambda y: 1 - y * y}
        grad_pre = grad_output * slope[activation](output)
    else:
        grad_pre = grad_output * activate_grad(torch.nn.functional.linear(active, up, bias), activation)
    grad_mid = (grad_pre @ up) * activate_grad(mid, mid_activation)
    none = input.new_empty(0)
    return (
        grad_mid @ down if needs & NEEDS_INPUT else none,
        grad_mid.t() @ input if needs & NEEDS_DOWN else none.clone(),
        grad_pre.t() @ active if needs & NEEDS_UP else none.clone(),
        grad_mid.sum(0) if needs & NEEDS_MID_BIAS else none.clone(),
        grad_pre.sum(0) if needs & NEEDS_BIAS else none.clone(),
    )


def low_rank_cross(
    x0: Tensor, x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, keep_mid: bool
) -> tuple[Tensor, Tensor]:
    """Output [B, I], and mid [B, R] (empty unless keep_mid), for the gradients."""
    mid = torch.nn.functional.linear(x, down)
    output = x0 * torch.nn.functional.linear(mid, up, bias) + x
    return output, mid if keep_mid else mid.new_empty(0, mid.shape[1])


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
    """Gradients to x0, x, down, up, bias; empty where the bit of ``needs`` is not set."""
    grad_pre = grad_output * x0
    grad_mid = grad_pre @ up
    none = x.new_empty(0)
    return (
        grad_output * torch.nn.functional.linear(mid, up, bias) if needs & NEEDS_X0 else none,
        grad_mid @ down + grad_output if needs & NEEDS_INPUT else none.clone(),
        grad_mid.t() @ x if needs & NEEDS_DOWN else none.clone(),
        grad_pre.t() @ mid if needs & NEEDS_UP else none.clone(),
        grad_pre.sum(0) if needs & NEEDS_BIAS else none.clone(),
    )
