"""Everything on a GPU: correctness first, then speed. Under eight minutes.

    python -m bench.gpu            (make gpu)

1. every op call of the tests, on each backend that runs on the GPU (bench/gpu_cases.py)
2. tests/gpu: CUDA graphs, two streams, two processes
3. some of the calls under compute-sanitizer, where it is installed
4. the benches below, side by side with torch's own layers, by CUDA events

Writes bench/results/<gpu>.jsonl: a line for each op and backend, then one for each candidate of each bench.
"""

import argparse
import functools
import itertools
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

import recsparse_kernels as rk
from recsparse_kernels.ops._backend import OPS

from . import gpu_cases, harness

ROOT = Path(__file__).parents[1]
SECONDS = 8 * 60
BACKENDS = ("native", "triton")
ROUNDS = 15
ROUND_MS = 2.0


class Report:
    """The lines of the result file, written as they come."""

    def __init__(self, out: Path, device: str):
        self.out, self.failures = out, 0
        name = torch.cuda.get_device_name() if device == "cuda" else harness.machine()["machine"]
        self.common = {**harness.machine(), "machine": name, "cuda": torch.version.cuda}

    def write(self, line: dict) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with open(self.out, "a", encoding="utf-8") as file:
            file.write(json.dumps({**line, **self.common}) + "\n")


# ---- correctness ----


def check_ops(report: Report, device: str, calls: gpu_cases.Calls, backends: tuple[str, ...], most=None):
    for backend in backends:
        for line in gpu_cases.replay_all(calls, backend, device, most):
            report.write({"check": "op", **line})
            report.failures += line["failures"]
            if line["failures"]:
                print(f"  {line['op']} on {backend}: {line['failures']} of {line['cases']}: {line['first']}")
        print(f"{backend}: {report.failures} failures so far")


def run_step(report: Report, name: str, command: list[str], seconds: float) -> None:
    """A command of its own: an error of the GPU ends its process, not ours."""
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(seconds, 1))
        passed, tail = run.returncode == 0, (run.stdout + run.stderr)[-2000:]
    except subprocess.TimeoutExpired:
        passed, tail = False, f"stopped after {seconds:.0f} s"
    print(f"{name}: {'passed' if passed else 'FAILED: ' + tail}")
    report.write({"check": name, "passed": passed, "tail": "" if passed else tail})
    report.failures += not passed


# ---- speed ----


def gpu_times(candidates: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Milliseconds of each candidate, interleaved, by CUDA events."""
    repeats = {}
    for name, call in candidates.items():
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        repeats[name] = max(1, round(ROUND_MS / 1e3 / max(time.perf_counter() - start, 1e-6)))
    times = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(repeats[name]):
                call()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) / repeats[name])
    return times


def compare(report: Report, bench: str, shape: str, candidates: dict, dense: str, work_bytes=None) -> None:
    """Times the candidates and writes a line for each. One that cannot run here says why."""
    usable = {}
    for name, call in candidates.items():
        try:
            call()
            torch.cuda.synchronize()
            usable[name] = call
        except (RuntimeError, ImportError, ValueError) as error:
            report.write({"bench": bench, "shape": shape, "backend": name, "missing": str(error)[:300]})
    times = gpu_times(usable)
    base = statistics.median(times[dense])
    print(f"{bench} {shape}")
    for name, values in times.items():
        values = sorted(values)
        p20, p50, p80 = (values[int(q * (len(values) - 1))] for q in (0.2, 0.5, 0.8))
        moved = work_bytes / p50 / 1e6 if work_bytes and name.startswith("ours") else None
        report.write({
            "bench": bench, "shape": shape, "backend": name, "p20_ms": p20, "p50_ms": p50, "p80_ms": p80,
            "speedup_over_dense": base / p50, "gb_per_s": moved,
        })  # fmt: skip
        print(f"  {name:<28} {p50:9.4f} ms ({p20:.4f}..{p80:.4f})  {base / p50:6.2f}x {dense}")


def ours(op: str, dtype: torch.dtype, call: Callable) -> dict[str, Callable[[], object]]:
    """``call(backend)`` on each backend that has the op here."""
    backends = [b for b in BACKENDS if b in OPS[op].backends("cuda", dtype)]
    return {f"ours-{backend}": functools.partial(call, backend) for backend in backends}


def in_turn(inputs: list[torch.Tensor]) -> Callable[[], torch.Tensor]:
    """The next of the inputs at each call: what the last call read is not what this one reads."""
    return functools.partial(next, itertools.cycle(inputs))


def copy_bandwidth(report: Report) -> None:
    a = torch.empty(1 << 28, dtype=torch.float32, device="cuda")
    b = torch.empty_like(a)
    compare(report, "copy", "1 GiB", {"ours-copy": lambda: b.copy_(a)}, "ours-copy", 2 * a.nbytes)


@torch.no_grad()
def bench_masked_bag(report: Report, dtype: torch.dtype) -> None:
    V, D, bags, length, density = 8_000_000, 64, 16384, 32, 0.2
    dense = nn.EmbeddingBag(V, D, mode="sum", device="cuda", dtype=dtype)
    module = rk.nn.MaskedEmbeddingBag(V, D, mode="sum", density=density, device="cuda", dtype=dtype)
    table, following = (
        module.table,
        in_turn([torch.randint(V, (bags, length), device="cuda") for _ in range(4)]),
    )
    needed = bags * length * (8 + 12 + D * density * dtype.itemsize) + bags * D * dtype.itemsize

    def bag(backend):
        return rk.ops.masked_embedding_bag(following(), table, mode="sum", backend=backend)

    candidates = {"nn.EmbeddingBag": lambda: dense(following()), **ours("masked_embedding_bag", dtype, bag)}
    shape = f"V={V} D={D} bags={bags}x{length} {dtype}"
    compare(report, "masked_bag", shape, candidates, "nn.EmbeddingBag", int(needed))


@torch.no_grad()
def bench_sparse24(report: Report, B: int, I: int, O: int) -> None:
    x = torch.randn(B, I, device="cuda", dtype=torch.bfloat16)
    linear = nn.Linear(I, O, bias=False, device="cuda", dtype=torch.bfloat16)
    module = rk.nn.Sparse24Linear.from_dense(linear)

    def product(backend):
        return rk.ops.sparse24_linear(x, module.values, module.metadata, backend=backend)

    candidates = {"F.linear": lambda: linear(x)}
    for peer in ("cusparselt", "cutlass"):
        candidates[f"torch-{peer}"] = _semi_structured(peer, module.to_dense().weight, x)
    own = ours("sparse24_linear", x.dtype, product)
    candidates |= own
    if "ours-native" in own and torch.cuda.get_device_capability() == (9, 0):
        candidates["ours-native-mma.sp"] = functools.partial(without_warpgroups, own["ours-native"])
    compare(report, "sparse24", f"B={B} I={I} O={O} bf16", candidates, "F.linear")


@torch.no_grad()
def bench_sparse24_prune(report: Report, O: int = 4096, I: int = 4096) -> None:
    """Prune and compress; torch's kernel makes both packs too, of masks that it searches greedily."""
    weight = torch.randn(O, I, device="cuda", dtype=torch.bfloat16)
    candidates = {
        "copy": weight.clone,
        "torch-tile": functools.partial(torch._sparse_semi_structured_tile, weight, "", True),
    }
    for name, op, call in (
        ("magnitude", "sparse24_prune", rk.ops.sparse24_prune),
        ("transposable", "sparse24_prune", functools.partial(rk.ops.sparse24_prune, transposable=True)),
        ("both", "sparse24_prune_both", rk.ops.sparse24_prune_both),
    ):
        own = ours(op, weight.dtype, lambda backend, call=call: call(weight, backend=backend))
        candidates |= {f"{backend} {name}": run for backend, run in own.items()}
    compare(report, "sparse24_prune", f"O={O} I={I} bf16", candidates, "copy")


@torch.no_grad()
def bench_sparse24_grad_input(report: Report, B: int = 4096, I: int = 4096, O: int = 4096) -> None:
    """The gradient to the input from the pack of W, and as a 2:4 product with the pack of W'."""
    weight = torch.randn(O, I, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn(B, O, device="cuda", dtype=torch.bfloat16)
    values, metadata, values_t, metadata_t = rk.ops.sparse24_prune_both(weight)

    def one_pack(backend):
        return OPS["sparse24_linear_grad_input"](grad, values, metadata, I, backend=backend)

    def both_packs(backend):
        return rk.ops.sparse24_linear(grad, values_t, metadata_t, backend=backend)

    candidates = {"matmul": lambda: grad @ weight, **ours("sparse24_linear_grad_input", grad.dtype, one_pack)}
    both = ours("sparse24_linear", grad.dtype, both_packs)
    candidates |= {f"{backend} both packs": run for backend, run in both.items()}
    compare(report, "sparse24_grad_input", f"B={B} I={I} O={O} bf16", candidates, "matmul")


def without_warpgroups(call: Callable[[], object]) -> object:
    """The call on the 2:4 kernel of other GPUs (mma.sp), where Hopper would take its own (wgmma.sp)."""
    before = torch.ops.recsparse.sparse24_use_warpgroups(False)
    try:
        return call()
    finally:
        torch.ops.recsparse.sparse24_use_warpgroups(before)


def _semi_structured(peer: str, weight: torch.Tensor, x: torch.Tensor) -> Callable[[], object]:
    from torch.sparse import semi_structured as torch_sparse

    names = {
        "cusparselt": "SparseSemiStructuredTensorCUSPARSELT",
        "cutlass": "SparseSemiStructuredTensorCUTLASS",
    }
    packed = None

    def run():
        nonlocal packed
        if packed is None:
            packed = getattr(torch_sparse, names[peer]).from_dense(weight.detach().contiguous())
        return nn.functional.linear(x, packed)

    return run


@torch.no_grad()
def bench_low_rank_cross(report: Report) -> None:
    B, I, R = 4096, 3456, 64
    layer = rk.nn.LowRankCross(I, R, device="cuda", dtype=torch.bfloat16)
    x0, x = (torch.randn(B, I, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    down, up, bias = (p.detach() for p in (layer.down, layer.up, layer.bias))

    def eager(x0, x):
        return x0 * (nn.functional.linear(nn.functional.linear(x, down), up) + bias) + x

    compiled = torch.compile(eager)

    def cross(backend):
        return rk.ops.low_rank_cross(x0, x, down, up, bias, backend=backend)

    candidates = {"eager": lambda: eager(x0, x), "torch.compile": lambda: compiled(x0, x)}
    candidates |= ours("low_rank_cross", x.dtype, cross)
    compare(report, "low_rank_cross", f"B={B} I={I} R={R} bf16", candidates, "eager")


def bench_fan_in_step(report: Report) -> None:
    L, H, F, B, positives = 2_812_281, 768, 128, 128, 5
    x = torch.randn(B, H, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    offsets = torch.arange(B + 1, device="cuda") * positives
    labels = torch.randint(L, (B * positives,), device="cuda")
    candidates = {}
    for group in (1, 32):
        layer = rk.nn.FixedFanInLinear(H, L, F, group_size=group, device="cuda", dtype=torch.bfloat16)

        def step(backend, layer=layer, group=group):
            weights = (layer.packed_weight, layer.indices, layer.bias)
            loss = rk.ops.fan_in_loss(x, *weights, offsets, labels, group_size=group, backend=backend)
            return torch.autograd.grad(loss, [x, layer.packed_weight])

        found = ours("fan_in_loss", x.dtype, step)
        candidates |= {f"{name}-G{group}": call for name, call in found.items()}
    if candidates:
        compare(report, "fan_in_step", f"L={L} H={H} F={F} B={B} bf16", candidates, next(iter(candidates)))


BENCHES = (
    copy_bandwidth,
    *(functools.partial(bench_masked_bag, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)),
    *(
        functools.partial(bench_sparse24, B=B, I=I, O=O)
        for B, I, O in ((4096, 4096, 4096), (4096, 2048, 2048), (64, 8192, 8192), (16, 8192, 8192))
    ),
    bench_sparse24_prune,
    bench_sparse24_grad_input,
    bench_low_rank_cross,
    bench_fan_in_step,
)


# ---- all of it ----


def steps(report: Report, device: str, select: str, most: int | None) -> Iterator[Callable[[float], None]]:
    """What is run, in order; each is given the seconds left."""
    folder = Path(tempfile.mkdtemp())
    file = folder / "calls.pt"
    python = [sys.executable, "-m", "bench.gpu_cases"]
    yield lambda left: run_step(report, "record", [*python, "record", str(file), "--select", select], left)
    backends = BACKENDS if device == "cuda" else ("cuda",)
    if file.exists():
        calls = torch.load(file, weights_only=False)
        yield lambda left: check_ops(report, device, calls, backends, most)
    if device == "cuda":
        yield lambda left: run_step(
            report, "tests/gpu", [sys.executable, "-m", "pytest", "-q", "tests/gpu"], left
        )
        if shutil.which("compute-sanitizer"):
            command = [
                "compute-sanitizer",
                "--error-exitcode",
                "9",
                *python,
                "replay",
                str(file),
                "--most",
                "3",
            ]
            yield lambda left: run_step(report, "compute-sanitizer", command, min(left, 90))
        else:
            print("compute-sanitizer is not installed: skipped")
        for bench in BENCHES:
            yield lambda left, bench=bench: bench(report)
    shutil.rmtree(folder)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--device", default="cuda", help="cpu: the correctness part, on the kernels run on the CPU"
    )
    parser.add_argument("--select", default="reference", help="pytest's -k for the tests that are recorded")
    parser.add_argument("--most", type=int, help="calls of each op that are checked")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print(f"no GPU that torch can use: nothing was run\n{rk.show_config()}", file=sys.stderr)
        return 2
    if args.device == "cpu":
        from recsparse_kernels.testing import load_cuda_on_cpu

        if not load_cuda_on_cpu(ROOT / "tests" / "native" / "_cuda_on_cpu.so"):
            print("tests/native/_cuda_on_cpu.so is not built (make test)", file=sys.stderr)
            return 2
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cuda-on-cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    report = Report(args.out or harness.RESULTS / f"{slug}.jsonl", args.device)
    print(rk.show_config())
    end = time.monotonic() + SECONDS
    for step in steps(report, args.device, args.select, args.most):
        left = end - time.monotonic()
        if left < 5:
            print("out of time: the rest is skipped")
            report.write({"check": "time", "passed": False, "tail": "out of time: the rest was skipped"})
            report.failures += 1
            break
        try:
            step(left)
        except (RuntimeError, ValueError) as error:  # a bench that cannot run here; the others go on
            print(f"FAILED: {error}")
            report.write({"check": "step", "passed": False, "tail": str(error)[:2000]})
            report.failures += 1
    print(f"{report.out}: {report.failures} failures")
    return int(report.failures > 0)


if __name__ == "__main__":
    sys.exit(main())
