"""Navigating Extremes, arXiv 2411.03171: fixed fan-in output layers whose inputs move while they train.

Every ``update_every`` steps, up to two thirds of the training, each layer drops its smallest connections and
regrows as many: at random inputs with weight 0 (SET, the paper), or, in layers small enough, where the
gradient of the dense weight is largest (RigL). Dropped are a fixed fraction, or all below a threshold that
falls along a cosine. `ClusterObjective` is the paper's auxiliary loss, `FanInHead` its intermediate layer.

As in the paper: criteria, schedules, and that moments of rewired connections stay (``reset_state=False``).
Ours: exact counts with seeded ties, no input twice in a row unless asked for (the paper draws freely),
groups of labels that share inputs, RigL in blocks of labels.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import ops
from ..nn import FanInHead, FixedFanInLinear
from ._method import (
    TrainingMethod,
    amount_text,
    as_optimizers,
    check_count,
    check_fraction,
    check_tensor_state,
    check_trained,
    checked_together,
    generator,
    is_distributed,
    unequal,
    unwrap,
)
from .topology_update_gradient import LossTap, check_pieces, rewire_by_gradient

REGROWS = ("random", "gradient")
SCOPES = ("layer", "row")
BLOCK = 1 << 19  # weights looked at together: a few MiB of temporaries


class TopologyUpdate(TrainingMethod):
    r"""Rewires fixed fan-in layers while they train.

    Args:
        layers: `FixedFanInLinear` layers or `FanInHead`s, one, several or by name; or a model, of which all
            are taken.
        update_every: steps between updates (the paper: 300 to 1500).
        end_step: the last step at which anything is rewired; the paper: ``int(0.66 * steps)``.
        drop_fraction: share of connections dropped, a number or ``step -> share`` (the paper: 0.15 to 0.25;
            RigL: ``cosine(0.3, end_step=...)``). Either this, or
        drop_threshold: drop what is smaller: a number or ``step -> threshold`` (the paper:
            ``cosine(0.01, 1e-4, end_step=end_step)``).
        regrow: "random" (SET) or "gradient" (RigL).
        scope: with ``drop_fraction``: the smallest of the "layer", or of each "row" of indices.
        init: of random regrowth: "zero" (the paper) or "random", as the layer starts.
        reset_state: set optimizer moments of rewired connections to 0. The paper leaves them.
        allow_duplicates: random regrowth may read an input that the row reads already (as the paper).
        optimizers: whose moments ``reset_state`` means; fused optimizers are found by themselves.
        max_dense_elements: RigL computes the gradient of the dense weight at each update: layers with a
            larger ``O x I`` are refused.
        seed: of all random choices.
        group: process group whose ranks must agree (RigL: whose gradients are added). Before wrapping a
            model in DistributedDataParallel call `share_inputs`.

    Call ``step()`` after ``optimizer.step()``. RigL sees the backward passes since the last call, before an
    update only, outside ``torch.compile``'s full graphs; where the loss is fused, it takes that batch's
    gradient at the weights after the step. An error leaves the model as it was and forgets the passes seen.

    Example:
        >>> head = FixedFanInLinear(768, 100_000, fan_in=32)
        >>> method = TopologyUpdate(head, update_every=1000, end_step=66_000, drop_fraction=0.15)
        >>> method.step()
    """

    def __init__(
        self,
        layers: nn.Module | Mapping[str, nn.Module] | Sequence[nn.Module],
        *,
        update_every: int,
        end_step: int,
        drop_fraction: float | Callable[[int], float] | None = None,
        drop_threshold: float | Callable[[int], float] | None = None,
        regrow: str = "random",
        scope: str = "layer",
        init: str = "zero",
        reset_state: bool = False,
        allow_duplicates: bool = False,
        optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] = (),
        max_dense_elements: int = 1 << 28,
        seed: int = 0,
        group: dist.ProcessGroup | None = None,
    ):
        self.layers = _named_layers(layers)
        check_count("update_every", update_every)
        check_count("end_step", end_step)
        if (drop_fraction is None) == (drop_threshold is None):
            raise ValueError("give either drop_fraction or drop_threshold")
        for name, amount in (("drop_fraction", drop_fraction), ("drop_threshold", drop_threshold)):
            if amount is not None and not isinstance(amount, (int, float)) and not callable(amount):
                raise TypeError(f"{name} must be a number or a schedule; got {amount!r}")
        if isinstance(drop_fraction, (int, float)):
            check_fraction("drop_fraction", drop_fraction, one=True)
        if isinstance(drop_threshold, (int, float)) and not drop_threshold >= 0:
            raise ValueError(f"drop_threshold must not be negative; got {drop_threshold}")
        for name, value, allowed in (
            ("regrow", regrow, REGROWS), ("scope", scope, SCOPES), ("init", init, ("zero", "random")),
        ):  # fmt: skip
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}; got {value!r}")
        if regrow == "gradient":
            if init != "zero" or allow_duplicates:
                raise ValueError("regrow='gradient' needs init='zero' and allow_duplicates=False")
            for name, layer in self.layers.items():
                if layer.out_features * layer.in_features > max_dense_elements:
                    raise ValueError(
                        f"{name} is too large for regrow='gradient': {layer.out_features} x "
                        f"{layer.in_features} is above max_dense_elements {max_dense_elements}; use 'random'"
                    )
        self.update_every, self.end_step = update_every, end_step
        self.drop_fraction, self.drop_threshold = drop_fraction, drop_threshold
        self.regrow, self.scope, self.init = regrow, scope, init
        self.reset_state, self.allow_duplicates = reset_state, allow_duplicates
        self.seed, self.group = seed, group
        self.optimizers = as_optimizers(optimizers)
        self._arm()

    # ---- the schedule ----

    def is_update(self, step: int) -> bool:
        return step % self.update_every == 0 and step <= self.end_step

    @torch.no_grad()
    def step(self) -> dict[str, int] | None:
        """After each optimizer step. Gives how many connections were rewired, or None where none were due.

        Raises:
            ValueError: a weight or gradient is NaN or infinite; the schedule has ended.
            RuntimeError: regrowth by gradient is due but no backward pass was seen; ranks disagree.
        """
        step = self.steps + 1
        rewired = None
        if self.is_update(step):
            fraction, threshold = self._amounts(step)
            try:
                self._check(step)
            except Exception:
                self._arm()
                raise
            rewired = {
                name: self._rewire(name, layer, fraction, threshold, step)
                for name, layer in self.layers.items()
            }
        self.steps = step
        self._arm()
        return rewired

    def _amounts(self, step: int) -> tuple[float | None, float | None]:
        fraction, threshold = (
            amount(step) if callable(amount) else amount
            for amount in (self.drop_fraction, self.drop_threshold)
        )
        if fraction is not None and not 0 <= fraction <= 1:
            raise ValueError(f"drop_fraction must be in [0, 1]; the schedule gives {fraction} at step {step}")
        if threshold is not None and not threshold >= 0:
            raise ValueError(
                f"drop_threshold must not be negative; the schedule gives {threshold} at step {step}"
            )
        return fraction, threshold

    def _rewire(self, name: str, layer: FixedFanInLinear, fraction, threshold, step: int) -> int:
        seed = generator(self.seed, name, step).initial_seed()
        state = self._moments(layer) if self.reset_state else []
        if self.regrow == "gradient":
            return rewire_by_gradient(
                layer, layer.tap.pieces, threshold=threshold, fraction=fraction, scope=self.scope,
                state=state, seed=seed, group=self.group,
            )  # fmt: skip
        return int(
            ops.fan_in_rewire(
                layer.packed_weight, layer.indices, layer.in_features, threshold=threshold, fraction=fraction,
                scope=self.scope, state=state, init_scale=0.0 if self.init == "zero" else layer.fan_in**-0.5,
                allow_duplicates=self.allow_duplicates, group_size=layer.group_size, seed=seed,
            )
        )  # fmt: skip

    def _moments(self, layer: FixedFanInLinear) -> list[Tensor]:
        weight = layer.packed_weight
        held = list(layer.update.weight_state()) if layer.update is not None else []
        for optimizer in self.optimizers:
            held += optimizer.state.get(weight, {}).values()
        return [t for t in held if isinstance(t, Tensor) and t.shape == weight.shape]

    def _arm(self) -> None:
        wanted = self.regrow == "gradient" and self.is_update(self.steps + 1)
        for layer in self.layers.values():
            layer.tap = LossTap() if wanted else None

    def detach(self) -> None:
        """Stop looking at the layers."""
        for layer in self.layers.values():
            layer.tap = None

    # ---- checks ----

    def _check(self, step: int) -> None:
        """All that can go wrong, on any rank, before anything is changed."""
        with checked_together(self._device, self.group):
            self._check_own(step)
        self._check_ranks()

    @property
    def _device(self) -> torch.device:
        return next(iter(self.layers.values())).indices.device

    def _check_own(self, step: int) -> None:
        gradient = self.regrow == "gradient"
        if gradient and not any(layer.tap.pieces for layer in self.layers.values()):
            raise RuntimeError(
                f"step {step} regrows by gradient, but no backward pass through any of {list(self.layers)} was "
                "seen since the step before"
            )
        for name, layer in self.layers.items():
            weight = layer.packed_weight.detach().view(-1)
            for part in weight.split(BLOCK):
                if not bool(part.isfinite().all()):
                    count = int((~part.isfinite()).sum())
                    raise ValueError(f"{name}: weights must be finite; got {count} that are not")
            for tensor in (layer.packed_weight, layer.indices, *self._moments(layer)):
                if not tensor.is_contiguous():
                    raise ValueError(
                        f"{name}: weight, indices and moments are changed in place, so contiguous"
                    )
            if gradient:
                check_pieces(name, layer.tap.pieces)

    def _check_ranks(self) -> None:
        if not is_distributed(self.group):
            return
        totals = {}
        for name, layer in self.layers.items():
            total = 0
            for tensor in (layer.packed_weight.detach(), layer.indices):
                integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
                for begin, part in enumerate(tensor.view(-1).view(integer).split(BLOCK)):
                    place = torch.arange(len(part), device=part.device) + begin * BLOCK
                    total += int(((part.long() ^ (place << 20)) * -7046029254386353131).sum())  # wraps
            totals[name] = total
        if wrong := unequal(totals, self._device, self.group):
            raise RuntimeError(
                f"ranks no longer hold equal weights and inputs in {wrong} (a fused optimizer steps on its own "
                "rank's gradients); nothing was changed"
            )

    # ---- state ----

    def _plan(self) -> dict[str, Any]:
        return {
            "layers": {
                name: (layer.in_features, layer.out_features, layer.fan_in, layer.group_size)
                for name, layer in self.layers.items()
            },
            "update_every": self.update_every, "end_step": self.end_step,
            "drop_fraction": amount_text(self.drop_fraction), "drop_threshold": amount_text(self.drop_threshold),
            "regrow": self.regrow, "scope": self.scope, "init": self.init, "reset_state": self.reset_state,
            "allow_duplicates": self.allow_duplicates, "seed": self.seed,
        }  # fmt: skip

    def _state(self) -> dict[str, Any]:
        fused = {n: layer.update.state_dict() for n, layer in self.layers.items() if layer.update is not None}
        return {"inputs": {name: _digest(layer) for name, layer in self.layers.items()}, "fused": fused}

    def _check_state(self, state: dict[str, Any]) -> None:
        for name, layer in self.layers.items():
            if state["inputs"].get(name) != _digest(layer):
                raise ValueError(
                    f"state_dict was saved with other inputs of {name}: load the model's own state first"
                )
        own = {name for name, layer in self.layers.items() if layer.update is not None}
        if set(state["fused"]) != own:
            raise ValueError(
                f"state_dict has fused optimizers of {sorted(state['fused'])}; here {sorted(own)}"
            )
        for name in own:
            layer, held = self.layers[name], state["fused"][name]
            check_count(f"step of fused[{name!r}]", held["step"], 0)
            wanted = layer.update.empty_state(layer.packed_weight, layer.bias)
            if held["state"] and len(held["state"]) != len(wanted):
                raise ValueError(f"fused[{name!r}] must have {len(wanted)} moments; got {len(held['state'])}")
            for i, (given, like) in enumerate(zip(held["state"], wanted, strict=False)):
                check_tensor_state(f"fused[{name!r}], moment {i},", given, like)

    def _take_state(self, state: dict[str, Any]) -> None:
        for name, held in state["fused"].items():
            self.layers[name].update.load_state_dict(held)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._arm()


def share_inputs(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Make fixed fan-in layers ready for DistributedDataParallel: call it on the model before wrapping.

    Neither gloo nor NCCL knows int16, in which ``indices`` are, so DistributedDataParallel cannot copy them
    from rank 0. This does, and tells it to pass over them: `TopologyUpdate` keeps them equal from then on.
    """
    names = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    for name, layer in model.named_modules():
        if isinstance(layer, FixedFanInLinear):
            names.add(f"{name}.indices" if name else "indices")
            if is_distributed(group):
                first = dist.get_global_rank(group, 0) if group is not None else 0
                dist.broadcast(layer.indices.view(torch.uint8), first, group=group)
    model._ddp_params_and_buffers_to_ignore = names


def _digest(layer: FixedFanInLinear) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in layer.indices.view(-1).split(BLOCK):
        digest.update(part.cpu().numpy().tobytes())
    return digest.hexdigest()


def _named_layers(layers) -> dict[str, FixedFanInLinear]:
    if isinstance(layers, nn.Module) and not isinstance(layers, (FixedFanInLinear, FanInHead)):
        found = {n: m for n, m in unwrap(layers).named_modules() if isinstance(m, FixedFanInLinear)}
        if not found:
            raise ValueError(f"{type(layers).__name__} has no FixedFanInLinear")
        layers = found
    if isinstance(layers, nn.Module):
        layers = [layers]
    named = dict(layers) if isinstance(layers, Mapping) else {f"layers[{i}]": m for i, m in enumerate(layers)}
    if not named:
        raise ValueError("layers must hold at least one FixedFanInLinear")
    for name, layer in named.items():
        if isinstance(layer, FanInHead):
            named[name] = layer = layer.sparse
        if not isinstance(layer, FixedFanInLinear):
            raise TypeError(
                f"{name} must be a FixedFanInLinear or FanInHead (from_dense makes one); "
                f"got {type(layer).__name__}"
            )
    if len({id(layer) for layer in named.values()}) != len(named):
        raise ValueError("layers must be different; one is there twice")
    check_trained({name: layer.packed_weight for name, layer in named.items()})
    return named
