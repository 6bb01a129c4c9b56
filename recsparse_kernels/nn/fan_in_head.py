"""The head that the literature puts around a fixed fan-in layer, for accuracy.

Source: intermediate layer: Navigating Extremes (arXiv 2411.03171); dense block for the most frequent
labels and label order for shared inputs: HASTE (arXiv 2606.01117).
"""

import torch
from torch import Tensor, nn

from ..config import get_check_indices
from ..ops._check import INDEX_DTYPES, check_device, check_dtype, check_shape, in_autocast
from ..ops.fan_in import LOSSES, REDUCTIONS
from .fan_in import FixedFanInLinear

ACTIVATIONS = {None: nn.Identity, "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


class FanInHead(nn.Module):
    r"""Optional intermediate layer, dense block for the most frequent labels, fixed fan-in for the rest.

    Args:
        in_features, out_features, fan_in, bias, group_size, device, dtype: as in `FixedFanInLinear`.
        intermediate: width of a dense layer before the outputs, or None.
        activation: after the intermediate layer: None, "relu", "gelu" or "silu".
        dense_labels: how many labels, the first in ``label_order``, get a dense row.
        label_order: ``[O]`` int64, a permutation: the label at each position (`label_order`). None keeps
            the labels as they are.

    Labels go in and come out as the caller numbers them.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        fan_in: int,
        bias: bool = True,
        *,
        group_size: int = 1,
        intermediate: int | None = None,
        activation: str | None = "relu",
        dense_labels: int = 0,
        label_order: Tensor | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if not 0 <= dense_labels <= out_features:
            raise ValueError(
                f"dense_labels must be in [0, out_features = {out_features}]; got {dense_labels}"
            )
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}; got {activation!r}"
            )
        order = (
            torch.arange(out_features) if label_order is None else torch.as_tensor(label_order).long().cpu()
        )
        if not torch.equal(order.sort().values, torch.arange(out_features)):
            raise ValueError(
                f"label_order must be a permutation of the {out_features} labels; got {order.tolist()[:8]}..."
            )
        options = {"device": device, "dtype": dtype}
        hidden = in_features if intermediate is None else intermediate
        self.out_features, self.dense_labels = out_features, dense_labels
        self.intermediate = None
        if intermediate is not None:
            self.intermediate = nn.Sequential(
                nn.Linear(in_features, hidden, **options), ACTIVATIONS[activation]()
            )
        self.dense = nn.Linear(hidden, dense_labels, bias, **options) if dense_labels else None
        self.sparse = FixedFanInLinear(
            hidden, out_features - dense_labels, fan_in, bias, group_size=group_size, **options
        )
        place = torch.empty_like(order)
        place[order] = torch.arange(out_features)
        self.register_buffer("label_order", order.to(device))
        self.register_buffer("label_place", place.to(device))  # its inverse: the position of each label

    def forward(self, input: Tensor) -> Tensor:
        """All logits ``[B, O]``."""
        hidden = self._hidden(input)
        logits = self.sparse(self._narrow(hidden)).to(hidden.dtype)
        if self.dense is not None:
            logits = torch.cat([self.dense(hidden), logits], -1)
        return logits.index_select(-1, self.label_place)

    def loss(
        self, input: Tensor, positives: tuple[Tensor, Tensor], kind: str = "bce", reduction: str = "mean"
    ) -> Tensor:
        """As `FixedFanInLinear.loss`; only the dense block's ``[B, dense_labels]`` logits exist.

        With a dense block the host waits once for the GPU, to know how many positives are not in the block.
        """
        if kind not in LOSSES or reduction not in REDUCTIONS:
            raise ValueError(
                f"kind must be one of {list(LOSSES)} and reduction one of {list(REDUCTIONS)}; "
                f"got {kind!r}, {reduction!r}"
            )
        offsets, labels = positives
        check_dtype("offsets", offsets, INDEX_DTYPES)
        check_shape("offsets", offsets, (input.shape[0] + 1,), "[B + 1]")
        check_shape("labels", labels, (None,), "[number of positives]")
        place, hidden = self._places("labels", labels), self._hidden(input)
        rest = offsets, place
        if self.dense is not None:
            _check_offsets(offsets, labels)
            rows = torch.arange(input.shape[0] + 1, device=labels.device)
            at = torch.arange(labels.shape[0], device=labels.device, dtype=offsets.dtype)
            row = (torch.searchsorted(offsets.contiguous(), at, right=True) - 1).clamp(0, input.shape[0] - 1)
            in_dense = place < self.dense_labels
            kept = (~in_dense).nonzero().squeeze(1)  # waits for a GPU: how many there are
            rest = torch.searchsorted(row[kept], rows), place[kept] - self.dense_labels
        total = self.sparse.loss(self._narrow(hidden), rest, kind, "sum")
        if self.dense is not None:
            count = input.shape[0] * self.dense_labels
            # the last place is for labels of the sparse part
            targets = hidden.new_zeros(count + 1, dtype=torch.float32)
            targets.index_fill_(0, torch.where(in_dense, row * self.dense_labels + place, count), 1.0)
            targets = targets[:count].view(-1, self.dense_labels)
            total = total + _dense_loss(self.dense(hidden).float(), targets, kind)
        return (
            total
            / {"mean": input.shape[0] * self.out_features, "sum": 1, "batchmean": input.shape[0]}[reduction]
        )

    def topk(self, input: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Logits and labels ``[B, k]``, largest first; equal logits: the earlier in ``label_order`` first."""
        if not 0 <= k <= self.out_features:
            raise ValueError(f"k must be in [0, {self.out_features}]; got {k}")
        hidden = self._hidden(input)
        values, place = self.sparse.topk(self._narrow(hidden), min(k, self.sparse.out_features))
        values = values.to(hidden.dtype)
        place = place + self.dense_labels
        if self.dense is not None:
            logits = self.dense(hidden)
            values = torch.cat([logits, values], 1)
            own = torch.arange(self.dense_labels, device=place.device).expand(logits.shape)
            place = torch.cat([own, place], 1)
        values, chosen = values.sort(dim=1, descending=True, stable=True)
        return values[:, :k], self.label_order[place.gather(1, chosen[:, :k])]

    def score(self, input: Tensor, candidates: Tensor) -> Tensor:
        """Logits of ``candidates [B, C]``."""
        hidden = self._hidden(input)
        place = self._places("candidates", candidates)
        if self.dense is None:
            return self.sparse.score(self._narrow(hidden), place).to(hidden.dtype)
        in_dense = place < self.dense_labels
        if self.sparse.out_features == 0:
            return self.dense(hidden).gather(1, place)
        sparse = self.sparse.score(self._narrow(hidden), (place - self.dense_labels).clamp(min=0))
        sparse = sparse.to(hidden.dtype)
        dense = self.dense(hidden).gather(1, place.clamp(max=self.dense_labels - 1))
        return torch.where(in_dense, dense, sparse)

    def rewire(self, **options) -> int:
        """`FixedFanInLinear.rewire` of the sparse part."""
        return self.sparse.rewire(**options)

    def extra_repr(self) -> str:
        return f"out_features={self.out_features}, dense_labels={self.dense_labels}"

    def _places(self, name: str, labels: Tensor) -> Tensor:
        """Positions of labels. Out of range: IndexError on the CPU; on a GPU as `set_check_indices` says, where
        "none" gives the position behind the last, which no op reads or counts."""
        check_dtype(name, labels, INDEX_DTYPES)
        check_device(name, labels, "the layer", self.label_place)
        last = self.out_features - 1
        if labels.numel() == 0:
            return labels.long()
        inside = (labels >= 0) & (labels <= last)
        mode = get_check_indices()
        if labels.device.type == "cpu":
            if not bool(inside.all()):
                low, high = int(labels.min()), int(labels.max())
                raise IndexError(
                    f"{name} must be in [0, {self.out_features}); got values from {low} to {high}"
                )
        elif mode == "raise":
            torch._assert_async(inside.all(), f"{name} must be in [0, {self.out_features})")
        place = self.label_place[labels.long().clamp(0, last)]
        return torch.where(inside, place, self.out_features) if mode == "none" else place

    def _narrow(self, hidden: Tensor) -> Tensor:
        """For a sparse part of 16 bits beside a wider encoder; autocast sees to it itself."""
        if in_autocast(hidden):
            return hidden
        return hidden.to(self.sparse.packed_weight.dtype)

    def _hidden(self, input: Tensor) -> Tensor:
        return input if self.intermediate is None else self.intermediate(input)


def label_order(
    counts: Tensor, *, dense_labels: int = 0, embeddings: Tensor | None = None, group_size: int = 1
) -> Tensor:
    """A permutation for `FanInHead`: the most frequent labels first, then the rest in groups of like labels.

    Args:
        counts: ``[O]``, positives of each label in the training set.
        dense_labels: how many frequent labels come first.
        embeddings: ``[O, D]``, for instance the mean features of each label's positives; the rest of the
            labels is split in two balanced halves along the line between two centroids, again and again,
            until a part is one group. None orders the rest by frequency.
        group_size: of the layer.

    Returns:
        ``[O]`` int64, the label at each position.
    """
    by_count = counts.sort(descending=True, stable=True).indices
    head, rest = by_count[:dense_labels], by_count[dense_labels:]
    if embeddings is None or group_size == 1 or rest.numel() <= group_size:
        return by_count
    unit = nn.functional.normalize(embeddings[rest].float(), dim=1)
    parts, done = [torch.arange(rest.numel(), device=rest.device)], []
    while parts:
        part = parts.pop()
        if part.numel() <= group_size:
            done.append(part)
            continue
        groups = -(-part.numel() // group_size)
        size = (groups - groups // 2) * group_size  # whole groups in the first half
        near = _split_in_two(unit[part]).sort(descending=True, stable=True).indices
        parts += [part[near[size:]], part[near[:size]]]
    return torch.cat([head, rest[torch.cat(done)]])


def _split_in_two(unit: Tensor, rounds: int = 5) -> Tensor:
    """How much nearer each row is to the first of two centroids (spherical 2-means, balanced)."""
    far = (unit @ unit[0]).argmin()
    lean = unit @ (unit[0] - unit[far])
    for _ in range(rounds):
        order = lean.sort(descending=True, stable=True).indices
        half = unit.shape[0] // 2
        first, second = unit[order[:half]].mean(0), unit[order[half:]].mean(0)
        lean = unit @ (nn.functional.normalize(first, dim=0) - nn.functional.normalize(second, dim=0))
    return lean


def _dense_loss(logits: Tensor, targets: Tensor, kind: str) -> Tensor:
    if kind == "bce":
        return nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
    return (1 - (2 * targets - 1) * logits).clamp(min=0).square().sum()


def _check_offsets(offsets: Tensor, labels: Tensor) -> None:
    """ValueError on the CPU; on a GPU the device asserts."""
    wanted = f"offsets must start at 0, never decrease and end at the number of labels, {labels.shape[0]}"
    good = (offsets[0] == 0) & (offsets[-1] == labels.shape[0]) & (offsets.diff() >= 0).all()
    if offsets.device.type == "cpu":
        if not bool(good):
            raise ValueError(f"{wanted}; got {offsets.tolist()[:8]}... ending at {int(offsets[-1])}")
    elif get_check_indices() != "none":
        torch._assert_async(good, wanted)
