"""Scores that decide which weights a sparse copy keeps; computed a chunk at a time, never all at once."""

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

CHUNK = 1 << 20  # weights whose importance is updated at a time


@dataclasses.dataclass
class LayerView:
    """What a score sees of one layer: flat views in row-major order.

    Attributes:
        name: of the layer.
        weight: ``[numel]``.
        importance: ``begin, end -> [end - begin]``, the running mean of ``|weight * gradient|``; None where
            the score did not ask for it.
        mean_magnitude, mean_importance: over the layer.
    """

    name: str
    weight: Tensor
    importance: Callable[[int, int], Tensor] | None
    mean_magnitude: float
    mean_importance: float


@dataclasses.dataclass(frozen=True)
class Magnitude:
    """``|w|`` over the layer's mean: comparable between layers whose weights differ in size.

    ``relative=False``: ``|w|`` as it is.
    """

    relative: bool = True
    needs_gradients = False

    def __call__(self, layer: LayerView, begin: int, end: int) -> Tensor:
        scores = layer.weight[begin:end].abs()
        return _over(scores, layer.mean_magnitude) if self.relative else scores


@dataclasses.dataclass(frozen=True)
class GradientWeighted:
    """``magnitude * |w| / mean|w| + gradient * I / mean I`` with ``I`` the running mean of ``|w g|``.

    Two criteria, each over its mean in the layer, so that one global selection is fair to all layers. The
    running mean takes as much memory as the dense weight. Where that is too much, a score can read what the
    optimizer keeps anyway, ``layer.weight[begin:end].abs() * adam_state["exp_avg_sq"].view(-1)[begin:end].sqrt()``.

    Args:
        magnitude, gradient: what each counts.
        decay: of the running mean, per call of ``observe()``.
    """

    magnitude: float = 1.0
    gradient: float = 1.0
    decay: float = 0.99
    needs_gradients = True

    def __post_init__(self):
        if not 0 <= self.decay < 1 or self.magnitude < 0 or self.gradient < 0:
            raise ValueError(
                "decay must be in [0, 1), magnitude and gradient not negative; "
                f"got {self.decay}, {self.magnitude}, {self.gradient}"
            )

    def __call__(self, layer: LayerView, begin: int, end: int) -> Tensor:
        scores = _over(layer.weight[begin:end].abs().float(), layer.mean_magnitude).mul_(self.magnitude)
        return scores.add_(_over(layer.importance(begin, end), layer.mean_importance), alpha=self.gradient)


class CostAware:
    """Another score over what a weight of the layer costs: multiply-adds, bytes or measured time.

    Args:
        score: divided by the cost.
        cost: layer -> positive number; 1 where not named.
    """

    def __init__(self, score: Callable, cost: Mapping[str, float]):
        for name, value in cost.items():
            if not value > 0:
                raise ValueError(f"cost of {name!r} must be positive; got {value}")
        self.score, self.cost = score, dict(cost)
        self.needs_gradients = getattr(score, "needs_gradients", False)
        self.decay = getattr(score, "decay", None)

    def __call__(self, layer: LayerView, begin: int, end: int) -> Tensor:
        return self.score(layer, begin, end) / self.cost.get(layer.name, 1.0)

    def __repr__(self) -> str:
        return f"CostAware({self.score!r}, {self.cost!r})"


def _over(scores: Tensor, mean: float) -> Tensor:
    return torch.zeros_like(scores) if mean == 0 else scores / mean  # a NaN mean shows in every score


def has_finite_gradient(weight: Tensor) -> bool:
    grad = weight.grad._values() if weight.grad.is_sparse else weight.grad
    parts = grad.split(max(1, CHUNK // max(1, weight.shape[1])))
    return all(bool(torch.isfinite(part).all()) for part in parts)


class Importance:
    """Running mean of ``|w g|`` of one weight, float32.

    With gradients over some rows only (``sparse=True`` tables) untouched rows are decayed when next read.
    """

    def __init__(self, weight: Tensor, decay: float):
        self.decay = decay
        self.mean = torch.zeros(weight.numel(), dtype=torch.float32, device=weight.device)
        self.row_steps = torch.zeros(weight.shape[0], dtype=torch.int32, device=weight.device)
        self.steps = torch.zeros((), dtype=torch.int32)

    @torch.no_grad()
    def add(self, weight: Tensor, grad: Tensor) -> None:
        step = int(self.steps) + 1
        width = weight.shape[1]
        if grad.is_sparse:
            grad = grad.coalesce()
            rows, values = grad.indices()[0], grad.values()
            for begin in range(0, len(rows), max(1, CHUNK // width)):
                part = rows[begin : begin + max(1, CHUNK // width)]
                fresh = (weight[part].float() * values[begin : begin + len(part)].float()).abs()
                self._update(part, fresh, step)
        else:
            for begin in range(0, weight.shape[0], max(1, CHUNK // width)):
                end = min(begin + max(1, CHUNK // width), weight.shape[0])
                fresh = (weight[begin:end].float() * grad[begin:end].float()).abs()
                self._update(slice(begin, end), fresh, step)
        self.steps.fill_(step)

    def _update(self, rows, fresh: Tensor, step: int) -> None:
        table = self.mean.view(len(self.row_steps), -1)
        fade = self.decay ** (step - self.row_steps[rows]).float()
        table[rows] = table[rows] * fade[:, None] + fresh * (1 - self.decay)
        self.row_steps[rows] = step

    def read(self, begin: int, end: int) -> Tensor:
        """Elements ``begin:end`` of the running mean, faded to now."""
        width = len(self.mean) // max(len(self.row_steps), 1)
        first, last = begin // width, -(-end // width)
        fade = self.decay ** (int(self.steps) - self.row_steps[first:last]).float()
        each = fade.repeat_interleave(width)[begin - first * width : end - first * width]
        return self.mean[begin:end] * each


def mean_of(read: Callable[[int, int], Tensor], numel: int) -> float:
    """Mean of a stream, accumulated in float64 in a fixed order."""
    total = 0.0
    for begin in range(0, numel, CHUNK):
        total += float(read(begin, min(begin + CHUNK, numel)).double().sum())
    return total / max(numel, 1)
