"""`python -m recsparse_kernels bench`: each family against its dense torch layer, in a minute.

A first look at a machine. The benches in the repository (bench/) have more shapes, peers, cold caches
and backward passes; quote those.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from . import nn as layers
from . import tuning
from ._table import Table, bytes_text, show
from ._timing import interleaved
from .config import cpu_level
from .swap_report import layer_bytes
from .triton import _configs

# Zipf-like ids: a click log looks up few rows often
ZIPF_EXPONENT = 1.05


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer and the dense layer it stands for, on one input."""

    family: str
    layer: str
    shape: str
    make: Callable[[], tuple[nn.Module, nn.Module, tuple]]  # dense, ours, input


def cases(device: str = "cpu") -> list[Case]:
    """A hot shape of each family, and one where dense is hard to beat; on a GPU some larger ones too."""
    large = [
        Case("sparse24", "Sparse24Linear", "B=4096 I=4096 O=4096", partial(_sparse24, 4096, 4096, 4096)),
        Case("sparse24", "Sparse24Linear", "B=4096 I=2048 O=2048", partial(_sparse24, 4096, 2048, 2048)),
        Case("masked_embedding", "MaskedEmbeddingBag", "V=1000000 D=64 density=0.2 16384 bags x 32",
             partial(_masked_bag, 1_000_000, 64, 0.2, 16384, 32)),
        Case("low_rank", "LowRankCross", "B=4096 I=3456 R=64", partial(_cross, 4096, 3456, 64)),
    ]  # fmt: skip
    return (large if torch.device(device).type == "cuda" else []) + [
        Case("sparse24", "Sparse24Linear", "B=512 I=1024 O=1024", partial(_sparse24, 512, 1024, 1024)),
        Case("sparse24", "Sparse24Linear", "B=8 I=4096 O=4096", partial(_sparse24, 8, 4096, 4096)),
        Case("sparse24", "Sparse24Linear", "B=64 I=64 O=64", partial(_sparse24, 64, 64, 64)),
        Case("masked_embedding", "MaskedEmbeddingBag", "V=200000 D=64 density=0.2 2048 bags x 20",
             partial(_masked_bag, 200_000, 64, 0.2, 2048, 20)),
        Case("low_rank", "LowRankEmbeddingBag", "V=200000 D=128 R=16 2048 bags x 20",
             partial(_low_rank_bag, 200_000, 128, 16, 2048, 20)),
        Case("low_rank", "LowRankLinear", "B=1024 I=2000 O=2000 R=320",
             partial(_low_rank, 1024, 2000, 320)),
        Case("low_rank", "LowRankCross", "B=1024 I=3456 R=64", partial(_cross, 1024, 3456, 64)),
        Case("fan_in", "FixedFanInLinear", "B=32 I=768 O=65536 F=32",
             partial(_fan_in, 32, 768, 65536, 32)),
    ]  # fmt: skip


def _sparse24(batch: int, in_features: int, out_features: int):
    dense = nn.Linear(in_features, out_features)
    return dense, layers.Sparse24Linear.from_dense(dense), (torch.randn(batch, in_features),)


def _low_rank(batch: int, features: int, rank: int):
    dense = nn.Linear(features, features)
    return dense, layers.LowRankLinear.from_dense(dense, rank=rank), (torch.randn(batch, features),)


def _cross(batch: int, features: int, rank: int):
    ours = layers.LowRankCross(features, rank)
    dense = _DenseCross(nn.Linear(features, features))
    return dense, ours, (torch.randn(batch, features), torch.randn(batch, features))


class _DenseCross(nn.Module):
    """The cross layer of DCN-v2 with a full matrix: x0 * (W x + b) + x."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear

    def forward(self, x0: Tensor, x: Tensor) -> Tensor:
        return x0 * self.linear(x) + x


def _fan_in(batch: int, in_features: int, labels: int, fan_in: int):
    dense = nn.Linear(in_features, labels)
    ours = layers.FixedFanInLinear.from_dense(dense, fan_in=fan_in)
    return dense, ours, (torch.randn(batch, in_features),)


def _masked_bag(rows: int, dim: int, density: float, bags: int, length: int):
    dense = nn.EmbeddingBag(rows, dim, mode="sum")
    ours = layers.MaskedEmbeddingBag.from_dense(dense, density=density)
    return dense, ours, (zipf_ids(rows, (bags, length)),)


def _low_rank_bag(rows: int, dim: int, rank: int, bags: int, length: int):
    dense = nn.EmbeddingBag(rows, dim, mode="sum")
    ours = layers.LowRankEmbeddingBag(
        rows, dim, mode="sum", rank=rank
    )  # the SVD of the table would take longer
    return dense, ours, (zipf_ids(rows, (bags, length)),)


def zipf_ids(rows: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Ids in [0, rows), the k-th most frequent drawn about k ** -ZIPF_EXPONENT as often as the first."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.arange(1, rows + 1, dtype=torch.float64).pow(-ZIPF_EXPONENT).cumsum(0)
    draws = torch.rand(shape, generator=generator, dtype=torch.float64) * weights[-1]
    ranks = torch.searchsorted(weights, draws).clamp_max(rows - 1)
    return torch.randperm(rows, generator=generator)[ranks]


def _on(made: tuple[nn.Module, nn.Module, tuple], device: str, dtype: torch.dtype):
    """Layers and input there; ids stay whole numbers."""
    dense, ours, inputs = made
    inputs = tuple(x.to(device, dtype if x.is_floating_point() else None) for x in inputs)
    return dense.to(device, dtype), ours.to(device, dtype), inputs


def run(
    chosen: list[Case], rounds: int = 15, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Iterator[dict]:
    """One row of figures for each case, forward without gradient."""
    for case in chosen:
        torch.manual_seed(0)
        with torch.no_grad():
            dense, ours, inputs = _on(case.make(), device, dtype)
            dense_ms, own_ms = interleaved([lambda: dense(*inputs), lambda: ours(*inputs)], rounds)  # noqa: B023
        yield {
            "family": case.family, "layer": case.layer, "shape": case.shape,
            "pass": "forward", "device": device, "dtype": str(dtype).removeprefix("torch."),
            "dense_ms": dense_ms, "ms": own_ms, "speedup_over_dense": dense_ms / own_ms,
            "dense_bytes": layer_bytes(dense), "bytes": layer_bytes(ours),
            "threads": torch.get_num_threads(), "cpu_level": cpu_level(), "torch": torch.__version__,
        }  # fmt: skip


def table(rows: list[dict]) -> Table:
    cells = [
        [
            row["layer"], row["shape"], f"{row['dense_ms']:.3f}", f"{row['ms']:.3f}",
            f"{row['speedup_over_dense']:.2f}x", bytes_text(row["bytes"]),
            f"{row['bytes'] / row['dense_bytes']:.3f}",
        ]
        for row in rows
    ]  # fmt: skip
    where = f"{torch.get_num_threads()} threads, {cpu_level() or 'no native library'}"
    kind = next(((row["device"], row["dtype"]) for row in rows), ("cpu", "float32"))
    title = f"forward, {kind[1]}, {where if kind[0] == 'cpu' else kind[0]}"
    columns = ["layer", "shape", "dense ms", "ms", "speed", "bytes", "ratio"]
    return Table(title, columns, cells, frozenset(range(2, len(columns))))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--family", action="append", choices=sorted({case.family for case in cases()}))
    parser.add_argument("--rounds", type=int, default=15, help="how often each layer is timed (default 15)")
    parser.add_argument(
        "--tune", nargs="?", const="", metavar="FILE",
        help="measure native against the dense path here, on a GPU Triton's configurations too; store the choice in "
        "the user's table or FILE",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="where the layers are, say cuda (default cpu)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--json", action="store_true", help="one JSON line for each case instead of a table")


def tune_cases(
    chosen: list[Case],
    rounds: int,
    path: Path | None,
    device: str = "cpu",
) -> tuning.TuneReport:
    """Measure the backends of the ops that the cases call, with and without gradient, and store them.

    On a GPU the configurations of Triton kernels too; with ``path``, beside it in triton_configs.json.
    """
    report = tuning.TuneReport()
    for case in chosen:
        torch.manual_seed(0)
        made = case.make()
        for dtype in (torch.float32, torch.bfloat16):
            made = _on(made, device, dtype)
            for training in (False, True):
                with torch.set_grad_enabled(training):
                    measured = tuning.tune(made[1], *made[2], rounds=rounds, store=False)
                report.entries += measured.entries
                report.configs += measured.configs
                report.skipped += measured.skipped
                if measured.entries:  # at once: a GPU's error ends the process
                    report.path = tuning.save(measured.entries, path)
                if measured.configs:
                    _configs.save(measured.configs, path and path.with_name("triton_configs.json"))
    return report


def main(args: argparse.Namespace) -> int:
    if args.rounds < 1:
        raise ValueError(f"--rounds must be at least 1; got {args.rounds}")
    device, dtype = str(torch.device(args.device)), getattr(torch, args.dtype)
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch sees no GPU")
    chosen = [case for case in cases(device) if not args.family or case.family in args.family]
    if args.tune is not None:
        tune_cases(chosen, args.rounds, Path(args.tune) if args.tune else None, device).show()
        return 0
    rows = []
    for row in run(chosen, args.rounds, device, dtype):
        rows.append(row)
        if args.json:
            print(json.dumps(row), flush=True)
    if not args.json:
        show(table(rows))
    return 0
