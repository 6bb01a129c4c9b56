"""One timing function for all benches: check first, then time side by side, then append a JSON line each.

Candidates of one case run interleaved in one process (a b c, a b c, ...), so that a noisy machine
disturbs all of them alike; ratios come from medians over the rounds.
"""

import dataclasses
import functools
import json
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import recsparse_kernels as rk

RESULTS = Path(__file__).parent / "results"
CACHE_BYTES = 64 * 2**20  # above the last-level cache of the machines seen so far (32 MiB)


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured; goes into the JSON line as it stands."""

    op: str
    passes: str  # "forward", "forward+backward", "step"
    shape: str  # "B=512 I=1024 O=1024"
    dtype: str = "float32"
    density: float | None = None


def compare(
    case: Case,
    candidates: dict[str, Callable[[], Any]],
    *,
    dense: str,
    check: Callable[[], None] | None = None,
    rounds: int = 30,
    min_round_ms: float = 2.0,
    work_bytes: int | None = None,
    work_flops: int | None = None,
    dense_flops: int | None = None,
    benchmark=None,
) -> dict[str, dict]:
    """Time the candidates against each other.

    Args:
        candidates: name -> call without arguments; ours is "ours" or starts with "ours-". Each call must
            rotate over its own inputs (`rotating`), or work on inputs larger than the cache.
        dense: the candidate that is the dense torch op: all speedups are against it.
        check: raises when ours is wrong; runs before any timing.
        rounds: how often every candidate is timed; a fast one is called several times a round.
        work_bytes, work_flops: what ours must move and compute, for GB/s and FLOP/s.
        dense_flops: what the dense op computes, for the dense-equivalent FLOP/s of ours.
        benchmark: pytest-benchmark's fixture; its table then shows ours.

    Returns:
        name -> the JSON line (times in ms).
    """
    if check is not None:
        check()
    repeats = {}
    for name, call in candidates.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, round(min_round_ms / 1e3 / max(time.perf_counter() - start, 1e-7)))
    times = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.perf_counter() - start) / repeats[name])
    dense_time = statistics.median(times[dense])
    rows = {}
    for name, seconds in times.items():
        p20, p50, p80 = (float(q) for q in np.quantile(seconds, (0.2, 0.5, 0.8)))
        ours = name.startswith("ours")
        rows[name] = {
            **dataclasses.asdict(case), "backend": name, "threads": torch.get_num_threads(),
            "p20_ms": p20 * 1e3, "p50_ms": p50 * 1e3, "p80_ms": p80 * 1e3,
            "speedup_over_dense": dense_time / p50,
            "gb_per_s": work_bytes / p50 / 1e9 if ours and work_bytes else None,
            "gflop_per_s": work_flops / p50 / 1e9 if ours and work_flops else None,
            "dense_equivalent_gflop_per_s": dense_flops / p50 / 1e9 if ours and dense_flops else None,
            "cpu_level": rk.cpu_level(), **machine(),
        }  # fmt: skip
    append(list(rows.values()))
    _print(case, rows, dense)
    if benchmark is not None:
        ours = next(name for name in candidates if name.startswith("ours"))
        benchmark.extra_info.update({name: row["speedup_over_dense"] for name, row in rows.items()})
        benchmark.pedantic(candidates[ours], rounds=rounds, iterations=repeats[ours])
    return rows


def rotating(
    make: Callable[[int], tuple], call: Callable, bytes_each: int, limit: int = 64
) -> Callable[[], Any]:
    """A call that takes the next of several inputs each time, together larger than the cache.

    ``make(i)`` builds the i-th input tuple, ``bytes_each`` its size; ``call(*inputs)`` is timed.
    """
    count = int(min(limit, max(2, -(-2 * CACHE_BYTES // max(bytes_each, 1)))))
    inputs = [make(i) for i in range(count)]
    state = {"next": 0}

    def step():
        state["next"] = (state["next"] + 1) % count
        return call(*inputs[state["next"]])

    return step


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest error over the largest exact value."""
    return (
        (actual.double() - exact.double()).abs().max() / exact.double().abs().max().clamp_min(1e-30)
    ).item()


@functools.lru_cache(maxsize=1)
def machine() -> dict:
    """Processor, torch version and (where git knows it) commit, for the JSON lines."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        text = info.read_text()
        fields = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", text, re.M))
        family, model = fields.get("cpu family", "?"), fields.get("model", "?")
        name = f"{fields.get('model name', name)} (family {family} model {model})"

    def git(*arguments):
        command = ["git", "-C", str(Path(__file__).parents[1]), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True).stdout.strip()
        except OSError:  # no git here
            return ""

    # results change while they are measured
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)bench/results")
    commit = git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    return {"machine": name, "torch": torch.__version__, "commit": commit}


def append(lines: list[dict]) -> None:
    RESULTS.mkdir(exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", machine()["machine"].lower()).strip("-")
    with open(RESULTS / f"{slug}.jsonl", "a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def _print(case: Case, rows: dict[str, dict], dense: str) -> None:
    print(f"\n{case.op} {case.passes} {case.shape} {case.dtype}")
    for name, row in rows.items():
        spread = f"{row['p20_ms']:.3f}..{row['p80_ms']:.3f}"
        print(f"  {name:<28} {row['p50_ms']:9.3f} ms ({spread})  {row['speedup_over_dense']:6.2f}x {dense}")
