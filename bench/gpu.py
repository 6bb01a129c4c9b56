"""Everything on a GPU: correctness first, then speed. Under eight minutes.

    python -m bench.gpu            (make gpu)

1. every op call of the tests, on each backend that runs on the GPU (bench/gpu_cases.py)
2. tests/gpu: CUDA graphs, two streams, two processes; beside them some of the calls under compute-sanitizer,
   where it is installed
3. the benches below, side by side with torch's own layers, by CUDA events
4. with ``--table FILE``, the measured table: which backend and which Triton configuration is the fastest.
   ``--table recsparse_kernels/measured.json`` adds this GPU to what the package ships

Each op and each bench can end its process (bench/processes.py) without the others. The calls are recorded
first, on the CPU; ``--calls FILE`` takes those that ``python -m bench.gpu_cases record FILE`` has recorded
elsewhere, which saves that time here.

Writes bench/results/<gpu>.jsonl: a line for each op and backend, then one for each candidate of each bench.
``python -m bench.summary`` shows them as tables.
"""

import argparse
import functools
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn

import recsparse_kernels as rk
from recsparse_kernels.ops._backend import OPS

from . import gpu_cases, harness
from .processes import Lines, end_group, run_each, run_side_by_side

ROOT = Path(__file__).parents[1]
SECONDS = 8 * 60
BACKENDS = ("native", "triton")
FAMILIES = ("sparse24", "masked_embedding", "low_rank", "fan_in")
ROUNDS = 15
ROUND_MS = 2.0
SECONDS_EACH = 3.0  # about what the rounds of one candidate may take
GRAPH_BELOW_MS = 1.0  # calls so short are timed in a CUDA graph too: Python may take longer than the kernels
CACHE_BYTES = 1 << 28  # well above the last-level cache of any GPU: 60 MB on an H200
SILENT_SECONDS = 75  # a process that writes nothing for so long hangs
# That check ops at once: the definition on the CPU, and Triton's compiler, take most of the time.
PROCESSES = max(1, min(14, (os.cpu_count() or 1) - 2))
SANITIZERS = 4  # processes; most of their time is the start of torch


class Report:
    """The lines of the result file, written as they come."""

    def __init__(self, out: Path, device: str, commit: str | None = None):
        self.out, self.failures, self._lock = out, 0, threading.Lock()
        name = torch.cuda.get_device_name() if device == "cuda" else harness.machine()["machine"]
        self.common = {**harness.machine(), "machine": name, "cuda": torch.version.cuda}
        self.common |= {"commit": commit} if commit else {}

    def write(self, line: dict, failures: int = 0) -> None:
        with self._lock:
            self.failures += failures
            self.out.parent.mkdir(parents=True, exist_ok=True)
            with open(self.out, "a", encoding="utf-8") as file:
                file.write(json.dumps({**line, **self.common}) + "\n")

    def fail(self, check: str, tail: str) -> None:
        print(f"{check}: FAILED: {tail}", flush=True)
        self.write({"check": check, "passed": False, "tail": tail}, 1)


# ---- correctness ----


def check_calls(report: Report, device: str, file: Path, most: int | None, seconds: float) -> None:
    """Makes the recorded calls on every backend, side by side: compiling for Triton takes the most."""
    if not file.exists():
        return report.fail("ops", "no calls were recorded")
    calls = torch.load(file, weights_only=False)
    names = sorted(calls, key=lambda name: -len(calls[name]))  # shares of about the same size
    native = max(1, PROCESSES // 5)
    shares = {"native": native, "triton": max(1, PROCESSES - native)} if device == "cuda" else {"cuda": 1}

    def check(backend: str) -> None:
        check_ops(report, device, file, names, backend, seconds, most, shares[backend])

    with ThreadPoolExecutor(len(shares)) as pool:
        list(pool.map(check, shares))


def check_ops(
    report: Report,
    device: str,
    file: Path,
    names: list[str],
    backend: str,
    seconds: float,
    most: int | None,
    processes: int,
) -> None:
    """Makes the recorded calls of these ops on a backend."""
    each = max(2.0, seconds * processes / max(1, len(names)))

    def command(ops: list[str], lines: Path) -> list[str]:
        replay = [sys.executable, "-m", "bench.gpu_cases", "replay", str(file), "--backend", backend]
        replay += ["--device", device, "--seconds", f"{each:.1f}", "--ops", ",".join(ops)]
        return [*replay, "--lines", str(lines), *([] if most is None else ["--most", str(most)])]

    cases = 0

    def write(line: dict) -> None:
        nonlocal cases
        report.write({"check": "op", **line}, line["failures"])
        cases += line["cases"]
        if line["failures"]:
            print(
                f"  {line['op']} on {backend}: {line['failures']} of {line['cases']}: {line['first']}",
                flush=True,
            )

    failed = run_side_by_side(
        command, names, write, processes, seconds=seconds, silent=SILENT_SECONDS, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    for name, why in failed.items():
        report.fail(f"{name} on {backend}", why)
    if not cases:
        report.fail(backend, "no case was made: the backend is not there, or every op ended its process")
    print(f"{backend}: {cases} cases; {report.failures} failures so far", flush=True)


def run_step(report: Report, name: str, command: list[str], seconds: float, **environment: str) -> None:
    """A command of its own: an error of the GPU ends its process, not ours."""
    tail = ""
    with tempfile.TemporaryFile("w+", errors="replace") as printed:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, **environment},
        )  # fmt: skip
        try:
            if process.wait(timeout=max(seconds, 1)):
                tail = f"status {process.returncode}"
        except subprocess.TimeoutExpired:
            tail = f"stopped after {seconds:.0f} s"
        end_group(process)
        printed.seek(0)
        text = printed.read()
    if tail:
        return report.fail(name, f"{tail}: {text[-4000:]}")
    print(f"{name}: passed", flush=True)
    report.write({"check": name, "passed": True, "tail": text[-200:]})


# ---- speed ----


def gpu_times(candidates: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Milliseconds of each candidate, interleaved, by CUDA events. A slow one has fewer rounds."""
    repeats, turns = {}, {}
    for name, call in candidates.items():
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        seconds = max(time.perf_counter() - start, 1e-6)
        repeats[name] = max(1, round(ROUND_MS / 1e3 / seconds))
        turns[name] = max(3, min(rounds, round(SECONDS_EACH / seconds)))
    times = {name: [] for name in candidates}
    for turn in range(max(turns.values())):
        for name, call in candidates.items():
            if turn >= turns[name]:
                continue
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(repeats[name]):
                call()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) / repeats[name])
    return times


def compare(report: Lines, bench: str, shape: str, candidates: dict, dense: str, work_bytes=None) -> None:
    """Times the candidates and writes a line for each. One that cannot run here says why.

    Short calls are timed a second time in a CUDA graph, without what Python and the driver take for a call.
    """
    usable = {}
    for name, call in candidates.items():
        try:
            call()
            torch.cuda.synchronize()
            usable[name] = call
        except Exception as error:  # whatever a peer, a compiler or the driver raises
            missing = f"{type(error).__name__}: {error}"[:500]
            report.write({"bench": bench, "shape": shape, "backend": name, "missing": missing})
            torch.cuda.synchronize()  # raises, and so ends the bench, where the GPU is unusable now
    if not usable:
        return
    times = gpu_times(usable)
    _write_times(report, {"bench": bench, "shape": shape, "graph": False}, times, dense, work_bytes)
    short = {n: c for n, c in usable.items() if statistics.median(times[n]) < GRAPH_BELOW_MS}
    graphs, count = {}, {}
    for name, call in short.items():
        count[name] = max(1, round(ROUND_MS / statistics.median(times[name])))
        try:
            graphs[name] = in_graph(call, count[name])
        except Exception as error:  # not everything can be captured
            missing = f"{type(error).__name__}: {error}"[:500]
            report.write({"bench": bench, "shape": shape, "backend": name, "graph": True, "missing": missing})
            torch.cuda.synchronize()
    if graphs:
        times = {n: [t / count[n] for t in found] for n, found in gpu_times(graphs).items()}
        _write_times(report, {"bench": bench, "shape": shape, "graph": True}, times, dense, work_bytes)


def in_graph(call: Callable[[], object], count: int) -> Callable[[], None]:
    """The call so many times over, as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def _write_times(report: Lines, case: dict, times: dict[str, list[float]], dense: str, work_bytes) -> None:
    base = statistics.median(times[dense]) if dense in times else None
    print(case["bench"], case["shape"], "in a CUDA graph" if case["graph"] else "", flush=True)
    for name, values in times.items():
        values = sorted(values)
        p20, p80 = (values[int(q * (len(values) - 1))] for q in (0.2, 0.8))
        p50 = statistics.median(values)
        moved = work_bytes / p50 / 1e6 if work_bytes and name.startswith("ours") else None
        speedup = base / p50 if base else None
        report.write({
            **case, "backend": name, "p20_ms": p20, "p50_ms": p50, "p80_ms": p80,
            "dense": dense, "speedup_over_dense": speedup, "gb_per_s": moved,
        })  # fmt: skip
        ratio = f"{speedup:6.2f}x {dense}" if base else ""
        print(f"  {name:<28} {p50:9.4f} ms ({p20:.4f}..{p80:.4f})  {ratio}", flush=True)


def ours(op: str, dtype: torch.dtype, call: Callable) -> dict[str, Callable[[], object]]:
    """``call(backend)`` on each backend that has the op here."""
    backends = [b for b in BACKENDS if b in OPS[op].backends("cuda", dtype)]
    return {f"ours-{backend}": functools.partial(call, backend) for backend in backends}


def in_turn(inputs: list[torch.Tensor]) -> Callable[[], torch.Tensor]:
    """The next of the inputs at each call: what the last call read is not what this one reads."""
    return functools.partial(next, itertools.cycle(inputs))


def copy_bandwidth(report: Lines) -> None:
    a = torch.empty(1 << 28, dtype=torch.float32, device="cuda")
    b = torch.empty_like(a)
    compare(report, "copy", "1 GiB", {"ours-copy": lambda: b.copy_(a)}, "ours-copy", 2 * a.nbytes)


@torch.no_grad()
def bench_masked_bag(report: Lines) -> None:
    V, D, bags, length, density = 8_000_000, 64, 16384, 32, 0.2
    # packed on the GPU: the layer's own mask is drawn on the CPU, which takes minutes for so many rows
    mask = torch.rand(V, D, device="cuda") < density
    following = in_turn([torch.randint(V, (bags, length), device="cuda") for _ in range(4)])
    for dtype in (torch.float32, torch.bfloat16):
        dense = nn.EmbeddingBag(V, D, mode="sum", device="cuda", dtype=dtype)
        table = rk.ops.masked_embedding_pack(dense.weight, mask)
        needed = bags * length * (8 + 12 + D * density * dtype.itemsize) + bags * D * dtype.itemsize

        def bag(backend, table=table):
            return rk.ops.masked_embedding_bag(following(), table, mode="sum", backend=backend)

        candidates = {
            "nn.EmbeddingBag": lambda dense=dense: dense(following()),
            **ours("masked_embedding_bag", dtype, bag),
        }
        shape = f"V={V} D={D} bags={bags}x{length} {dtype}"
        compare(report, "masked_bag", shape, candidates, "nn.EmbeddingBag", int(needed))


@torch.no_grad()
def bench_sparse24(report: Lines, B: int, I: int, O: int) -> None:
    x = torch.randn(B, I, device="cuda", dtype=torch.bfloat16)
    # for few rows the weight's bytes are the time: none may be in the cache when its turn comes again
    turns = 1 if B >= 1024 else max(2, CACHE_BYTES // (I * O) + 1)
    layers = [nn.Linear(I, O, bias=False, device="cuda", dtype=torch.bfloat16) for _ in range(turns)]
    modules = [rk.nn.Sparse24Linear.from_dense(layer) for layer in layers]
    pruned = [module.to_dense().weight.detach().contiguous() for module in modules]
    linears, packed = in_turn(layers), in_turn(modules)

    def product(backend):
        module = packed()
        return rk.ops.sparse24_linear(x, module.values, module.metadata, backend=backend)

    candidates = {"F.linear": lambda: linears()(x)}
    for peer in ("cusparselt", "cutlass"):
        candidates[f"torch-{peer}"] = _semi_structured(peer, pruned, x)
    own = ours("sparse24_linear", x.dtype, product)
    candidates |= own
    if "ours-native" in own and torch.cuda.get_device_capability() == (9, 0):
        candidates["ours-native-mma.sp"] = functools.partial(without_warpgroups, own["ours-native"])
    compare(report, "sparse24", f"B={B} I={I} O={O} bf16", candidates, "F.linear")


@torch.no_grad()
def bench_sparse24_prune(report: Lines, O: int = 4096, I: int = 4096) -> None:
    """Prune and compress; torch's kernel makes both packs too, of masks that it searches greedily."""
    weights = [
        torch.randn(O, I, device="cuda", dtype=torch.bfloat16) for _ in range(CACHE_BYTES // (2 * O * I))
    ]
    weight = in_turn(weights)
    masked = in_turn([w * rk.ops.sparse24_mask(w) for w in weights])
    candidates = {
        "copy": lambda: weight().clone(),
        "torch-tile": lambda: torch._sparse_semi_structured_tile(weight(), "", True),
        "torch-cusparselt, compress alone": lambda: torch._cslt_compress(masked()),
    }
    for name, op, call in (
        ("magnitude", "sparse24_prune", rk.ops.sparse24_prune),
        ("transposable", "sparse24_prune", functools.partial(rk.ops.sparse24_prune, transposable=True)),
        ("both", "sparse24_prune_both", rk.ops.sparse24_prune_both),
    ):
        own = ours(op, torch.bfloat16, lambda backend, call=call: call(weight(), backend=backend))
        candidates |= {f"{backend} {name}": run for backend, run in own.items()}
    compare(report, "sparse24_prune", f"O={O} I={I} bf16", candidates, "copy", O * I * 2 + O * I + O * I // 8)


@torch.no_grad()
def bench_sparse24_grad_input(report: Lines, B: int = 4096, I: int = 4096, O: int = 4096) -> None:
    """The gradient to the input from the pack of W, and as a 2:4 product with the pack of W', made meanwhile
    from that of W ("transposed"), or before."""
    weight = torch.randn(O, I, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn(B, O, device="cuda", dtype=torch.bfloat16)
    values, metadata, values_t, metadata_t = rk.ops.sparse24_prune_both(weight)

    def one_pack(backend):
        return OPS["sparse24_linear_grad_input"](grad, values, metadata, I, backend=backend)

    def both_packs(backend):
        return rk.ops.sparse24_linear(grad, values_t, metadata_t, backend=backend)

    def transposed(backend):
        packed = rk.ops.sparse24_transpose(values, metadata, I, backend=backend)
        return rk.ops.sparse24_linear(grad, *packed, backend=backend)

    candidates = {"matmul": lambda: grad @ weight, **ours("sparse24_linear_grad_input", grad.dtype, one_pack)}
    for name, call in (("both packs", both_packs), ("transposed", transposed)):
        own = ours("sparse24_linear", grad.dtype, call)
        candidates |= {f"{backend} {name}": run for backend, run in own.items()}
    compare(report, "sparse24_grad_input", f"B={B} I={I} O={O} bf16", candidates, "matmul")


@torch.no_grad()
def bench_sparse24_tf32(report: Lines, B: int = 4096, I: int = 4096, O: int = 4096) -> None:
    """float32 as tf32, which the dense op is allowed too."""
    x, weight = (torch.randn(rows, I, device="cuda") for rows in (B, O))
    values, metadata = rk.ops.sparse24_prune(weight)

    def product(backend):
        return rk.ops.sparse24_linear(x, values, metadata, backend=backend)

    candidates = {"F.linear": lambda: nn.functional.linear(x, weight)} | ours(
        "sparse24_linear", x.dtype, product
    )
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    rk.set_tf32(True)
    try:
        compare(report, "sparse24_tf32", f"B={B} I={I} O={O} float32 as tf32", candidates, "F.linear")
    finally:
        matmul.allow_tf32 = before
        rk.set_tf32(False)


def without_warpgroups(call: Callable[[], object]) -> object:
    """The call on the 2:4 kernel of other GPUs (mma.sp), where Hopper would take its own (wgmma.sp)."""
    before = torch.ops.recsparse.sparse24_use_warpgroups(False)
    try:
        return call()
    finally:
        torch.ops.recsparse.sparse24_use_warpgroups(before)


def _semi_structured(peer: str, weights: list[torch.Tensor], x: torch.Tensor) -> Callable[[], object]:
    from torch.sparse import semi_structured as torch_sparse

    names = {
        "cusparselt": "SparseSemiStructuredTensorCUSPARSELT",
        "cutlass": "SparseSemiStructuredTensorCUTLASS",
    }

    @functools.cache
    def following():
        packed = [getattr(torch_sparse, names[peer]).from_dense(weight) for weight in weights]
        if peer == "cusparselt":
            found = torch._cslt_sparse_mm_search(packed[0].packed, x.t())
            for one in packed:
                one.alg_id_cusparselt = found
        return in_turn(packed)

    return lambda: nn.functional.linear(x, following()())


@torch.no_grad()
def bench_low_rank_cross(report: Lines) -> None:
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


def bench_fan_in_step(report: Lines) -> None:
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

        def fused(backend, layer=layer, group=group, update=rk.ops.FanInUpdate("sgd", lr=0.1)):  # noqa: B008
            weights = (layer.packed_weight, layer.indices, layer.bias)
            options = {"group_size": group, "backend": backend}
            return rk.ops.fan_in_loss_step(x.detach(), *weights, offsets, labels, update, **options)

        for kind, op, call in (("", "fan_in_loss", step), (" fused SGD", "fan_in_loss_step", fused)):
            found = ours(op, x.dtype, call)
            candidates |= {f"{name}-G{group}{kind}": run for name, run in found.items()}
    if candidates:
        compare(report, "fan_in_step", f"L={L} H={H} F={F} B={B} bf16", candidates, next(iter(candidates)))


def bench_fan_in_memory(report: Lines) -> None:
    L, H, F, B, positives = 2_812_281, 768, 128, 128, 5
    for backend in [b for b in BACKENDS if b in OPS["fan_in_loss_step"].backends("cuda", torch.bfloat16)]:
        torch.cuda.empty_cache()
        layer = rk.nn.FixedFanInLinear(H, L, F, group_size=32, device="cuda", dtype=torch.bfloat16)
        update = layer.fuse_optimizer("sgd", lr=0.1)
        x = torch.randn(B, H, device="cuda", dtype=torch.bfloat16)
        offsets = torch.arange(B + 1, device="cuda") * positives
        labels = torch.randint(L, (B * positives,), device="cuda")
        parameters = (layer.packed_weight, layer.indices, layer.bias)
        torch.cuda.reset_peak_memory_stats()
        rk.ops.fan_in_loss_step(x, *parameters, offsets, labels, update, group_size=32, backend=backend)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / 2**30
        shape = f"L={L} H={H} F={F} B={B} G=32 bf16 sgd"
        report.write(
            {"bench": "fan_in_memory", "shape": shape, "backend": f"ours-{backend}", "peak_gib": peak}
        )
        print(f"fan_in_memory {shape}\n  ours-{backend}: {peak:.2f} GiB at most", flush=True)


BENCHES: dict[str, Callable[[Lines], None]] = {
    "copy": copy_bandwidth,
    **{
        f"sparse24_{B}x{I}x{O}": functools.partial(bench_sparse24, B=B, I=I, O=O)
        for B, I, O in (
            (4096, 4096, 4096),
            (8192, 8192, 8192),
            (4096, 2048, 2048),
            (64, 8192, 8192),
            (16, 8192, 8192),
        )  # fmt: skip
    },
    "sparse24_prune": bench_sparse24_prune,
    "sparse24_grad_input": bench_sparse24_grad_input,
    "sparse24_tf32": bench_sparse24_tf32,
    "masked_bag": bench_masked_bag,
    "low_rank_cross": bench_low_rank_cross,
    "fan_in_step": bench_fan_in_step,
    "fan_in_memory": bench_fan_in_memory,
}


def run_benches(names: list[str], file: Path) -> int:
    """A process's share: in order, each with its lines; what a bench raises is a line too."""
    lines = Lines(file)
    for name in lines.each(names):
        try:
            BENCHES[name](lines)
        except Exception as error:
            lines.write({"bench": name, "error": f"{type(error).__name__}: {error}"[:2000]})
            torch.cuda.synchronize()  # ends the process where the GPU is unusable now
        torch.cuda.empty_cache()
    return 0


def check_benches(report: Report, seconds: float) -> None:
    def command(names: list[str], lines: Path) -> list[str]:
        return [sys.executable, "-m", "bench.gpu", "--benches", ",".join(names), "--lines", str(lines)]

    def write(line: dict) -> None:
        own = line.get("backend", "").startswith("ours") and not line.get("graph")
        report.write(line, int("error" in line or ("missing" in line and own)))
        if "p50_ms" in line:
            name = f"{line['bench']} {line['shape']}" + " in a CUDA graph" * line["graph"]
            ratio = f"{line['speedup_over_dense']:6.2f}x" if line["speedup_over_dense"] else ""
            print(f"  {name:<60} {line['backend']:<24} {line['p50_ms']:9.4f} ms {ratio}", flush=True)
        else:
            print(f"  {line}", flush=True)

    failed = run_each(command, list(BENCHES), write, seconds=seconds, silent=2 * SILENT_SECONDS, cwd=ROOT)
    for name, why in failed.items():
        report.fail(f"bench {name}", why)


# ---- all of it ----

# Is given its seconds; at most so many; kept for it, whatever those before take.
Step = tuple[Callable[[float], None], float, float]


def steps(
    report: Report,
    device: str,
    select: str,
    most: int | None,
    calls: Path | None,
    table: Path | None,
    folder: Path,
) -> Iterator[Step]:
    """What is run, in order. A step may take what it is given and those after it do not need."""
    python = [sys.executable, "-m", "bench.gpu_cases"]
    file = calls or folder / "calls.pt"
    if calls is None:
        command = [*python, "record", str(file), "--select", select]
        command += ["--jobs", str(PROCESSES), "--seconds", "60"]
        yield functools.partial(run_step, report, "record", command), 100, 30
    least = 60 if device == "cuda" else 30
    check = functools.partial(check_calls, report, device, file, most)
    yield check, 180 if device == "cuda" else SECONDS, least
    if device != "cuda":
        return
    tune = [sys.executable, "-m", "recsparse_kernels", "bench", "--device", "cuda"]

    def beside(seconds: float) -> None:
        commands = [*on_gpu_tests(), *sanitizers(file)]
        if table is not None:  # compiles what is timed below
            once = [*tune, "--rounds", "1", "--tune", str(folder / "once.json"), "--family"]
            commands += [(f"table, {family}", [*once, family], {}) for family in FAMILIES]
        run_beside(report, commands, seconds)

    yield beside, 110, 40
    yield functools.partial(check_benches, report), 200, 120
    if table is not None:
        yield functools.partial(run_step, report, "table", [*tune, "--tune", str(table)]), 150, 40


# A name, a command, and what it finds in its environment.
Command = tuple[str, list[str], dict[str, str]]


def on_gpu_tests() -> Iterator[Command]:
    for test in sorted((ROOT / "tests" / "gpu").glob("test_*.py")):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(test)]
        yield f"tests/gpu/{test.name}", command, {"TRITON_INTERPRET": "0"}


def sanitizers(file: Path) -> Iterator[Command]:
    """Memory checks of a few calls of each op; without torch's pools, where a neighbour's memory is no error."""
    folder = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=folder)
    if found is None or not file.exists():
        print("compute-sanitizer is not installed, or there are no calls: skipped", flush=True)
        return
    names = sorted(torch.load(file, weights_only=False))
    for n in range(SANITIZERS):
        replay = [
            sys.executable,
            "-m",
            "bench.gpu_cases",
            "replay",
            str(file),
            "--most",
            "2",
            "--seconds",
            "1",
        ]
        command = [found, "--error-exitcode", "9", "--print-limit", "20", *replay]
        yield (
            f"compute-sanitizer, {n + 1} of {SANITIZERS}",
            [*command, "--ops", ",".join(names[n::SANITIZERS])],
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )


def run_beside(report: Report, commands: list[Command], seconds: float) -> None:
    """All at once: none of them is timed."""
    with ThreadPoolExecutor(len(commands)) as pool:
        list(pool.map(lambda one: run_step(report, *one[:2], seconds, **one[2]), commands))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--device", default="cuda", help="cpu: the correctness part, on the kernels run on the CPU"
    )
    parser.add_argument(
        "--select", default=gpu_cases.SELECT, help="pytest's -k for the tests that are recorded"
    )
    parser.add_argument("--calls", type=Path, help="recorded before (bench.gpu_cases record)")
    parser.add_argument("--most", type=int, help="calls of each op that are checked")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all of it")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, help="measure which backend is the fastest, and add it there")
    parser.add_argument("--commit", help="for the lines of the results, where git does not know it")
    parser.add_argument("--benches", help="only these, comma-separated, in this process")
    parser.add_argument("--lines", type=Path, default=Path(os.devnull), help="with --benches: written to")
    args = parser.parse_args(argv)
    if args.benches:
        return run_benches(args.benches.split(","), args.lines)
    if args.device == "cuda" and not torch.cuda.is_available():
        print(f"no GPU that torch can use: nothing was run\n{rk.show_config()}", file=sys.stderr)
        return 2
    if args.device == "cpu" and not (ROOT / "tests" / "native" / "_cuda_on_cpu.so").exists():
        print("tests/native/_cuda_on_cpu.so is not built (make test)", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cuda-on-cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    report = Report(args.out or harness.RESULTS / f"{slug}.jsonl", args.device, args.commit)
    print(rk.show_config(), flush=True)
    end = time.monotonic() + args.seconds
    with tempfile.TemporaryDirectory() as folder:
        calls, table = (path and path.resolve() for path in (args.calls, args.table))
        planned = steps(report, args.device, args.select, args.most, calls, table, Path(folder))
        planned = list(planned)
        for n, (step, most, _) in enumerate(planned):
            kept = sum(least for _, _, least in planned[n + 1 :])
            seconds = min(most, end - time.monotonic() - kept)
            if seconds < 5:
                report.fail("time", "out of time: a step was left out")
                continue
            try:
                step(seconds)
            except Exception as error:  # the others go on
                report.fail("step", f"{type(error).__name__}: {error}"[:2000])
    print(f"{report.out}: {report.failures} failures", flush=True)
    return int(report.failures > 0)


if __name__ == "__main__":
    sys.exit(main())
