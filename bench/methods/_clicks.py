"""Click logs for the training methods: data, batches, metrics, and a training loop that resumes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from recsparse_kernels.demo.data import ClickLog, generate_click_log, load
from recsparse_kernels.demo.train import ClickTensors, Rates, make_optimizers, step

from .session import Run

DATASETS = ("criteo_10k", "criteo_deeplight_20k", "generated")
BATCH = {"criteo_10k": 128, "criteo_deeplight_20k": 128, "generated": 512}


def add_click_arguments(parser, default: str) -> None:
    parser.add_argument("--datasets", type=lambda text: text.split(","), default=default.split(","))
    parser.add_argument("--rows", type=int, default=100_000, help="of the generated click log")


def open_log(name: str, data: Path, rows: int) -> ClickLog | None:
    """A click log by name; None where its folder is absent, with a line that says so."""
    if name == "generated":
        return generate_click_log(rows, seed=0)
    if name not in DATASETS:
        raise SystemExit(f"--datasets: wanted some of {DATASETS}; got {name!r}")
    if not (data / name).is_dir():
        print(f"{name}: not in {data}; skipped (give --data FOLDER)")
        return None
    return load(data / name, max_rows=1_000_000, seed=0)


def optimizers_for(model: nn.Module, data: ClickTensors, rates: Rates) -> list[torch.optim.Optimizer]:
    """Adagrad for tables with sparse gradients, Adam for the rest, as the demo has it."""
    torch.sparse.check_sparse_tensor_invariants.disable()
    return make_optimizers(model, lambda: data.loss(model.train(), torch.arange(4)), rates)


def shuffled(rows: slice, seed: int, pass_number: int) -> torch.Tensor:
    """The rows in the order of one pass: depends on nothing else, so that a resumed run goes on with it."""
    generator = torch.Generator().manual_seed(seed * 1000 + pass_number)
    return rows.start + torch.randperm(rows.stop - rows.start, generator=generator)


def steps_of_pass(rows: slice, batch: int) -> int:
    return -(-(rows.stop - rows.start) // batch)


def figures(clicked: np.ndarray, score: np.ndarray) -> dict[str, float]:
    """AUC, log loss, and normalized entropy: log loss over the entropy of the click rate (He et al. 2014)."""
    from sklearn.metrics import roc_auc_score

    score = score.astype(np.float64)
    loss = np.logaddexp(0.0, np.where(clicked > 0, -score, score)).mean()
    rate = min(max(float(clicked.mean()), 1e-9), 1 - 1e-9)
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    auc = float(roc_auc_score(clicked, score)) if 0 < clicked.sum() < len(clicked) else float("nan")
    return {"auc": auc, "logloss": float(loss), "ne": float(loss / entropy)}


def evaluate(model: nn.Module, data: ClickTensors, log: ClickLog, rows: slice) -> dict[str, float]:
    was_training = model.training
    result = figures(log.clicked[rows], data.scores(model, rows))
    model.train(was_training)
    return result


def train(
    run: Run,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    data: ClickTensors,
    log: ClickLog,
    *,
    steps: int,
    batch: int,
    seed: int,
    method=None,
    evaluate_every: int | None = None,
    extra: Callable[[], dict] = dict,
) -> list[dict]:
    """Train ``steps`` steps, going on from the run's checkpoint. Returns what ``method.step()`` reported.

    The learning curve gets the validation figures every ``evaluate_every`` steps.
    """
    per_pass = steps_of_pass(log.train, batch)
    parts = [part for part in (method, model, *optimizers) if part is not None]
    held, begin, events = run.resume(), 0, []
    if held is not None:
        begin, events = held["step"], held["events"]
        for part, state in zip(parts, held["parts"], strict=True):
            part.load_state_dict(state)
    order, order_pass = None, -1
    for index in range(begin, steps):
        if index // per_pass != order_pass:
            order_pass = index // per_pass
            order = shuffled(log.train, seed, order_pass).split(batch)
        model.train()
        step(data.loss(model, order[index % per_pass]), optimizers)
        if method is not None and (event := method.step()):
            events.append(vars(event))
        done = index + 1
        if evaluate_every and (done % evaluate_every == 0 or done == steps):
            run.log(done, **evaluate(model, data, log, log.valid), **extra())
        run.advance(done)
        run.save(lambda done=done: {"step": done, "events": events, "parts": [p.state_dict() for p in parts]})
    return events
