"""Another mask for a packed table, in place: values and moments move within their own memory.

Elements that go are squeezed out from the front to the back, then the table is spread out again from the
back to the front, with gaps where elements come. Each pass holds one block of rows. The Parameter, its
memory and the index keep their addresses, so optimizers, DistributedDataParallel and captured graphs go on.
"""

import dataclasses
import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from ..ops.masked_embedding_table import _low_bytes, index_from_bits, pack_bits, row_counts, unpack_bits
from ..reference.masked_embedding import BASE_ROWS, _bits, _unsigned
from .selection import Selection

BLOCK_ELEMENTS = 1 << 20  # of the table, looked at together


class PackedRows:
    """The rows of a packed layer, a block at a time."""

    def __init__(self, layer):
        self.layer = layer
        self.num_rows, self.dim = layer.num_embeddings, layer.embedding_dim
        # a power of two, so that no block crosses a base of the row starts
        self.block = min(BASE_ROWS, 1 << max(0, (BLOCK_ELEMENTS // self.dim).bit_length() - 1))

    def blocks(self) -> list[tuple[int, int]]:
        return [(b, min(b + self.block, self.num_rows)) for b in range(0, self.num_rows, self.block)]

    def start(self, row: int) -> int:
        """Where the row begins in ``values``."""
        layer = self.layer
        if row == self.num_rows:
            return layer.nnz
        if layer.layout == "bitmask":
            return int(layer.bases[row // BASE_ROWS]) + int(_unsigned(layer.rows[row, -4:]))
        return self._remap_start(self._rank(row))

    def bits(self, begin: int, end: int) -> Tensor:
        """Which elements of rows ``begin:end`` are kept, bool ``[rows, D]``."""
        layer = self.layer
        if layer.layout == "bitmask":
            return _bits(layer.rows[begin:end, : (self.dim + 7) // 8], self.dim)
        first, last = self._rank(begin), self._rank(end)
        blocks = layer.rows[begin // 64 : (end + 63) // 64, :8]
        skip = begin - begin // 64 * 64
        occupied = _bits(blocks, 64).flatten()[skip : skip + end - begin]
        ranks = torch.arange(first, last + 1, device=occupied.device)
        starts = layer.bases[ranks // BASE_ROWS] + (layer.starts[first : last + 1].long() & 0xFFFFFFFF)
        row = occupied.nonzero().squeeze(1).repeat_interleave(starts.diff())
        out = torch.zeros(end - begin, self.dim, dtype=torch.bool, device=occupied.device)
        out[row, layer.columns[int(starts[0]) : int(starts[-1])].long()] = True
        return out

    def _rank(self, row: int) -> int:
        """How many rows before this one hold anything (row_remap)."""
        if row == self.num_rows:
            return len(self.layer.starts) - 1
        block = self.layer.rows[row // 64]
        return int(_unsigned(block[8:])) + int(_bits(block[None, :8], 64)[0, : row % 64].sum())

    def _remap_start(self, rank: int) -> int:
        return int(self.layer.bases[rank // BASE_ROWS]) + (int(self.layer.starts[rank]) & 0xFFFFFFFF)

    def digest(self) -> str:
        """Of the mask."""
        digest = hashlib.blake2b(repr((self.num_rows, self.dim)).encode(), digest_size=16)
        for begin, end in self.blocks():
            digest.update(pack_bits(self.bits(begin, end)).cpu().numpy().tobytes())
        return digest.hexdigest()


@dataclasses.dataclass
class Moving:
    """A tensor packed like ``values`` that moves along.

    Args:
        returned: elements that were dropped and came back at once: keep (True) or become 0.
        fresh: gradient of newly kept elements to what they hold; None: 0.
    """

    tensor: Tensor
    returned: bool = True
    fresh: Callable[[Tensor], Tensor] | None = None


@dataclasses.dataclass
class Decision:
    """What leaves and what comes.

    Args:
        left: mask bits without what is dropped, ``[V, ceil(D/8)]``; `change_mask` makes the new mask of them.
        grow: what is regrown, by position in the dense table.
        dropped: how many leave.
    """

    left: Tensor
    grow: Selection
    dropped: int

    def block(self, packed: PackedRows, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Of rows ``begin:end``: what is left, and what is regrown, bool ``[rows, D]``."""
        left = _bits(self.left[begin:end], packed.dim)
        return left, self.grow.mask(0, begin * packed.dim, end * packed.dim).view(left.shape)


def without(packed: PackedRows, drop: Selection) -> Tensor:
    """Mask bits after dropping a selection of ``values``."""
    like = packed.layer.values
    left = torch.empty(packed.num_rows, (packed.dim + 7) // 8, dtype=torch.uint8, device=like.device)
    for begin, end in packed.blocks():
        kept = packed.bits(begin, end)
        kept[kept.clone()] = ~drop.mask(0, packed.start(begin), packed.start(end))
        left[begin:end] = pack_bits(kept)
    return left


def change_mask(
    packed: PackedRows, decision: Decision, moving: list[Moving], gradient: Callable[[Tensor], Tensor]
) -> int:
    """Carry out a decision that keeps the number of elements. Gives how many were dropped and came back.

    Args:
        gradient: of the rows asked for, ``[n, D]``; only for `Moving.fresh`.
    """
    layer, blocks = packed.layer, packed.blocks()
    new_bits = decision.left
    flat = [move.tensor.view(-1) for move in moving]
    ends, returned, end_of_left = [], 0, 0
    for begin, end in blocks:  # squeeze: writes stay behind what is read
        kept, (left, grown) = packed.bits(begin, end), decision.block(packed, begin, end)
        where = slice(packed.start(begin), packed.start(end))
        new_bits[begin:end] = pack_bits(left | grown)
        stays, came_back = (left | grown)[kept], (~left & grown)[kept]
        returned += int(came_back.sum())
        count = int(stays.sum())
        for move, tensor in zip(moving, flat, strict=True):
            part = tensor[where]
            if not move.returned:
                part = part.masked_fill(came_back, 0)
            tensor[end_of_left : end_of_left + count] = part[stays]
        end_of_left += count
        ends.append(end_of_left)
    write = layer.nnz
    for i in reversed(range(len(blocks))):  # spread: reads stay ahead of what is written
        begin, end = blocks[i]
        kept, new = packed.bits(begin, end), unpack_bits(new_bits[begin:end], packed.dim)
        old = (kept & new)[new]
        read = slice(ends[i - 1] if i else 0, ends[i])
        place = slice(write - len(old), write)
        fresh = None
        for move, tensor in zip(moving, flat, strict=True):
            part = tensor.new_zeros(len(old))
            part[old] = tensor[read]
            if move.fresh is not None:
                if fresh is None:
                    ids = torch.arange(begin, end, device=new.device)
                    fresh = gradient(ids)[new & ~kept]
                part[~old] = move.fresh(fresh).to(part.dtype)
            tensor[place] = part
        write = place.start
    _write_index(packed, new_bits)
    return returned


def _write_index(packed: PackedRows, bits: Tensor) -> None:
    layer = packed.layer
    if layer.layout != "bitmask":  # which rows hold anything changes, and with it the sizes
        index, _ = index_from_bits(bits, packed.dim, layer.layout)
        for name, tensor in zip(("rows", "bases", "starts", "columns"), index, strict=True):
            if tensor is not None and getattr(layer, name).shape == tensor.shape:
                getattr(layer, name).copy_(tensor)
            else:
                layer._set_buffer(name, tensor)
        return
    start = 0
    for begin, end in packed.blocks():
        if begin % BASE_ROWS == 0:
            layer.bases[begin // BASE_ROWS] = base = start
        counts = row_counts(bits[begin:end])
        starts = counts.cumsum(0) - counts + (start - base)
        layer.rows[begin:end, :-4] = bits[begin:end]
        layer.rows[begin:end, -4:] = _low_bytes(starts, 4)
        start += int(counts.sum())
