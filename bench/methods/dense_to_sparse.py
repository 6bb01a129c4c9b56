"""Adaptive dense-to-sparse on a click stream in time order: progressive loss of dense, fixed and adaptive.

Every window is scored by each model before the model trains on it. The dense model warms up on the first
fifth of the windows (scores that weigh gradients watch), then the sparse ones are pruned from it. Learning
rates are chosen by the dense model's loss on the second fifth; the figures are of the rest. One run trains
all of them side by side.
"""

import copy

import torch

from recsparse_kernels.demo.data import ClickLog
from recsparse_kernels.demo.measure import interleaved, parameter_bytes
from recsparse_kernels.demo.models import DLRM
from recsparse_kernels.demo.train import ClickTensors, Rates, step
from recsparse_kernels.training import AdaptiveDenseToSparse, GradientWeighted, Magnitude

from ._clicks import figures, open_log, optimizers_for
from ._drift import generate_drift
from .session import spread

HELP = "a sparse copy pruned anew from a dense model as the data drift (arXiv 2010.08655)"
RATES = (Rates(0.03, 5e-4), Rates(0.05, 1e-3), Rates(0.1, 2e-3))
WINDOWS = 40
BATCH = {"drift": 256, "criteo_10k": 64, "criteo_deeplight_20k": 64, "generated": 256}
VARIANTS = {
    "fixed mask": {"refresh_every": 0, "score": Magnitude()},
    "fixed mask, w g": {"refresh_every": 0, "score": GradientWeighted()},
    "adaptive, r=1": {"refresh_every": 1, "score": Magnitude()},
    "adaptive, r=4": {"refresh_every": 4, "score": Magnitude()},
    "adaptive, r=4, w g": {"refresh_every": 4, "score": GradientWeighted()},
    "adaptive, r=4, w g, relearn": {"refresh_every": 4, "score": GradientWeighted(), "relearn": True},
}


def add_arguments(parser) -> None:
    parser.add_argument("--datasets", type=lambda t: t.split(","), default=["drift", "criteo_10k"])
    parser.add_argument("--rows", type=int, default=80_000, help="of generated streams")
    parser.add_argument("--budgets", type=lambda t: [float(w) for w in t.split(",")], default=[0.1])
    parser.add_argument("--timing-seconds", type=float, default=10.0, help="for the latencies; 0: none")


def run(args, session) -> None:
    for name in args.datasets:
        for budget in args.budgets:
            _one_stream(args, session, name, budget)


def _open(name: str, args, seed: int) -> tuple[ClickLog | None, tuple[int, ...]]:
    if name == "drift":
        return generate_drift(args.rows, seed)
    return open_log(name, args.data, args.rows), ()


def _one_stream(args, session, name, budget) -> None:
    log, _ = _open(name, args, 0)
    if log is None:
        return
    common = {"data": name, "rows": log.rows, "budget": budget, "windows": WINDOWS}
    losses = {
        rate: _stream(session, args, common, name, args.seeds[0], rate, {})["result"]["choice"]
        for rate in range(len(RATES))
    }
    rate = min(losses, key=losses.get)
    lines = [_stream(session, args, common, name, seed, rate, VARIANTS) for seed in args.seeds]
    results = [line["result"] for line in lines]
    rows = []
    for variant in ("dense", *VARIANTS):
        own = [r["figures"][variant] for r in results]
        gap = [r["figures"][variant]["logloss"] - r["figures"]["dense"]["logloss"] for r in results]
        moved = results[0]["moved"].get(variant)
        rows.append([
            variant, spread([f["logloss"] for f in own]), spread(gap), spread([f["auc"] for f in own]),
            f"{results[0]['bytes'][variant] / results[0]['bytes']['dense']:.3f}",
            "" if moved is None else f"{moved:.2f}",
        ])  # fmt: skip
    columns = ["model", "progressive log loss", "over dense", "AUC", "bytes of dense", "moved a refresh"]
    session.table(f"{name}, density {budget:g}, rate {RATES[rate].rest:g}", columns, rows)
    _densities(session, name, results)
    curves = {
        v: [[{"window": p["step"], "logloss": p[v]} for p in line["curve"]] for line in lines]
        for v in ("dense", "fixed mask", "adaptive, r=4, w g", "adaptive, r=1")
    }
    session.picture(f"{name}-{budget:g}", curves, "window", "logloss", f"progressive log loss, {name}")
    if args.timing_seconds:
        _latency(args, session, common, log, name, budget)


def _densities(session, name, results) -> None:
    rows = []
    for variant in ("fixed mask", "fixed mask, w g", "adaptive, r=4, w g, relearn"):
        found = [r["densities"][variant] for r in results]
        rows.append([variant, *(f"{sum(f[k] for f in found) / len(found):.3f}" for k in found[0])])
    session.table(f"learned density of each layer, {name}", ["model", *results[0]["densities"]["fixed mask"]],
                  rows)  # fmt: skip


def _window_rows(log: ClickLog) -> list[slice]:
    edges = [log.rows * i // WINDOWS for i in range(WINDOWS + 1)]
    return [slice(b, e) for b, e in zip(edges[:-1], edges[1:], strict=True)]


class _Entry:
    """A model of the stream with its optimizers, and with what prunes it."""

    def __init__(self, model, optimizers, method=None):
        self.model, self.optimizers, self.method = model, optimizers, method

    @property
    def parts(self) -> list:
        return [part for part in (self.method, self.model, *self.optimizers) if part is not None]


def _stream(session, args, common, name, seed, rate, variants) -> dict:
    def body(run) -> dict:
        log, changes = _open(name, args, seed)
        data, batch = ClickTensors(log), BATCH[name]
        windows = _window_rows(log)
        warm, choice = WINDOWS // 5, 2 * WINDOWS // 5
        torch.manual_seed(seed)
        dense = DLRM(log.numeric.shape[1], log.field_sizes)
        entries = {"dense": _Entry(dense, optimizers_for(dense, data, RATES[rate]))}
        scores: dict[str, list[torch.Tensor]] = {"dense": []}
        moved: dict[str, list[float]] = {}
        held, begin = run.resume(), 0
        _sparse_entries(entries, dense, variants, common["budget"], data, RATES[rate], seed)
        if held is not None:
            begin, scores, moved = held["window"], held["scores"], held["moved"]
            for key, states in held["parts"].items():
                for part, state in zip(entries[key].parts, states, strict=True):
                    part.load_state_dict(state)
        for number in range(begin, WINDOWS if variants else choice):
            if number == warm:
                scores.update({key: [] for key in variants})
                for entry in entries.values():
                    if entry.method is not None:
                        entry.method.refresh(relearn=True)
            _window(entries, data, log, windows[number], batch, scores if number >= warm else None, moved)
            if number >= warm:
                clicked = log.clicked[windows[number]]
                losses = {k: figures(clicked, s[-1].numpy())["logloss"] for k, s in scores.items()}
                run.log(number, **losses)
            run.advance(number + 1)
            run.save(lambda number=number: {
                "window": number + 1, "scores": scores, "moved": moved,
                "parts": {key: [p.state_dict() for p in entry.parts] for key, entry in entries.items()},
            })  # fmt: skip
        if not variants:
            clicked = log.clicked[windows[warm].start : windows[choice - 1].stop]
            return {"choice": figures(clicked, torch.cat(scores["dense"]).numpy())["logloss"]}
        clicked = log.clicked[windows[choice].start :]
        return {
            "figures": {k: figures(clicked, torch.cat(s[choice - warm :]).numpy()) for k, s in scores.items()},
            "densities": {k: e.method.densities for k, e in entries.items() if e.method},
            "bytes": {k: parameter_bytes(e.model) for k, e in entries.items()},
            "moved": {k: sum(v) / len(v) for k, v in moved.items()},
            "change_windows": [change * WINDOWS / log.rows for change in changes],
        }  # fmt: skip

    config = {**common, "seed": seed, "rate": rate, "variants": list(variants)}
    return session.run(config, WINDOWS if variants else 2 * WINDOWS // 5, body)


def _sparse_entries(entries, dense, variants, budget, data, rates, seed) -> None:
    for key, options in variants.items():
        method = AdaptiveDenseToSparse(
            dense, budget, dense_optimizers=entries["dense"].optimizers, seed=seed, **options
        )
        method.sparse_optimizers = optimizers_for(method.sparse, data, rates)
        entries[key] = _Entry(method.sparse, method.sparse_optimizers, method)


def _window(entries, data, log, rows, batch, scores, moved) -> None:
    """Score the window, then train on it in time order, then let the methods refresh.

    Until the warm-up is over (``scores`` None) only the dense model trains, and scores watch it.
    """
    if scores is not None:
        for key, entry in entries.items():
            scores[key].append(torch.from_numpy(data.scores(entry.model, rows)))
    dense, others = entries["dense"], [entry for entry in entries.values() if entry.method is not None]
    for part in torch.arange(rows.start, rows.stop).split(batch):
        dense.model.train()
        for optimizer in dense.optimizers:
            optimizer.zero_grad(set_to_none=True)
        data.loss(dense.model, part).backward()
        for other in others:
            other.method.observe()
        for optimizer in dense.optimizers:
            optimizer.step()
        for other in others if scores is not None else ():
            other.model.train()
            step(data.loss(other.model, part), other.optimizers)
    for key, entry in entries.items() if scores is not None else ():
        if entry.method is not None and (refresh := entry.method.step()):
            shares = [refresh.moved[n] * refresh.density[n] for n in refresh.moved]
            moved.setdefault(key, []).append(sum(shares) / sum(refresh.density.values()))


def _latency(args, session, common, log, name, budget) -> None:
    data, rows = ClickTensors(log), []
    for batch in (1, 256, 4096):

        def body(run, batch=batch) -> dict:
            torch.manual_seed(0)
            dense = DLRM(log.numeric.shape[1], log.field_sizes)
            method = AdaptiveDenseToSparse(dense, budget)
            frozen = copy.deepcopy(method.sparse)
            frozen.table.freeze()
            models = {"dense": dense, "sparse": method.sparse, "sparse, tables frozen": frozen}
            turns = [(torch.arange(i, i + batch) * 7919) % log.rows for i in range(0, 8 * batch, batch)]
            inputs = [(data.numeric[r], data.ids[r]) for r in turns]
            with torch.inference_mode():
                calls = {n: _caller(model.eval(), inputs) for n, model in models.items()}
                return {n: vars(t) for n, t in interleaved(calls, args.timing_seconds).items()}

        line = session.run({**common, "timing": "inference", "batch": batch}, 1, body)
        base = line["result"]["dense"]["p50_ms"]
        rows += [
            [str(batch), model, f"{timing['p50_ms']:.3f}",
             f"{base / timing['p50_ms']:.2f}x ({base / timing['p80_ms']:.2f}..{base / timing['p20_ms']:.2f})"]
            for model, timing in line["result"].items()
        ]  # fmt: skip
    session.table(
        f"inference, DLRM on {name}, density {budget:g}", ["batch", "model", "ms", "over dense"], rows
    )


def _caller(model, inputs):
    state = {"next": 0}

    def call():
        state["next"] = (state["next"] + 1) % len(inputs)
        return model(*inputs[state["next"]])

    return call
