"""Feature mimicking on DeepFM, DCN-v2 and DLRM: size, AUC before and after, latency.

Each model is trained on the first three quarters of the training rows and stopped by validation, then
compressed to a share of its weights; the compressed models, and the dense one as a control, are
fine-tuned on the last quarter, each at the rate that validation prefers (no fine-tuning is one choice).
"""

import copy

import torch

from recsparse_kernels.demo.measure import interleaved
from recsparse_kernels.demo.train import ClickPlan, ClickTensors, Rates, train_clicks
from recsparse_kernels.training import FeatureMimicking

from ._clicks import BATCH, add_click_arguments, evaluate, open_log
from ._models import MODELS
from .session import spread

HELP = "closed-form low-rank factors from feature statistics (arXiv 2405.18146)"
RATES = (Rates(0.03, 5e-4), Rates(0.05, 1e-3), Rates(0.05, 2e-3))
FINETUNE = (Rates(0.005, 5e-5), Rates(0.02, 2e-4), Rates(0.03, 5e-4))
VARIANTS = {
    "dense": None,
    "mimic": {},
    "mimic, relu between": {"mid_activation": "relu"},
    "svd": {"factors": "svd"},
}
BATCHES = (1, 256, 4096)


def add_arguments(parser) -> None:
    add_click_arguments(parser, "criteo_10k,criteo_deeplight_20k,generated")
    parser.add_argument("--models", type=lambda t: t.split(","), default=list(MODELS))
    parser.add_argument("--budgets", type=lambda t: [float(w) for w in t.split(",")], default=[0.33, 0.2],
                        help="shares of the weights to keep")  # fmt: skip
    parser.add_argument(
        "--timing-seconds",
        type=float,
        default=10.0,
        help="for the latencies of each model and batch; 0: none",
    )


def run(args, session) -> None:
    for name in args.datasets:
        log = open_log(name, args.data, args.rows)
        if log is None:
            continue
        data = ClickTensors(log)
        for kind in args.models:
            _one_model(args, session, name, log, data, kind)


def _plan(name: str) -> ClickPlan:
    return ClickPlan(batch=BATCH[name], max_passes=1 if name == "generated" else 4, rates=RATES[1],
                     finetune_rates=FINETUNE[1])  # fmt: skip


def _one_model(args, session, name, log, data, kind) -> None:
    common = {"model": kind, "data": name, "rows": log.rows}
    rate = _choose_rate(session, common, log, data, args.seeds[0])
    by_variant: dict[tuple, list[dict]] = {}
    for seed in args.seeds:
        trained = []  # made once, and only where a line is missing

        def dense(seed=seed, trained=trained):
            if not trained:
                trained.append(_trained(log, data, kind, rate, seed))
            return copy.deepcopy(trained[0])

        for variant in VARIANTS:
            for budget in [1.0] if variant == "dense" else args.budgets:
                config = {**common, "variant": variant, "budget": budget, "rate": rate, "seed": seed}
                line = session.run(
                    config, len(FINETUNE), lambda run: _compress(run, dense(), log, data, run.config)
                )
                by_variant.setdefault((variant, budget), []).append(line["result"])
    rows = []
    for (variant, budget), results in by_variant.items():
        rows.append([
            variant, f"{budget:g}", f"{results[0]['weights'] / results[0]['dense_weights']:.3f}",
            spread([r["before"]["auc"] for r in results]), spread([r["after"]["auc"] for r in results]),
            spread([r["after"]["logloss"] for r in results]),
        ])  # fmt: skip
    columns = ["variant", "budget", "weights of dense", "AUC, not tuned", "AUC, fine-tuned", "log loss"]
    session.table(f"{kind} on {name}", columns, rows)
    _picture(session, name, kind, by_variant)
    if args.timing_seconds:
        _latency(args, session, common, log, data, kind, rate)


def _trained(log, data, kind, rate, seed):
    plan = _plan_of(log)
    torch.manual_seed(seed)
    model = MODELS[kind](log.numeric.shape[1], log.field_sizes)
    early, _ = plan.parts(log.train)
    train_clicks(model, data, early, log.valid, plan, RATES[rate], seed, lambda count: None)
    return model


def _plan_of(log) -> ClickPlan:
    return _plan("generated" if log.rows >= 50_000 else "criteo_10k")


def _choose_rate(session, common, log, data, seed) -> int:
    losses = {}
    for rate in range(len(RATES)):

        def body(run, rate=rate) -> dict:
            model = _trained(log, data, common["model"], rate, seed)
            return {"valid": evaluate(model, data, log, log.valid)}

        config = {**common, "choosing": "rate", "rate": rate, "seed": seed}
        losses[rate] = session.run(config, 1, body)["result"]["valid"]["logloss"]
    return min(losses, key=losses.get)


def compressed(model, log, data, variant: str, budget: float):
    """The model after feature mimicking, in place, and what was done; statistics of the first rows."""
    method = FeatureMimicking(model, fields=model.fields)
    if VARIANTS[variant].get("factors") != "svd":
        with method.collecting(), torch.no_grad():
            model.eval()
            for rows in torch.arange(log.train.start, log.train.stop).split(2048):
                model(data.numeric[rows], data.ids[rows])
                method.step()
    return method.compress(budget=budget, **VARIANTS[variant])


def _compress(run, model, log, data, config) -> dict:
    dense_weights = sum(p.numel() for p in model.parameters())
    result = {"dense_weights": dense_weights, "dense": evaluate(model, data, log, log.test)}
    if config["variant"] != "dense":
        report = compressed(model, log, data, config["variant"], config["budget"])
        result["ranks"] = {entry.name: entry.rank for entry in report.compressed}
        result["relative_errors"] = {entry.name: entry.relative_error for entry in report.compressed}
    result["weights"] = sum(p.numel() for p in model.parameters())
    result["before"] = evaluate(model, data, log, log.test)
    best, best_loss = copy.deepcopy(model), data.validation_loss(model, log.valid)
    run.log(0, logloss=best_loss)
    plan, rate_of_best = _plan_of(log), None
    _, late = plan.parts(log.train)
    for number, rates in enumerate(FINETUNE):
        tuned = copy.deepcopy(model)
        train_clicks(tuned, data, late, log.valid, plan, rates, config["seed"] + 1, lambda count: None)
        loss = data.validation_loss(tuned, log.valid)
        run.log(number + 1, logloss=loss)
        run.advance(number + 1)
        if loss < best_loss:
            best, best_loss, rate_of_best = tuned, loss, number
    result["finetune"] = rate_of_best
    result["after"] = evaluate(best, data, log, log.test)
    return result


def _picture(session, name, kind, by_variant) -> None:
    """AUC over size: no learning curve, since nothing is learned while compressing."""
    curves = {}
    for (variant, _), results in by_variant.items():
        for result in results:
            share = round(result["weights"] / result["dense_weights"], 3)
            for when in ("before", "after"):
                label = f"{variant}, {'fine-tuned' if when == 'after' else 'not tuned'}"
                points = curves.setdefault(label, [])
                points.append([{"share of the weights": share, "test AUC": result[when]["auc"]}])
    session.picture(f"{name}-{kind}", curves, "share of the weights", "test AUC", f"{kind} on {name}")


def _latency(args, session, common, log, data, kind, rate) -> None:
    rows = []
    for batch in BATCHES:

        def body(run, batch=batch) -> dict:
            torch.manual_seed(0)
            dense = MODELS[kind](log.numeric.shape[1], log.field_sizes).eval()
            models = {"dense": dense}
            for budget in args.budgets:
                models[f"mimic {budget:g}"] = copy.deepcopy(dense)
                compressed(models[f"mimic {budget:g}"], log, data, "mimic", budget)
            turns = [(torch.arange(i, i + batch) * 7919) % log.rows for i in range(0, 8 * batch, batch)]
            inputs = [(data.numeric[r], data.ids[r]) for r in turns]
            with torch.inference_mode():
                calls = {n: _caller(model.eval(), inputs) for n, model in models.items()}
                return {n: vars(t) for n, t in interleaved(calls, args.timing_seconds).items()}

        line = session.run(
            {**common, "timing": "inference", "batch": batch, "budgets": args.budgets}, 1, body
        )
        dense = line["result"]["dense"]["p50_ms"]
        rows += [
            [str(batch), variant, f"{timing['p50_ms']:.3f}",
             f"{dense / timing['p50_ms']:.2f}x ({dense / timing['p80_ms']:.2f}..{dense / timing['p20_ms']:.2f})"]
            for variant, timing in line["result"].items()
        ]  # fmt: skip
    session.table(f"inference, {kind} on {common['data']}", ["batch", "model", "ms", "over dense"], rows)


def _caller(model, inputs):
    state = {"next": 0}

    def call():
        state["next"] = (state["next"] + 1) % len(inputs)
        return model(*inputs[state["next"]])

    return call
