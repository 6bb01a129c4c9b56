"""State dicts of the whole model as it would be dense, out of and into a swapped model."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from . import adapters
from .adapters import origin_of, restore_original
from .nn._base import PackedModule, replace_data


def dense_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict of the model as it would be with every packed layer dense again.

    Keys and shapes are those of the model before the swap; shared layers give shared tensors.
    """
    packed = _packed_layers(model)
    dense = {id(module): None for module in packed.values()}
    out = {}
    for key, value in model.state_dict().items():
        name = _owner(key, packed)
        if name is None:
            out[key] = value
            continue
        module = packed[name]
        if dense[id(module)] is None:
            dense[id(module)] = restore_original(module.to_dense(), origin_of(module)).state_dict()
        out.update({f"{name}.{k}" if name else k: v for k, v in dense[id(module)].items()})
    return out


def load_dense_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True) -> None:
    """Load a checkpoint of the dense model into the swapped one; each packed layer packs its part anew.

    Raises:
        ValueError: keys are missing, or (with ``strict``) unknown, or have other shapes; all are named,
            and the model is as it was.
    """
    packed = _packed_layers(model)
    plain = {k: v for k, v in model.state_dict(keep_vars=True).items() if _owner(k, packed) is None}
    shells = {name: _dense_shell(module) for name, module in packed.items()}
    wanted = {key: getattr(value, "shape", None) for key, value in plain.items()}
    for name, shell in shells.items():
        wanted.update({_join(name, key): value.shape for key, value in shell.state_dict().items()})
    _check_keys(wanted, state_dict, strict)

    before = [(module, _snapshot(module)) for module in {id(m): m for m in packed.values()}.values()]
    ties = _ties(packed.values())
    try:
        for name, module in packed.items():
            _load_packed(module, name, shells[name], state_dict)
    except BaseException:
        for module, snapshot in before:
            _restore(module, snapshot)
        raise
    for (first, key), *others in ties:
        for module, other_key in others:
            module._parameters[other_key] = first._parameters[key]
    with torch.no_grad():  # shapes are checked: this cannot fail
        for key, value in plain.items():
            if isinstance(value, Tensor) and key in state_dict:
                value.copy_(state_dict[key])


def _ties(modules: Iterable[nn.Module]) -> list[list[tuple[nn.Module, str]]]:
    """Parameters held by several layers: who holds them, under which name."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in {id(m): m for m in modules}.values():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((module, key))
    return [entry for entry in holders.values() if len(entry) > 1]


def _packed_layers(model: nn.Module) -> dict[str, PackedModule]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, PackedModule)
    }


def _owner(key: str, packed: Mapping[str, PackedModule]) -> str | None:
    """Name of the packed layer that a state_dict key belongs to."""
    parts = key.split(".")
    return next((name for i in range(len(parts)) if (name := ".".join(parts[:i])) in packed), None)


def _join(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key


def _dense_shell(module: PackedModule) -> nn.Module:
    """A layer of the class before the swap, on the meta device."""
    origin = origin_of(module)
    if origin is None or (origin.adapter is not None and adapters.ADAPTERS[origin.adapter].restore is None):
        return module._empty_dense().to("meta")
    return origin.shell


def _load_packed(module: PackedModule, name: str, shell: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    keys = [key for key in shell.state_dict() if _join(name, key) in state_dict]
    if not keys:
        return  # strict=False and nothing there
    device = next((t.device for t in module.state_dict().values()), torch.device("cpu"))
    dense = adapters.fill_shell(shell, device)
    if len(keys) < len(shell.state_dict()):
        own = restore_original(module.to_dense(), origin_of(module))
        dense.load_state_dict(own.state_dict())
    dense.load_state_dict({key: state_dict[_join(name, key)] for key in keys}, strict=False)
    with torch.no_grad():
        module._load_dense(adapters.dense_view(dense, origin_of(module)))


def _check_keys(wanted: dict[str, torch.Size | None], state_dict: Mapping[str, Tensor], strict: bool) -> None:
    problems = []
    if strict:
        problems += [f"{key} is missing" for key in wanted if key not in state_dict]
        problems += [f"{key} is not known here" for key in state_dict if key not in wanted]
    for key, shape in wanted.items():
        if key not in state_dict or shape is None:
            continue
        if not isinstance(state_dict[key], Tensor):
            problems.append(f"{key} must be a tensor, got {type(state_dict[key]).__name__}")
        elif state_dict[key].shape != shape:
            problems.append(f"{key} must have shape {tuple(shape)}, got {tuple(state_dict[key].shape)}")
    if problems:
        raise ValueError(f"the dense state_dict does not fit, nothing was loaded: {'; '.join(problems)}")


def _snapshot(module: nn.Module) -> dict:
    """A module's own tensors, the objects and their contents."""
    tables = ("_parameters", "_buffers")
    return {
        table: {k: (t, None if t is None else t.detach().clone()) for k, t in module.__dict__[table].items()}
        for table in tables
    }


def _restore(module: nn.Module, snapshot: dict) -> None:
    for table, entries in snapshot.items():
        module.__dict__[table].clear()
        for key, (tensor, content) in entries.items():
            if tensor is not None:
                _set_content(tensor, content)
            module.__dict__[table][key] = tensor


def _set_content(tensor: Tensor, content: Tensor) -> None:
    if tensor.shape == content.shape and tensor.dtype == content.dtype:
        tensor.detach().copy_(content)
    else:
        replace_data(tensor, content)
