"""Carry an optimizer over a swap: its parameter groups, and its state to the kept positions."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from ._table import Table, show
from .adapters import Origin, dense_view, fill_shell, parameter_roles, restore_original, shallow_copy
from .nn._base import PackedModule
from .swap_report import Replacement, SwapReport


@dataclasses.dataclass
class Remapped:
    """What became of one parameter's place in the optimizer."""

    name: str  # of the new parameter, in the model
    group: int
    state: str  # "carried", "fresh", "none"
    reason: str = ""


@dataclasses.dataclass
class RemapReport:
    """Result of `remap_optimizer`; ``print(report)`` and ``report.show()`` draw it."""

    entries: list[Remapped] = dataclasses.field(default_factory=list)
    left: list[str] = dataclasses.field(default_factory=list)  # replaced layers the optimizer does not hold

    def table(self) -> Table:
        rows = [[entry.name, str(entry.group), entry.state, entry.reason] for entry in self.entries]
        notes = [f"{name}: its old parameters are not in this optimizer" for name in self.left]
        title = f"{len(rows)} parameters remapped"
        return Table(title, ["parameter", "group", "state", "why"], rows, frozenset({1}), notes)

    def __str__(self) -> str:
        return str(self.table())

    def show(self) -> None:
        show(self.table())


@dataclasses.dataclass
class _Move:
    """One new parameter: where it goes, and the state it starts with (None: what the optimizer makes)."""

    parameter: nn.Parameter
    name: str
    source: nn.Parameter
    state: dict[str, Any] | None
    entry: Remapped


def remap_optimizer(optimizer: torch.optim.Optimizer, report: SwapReport) -> RemapReport:
    """Put the parameters of replaced layers into the optimizer, in the groups the old ones were in.

    State laid out like the old parameter (momentum, Adam's and Adagrad's moments) moves to the kept
    positions. A replacement without positions in the dense weight (low-rank factors) starts as new,
    and the report says so. Group dicts stay the same objects, so learning-rate schedulers go on.

    Args:
        optimizer: any ``torch.optim.Optimizer`` that keeps state per parameter; changed in place.
        report: what `swap_modules` or `unswap_modules` returned.

    Raises:
        TypeError: an argument is not what is named above.
        ValueError: the optimizer keeps one state for all parameters (LBFGS), or takes only matrices
            (Muon) and a packed parameter is none. It is then as it was.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer; got {type(optimizer).__name__}")
    if not isinstance(report, SwapReport):
        raise TypeError(f"report must be what swap_modules returned; got {type(report).__name__}")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "optimizer must keep state per parameter; LBFGS keeps one history for all: make a new one"
        )

    result = RemapReport()
    groups = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    moves: dict[int, list[_Move]] = {}  # id(old parameter) -> new ones in its place
    gone: set[int] = set()
    placed: set[int] = set(groups)
    for replacement in report.replacements:
        old = {role: reference() for role, reference in replacement.old.items()}
        held = {role: p for role, p in old.items() if p is not None and id(p) in groups}
        if old and not held:
            result.left.append(replacement.name)
            continue
        parameters = dict(replacement.module.named_parameters())
        own = {id(p) for p in parameters.values()}
        gone.update(id(p) for p in held.values() if id(p) not in own)
        for name, role in replacement.stems.items():
            parameter = parameters[name]
            source = held.get(role)
            if source is None or id(parameter) in placed:
                continue  # frozen before; or tied and placed already
            placed.add(id(parameter))
            if isinstance(optimizer, torch.optim.Muon) and parameter.dim() != 2:
                raise ValueError(
                    f"optimizer must take vectors; Muon takes only matrices, and "
                    f"{replacement.name}.{name} has shape {tuple(parameter.shape)}"
                )
            group = groups[id(source)]
            state, entry = _move_state(optimizer, group, replacement, name, source, parameter)
            full_name = f"{replacement.name}.{name}"
            moves.setdefault(id(source), []).append(_Move(parameter, full_name, source, state, entry))
            result.entries.append(entry)
    _commit(optimizer, moves, gone)
    return result


def _move_state(
    optimizer: torch.optim.Optimizer,
    group: int,
    replacement: Replacement,
    name: str,
    source: nn.Parameter,
    parameter: nn.Parameter,
) -> tuple[dict[str, Any] | None, Remapped]:
    full_name = f"{replacement.name}.{name}"
    old, role = optimizer.state.get(source, {}), replacement.stems[name]
    if not old:
        return None, Remapped(full_name, group, "none", "the optimizer had none")
    if isinstance(optimizer, torch.optim.Adafactor) and (source.dim() > 1) != (parameter.dim() > 1):
        reason = "Adafactor factors the state of matrices, not that of vectors"
        return None, Remapped(full_name, group, "fresh", reason)
    new = {}
    for key, value in old.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            new[key] = value.clone() if isinstance(value, Tensor) else value
            continue
        mapped = None
        if value.shape == source.shape:
            same = role == "bias" and parameter.shape == source.shape
            mapped = value.clone() if same else replacement.carry(name, value)
        if mapped is None:
            fresh = _fresh_state(optimizer, group, parameter, old)
            reason = "it has no positions in the dense weight"
            if value.shape != source.shape:
                reason = f"{key} has shape {tuple(value.shape)}, not the weight's"
            return fresh, Remapped(full_name, group, "fresh", reason)
        new[key] = mapped.to(value.dtype)
    return new, Remapped(full_name, group, "carried")


def _fresh_state(
    optimizer, group: int, parameter: nn.Parameter, old: dict[str, Any]
) -> dict[str, Any] | None:
    """State as for a new parameter; None where the optimizer makes it at the next step.

    torch's optimizers do, except Adagrad, whose state is made in its constructor. Of one we do not know
    we keep the keys, at zero.
    """
    kind = type(optimizer)
    if isinstance(optimizer, torch.optim.Adagrad):
        start = optimizer.param_groups[group]["initial_accumulator_value"]
        return {
            "step": torch.zeros_like(old["step"]),
            "sum": torch.full_like(parameter, start, requires_grad=False),
        }
    if kind.__module__.startswith("torch.optim"):
        return None
    fresh = {}
    for key, value in old.items():
        if isinstance(value, Tensor) and value.dim() > 0:
            fresh[key] = torch.zeros_like(parameter, requires_grad=False)
        else:
            fresh[key] = torch.zeros_like(value) if isinstance(value, Tensor) else type(value)()
    return fresh


def _commit(optimizer: torch.optim.Optimizer, moves: dict[int, list[_Move]], gone: set[int]) -> None:
    for group in optimizer.param_groups:
        old_names = group.get("param_names")
        parameters, names = [], []
        for i, parameter in enumerate(group["params"]):
            if id(parameter) not in gone:
                parameters.append(parameter)
                names.append(old_names[i] if old_names else None)
            for move in moves.get(id(parameter), ()):
                parameters.append(move.parameter)
                names.append(move.name)
        group["params"][:] = parameters
        if old_names is not None:
            old_names[:] = names
    for key in [p for p in optimizer.state if id(p) in gone]:
        del optimizer.state[key]
    for batch in moves.values():
        for move in batch:
            if move.state is not None:
                optimizer.state[move.parameter] = move.state


# -- state between the layouts of a dense and a packed layer ------------------------------------------------


@torch.no_grad()
def pack_state(new: nn.Module, origin: Origin | None, name: str, value: Tensor) -> Tensor | None:
    """A tensor laid out like the old layer's weight, as one like parameter ``name`` of its replacement."""
    owner, _, key = name.rpartition(".")
    packed = new.get_submodule(owner)
    if not isinstance(packed, PackedModule):
        return None
    return packed.pack_state(key, _as_dense_weight(value, origin))


@torch.no_grad()
def unpack_state(packed: PackedModule, origin: Origin | None, name: str, value: Tensor) -> Tensor | None:
    """A tensor laid out like the packed layer's values, as one like the dense weight: zero elsewhere."""
    for own_name, own in packed.named_parameters():
        if own.shape != value.shape or own_name == "bias":
            continue
        copy = shallow_copy(packed)
        copy._parameters[own_name] = nn.Parameter(value, False)
        dense = copy.to_dense()
        if packed.pack_state(own_name, dense.weight) is None:
            return None
        original = restore_original(dense, origin)
        return parameter_roles(original)["weight"].detach()
    return None


def _as_dense_weight(value: Tensor, origin: Origin | None) -> Tensor:
    """As the torch layer lays it out: an adapter may transpose."""
    if origin is None:
        return value
    module = fill_shell(origin.shell, value.device)
    for part in module.modules():
        if "weight" in part._parameters:
            part._parameters["weight"] = nn.Parameter(value, False)
    return dense_view(module, origin).weight.detach()
