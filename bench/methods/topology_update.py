"""Fixed fan-in output layers that rewire while they train (arXiv 2411.03171), against dense heads.

Parts: delicious (983 labels, P@1/3/5), gowalla (40,981 labels: the items of a user from half of them), and
generated (Zipf labels, 131K to 8.6M: peak memory and step time; dense where it fits, else extrapolated).
To beat on delicious: dense head 68.3 / 63.2 / 58.1; random fan-in 64 of 512: 66.8 / 60.4 / 55.9; 32: 65.0 /
59.2 / 54.2. Amazon-3M in the papers: dense 46.3 GiB, Spartex 13.5, HASTE 5.67, ELMO 6.6.
"""

import argparse
import dataclasses
import functools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from recsparse_kernels.demo.data import LabelData, LabelSplit, Ragged
from recsparse_kernels.demo.data import load as load_data
from recsparse_kernels.demo.measure import parameter_bytes
from recsparse_kernels.demo.metrics import label_metrics
from recsparse_kernels.demo.models import HIDDEN, LabelModel, set_prior
from recsparse_kernels.demo.train import hide_half, recommend
from recsparse_kernels.nn import FanInHead, label_order
from recsparse_kernels.training import ClusterObjective, TopologyUpdate, cluster_labels
from recsparse_kernels.training.schedules import cosine

from .session import Run, Session, spread

HELP = "fixed fan-in output layers with rewiring: P@k, memory and step time"

REWIRED_SHARE = 0.66  # of training, as the paper
SIZES = (131_073, 670_091, 2_812_281, 8_623_847)
DENSE_LIMIT_BYTES = 9 * 2**30  # weights, gradients, moments of a dense layer that is tried at all
LAST_RATE = 0.05  # of the first: learning rates fall along a cosine, in all heads
EMBEDDING = 64  # of labels, for clusters and groups: projected features of their positives


@dataclasses.dataclass(frozen=True)
class Head:
    """A row of the table."""

    fan_in: int | None = None  # None: dense
    rewire: str | None = None  # "fraction", "threshold" or "gradient"
    group_size: int = 1
    intermediate: int | None = None
    dense_labels: int = 0
    clusters: int | None = None  # labels in a cluster of the auxiliary objective
    dtype: str = "float32"


HEADS = {
    "dense": Head(),
    "random 64": Head(64),
    "random 32": Head(32),
    "SET 64": Head(64, "fraction"),
    "SET 32": Head(32, "fraction"),
    "SET threshold 32": Head(32, "threshold"),
    "RigL 64": Head(64, "gradient"),
    "RigL 32": Head(32, "gradient"),
    "RigL 16": Head(16, "gradient"),
    "SET 32, clusters": Head(32, "fraction", clusters=16),
    "SET 32, dense 100": Head(32, "fraction", dense_labels=100),
    "SET 32, intermediate 1024": Head(32, "fraction", intermediate=1024),
    "RigL 32, dense 100": Head(32, "gradient", dense_labels=100),
    "RigL 64, dense 100": Head(64, "gradient", dense_labels=100),
    "SET 64, groups of 16": Head(64, "fraction", group_size=16),
    "SET 32, bfloat16": Head(32, "fraction", dtype="bfloat16"),
}
GOWALLA = ("dense", "random 32", "SET 32", "RigL 32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", default="delicious,gowalla,generated")
    parser.add_argument("--heads", help=f"rows, separated by semicolons, of {'; '.join(HEADS)}")
    parser.add_argument("--epochs", type=int, help="default: 25 on delicious, 6 on gowalla")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--head-lr", type=float, default=3e-3, help="Adam, of fixed fan-in weights")
    parser.add_argument("--updates", type=int, help="of the topology; default: 16 on delicious, 4 on gowalla")
    parser.add_argument("--evaluations", type=int, default=5, help="over a run")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="numbers of generated labels")
    parser.add_argument("--scale-batch", type=int, default=32)
    parser.add_argument("--scale-steps", type=int, default=2)
    parser.add_argument("--scale-fan-in", type=int, default=128)


def run(args: argparse.Namespace, session: Session) -> None:
    parts = args.parts.split(",")
    for part, folder in (("delicious", "delicious_983"), ("gowalla", "gowalla")):
        if part in parts:
            labelled(args, session, part, args.data / folder)
    if "generated" in parts:
        generated(args, session)


# ---- accuracy ----


def labelled(args: argparse.Namespace, session: Session, part: str, folder: Path) -> None:
    data = whole(load_data(folder, 0, 0))
    epochs = args.epochs or {"delicious": 25, "gowalla": 6}[part]
    updates = args.updates or {"delicious": 16, "gowalla": 4}[part]
    steps = epochs * math.ceil(len(data.train.labels) / args.batch)
    names = args.heads.split(";") if args.heads else (HEADS if part == "delicious" else GOWALLA)
    lines = {}
    for name in (n.strip() for n in names):
        for seed in args.seeds:
            config = {
                "data": part, "head": name, "seed": seed, "batch": args.batch, "epochs": epochs,
                "updates": updates, "head_lr": args.head_lr,
                "evaluations": args.evaluations,
            }  # fmt: skip
            body = functools.partial(train, data, HEADS[name], steps)
            lines.setdefault(name, []).append(session.run(config, steps, body))
    keys = ("recall20", "ndcg20", "p1") if data.items else ("p1", "p3", "p5")
    rows = [
        [
            name,
            *(spread([100 * r["result"][k] for r in runs], 2) for k in keys),
            f"{runs[0]['result']['head_bytes'] / 2**20:.2f} MiB",
            f"{1e3 * sum(r['result']['step_seconds'] for r in runs) / len(runs):.1f} ms",
        ]
        for name, runs in lines.items()
    ]
    columns = ["head", *keys, "head: weights, moments, index", "step"]
    session.table(f"{data.name}: {data.num_labels} labels, {len(args.seeds)} seed(s)", columns, rows)
    curves = {name: [r["curve"] for r in runs] for name, runs in lines.items()}
    session.picture(part, curves, "step", keys[0], f"Fixed fan-in heads, {data.name}")


def whole(data: LabelData) -> LabelData:
    """Training and validation rows together, as the figures to beat were made: nothing is chosen by them."""
    if data.items:
        return data

    def joined(a: Ragged, b: Ragged) -> Ragged:
        weights = None if a.weights is None else np.concatenate([a.weights, b.weights])
        values = np.concatenate([a.values, b.values])
        return Ragged(np.concatenate([a.offsets, b.offsets[1:] + a.offsets[-1]]), values, weights)

    parts = data.train, data.valid
    train = LabelSplit(joined(*(p.features for p in parts)), joined(*(p.labels for p in parts)))
    return dataclasses.replace(data, train=train)


def label_embeddings(data: LabelData) -> Tensor:
    """Mean projected features of the rows that have the label."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(data.num_features, EMBEDDING, generator=generator)
    features, labels = data.train.features, data.train.labels
    rows = nn.functional.embedding_bag(
        torch.from_numpy(features.values), table, torch.from_numpy(features.offsets), mode="sum",
        per_sample_weights=torch.from_numpy(features.weights), include_last_offset=True,
    )  # fmt: skip
    out = torch.zeros(data.num_labels, EMBEDDING)
    return out.index_add_(0, torch.from_numpy(labels.values), rows[torch.from_numpy(labels.row_of_value())])


def make_head(head: Head, data: LabelData, lr: float) -> nn.Module:
    """Biases start at each label's log-odds, in all heads."""
    counts = torch.from_numpy(np.bincount(data.train.labels.values, minlength=data.num_labels))
    if head.fan_in is None:
        made = nn.Linear(HIDDEN, data.num_labels)
        set_prior(made, counts, len(data.train.labels))
        return made
    order = None
    if head.dense_labels or head.group_size > 1:
        order = label_order(
            counts, dense_labels=head.dense_labels, embeddings=label_embeddings(data),
            group_size=head.group_size,
        )  # fmt: skip
    made = FanInHead(
        HIDDEN, data.num_labels, head.fan_in, group_size=head.group_size, intermediate=head.intermediate,
        dense_labels=head.dense_labels, label_order=order,
    )  # fmt: skip
    ordered = counts[made.label_order]
    set_prior(made.sparse, ordered[head.dense_labels :], len(data.train.labels))
    if made.dense is not None:
        set_prior(made.dense, ordered[: head.dense_labels], len(data.train.labels))
    made.sparse.to(getattr(torch, head.dtype))
    made.sparse.fuse_optimizer("adam", lr=lr, stochastic_rounding=head.dtype == "bfloat16")
    return made


def train(data: LabelData, head: Head, steps: int, run: Run) -> dict:
    config = run.config
    torch.manual_seed(config["seed"])
    model = LabelModel(data.num_features, make_head(head, data, config["head_lr"]))
    method = objective = None
    every = max(1, round(steps * REWIRED_SHARE / config["updates"]))
    end = max(every, int(steps * REWIRED_SHARE))
    if head.rewire is not None:
        how = {
            "fraction": {"drop_fraction": 0.2},
            "threshold": {"drop_threshold": cosine(0.02, 1e-4, end_step=end)},
            "gradient": {"drop_fraction": cosine(0.3, end_step=end), "regrow": "gradient"},
        }[head.rewire]
        method = TopologyUpdate(
            model, update_every=every, end_step=end, seed=config["seed"], **how, reset_state=True
        )
    if head.clusters is not None:
        clusters = cluster_labels(label_embeddings(data), head.clusters)
        objective = ClusterObjective(HIDDEN, clusters, cosine(0.4, end_step=max(1, steps // 6)))
    dense_parameters = [
        p for n, p in model.named_parameters() if not n.startswith("head.sparse") and n != "encoder.weight"
    ]
    dense_parameters += list(objective.parameters()) if objective else []
    sparse_encoder = model.encoder.sparse
    optimizers = [torch.optim.Adam(dense_parameters, lr=1e-3, fused=True)]
    if sparse_encoder:
        optimizers.append(torch.optim.SparseAdam([model.encoder.weight], lr=1e-3))
    else:
        optimizers.append(torch.optim.Adam([model.encoder.weight], lr=1e-3, fused=True))
    begin, rng = 0, np.random.default_rng(config["seed"])
    order = np.empty(0, np.int64)
    state = run.resume()
    if state is not None:
        model.load_state_dict(state["model"])
        if objective is not None and "head.weight" not in state["objective"]:
            objective.drop(optimizers[0])  # as it was when saved: the optimizer's parameters must be the same
        for optimizer, held in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(held)
        for part, held in ((method, state["method"]), (objective, state["objective"])):
            if part is not None:
                part.load_state_dict(held)
        if method is None and isinstance(model.head, FanInHead):
            model.head.sparse.update.load_state_dict(state["update"])
        rng.bit_generator.state, order, begin = state["rng"], state["order"], state["step"]
        torch.set_rng_state(state["global"])

    def checkpoint(step: int) -> dict:
        fused = isinstance(model.head, FanInHead)
        return {
            "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
            "method": method.state_dict() if method else None, "step": step, "order": order,
            "objective": objective.state_dict() if objective else None, "rng": rng.bit_generator.state,
            "update": model.head.sparse.update.state_dict() if fused else None,
            "global": torch.get_rng_state(),
        }  # fmt: skip

    evaluations = config["evaluations"]
    evaluate_at = {round(steps * i / evaluations) for i in range(1, evaluations + 1)}
    rate = cosine(1.0, LAST_RATE, end_step=steps)
    for step in range(begin, steps):
        model.train()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * rate(step)
        if isinstance(model.head, FanInHead):
            model.head.sparse.update.lr = config["head_lr"] * rate(step)
        if not len(order):
            order = rng.permutation(len(data.train.labels))
        rows, order = order[: config["batch"]], order[config["batch"] :]
        features, labels = data.train.features.take(rows), data.train.labels.take(rows)
        if data.items:
            features = hide_half(features, rng)
        loss = loss_of(model, objective, step, features, labels)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        if method is not None:
            method.step()
        if objective is not None and objective.head is not None and not objective.active(step + 1):
            objective.drop(optimizers[0])
        run.advance(step + 1)
        if step + 1 in evaluate_at:
            run.log(step + 1, loss=float(loss.detach()), **evaluate(model, data))
        run.save(lambda: checkpoint(step + 1))  # noqa: B023  (called at once)
    figures = {k: v for k, v in run.curve[-1].items() if k not in ("step", "loss")}
    return {**figures, "head_bytes": head_bytes(model.head, optimizers), "step_seconds": run.seconds / steps}


def loss_of(model: LabelModel, objective, step: int, features: Ragged, labels: Ragged) -> Tensor:
    if isinstance(model.head, nn.Linear):
        return model.loss(features, labels)
    hidden = model.hidden(features)
    positives = torch.from_numpy(labels.offsets), torch.from_numpy(labels.values)
    if objective is None:
        return model.head.loss(hidden, positives, reduction="batchmean")
    # both as means over rows and outputs, as the paper mixes them
    main = model.head.loss(hidden, positives, reduction="mean")
    return objective(step, main, hidden, positives) * model.head.out_features


def evaluate(model: LabelModel, data: LabelData) -> dict[str, float]:
    metrics = label_metrics(recommend(model, data.test, data.items), data.test.labels, data.items)
    figures = {f"p{k}": v for k, v in metrics.precision.items()}
    return {**figures, "recall20": metrics.recall, "ndcg20": metrics.ndcg} if data.items else figures


def head_bytes(head: nn.Module, optimizers: list) -> int:
    if isinstance(head, nn.Linear):
        return 3 * parameter_bytes(head)
    report = head.sparse.memory_report()
    rest = sum(3 * p.numel() * 4 for n, p in head.named_parameters() if not n.startswith("sparse."))
    return report.own_bytes + report.optimizer_bytes + rest


# ---- scale ----


def generated(args: argparse.Namespace, session: Session) -> None:
    rows, measured = [], {}
    for labels in map(int, args.sizes.split(",")):
        for head, dtype, group_size, optimizer in (
            ("dense", "float32", 1, "momentum"),
            ("fan_in", "float32", 1, "momentum"),
            ("fan_in", "bfloat16", 1, "sgd"),
            ("fan_in", "bfloat16", 32, "sgd"),
        ):
            dense_bytes = labels * 769 * 4 * 3
            config = {
                "data": "zipf", "labels": labels, "head": head, "dtype": dtype, "fan_in": args.scale_fan_in,
                "group_size": group_size, "optimizer": optimizer, "batch": args.scale_batch,
                "steps": args.scale_steps,
            }  # fmt: skip
            what = "dense" if head == "dense" else f"{dtype}, G = {group_size}"
            if head == "dense" and dense_bytes > DENSE_LIMIT_BYTES:
                # weights, momentum, gradient, and two [B, O] of logits
                bytes_ = dense_bytes + 2 * 4 * args.scale_batch * labels
                rows.append([f"{labels:,}", what, f"{bytes_ / 2**30:.2f} GiB, extrapolated", "", "", ""])
                continue
            line = session.run(config, 1, measure)["result"]
            measured[labels, what] = line
            rows.append([
                f"{labels:,}", what, f"{line['peak_bytes'] / 2**30:.2f} GiB",
                f"{line['peak_bytes'] / line['formula_bytes']:.2f}", f"{line['step_seconds']:.2f} s",
                f"{line['rewire_seconds']:.2f} s" if "rewire_seconds" in line else "",
            ])  # fmt: skip
    session.table(
        f"Zipf labels, 768 inputs, fan-in {args.scale_fan_in}, batch {args.scale_batch}",
        ["labels", "head", "peak", "peak / (weights + moments + index)", "step", "rewire"], rows,
    )  # fmt: skip


def measure(run: Run) -> dict:
    """In a fresh process, so that the high-water mark is this layer's."""
    config = {**run.config, "threads": torch.get_num_threads()}
    command = [sys.executable, "-m", "bench.methods._label_scale", json.dumps(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])
