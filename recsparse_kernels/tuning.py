"""The measured table: which backend is fastest for an op, a dtype and a class of shapes, on this CPU or GPU.

Entries come from measured.json, shipped with the package for known machines, and from the user's
cache file, written by `tune`, which wins. `ops._backend.Op.pick` looks them up: an op without entries
pays nothing.
"""

import contextlib
import dataclasses
import platform
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._store import cache_folder, read_json, write_json
from ._table import Table, show
from ._timing import interleaved
from .config import cpu_level
from .ops._backend import MEASURED, OBSERVERS, Op
from .triton import _configs

SHIPPED = Path(__file__).with_name("measured.json")
VERSION = 1  # of the file's layout; another version is not read
MARGIN = 1.05  # what is not faster by this much does not displace the default: it may be noise

# How far two backends may differ, relative to the largest value, before neither is called the faster:
# the rounding of the dtype, summed over long rows in another order.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 4e-2, torch.float16: 5e-3}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One measured choice."""

    op: str
    device: str  # "cpu" (of `machine_class`), or the GPU's name
    dtype: torch.dtype
    training: bool  # measured forward and backward
    shape_class: str
    backend: str
    milliseconds: dict[str, float]  # backend -> median

    @property
    def key(self) -> tuple[str, torch.dtype, bool, str]:
        return self.device, self.dtype, self.training, self.shape_class

    @property
    def shape(self) -> str:
        """As people read it: "infer 512x1024, 1024x512"."""
        return f"{'train' if self.training else 'infer'} {self.shape_class}"

    @property
    def times(self) -> str:
        return ", ".join(f"{backend} {ms:.3f} ms" for backend, ms in self.milliseconds.items())


DETAILS: dict[tuple[str, tuple], Entry] = {}  # (op, key) -> what was measured, for `explain`


@dataclasses.dataclass
class TuneReport:
    """Result of `tune`; ``print(report)`` and ``report.show()`` draw it."""

    entries: list[Entry] = dataclasses.field(default_factory=list)
    skipped: list[str] = dataclasses.field(default_factory=list)
    configs: list[_configs.Choice] = dataclasses.field(default_factory=list)  # of Triton kernels, on a GPU
    path: Path | None = None  # where the entries were stored

    def table(self) -> Table:
        rows = [
            [e.op, str(e.dtype).removeprefix("torch."), e.shape, e.backend, e.times] for e in self.entries
        ]
        columns = ["op", "dtype", "shapes up to", "fastest", "times"]
        notes = [f"Triton {c.table}, {c.shape_class}: {c.name}, of {c.times}" for c in self.configs]
        notes += [*self.skipped, f"stored in {self.path}" if self.path else "not stored"]
        return Table(
            f"{len(rows)} op shapes measured",
            columns,
            rows,
            notes=notes,
        )

    def __str__(self) -> str:
        return str(self.table())

    def show(self) -> None:
        show(self.table())


# -- which machine, which file ------------------------------------------------------------------------------


def machine_class() -> str:
    """What a measurement on the CPU holds for: processor family, instruction level, threads."""
    vendor, family = platform.machine() or "unknown", platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(re.findall(r"^(vendor_id|cpu family|model)\s*: (.*)$", info.read_text(), re.M))
        vendor = fields.get("vendor_id", vendor)
        family = f"{fields.get('cpu family', '?')}-{fields.get('model', '?')}"
    return f"{vendor} {family} {cpu_level() or 'no-native'} {torch.get_num_threads()}t"


def cache_path() -> Path:
    """The user's file."""
    return cache_folder() / "measured.json"


def load() -> int:
    """Fill the table from the shipped file and the user's; returns how many entries.

    Of the CPU's entries those of this machine class; of the GPUs' all, since a call looks up the name of the
    GPU it runs on. Called on import. Call it again after ``torch.set_num_threads`` or ``set_cpu_level``. A file that
    cannot be read is left aside with a warning.
    """
    forget()
    cpu = machine_class()
    for path in (SHIPPED, cache_path()):
        for measured_on, entries in _read(path).items():
            for entry in entries:
                if measured_on == (cpu if entry.device == "cpu" else entry.device):
                    _remember(entry)
    return len(DETAILS)


def forget() -> None:
    """Empty the table in this process: every op takes its default backend. Files stay."""
    MEASURED.clear()
    DETAILS.clear()


def _remember(entry: Entry) -> None:
    MEASURED.setdefault(entry.op, {})[entry.key] = entry.backend
    DETAILS[entry.op, entry.key] = entry


def _read(path: Path) -> dict[str, list[Entry]]:
    advice = "delete it, or call tune() to write it anew"
    return read_json(path, VERSION, _parse, {}, advice)


def _parse(content: Any) -> dict[str, list[Entry]]:
    return {machine: [_entry(item) for item in items] for machine, items in content["machines"].items()}


def _entry(item: dict[str, Any]) -> Entry:
    dtype = getattr(torch, item["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype {item['dtype']!r} is unknown")
    texts = [item[field] for field in ("op", "device", "shape_class", "backend")]
    if not all(isinstance(text, str) for text in texts) or not isinstance(item["training"], bool):
        raise TypeError(f"fields of the wrong type in {item}")
    op, device, shape_class, backend = texts
    times = {str(name): float(ms) for name, ms in item["milliseconds"].items()}
    return Entry(op, device, dtype, item["training"], shape_class, backend, times)


def _item(entry: Entry) -> dict[str, Any]:
    return {**dataclasses.asdict(entry), "dtype": str(entry.dtype).removeprefix("torch.")}


def save(entries: list[Entry], path: Path | None = None) -> Path:
    """Add entries to the user's file, or another, each under its machine; replaces it in one step."""
    path = path or cache_path()
    machines = _read(path)
    cpu = machine_class()
    for device in {entry.device: None for entry in entries}:
        machine = cpu if device == "cpu" else device
        new = [entry for entry in entries if entry.device == device]
        own = {(entry.op, entry.key): entry for entry in (*machines.get(machine, ()), *new)}
        machines[machine] = list(own.values())
    content = {
        "version": VERSION,
        "machines": {
            machine: [_item(entry) for entry in found] for machine, found in sorted(machines.items())
        },
    }
    return write_json(path, content)


# -- measuring ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def watch_calls() -> Iterator[list[tuple[Op, tuple, str, str | None]]]:
    """Collects (op, arguments, backend it ran on, backend asked for) of every call in the block."""
    calls = []
    observer = lambda *call: calls.append(call)  # noqa: E731
    OBSERVERS.append(observer)
    try:
        yield calls
    finally:
        OBSERVERS.remove(observer)


def tune(module: nn.Module, *inputs: Any, rounds: int = 9, store: bool = True, **keywords: Any) -> TuneReport:
    """Measure the backends of every op that ``module(*inputs, **keywords)`` calls, and keep the fastest.

    On a GPU, first the configurations of the Triton kernels that these calls launch.

    Calls that want a gradient are measured forward and backward together. A backend counts only when
    its results agree with the reference; candidates run interleaved, medians count, and the default
    stays unless another is clearly faster.

    Args:
        module: a layer or a whole model; runs once in the mode it is in (grad mode too).
        rounds: how often each candidate is timed.
        store: also write what was found to the user's cache files, for later processes.

    Raises:
        TypeError: ``module`` is no module.
        ValueError: ``rounds`` is below 1.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module; got {type(module).__name__}")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1; got {rounds}")
    training = module.training
    with watch_calls() as calls:
        module(*inputs, **keywords)
    assert module.training == training
    report, seen = TuneReport(), set()
    for op, args, _, asked in calls:
        if asked is not None or op.mutates:
            continue
        device, dtype = op.device_and_dtype(args)
        key = (op.name, *op.key(args))
        candidates = op.timed_backends(device, dtype)
        if key in seen or len(candidates) < 2:
            continue
        seen.add(key)
        run = {backend: _runner(op, args, backend, op.key(args)[2]) for backend in candidates}
        results = {}
        for backend in candidates:
            try:
                results[backend] = run[backend]()
            except Exception as error:  # whatever a compiler or a driver raises, it is not the fastest here
                report.skipped.append(f"{op.name}, {backend}: {type(error).__name__}: {error}"[:200])
        if "triton" in results:
            report.configs += _configs.tune(run["triton"], _configs.gpu_name(), rounds)
        entry = _measure(Entry(*key, candidates[0], {}), run, results, rounds)
        if isinstance(entry, str):
            report.skipped.append(entry)
            continue
        _remember(entry)
        report.entries.append(entry)
    if store and report.entries:
        report.path = save(report.entries)
    if store and report.configs:
        _configs.save(report.configs)
    return report


def _measure(
    entry: Entry, runs: dict[str, Callable], results: dict[str, list[Tensor]], rounds: int
) -> Entry | str:
    """The entry with times and the fastest backend of those that have results; or why nothing is concluded."""
    if "reference" not in results:
        return f"{entry.op} {entry.shape}: nothing to compare with, the default stays"
    if not all(_agree(result, results["reference"]) for result in results.values()):
        return f"{entry.op} {entry.shape}: the backends' results differ, the default stays"
    medians = dict(zip(results, interleaved([runs[backend] for backend in results], rounds), strict=True))
    fastest = min(medians, key=medians.__getitem__)
    first = next(iter(medians))  # the default, unless it does not run here
    if medians[first] < MARGIN * medians[fastest]:
        fastest = first
    return dataclasses.replace(
        entry, backend=fastest, milliseconds={k: round(v, 6) for k, v in medians.items()}
    )


def _runner(op: Op, args: tuple, backend: str, training: bool):
    """A call of the op as the model makes it; with its backward when a gradient is wanted."""
    own = [arg.detach().requires_grad_(arg.requires_grad) if isinstance(arg, Tensor) else arg for arg in args]
    wanted = [arg for arg in own if isinstance(arg, Tensor) and arg.requires_grad]

    def run():
        with torch.set_grad_enabled(training):
            out = op(*own, backend=backend)
            outputs = [
                t for t in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(t, Tensor)
            ]
            if not training:
                return outputs
            sums = [t.sum() for t in outputs if t.requires_grad]
            return outputs + [
                g for g in torch.autograd.grad(sums, wanted, allow_unused=True) if g is not None
            ]

    return run


def _agree(actual: list[Tensor], wanted: list[Tensor]) -> bool:
    if len(actual) != len(wanted):
        return False
    for one, other in zip(actual, wanted, strict=True):
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        one, other = (t.to_dense() if t.is_sparse else t for t in (one, other))
        if not one.is_floating_point():
            if not torch.equal(one, other):
                return False
            continue
        tolerance = TOLERANCE[one.dtype]
        one, other = one.detach().double(), other.detach().double()
        size = other.abs().max().item() if other.numel() else 0.0
        if not torch.allclose(one, other, rtol=0.0, atol=tolerance * size, equal_nan=True):
            return False
    return True
