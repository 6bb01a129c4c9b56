"""Cases of the low-rank ops for tests and benches."""

import torch
from torch import Tensor

# (B, I, R, O): smallest, empty, nothing aligned, few rows and just more, R = 1, R > I, around the tiles,
# a rank too large for one kernel of the GPU backends, sums long enough to be split there
LINEAR_SHAPES = [
    (1, 1, 1, 1),
    (0, 4, 2, 3),
    (3, 5, 8, 2),
    (7, 37, 41, 53),
    (8, 64, 16, 64),
    (49, 257, 1, 131),
    (61, 300, 67, 29),
    (130, 19, 24, 515),
    (20, 30, 150, 40),
    (5, 1100, 19, 1060),
]
CROSS_SHAPES = [
    (1, 1, 1),
    (0, 4, 2),
    (3, 5, 8),
    (7, 37, 41),
    (61, 300, 67),
    (130, 515, 24),
    (6, 1030, 21),
]  # (B, I, R)

# (V, R, D)
TABLE_SHAPES = [(7, 1, 1), (50, 2, 16), (97, 24, 50), (211, 16, 128), (40, 67, 293), (30, 150, 20)]
FIELD_SHAPES = [
    (1, 1, 1, 1),
    (0, 3, 2, 5),
    (70, 22, 8, 50),
    (601, 3, 2, 16),
    (33, 5, 24, 13),
    (9, 2, 70, 20),
]  # (B, F, R, D)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_linear(B: int, I: int, R: int, O: int, *, dtype=torch.float32, seed: int = 0) -> tuple[Tensor, ...]:
    """input, down, up, mid_bias, bias, grad_output."""
    shapes = ((B, I), (R, I), (O, R), (R,), (O,), (B, O))
    scales = (1, max(I, 1) ** -0.5, R**-0.5, 1, 1, 1)
    g = generator(seed)
    return tuple((torch.randn(s, generator=g) * k).to(dtype) for s, k in zip(shapes, scales, strict=True))


def make_cross(B: int, I: int, R: int, *, dtype=torch.float32, seed: int = 0) -> tuple[Tensor, ...]:
    """x0, x, down, up, bias, grad_output."""
    x, down, up, _, bias, grad = make_linear(B, I, R, I, dtype=dtype, seed=seed)
    return torch.randn(B, I, generator=generator(seed + 1)).to(dtype), x, down, up, bias, grad


def make_table(V: int, R: int, D: int, *, dtype=torch.float32, seed: int = 0) -> tuple[Tensor, ...]:
    """table, up, mean."""
    g = generator(seed)
    table, up, mean = (torch.randn(s, generator=g) for s in ((V, R), (D, R), (D,)))
    return table.to(dtype), (up * R**-0.5).to(dtype), mean.to(dtype)


def make_bags(
    V: int,
    N: int = 60,
    *,
    index_dtype=torch.int64,
    offset_dtype=torch.int64,
    last: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """indices [N] with duplicates, and offsets with empty bags at the start, inside and at the end."""
    indices = torch.randint(0, V, (N,), generator=generator(seed), dtype=index_dtype)
    ends = torch.tensor([0, 0, N // 12, N // 12, N // 3, N // 2, N - 3, N, N])
    return indices, (ends if last else ends[:-1]).to(offset_dtype)


def make_fields(
    B: int, F: int, R: int, D: int, *, dtype=torch.float32, index_dtype=torch.int64, seed: int = 0
):
    """indices [B, F], table, starts, projections, bias, and gradients to z, x and the FM term."""
    g = generator(seed)
    rows = torch.randint(1, 40, (F,), generator=g)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), rows.cumsum(0)])
    indices = (torch.rand(B, F, generator=g) * rows).to(index_dtype)
    shapes = ((int(starts[-1]), R), (F, R, D), (F, D), (B, F, R), (B, F, D), (B, 1))
    table, projections, bias, *grads = (torch.randn(s, generator=g).to(dtype) for s in shapes)
    return indices, table, starts, projections * R**-0.5, bias, grads
