"""Rows of masked embedding tables: where they are, for every kernel of the family.

    W[i, d] = values[start(i) + rank(i, d)] if bit d of row i is set, else 0

A kernel works on a tile of N rows times BLOCK_D columns. `locate` gives what it needs of the tile:

    kept    [N, BLOCK_D] bool     is the element stored
    start   [N] int64             where in ``values`` the row begins
    within  [N, BLOCK_D] int32    the element's place after ``start``; of meaning where kept

``within`` is a running sum of the mask bits along the row. No position outside ``values`` is
ever kept, whatever the table's tensors hold.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import device_function

# layouts (reference/masked_embedding.py; the last two: ops/masked_embedding_records.py)
BITMASK = tl.constexpr(0)
FIXED_K = tl.constexpr(1)
ROW_REMAP = tl.constexpr(2)
RECORDS = tl.constexpr(3)
FIXED_RECORDS = tl.constexpr(4)

BASE_SHIFT = tl.constexpr(16)  # rows that share a 64-bit base: 2^16
MAX_BLOCK_D = 256  # wider rows are cut into tiles


@device_function
def _popcount8(x):
    """Set bits of each number in [0, 256)."""
    x = x - ((x >> 1) & 0x55)
    x = (x & 0x33) + ((x >> 2) & 0x33)
    return (x + (x >> 4)) & 0x0F


@device_function
def _uint32_at(ptr, at, valid):
    """Little-endian 32 bits from byte ``at`` [N], which may be unaligned, as int64; 0 where not valid."""
    b0 = tl.load(ptr + at, mask=valid, other=0).to(tl.int64)
    b1 = tl.load(ptr + at + 1, mask=valid, other=0).to(tl.int64)
    b2 = tl.load(ptr + at + 2, mask=valid, other=0).to(tl.int64)
    b3 = tl.load(ptr + at + 3, mask=valid, other=0).to(tl.int64)
    return b0 | (b1 << 8) | (b2 << 16) | (b3 << 24)


@device_function
def _start_at(bases_ptr, starts_ptr, i, valid):
    low = tl.load(starts_ptr + i, mask=valid, other=0).to(tl.int64) & 0xFFFFFFFF  # unsigned
    return tl.load(bases_ptr + (i >> BASE_SHIFT), mask=valid, other=0) + low


@device_function
def _remap_range(
    rows_ptr,     # [ceil(V/64), 12] uint8: which of 64 rows hold anything, how many did before them
    bases_ptr,    # [.] int64
    starts_ptr,   # [kept_rows + 1] int32, unsigned
    row, valid, nnz, kept_rows,
):  # fmt: skip
    """Where the values of each row [N] begin and end in layout row_remap."""
    block = (row >> 6) * 12
    bit = (row & 63).to(tl.int32)
    bytes_ = tl.arange(0, 8)
    occupied = tl.load(rows_ptr + block[:, None] + bytes_[None, :], mask=valid[:, None], other=0).to(tl.int32)
    below = tl.minimum(
        tl.maximum(bit[:, None] - 8 * bytes_[None, :], 0), 8
    )  # bits of the byte before the row's
    before = tl.sum(_popcount8(occupied & ((1 << below) - 1)), 1)
    here = tl.sum(tl.where(bytes_[None, :] == (bit >> 3)[:, None], occupied >> (bit & 7)[:, None], 0), 1) & 1
    rank = _uint32_at(rows_ptr, block + 8, valid) + before
    valid = valid & (here == 1) & (rank < kept_rows)
    begin = _start_at(bases_ptr, starts_ptr, rank, valid)
    end = _start_at(bases_ptr, starts_ptr, rank + 1, valid)
    valid = valid & (begin >= 0) & (begin <= end) & (end <= nnz)
    return tl.where(valid, begin, 0), tl.where(valid, end, 0)


@device_function
def _mask_and_start(
    rows_ptr, bases_ptr, starts_ptr, row, valid, D, K, nnz, LAYOUT: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    """First mask byte of each row [N], and first of its values; and whether they are in the table."""
    mask_bytes = (D + 7) // 8
    if LAYOUT == FIXED_K:
        mask_at = row * mask_bytes
        start = row * K
    elif LAYOUT == BITMASK:
        mask_at = row * (mask_bytes + 4)
        start = tl.load(bases_ptr + (row >> BASE_SHIFT), mask=valid, other=0)
        start += _uint32_at(rows_ptr, mask_at + mask_bytes, valid)
    else:  # records: the mask's elements, then the values
        mask_elements = (mask_bytes + SIZE - 1) // SIZE
        if LAYOUT == RECORDS:
            low = tl.load(starts_ptr + row, mask=valid, other=0) & 0x7FFFFFFF  # the top bit: two lines
            record = tl.load(bases_ptr + (row >> BASE_SHIFT), mask=valid, other=0) + low
        else:
            record = row * K
        valid = valid & (record >= 0) & (record <= nnz - mask_elements)
        mask_at = record * SIZE
        start = record + mask_elements
    return mask_at, start, valid & (start >= 0)


@device_function
def _bits_before(rows_ptr, mask_at, valid, columns, BLOCK_D: tl.constexpr):
    """Mask bits set in the first ``columns`` (a multiple of BLOCK_D) of each row, int32 [N]."""
    BYTES: tl.constexpr = BLOCK_D // 8
    count = tl.zeros_like(mask_at).to(tl.int32)
    for begin in range(0, columns // 8, BYTES):
        at = mask_at[:, None] + begin + tl.arange(0, BYTES)[None, :]
        count += tl.sum(_popcount8(tl.load(rows_ptr + at, mask=valid[:, None], other=0).to(tl.int32)), 1)
    return count


@device_function
def locate(
    rows_ptr,      # uint8: mask bytes and starts, by layout
    bases_ptr,     # int64, or None
    starts_ptr,    # int32 read as unsigned, or None
    columns_ptr,   # [nnz] uint8, or None
    row, valid,    # [N] int64, [N] bool
    first_column,  # of the tile, a multiple of BLOCK_D
    D, K, nnz, kept_rows,
    LAYOUT: tl.constexpr, WIDE: tl.constexpr, SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """kept, start, within of a tile (see above).

    K       values of each row in layout fixed_k, elements from record to record in fixed_records
    nnz     elements in ``values``
    WIDE    rows have more than BLOCK_D columns
    SIZE    bytes of an element; only for records
    """
    d = first_column + tl.arange(0, BLOCK_D)
    if LAYOUT == ROW_REMAP:
        begin, end = _remap_range(rows_ptr, bases_ptr, starts_ptr, row, valid, nnz, kept_rows)
        count = tl.minimum(end - begin, D).to(tl.int32)
        # most rows are empty and the others short: search the columns of each
        within = tl.full((row.shape[0], BLOCK_D), -1, tl.int32)
        for j in range(0, tl.max(count, 0)):
            column = tl.load(columns_ptr + begin + j, mask=j < count, other=0).to(tl.int32)
            within = tl.where((j < count)[:, None] & (column[:, None] == d[None, :]), j, within)
        return (within >= 0) & (d < D)[None, :], begin, within
    else:
        mask_at, start, valid = _mask_and_start(
            rows_ptr, bases_ptr, starts_ptr, row, valid, D, K, nnz, LAYOUT, SIZE
        )
        at = mask_at[:, None] + (d >> 3)[None, :]
        bytes_ = tl.load(rows_ptr + at, mask=valid[:, None] & (d < D)[None, :], other=0).to(tl.int32)
        bits = (bytes_ >> (d & 7)[None, :]) & 1
        within = tl.cumsum(bits, 1) - bits
        if WIDE:
            within += _bits_before(rows_ptr, mask_at, valid, first_column, BLOCK_D)[:, None]
        room = tl.minimum(tl.maximum(nnz - start, 0), 2147483647).to(tl.int32)
        return (bits == 1) & (within < room[:, None]), start, within


@device_function
def read_rows(
    values_ptr, rows_ptr, bases_ptr, starts_ptr, columns_ptr, row, valid, first_column, D, K, nnz, kept_rows,
    LAYOUT: tl.constexpr, WIDE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The tile of W, [N, BLOCK_D] in the dtype of ``values``: 0 where nothing is kept, the row is not valid,
    or the column is past D."""
    SIZE: tl.constexpr = values_ptr.dtype.element_ty.primitive_bitwidth // 8
    kept, start, within = locate(
        rows_ptr, bases_ptr, starts_ptr, columns_ptr, row, valid, first_column, D, K, nnz, kept_rows,
        LAYOUT, WIDE, SIZE, BLOCK_D,
    )  # fmt: skip
    return tl.load((values_ptr + start)[:, None] + within, mask=kept, other=0.0)


@device_function
def bag_range(offsets_ptr, bag, bags, entries, N, L):
    """First lookup of each bag and the one after its last, int64, within [0, N] whatever the offsets hold."""
    if offsets_ptr is None:
        begin = bag * L
        end = begin + L
    else:
        begin = tl.load(offsets_ptr + bag, mask=bag < bags, other=0).to(tl.int64)
        has_end = bag + 1 < entries  # the last bag may end with the indices
        end = tl.load(offsets_ptr + bag + 1, mask=has_end, other=0).to(tl.int64)
        end = tl.where(has_end, end, N)
        begin = tl.maximum(begin, 0)
        end = tl.minimum(end, N)
    return begin, tl.where(bag < bags, end, begin)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


class Table(NamedTuple):
    """A table as the kernels take it: ``*tensors`` first, ``*sizes`` later, then the constants ``**tile``."""

    tensors: tuple  # rows, bases, starts, columns
    sizes: tuple[int, int, int, int]  # D, K, nnz, kept_rows
    layout: int

    def tile_of(self, max_columns: int) -> dict:
        """Constants of tiles with all columns of a row up to that many; at least 16, which `tl.dot` wants."""
        dim = self.sizes[0]
        block = min(max(triton.next_power_of_2(dim), 16), max_columns)
        return dict(LAYOUT=self.layout, WIDE=dim > block, BLOCK_D=block)

    @property
    def tile(self) -> dict:
        return self.tile_of(MAX_BLOCK_D)


def table_of(
    values: Tensor,
    rows: Tensor,
    bases: Tensor | None,
    starts: Tensor | None,
    columns: Tensor | None,
    num_embeddings: int,
    embedding_dim: int,
) -> Table:
    """The table of these tensors.

    Raises:
        ValueError: tensors whose sizes contradict each other, which kernels would read past the end of.
    """
    mask_bytes = (embedding_dim + 7) // 8
    kept, kept_rows, bases_needed = 0, 0, 0
    if columns is not None:
        layout, wanted = ROW_REMAP.value, ((num_embeddings + 63) // 64, 12)
        kept_rows = starts.numel() - 1
        bases_needed = -(-starts.numel() >> 16)
        if columns.numel() != values.numel():
            raise ValueError(
                f"columns must have one element a value, {values.numel()}; got {columns.numel()}"
            )
    elif values.dim() == 2:
        layout, wanted = FIXED_K.value, (num_embeddings, mask_bytes)
        kept = values.shape[1]
    else:
        layout, wanted = BITMASK.value, (num_embeddings, mask_bytes + 4)
        bases_needed = -(-num_embeddings >> 16)
    if tuple(rows.shape) != wanted:
        raise ValueError(
            f"rows must have shape {wanted}; got {tuple(rows.shape)}: the table contradicts itself"
        )
    if bases is not None and bases.numel() < bases_needed:
        raise ValueError(
            f"bases must have {bases_needed} elements; got {bases.numel()}: the table contradicts itself"
        )
    tensors = tuple(t if t is None else t.contiguous() for t in (rows, bases, starts, columns))
    return Table(tensors, (embedding_dim, kept, values.numel(), kept_rows), layout)


def key_dtype(num_embeddings: int) -> torch.dtype:
    """A dtype that holds the row numbers: narrower keys sort in half the passes."""
    return torch.int32 if num_embeddings < 2**31 else torch.int64
