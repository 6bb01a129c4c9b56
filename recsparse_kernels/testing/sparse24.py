"""Cases of the 2:4 ops for tests and benches."""

import torch
from torch import Tensor

from ..reference import sparse24 as reference

# (B, I, O): smallest, nothing aligned, empty, around the tile edges, what DLRM has
SHAPES = [
    (1, 1, 1),
    (1, 3, 2),
    (0, 16, 4),
    (3, 0, 4),
    (4, 16, 0),
    (5, 13, 7),
    (8, 48, 16),
    (9, 367, 65),
    (17, 64, 130),
    (33, 415, 19),
    (127, 100, 33),
    (131, 479, 70),
    (300, 40, 21),
]


def make_weight(O: int, I: int, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """A dense ``[O, I]`` weight of the size that layers start from."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(O, I, generator=generator) / max(I, 1) ** 0.5).to(dtype)


def make_case(
    B: int, I: int, O: int, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """input ``[B, I]``, values, metadata, bias ``[O]``, grad_output ``[B, O]``."""
    generator = torch.Generator().manual_seed(seed + 1)
    weight = make_weight(O, I, dtype=dtype, seed=seed)
    values, metadata = reference.sparse24_compress(weight, reference.sparse24_mask(weight, False))
    input, bias, grad = (torch.randn(s, generator=generator).to(dtype) for s in ((B, I), (O,), (B, O)))
    return input, values, metadata, bias, grad


def as_torch_packs(weight: Tensor) -> Tensor:
    """torch's CUTLASS 2:4 tensor of a 16-bit weight; its own ``from_dense`` insists on a GPU."""
    packed, meta = torch.sparse._semi_structured_conversions.sparse_semi_structured_from_dense_cutlass(weight)
    return torch.sparse.SparseSemiStructuredTensorCUTLASS(weight.shape, packed, meta, None, None, None)
