"""What the training methods share: checked state, seeded draws, agreement between ranks."""

import contextlib
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..swap_plan import unwrap as unwrap_compiled
from . import schedules

VERSION = 1  # of what state_dict holds


class TrainingMethod:
    """Base of the methods: a step counter and a state that resumes exactly.

    A subclass gives ``_plan`` (what must be equal for a state to be of this method: sizes, budget,
    schedule, seed) and ``_state`` / ``_check_state`` / ``_take_state``. Loading checks all of the state
    before any of it is taken.
    """

    steps: int = 0  # how often step() was called

    def _plan(self) -> dict[str, Any]:
        raise NotImplementedError

    def _state(self) -> dict[str, Any]:
        """Tensors and plain values; tensors are copied by `state_dict`."""
        raise NotImplementedError

    def _check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError where ``state`` (the keys are there) does not fit; change nothing."""

    def _take_state(self, state: dict[str, Any]) -> None:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on besides the model's and the optimizers' own state."""
        head = {"method": type(self).__name__, "version": VERSION, "steps": self.steps, "plan": self._plan()}
        return {**head, **_copied(self._state())}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            TypeError: not a mapping.
            ValueError: the state is of another method, plan or topology, or a part is missing or has
                another shape; nothing has changed.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a mapping; got {type(state_dict).__name__}")
        name = type(self).__name__
        wanted = {"method", "version", "steps", "plan", *self._state()}
        missing, unexpected = sorted(wanted - set(state_dict)), sorted(set(state_dict) - wanted)
        if missing or unexpected:
            raise ValueError(
                f"state_dict is not one of {name}: missing {missing or 'nothing'}, "
                f"unexpected {unexpected or 'nothing'}"
            )
        if (state_dict["method"], state_dict["version"]) != (name, VERSION):
            got = f"{state_dict['method']} version {state_dict['version']}"
            raise ValueError(f"state_dict must be of {name} version {VERSION}; got {got}")
        check_count("steps", state_dict["steps"], 0)
        own, given = self._plan(), state_dict["plan"]
        _check_nesting("plan", own, given, deep=False)
        for key in sorted({*own, *given}):
            if own.get(key) != given.get(key):
                raise ValueError(
                    f"state_dict was saved with another {key}: {given.get(key)!r}; this {name} has "
                    f"{own.get(key)!r}"
                )
        state = {key: state_dict[key] for key in self._state()}
        _check_nesting("state_dict", self._state(), state)
        try:
            self._check_state(state)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise ValueError(f"state_dict of {name} is damaged: {type(error).__name__}: {error}") from error
        self._take_state(_copied(state))
        self.steps = state_dict["steps"]


class Tap:
    """Base of what is attached to a layer as ``layer.tap``: `__call__` is never traced by torch.compile.

    A copy of the layer is not watched.
    """

    def __new__(cls, *args):
        if "__call__" in cls.__dict__ and cls not in _UNTRACED:
            _UNTRACED.add(cls)  # not when the class is made: this imports torch._dynamo, which takes a second
            cls.__call__ = torch.compiler.disable(cls.__call__)
        return super().__new__(cls)

    def __deepcopy__(self, memo):
        return None

    def __reduce__(self):
        return type(None), ()


_UNTRACED: set[type[Tap]] = set()


def _copied(value):
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item) for item in value)
    return value


def _check_nesting(name: str, own: Any, given: Any, deep: bool = True) -> None:
    """ValueError unless there is a mapping wherever there is one in ``own``."""
    if not isinstance(own, dict):
        return
    if not isinstance(given, Mapping):
        raise ValueError(f"{name} must be a mapping; got {type(given).__name__}")
    for key in own.keys() & given.keys() if deep else ():
        _check_nesting(str(key), own[key], given[key])


def check_tensor_state(name: str, given: Any, like: Tensor) -> None:
    """ValueError unless ``given`` is a tensor of ``like``'s shape and dtype."""
    if not isinstance(given, Tensor):
        raise ValueError(f"{name} must be a tensor; got {type(given).__name__}")
    if given.shape != like.shape or given.dtype != like.dtype:
        raise ValueError(
            f"{name} must be {like.dtype} of shape {tuple(like.shape)}; got {given.dtype} of shape "
            f"{tuple(given.shape)}: a checkpoint of another topology"
        )


def check_finite(name: str, tensor: Tensor) -> None:
    """ValueError if there is a NaN: a topology decided by one would be arbitrary."""
    if bool(torch.isnan(tensor).any()):
        raise ValueError(f"{name} holds NaN ({int(torch.isnan(tensor).sum())} of {tensor.numel()})")


def check_fraction(name: str, value: float, *, zero: bool = False, one: bool = False) -> None:
    """ValueError unless ``value`` lies between 0 and 1; the ends only where said."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (0 <= value <= 1) or (value == 0 and not zero) or (value == 1 and not one):
        interval = f"{'[' if zero else '('}0, 1{']' if one else ')'}"
        raise ValueError(f"{name} must be in {interval}; got {value!r}")


def check_count(name: str, value: int, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an int of at least {least}; got {value!r}")


def as_optimizers(given: Any) -> list[torch.optim.Optimizer]:
    """One or several optimizers as a list; TypeError for anything else."""
    optimizers = [given] if isinstance(given, torch.optim.Optimizer) else list(given)
    for optimizer in optimizers:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizers must be of torch.optim; got {type(optimizer).__name__}")
    return optimizers


def amount_text(amount: Any) -> str:
    """What a state says of a number or schedule, to tell it from others; of a function of the user's nothing."""
    known = (
        amount is None or isinstance(amount, (int, float)) or type(amount).__module__ == schedules.__name__
    )
    return str(amount) if known else ""


def check_trained(parameters: Mapping[str, nn.Parameter]) -> None:
    """ValueError if one of the weights does not train, or two layers share theirs."""
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            raise ValueError(f"{name} does not train (requires_grad is False): leave it out of layers")
    if len({id(parameter) for parameter in parameters.values()}) != len(parameters):
        raise ValueError(f"two of {', '.join(parameters)} share their weight: use one layer in both places")


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of DistributedDataParallel, DataParallel and torch.compile.

    Names are those of that model, as in `swap_modules`.
    """
    inner = unwrap_compiled(model)
    if isinstance(inner, nn.parallel.DistributedDataParallel):
        inner = inner.module
    return inner if inner is model else unwrap(inner)


def described(function: Any) -> str:
    """``repr`` without addresses, which another process would not find again."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(function))


def check_own_weight(
    model: nn.Module, name: str, layer: nn.Module, *, once: bool = False, key: str = "weight"
) -> None:
    """ValueError unless the layer's weight is a Parameter of its own, of no other layer too.

    ``once``: nor may the layer itself stand in two places of the model. ``key``: of which Parameter.
    """
    if layer._parameters.get(key) is None:
        raise ValueError(
            f"layer {name!r} computes its {key} (parametrized, normalised or pruned): undo that first"
        )
    held = layer._parameters[key]
    names = [n for n, p in model.named_parameters(remove_duplicate=False) if p is held]
    owners = {id(model.get_submodule(n.rpartition(".")[0])) for n in names}
    if len(names if once else owners) > 1:
        raise ValueError(f"layer {name!r} shares its {key}: {', '.join(names)}")


def generator(seed: int, *place: int | str) -> torch.Generator:
    """A CPU generator that depends on the seed and on where it is used (step, layer), on nothing else.

    So a resumed run draws what the uninterrupted one would have, and all ranks draw the same.
    """
    digest = hashlib.blake2b(repr((seed, *place)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def is_distributed(group: "dist.ProcessGroup | None" = None) -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def all_reduce_sum(tensors: Iterable[Tensor], group: "dist.ProcessGroup | None" = None) -> None:
    """Sum over the ranks, in place; nothing without a process group."""
    if is_distributed(group):
        for tensor in tensors:
            dist.all_reduce(tensor, group=group)


@contextlib.contextmanager
def checked_together(device: torch.device, group: "dist.ProcessGroup | None" = None) -> Iterator[None]:
    """What fails inside on one rank fails on all, so that none waits for the decision of another."""
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    if is_distributed(group):
        failed = torch.tensor(int(error is not None), device=device)
        dist.all_reduce(failed, group=group)
        if error is None and int(failed):
            raise ValueError(
                f"{int(failed)} other rank(s) could not decide, see their error; nothing changed"
            )
    if error is not None:
        raise error


def unequal(totals: Mapping[str, int], device: torch.device, group: "dist.ProcessGroup | None") -> list[str]:
    """Names whose totals, modulo 2^64, differ between the ranks; none without a process group."""
    if not is_distributed(group):
        return []
    low = torch.tensor([(total + 2**63) % 2**64 - 2**63 for total in totals.values()], device=device)
    high = low.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN, group=group)
    dist.all_reduce(high, op=dist.ReduceOp.MAX, group=group)
    return [name for name, same in zip(totals, (low == high).tolist(), strict=True) if not same]


def agree(tensors: Iterable[Tensor], group: "dist.ProcessGroup | None" = None) -> None:
    """All ranks take the decision of the first one, in place; nothing without a process group.

    Ranks compute equal decisions from equal weights; this holds even where a reduction on one rank
    rounds differently.
    """
    if is_distributed(group):
        first = dist.get_global_rank(group, 0) if group is not None else 0
        for tensor in tensors:
            dist.broadcast(tensor, first, group=group)
