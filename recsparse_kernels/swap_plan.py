"""Which layers a swap converts, which it leaves alone, and why. Nothing is changed here but the plan."""

import dataclasses
import fnmatch
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .adapters import find_adapter
from .nn._base import PackedModule
from .swap_report import LeftAlone, layer_bytes
from .swap_rules import apply, call_for, converter_of, dense_type_of, match_any, prune_masks, rule_text

MIN_NUMEL = 4096  # a smaller weight (16 KiB in float32) stays in the first-level cache: nothing to win


@dataclasses.dataclass
class Site:
    """One layer, and every place in the model that holds it."""

    module: nn.Module
    names: list[str]
    slots: list[tuple[nn.Module, str]]  # (parent, key in its _modules)
    convert: Callable[[nn.Module], nn.Module | None] | None = None
    rule: Any = None  # equal rules give equal replacements, which tied layers need
    new: nn.Module | None = None
    note: str = ""

    @property
    def name(self) -> str:
        return self.names[0]


class Plan:
    """Which layers are converted, and by what; the others with their reasons."""

    def __init__(self, model, rules, include, exclude, min_numel):
        self.root = unwrap(model)
        self.rules = rules
        self.include, self.exclude = include, exclude
        self.min_numel = min_numel
        self.restoring = False
        self.used_rules = set()
        self.left: list[LeftAlone] = []
        self.sites = _walk(self.root)
        self.chosen: list[Site] = []

    def judge(self) -> None:
        """Fill `chosen` and `left`. Preorder: what lies inside a converted layer is not looked at."""
        inside = set()
        for site in self.sites.values():
            if id(site.module) in inside:
                continue
            reason = self._judge_one(site)
            if isinstance(site.module, PackedModule):
                inside.update(id(part) for part in site.module.modules())
            if site.convert is not None:
                if site.module is self.root:
                    raise ValueError(
                        f"model is itself a {type(self.root).__name__}: only layers inside a model can be "
                        "changed in place; call from_dense or to_dense on this one"
                    )
                self.chosen.append(site)
                inside.update(id(part) for part in site.module.modules())
            elif reason:
                self._leave(site, reason)
        self.keep_ties()

    def unmatched(self) -> list[str]:
        if callable(self.rules):
            return []
        return [rule_text(key) for key in self.rules if key not in self.used_rules]

    def _leave(self, site: Site, reason: str) -> None:
        self.left.append(LeftAlone(site.name, type(site.module).__name__, layer_bytes(site.module), reason))

    def _judge_one(self, site: Site) -> str:
        """Set ``site.convert``, or return why not; "" for what is no candidate at all."""
        module = site.module
        if isinstance(module, PackedModule) and not callable(self.rules):
            return "is packed already"
        adapter = find_adapter(module)
        dense_type = adapter[1].dense_type if adapter else dense_type_of(module)
        if callable(self.rules):
            return self._judge_by_callable(site, adapter)
        rule = next((key for key in self.rules if _matches(key, site, dense_type)), None)
        if rule is None:
            return "no rule matches it" if dense_type else ""
        self.used_rules.add(rule)
        reason = self._filtered(site) or _unfit(site, adapter) or self._too_small(module)
        if not reason:
            site.rule = rule
            site.convert = functools.partial(apply, converter_of(self.rules[rule]), adapter=adapter)
        return reason

    def _judge_by_callable(self, site: Site, adapter) -> str:
        module = site.module
        candidate = adapter is not None or dense_type_of(module) is not None
        reason = self._filtered(site)
        if not reason and candidate and not self.restoring:
            reason = _unfit(site, adapter, any_tensor=True)
        if not reason and self.min_numel is not None and candidate:
            reason = self._too_small(module)
        if reason:
            return reason if candidate else ""
        new = call_for(self.rules, site.name, module, site.name)
        if new is None or new is module:
            return "the rule returned None" if candidate and not self.restoring else ""
        site.rule = self.rules
        site.convert = lambda _: new
        return ""

    def _filtered(self, site: Site) -> str:
        if self.include is not None and not any(match_any(self.include, name) for name in site.names):
            return "not included"
        excluded = [name for name in site.names if self.exclude is not None and match_any(self.exclude, name)]
        return f"excluded as {excluded[0]}" if excluded else ""

    def _too_small(self, module: nn.Module) -> str:
        limit = MIN_NUMEL if self.min_numel is None else self.min_numel
        numel = max((p.numel() for p in module.parameters()), default=0)
        if numel < limit:
            return f"{numel} weights, fewer than min_numel={limit}"
        if self.min_numel is None and any(p.dim() == 2 and 1 in p.shape for p in module.parameters()):
            return "1-wide: nothing to leave out inside a row; min_numel=0 swaps it all the same"
        return ""

    def keep_ties(self) -> None:
        """Drop layers whose parameters are held by a layer that does not become the same."""
        owners: dict[int, list[Site]] = {}
        for site in self.sites.values():
            for parameter in site.module.parameters(recurse=False):
                owners.setdefault(memory_key(parameter), []).append(site)
        while True:
            for site in self.chosen:
                partner = next(
                    (
                        other
                        for parameter in site.module.parameters()
                        for other in owners.get(memory_key(parameter), ())
                        if not _same_fate(site, other)
                    ),
                    None,
                )
                if partner is not None:
                    break
            else:
                return
            self.drop(site, f"its weight is tied to {partner.name}, which does not become the same layer")

    def drop(self, site: Site, reason: str) -> None:
        self.chosen = [other for other in self.chosen if other is not site]
        site.convert = site.new = None
        self._leave(site, reason)


def _walk(root: nn.Module) -> dict[int, Site]:
    """Every module once, in preorder, with all the places that hold it. Survives cycles."""
    sites = {id(root): Site(root, [""], [])}

    def visit(parent: nn.Module, prefix: str) -> None:
        for key, child in parent._modules.items():
            if child is None:
                continue
            part = "" if _is_wrapper(parent) else key
            name = f"{prefix}.{part}" if prefix and part else prefix or part
            known = sites.get(id(child))
            if known is not None:
                known.names.append(name)
                known.slots.append((parent, key))
                continue
            sites[id(child)] = Site(child, [name], [(parent, key)])
            visit(child, name)

    visit(root, "")
    return sites


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and DataParallel's wrappers."""
    while _is_wrapper(model):
        model = next(iter(model._modules.values()))
    return model


def _is_wrapper(module: nn.Module) -> bool:
    dynamo = sys.modules.get("torch._dynamo")  # a second to import; without it nothing is compiled
    return isinstance(module, nn.DataParallel) or bool(dynamo and isinstance(module, dynamo.OptimizedModule))


def _matches(key: str | type, site: Site, dense_type: type | None) -> bool:
    if isinstance(key, str):
        return dense_type is not None and any(fnmatch.fnmatchcase(name, key) for name in site.names)
    return isinstance(site.module, key) or (dense_type is not None and issubclass(dense_type, key))


# Fit for replacement: the layer must compute what its class computes, from plain tensors.


def _unfit(site: Site, adapter, any_tensor: bool = False) -> str:
    """Why a layer cannot be replaced without changing what the model computes; "" when it can.

    ``any_tensor``: the weight may be a tensor subclass, for a rule that knows what to do with it.
    """
    module = site.module
    if isinstance(module, torch.jit.ScriptModule):
        return "is a ScriptModule: swap before scripting"
    if any(_is_wrapper(parent) for parent, _ in site.slots) or module._compiled_call_impl is not None:
        return "was compiled by itself: swap before compiling"
    if any(isinstance(parent, nn.MultiheadAttention) for parent, _ in site.slots):
        return "MultiheadAttention reads its weight and never calls it"
    adapted = adapter[2] if adapter else dense_type_of(module)
    if adapted is not None and (type(module).forward is not adapted.forward or "forward" in module.__dict__):
        return f"has a forward of its own, which may not be that of {adapted.__name__}: see register_adapter"
    if parametrize.is_parametrized(module):
        names = ", ".join(module.parametrizations)
        return f"{names} is parametrized: call parametrize.remove_parametrizations first"
    for hook in module._forward_pre_hooks.values():
        if type(hook).__name__ in ("WeightNorm", "SpectralNorm"):
            return f"is under {type(hook).__name__}: remove it first"
    for name, parameter in module.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedTensorMixin):
            return f"{name} has no shape yet: run the model once first"
        if not any_tensor and (type(parameter) is not nn.Parameter or type(parameter.data) is not Tensor):
            return f"{name} is a {type(parameter.data).__name__}, not a plain tensor"
        if not parameter.is_floating_point():
            return f"{name} has dtype {parameter.dtype}"
    if adapter is None and adapted is not None:
        extra = sorted(set(_unpruned_state(module)) - {"weight", "bias"})
        if extra:
            return f"holds {', '.join(extra)} beyond weight and bias: see register_adapter"
    return ""


def _unpruned_state(module: nn.Module) -> set[str]:
    masked = set(prune_masks(module))
    names = set(module.state_dict())
    return (names - {f"{n}_orig" for n in masked} - {f"{n}_mask" for n in masked}) | masked


# Ties: two layers that hold one Parameter, or Parameters that share memory.


def memory_key(parameter: Tensor) -> int:
    """Equal for parameters that share memory."""
    uninitialized = isinstance(parameter, nn.parameter.UninitializedTensorMixin)
    if (
        uninitialized
        or parameter.device.type == "meta"
        or parameter.numel() == 0
        or type(parameter.data) is not Tensor
    ):
        return id(parameter)
    return parameter.data_ptr()


def _same_fate(site: Site, other: Site) -> bool:
    """The other is the same layer, a part of it, or becomes the same kind of layer by the same rule."""
    if other is site or any(part is other.module for part in site.module.modules()):
        return True
    same_kind = type(other.module) is type(site.module) and other.rule is not None and other.rule == site.rule
    return other.convert is not None and same_kind
