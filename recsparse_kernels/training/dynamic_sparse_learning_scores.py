"""Gradients of a packed table's elements, stored or not, for chosen rows.

A `GradientTap` on a layer keeps what the backward pass brings to the layer's outputs; from that the
gradient of whole rows is computed when somebody asks, some rows at a time. No ``[V, D]`` is made here.
"""

import dataclasses
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops.masked_embedding import _BAG, MODES
from ..reference.masked_embedding import EACH, MAX, _bag_scale, _bags, _lookup_gradients
from ._method import Tap, all_reduce_sum, is_distributed
from .selection import select_largest

LOOKUPS_TOGETHER = 1 << 16  # gradients of lookups gathered at a time: 16 MiB at D = 64


@dataclasses.dataclass
class _Lookups:
    """Gradient of row i: the sum over lookups j of row i of ``scale[j] * grad[source[j]]``."""

    rows: Tensor  # [N] ascending
    source: Tensor  # [N]
    scale: Tensor | None  # [N]
    grad: Tensor  # [M, D]

    def touched(self) -> Tensor:
        return self.rows.unique_consecutive()

    def gradient(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        begin, end = torch.searchsorted(self.rows, ids), torch.searchsorted(self.rows, ids, right=True)
        count = end - begin
        owner = torch.arange(len(ids), device=ids.device).repeat_interleave(count)
        at = torch.arange(len(owner), device=ids.device)
        at += (begin - (count.cumsum(0) - count)).repeat_interleave(count)
        out = self.grad.new_zeros(len(ids), self.grad.shape[1], dtype=dtype)
        for some, to in zip(at.split(LOOKUPS_TOGETHER), owner.split(LOOKUPS_TOGETHER), strict=True):
            part = self.grad[self.source[some]].to(dtype)
            if self.scale is not None:
                part *= self.scale[some].to(dtype).unsqueeze(1)
            if out.device.type == "cpu":
                out.index_add_(0, to, part)  # in order
            else:
                out.index_put_((to,), part, accumulate=True)  # sorted first: no float atomics
        return out


@dataclasses.dataclass
class _AllRows:
    grad: Tensor  # [V, D], which autograd made for the layer's dense output

    def touched(self) -> None:
        return None

    def gradient(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return self.grad[ids].to(dtype)


@dataclasses.dataclass
class _Products:
    grad: Tensor  # [B, V]
    input: Tensor  # [B, D]

    def touched(self) -> None:
        return None

    def gradient(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return self.grad[:, ids].to(dtype).T @ self.input.to(dtype)


class GradientTap(Tap):
    """Attached to a layer as ``layer.tap``: records the gradients of its outputs."""

    def __init__(self, layer):
        self._describe = _describer(layer)
        self.pieces: list[_Lookups | _AllRows | _Products] = []

    def __call__(self, output: Tensor, op: str, *inputs) -> None:
        output.register_hook(lambda grad: self.pieces.append(self._describe(grad.detach(), op, *inputs)))


def _describer(layer) -> Callable:
    """What becomes of an output's gradient; holds the layer weakly, as the layer holds the tap."""
    import weakref

    held = weakref.ref(layer)

    def describe(grad: Tensor, op: str, *inputs):
        layer = held()
        if op == "all_rows":
            return _AllRows(grad)
        if op == "matmul_t":
            input = inputs[0].detach().clone()  # perhaps a weight, which the optimizer steps before we look
            return _Products(grad.reshape(-1, grad.shape[-1]), input.reshape(-1, input.shape[-1]))
        if op == "propagate":
            adjacency = inputs[0].detach()
            return _lookups(
                layer, grad, adjacency.col_indices(), adjacency.crow_indices(), adjacency.values(),
                MODES["sum"], True, None, False,
            )  # fmt: skip
        if op == "lookup":
            return _lookups(
                layer, grad, inputs[0], None, None, EACH, False, layer.padding_idx, layer.scale_grad_by_freq
            )
        input, offsets, weights = inputs
        return _lookups(
            layer, grad, input, offsets, weights, MODES[layer.mode], layer.include_last_offset,
            layer.padding_idx, layer.scale_grad_by_freq,
        )  # fmt: skip

    return describe


def _lookups(layer, grad, indices, offsets, weights, mode, last, padding_idx, by_freq) -> _Lookups:
    padding = -1 if padding_idx is None else padding_idx
    grad = grad.reshape(-1, layer.embedding_dim)
    indices = indices.long()
    flat, bag, first = _bags(indices, offsets, mode, last, layer.num_embeddings)
    if weights is not None:
        weights = weights.detach()
    if mode == MAX:  # each element's gradient goes to one lookup of its bag
        _, argmax = _BAG(
            layer.values.detach(), *layer.table.index, indices.contiguous(), offsets, None,
            *layer.table.sizes, mode, padding, last, False, False,
        )  # fmt: skip
        grad = _lookup_gradients(grad, flat, bag, first, None, argmax, mode, padding, False)
        bag, scale = torch.arange(len(flat), device=flat.device), None
    else:
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        scale = _bag_scale(flat, bag, len(first), mode, padding, wide)[bag]
        if weights is not None:
            scale = scale * weights.reshape(-1)[: len(flat)].to(wide)
        if by_freq:
            _, which, count = torch.unique(flat, return_inverse=True, return_counts=True)
            scale = scale / count[which].to(wide)
        if mode == EACH and not by_freq:
            scale = None
    rows, order = flat.sort(stable=True)
    if padding >= 0:
        counted = rows != padding
        rows, order = rows[counted], order[counted]
    return _Lookups(rows, bag[order], None if scale is None else scale[order], grad)


class Gradients:
    """Mean over the ranks of the sum of some pieces: what one update's scores are made from."""

    def __init__(self, pieces: list, num_rows: int, dim: int, dtype: torch.dtype, device, group=None):
        self.num_rows, self.dim, self.dtype, self.device = num_rows, dim, dtype, device
        self._pieces, self._group = pieces, group
        self._touched = self._all_touched()

    def _all_touched(self) -> Tensor | None:
        """Rows that have a gradient on any rank, ascending; None means all."""
        parts = [piece.touched() for piece in self._pieces]
        everywhere = any(part is None for part in parts)
        if not is_distributed(self._group):
            if everywhere:
                return None
            empty = torch.empty(0, dtype=torch.int64, device=self.device)
            return torch.cat([empty, *parts]).unique()
        seen = torch.full((self.num_rows,), everywhere, dtype=torch.uint8, device=self.device)
        for part in parts:
            if part is not None:
                seen[part] = 1
        dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=self._group)
        return None if bool(seen.all()) else seen.nonzero().squeeze(1)

    def touched(self, begin: int, end: int) -> Tensor:
        """Those of the rows ``begin:end`` that have a gradient."""
        if self._touched is None:
            return torch.arange(begin, end, device=self.device)
        low, high = torch.searchsorted(self._touched, torch.tensor([begin, end], device=self.device)).tolist()
        return self._touched[low:high]

    def of(self, ids: Tensor) -> Tensor:
        """``[len(ids), D]``. Ranks must ask for the same rows in the same order."""
        total = torch.zeros(len(ids), self.dim, dtype=self.dtype, device=self.device)
        for piece in self._pieces:
            total += piece.gradient(ids, self.dtype)
        if len(ids) and is_distributed(self._group):
            all_reduce_sum([total], self._group)
            total /= dist.get_world_size(self._group)
        return total


@dataclasses.dataclass
class CandidateRows:
    """Sums (or moving averages) of gradients of at most ``limit`` rows, those whose sums are longest.

    Rows of little gradient are forgotten when there are more: a growth score needs the largest only.
    """

    rows: Tensor  # [C] ascending
    grads: Tensor  # [C, D]

    @staticmethod
    def empty(dim: int, dtype: torch.dtype, device) -> "CandidateRows":
        ids = torch.empty(0, dtype=torch.int64, device=device)
        return CandidateRows(ids, torch.empty(0, dim, dtype=dtype, device=device))

    def touched(self) -> Tensor:
        return self.rows

    def gradient(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        out = self.grads.new_zeros(len(ids), self.grads.shape[1])
        if len(self.rows):
            at = torch.searchsorted(self.rows, ids).clamp_(max=len(self.rows) - 1)
            here = self.rows[at] == ids
            out[here] = self.grads[at[here]]
        return out.to(dtype)

    def merged(
        self, new: Gradients, keep: float, add: float, limit: int, together: int, seed: int
    ) -> "CandidateRows":
        """``keep`` times this plus ``add`` times new gradients, of the ``limit`` rows longest in that."""
        fresh = new.touched(0, new.num_rows)
        ids = torch.cat([self.rows, fresh]).unique()

        def total(some: Tensor) -> Tensor:
            return self.gradient(some, new.dtype) * keep + new.of(some) * add

        if len(ids) > limit:
            lengths = torch.cat([total(some).square().sum(1) for some in ids.split(together)])
            chosen = select_largest(lengths, limit, seed=seed, names=["gradient lengths of candidate rows"])
            ids = ids[chosen.mask(0)]
        grads = torch.cat([total(some) for some in ids.split(together)]) if len(ids) else self.grads[:0]
        return CandidateRows(ids, grads)
