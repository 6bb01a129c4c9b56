"""Dynamic Sparse Learning on gowalla: Recall@20 and NDCG@20 of dense and packed sparse tables.

Backbones: mf (BPR), lightgcn, neumf (hit rate and NDCG at 20 among 100 negatives), multvae. The published
dense LightGCN on this split has Recall@20 0.1830, NDCG@20 0.1554. For time, batches are larger and epochs
fewer than the paper's (1024 and 1000 for LightGCN): a propagation costs as much as 20,000 triples, and with
Adam a batch 64 times as large carries a learning rate about 8 times as high at the same noise.
"""

import argparse
import functools
import math

import torch
from torch import nn

from recsparse_kernels.demo.measure import optimizer_bytes, parameter_bytes
from recsparse_kernels.nn import MaskedEmbedding
from recsparse_kernels.training import DynamicSparseLearning
from recsparse_kernels.training.schedules import cosine

from .interactions import Interactions
from .recommenders import LightGCN, MultVAE, NeuMF
from .session import Run, Session, spread

HELP = "sparse embedding tables from scratch, on gowalla"

# batch, epochs, learning rate, L2, updates of the topology over the run
SETTINGS = {
    "mf": (8192, 20, 1e-2, 1e-2),
    "lightgcn": (65536, 700, 3e-2, 1e-4),
    "neumf": (8192, 20, 5e-3, 0.0),
    "multvae": (512, 40, 1e-3, 0.0),
}
LAST_RATE = 0.01  # of the first: the learning rate falls along a cosine
UPDATES = 100  # the paper's LightGCN, at 1000 epochs of 791 steps and an update every 3000: 264


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backbones", default="lightgcn", help=f"some of {','.join(SETTINGS)}")
    parser.add_argument("--densities", default="1,0.5,0.2", help="1 is dense")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--decay", type=float)
    parser.add_argument("--std", type=float, default=0.1, help="of LightGCN's and MF's first values")
    parser.add_argument("--update-every", type=int, help=f"steps; default: {UPDATES} updates in all")
    parser.add_argument("--score", default="last", choices=("last", "accumulate", "ema"))
    parser.add_argument("--optimizer-state", default="kept", choices=("kept", "zeroed", "paper"))
    parser.add_argument("--evaluations", type=int, default=10, help="over the run")


def run(args: argparse.Namespace, session: Session) -> None:
    folder = args.data / "gowalla"
    data = Interactions(folder / "train.txt", folder / "test.txt")
    adjacency = data.adjacency()
    for backbone in args.backbones.split(","):
        batch, epochs, lr, decay = SETTINGS[backbone]
        batch, epochs = args.batch or batch, args.epochs or epochs
        lr, decay = args.lr or lr, decay if args.decay is None else args.decay
        rows = len(data.active) if backbone == "multvae" else len(data.train.values)
        steps = math.ceil(rows / batch) * epochs
        lines = {}
        for density in map(float, args.densities.split(",")):
            for seed in args.seeds:
                config = {
                    "backbone": backbone, "density": density, "seed": seed, "batch": batch, "epochs": epochs,
                    "lr": lr, "decay": decay, "std": args.std,
                    "update_every": args.update_every or max(1, steps // UPDATES),
                    "score": args.score, "optimizer_state": args.optimizer_state,
                    "evaluations": args.evaluations,
                }  # fmt: skip
                body = functools.partial(train, data, adjacency, steps)
                lines.setdefault(density, []).append(session.run(config, steps, body))
        report(session, backbone, lines)


def build(config: dict, data: Interactions, adjacency: torch.Tensor) -> nn.Module:
    def table(rows: int, width: int) -> nn.Module:
        if config["density"] == 1:
            return nn.Embedding(rows, width)
        return MaskedEmbedding(rows, width, density=config["density"])

    torch.manual_seed(config["seed"])
    if config["backbone"] == "neumf":
        return NeuMF(data.users, data.items, table)
    if config["backbone"] == "multvae":
        return MultVAE(data.items, table)
    layers = 3 if config["backbone"] == "lightgcn" else 0
    return LightGCN(data.users, data.items, table, adjacency, layers=layers, std=config["std"])


def train(data: Interactions, adjacency: torch.Tensor, steps: int, run: Run) -> dict:
    config = run.config
    model = build(config, data, adjacency)
    optimizer = torch.optim.Adam(model.parameters(), lr=config["lr"], fused=True)
    rate = cosine(config["lr"], config["lr"] * LAST_RATE, end_step=steps)
    method = None
    if config["density"] < 1:
        method = DynamicSparseLearning(
            model, steps, config["update_every"], optimizers=optimizer, score=config["score"],
            optimizer_state=config["optimizer_state"], seed=config["seed"],
        )  # fmt: skip
    generator, begin = torch.Generator().manual_seed(config["seed"]), 0
    state = run.resume()
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if method is not None:
            method.load_state_dict(state["method"])
        generator.set_state(state["generator"])
        torch.set_rng_state(state["global"])
        begin = state["step"]

    def checkpoint(step: int) -> dict:
        return {
            "model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
            "method": method.state_dict() if method else None,
            "generator": generator.get_state(), "global": torch.get_rng_state(),
        }  # fmt: skip

    evaluate_at = {round(steps * i / config["evaluations"]) for i in range(1, config["evaluations"] + 1)}
    for step in range(begin, steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        loss = model.loss(model.batch(data, config["batch"], generator), config["decay"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if method is not None:
            method.step()
        run.advance(step + 1)
        if step + 1 in evaluate_at:
            run.log(step + 1, loss=float(loss.detach()), **model.evaluate(data))
        run.save(lambda: checkpoint(step + 1))  # noqa: B023  (called at once)
    figures = {key: value for key, value in run.curve[-1].items() if key not in ("step", "loss")}
    tables = [m for m in model.modules() if isinstance(m, (nn.Embedding, MaskedEmbedding))]
    return {
        **figures,
        "kept": sum(m.nnz if isinstance(m, MaskedEmbedding) else m.weight.numel() for m in tables),
        "parameter_bytes": parameter_bytes(model), "optimizer_bytes": optimizer_bytes([optimizer]),
    }  # fmt: skip


def report(session: Session, backbone: str, lines: dict[float, list[dict]]) -> None:
    first = "hit20" if backbone == "neumf" else "recall20"
    rows = []
    for density, runs in lines.items():
        held = [r["result"]["parameter_bytes"] + r["result"]["optimizer_bytes"] for r in runs]
        rows.append([
            "dense" if density == 1 else f"density {density:g}",
            spread([r["result"][first] for r in runs]), spread([r["result"]["ndcg20"] for r in runs]),
            f"{held[0] / 2**20:.1f} MiB", spread([r["seconds"] / 60 for r in runs], 1) + " min",
        ])  # fmt: skip
    session.table(
        f"{backbone} on gowalla, {len(next(iter(lines.values())))} seed(s)",
        ["table", first, "ndcg20", "weights + moments + index", "time"], rows,
    )  # fmt: skip
    curves = {
        ("dense" if d == 1 else f"density {d:g}"): [r["curve"] for r in runs] for d, runs in lines.items()
    }
    session.picture(backbone, curves, "step", first, f"Dynamic Sparse Learning, {backbone}, gowalla")
