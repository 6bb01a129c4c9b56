"""Measure every layer of a model against its replacements on this machine, and propose what to swap.

capture   one forward, hooks keep what each candidate layer really sees
measure   each replacement: bytes, output error on that input, dropped energy, time against dense
choose    under the budgets, from the measurements alone: the same figures give the same choice
"""

import contextlib
import dataclasses
import functools
import glob
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import nn as layers
from ._table import Table, bytes_text, rich_console, show
from ._timing import interleaved
from .adapters import find_adapter
from .explain import call_with
from .nn._base import PackedModule
from .swap_plan import Plan, Site
from .swap_report import LeftAlone, layer_bytes
from .swap_rules import DENSE_TYPES, apply, check_arguments, converter_of, dense_type_of, patterns_of

FAN_IN_FROM = 16_384  # output layers of at least this many labels are tried with a fixed fan-in
SLOWER = 1.05  # a replacement that takes this much longer than dense counts as slower
COLUMNS = [
    "layer",
    "class",
    "shape",
    "proposal",
    "bytes",
    "ratio",
    "dense ms",
    "ms",
    "speed",
    "error",
    "energy lost",
]
ENERGY_LIMIT_BYTES = 2**30  # dropped energy needs a dense copy; not made beyond this size


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One replacement to try: how it is written, and what makes it."""

    label: str
    converter: Callable[[nn.Module], nn.Module]


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One replacement of one layer."""

    label: str
    bytes: int
    milliseconds: float
    dense_milliseconds: float  # measured in the same rounds
    error: float  # |output - dense output| / |dense output| on the captured input, before any fine-tuning
    dropped_energy: float | None  # |weight - dense weight|^2 / |dense weight|^2

    @property
    def speedup(self) -> float:
        return self.dense_milliseconds / self.milliseconds


@dataclasses.dataclass
class LayerAdvice:
    """What was measured for one layer, and what is proposed."""

    name: str
    kind: str
    shape: str
    calls: int  # in one forward of the model
    bytes: int
    measurements: list[Measurement]
    failures: list[str]  # replacements that refused the layer
    choice: Measurement | None = None
    reason: str = ""


@dataclasses.dataclass
class Advice:
    """Result of `advise`; ``swap_modules(model, advice.rules)`` does it."""

    layers: list[LayerAdvice]
    left: list[LeftAlone]
    rules: dict[str, Callable[[nn.Module], nn.Module]]
    model_bytes: int
    advised_bytes: int
    budget: str
    met: bool  # whether the memory budget is reached

    def tables(self, every: bool = False) -> list[Table]:
        """The proposal; with ``every``, all that was measured too."""
        missed = "" if self.met else ": NOT reached, this is the smallest that is allowed"
        saved = f"model {bytes_text(self.model_bytes)} -> {bytes_text(self.advised_bytes)}"
        notes = [f"{saved}; {self.budget}{missed}"]
        notes += [f"{layer.name}: {text}" for layer in self.layers for text in layer.failures]
        rows = [_row(l, l.choice, l.choice.label if l.choice else l.reason) for l in self.layers]
        figures = frozenset(range(4, len(COLUMNS)))
        tables = [Table("Advice", COLUMNS, rows, figures, notes)]
        if every:
            rows = [_row(layer, m, m.label) for layer in self.layers for m in layer.measurements]
            tables.append(Table("Measured", COLUMNS, rows, figures))
        if self.left:
            rows = [[entry.name, entry.kind, entry.reason] for entry in self.left]
            tables.append(Table("Not considered", ["layer", "class", "why"], rows))
        return tables

    def __str__(self) -> str:
        return "\n\n".join(str(table) for table in self.tables())

    def show(self, every: bool = False) -> None:
        """Print as tables, by rich where it is installed."""
        show(*self.tables(every))

    def code(self) -> str:
        """The rules as Python, to paste into a training script."""
        lines = [f"    {glob.escape(l.name)!r}: {_as_code(l.choice.label)}," for l in self.layers if l.choice]
        return "\n".join(["swap_modules(model, {", *lines, "})"])


def _row(layer: LayerAdvice, measured: Measurement | None, text: str) -> list[str]:
    head = [layer.name, layer.kind, layer.shape, text]
    if measured is None:
        return [*head, bytes_text(layer.bytes), "1.000", "", "", "", "", ""]
    energy = "" if measured.dropped_energy is None else f"{measured.dropped_energy:.3f}"
    return [
        *head, bytes_text(measured.bytes), f"{measured.bytes / max(layer.bytes, 1):.3f}",
        f"{measured.dense_milliseconds:.3f}", f"{measured.milliseconds:.3f}", f"{measured.speedup:.2f}x",
        f"{measured.error:.3f}", energy,
    ]  # fmt: skip


def _as_code(label: str) -> str:
    name, separator, options = label.partition("(")
    if not separator:
        return name
    return f"functools.partial({name}.from_dense, {options.removesuffix(')')})"


def advise(
    model: nn.Module,
    sample_input: Any,
    *,
    memory_budget: int | float | None = None,
    max_error: float | None = None,
    allow_slower: bool = False,
    candidates: Mapping[type[nn.Module], Iterable[Candidate | tuple[str, Callable]]] | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    min_numel: int | None = None,
    rounds: int = 11,
    progress: bool = True,
) -> Advice:
    """Propose which layers to swap for what, from measurements on this machine.

    Each Linear, Embedding and EmbeddingBag is measured against its replacements with the input that it
    gets in one forward of the model, on as many threads as torch uses. Nothing in the model changes.

    Example::

        advice = advise(model, (dense, offsets, indices), memory_budget=0.4)
        advice.show()
        swap_modules(model, advice.rules)

    Args:
        sample_input: a tensor, a tuple of positional inputs, or a dict of keywords; as large a batch as
            the model will run on, for the choice depends on it.
        memory_budget: bytes of the whole model afterwards (int), or a fraction of what it has now
            (float). The least error that reaches it is proposed.
        max_error: no replacement whose output is further than this, relatively, from the dense one;
            among those the smallest. Before fine-tuning, which recovers much of it.
        allow_slower: also propose what is slower than dense (for memory alone).
        candidates: ``{layer type: [(label, converter), ...]}`` in place of `default_candidates`.
        include, exclude, min_numel: as in `swap_modules`; give it the same ``min_numel``.
        rounds: how often each candidate is timed.
        progress: show a progress bar, when the output is a terminal.

    Without a budget: for each layer the replacement of least error among those smaller and not slower.

    Raises:
        TypeError, ValueError: an argument is not what is named above; the model is not touched.
    """
    check_arguments(model, {}, min_numel)
    limit = _memory_limit(memory_budget, model)
    if max_error is not None and not max_error > 0:
        raise ValueError(f"max_error must be above 0 or None; got {max_error!r}")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1; got {rounds}")
    plan = Plan(model, dict.fromkeys(DENSE_TYPES, _never), patterns_of("include", include),
                patterns_of("exclude", exclude), min_numel)  # fmt: skip
    plan.judge()
    captured = _capture(model, sample_input, plan.chosen)
    work = [
        (site, candidate)
        for site in plan.chosen
        if id(site.module) in captured
        for candidate in _candidates(site.module, candidates)
    ]
    entries = {id(site.module): _layer_entry(site, captured.get(id(site.module))) for site in plan.chosen}
    converters = {}
    with torch.no_grad(), _progress(len(work), progress) as advance:
        for site, candidate in work:
            entry = entries[id(site.module)]
            advance(f"{entry.name}: {candidate.label}")
            measured = _measure(site, candidate, captured[id(site.module)], rounds)
            if isinstance(measured, str):
                entry.failures.append(measured)
            else:
                entry.measurements.append(measured)
                converters[entry.name, candidate.label] = candidate.converter
    found = list(entries.values())
    total = layer_bytes(plan.root)
    advised = choose(found, total, memory_limit=limit, max_error=max_error, allow_slower=allow_slower)
    rules = {
        glob.escape(entry.name): converters[entry.name, entry.choice.label] for entry in found if entry.choice
    }
    met = limit is None or advised <= limit
    return Advice(found, plan.left, rules, total, advised, _budget_text(limit, max_error), met)


def default_candidates(module: nn.Module) -> list[Candidate]:
    """The replacements that are tried for a layer: all that are smaller than it, by its shape."""

    def candidate(cls, **options):
        text = ", ".join(f"{key}={value}" for key, value in options.items())
        label = f"{cls.__name__}({text})" if options else cls.__name__
        return Candidate(label, functools.partial(cls.from_dense, **options))

    rows, columns = _weight_shape(module)
    if dense_type_of(module) is nn.Linear:
        out = [candidate(layers.Sparse24Linear)]
        smaller = min(rows, columns)
        ranks = {smaller // part for part in (16, 8, 4)}
        out += [
            candidate(layers.LowRankLinear, rank=rank)
            for rank in sorted(ranks)
            if rank >= 1 and rank * (rows + columns) < rows * columns
        ]
        if rows >= FAN_IN_FROM:
            out += [candidate(layers.FixedFanInLinear, fan_in=f) for f in (16, 32, 64) if 2 * f < columns]
        return out
    bag = dense_type_of(module) is nn.EmbeddingBag
    masked = layers.MaskedEmbeddingBag if bag else layers.MaskedEmbedding
    low_rank = layers.LowRankEmbeddingBag if bag else layers.LowRankEmbedding
    out = [candidate(masked, density=density) for density in (0.1, 0.2, 0.5)]
    ranks = {columns // part for part in (8, 4, 2)}
    return out + [candidate(low_rank, rank=rank) for rank in sorted(ranks) if rank >= 1]


def choose(
    entries: list[LayerAdvice],
    model_bytes: int,
    *,
    memory_limit: int | None,
    max_error: float | None,
    allow_slower: bool,
) -> int:
    """Set each entry's ``choice`` and ``reason`` from its measurements; returns the model's bytes then.

    With a memory limit, replacements are taken up in the order of least error added for each byte
    saved, until the limit is reached.
    """
    allowed = {entry.name: _allowed(entry, max_error, allow_slower) for entry in entries}
    if memory_limit is None:
        for entry in entries:
            options = allowed[entry.name]
            by = (lambda m: (m.bytes, m.error)) if max_error is not None else (lambda m: (m.error, m.bytes))
            entry.choice = min(options, key=by, default=None)
    else:
        _spend(entries, allowed, model_bytes, memory_limit)
    for entry in entries:
        if entry.choice is None:
            entry.reason = entry.reason or "stays dense: " + _refusal(entry, allowed[entry.name], max_error)
    return model_bytes - sum(entry.bytes - entry.choice.bytes for entry in entries if entry.choice)


def _allowed(entry: LayerAdvice, max_error: float | None, allow_slower: bool) -> list[Measurement]:
    return [
        m
        for m in entry.measurements
        if m.bytes < entry.bytes
        and (max_error is None or m.error <= max_error)
        and (allow_slower or m.milliseconds <= SLOWER * m.dense_milliseconds)
    ]


def _refusal(entry: LayerAdvice, allowed: list[Measurement], max_error: float | None) -> str:
    if allowed:
        return "the memory budget is reached without it"
    if not entry.measurements:
        return "no replacement fits it"
    if all(m.bytes >= entry.bytes for m in entry.measurements):
        return "no replacement is smaller"
    if max_error is not None and all(m.error > max_error for m in entry.measurements):
        return f"least error {min(m.error for m in entry.measurements):.3f} is above max_error"
    return "what is allowed is slower than dense here"


def _spend(entries, allowed, model_bytes: int, memory_limit: int) -> None:
    """Greedy on the lower hull of (bytes, error) of each layer."""
    current = model_bytes
    while current > memory_limit:
        steps = []
        for order, entry in enumerate(entries):
            size = entry.choice.bytes if entry.choice else entry.bytes
            error = entry.choice.error if entry.choice else 0.0
            for m in allowed[entry.name]:
                if m.bytes < size:
                    steps.append((max(m.error - error, 0.0) / (size - m.bytes), order, m.bytes, m.label, m))
        if not steps:
            return
        _, order, _, _, chosen = min(steps, key=lambda step: step[:4])
        entry = entries[order]
        current -= (entry.choice.bytes if entry.choice else entry.bytes) - chosen.bytes
        entry.choice = chosen


# -- capture and measure ------------------------------------------------------------------------------------


def _never(module: nn.Module) -> nn.Module:
    raise AssertionError("advise does not convert through the plan")


def _memory_limit(memory_budget: int | float | None, model: nn.Module) -> int | None:
    if memory_budget is None:
        return None
    if (
        isinstance(memory_budget, bool)
        or not isinstance(memory_budget, (int, float))
        or not memory_budget > 0
    ):
        raise ValueError(
            "memory_budget must be bytes (int) or a fraction of the model (float), above 0; "
            f"got {memory_budget!r}"
        )
    return memory_budget if isinstance(memory_budget, int) else round(memory_budget * layer_bytes(model))


def _budget_text(limit: int | None, max_error: float | None) -> str:
    parts = [] if limit is None else [f"budget {bytes_text(limit)}"]
    parts += [] if max_error is None else [f"error at most {max_error:g}"]
    return ", ".join(parts) or "no budget: least error among what is smaller and not slower"


@dataclasses.dataclass
class _Captured:
    args: tuple
    keywords: dict[str, Any]
    calls: int


def _capture(model: nn.Module, sample_input: Any, sites: list[Site]) -> dict[int, _Captured]:
    """What each layer is called with; the input of its first call, copied (callers may write to it)."""
    found: dict[int, _Captured] = {}

    def hook(module, args, keywords):
        known = found.get(id(module))
        if known is None:
            found[id(module)] = _Captured(_copied(args), _copied(keywords), 1)
        else:
            known.calls += 1

    handles = [site.module.register_forward_pre_hook(hook, with_kwargs=True) for site in sites]
    state = torch.random.get_rng_state()
    try:
        with torch.no_grad():
            call_with(model, sample_input)
    finally:
        for handle in handles:
            handle.remove()
        torch.random.set_rng_state(state)
    return found


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, tuple):
        return tuple(_copied(item) for item in value)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return value


def _candidates(module: nn.Module, given) -> list[Candidate]:
    adapter = find_adapter(module)
    dense = adapter[1].to_dense(module) if adapter else module
    if given is None:
        return default_candidates(dense)
    found = [item for cls, items in given.items() if isinstance(dense, cls) for item in items]
    pairs = [item if isinstance(item, Candidate) else Candidate(*item) for item in found]
    return [Candidate(pair.label, converter_of(pair.converter)) for pair in pairs]


def _weight_shape(module: nn.Module) -> tuple[int, int]:
    return tuple(module.weight.shape)


def _layer_entry(site: Site, captured: _Captured | None) -> LayerAdvice:
    shape = "x".join(str(size) for size in max((p.shape for p in site.module.parameters()), key=len))
    calls, kind = captured.calls if captured else 0, type(site.module).__name__
    entry = LayerAdvice(site.name, kind, shape, calls, layer_bytes(site.module), [], [])
    if captured is None:
        entry.reason = "stays dense: not called by this sample"
    return entry


def _measure(site: Site, candidate: Candidate, captured: _Captured, rounds: int) -> Measurement | str:
    try:
        packed = apply(candidate.converter, site.module, adapter=find_adapter(site.module))
    except (ValueError, TypeError) as error:
        return f"{candidate.label} refused: {error}"
    if packed is None:
        return f"{candidate.label} declined"
    dense = site.module
    packed.train(dense.training)
    runs = [functools.partial(_forward, module, captured) for module in (dense, packed)]
    wanted, got = runs[0](), runs[1]()
    if wanted.shape != got.shape:
        return f"{candidate.label}: output has shape {tuple(got.shape)}, the layer's is {tuple(wanted.shape)}"
    dense_ms, own_ms = interleaved(runs, rounds)
    return Measurement(
        candidate.label,
        layer_bytes(packed),
        own_ms,
        dense_ms,
        _relative(got, wanted),
        _dropped_energy(site, packed),
    )


def _forward(module: nn.Module, captured: _Captured) -> Tensor:
    """The layer's own forward, without the hooks that it may carry."""
    return module.forward(*captured.args, **captured.keywords)


def _relative(actual: Tensor, wanted: Tensor) -> float:
    size = wanted.double().norm().item()
    distance = (actual.double() - wanted.double()).norm().item()
    return distance / size if size else (0.0 if distance == 0 else float("inf"))


def _dropped_energy(site: Site, packed: nn.Module) -> float | None:
    layer = next((part for part in packed.modules() if isinstance(part, PackedModule)), None)
    if layer is None or layer_bytes(site.module) > ENERGY_LIMIT_BYTES:
        return None
    adapter = find_adapter(site.module)
    dense = adapter[1].to_dense(site.module) if adapter else site.module
    return _relative(layer.dense_weight(), dense.weight) ** 2


@contextlib.contextmanager
def _progress(total: int, wanted: bool) -> Iterator[Callable[[str], None]]:
    """A progress bar by rich, else one line on a terminal, else nothing."""
    console = rich_console() if wanted else None
    if console is not None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=total)
            done = iter(range(total + 1))
            yield lambda text: bar.update(task, completed=next(done), description=text)
        return
    count = 0

    def line(text: str) -> None:
        nonlocal count
        count += 1
        if wanted and sys.stderr.isatty():
            print(f"\r[{count}/{total}] {text:<70.70}", end="\n" if count == total else "", file=sys.stderr)

    yield line
