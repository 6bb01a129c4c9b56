"""Timing calls against each other."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

ROUND_SECONDS = 1e-3  # a call shorter than this is timed several times a round
MAX_REPEATS = 200
# A call so many times slower than the fastest, and this long, is not timed again. A shorter one is: what
# disturbed its first go may not come back.
HOPELESS, HOPELESS_SECONDS = 10.0, 0.2


def interleaved(runs: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """Median milliseconds of each call, timed in turn so that a noisy machine disturbs all alike."""
    for run in runs:
        run()
    firsts = [_timed(run, 1) for run in runs]
    limit = max(HOPELESS * min(firsts), HOPELESS_SECONDS)
    times = [[first] if first > limit else [] for first in firsts]
    repeats = [max(1, min(MAX_REPEATS, round(ROUND_SECONDS / first))) for first in firsts]
    hopeless = [bool(own) for own in times]
    for _ in range(rounds):
        for run, count, own, skip in zip(runs, repeats, times, hopeless, strict=True):
            if not skip:
                own.append(_timed(run, count))
    return [statistics.median(own) * 1e3 for own in times]


def _timed(run: Callable[[], Any], repeats: int) -> float:
    """Seconds a call."""
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return max(time.perf_counter() - start, 1e-9) / repeats
