"""Cases of masked embedding tables, for tests and benches."""

import torch
from torch import Tensor

from ..ops.masked_embedding import masked_embedding_pack
from ..ops.masked_embedding_table import MaskedTable, random_mask_bits, row_magnitude_mask, unpack_bits

# smallest, nothing aligned, an empty table's edges, exactly a word, more than one word, realistic
SHAPES = [(1, 1), (3, 8), (70, 10), (130, 50), (300, 64), (65, 67), (40, 200)]


def make_mask(num_embeddings: int, embedding_dim: int, density: float, layout: str) -> Tensor:
    """Random bool ``[V, D]`` that the layout allows; some rows stay empty and some full unless fixed_k."""
    draw = torch.rand(num_embeddings, embedding_dim)
    if layout == "fixed_k":
        return row_magnitude_mask(draw, max(1, round(density * embedding_dim)))
    mask = draw < density
    mask[1::7] = False
    mask[2::11] = True
    return mask


def make_table(
    num_embeddings: int,
    embedding_dim: int,
    *,
    density: float = 0.3,
    layout: str = "bitmask",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[MaskedTable, Tensor]:
    """A packed table and the dense ``weight * mask`` it stands for."""
    torch.manual_seed(seed)
    weight = torch.randn(num_embeddings, embedding_dim).to(dtype)
    mask = make_mask(num_embeddings, embedding_dim, density, layout)
    return masked_embedding_pack(weight, mask, layout=layout), weight * mask


def make_large_table(
    num_embeddings: int, embedding_dim: int, density: float, layout: str, dtype: torch.dtype
) -> tuple[MaskedTable, Tensor]:
    """As `make_table`, with exactly ``density`` kept, for benches."""
    mask = unpack_bits(random_mask_bits(num_embeddings, embedding_dim, density, layout), embedding_dim)
    weight = torch.randn(num_embeddings, embedding_dim).to(dtype).mul_(mask)
    return masked_embedding_pack(weight, mask, layout=layout), weight


def make_bags(
    num_embeddings: int,
    num_bags: int,
    num_indices: int,
    *,
    index_dtype: torch.dtype = torch.int64,
    offset_dtype: torch.dtype = torch.int64,
    include_last_offset: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Indices with duplicates and offsets with empty bags."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(max(1, num_embeddings), (num_indices,), generator=generator)
    indices[::3] = indices[::3] % max(1, num_embeddings // 4)  # duplicates
    cuts = torch.randint(num_indices + 1, (max(num_bags - 1, 0),), generator=generator).sort().values
    offsets = torch.cat([torch.zeros(min(num_bags, 1), dtype=torch.int64), cuts])
    if include_last_offset:
        offsets = torch.cat([offsets, torch.tensor([num_indices])])
    return indices.to(index_dtype), offsets.to(offset_dtype)
