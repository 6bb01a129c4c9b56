"""Layers of realistic size, on the meta device, for `recsparse_kernels.triton.compile`."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..reference.fan_in import ADAMW, SGD

BF16, FP32 = torch.bfloat16, torch.float32
# dtype, G, B: every configuration by label and by group in bfloat16; in float32, which needs twice the
# memory, those for many rows
CASES = [
    *((BF16, group, batch) for group in (16, 32, 64) for batch in (16, 256)),
    *((BF16, 1, batch) for batch in (1, 4, 16, 256)),
    *((FP32, group, 256) for group in (1, 16, 32, 64)),
]
OPTIMIZERS = {
    "sgd": (SGD, 0, False),
    "momentum, stochastic rounding": (SGD, 1, True),
    "adamw": (ADAMW, 2, False),
}  # code, moments, stochastic rounding


def layers(cases=CASES) -> Iterator[tuple[str, tuple[Tensor, Tensor, Tensor, Tensor, int]]]:
    """Name; input, weight, indices, bias, G."""
    for dtype, group_size, batch in cases:
        yield (
            f"G={group_size} B={batch} {str(dtype).removeprefix('torch.')}",
            (
                torch.empty(batch, 768, dtype=dtype, device="meta"),
                torch.empty(65536, 64, dtype=dtype, device="meta"),
                torch.empty(65536 // group_size, 64, dtype=torch.int16, device="meta"),
                torch.empty(65536, dtype=dtype, device="meta"),
                group_size,
            ),
        )


def step_arguments(name: str) -> tuple:
    """The optimizer's arguments of the ops."""
    code, _, rounding = OPTIMIZERS[name]
    return code, 0.1, 0.01, 0.9, 0.999, 1e-8, 3, rounding, 5


def step_state(name: str, weight: Tensor, bias: Tensor) -> list[Tensor]:
    moments = OPTIMIZERS[name][1]
    return [torch.empty_like(p, dtype=torch.float32) for p in (weight, bias) for _ in range(moments)]


def positives(batch: int) -> tuple[Tensor, Tensor]:
    """Offsets and labels."""
    return (
        torch.empty(batch + 1, dtype=torch.int64, device="meta"),
        torch.empty(5 * batch, dtype=torch.int64, device="meta"),
    )
