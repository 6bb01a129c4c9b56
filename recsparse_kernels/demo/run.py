"""The main job: train dense, swap, fine-tune, compare; and a fixed fan-in head beside a dense one."""

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from . import variants
from .data import ClickLog, LabelData
from .measure import optimizer_bytes, parameter_bytes
from .metrics import click_metrics, label_metrics
from .models import DLRM, DROPOUT, HIDDEN, LabelModel, set_prior
from .results import Row, Section, time_clicks, time_labels
from .train import ClickPlan, ClickTensors, LabelPlan, Rates, recommend, train_clicks, train_labels

Progress = Callable[[str, int], Callable[[int], None]]  # (what, steps) -> advance


def run_clicks(
    log: ClickLog, plan: ClickPlan, *, seed: int, timing_seconds: float, progress: Progress
) -> Section:
    """Dense and swapped DLRMs on a click log."""
    data = ClickTensors(log)
    early, late = plan.parts(log.train)
    torch.manual_seed(seed)
    trained = DLRM(log.numeric.shape[1], log.field_sizes)
    advance = progress("train DLRM, dense", plan.steps(early) * plan.max_passes)
    _, passes = train_clicks(trained, data, early, log.valid, plan, plan.rates, seed, advance)
    models, rows = {}, []
    clicked, dense_scores = log.clicked[log.test], None
    for variant in variants.CLICK_VARIANTS:
        model = copy.deepcopy(trained)
        swapped = variant.swap(model)
        advance = progress(f"fine-tune {variant.name}", plan.steps(late) * plan.max_passes)
        optimizers, finetune_passes = train_clicks(
            model, data, late, log.valid, plan, plan.finetune_rates, seed + 1, advance
        )
        scores = data.scores(model, log.test)
        dense_scores = scores if dense_scores is None else dense_scores
        rows.append(Row(
            model=variant.name,
            clicks=click_metrics(clicked, scores, dense_scores),
            labels=None,
            parameter_bytes=parameter_bytes(model),
            optimizer_bytes=optimizer_bytes(optimizers),
            passes=f"{passes} + {finetune_passes}",
            swapped=swapped,
        ))  # fmt: skip
        models[variant.name] = model
    section = Section(
        title=f"DLRM on {log.name}",
        kind="clicks",
        description=[
            f"{log.rows:,} rows in time order: {_length(log.train):,} to train, {_length(log.valid):,} to "
            f"validate, {_length(log.test):,} to test; click rate {log.clicked.mean():.3f}",
            f"{log.numeric.shape[1]} numeric features, {len(log.field_sizes)} fields with "
            f"{sum(log.field_sizes):,} ids",
            f"trained on the first {_length(early):,} rows, then (dense as well) fine-tuned on the next "
            f"{_length(late):,}; batch {plan.batch}, up to {plan.max_passes} passes each, stopped by "
            "validation loss",
            f"Adagrad for tables ({plan.rates.tables:g}, fine-tuning {plan.finetune_rates.tables:g}), "
            f"Adam for the rest ({plan.rates.rest:g}, {plan.finetune_rates.rest:g})",
            *log.notes,
        ],
        rows=rows,
        batch=plan.batch,
        extra=_click_baselines(log),
    )
    time_clicks(section, models, log, plan.finetune_rates, timing_seconds, progress("time DLRMs", 4))
    return section


def _click_baselines(log: ClickLog) -> dict[str, float]:
    """AUC of the click rates of single ids, added up; and of the truth, where it is known."""
    from sklearn.metrics import roc_auc_score

    clicked = log.clicked[log.train]
    base, smoothing = clicked.mean(), 20.0
    score = np.zeros(_length(log.test))
    for field, size in enumerate(log.field_sizes):
        ids = log.ids[:, field]
        shown = np.bincount(ids[log.train], minlength=size)
        rate = (np.bincount(ids[log.train], clicked, size) + smoothing * base) / (shown + smoothing)
        score += np.log(rate / (1 - rate))[ids[log.test]]
    found = {
        "AUC of the summed click rates of single ids": float(roc_auc_score(log.clicked[log.test], score))
    }
    if log.probability is not None:
        truth = float(roc_auc_score(log.clicked[log.test], log.probability[log.test]))
        found["AUC of the probabilities that the clicks were drawn from"] = truth
    return found


def run_labels(
    data: LabelData, plan: LabelPlan, *, seed: int, timing_seconds: float, progress: Progress
) -> Section:
    """A dense output layer and fixed fan-in ones over all labels, each trained from the start."""
    counts = torch.from_numpy(np.bincount(data.train.labels.values, minlength=data.num_labels))
    models, rows = {}, []
    for name, make_head in variants.label_heads(data.num_labels):
        torch.manual_seed(seed)
        model = LabelModel(data.num_features, make_head())
        set_prior(model.head, counts, len(data.train.labels))
        advance = progress(f"train {name}", plan.steps(data) * plan.max_passes)
        optimizers, passes = train_labels(model, data, plan, seed, advance)
        rows.append(Row(
            model=name,
            clicks=None,
            labels=label_metrics(recommend(model, data.test, data.items), data.test.labels, data.items),
            parameter_bytes=parameter_bytes(model),
            optimizer_bytes=optimizer_bytes(optimizers),
            passes=str(passes),
            swapped=[] if isinstance(model.head, nn.Linear) else [f"head: {model.head}"],
        ))  # fmt: skip
        models[name] = model
    section = Section(
        title=f"{data.num_labels:,} labels of {data.name}",
        kind="labels",
        description=[
            f"{len(data.train.labels):,} rows to train, {len(data.valid.labels):,} to validate, "
            f"{len(data.test.labels):,} to test; {data.train.labels.lengths.mean():.1f} labels a row",
            f"{data.num_features:,} features -> {HIDDEN} hidden, ReLU, dropout {DROPOUT} -> "
            f"{data.num_labels:,} labels; binary cross-entropy over all labels",
            f"batch {plan.batch}, up to {plan.max_passes} passes, the best on validation kept; "
            f"Adam {plan.rates.rest:g} (Adagrad {plan.rates.tables:g} for an encoder with sparse gradients)",
            *data.notes,
        ],
        rows=rows,
        batch=plan.batch,
    )
    time_labels(section, models, data, plan.rates, timing_seconds, progress("time heads", 4))
    return section


def label_plan(data: LabelData, generated: bool) -> LabelPlan:
    """Passes that the size of the data asks for."""
    if generated:  # few passes, long steps
        return LabelPlan(batch=128, max_passes=2, rates=Rates(tables=0.05, rest=3e-3), patience=2)
    if data.num_labels > 10_000:
        return LabelPlan(batch=128, max_passes=12, rates=Rates(tables=0.05, rest=1e-3), patience=2)
    return LabelPlan(batch=128, max_passes=25, rates=Rates(tables=0.05, rest=1e-3), patience=25)


def _length(rows: slice) -> int:
    return rows.stop - rows.start
