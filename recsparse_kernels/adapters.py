"""Layers of other libraries that compute what a torch layer computes, but are not subclasses of it.

An adapter says how to see such a layer as a torch layer, what goes into the model in its place, and
how to get a layer of the original class back. Classes are named by their path, so that nothing is
imported for a library that is not in use.
"""

import copy
import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Adapter:
    """How `swap_modules` treats a class that is not a subclass of a torch layer.

    ``to_dense(module)`` gives the torch layer of ``dense_type`` with the same output. It copies what
    it must (a transposed weight), and may share the rest.
    ``wrap(replacement, module)`` gives what the model holds instead of ``module``.
    ``restore(dense, module)`` fills ``module``, one of the original class with tensors not yet
    meaningful, from a dense torch layer, and returns it.
    """

    dense_type: type[nn.Module]
    to_dense: Callable[[nn.Module], nn.Module]
    wrap: Callable[[nn.Module, nn.Module], nn.Module]
    restore: Callable[[nn.Module, nn.Module], nn.Module] | None = None


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a replacement remembers of a layer that was not exactly torch's: enough to restore it."""

    adapter: str | None  # class path in `ADAPTERS`; None: a subclass of a torch layer
    shell: nn.Module  # the original layer on the meta device: everything but the numbers


ADAPTERS: dict[str, Adapter] = {}  # class path -> adapter


def register_adapter(
    cls: type[nn.Module] | str,
    *,
    dense_type: type[nn.Module],
    to_dense: Callable[[nn.Module], nn.Module],
    wrap: Callable[[nn.Module, nn.Module], nn.Module] | None = None,
    restore: Callable[[nn.Module, nn.Module], nn.Module] | None = None,
) -> None:
    """Teach `swap_modules` a layer class that is not a subclass of torch's.

    Args:
        cls: the class, or its path ("torch_geometric.nn.dense.linear.Linear") when it is not imported.
        dense_type: the torch layer it computes: ``nn.Linear``, ``nn.Embedding``, ``nn.EmbeddingBag``;
            rules for this type then match the class too.
        to_dense: ``to_dense(module)``, the torch layer with the same output.
        wrap: ``wrap(replacement, module)``, what goes into the model; default: the replacement itself.
        restore: ``restore(dense, module)``, fills ``module`` (of the original class, its tensors not
            yet meaningful) from a dense torch layer; `unswap_modules` and `dense_state_dict` use it.
            Default: the torch layer takes its place.

    Raises:
        TypeError: an argument is not what is named above.
    """
    if not (isinstance(cls, str) or (isinstance(cls, type) and issubclass(cls, nn.Module))):
        raise TypeError(f"cls must be a module class or its path; got {cls!r}")
    if not (isinstance(dense_type, type) and issubclass(dense_type, nn.Module)):
        raise TypeError(f"dense_type must be a torch layer class; got {dense_type!r}")
    for name, value, required in (
        ("to_dense", to_dense, True),
        ("wrap", wrap, False),
        ("restore", restore, False),
    ):
        if not callable(value) and (required or value is not None):
            raise TypeError(f"{name} must be callable; got {type(value).__name__}")
    path = cls if isinstance(cls, str) else class_path(cls)
    ADAPTERS[path] = Adapter(dense_type, to_dense, wrap or (lambda replacement, module: replacement), restore)


def class_path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def find_adapter(module: nn.Module) -> tuple[str, Adapter, type] | None:
    """Class path, adapter and adapted class of a module, most derived class first; None without one."""
    for cls in type(module).__mro__:
        adapter = ADAPTERS.get(class_path(cls))
        if adapter is not None:
            return class_path(cls), adapter, cls
    return None


def shallow_copy(module: nn.Module) -> nn.Module:
    """A module with its own tables of parameters, buffers and children; all else is shared."""
    new = copy.copy(module)
    for table in ("_parameters", "_buffers", "_modules"):
        new.__dict__[table] = module.__dict__[table].copy()
    return new


def shell_of(module: nn.Module) -> nn.Module:
    """The module without its weights (parameters on the meta device) and without hooks."""
    memo = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in module.parameters()
    }
    bare = shallow_copy(module)
    for table in HOOK_TABLES:
        if table in bare.__dict__:
            bare.__dict__[table] = type(bare.__dict__[table])()
    return copy.deepcopy(bare, memo)


def parameter_roles(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters under the names they have in a torch layer; a pruned weight under "weight"."""
    roles = {}
    for name, parameter in module.named_parameters():
        last = name.rpartition(".")[2].removesuffix("_orig")
        roles[last if last not in roles else name] = parameter
    return roles


def fill_shell(shell: nn.Module, device: torch.device) -> nn.Module:
    """A copy of the shell whose parameters are on the device, their values not yet meaningful."""
    module = copy.deepcopy(shell)
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                empty = torch.empty_like(parameter, device=device)
                part._parameters[name] = nn.Parameter(empty, parameter.requires_grad)
    return module


# The tables that hold a module's hooks. `swap` hands these over to the replacement, the same objects,
# so that a handle the user kept still removes its hook.
HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def dense_view(module: nn.Module, origin: Origin | None) -> nn.Module:
    """A module of the original class, seen as a torch layer."""
    if origin is None or origin.adapter is None:
        return module
    return ADAPTERS[origin.adapter].to_dense(module)


def origin_of(module: nn.Module) -> Origin | None:
    """What a replacement remembers of the layer before it."""
    return getattr(module, "_dense_origin", None)


def restore_original(dense: nn.Module, origin: Origin | None) -> nn.Module:
    """The layer of the original class that computes what ``dense`` computes."""
    if origin is None:
        return dense
    module = fill_shell(origin.shell, dense.weight.device)
    if origin.adapter is None:
        module.__dict__["_parameters"] = dense.__dict__["_parameters"].copy()
        return module.train(dense.training)
    adapter = ADAPTERS.get(origin.adapter)
    if adapter is None or adapter.restore is None:
        return dense
    with torch.no_grad():
        return adapter.restore(dense, module).train(dense.training)


# -- Linear maps with other names -------------------------------------------------------------------


def _linear(weight: Tensor, bias: Tensor | None, training: bool) -> nn.Linear:
    """A torch Linear around these tensors: weight [O, I]."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), bias.requires_grad)
    return linear.train(training)


def _pyg_linear_to_dense(module: nn.Module) -> nn.Linear:
    return _linear(module.weight, module.bias, module.training)


def _pyg_linear_wrap(replacement: nn.Module, module: nn.Module) -> nn.Module:
    # PyG's own layers read these two
    replacement.in_channels, replacement.out_channels = module.in_channels, module.out_channels
    return replacement


def _pyg_linear_restore(dense: nn.Linear, module: nn.Module) -> nn.Module:
    module.weight, module.bias = dense.weight, dense.bias
    return module


def _conv1d_to_dense(module: nn.Module) -> nn.Linear:
    """Hugging Face's Conv1D is a Linear with weight [I, O]."""
    transposed = module.weight.detach().t().contiguous().requires_grad_(module.weight.requires_grad)
    return _linear(transposed, module.bias, module.training)


def _conv1d_wrap(replacement: nn.Module, module: nn.Module) -> nn.Module:
    replacement.nx, replacement.nf = module.nx, module.nf
    return replacement


def _conv1d_restore(dense: nn.Linear, module: nn.Module) -> nn.Module:
    module.weight = nn.Parameter(dense.weight.detach().t().contiguous(), dense.weight.requires_grad)
    module.bias = dense.bias
    return module


# -- One big table behind field offsets ---------------------------------------------------------------


def _fm_embedding_wrap(replacement: nn.Module, module: nn.Module) -> nn.Module:
    """The same layer, offsets and all, around the replaced table."""
    new = shallow_copy(module)
    new._modules["embedding"] = replacement
    return new


register_adapter(
    "torch_geometric.nn.dense.linear.Linear",
    dense_type=nn.Linear,
    to_dense=_pyg_linear_to_dense,
    wrap=_pyg_linear_wrap,
    restore=_pyg_linear_restore,
)
register_adapter(
    "transformers.pytorch_utils.Conv1D",
    dense_type=nn.Linear,
    to_dense=_conv1d_to_dense,
    wrap=_conv1d_wrap,
    restore=_conv1d_restore,
)
register_adapter(
    "recbole.model.layers.FMEmbedding",
    dense_type=nn.Embedding,
    to_dense=lambda module: module.embedding,
    wrap=_fm_embedding_wrap,
)
