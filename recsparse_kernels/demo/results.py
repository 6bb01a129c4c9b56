"""What a run yields, one `Row` a model; report.py shows it."""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from . import measure
from .data import ClickLog, LabelData
from .measure import Timing
from .metrics import ClickMetrics, LabelMetrics
from .models import LabelModel
from .train import ClickTensors, Rates, label_batches, make_optimizers, step

INFERENCE_BATCHES = (1, 256, 4096)
STEP_BATCHES = 8  # different batches that a timed step goes through
TOP = 5  # labels a timed inference asks for


@dataclasses.dataclass
class Row:
    model: str
    clicks: ClickMetrics | None
    labels: LabelMetrics | None
    parameter_bytes: int
    optimizer_bytes: int
    passes: str  # over the training rows
    swapped: list[str]  # one line a layer
    step: Timing | None = None
    inference: dict[int, Timing] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Section:
    """Models that were trained on the same data; the first row is dense."""

    title: str
    kind: str  # "clicks" or "labels"
    description: list[str]
    rows: list[Row]
    batch: int  # of the timed training step
    extra: dict[str, float] = dataclasses.field(default_factory=dict)  # what a reader compares with


def time_clicks(
    section: Section,
    models: dict[str, nn.Module],
    log: ClickLog,
    rates: Rates,
    seconds: float,
    advance: Callable,
) -> None:
    """Fill in step and inference times of all rows, each figure interleaved over the models."""
    data = ClickTensors(log)
    batches = [
        torch.arange(i, i + section.batch) % log.rows
        for i in range(0, STEP_BATCHES * section.batch, section.batch)
    ]

    def training(model: nn.Module) -> Callable[[], None]:
        model.train()
        optimizers = make_optimizers(model, lambda: data.loss(model, batches[0]), rates)
        turn = _turns(batches)
        return lambda: step(data.loss(model, next(turn)), optimizers)

    def inference(model: nn.Module, size: int) -> Callable[[], object]:
        rows = [
            torch.arange(log.test.start + i * size, log.test.start + (i + 1) * size) % log.rows
            for i in range(8)
        ]
        inputs = _turns([(data.numeric[r], data.ids[r]) for r in rows])
        return lambda: model(*next(inputs))

    _time(section, models, training, inference, seconds, advance)


def time_labels(
    section: Section,
    models: dict[str, LabelModel],
    data: LabelData,
    rates: Rates,
    seconds: float,
    advance: Callable,
) -> None:
    """As `time_clicks`; inference is the top labels of each row."""
    rng = np.random.default_rng(0)
    batches = [
        part for part, _ in zip(label_batches(data, section.batch, rng), range(STEP_BATCHES), strict=False)
    ]

    def training(model: LabelModel) -> Callable[[], None]:
        model.train()
        loss = lambda part: model.loss(part.features, part.labels)  # noqa: E731
        optimizers = make_optimizers(model, lambda: loss(batches[0]), rates)
        turn = _turns(batches)
        return lambda: step(loss(next(turn)), optimizers)

    def inference(model: LabelModel, size: int) -> Callable[[], object]:
        rows = rng.integers(0, len(data.test.labels), (2, size))
        inputs = _turns([data.test.features.take(r) for r in rows])
        return lambda: model.topk(next(inputs), TOP)

    _time(section, models, training, inference, seconds, advance)


def _turns(items: list):
    while True:
        yield from items


def _time(section, models, training, inference, seconds, advance) -> None:
    rows = {row.model: row for row in section.rows}
    share = seconds / (1 + len(INFERENCE_BATCHES))
    # inference first: the timed steps train on
    with torch.inference_mode():
        for model in models.values():
            model.eval()
        for size in INFERENCE_BATCHES:
            times = measure.interleaved(
                {name: inference(model, size) for name, model in models.items()}, share
            )
            for name, timing in times.items():
                rows[name].inference[size] = timing
            advance(1)
    for name, timing in measure.interleaved(
        {name: training(model) for name, model in models.items()}, share
    ).items():
        rows[name].step = timing
    advance(1)
