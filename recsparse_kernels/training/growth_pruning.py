"""Alternate Model Growth and Pruning for Efficient Training of Recommendation Systems, arXiv 2105.01064.

Training steps fall into phases, dense and sparse in turn, and end at full size: what is saved is training
work, not model size. At a phase's start units are scored and the weakest cut out of the model, so that
the products really shrink; at the next they grow back.

The abstract fixes the scheme: structured sparsity, growth and pruning in turn, full size at the end. Which
units, how they are scored, how long phases are, what regrown units start with, and the 2:4 mode are ours.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from . import growth_pruning_units as hidden
from . import schedules
from ._method import (
    TrainingMethod,
    agree,
    as_optimizers,
    check_fraction,
    check_tensor_state,
    checked_together,
    described,
    unwrap,
)
from .growth_pruning_sparse24 import Sparse24Phases, find_linears
from .growth_pruning_units import HiddenUnits, find_hidden_units
from .selection import select_largest

GROW = ("zero_out", "frozen", "random")
MODES = ("neuron", "2:4")


@dataclasses.dataclass(frozen=True)
class PhaseChange:
    """What a step did to the model. Where parameters have new shapes, DistributedDataParallel must be
    built anew, and a compiled model compiles again."""

    step: int
    sparsity: float
    kept: dict[str, tuple[int, int]]  # layer -> kept, of (units; in 2:4 mode weights)
    macs: int  # multiply-adds of all linear layers for one sample, from now on


def alternating(
    end_step: int, sparsity: float, *, warmup: float = 0.1, final: float = 0.3, cycles: int = 1,
    dense_share: float = 0.2,
) -> tuple[tuple[int, float], ...]:  # fmt: skip
    """Phases: dense warm-up, ``cycles`` sparse phases with dense ones between, a dense end.

    Args:
        end_step: steps altogether.
        sparsity: of the sparse phases.
        warmup, final: shares of the steps at the start and at the end that are dense.
        cycles: how many sparse phases.
        dense_share: of what lies between warm-up and end, how much the dense phases between take.
    """
    check_fraction("warmup", warmup, zero=True)
    check_fraction("final", final)
    check_fraction("dense_share", dense_share, zero=True)
    if cycles < 1 or warmup + final >= 1:
        raise ValueError(f"wanted cycles >= 1 and warmup + final < 1; got {cycles}, {warmup} + {final}")
    middle = 1 - warmup - final
    gap = middle * dense_share / (cycles - 1) if cycles > 1 else 0.0
    length = (middle - gap * (cycles - 1)) / cycles
    phases, at = [(warmup, 0.0)] if warmup else [], warmup
    for cycle in range(cycles):
        phases.append((at + length, sparsity))
        if cycle + 1 < cycles and gap:
            phases.append((at + length + gap, 0.0))
        at += length + gap
    found, begin = [], 0
    for end, value in phases:
        if round(end * end_step) > begin:  # of a short plan a phase may have no step
            begin = round(end * end_step)
            found.append((begin, value))
    return (*found, (end_step, 0.0))


class AlternateGrowthPruning(TrainingMethod):
    r"""Train some phases with a part of the model, and end at full size.

    Example::

        method = AlternateGrowthPruning(model, alternating(10_000, 0.5), optimizers=[optimizer])
        for batch in loader:
            loss(model(batch)).backward(); optimizer.step(); optimizer.zero_grad()
            method.step()

    Args:
        model: changed in place; Parameters stay the same objects in mode "neuron".
        phases: ``(end_step, sparsity)``, ends rising; the last sparsity must be 0. See `alternating`.
        units: which hidden units, in the order in which they are cut; None: all that
            `find_hidden_units` finds. Outputs of the last layer of a chain are never cut. In mode "2:4":
            names of ``nn.Linear`` layers; None: all whose sides are at least 64.
        optimizers: whose state is cut and grown along. Of regrown units it starts anew.
        score: "norm" (L2 of the incoming weights), "product" (times that of the outgoing), or
            ``score(producer, consumer) -> [units]``.
        grow: what regrown units start with. "zero_out": incoming weights fresh, outgoing zero: the model
            computes the same as before growth. "frozen": what they had when pruned, kept meanwhile.
            "random": both fresh. In 2:4 mode: zero, as pruned, fresh.
        mode: "neuron", or "2:4" (ours): during sparse phases linear layers are `nn.Sparse24Linear` with
            transposable masks. Sparsity must then be 0 or 0.5.
        seed: of fresh weights and of ties between scores.
        process_group: whose ranks agree on the units kept; None: the default group.

    To resume: build model, optimizer and method as at the start, load the method's state first (it brings
    the model to its shape), then the model's and the optimizer's.

    Raises:
        ValueError, TypeError: phases, units, layers or optimizers that do not fit; the model is unchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        phases: Sequence[tuple[int, float]],
        *,
        units: Sequence[HiddenUnits] | Sequence[str] | None = None,
        optimizers: Sequence[torch.optim.Optimizer] = (),
        score: str | hidden.Score = "product",
        grow: str = "zero_out",
        mode: str = "neuron",
        seed: int = 0,
        process_group=None,
    ):
        self.plan = schedules.piecewise(*phases)
        for end_step, sparsity in self.plan.pieces:
            check_fraction(f"sparsity of the phase up to step {end_step}", sparsity, zero=True)
        if self.plan.pieces[-1][1] != 0:
            raise ValueError(
                f"the last phase must have sparsity 0, the full model; got {self.plan.pieces[-1][1]}"
            )
        if grow not in GROW:
            raise ValueError(f"grow must be one of {GROW}; got {grow!r}")
        if mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}; got {mode!r}")
        if isinstance(score, str) and score not in hidden.SCORES:
            raise ValueError(f"score must be one of {tuple(hidden.SCORES)} or callable; got {score!r}")
        self._model, self._optimizers, self._group = unwrap(model), as_optimizers(optimizers), process_group
        self.grow, self.mode, self.seed = grow, mode, seed
        self.score = hidden.SCORES[score] if isinstance(score, str) else score
        self._score_name = score if isinstance(score, str) else described(score)
        self.sparsity = 0.0
        self._kept: dict[str, Tensor] = {}  # producer -> units kept, while not all are
        self._stash: dict[str, dict[str, Tensor]] = {}  # producer -> what the others had
        self._packed = None
        self.units: list[HiddenUnits] = []
        if mode == "2:4":
            wrong = [s for _, s in self.plan.pieces if s not in (0.0, 0.5)]
            if wrong:
                raise ValueError(f"sparsity must be 0 or 0.5 in mode '2:4'; got {wrong}")
            names = list(units) if units is not None else find_linears(self._model)
            self._packed = Sparse24Phases(self._model, names, self._optimizers, grow, seed)
            widths = {name: self._model.get_submodule(name).weight.numel() for name in names}
        else:
            self.units = list(units) if units is not None else find_hidden_units(self._model)
            hidden.check_units(self._model, self.units)
            widths = {u.producer: self._model.get_submodule(u.producer).out_features for u in self.units}
        hidden.check_optimizers(self._model, self.units, self._optimizers)
        self._widths = widths  # at full size
        self._fan_ins = {
            name: self._model.get_submodule(name).in_features
            for u in self.units
            for name in (u.producer, u.consumer)
        }
        self._full_macs = self.macs()
        if self.plan(0):
            self._change(self.plan(0))

    @property
    def model(self) -> nn.Module:
        """The model that is changed; what DistributedDataParallel is to be built around."""
        return self._model

    def step(self) -> PhaseChange | None:
        """Call after each optimizer step. Returns what changed, where a phase begins.

        Raises:
            ValueError: called more often than the plan has steps; a score is NaN. Nothing has changed.
        """
        if self.steps >= self.plan.end_step:
            raise ValueError(f"step {self.steps + 1} is past the end of the plan, {self.plan.end_step}")
        after = self.steps + 1
        wanted = self.plan(after) if after < self.plan.end_step else 0.0
        change = None
        new_phase = after < self.plan.end_step and self.plan.index(after) != self.plan.index(after - 1)
        if new_phase and (wanted or self.sparsity):
            change = self._change(wanted, after)
        self.steps = after
        return change

    def macs(self) -> int:
        """Multiply-adds of all linear layers in a forward pass of one sample, as the model now is."""
        total = 0
        for module in self._model.modules():
            if isinstance(module, nn.Linear):
                total += module.weight.numel()
            elif self._packed is not None and self._packed.is_packed(module):
                total += module.values.numel()
        return total

    def planned_macs(self) -> tuple[int, int]:
        """Multiply-adds in linear layers for one sample at every step of the plan, forward and both
        gradients: of the plan, and of training dense all along."""
        spent, begin = 0, 0
        for end_step, sparsity in self.plan.pieces:
            spent += 3 * (end_step - begin) * self._macs_at(sparsity)
            begin = end_step
        return spent, 3 * begin * self._full_macs

    def _macs_at(self, sparsity: float) -> int:
        if self._packed is not None:
            return self._full_macs - (sum(self._widths.values()) - self._packed.numel if sparsity else 0)
        kept = {name: self._count(width, sparsity) for name, width in self._widths.items()}
        saved = 0
        rows = {u.producer: kept[u.producer] for u in self.units}
        columns = {u.consumer: kept[u.producer] for u in self.units}
        for name in {*rows, *columns}:
            full_in = self._fan_ins[name]
            full_out = self._widths.get(name, self._model.get_submodule(name).out_features)
            saved += full_in * full_out - columns.get(name, full_in) * rows.get(name, full_out)
        return self._full_macs - saved

    @staticmethod
    def _count(width: int, sparsity: float) -> int:
        return max(1, round((1 - sparsity) * width))

    # -- topology ----------------------------------------------------------------------------------------

    def _change(self, sparsity: float, step: int = 0) -> PhaseChange:
        """Grow to full size, then prune. Whatever can fail is checked before anything changes."""
        hidden.check_optimizers(self._model, self.units, self._optimizers)
        with checked_together(next(self._model.parameters()).device, self._group):
            if self._packed is not None:
                self._packed.check_weights()
            for unit in self.units:  # NaN shows now, before growth: regrown units are finite
                hidden.scored(self._model, unit, self.score)
        if self._packed is not None:
            self._packed.change(bool(sparsity), step)
            kept = {n: (w // 2 if sparsity else w, w) for n, w in self._widths.items()}
        else:
            before = dict(self._kept)
            self._grow_all(step)
            if sparsity:
                try:
                    keeps = self._choose(sparsity, step)
                except Exception:  # growth undone: what was kept has not changed
                    self._cut_all(before)
                    raise
                self._cut_all(keeps)
            kept = {n: (self._count(w, sparsity), w) for n, w in self._widths.items()}
        self.sparsity = sparsity
        return PhaseChange(step, sparsity, kept, self.macs())

    def _grow_all(self, step: int) -> None:
        for unit in reversed(self.units):  # the last cut grows first: its slices fit the shapes of then
            if unit.producer not in self._kept:
                continue
            keep = self._kept.pop(unit.producer)
            stash = self._stash.pop(unit.producer)
            seed = (self.seed, step)
            fill = hidden.new_units(self._model, unit, stash, self._fan_ins, self.grow, seed)
            width = self._widths[unit.producer]
            hidden.grow(self._model, unit, keep, width, fill, self._optimizers)

    def _choose(self, sparsity: float, step: int) -> dict[str, Tensor]:
        """The units of each producer that stay, ascending; the same on all ranks."""
        keeps = {}
        with checked_together(next(self._model.parameters()).device, self._group):
            for unit in self.units:
                score = hidden.scored(self._model, unit, self.score)
                count = self._count(self._widths[unit.producer], sparsity)
                label = [f"score of {unit.producer!r}"]
                chosen = select_largest(score, count, seed=self.seed + step, names=label)
                keeps[unit.producer] = chosen.mask(0).nonzero().squeeze(1)
        agree(keeps.values(), self._group)
        return {name: keep.cpu() for name, keep in keeps.items()}

    def _cut_all(self, keeps: dict[str, Tensor]) -> None:
        for unit in self.units if keeps else ():
            stash = hidden.cut(self._model, unit, keeps[unit.producer], self._optimizers)
            if self.grow != "frozen":  # only shapes are needed to make fresh ones
                stash = {name: held[:0].new_empty(1).expand(held.shape) for name, held in stash.items()}
            self._kept[unit.producer], self._stash[unit.producer] = keeps[unit.producer], stash

    # -- state -------------------------------------------------------------------------------------------

    def _plan(self):
        return {
            "phases": self.plan.pieces, "mode": self.mode, "grow": self.grow, "score": self._score_name,
            "seed": self.seed, "widths": self._widths,
            "units": [dataclasses.astuple(u) for u in self.units],
        }  # fmt: skip

    def _state(self):
        packed = {} if self._packed is None else self._packed.state()
        frozen = self._stash if self.grow == "frozen" else {}
        return {"sparsity": self.sparsity, "kept": self._kept, "stash": frozen, "packed": packed}

    def _check_state(self, state) -> None:
        names = set(self._widths) if self._packed is None else set()
        kept, stash = state["kept"], state["stash"]
        planned = {0.0, *(s for _, s in self.plan.pieces)}
        if state["sparsity"] not in planned:
            raise ValueError(
                f"sparsity must be one of the plan, {sorted(planned)}; got {state['sparsity']!r}"
            )
        if set(kept) not in (set(), names):
            raise ValueError(f"kept must be empty or have {sorted(names)}; got {sorted(kept)}")
        if bool(kept) != bool(state["sparsity"] and names):
            raise ValueError(f"kept and sparsity {state['sparsity']} contradict each other")
        for name, keep in kept.items():
            width, count = self._widths[name], self._count(self._widths[name], state["sparsity"])
            check_tensor_state(f"kept of {name!r}", keep, torch.empty(count, dtype=torch.int64))
            if not bool((keep.diff() > 0).all()) or int(keep[0]) < 0 or int(keep[-1]) >= width:
                raise ValueError(
                    f"kept of {name!r} must be {count} ascending units below {width}; got {keep}"
                )
        if self.grow == "frozen":
            if set(stash) != set(kept):
                raise ValueError(f"stash must have {sorted(kept)}; got {sorted(stash)}")
            for name, wanted in self._stash_like(kept).items():
                if not isinstance(stash[name], Mapping) or set(stash[name]) != set(wanted):
                    raise ValueError(f"stash of {name!r} must have {sorted(wanted)}")
                for key, like in wanted.items():
                    check_tensor_state(f"stash of {name!r}, {key}", stash[name][key], like)
        if self._packed is not None:
            self._packed.check_state(state["packed"], bool(state["sparsity"]))

    def _take_state(self, state) -> None:
        if self._packed is not None:
            self._packed.take_state(state["packed"], bool(state["sparsity"]))
        self._grow_all(step=0)
        self._cut_all(state["kept"])
        if self.grow == "frozen":
            self._stash = state["stash"]
        self.sparsity = state["sparsity"]

    def _stash_like(self, kept: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Shapes and dtypes of what units cut in this order leave behind; no data."""
        shapes: dict[str, list[int]] = {}
        for unit in self.units:
            for name, place in hidden.places(self._model, unit).items():
                shapes.setdefault(name, list(place.tensor.shape))[place.dim] = self._widths[unit.producer]
        found = {}
        for unit in self.units if kept else ():
            found[unit.producer] = {}
            for name, place in hidden.places(self._model, unit).items():
                count = len(kept[unit.producer])
                shapes[name][place.dim] -= count
                found[unit.producer][name] = place.tensor.new_empty(shapes[name], device="meta")
                shapes[name][place.dim] = count
        return found
