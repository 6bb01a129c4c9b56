"""What a swap did, what it left alone and why, and who still holds the replaced layers."""

import collections
import dataclasses
import functools
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ._table import Table, bytes_text, ratio_text, show

# Containers longer than this are data, not references that a model keeps: only their head is looked at.
STALE_SCAN_LENGTH = 10_000
STALE_SCAN_OBJECTS = 500_000  # about a second; a model whose attributes lead to more leads to data


@dataclasses.dataclass
class Swapped:
    """One replaced layer."""

    name: str
    aliases: tuple[str, ...]  # further names under which the model holds the same layer
    before: str  # class names
    after: str
    bytes_before: int
    bytes_after: int
    note: str = ""


@dataclasses.dataclass
class LeftAlone:
    """One layer that could have been a candidate and was not replaced."""

    name: str
    kind: str
    bytes: int
    reason: str


@dataclasses.dataclass
class StaleReference:
    """A place that still holds a parameter or layer which is no longer in the model."""

    path: str  # "model.regularization_weight[0][0][1]"
    held: str  # name of the old parameter or layer

    def __str__(self) -> str:
        return f"{self.path} holds the old {self.held}"


@dataclasses.dataclass
class Replacement:
    """Old parameters of one layer, and the layer that took its place; what `remap_optimizer` needs.

    The old parameters are weak references: a report that is kept does not keep the dense weights.
    """

    name: str
    module: nn.Module  # in the model now
    old: dict[str, weakref.ref]  # role ("weight", "bias") -> old parameter
    stems: dict[str, str]  # new parameter -> role of the old one it stems from
    carry: Callable[
        [str, Tensor], Tensor | None
    ]  # (new parameter, tensor laid out like the old) -> like the new


@dataclasses.dataclass
class SwapReport:
    """Result of `swap_modules` or `unswap_modules`; ``print(report)`` and ``report.show()`` draw it."""

    action: str  # "swapped", "would swap", "restored"
    swapped: list[Swapped] = dataclasses.field(default_factory=list)
    left: list[LeftAlone] = dataclasses.field(default_factory=list)
    stale: list[StaleReference] = dataclasses.field(default_factory=list)
    unmatched_rules: list[str] = dataclasses.field(default_factory=list)
    model_bytes_before: int = 0
    model_bytes_after: int = 0
    replacements: list[Replacement] = dataclasses.field(default_factory=list, repr=False)

    @property
    def names(self) -> list[str]:
        """Names of the replaced layers."""
        return [entry.name for entry in self.swapped]

    @property
    def bytes_before(self) -> int:
        """Bytes of the replaced layers, before."""
        return sum(entry.bytes_before for entry in self.swapped)

    @property
    def bytes_after(self) -> int:
        return sum(entry.bytes_after for entry in self.swapped)

    def __bool__(self) -> bool:
        return bool(self.swapped)

    def tables(self) -> list[Table]:
        rows = [
            [
                ", ".join((entry.name, *entry.aliases)), f"{entry.before} -> {entry.after}",
                bytes_text(entry.bytes_before), bytes_text(entry.bytes_after),
                ratio_text(entry.bytes_after, entry.bytes_before), entry.note,
            ]
            for entry in self.swapped
        ]  # fmt: skip
        total = f"model: {bytes_text(self.model_bytes_before)} -> {bytes_text(self.model_bytes_after)}"
        if self.model_bytes_before:
            total += f", ratio {ratio_text(self.model_bytes_after, self.model_bytes_before)}"
        notes = [total]
        notes += [f"rule {rule} matched no layer" for rule in self.unmatched_rules]
        notes += [f"stale: {reference}" for reference in self.stale]
        tables = [
            Table(
                f"{len(self.swapped)} layers {self.action}",
                ["layer", "class", "before", "after", "ratio", "note"],
                rows, frozenset({2, 3, 4}), notes,
            )
        ]  # fmt: skip
        if self.left:
            rows = [[entry.name, entry.kind, bytes_text(entry.bytes), entry.reason] for entry in self.left]
            tables.append(
                Table(
                    f"{len(rows)} layers left alone", ["layer", "class", "bytes", "why"], rows, frozenset({2})
                )
            )
        return tables

    def __str__(self) -> str:
        return "\n\n".join(str(table) for table in self.tables())

    def show(self) -> None:
        """Print as tables, by rich where it is installed."""
        show(*self.tables())


def layer_bytes(module: nn.Module) -> int:
    """Bytes of parameters and persistent buffers, shared ones once."""
    tensors = {}
    for part in module.modules():
        kept = (t for name, t in part._buffers.items() if name not in part._non_persistent_buffers_set)
        for tensor in (*part._parameters.values(), *kept):
            if tensor is not None and not isinstance(tensor, nn.parameter.UninitializedTensorMixin):
                tensors[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(tensors.values())


def find_stale(roots: dict[str, Any], old: dict[int, str]) -> list[StaleReference]:
    """Every path from the roots to one of the old objects.

    Looks through modules' own attributes, containers, objects, optimizers, functions' closures and
    defaults, bound methods and partials.

    Args:
        roots: name -> object to look through.
        old: ``id`` of an old parameter or layer -> its name.
    """
    found = []
    seen = {id(old)}
    queue = collections.deque((name, value) for name, value in roots.items())
    while queue and len(seen) < STALE_SCAN_OBJECTS:
        path, value = queue.popleft()
        if id(value) in old:
            found.append(StaleReference(path, old[id(value)]))
            continue
        if id(value) in seen or _is_opaque(value):
            continue
        seen.add(id(value))
        for suffix, child in _references(value):
            if id(child) in old or not _is_opaque(child):
                queue.append((path + suffix, child))
    return found


def _is_opaque(value: Any) -> bool:
    """Holds no references that a model would keep to its parameters."""
    return isinstance(
        value,
        (str, bytes, int, float, complex, type, types.ModuleType, torch.dtype, torch.device, torch.Size,
         weakref.ref, SwapReport)
    ) or value is None or (isinstance(value, Tensor))  # fmt: skip


def _references(value: Any) -> Iterator[tuple[str, Any]]:
    """(how it is written, object) for what an object refers to."""
    if isinstance(value, (dict, types.MappingProxyType)):
        for key, item in _head(value.items()):
            yield f"[{key!r}]" if isinstance(key, (str, int)) else "[...]", item
            yield ".keys()", key
    elif isinstance(value, (list, tuple, collections.deque)):
        for i, item in enumerate(_head(value)):
            yield f"[{i}]", item
    elif isinstance(value, (set, frozenset)):
        for item in _head(value):
            yield "{...}", item
    elif isinstance(value, functools.partial):
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
    elif isinstance(value, types.MethodType):
        yield from ((".__self__", value.__self__), (".__func__", value.__func__))
    elif isinstance(value, types.FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            if cell != types.CellType():  # an empty cell raises on reading
                yield f".<closure {name}>", cell.cell_contents
        yield from ((".__defaults__", value.__defaults__), (".__kwdefaults__", value.__kwdefaults__))
    elif isinstance(value, torch.optim.Optimizer):
        for i, group in enumerate(value.param_groups):
            for j, parameter in enumerate(group["params"]):
                yield f".param_groups[{i}]['params'][{j}]", parameter
    elif isinstance(value, nn.Module):
        for name, child in value._modules.items():
            yield f".{name}", child
        for name, item in value.__dict__.items():
            if name not in ("_parameters", "_buffers", "_modules"):
                yield f".{name}", item
        yield from ((f".{name}", parameter) for name, parameter in value._parameters.items())
    else:
        yield from ((f".{name}", item) for name, item in getattr(value, "__dict__", {}).items())


def _head(items) -> Iterator[Any]:
    for i, item in enumerate(items):
        if i == STALE_SCAN_LENGTH:
            return
        yield item
