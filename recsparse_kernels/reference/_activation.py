"""The fused activations and their derivatives, by the number that the ops take."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def activate(x: Tensor, activation: int) -> Tensor:
    """0 identity, 1 ReLU, 2 GELU (erf form), 3 SiLU, 4 sigmoid, 5 tanh."""
    functions = (lambda x: x, torch.relu, F.gelu, F.silu, torch.sigmoid, torch.tanh)
    return functions[activation](x)


def activate_grad(x: Tensor, activation: int) -> Tensor:
    """d activate(x) / dx, x the pre-activation."""
    if activation == 0:
        return torch.ones_like(x)
    if activation == 1:
        return (x > 0).to(x.dtype)
    if activation == 2:
        cdf = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
        return cdf + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    s = torch.sigmoid(x)
    if activation == 3:
        return s * (1 + x * (1 - s))
    if activation == 4:
        return s * (1 - s)
    return 1 - torch.tanh(x) ** 2
