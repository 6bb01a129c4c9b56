"""What a rule may hold, and how it converts one layer."""

import fnmatch
import functools
import inspect
from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.nn.utils import prune

from .adapters import shallow_copy
from .nn._base import PackedModule

DENSE_TYPES = (nn.Linear, nn.Embedding, nn.EmbeddingBag)

Converter = Callable[[nn.Module], nn.Module | None] | type[PackedModule]
Rules = Mapping[str | type[nn.Module], Converter] | Callable[[nn.Module, str], nn.Module | None]


def dense_type_of(module: nn.Module) -> type | None:
    return next((cls for cls in DENSE_TYPES if isinstance(module, cls)), None)


def rule_text(key: str | type) -> str:
    return repr(key) if isinstance(key, str) else key.__name__


def check_arguments(model, rules, min_numel) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    if not callable(rules):
        if not isinstance(rules, Mapping):
            raise TypeError(f"rules must be a mapping or callable(module, name); got {type(rules).__name__}")
        for key, converter in rules.items():
            if not isinstance(key, str) and not (isinstance(key, type) and issubclass(key, nn.Module)):
                raise TypeError(f"rules must be keyed by name pattern or module type; got {key!r}")
            converter_of(converter)
    if min_numel is not None and (
        isinstance(min_numel, bool) or not isinstance(min_numel, int) or min_numel < 0
    ):
        raise ValueError(f"min_numel must be an int >= 0 or None; got {min_numel!r}")
    for name, module in model.named_modules():
        kind = type(module)
        if kind.__name__ in ("DistributedDataParallel", "FullyShardedDataParallel") or _is_sharded(module):
            raise ValueError(
                f"{name or 'model'} is wrapped by {kind.__name__}, which keeps a list of the parameters it "
                "synchronises: change the layers of the plain model first, then wrap it"
            )


def _is_sharded(module: nn.Module) -> bool:
    """Changed by fully_shard (FSDP2)."""
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)


def patterns_of(argument: str, patterns) -> tuple[str, ...] | None:
    if patterns is None:
        return None
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument} must be name patterns; got {pattern!r}")
    return patterns


def match_any(patterns: tuple[str, ...], name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def converter_of(converter: Converter) -> Callable[..., nn.Module | None]:
    """A callable from what a rule may hold."""
    if isinstance(converter, tuple) and len(converter) == 2 and isinstance(converter[1], Mapping):
        converter = functools.partial(converter[0], **converter[1])
    if isinstance(converter, functools.partial) and isinstance(converter.func, type):
        return functools.partial(_class_converter(converter.func), *converter.args, **converter.keywords)
    if isinstance(converter, type):
        return _class_converter(converter)
    if not callable(converter):
        raise TypeError(
            "a converter must be a packed layer class, (class, options), or callable(module); "
            f"got {type(converter).__name__}"
        )
    return converter


def _class_converter(cls: type) -> Callable[..., nn.Module]:
    if not issubclass(cls, PackedModule):
        raise TypeError(f"a converter class must be a PackedModule; got {cls.__name__}")
    return cls.from_dense


def _takes_mask(converter: Callable) -> bool:
    """A from_dense that accepts a mask, and was not given one."""
    given = converter.keywords if isinstance(converter, functools.partial) else {}
    function = converter.func if isinstance(converter, functools.partial) else converter
    if not isinstance(getattr(function, "__self__", None), type):
        return False
    return "mask" in inspect.signature(function).parameters and "mask" not in given


def apply(converter: Callable, module: nn.Module, *, adapter) -> nn.Module | None:
    """Convert one layer: as a torch layer, without pruning hooks, and wrapped as its class wants."""
    masks = prune_masks(module)
    plain = without_pruning(module, masks) if masks else module
    dense = adapter[1].to_dense(plain) if adapter else plain
    if "weight" in masks and adapter is None and _takes_mask(converter):
        return converter(dense, mask=masks["weight"].bool())
    packed = converter(dense)
    if packed is None or packed is dense:
        return None
    if adapter is not None and isinstance(packed, nn.Module):
        packed = adapter[1].wrap(packed, module)
    return packed


def without_pruning(module: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """The layer as ``prune.remove`` would leave it, on a copy."""
    plain = shallow_copy(module)
    for name, mask in masks.items():
        original = plain._parameters.pop(f"{name}_orig")
        plain._buffers.pop(f"{name}_mask")
        plain.__dict__.pop(name, None)
        plain._parameters[name] = nn.Parameter(original.detach() * mask, original.requires_grad)
    plain.__dict__["_forward_pre_hooks"] = type(module._forward_pre_hooks)(
        (key, hook)
        for key, hook in module._forward_pre_hooks.items()
        if not isinstance(hook, prune.BasePruningMethod)
    )
    return plain


def call_for(function: Callable, name: str, *args):
    """Call what the user gave; an error says for which layer."""
    try:
        return function(*args)
    except Exception as error:
        if hasattr(error, "add_note"):  # Python >= 3.11
            error.add_note(f"while converting {name!r}; the model is as it was")
        raise


def prune_masks(module: nn.Module) -> dict[str, Tensor]:
    """Parameter name -> mask, for what torch.nn.utils.prune has masked."""
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, prune.BasePruningMethod)]
    return {hook._tensor_name: module._buffers[f"{hook._tensor_name}_mask"] for hook in hooks}
