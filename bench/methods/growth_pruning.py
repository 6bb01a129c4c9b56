"""Alternate growth and pruning on DLRM: training work and step time saved, AUC and normalized entropy.

Learning rates are chosen for each variant by validation log loss (seed of the choice: the first seed),
the number of passes by the dense model's. Figures are of the test rows, over seeds.
"""

import copy

import torch

from recsparse_kernels.demo.measure import interleaved
from recsparse_kernels.demo.models import DLRM
from recsparse_kernels.demo.train import ClickTensors, Rates, step
from recsparse_kernels.training import AlternateGrowthPruning, alternating

from ._clicks import (
    BATCH,
    add_click_arguments,
    evaluate,
    open_log,
    optimizers_for,
    steps_of_pass,
    train,
)
from .session import spread

HELP = "train in alternate sparse and dense phases (arXiv 2105.01064)"
RATES = (Rates(0.03, 5e-4), Rates(0.05, 1e-3), Rates(0.05, 2e-3))
VARIANTS = {
    "dense": None,
    "half, zero_out": {"grow": "zero_out"},
    "half, frozen": {"grow": "frozen"},
    "half, random": {"grow": "random"},
    "half, two cycles": {"grow": "zero_out", "cycles": 2},
    "three quarters": {"grow": "zero_out", "sparsity": 0.75},
    "2:4": {"grow": "frozen", "mode": "2:4"},
}


def add_arguments(parser) -> None:
    add_click_arguments(parser, "criteo_10k,criteo_deeplight_20k,generated")
    parser.add_argument("--passes", type=int, default=3, help="at most so many over the training rows")
    parser.add_argument("--variants", type=lambda t: t.split(";"), default=list(VARIANTS), metavar="A;B")
    parser.add_argument(
        "--timing-seconds", type=float, default=20.0, help="for the step times of each batch size; 0: none"
    )


def run(args, session) -> None:
    for name in args.datasets:
        log = open_log(name, args.data, args.rows)
        if log is None:
            continue
        data, batch = ClickTensors(log), BATCH[name]
        common = {"data": name, "rows": log.rows}
        passes = _choose_passes(session, common, log, data, batch, args)
        rows, curves = [], {}
        for variant in args.variants:
            rate = _choose_rate(session, common, log, data, batch, variant, passes, args.seeds[0])
            lines = [
                _one(session, common, log, data, batch, variant, rate, passes, seed) for seed in args.seeds
            ]
            results = [line["result"] for line in lines]
            curves[variant] = [line["curve"] for line in lines]
            rows.append([
                variant, f"{RATES[rate].rest:g}", f"{results[0]['macs'] / results[0]['dense_macs']:.3f}",
                spread([r["auc"] for r in results]), spread([r["ne"] for r in results]),
            ])  # fmt: skip
        columns = ["variant", "rate", "multiply-adds of dense", "test AUC", "test NE"]
        session.table(f"DLRM on {name}, {passes} passes, batch {batch}", columns, rows)
        session.picture(f"{name}", curves, "step", "logloss", f"validation log loss, DLRM on {name}")
        if args.timing_seconds:
            _times(session, common, log, data, args)


def _rate_config(rate: int) -> dict:
    return {"tables": RATES[rate].tables, "rest": RATES[rate].rest}


def _one(session, common, log, data, batch, variant, rate, passes, seed) -> dict:
    steps = passes * steps_of_pass(log.train, batch)

    def body(run) -> dict:
        torch.manual_seed(seed)
        model = DLRM(log.numeric.shape[1], log.field_sizes)
        optimizers = optimizers_for(model, data, RATES[rate])
        method = _method(model, optimizers, variant, steps, seed)
        dense_macs = 3 * steps * sum(m.weight.numel() for m in _linears(model))
        macs = method.planned_macs()[0] if method else dense_macs
        every = max(1, steps // 12)
        events = train(run, model, optimizers, data, log, steps=steps, batch=batch, seed=seed,
                       method=method, evaluate_every=every)  # fmt: skip
        valid = evaluate(model, data, log, log.valid)
        return {
            **evaluate(model, data, log, log.test), "macs": macs, "dense_macs": dense_macs,
            "valid": valid, "phases": [(e["step"], e["sparsity"]) for e in events],
        }  # fmt: skip

    config = {**common, "variant": variant, "passes": passes, "batch": batch, **_rate_config(rate)}
    return session.run({**config, "seed": seed}, steps, body)


def _linears(model):
    return [m for m in model.modules() if isinstance(m, torch.nn.Linear)]


def _method(model, optimizers, variant, steps, seed):
    options = VARIANTS[variant]
    if options is None:
        return None
    options = dict(options)
    plan = alternating(steps, options.pop("sparsity", 0.5), cycles=options.pop("cycles", 1))
    return AlternateGrowthPruning(model, plan, optimizers=optimizers, seed=seed, **options)


def _choose_passes(session, common, log, data, batch, args) -> int:
    """By the dense model's validation loss after each pass, at the middle rate."""
    losses = {
        passes: _one(session, common, log, data, batch, "dense", 1, passes, args.seeds[0])["result"]
        for passes in range(1, args.passes + 1)
    }
    return min(losses, key=lambda passes: losses[passes]["valid"]["logloss"])


def _choose_rate(session, common, log, data, batch, variant, passes, seed) -> int:
    losses = {
        rate: _one(session, common, log, data, batch, variant, rate, passes, seed)["result"]
        for rate in range(len(RATES))
    }
    return min(losses, key=lambda rate: losses[rate]["valid"]["logloss"])


def _times(session, common, log, data, args) -> None:
    """Time of a training step in a dense and in a sparse phase, interleaved."""
    rows = []
    for batch in (128, 2048):

        def body(run, batch=batch) -> dict:
            torch.manual_seed(0)
            dense = DLRM(log.numeric.shape[1], log.field_sizes)
            calls = {}
            for name in ("dense", "half, zero_out", "three quarters", "2:4"):
                model = copy.deepcopy(dense)
                optimizers = optimizers_for(model, data, RATES[1])
                method = _method(model, optimizers, name, 100, 0)
                for _ in range(10 if method else 0):  # into the first sparse phase
                    method.step()
                turns = [torch.arange(i, i + batch) % log.train.stop for i in range(0, 8 * batch, batch)]
                calls[name] = _stepper(model, optimizers, data, turns)
            times = interleaved(calls, args.timing_seconds)
            return {name: vars(timing) for name, timing in times.items()}

        line = session.run({**common, "timing": "train step", "batch": batch}, 1, body)
        dense = line["result"]["dense"]["p50_ms"]
        for name, timing in line["result"].items():
            low, high = dense / timing["p80_ms"], dense / timing["p20_ms"]
            rows.append([str(batch), name, f"{timing['p50_ms']:.2f}",
                         f"{dense / timing['p50_ms']:.2f}x ({low:.2f}..{high:.2f})"])  # fmt: skip
    session.table(f"training step, DLRM on {common['data']}", ["batch", "phase", "ms", "over dense"], rows)


def _stepper(model, optimizers, data, turns):
    state = {"next": 0}
    model.train()

    def call() -> None:
        state["next"] = (state["next"] + 1) % len(turns)
        step(data.loss(model, turns[state["next"]]), optimizers)

    return call
