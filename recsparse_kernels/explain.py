"""Which way each packed layer goes, native kernel or dense path, and why."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from . import _native
from ._table import Table
from .nn._base import PackedModule
from .ops._backend import NATIVE_DTYPES, OBSERVERS, OPS, Op, device_name
from .tuning import DETAILS, Entry


def explain(model: nn.Module, sample_input: Any = None) -> Table:
    """For every packed layer: the ops it calls, the backend each takes, and the reason.

    Example::

        print(explain(model, (dense, offsets, indices)))

    Args:
        model: a model or a single layer.
        sample_input: input of the model, a tuple of positional inputs, or a dict of keywords; one
            forward then shows every call as it is made, with its shapes, in the mode (training, grad)
            that the caller is in. Without it: what dtype, device and the measured table allow.

    Returns:
        A table: ``print`` it, or ``.show()`` through rich; its ``rows`` are plain lists.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    layers = {
        id(module): (name or "(model)", module)
        for name, module in model.named_modules()
        if isinstance(module, PackedModule)
    }
    if sample_input is None:
        rows = [
            [name, type(module).__name__, *row] for name, module in layers.values() for row in _static(module)
        ]
    else:
        rows = _observed(model, layers, sample_input)
    notes = [] if _native.CPU.loaded else [f"native library missing: {_native.CPU.reason}"]
    if rows and sample_input is not None:
        notes.append("under torch.compile the measured table is not read: the default order holds")
    title = f"{len(layers)} packed layers" if layers else "no packed layers"
    return Table(title, ["layer", "class", "op", "backend", "why"], rows, notes=notes)


def call_with(model: nn.Module, sample_input: Any) -> Any:
    """Run the model on a tensor, a tuple of positional inputs, or a dict of keywords."""
    if isinstance(sample_input, dict):
        return model(**sample_input)
    return model(*sample_input) if isinstance(sample_input, (tuple, list)) else model(sample_input)


def why(op: Op, args: tuple, picked: str, asked: str | None) -> str:
    """The reason for a backend, in words."""
    device, dtype = op.device_and_dtype(args)
    if asked is not None:
        return "asked for by backend="
    entry = DETAILS.get((op.name, op.key(args)))
    if entry is not None and entry.backend == picked:
        return _measured_text(entry)
    return _default_text(op, device, dtype)


def _measured_text(entry: Entry) -> str:
    return f"measured: {entry.times} ({entry.shape})"


def _default_text(op: Op, device: str, dtype: torch.dtype) -> str:
    if len(op.timed_backends(device, dtype)) > 1:
        return "first in order; not measured at this shape (recsparse_kernels.tune)"
    if dtype not in NATIVE_DTYPES:
        return f"native runs float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if not _native.CPU.loaded:
        return "the native library is missing"
    return f"no native kernel of {op.name} for {device}"


def _static(module: PackedModule) -> list[list[str]]:
    """Rows without a forward: the ops of the layer's family, by its dtype and device."""
    family = type(module).__module__.rpartition(".")[2]
    parameter = next((p for p in module.parameters() if p.is_floating_point()), None)
    where = parameter.device if parameter is not None else torch.device("cpu")
    device, dtype = where.type, parameter.dtype if parameter is not None else torch.float32
    measured_on = device_name(where), dtype
    rows = []
    for name, op in OPS.items():
        if not name.startswith(family) or "_grad" in name or op.mutates:
            continue
        measured = sum(1 for op_name, key in DETAILS if op_name == name and key[:2] == measured_on)
        reason = _default_text(op, device, dtype)
        if measured:
            reason = f"{measured} shapes measured; pass sample_input to see which one this is"
        rows.append([name, op.backends(device, dtype)[0] if device != "meta" else "-", reason])
    return rows or [["-", "-", "pass sample_input to see its calls"]]


def _observed(
    model: nn.Module, layers: dict[int, tuple[str, PackedModule]], sample_input: Any
) -> list[list[str]]:
    rows = []

    def observer(op, args, picked, asked):
        name, module = current[-1] if current else ("(outside)", None)
        row = [
            name,
            type(module).__name__ if module is not None else "-",
            op.name,
            picked,
            why(op, args, picked, asked),
        ]
        if row not in rows:
            rows.append(row)

    OBSERVERS.append(observer)
    try:
        with _inside(layers) as current:
            call_with(model, sample_input)
    finally:
        OBSERVERS.remove(observer)
    called = {row[0] for row in rows}
    rows += [
        [name, type(module).__name__, "-", "-", "not called in this forward"]
        for name, module in layers.values()
        if name not in called
    ]
    return rows


@contextlib.contextmanager
def _inside(layers: dict[int, tuple[str, PackedModule]]) -> Iterator[list[tuple[str, PackedModule]]]:
    """The packed layers that are running, innermost last."""
    current: list[tuple[str, PackedModule]] = []
    handles = []
    for entry in layers.values():
        handles.append(entry[1].register_forward_pre_hook(lambda *_, entry=entry: current.append(entry)))
        handles.append(entry[1].register_forward_hook(lambda *_: current.pop() and None, always_call=True))
    try:
        yield current
    finally:
        for handle in handles:
            handle.remove()
