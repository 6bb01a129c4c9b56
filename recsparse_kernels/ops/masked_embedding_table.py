"""Packed masked tables: `MaskedTable`, and making one from a mask."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..reference.masked_embedding import BASE_ROWS, _bits, _unsigned
from ._check import check_dtype, check_tensor, shape

LAYOUTS = ("bitmask", "fixed_k", "row_remap")
MAX_EMBEDDING_DIM = 32768  # BASE_ROWS of them keep row starts within 32 bits
MAX_REMAP_DIM = 256  # 8-bit column ids
REMAP_BELOW_DENSITY = 1 / 32  # layout "auto": at most about two values in a row of 64
CHUNK_ELEMENTS = 1 << 22  # conversions work on about this many table elements at a time


class MaskedTable(NamedTuple):
    """A table whose dropped elements are not stored. Made by `masked_embedding_pack`.

    Attributes:
        values: kept elements, row after row: ``[nnz]``, in layout fixed_k ``[V, k]``.
        rows: uint8, what is stored for each row, besides values: ``[V, ceil(D/8) + 4]`` mask bits and a
            32-bit start (bitmask), ``[V, ceil(D/8)]`` mask bits (fixed_k), or ``[ceil(V/64), 12]`` for each
            64 rows which of them hold anything and how many did before them (row_remap). Low bits and low
            bytes come first.
        bases: int64, added to the starts of 65536 rows each; None in fixed_k.
        starts: int32 read as unsigned, row_remap only: where each row that is not empty begins in ``values``.
        columns: uint8, row_remap only: the column of each value.
    """

    values: Tensor
    rows: Tensor
    bases: Tensor | None
    starts: Tensor | None
    columns: Tensor | None
    num_embeddings: int
    embedding_dim: int

    @property
    def layout(self) -> str:
        if self.columns is not None:
            return "row_remap"
        return "fixed_k" if self.values.dim() == 2 else "bitmask"

    @property
    def nnz(self) -> int:
        return self.values.numel()

    @property
    def sizes(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    @property
    def index(self) -> tuple:
        """The tensors besides ``values``, in the order the ops take them."""
        return self.rows, self.bases, self.starts, self.columns


def row_chunks(num_rows: int, dim: int):
    step = max(1, CHUNK_ELEMENTS // max(dim, 1))
    return ((begin, min(num_rows, begin + step)) for begin in range(0, num_rows, step))


def pack_bits(mask: Tensor) -> Tensor:
    """Bool ``[V, D]`` to bytes ``[V, ceil(D/8)]``, low bit first."""
    num_rows, dim = mask.shape
    out = torch.empty(num_rows, (dim + 7) // 8, dtype=torch.uint8, device=mask.device)
    places = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    for begin, end in row_chunks(num_rows, dim):
        part = torch.nn.functional.pad(mask[begin:end].to(torch.uint8), (0, -dim % 8))
        out[begin:end] = (part.unflatten(1, (-1, 8)) * places).sum(2, dtype=torch.uint8)
    return out


def unpack_bits(bits: Tensor, dim: int) -> Tensor:
    """The inverse of `pack_bits`."""
    out = torch.empty(bits.shape[0], dim, dtype=torch.bool, device=bits.device)
    for begin, end in row_chunks(bits.shape[0], dim):
        out[begin:end] = _bits(bits[begin:end], dim)
    return out


def row_counts(bits: Tensor) -> Tensor:
    """Set bits of each row of bytes, int64 ``[V]``."""
    ones = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.uint8, device=bits.device)
    out = torch.empty(bits.shape[0], dtype=torch.int64, device=bits.device)
    for begin, end in row_chunks(bits.shape[0], 8 * bits.shape[1]):
        out[begin:end] = ones[bits[begin:end].int()].sum(1, dtype=torch.int64)
    return out


def low_starts(starts: Tensor) -> tuple[Tensor, Tensor]:
    """64-bit starts [n] as what they are past their base, int64 below 2^32, and the bases (at least one)."""
    bases = starts[::BASE_ROWS].clone() if len(starts) else starts.new_zeros(1)
    return starts - bases.repeat_interleave(BASE_ROWS)[: len(starts)], bases


def _low_bytes(numbers: Tensor, count: int) -> Tensor:
    """int64 [n] to its low bytes, uint8 [n, count]."""
    return numbers.contiguous().view(torch.uint8).view(-1, 8)[:, :count]


def index_from_bits(bits: Tensor, embedding_dim: int, layout: str) -> tuple[tuple, tuple[int, ...]]:
    """What a table holds besides its values, ``(rows, bases, starts, columns)``, and the shape of ``values``.

    Raises:
        ValueError: layout fixed_k, and rows keep different numbers of elements; or row_remap, and rows are
            too wide.
    """
    num_rows = bits.shape[0]
    counts = row_counts(bits)
    if layout == "fixed_k":
        kept = int(counts[0]) if num_rows else 0
        if bool((counts != kept).any()):
            low, high = int(counts.min()), int(counts.max())
            raise ValueError(
                f"mask must keep equally many elements in every row for fixed_k; got {low} to {high}"
            )
        return (bits, None, None, None), (num_rows, kept)
    if layout == "bitmask":
        low, bases = low_starts(counts.cumsum(0) - counts)
        rows = torch.cat([bits, _low_bytes(low, 4)], dim=1)
        return (rows, bases, None, None), (int(counts.sum()),)
    if embedding_dim > MAX_REMAP_DIM:
        raise ValueError(f"embedding_dim must be at most {MAX_REMAP_DIM} for row_remap; got {embedding_dim}")
    occupied = counts > 0
    blocks = torch.nn.functional.pad(occupied, (0, -num_rows % 64)).view(-1, 64)
    per_block = blocks.sum(1)
    ranks = per_block.cumsum(0) - per_block
    rows = torch.cat([pack_bits(blocks), _low_bytes(ranks, 4)], dim=1)
    kept_counts = counts[occupied]
    low, bases = low_starts(torch.nn.functional.pad(kept_counts.cumsum(0), (1, 0)))
    columns = [
        _bits(bits[begin:end], embedding_dim).nonzero()[:, 1].to(torch.uint8)
        for begin, end in row_chunks(num_rows, embedding_dim)
    ]
    columns = torch.cat(columns) if columns else bits.new_empty(0)
    return (rows, bases, low.to(torch.int32), columns), (len(columns),)


def mask_bits(table: MaskedTable) -> Tensor:
    """Mask bits ``[V, ceil(D/8)]`` of any layout."""
    mask_bytes = (table.embedding_dim + 7) // 8
    if table.layout != "row_remap":
        return table.rows[:, :mask_bytes].contiguous()
    occupied = _bits(table.rows[:, :8], 64).flatten()[: table.num_embeddings]
    starts = _remap_starts(table)
    row = occupied.nonzero().squeeze(1).repeat_interleave(starts.diff())
    out = table.rows.new_empty(table.num_embeddings, mask_bytes)
    for begin, end in row_chunks(table.num_embeddings, table.embedding_dim):
        first, last = torch.searchsorted(row, torch.tensor([begin, end], device=row.device)).tolist()
        part = torch.zeros(end - begin, table.embedding_dim, dtype=torch.bool, device=row.device)
        part[row[first:last] - begin, table.columns[first:last].long()] = True
        out[begin:end] = pack_bits(part)
    return out


def _remap_starts(table: MaskedTable) -> Tensor:
    low = table.starts.long() & 0xFFFFFFFF
    return table.bases.repeat_interleave(BASE_ROWS)[: len(low)] + low


def check_table(table: MaskedTable) -> None:
    """Raises ValueError unless the table's tensors agree with each other."""
    rows, dim = table.rows, table.embedding_dim
    mask_bytes = (dim + 7) // 8
    wanted = {
        "bitmask": (table.num_embeddings, mask_bytes + 4),
        "fixed_k": (table.num_embeddings, mask_bytes),
        "row_remap": ((table.num_embeddings + 63) // 64, 12),
    }[table.layout]
    if rows.dtype != torch.uint8 or tuple(rows.shape) != wanted:
        raise ValueError(f"rows must be uint8 of shape {wanted}; got {rows.dtype} {shape(rows)}")
    if table.layout == "row_remap":
        _check_remap(table)
    bits = mask_bits(table)
    if dim % 8 and bool((bits[:, -1] >> (dim % 8)).any()):
        raise ValueError(f"rows has mask bits past embedding_dim {dim}")
    index, values_shape = index_from_bits(bits, dim, table.layout)
    if tuple(table.values.shape) != values_shape:
        raise ValueError(
            f"values must have shape {values_shape}, what the mask keeps; got {shape(table.values)}"
        )
    for name, own, right in zip(("rows", "bases", "starts", "columns"), table.index, index, strict=True):
        if (own is None) != (right is None) or (own is not None and not torch.equal(own, right)):
            raise ValueError(
                f"{name} does not fit the mask: its starts are not the running sum of what rows keep"
            )


def _check_remap(table: MaskedTable) -> None:
    per_block = _bits(table.rows[:, :8], 64).sum(1)
    kept_rows = int(per_block.sum())
    wanted = (kept_rows + 1, (kept_rows + 1 + BASE_ROWS - 1) // BASE_ROWS)
    got = (table.starts.numel(), table.bases.numel())
    if got != wanted:
        raise ValueError(f"starts and bases must have {wanted} elements for {kept_rows} kept rows; got {got}")
    if not torch.equal(_unsigned(table.rows[:, 8:]), per_block.cumsum(0) - per_block):
        raise ValueError("rows does not count the kept rows before each block")
    if table.columns.numel() != table.values.numel():
        raise ValueError(
            f"columns must have one element for each of {table.values.numel()} values; "
            f"got {table.columns.numel()}"
        )
    starts = _remap_starts(table)
    if int(starts[0]) != 0 or bool((starts.diff() < 1).any()) or int(starts[-1]) != table.columns.numel():
        raise ValueError("starts must ascend from 0 to the number of values")
    if table.columns.numel() and int(table.columns.max()) >= table.embedding_dim:
        raise ValueError(
            f"columns must be below embedding_dim {table.embedding_dim}; got {int(table.columns.max())}"
        )


def magnitude_mask(weight: Tensor, density: float) -> Tensor:
    """The ``round(density * numel)`` largest magnitudes, exactly; of equal ones the first. Bool, by radix
    selection over chunks: no sort, no copy of the weight."""
    count = round(density * weight.numel())
    flat = weight.detach().reshape(-1)
    wide = torch.float64 if flat.dtype == torch.float64 else torch.float32
    integer, levels = (torch.int64, 4) if wide == torch.float64 else (torch.int32, 2)
    chunks = range(0, flat.numel(), CHUNK_ELEMENTS)

    def keys(begin: int) -> Tensor:  # non-negative floats sort like their bits
        return flat[begin : begin + CHUNK_ELEMENTS].to(wide).abs().view(integer)

    if count <= 0:
        return torch.zeros_like(weight, dtype=torch.bool)
    threshold, missing = 0, count  # `missing` of those whose key begins with `threshold` are kept
    for level in reversed(range(levels)):
        shift = 16 * level
        histogram = torch.zeros(65536, dtype=torch.int64, device=flat.device)
        for begin in chunks:
            key = keys(begin)
            prefix = key >> (shift + 16) if level + 1 < levels else torch.zeros_like(key)
            histogram += torch.bincount((key[prefix == threshold] >> shift) & 0xFFFF, minlength=65536)
        above = histogram.flip(0).cumsum(0).flip(0) - histogram  # in higher buckets
        digit = int(((above < missing) & (above + histogram >= missing)).nonzero()[0])
        missing -= int(above[digit])
        threshold = threshold << 16 | digit
    mask = torch.empty(flat.numel(), dtype=torch.bool, device=flat.device)
    for begin in chunks:
        key = keys(begin)
        equal = key == threshold
        first = equal & (equal.cumsum(0) <= missing)
        mask[begin : begin + CHUNK_ELEMENTS] = (key > threshold) | first
        missing -= int(first.sum())
    return mask.view(weight.shape)


def row_magnitude_mask(weight: Tensor, kept: int) -> Tensor:
    """The ``kept`` largest magnitudes of each row, bool."""
    mask = torch.zeros_like(weight, dtype=torch.bool)
    for begin, end in row_chunks(*weight.shape):
        top = weight[begin:end].detach().abs().topk(kept, dim=1).indices
        mask[begin:end].scatter_(1, top, True)
    return mask


def random_mask_bits(
    num_rows: int, dim: int, density: float, layout: str, generator: torch.Generator | None = None
) -> Tensor:
    """Bits of a mask that keeps ``round(density * V * D)`` elements chosen evenly (fixed_k:
    ``round(density * D)`` in each row), drawn in chunks from torch's generator."""
    bits = torch.empty(num_rows, (dim + 7) // 8, dtype=torch.uint8)
    if layout == "fixed_k":
        for begin, end in row_chunks(num_rows, dim):
            draw = torch.rand(end - begin, dim, generator=generator)
            bits[begin:end] = pack_bits(row_magnitude_mask(draw, round(density * dim)))
        return bits
    count = round(density * num_rows * dim)
    for begin, end in row_chunks(num_rows, dim):
        bits[begin:end] = pack_bits(torch.rand(end - begin, dim, generator=generator) < density)
    excess = int(row_counts(bits).sum()) - count
    # Even choice given the number kept, so flipping an even choice of `excess` leaves it even.
    flat = bits.view(-1)
    while excess:
        drawn = torch.randint(num_rows * dim, (2 * abs(excess) + 1024,), generator=generator)
        byte = drawn // dim * bits.shape[1] + drawn % dim // 8
        bit = (drawn % dim % 8).to(torch.uint8)
        set_ = ((flat[byte] >> bit) & 1).bool()
        flippable = torch.unique(drawn[set_ == (excess > 0)])
        flippable = flippable[torch.randperm(len(flippable), generator=generator)][: abs(excess)]
        byte = flippable // dim * bits.shape[1] + flippable % dim // 8
        flip = torch.ones_like(flippable, dtype=torch.uint8) << (flippable % dim % 8).to(torch.uint8)
        # several flips may fall into one byte: they are different bits, so the sum is their union
        which, inverse = torch.unique(byte, return_inverse=True)
        change = torch.zeros(len(which), dtype=torch.int64).index_add_(0, inverse, flip.long())
        flat[which] ^= change.to(torch.uint8)
        excess -= len(flippable) if excess > 0 else -len(flippable)
    return bits


def resolve_layout(layout: str, density: float, embedding_dim: int) -> str:
    """``layout``, or for "auto" row_remap when the table is nearly empty, else bitmask.

    Raises:
        ValueError: unknown layout.
    """
    if layout == "auto":
        return "row_remap" if density < REMAP_BELOW_DENSITY and embedding_dim <= MAX_REMAP_DIM else "bitmask"
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {('auto', *LAYOUTS)}; got {layout!r}")
    return layout


def check_mask(mask: Tensor, num_rows: int, dim: int) -> None:
    check_tensor("mask", mask)
    check_dtype("mask", mask, (torch.bool,))
    if tuple(mask.shape) != (num_rows, dim):
        raise ValueError(f"mask must have the shape of weight, {(num_rows, dim)}; got {shape(mask)}")
