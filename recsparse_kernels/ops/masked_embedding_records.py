"""Masked tables repacked for inference: each row's mask beside its values, in one record.

A lookup then touches a 4-byte start and one place in memory, where `MaskedTable` touches a row header
and its values. Records are made of elements of the width of a value:

    record of row i   ceil(ceil(D/8) / element size) elements of mask bits, then the row's values
    starts [V]        int32 read as unsigned: first element of the record, counted from bases[i // 65536]

In layout fixed_k all records are equally long and there are no starts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import masked_embedding as reference
from ._backend import Op
from .masked_embedding import EACH, MODES, check_lookup
from .masked_embedding_table import (
    MaskedTable,
    index_from_bits,
    low_starts,
    mask_bits,
    row_chunks,
    row_counts,
)

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
    ends = lengths.cumsum(0)
    total = int(ends[-1]) if V else 0
    begins = ends - lengths
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
        empty = records.new_empty(0, dtype=torch.int32)
        return MaskedRecords(like, records, empty, empty.long(), V, D, kept)
    low, bases = low_starts(begins)
    return MaskedRecords(like, records, low.to(torch.int32), bases, V, D, -1)


def masked_embedding_thaw(records: MaskedRecords) -> MaskedTable:
    """The inverse of `masked_embedding_freeze`."""
    V, D = records.num_embeddings, records.embedding_dim
    bits, begins, mask_elements = reference.record_masks(*records[:4], V, D, records.kept)
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
    V, D = records.num_embeddings, records.embedding_dim
    if records.records.dtype != _INTEGERS[records.like.element_size()]:
        wanted = _INTEGERS[records.like.element_size()]
        raise ValueError(f"records must be {wanted} for {records.like.dtype}; got {records.records.dtype}")
    bits, begins, mask_elements = reference.record_masks(*records[:4], V, D, records.kept)
    counts = row_counts(bits)
    lengths = counts + mask_elements
    if not torch.equal(begins, lengths.cumsum(0) - lengths) or int(lengths.sum()) != records.records.numel():
        raise ValueError("starts do not fit the records: they are not the running sum of what the masks keep")
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
