"""Which of a kernel's named configurations a launcher takes.

A table (`Configs`) has one configuration for each shape class, "plain", which launchers take by default,
and for some classes a few others that a GPU may run faster. `tune` times those; what it finds for a GPU is
stored in triton_configs.json: the one shipped with the package, and the user's, which wins. The files are
read once, at the first launch of a kernel that has a choice; nothing is ever timed at a launch.
"""

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .._gpu import gpu_name
from .._store import cache_folder, read_json, write_json
from .._timing import interleaved

PLAIN = "plain"
SHIPPED = Path(__file__).parents[1] / "triton_configs.json"
VERSION = 1  # of the file's layout; another version is not read
MARGIN = 1.05  # what is not faster by this much does not displace the plain choice: it may be noise

TABLES: dict[str, "Configs"] = {}  # by name
_forced: dict[tuple[str, str], str] = {}  # (table, shape class) -> configuration, in `using`
_asked: list[set[tuple[str, str]]] = []  # one for each `watching` that is open


class Configs:
    """The configurations of one kernel, or of several that share tiles: ``table[shape_class]`` is a dict of
    constants and launch options.

    Args:
        name: of the table, in files of measured choices.
        plain: shape class -> the configuration that launchers take by default.
        others: shape class -> name -> a configuration worth trying.
    """

    def __init__(
        self,
        name: str,
        plain: Mapping[str, dict[str, Any]],
        others: Mapping[str, Mapping[str, dict[str, Any]]] | None = None,
    ):
        others = others or {}
        if not others.keys() <= plain.keys():
            raise ValueError(f"{name}: no shape class {sorted(others.keys() - plain.keys())}")
        self.name, self.plain = name, dict(plain)
        self.choices = {cls: {PLAIN: config, **others.get(cls, {})} for cls, config in plain.items()}
        TABLES[name] = self

    def __getitem__(self, shape_class: str) -> dict[str, Any]:
        choices = self.choices[shape_class]
        if len(choices) == 1:
            return choices[PLAIN]
        place = self.name, shape_class
        for asked in _asked:
            asked.add(place)
        return choices[_forced.get(place) or measured(gpu_name()).get(place, PLAIN)]


# -- what was measured --------------------------------------------------------------------------------------


def cache_path() -> Path:
    """The user's file."""
    return cache_folder() / "triton_configs.json"


@functools.cache
def _stored() -> dict[str, dict[tuple[str, str], str]]:
    """GPU -> (table, shape class) -> configuration, of both files."""
    found: dict[str, dict[tuple[str, str], str]] = {}
    for path in (SHIPPED, cache_path()):
        for gpu, choices in _read(path).items():
            known = {place: name for place, name in choices.items() if _is_known(path, place, name)}
            found.setdefault(gpu, {}).update(known)
    return found


def measured(gpu: str | None) -> dict[tuple[str, str], str]:
    """(table, shape class) -> configuration, where one was measured on that GPU."""
    return {} if gpu is None else _stored().get(gpu, {})


def reload() -> None:
    """The files are read again at the next launch."""
    _stored.cache_clear()


def _is_known(path: Path, place: tuple[str, str], name: str) -> bool:
    table, shape_class = place
    known = table in TABLES and name in TABLES[table].choices.get(shape_class, {})
    if not known:
        warnings.warn(
            f"{path}: there is no configuration {name!r} of {table}, {shape_class!r}; the default is taken. "
            "recsparse_kernels.tune writes the entry anew",
            stacklevel=4,
        )
    return known


def _parse(content: Any) -> dict[str, dict[tuple[str, str], str]]:
    out = {}
    for gpu, tables in content["gpus"].items():
        out[gpu] = {(table, cls): name for table, found in tables.items() for cls, name in found.items()}
        wrong = [name for name in out[gpu].values() if not isinstance(name, str)]
        if wrong:
            raise TypeError(f"a configuration's name must be text; got {wrong[0]!r}")
    return out


def _read(path: Path) -> dict[str, dict[tuple[str, str], str]]:
    advice = "delete it, or call recsparse_kernels.tune to write it anew"
    return read_json(path, VERSION, _parse, {}, advice)


def save(choices: "list[Choice]", path: Path | None = None) -> Path:
    """Add choices to the user's file, or another; replaces it in one step."""
    path = path or cache_path()
    gpus = _read(path)
    for choice in choices:
        gpus.setdefault(choice.gpu, {})[choice.table, choice.shape_class] = choice.name
    content: dict[str, dict[str, dict[str, str]]] = {}
    for gpu, found in sorted(gpus.items()):
        for (table, shape_class), name in sorted(found.items()):
            content.setdefault(gpu, {}).setdefault(table, {})[shape_class] = name
    return write_json(path, {"version": VERSION, "gpus": content})


# -- measuring ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was found for one shape class of a table."""

    gpu: str
    table: str
    shape_class: str
    name: str
    milliseconds: dict[str, float]  # configuration -> median

    @property
    def times(self) -> str:
        return ", ".join(f"{name} {ms:.3f} ms" for name, ms in self.milliseconds.items())


@contextlib.contextmanager
def using(names: Mapping[tuple[str, str], str]) -> Iterator[None]:
    """Within the block these configurations are taken: (table, shape class) -> name."""
    before = dict(_forced)
    _forced.update(names)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def every() -> Iterator[dict[tuple[str, str], str]]:
    """Choices, for `using`, that between them take every configuration of every table."""
    places = [
        (table.name, cls, [*found]) for table in TABLES.values() for cls, found in table.choices.items()
    ]
    for nth in range(max((len(names) for _, _, names in places), default=1)):
        yield {(table, cls): names[min(nth, len(names) - 1)] for table, cls, names in places}


@contextlib.contextmanager
def watching() -> Iterator[set[tuple[str, str]]]:
    """Collects (table, shape class) wherever a launcher has a choice."""
    asked: set[tuple[str, str]] = set()
    _asked.append(asked)
    try:
        yield asked
    finally:
        _asked.remove(asked)


def tune(
    run: Callable[[], Any], gpu: str, rounds: int = 9, timer: Callable[..., list[float]] = interleaved
) -> list[Choice]:
    """Time ``run`` with each configuration that its launches could take, and take the fastest from now on.

    One shape class at a time, the others as they were. A configuration that does not launch on this GPU is
    left out; the plain one stays unless another is clearly faster.

    Args:
        run: does the launches; they are waited for by ``timer``.
        timer: ``timer(runs, rounds)`` -> milliseconds of each.
    """
    with watching() as asked:
        run()
    found = []
    for place in sorted(asked):
        runs = {}
        for name in TABLES[place[0]].choices[place[1]]:
            one = functools.partial(_run_with, {place: name}, run)
            try:
                one()
            except Exception:  # whatever compiler or driver raise, this GPU does not run it
                continue
            runs[name] = one
        if len(runs) < 2:
            continue
        medians = dict(zip(runs, timer(list(runs.values()), rounds), strict=True))
        fastest = min(medians, key=medians.__getitem__)
        if PLAIN in medians and medians[PLAIN] < MARGIN * medians[fastest]:
            fastest = PLAIN
        choice = Choice(gpu, *place, fastest, {name: round(ms, 6) for name, ms in medians.items()})
        _stored().setdefault(gpu, {})[place] = fastest
        found.append(choice)
    return found


def _run_with(names: Mapping[tuple[str, str], str], run: Callable[[], Any]) -> None:
    with using(names):
        run()
