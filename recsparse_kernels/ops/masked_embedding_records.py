"""Masked tables repacked for inference: each row's mask beside its values, in one record.

A lookup then touches a 4-byte start and one place in memory, where `MaskedTable` touches a row header
and its values. Records are made of elements of the width of a value:

    record of row i   ceil(ceil(D/8) / element size) elements of mask bits, then the row's values
    starts [V]        int32: the low 31 bits are the first element of the record, counted from
                      bases[i // 65536]; the top bit says that the record ends in another 64-byte line

A record of at most 64 bytes does not cross a line, and a longer one begins at a line: the rows of 65536 are
placed, longest first, and what is left of their last lines is filled with shorter ones. Where that would
leave more than 1/8 empty, records stand one after the other instead. In layout fixed_k all records are
equally long, one after the other, and there are no starts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..config import place_table
from ..reference import masked_embedding as reference
from ..reference.masked_embedding import BASE_ROWS
from ._backend import Op
from .masked_embedding import EACH, MODES, check_lookup
from .masked_embedding_table import (
    MaskedTable,
    index_from_bits,
    mask_bits,
    row_chunks,
    row_counts,
)

LINE_BYTES = 64  # of a cache line
MOST_EMPTY = 8  # at most 1 / MOST_EMPTY of the records is left empty so that fewer cross a line
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _fake(like, records, starts, bases, indices, offsets, weights, V, D, kept, mode, padding_idx, last):
    if mode == EACH:
        return like.new_empty((indices.numel(), D))
    bags = indices.shape[0] if offsets is None else offsets.shape[0] - int(last)
    return like.new_empty((bags, D))


_RECORDS = Op(reference.masked_embedding_records, fake=_fake, autocast=False)


class MaskedRecords(NamedTuple):
    """A table in records, for inference. Made by `masked_embedding_freeze`.

    Attributes:
        like: no elements; its dtype is that of the values.
        records: integers of the width of a value.
        kept: k of layout fixed_k, else -1.
    """

    like: Tensor
    records: Tensor
    starts: Tensor
    bases: Tensor
    num_embeddings: int
    embedding_dim: int
    kept: int


def masked_embedding_freeze(table: MaskedTable) -> MaskedRecords:
    """Repack a bitmask or fixed_k table into records.

    Raises:
        ValueError: layout row_remap, which has no records: it is for nearly empty rows.
    """
    if table.layout == "row_remap":
        raise ValueError("table must have layout bitmask or fixed_k to be frozen; got row_remap")
    V, D = table.sizes
    values = table.values.detach().flatten()
    size = values.element_size()
    bits = mask_bits(table)
    mask_elements = -(-bits.shape[1] // size)
    counts = row_counts(bits)
    lengths = counts + mask_elements
    if table.layout == "fixed_k":
        begins, total = lengths.cumsum(0) - lengths, int(lengths.sum())
    else:
        begins, bases, total = _place(lengths, LINE_BYTES // size)
    records = torch.zeros(total, dtype=_INTEGERS[size], device=values.device)
    record_bytes, whole = records.view(torch.uint8), values.view(_INTEGERS[size])
    byte = torch.arange(bits.shape[1], device=values.device)
    first_value = 0
    for begin, end in row_chunks(V, D):
        record_bytes[(begins[begin:end] * size).unsqueeze(1) + byte] = bits[begin:end]
        own = counts[begin:end]
        nnz = int(own.sum())
        at = torch.arange(nnz, device=values.device)
        at += (begins[begin:end] + mask_elements - (own.cumsum(0) - own)).repeat_interleave(own)
        records[at] = whole[first_value : first_value + nnz]
        first_value += nnz
    like = values.new_empty(0)
    if table.layout == "fixed_k":
        kept = table.values.shape[1]
        place_table(records)
        empty = records.new_empty(0, dtype=torch.int32)
        return MaskedRecords(like, records, empty, empty.long(), V, D, kept)
    low = begins - bases.repeat_interleave(BASE_ROWS)[:V]
    starts = low | _crosses_line(begins, lengths, LINE_BYTES // size).long() << 31
    starts = _as_int32(starts)
    place_table(records, starts)
    return MaskedRecords(like, records, starts, bases, V, D, -1)


def _as_int32(unsigned: Tensor) -> Tensor:
    return (unsigned - ((unsigned >> 31) << 32)).to(torch.int32)


def _crosses_line(begins: Tensor, lengths: Tensor, line: int) -> Tensor:
    return begins // line != (begins + lengths - 1) // line


def _place(lengths: Tensor, line: int) -> tuple[Tensor, Tensor, int]:
    """Where each record begins, where each block of 65536 rows does, and where the last one ends, in
    elements; ``line`` elements are 64 bytes.

    Raises:
        ValueError: a block takes 2^31 elements or more.
    """
    begins = torch.empty_like(lengths)
    bases = []
    position = 0
    for first in range(0, max(len(lengths), 1), BASE_ROWS):
        bases.append(position)
        block = lengths[first : first + BASE_ROWS]
        size = int(block.sum())
        position = _place_block(block, line, bases[-1], begins[first:])
        if position - bases[-1] > size + size // MOST_EMPTY:
            begins[first : first + BASE_ROWS] = bases[-1] + block.cumsum(0) - block
            position = bases[-1] + -(-size // line) * line
        if position - bases[-1] >= 1 << 31:
            raise ValueError(
                f"table must take less than 2^31 elements for any {BASE_ROWS} rows to be frozen; "
                f"rows from {first} take {position - bases[-1]}"
            )
    total = int((begins + lengths).max()) if len(lengths) else 0
    return begins, torch.tensor(bases, device=lengths.device), total


def _place_block(lengths: Tensor, line: int, position: int, begins: Tensor) -> int:
    """Fills ``begins`` for rows of these lengths from ``position`` on; returns where they end."""
    by_length = lengths.argsort(stable=True)
    counts = torch.bincount(lengths).tolist()  # rows still to be placed, of each length
    first = (lengths.bincount().cumsum(0) - lengths.bincount()).tolist()  # of them in by_length
    longest = len(counts) - 1
    while True:
        while longest >= 0 and counts[longest] == 0:
            longest -= 1
        if longest < 0:
            return position
        # what shares the longest row's last line: the longest that fit, one after the other
        group, room = [longest], -longest % line
        left = {longest: counts[longest] - 1}
        fits = min(room, longest)
        while fits > 0:
            if left.setdefault(fits, counts[fits]) > 0:
                group.append(fits)
                left[fits] -= 1
                room -= fits
            fits = min(room, fits if left[fits] > 0 else fits - 1)
        times = min(counts[length] // group.count(length) for length in set(group))
        span = -(-longest // line) * line
        at = position + span * torch.arange(times, device=lengths.device)
        for length in group:
            begins[by_length[first[length] : first[length] + times]] = at
            at = at + length
            first[length] += times
            counts[length] -= times
        position += span * times


def masked_embedding_thaw(records: MaskedRecords) -> MaskedTable:
    """The inverse of `masked_embedding_freeze`."""
    V, D = records.num_embeddings, records.embedding_dim
    bits, begins, mask_elements = reference.record_masks(*records)
    index, shape = index_from_bits(bits, D, "bitmask" if records.kept < 0 else "fixed_k")
    counts = row_counts(bits)
    values = torch.empty(int(counts.sum()), dtype=records.like.dtype, device=records.like.device)
    first_value = 0
    for begin, end in row_chunks(V, D):
        own = counts[begin:end]
        nnz = int(own.sum())
        at = torch.arange(nnz, device=values.device)
        at += (begins[begin:end] + mask_elements - (own.cumsum(0) - own)).repeat_interleave(own)
        values[first_value : first_value + nnz] = records.records[at].view(values.dtype)
        first_value += nnz
    return MaskedTable(values.view(shape), *index, V, D)


def check_records(records: MaskedRecords) -> int:
    """The number of values; raises ValueError unless the records are those of `masked_embedding_freeze`."""
    V = records.num_embeddings
    if records.records.dtype != _INTEGERS[records.like.element_size()]:
        wanted = _INTEGERS[records.like.element_size()]
        raise ValueError(f"records must be {wanted} for {records.like.dtype}; got {records.records.dtype}")
    line = LINE_BYTES // records.like.element_size()
    size = records.records.numel()
    begins, mask_elements = reference.record_begins(*records)
    if V and not 0 <= int(begins.min()) <= int(begins.max()) <= size - mask_elements:
        raise ValueError(f"starts do not fit the records: they pass the {size} elements there are")
    bits, _, _ = reference.record_masks(*records)
    counts = row_counts(bits)
    lengths = counts + mask_elements
    order = begins.argsort()
    ends = (begins + lengths)[order]
    if V and (bool((ends[:-1] > begins[order][1:]).any()) or int(ends[-1]) != size):
        raise ValueError("starts do not fit the records: the masks do not keep what there is room for")
    if records.kept < 0 and not torch.equal(records.starts < 0, _crosses_line(begins, lengths, line)):
        raise ValueError("starts do not fit the records: they do not say which cross a line")
    return int(counts.sum())


def masked_embedding_frozen(input: Tensor, records: MaskedRecords, *, backend: str | None = None) -> Tensor:
    """`masked_embedding` on records; not differentiable."""
    input, _, _, _ = check_lookup(input, records.like, records.num_embeddings)
    output = _RECORDS(*records[:4], input, None, None, *records[4:], EACH, -1, False, backend=backend)
    return output.view(*input.shape, records.embedding_dim)


def masked_embedding_bag_frozen(
    input: Tensor,
    records: MaskedRecords,
    offsets: Tensor | None = None,
    mode: str = "mean",
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """`masked_embedding_bag` on records; not differentiable."""
    input, offsets, weights, padding = check_lookup(
        input, records.like, records.num_embeddings, padding_idx, offsets, per_sample_weights, mode,
        include_last_offset, bags=True,
    )  # fmt: skip
    weights = weights.detach() if weights is not None else None
    return _RECORDS(
        *records[:4], input, offsets, weights, *records[4:], MODES[mode], padding, include_last_offset,
        backend=backend,
    )  # fmt: skip
