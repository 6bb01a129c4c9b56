"""Hidden units of an MLP: find them, score them, cut them out of a model and its optimizers, put them back.

Unit i of a pair of linear layers is row i of the first weight (and bias, and of a BatchNorm between) and
column i of the second: both shrink, and so does every tensor of optimizer state that is laid out alike.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..nn._base import replace_data
from ._method import check_finite, check_own_weight, generator

# what may stand between the two layers: acts on each unit alone
ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus,
    nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Dropout, nn.Identity,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class HiddenUnits:
    """The outputs of one linear layer that feed nothing but another.

    Args:
        producer: name of the ``nn.Linear`` whose rows they are.
        consumer: name of the ``nn.Linear`` whose columns they are.
        norms: names of ``nn.BatchNorm1d`` layers between.
    """

    producer: str
    consumer: str
    norms: tuple[str, ...] = ()


def find_hidden_units(model: nn.Module) -> list[HiddenUnits]:
    """Pairs of linear layers that follow each other in an ``nn.Sequential`` (nested ones are one chain).

    Between them may stand activations, dropout and BatchNorm1d. Pairs that share a layer with another
    place of the model are left out.
    """
    uses = collections.Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    uses.update(id(m) for _, m in model.named_modules(remove_duplicate=False))
    inner = {id(c) for m in model.modules() if _is_chain(m) for c in m.children()}
    found = []
    for name, module in model.named_modules():
        if _is_chain(module) and id(module) not in inner:
            found += _pairs(list(_flat(module, name)), uses)
    return found


def _is_chain(module: nn.Module) -> bool:
    """A subclass may have a forward of its own, a residual one say."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _flat(chain: nn.Sequential, name: str) -> Iterator[tuple[str, nn.Module]]:
    for key, child in chain._modules.items():  # a layer that stands there twice, twice
        full = f"{name}.{key}" if name else key
        if _is_chain(child):
            yield from _flat(child, full)
        else:
            yield full, child


def _pairs(chain: list[tuple[str, nn.Module]], uses: Mapping[int, int]) -> Iterator[HiddenUnits]:
    producer, norms, width = None, [], 0
    for name, layer in chain:
        own = all(uses[id(held)] == 1 for held in (layer, *layer._parameters.values()) if held is not None)
        if type(layer) is nn.Linear and own and "weight" in layer._parameters:
            if producer is not None:
                yield HiddenUnits(producer, name, tuple(norms))
            producer, norms, width = name, [], layer.out_features
        elif type(layer) is nn.BatchNorm1d and own and producer is not None and layer.num_features == width:
            norms.append(name)
        elif type(layer) not in ELEMENTWISE:
            producer, norms = None, []


def check_units(model: nn.Module, units: list[HiddenUnits]) -> None:
    """TypeError or ValueError where a method cannot cut these out; names the layer."""
    if not units:
        raise ValueError("units must name at least one pair of linear layers; found none in the model")
    seen: set[str] = set()
    for unit in units:
        layers = {}
        for role, name in (("producer", unit.producer), ("consumer", unit.consumer)):
            try:
                layers[role] = model.get_submodule(name)
            except AttributeError:
                raise ValueError(f"{role} {name!r} is not in the model") from None
            if type(layers[role]) is not nn.Linear:
                got = type(layers[role]).__name__
                raise TypeError(
                    f"{role} {name!r} must be an nn.Linear, the layers that can be cut; got {got}"
                )
            check_own_weight(model, name, layers[role], once=True)
        if layers["producer"].bias is not None:
            check_own_weight(model, unit.producer, layers["producer"], once=True, key="bias")
        width = layers["producer"].out_features
        if layers["consumer"].in_features != width:
            raise ValueError(
                f"consumer {unit.consumer!r} must take the {width} outputs of {unit.producer!r}; "
                f"it takes {layers['consumer'].in_features}"
            )
        for name in unit.norms:
            norm = model.get_submodule(name)
            if type(norm) is not nn.BatchNorm1d or norm.num_features != width:
                raise TypeError(f"norm {name!r} must be an nn.BatchNorm1d over {width} units; got {norm}")
            if sum(m is norm for _, m in model.named_modules(remove_duplicate=False)) > 1:
                raise ValueError(f"norm {name!r} stands in several places of the model")
            for key in norm._parameters if norm.affine else ():
                check_own_weight(model, name, norm, once=True, key=key)
        if unit.producer in seen:
            raise ValueError(f"producer {unit.producer!r} is named twice")
        seen.add(unit.producer)


Score = Callable[[nn.Linear, nn.Linear], Tensor]


def row_norms(producer: nn.Linear, consumer: nn.Linear) -> Tensor:
    """L2 norm of each unit's incoming weights."""
    return producer.weight.detach().float().norm(dim=1)


def norm_products(producer: nn.Linear, consumer: nn.Linear) -> Tensor:
    """L2 norm of each unit's incoming times that of its outgoing weights."""
    return row_norms(producer, consumer) * consumer.weight.detach().float().norm(dim=0)


SCORES: dict[str, Score] = {"norm": row_norms, "product": norm_products}


def scored(model: nn.Module, unit: HiddenUnits, score: Score) -> Tensor:
    """``[units]``, checked."""
    producer, consumer = model.get_submodule(unit.producer), model.get_submodule(unit.consumer)
    scores = score(producer, consumer)
    if not isinstance(scores, Tensor) or tuple(scores.shape) != (producer.out_features,):
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"score of {unit.producer!r} must have shape ({producer.out_features},); got {got}")
    check_finite(f"score of {unit.producer!r}", scores)
    return scores.detach().float()


# -- the tensors that a unit lives in ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Place:
    """One tensor and the dimension along which units are laid out in it."""

    module: nn.Module
    name: str
    dim: int

    @property
    def tensor(self) -> Tensor:
        return getattr(self.module, self.name)

    @property
    def key(self) -> tuple[str, int]:
        return self.name, self.dim


def places(model: nn.Module, unit: HiddenUnits) -> dict[str, _Place]:
    """Name of each tensor that holds a slice for each unit -> where it is."""
    found = {f"{unit.producer}.weight": (unit.producer, "weight", 0)}
    for name in (unit.producer, *unit.norms):
        for key in ("weight", "bias", "running_mean", "running_var"):
            if getattr(model.get_submodule(name), key, None) is not None:
                found[f"{name}.{key}"] = (name, key, 0)
    found[f"{unit.consumer}.weight"] = (unit.consumer, "weight", 1)
    return {key: _Place(model.get_submodule(name), attr, dim) for key, (name, attr, dim) in found.items()}


def check_optimizers(model: nn.Module, units: list[HiddenUnits], optimizers: list) -> None:
    """TypeError or ValueError where state cannot be cut along with its parameter."""
    names = {id(p): name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizers must be torch.optim.Optimizer objects; got {type(optimizer).__name__}"
            )
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError("optimizers must keep state per parameter; LBFGS keeps one history for all")
        if units and isinstance(optimizer, torch.optim.Adafactor):  # else found out at the first cut
            raise TypeError("optimizers must keep state per weight; Adafactor keeps sums of rows and columns")
        for unit in units:
            for place in places(model, unit).values():
                for key, value in optimizer.state.get(place.tensor, {}).items():
                    if isinstance(value, Tensor) and value.dim() and value.shape != place.tensor.shape:
                        raise ValueError(
                            f"optimizer state {key!r} of {names[id(place.tensor)]} has shape "
                            f"{tuple(value.shape)}, not the parameter's {tuple(place.tensor.shape)}: units "
                            "cannot be cut out of it"
                        )


def cut(model: nn.Module, unit: HiddenUnits, keep: Tensor, optimizers: list) -> dict[str, Tensor]:
    """Keep only units ``keep`` (ascending); returns what each tensor held for the others."""
    width = model.get_submodule(unit.producer).out_features
    dropped = complement(keep, width)
    stash = {}
    for name, place in places(model, unit).items():
        stash[name] = place.tensor.detach().index_select(place.dim, dropped.to(place.tensor.device))

        def shrink(value: Tensor, key: str | None, optimizer, dim: int = place.dim) -> Tensor:
            return value.index_select(dim, keep.to(value.device))

        _replace(place, optimizers, shrink)
    _set_width(model, unit, len(keep))
    return stash


def grow(
    model: nn.Module, unit: HiddenUnits, keep: Tensor, width: int, fill: dict[str, Tensor], optimizers: list
) -> None:
    """The inverse of `cut`: back to ``width`` units, those not in ``keep`` from ``fill``, state as new."""
    dropped = complement(keep, width)
    for name, place in places(model, unit).items():

        def widen(value: Tensor, key: str | None, optimizer, name: str = name, place: _Place = place):
            dim = place.dim
            shape = list(value.shape)
            shape[dim] = width
            start = 0.0 if key is None else initial_state(optimizer, place.tensor, key)
            out = value.new_full(shape, start)
            out.index_copy_(dim, keep.to(value.device), value)
            if key is None:
                out.index_copy_(dim, dropped.to(value.device), fill[name].to(value))
            return out

        _replace(place, optimizers, widen)
    _set_width(model, unit, width)


def _replace(place: _Place, optimizers: list, change: Callable) -> None:
    """Put ``change(tensor, state key or None, optimizer)`` in place of a tensor and of its state."""
    tensor = place.tensor
    held = [
        (o, o.state[tensor]) for o in optimizers if isinstance(tensor, nn.Parameter) and tensor in o.state
    ]
    shape = tensor.shape
    with torch.no_grad():
        for optimizer, state in held:
            for key, value in state.items():
                if isinstance(value, Tensor) and value.dim() and value.shape == shape:
                    state[key] = change(value, key, optimizer)
        if isinstance(tensor, nn.Parameter):
            tensor.grad = None
            # the same Parameter: groups and schedulers go on
            replace_data(tensor, change(tensor.detach(), None, None))
        else:
            setattr(place.module, place.name, change(tensor, None, None))


def initial_state(optimizer: torch.optim.Optimizer, parameter: Tensor, key: str) -> float:
    """What a new element of the optimizer's state starts at."""
    groups = (g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    group = next(groups, optimizer.defaults)
    if isinstance(optimizer, torch.optim.Adagrad) and key == "sum":
        return group["initial_accumulator_value"]
    if isinstance(optimizer, torch.optim.Rprop) and key == "step_size":
        return float(group["lr"])
    return 0.0


def _set_width(model: nn.Module, unit: HiddenUnits, width: int) -> None:
    model.get_submodule(unit.producer).out_features = width
    model.get_submodule(unit.consumer).in_features = width
    for name in unit.norms:
        model.get_submodule(name).num_features = width


def complement(keep: Tensor, width: int) -> Tensor:
    rest = torch.ones(width, dtype=torch.bool)
    rest[keep.cpu()] = False
    return rest.nonzero().squeeze(1)


def new_units(
    model: nn.Module,
    unit: HiddenUnits,
    stash: dict[str, Tensor],
    fan_ins: dict[str, int],
    how: str,
    seed: tuple,
) -> dict[str, Tensor]:
    """What regrown units start with, laid out like ``stash``.

    "frozen": what they had when they were pruned. "zero_out": incoming weights as `nn.Linear` starts,
    outgoing zero, so that the model computes what it did. "random": both as `nn.Linear` starts.
    """
    if how == "frozen":
        return stash
    fill = {}
    for name, held in stash.items():
        owner, _, key = name.rpartition(".")
        if owner == unit.consumer and how == "zero_out":
            fill[name] = torch.zeros_like(held)
        elif owner in (unit.producer, unit.consumer):
            bound = 1 / math.sqrt(max(fan_ins[owner], 1))
            draw = torch.rand(held.shape, generator=generator(*seed, name), dtype=torch.float64)
            fill[name] = ((2 * draw - 1) * bound).to(held)
        else:  # BatchNorm: as it starts
            fill[name] = torch.full_like(held, float(key in ("weight", "running_var")))
    return fill
