"""Training loops: one pass or a few over the data, stopped by a validation part."""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from .data import ClickLog, LabelData, LabelSplit, Ragged
from .metrics import label_metrics
from .models import LabelModel

EVALUATION_BATCH = 4096
LABEL_EVALUATION_BATCH = 256
RECOMMENDED = 20  # Recall@20, NDCG@20

Advance = Callable[[int], None]  # tells the progress bar that so many steps are done


@dataclasses.dataclass(frozen=True)
class Rates:
    tables: float  # for parameters with sparse gradients (Adagrad) and packed tables
    rest: float  # for the others (Adam)


def make_optimizers(
    model: nn.Module, loss: Callable[[], Tensor], rates: Rates
) -> list[torch.optim.Optimizer]:
    """Adagrad for what gets sparse gradients (tables), Adam for the rest.

    A backward pass tells which is which, so that it holds for any layer.
    """
    loss().backward()
    sparse, rest = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (sparse if parameter.grad is not None and parameter.grad.is_sparse else rest).append(parameter)
    model.zero_grad()
    optimizers = [torch.optim.Adam(rest, lr=rates.rest, fused=True)]
    if sparse:
        optimizers.append(torch.optim.Adagrad(sparse, lr=rates.tables))
    return optimizers


def step(loss: Tensor, optimizers: list[torch.optim.Optimizer]) -> None:
    """Backward and update."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()


@dataclasses.dataclass(frozen=True)
class ClickPlan:
    """How a click log is trained on. The last part of the training rows is kept for fine-tuning:

    a DLRM overfits on the second pass over the same rows, so what comes after the swap must be new to it.
    """

    batch: int
    max_passes: int
    rates: Rates
    finetune_rates: Rates
    finetune_share: float = 0.25

    @staticmethod
    def for_rows(rows: int) -> "ClickPlan":
        large = rows >= 100_000
        return ClickPlan(
            batch=512 if large else 128,
            max_passes=1 if large else 4,
            rates=Rates(0.05, 1e-3),
            finetune_rates=Rates(0.03, 5e-4),
        )

    def parts(self, train: slice) -> tuple[slice, slice]:
        """Rows to train on, and later ones to fine-tune on."""
        cut = train.stop - int((train.stop - train.start) * self.finetune_share)
        return slice(train.start, cut), slice(cut, train.stop)

    def steps(self, rows: slice) -> int:
        return math.ceil((rows.stop - rows.start) / self.batch)


class ClickTensors:
    """A click log as tensors (sharing its memory)."""

    def __init__(self, log: ClickLog):
        self.clicked = torch.from_numpy(log.clicked)
        self.numeric = torch.from_numpy(log.numeric)
        self.ids = torch.from_numpy(log.ids)

    def loss(self, model: nn.Module, rows: Tensor) -> Tensor:
        logits = model(self.numeric[rows], self.ids[rows])
        return functional.binary_cross_entropy_with_logits(logits, self.clicked[rows])

    def scores(self, model: nn.Module, rows: slice) -> np.ndarray:
        """Logits of these rows."""
        model.eval()
        with torch.inference_mode():
            parts = [
                model(self.numeric[i : min(i + EVALUATION_BATCH, rows.stop)],
                      self.ids[i : min(i + EVALUATION_BATCH, rows.stop)])
                for i in range(rows.start, rows.stop, EVALUATION_BATCH)
            ]  # fmt: skip
        return torch.cat(parts).numpy()

    def validation_loss(self, model: nn.Module, rows: slice) -> float:
        logits = torch.from_numpy(self.scores(model, rows))
        return functional.binary_cross_entropy_with_logits(logits, self.clicked[rows]).item()


def train_clicks(
    model: nn.Module,
    data: ClickTensors,
    rows: slice,
    valid: slice,
    plan: ClickPlan,
    rates: Rates,
    seed: int,
    advance: Advance,
) -> tuple[list[torch.optim.Optimizer], int]:
    """Train in place until the validation loss rises; the model is left as it was at its best.

    Returns:
        The optimizers and the number of passes that the model has behind it.
    """
    generator = torch.Generator().manual_seed(seed)
    first = torch.arange(rows.start, min(rows.start + plan.batch, rows.stop))
    optimizers = make_optimizers(model, lambda: data.loss(model.train(), first), rates)

    def one_pass() -> None:
        model.train()
        order = rows.start + torch.randperm(rows.stop - rows.start, generator=generator)
        for chosen in order.split(plan.batch):
            step(data.loss(model, chosen), optimizers)
            advance(1)

    passes = _until_worse(model, one_pass, lambda: data.validation_loss(model, valid), plan.max_passes)
    return optimizers, passes


@dataclasses.dataclass(frozen=True)
class LabelPlan:
    batch: int
    max_passes: int
    rates: Rates
    patience: int = 2

    def steps(self, data: LabelData) -> int:
        """Of one pass."""
        return math.ceil(len(data.train.labels) / self.batch)


def train_labels(
    model: LabelModel, data: LabelData, plan: LabelPlan, seed: int, advance: Advance
) -> tuple[list[torch.optim.Optimizer], int]:
    """Train in place, up to ``max_passes``; the model is left as it was when P@1 on validation was best."""
    rng = np.random.default_rng(seed)

    def batches() -> Iterator[LabelSplit]:
        return label_batches(data, plan.batch, rng)

    warm_up = next(batches())
    optimizers = make_optimizers(
        model, lambda: model.train().loss(warm_up.features, warm_up.labels), plan.rates
    )

    def one_pass() -> None:
        model.train()
        for part in batches():
            step(model.loss(part.features, part.labels), optimizers)
            advance(1)

    def score() -> float:
        metrics = label_metrics(recommend(model, data.valid, data.items), data.valid.labels, data.items)
        return -(metrics.recall if data.items else metrics.precision[1])

    passes = _until_worse(model, one_pass, score, plan.max_passes, plan.patience)
    return optimizers, passes


def label_batches(data: LabelData, batch: int, rng: np.random.Generator) -> Iterator[LabelSplit]:
    """One pass over the training rows in random order; of items, a random half is hidden at the input."""
    order = rng.permutation(len(data.train.labels))
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        features = data.train.features.take(rows)
        yield LabelSplit(hide_half(features, rng) if data.items else features, data.train.labels.take(rows))


def hide_half(features: Ragged, rng: np.random.Generator) -> Ragged:
    """Each value kept with probability one half, weights scaled to length one again."""
    kept = rng.random(len(features.values)) < 0.5
    lengths = np.bincount(features.row_of_value()[kept], minlength=len(features))
    weights = np.repeat(np.maximum(lengths, 1) ** -0.5, lengths).astype(np.float32)
    return Ragged(np.concatenate(([0], np.cumsum(lengths))), features.values[kept], weights)


def recommend(model: LabelModel, split: LabelSplit, items: bool) -> np.ndarray:
    """The best labels of each row, best first: 5, or 20 new ones for items."""
    model.eval()
    parts = []
    with torch.inference_mode():
        for start in range(0, len(split.labels), LABEL_EVALUATION_BATCH):
            features = split.features.take(
                np.arange(start, min(start + LABEL_EVALUATION_BATCH, len(split.labels)))
            )
            if items:
                scores = model.scores(features)
                known = torch.from_numpy(features.row_of_value()), torch.from_numpy(features.values)
                scores[known] = -torch.inf
                parts.append(scores.topk(min(RECOMMENDED, scores.shape[1]), dim=1).indices)
            else:
                parts.append(model.topk(features, 5))
    return torch.cat(parts).numpy()


def _until_worse(
    model: nn.Module,
    one_pass: Callable[[], None],
    score: Callable[[], float],
    max_passes: int,
    patience: int = 1,
) -> int:
    """Passes until the score has not fallen ``patience`` times in a row; then back to the best state."""
    best, best_state, best_passes = math.inf, None, 0
    for passes in range(1, max_passes + 1):
        one_pass()
        if max_passes == 1:
            return 1
        value = score()
        if value < best:
            best, best_passes = value, passes
            best_state = copy.deepcopy(model.state_dict())
        elif passes - best_passes >= patience:
            break
    model.load_state_dict(best_state)
    return best_passes
