"""Regrowth by gradient (RigL) for fixed fan-in layers: a block of labels at a time.

The gradient of a block's dense weight, ``[labels, I]``, is computed from what the last backward passes
left: the gradient of the logits, or, where a fused loss never made those, the logits once more. The cost is
that of a dense layer's weight gradient, at update steps only; the memory that of a block.
"""

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor

from .. import ops
from ..nn import FixedFanInLinear
from ..ops.fan_in import LOSSES, REDUCTIONS
from ..reference.fan_in import _group_scores, _hash, _loss_terms, _positive_rows, _scale, _targets
from ._method import Tap, all_reduce_sum, is_distributed
from .selection import ScoreStream, select_largest

BLOCK_ELEMENTS = 1 << 20  # of a block's dense weight


@dataclasses.dataclass
class _Logits:
    grad: Tensor  # [B, O]
    input: Tensor  # [B, I]

    def tensors(self) -> tuple[Tensor, ...]:
        return self.grad, self.input

    def gradient(self, layer: FixedFanInLinear, labels: slice) -> Tensor:
        return self.grad[:, labels].float().T @ self.input.float()


@dataclasses.dataclass
class _Loss:
    """The loss of a batch; its gradient is taken at the weights of the moment of rewiring."""

    grad: Tensor  # of the loss, scalar
    input: Tensor
    offsets: Tensor
    positives: Tensor
    kind: str
    reduction: str

    def tensors(self) -> tuple[Tensor, ...]:
        return self.grad, self.input

    def gradient(self, layer: FixedFanInLinear, labels: slice) -> Tensor:
        rows = slice(labels.start // layer.group_size, -(-labels.stop // layer.group_size))
        bias = None if layer.bias is None else layer.bias.detach()[labels]
        logits = ops.fan_in_linear(
            self.input.to(layer.packed_weight.dtype), layer.packed_weight.detach()[labels], layer.indices[rows],
            bias, group_size=layer.group_size,
        ).float()  # fmt: skip
        row = _positive_rows(self.offsets, self.positives, len(self.input), layer.out_features)
        targets = _targets(logits, row, self.positives, labels.start)
        scale = _scale(REDUCTIONS[self.reduction], len(self.input), layer.out_features)
        grad = _loss_terms(logits, targets, LOSSES[self.kind])[1] * (self.grad.float() * scale)
        return grad.T @ self.input.float()


class LossTap(Tap):
    """Attached to a layer as ``layer.tap``: keeps what the gradient of its dense weight follows from."""

    def __init__(self):
        self.pieces: list[_Logits | _Loss] = []

    def __call__(self, output: Tensor | None, op: str, input: Tensor, *rest) -> None:
        input = input.detach().reshape(-1, input.shape[-1])

        def note(grad: Tensor) -> None:
            grad, held = grad.detach(), input.clone()  # perhaps a weight, stepped before we look
            if op == "linear":
                self.pieces.append(_Logits(grad.reshape(-1, grad.shape[-1]), held))
            else:
                (offsets, labels), kind, reduction = rest
                self.pieces.append(_Loss(grad, held, offsets, labels, kind, reduction))

        if output is None:
            note(torch.ones((), device=input.device))
        else:
            output.register_hook(note)


def check_pieces(name: str, pieces: list) -> None:
    """ValueError where a gradient would not be finite: before anything is changed."""
    for piece in pieces:
        for tensor in piece.tensors():
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"{name}: gradients must be finite; got NaN or infinity in the last batch")


def rewire_by_gradient(
    layer: FixedFanInLinear,
    pieces: list,
    *,
    threshold: float | None,
    fraction: float | None,
    scope: str,
    state: list[Tensor],
    seed: int,
    group: dist.ProcessGroup | None = None,
) -> int:
    """Drop as `ops.fan_in_rewire` does; regrow, in each row of indices, where the gradient is largest.

    An input that is dropped and chosen again keeps its weight (as in RigL's code); a new one starts at 0.
    With shared inputs the score of an input is its root sum of squares over the group. Gives how many
    connections read another input than before.
    """
    weight, indices, size = layer.packed_weight.detach(), layer.indices, layer.group_size
    rows, fan_in = indices.shape

    def scores(begin: int, end: int) -> Tensor:  # of connections, by position in `indices`
        first, last = begin // fan_in, -(-end // fan_in)
        part = _row_scores(layer, first, last).view(-1)
        return part[begin - first * fan_in : end - first * fan_in]

    drop = None
    if fraction is not None and scope == "layer":
        stream = ScoreStream(rows * fan_in, lambda b, e: -scores(b, e), weight.device)
        drop = select_largest(stream, int(fraction * rows * fan_in + 0.5), seed=seed)
    step = max(1, BLOCK_ELEMENTS // max(1, layer.in_features * size))
    moved = 0
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        if threshold is not None:
            dropped = _row_scores(layer, begin, end) < threshold
        elif drop is not None:
            dropped = drop.mask(0, begin * fan_in, end * fan_in).view(-1, fan_in)
        else:
            dropped = _smallest_of_rows(_row_scores(layer, begin, end), fraction, begin, seed)
        labels = slice(begin * size, min(end * size, layer.out_features))
        grad = torch.zeros(labels.stop - labels.start, layer.in_features, device=weight.device)
        for piece in pieces:
            grad += piece.gradient(layer, labels)
        if is_distributed(group):
            all_reduce_sum([grad], group)
        fresh = _choose(_of_groups(grad, size), indices[begin:end], dropped, begin, seed)
        moved += int(fresh.sum())
        mask = fresh.repeat_interleave(size, 0)[: labels.stop - labels.start]
        for tensor in (weight, *state):
            tensor[labels].masked_fill_(mask, 0)
    return moved


def _row_scores(layer: FixedFanInLinear, first: int, last: int) -> Tensor:
    size = layer.group_size
    return _group_scores(layer.packed_weight.detach()[first * size : last * size], last - first, size)


def _ties(position: Tensor, seed: int) -> Tensor:
    """32 random bits of each position."""
    return _hash(position * -7046029254386353131 + seed) >> 32 & 0xFFFFFFFF


def _ordered(scores: Tensor, first: int, seed: int) -> Tensor:
    """Scores (at least 0) [R, n] as integers in their order, equal ones in a seeded one."""
    position = first * scores.shape[1] + torch.arange(scores.numel(), device=scores.device)
    bits = scores.float().contiguous().view(torch.int32).long()
    return (bits << 32) | _ties(position, seed).view(scores.shape)


def _smallest_of_rows(scores: Tensor, fraction: float, first: int, seed: int) -> Tensor:
    count = int(fraction * scores.shape[1] + 0.5)
    where = _ordered(scores, first, seed).topk(count, dim=1, largest=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, where, True)


def _of_groups(grad: Tensor, size: int) -> Tensor:
    """Magnitude of each input's gradient, [rows of indices, I]."""
    if size == 1:
        return grad.abs()
    square = torch.nn.functional.pad(grad.square(), (0, 0, 0, -len(grad) % size))
    return square.view(-1, size, grad.shape[1]).sum(1).sqrt()


def _choose(score: Tensor, indices: Tensor, dropped: Tensor, first: int, seed: int) -> Tensor:
    """Write the best free inputs in place of dropped ones; gives where the input is a new one."""
    columns, (rows, fan_in) = indices.long(), indices.shape
    count = dropped.sum(1, keepdim=True)
    most = int(count.max()) if rows else 0
    if most == 0:
        return torch.zeros_like(dropped)
    order = _ordered(score, first, seed + 1)
    row = torch.arange(rows, device=score.device).unsqueeze(1).expand(rows, fan_in)
    order[row[~dropped], columns[~dropped]] = -1
    best = order.topk(most, dim=1).indices
    valid = torch.arange(most, device=score.device) < count
    chosen = torch.zeros_like(score, dtype=torch.bool).scatter_(1, best, valid)
    # of several dropped connections to one input, one may come back
    slot = torch.arange(fan_in, device=score.device).expand(rows, fan_in)
    last = torch.full(score.shape, -1, device=score.device)
    last.scatter_reduce_(1, columns, torch.where(dropped, slot, -1), "amax")
    returns = dropped & chosen.gather(1, columns) & (last.gather(1, columns) == slot)
    fresh = dropped & ~returns
    chosen[row[returns], columns[returns]] = False
    indices[fresh] = best[valid & chosen.gather(1, best)].to(indices.dtype)  # as many in each row
    return fresh
