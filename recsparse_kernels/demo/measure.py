"""Bytes and times. Times are medians of rounds in which every model has its turn, in one process."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Timing:
    p50_ms: float
    p20_ms: float
    p80_ms: float


def interleaved(
    calls: dict[str, Callable[[], object]], seconds: float, max_rounds: int = 200
) -> dict[str, Timing]:
    """Time the calls in turn (a b c, a b c, ...) for about this long altogether, at least 5 rounds."""
    times = {name: [] for name in calls}
    for call in calls.values():  # warm up
        call()
        call()
    end = time.perf_counter() + seconds
    for round_number in range(max_rounds):
        if round_number >= 5 and time.perf_counter() > end:
            break
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    result = {}
    for name, values in times.items():
        cuts = statistics.quantiles(values, n=10, method="inclusive")
        result[name] = Timing(p50_ms=statistics.median(values), p20_ms=cuts[1], p80_ms=cuts[7])
    return result


def parameter_bytes(model: nn.Module) -> int:
    """Of everything that the model saves: weights, and what says where packed weights belong."""
    return _bytes(model.state_dict().values())


def optimizer_bytes(optimizers: list[torch.optim.Optimizer]) -> int:
    """Of the state that the optimizers hold now."""
    return _bytes(
        t for o in optimizers for state in o.state.values() for t in state.values() if isinstance(t, Tensor)
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
