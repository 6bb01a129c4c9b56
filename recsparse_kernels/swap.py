"""Replace layers inside an existing model, in place, all or nothing; and put dense layers back.

plan      walk the model once, judge every layer: convert, or leave alone with a reason
convert   build every replacement; the model is not touched, so a failure leaves it as it was
commit    put the replacements into their parents' tables, which cannot fail
"""

import functools
import weakref
from collections.abc import Iterable

import torch
from torch import nn

from .adapters import Origin, find_adapter, origin_of, parameter_roles, restore_original
from .nn._base import PackedModule
from .optimizer_remap import pack_state, unpack_state
from .swap_convert import bare_shell, convert_all, convert_one, stems_of
from .swap_plan import Plan, Site
from .swap_report import Replacement, Swapped, SwapReport, find_stale, layer_bytes
from .swap_rules import Rules, check_arguments, patterns_of


def swap_modules(
    model: nn.Module,
    rules: Rules,
    *,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    min_numel: int | None = None,
    dry_run: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
) -> SwapReport:
    """Replace layers of a model in place.

    Example::

        report = swap_modules(model, {
            "head": functools.partial(FixedFanInLinear.from_dense, fan_in=32),
            nn.Linear: Sparse24Linear,
            nn.EmbeddingBag: (MaskedEmbeddingBag, {"density": 0.2}),
        }, exclude="*.position*")
        remap_optimizer(optimizer, report)
        report.show()

    Args:
        model: its layers are replaced; the model object itself stays. A compiled or DataParallel
            model is looked into; names are those of the model inside.
        rules: ``{pattern or type: converter}``, the first that matches a layer counts. A pattern is
            matched with the layer's whole name (``fnmatch``: ``"tower.*"``); a type with isinstance,
            and with the torch layer an adapter names (`register_adapter`). A converter is a
            `PackedModule` class, ``(class, {options of from_dense})``, a ``functools.partial`` of
            the class, or any ``callable(module)`` that returns the replacement or None.
            Or one ``callable(module, name)`` that returns the replacement, or None to leave it.
        include, exclude: patterns of names; only layers that match ``include``, none that match ``exclude``.
        min_numel: layers with fewer weights are left alone, and with the default (4096 under a
            mapping of rules, 0 under a callable) 1-wide tables and outputs too.
        dry_run: convert one layer at a time, report, and change nothing.
        optimizer: looked through for stale references, as is any optimizer that the model holds.

    Returns:
        What was swapped, with bytes before and after; what was left alone, and why; and who still holds
        a replaced parameter or layer.

    Raises:
        TypeError: ``model`` or ``rules`` is not what is named above, or a converter returned no module.
        ValueError: the model is itself the layer to replace, or is wrapped in DDP or FSDP.
        Whatever a converter raises, with the layer's name as a note. The model is then as it was.
    """
    check_arguments(model, rules, min_numel)
    plan = Plan(model, rules, patterns_of("include", include), patterns_of("exclude", exclude), min_numel)
    plan.judge()
    report = SwapReport(
        "would swap" if dry_run else "swapped", left=plan.left, unmatched_rules=plan.unmatched()
    )
    report.model_bytes_before = layer_bytes(plan.root)
    if dry_run:
        _dry_run(plan, report)
        return report
    convert_all(plan)
    old = _commit(plan, report)
    report.model_bytes_after = layer_bytes(plan.root)
    roots = {"model": model} if optimizer is None else {"model": model, "optimizer": optimizer}
    report.stale = find_stale(roots, old)
    return report


def unswap_modules(model: nn.Module, report: SwapReport | None = None) -> SwapReport:
    """Put dense layers back in place of packed ones: `to_dense` of each, of the class it had before.

    Args:
        model: changed in place, all or nothing.
        report: only the layers that this swap put in; None: every packed layer.

    Raises:
        TypeError, ValueError: as in `swap_modules`.
    """
    if report is not None and not isinstance(report, SwapReport):
        raise TypeError(f"report must be what swap_modules returned; got {type(report).__name__}")
    chosen = None
    if report is not None:
        chosen = {id(part) for entry in report.replacements for part in entry.module.modules()}

    def convert(module: nn.Module, name: str) -> nn.Module | None:
        if not isinstance(module, PackedModule) or (chosen is not None and id(module) not in chosen):
            return None
        return restore_original(module.to_dense(), origin_of(module))

    check_arguments(model, convert, None)
    plan = Plan(model, convert, None, None, None)
    plan.restoring = True
    plan.judge()
    convert_all(plan)
    result = SwapReport("restored", left=plan.left, model_bytes_before=layer_bytes(plan.root))
    old = _commit(plan, result)
    result.model_bytes_after = layer_bytes(plan.root)
    result.stale = find_stale({"model": model}, old)
    return result


def _commit(plan: Plan, report: SwapReport) -> dict[int, str]:
    """Put the replacements in; returns the old parameters and layers that left the model, by id."""
    for site in plan.chosen:
        report.swapped.append(_entry(site))
        report.replacements.append(_replacement(site))
    for site in plan.chosen:
        for parent, key in site.slots:
            parent._modules[key] = site.new
    alive = {id(item) for item in (*plan.root.modules(), *plan.root.parameters())}
    old = {}
    for site in plan.chosen:
        candidates = {id(site.module): site.name}
        candidates.update((id(p), f"{site.name}.{role}") for role, p in parameter_roles(site.module).items())
        old.update({key: name for key, name in candidates.items() if key not in alive})
    return old


def _entry(site: Site) -> Swapped:
    return Swapped(
        site.name, tuple(site.names[1:]), type(site.module).__name__, type(site.new).__name__,
        layer_bytes(site.module), layer_bytes(site.new), site.note,
    )  # fmt: skip


def _replacement(site: Site) -> Replacement:
    old = {role: weakref.ref(parameter) for role, parameter in parameter_roles(site.module).items()}
    if isinstance(site.module, PackedModule):
        carry = functools.partial(unpack_state, site.module, origin_of(site.module))
    else:
        adapter = find_adapter(site.module)
        origin = Origin(adapter[0], bare_shell(site.module)) if adapter else None
        carry = functools.partial(pack_state, site.new, origin)
    return Replacement(site.name, site.new, old, stems_of(site), carry)


def _dry_run(plan: Plan, report: SwapReport) -> None:
    saved = 0
    for site in list(plan.chosen):
        reason = convert_one(site)
        if reason:
            plan.drop(site, reason)
            continue
        report.swapped.append(_entry(site))
        saved += report.swapped[-1].bytes_before - report.swapped[-1].bytes_after
        site.new = None
    report.model_bytes_after = report.model_bytes_before - saved
