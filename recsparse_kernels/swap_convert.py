"""Build the replacements that a plan asks for; the model is not touched."""

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from .adapters import HOOK_TABLES, Origin, find_adapter, origin_of, parameter_roles, shell_of
from .nn._base import PackedModule
from .swap_plan import Plan, Site, memory_key
from .swap_rules import DENSE_TYPES, call_for, prune_masks, without_pruning


def convert_one(site: Site) -> str:
    """Fill ``site.new``; or return why the layer is left alone."""
    masked = bool(prune_masks(site.module))
    try:
        new = call_for(site.convert, site.name, site.module)
    except ValueError as error:
        if not masked:
            raise
        return f"its pruning mask does not fit: {error}"
    if new is None or new is site.module:
        return "the converter returned None"
    if not isinstance(new, nn.Module):
        raise TypeError(f"converter of {site.name!r} must return a module or None; got {type(new).__name__}")
    if masked:
        site.note = "pruning mask taken over"
    site.new = new
    return ""


def convert_all(plan: Plan) -> None:
    for site in list(plan.chosen):
        reason = convert_one(site)
        if reason:
            plan.drop(site, reason)
    plan.keep_ties()
    _share_ties(plan)
    for site in plan.chosen:
        _carry_over(site, plan.restoring)


def _share_ties(plan: Plan) -> None:
    """Give layers that shared parameters replacements that share theirs; drop the pair if they differ."""
    by_parameter: dict[int, Site] = {}
    for site in list(plan.chosen):
        if site.convert is None:
            continue  # dropped with a partner
        for role, parameter in parameter_roles(site.module).items():
            first = by_parameter.setdefault(memory_key(parameter), site)
            if first is site:
                continue
            reason = _share(first, site, role)
            if reason:
                plan.drop(first, reason)
                plan.drop(site, reason)
                plan.keep_ties()
                break


def _share(first: Site, second: Site, role: str) -> str:
    """Make what stems from one parameter one object in both replacements; or return why that cannot be."""
    names = _stemming_from(role, first)
    if names != _stemming_from(role, second):
        return f"tied to {first.name}, and their replacements have different parameters"
    if role != "bias":  # positions, masks and the like stem from the weight
        names = names + [name for name, _ in first.new.named_buffers()]
    for name in names:
        one, other = _tensor(first.new, name), _tensor(second.new, name)
        if one.shape != other.shape or (one.device.type != "meta" and not torch.equal(one, other)):
            return f"{second.name} is tied to {first.name}, and their replacements differ in {name}"
    for name in names:
        table, key = _table_of(second.new, name)
        table[key] = _tensor(first.new, name)
    second.note = f"{role} tied to {first.name}"
    return ""


def _tensor(module: nn.Module, name: str) -> Tensor:
    table, key = _table_of(module, name)
    return table[key]


def _table_of(module: nn.Module, name: str) -> tuple[dict[str, Tensor], str]:
    """The table of parameters or buffers that holds a tensor, and its key there."""
    owner, _, key = name.rpartition(".")
    part = module.get_submodule(owner)
    return (part._parameters if key in part._parameters else part._buffers), key


def stems_of(site: Site) -> dict[str, str]:
    """New parameter -> role of the old one it stems from.

    The one of the same name where there is one; else the weight; else the first that is no bias.
    """
    roles = parameter_roles(site.module)
    main = "weight" if "weight" in roles else next((role for role in roles if role != "bias"), None)
    stems = {}
    for name, _ in site.new.named_parameters():
        last = name.rpartition(".")[2]
        role = last if last in roles else main
        if role is not None and (last != "bias" or role == "bias"):
            stems[name] = role
    return stems


def _stemming_from(role: str, site: Site) -> list[str]:
    return [name for name, source in stems_of(site).items() if source == role]


def _carry_over(site: Site, restoring: bool) -> None:
    """Training flag, device, requires_grad, hooks; and for `unswap_modules` the class it was."""
    old, new = site.module, site.new
    if new.training != old.training:
        new.train(old.training)
    parameters = list(old.parameters())
    if parameters and any(p.device != parameters[0].device for p in new.parameters()):
        new.to(parameters[0].device)
    roles = parameter_roles(old)
    own = dict(new.named_parameters())  # not by attribute: a packed layer's `.weight` is the dense view
    for name, role in stems_of(site).items():
        own[name].requires_grad_(roles[role].requires_grad)
    _hand_over_hooks(old, new)
    if not restoring and isinstance(new, PackedModule) and origin_of(new) is None:
        adapter = find_adapter(old)
        if adapter is not None or type(old) not in DENSE_TYPES:
            new._dense_origin = Origin(adapter[0] if adapter else None, bare_shell(old))


def bare_shell(module: nn.Module) -> nn.Module:
    return shell_of(without_pruning(module, prune_masks(module)))


def _hand_over_hooks(old: nn.Module, new: nn.Module) -> None:
    pruning = bool(prune_masks(old))
    for table in HOOK_TABLES:
        hooks, own = old.__dict__[table], new.__dict__[table]
        if hooks is own or not hooks:
            continue
        if own or (pruning and table == "_forward_pre_hooks"):
            kept = {k: h for k, h in hooks.items() if not isinstance(h, prune.BasePruningMethod)}
            new.__dict__[table] = type(own)({**own, **kept})
        else:
            new.__dict__[table] = hooks
    if new._is_full_backward_hook is None:
        new._is_full_backward_hook = old._is_full_backward_hook
