"""Dynamic Sparse Learning, arXiv 2402.02855: embedding tables sparse from the first step to the last.

Every ``update_every`` steps each table drops the share rho of its kept elements that are smallest in
magnitude and regrows as many where the gradient is largest, rho falling along a cosine from 0.5 to 0.005.
The number of kept elements of each table never changes. A dropped element that is regrown at once keeps
its value; one that is new starts at 0. There is no last update: the topology moves to the end.

As in the paper: all of the above, the score from the last batch, and each table by itself. Ours: tables
are packed (the paper's code masks dense ones), the number kept is exact from the start, equal scores are
ranked by a seeded hash, and scores can also be collected over several batches.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..nn import MaskedEmbedding, MaskedEmbeddingBag
from ..reference.masked_embedding import _bits
from ._method import (
    TrainingMethod,
    amount_text,
    as_optimizers,
    check_count,
    check_tensor_state,
    check_trained,
    generator,
    is_distributed,
    unequal,
    unwrap,
)
from .dynamic_sparse_learning_scores import CandidateRows, Gradients, GradientTap
from .dynamic_sparse_learning_table import BLOCK_ELEMENTS, Decision, Moving, PackedRows, change_mask, without
from .schedules import cosine
from .selection import ScoreStream, select_largest

Packed = MaskedEmbedding | MaskedEmbeddingBag

SCORES = ("last", "accumulate", "ema")
REGROWS = ("gradient", "random")
OPTIMIZER_STATES = ("kept", "zeroed", "paper")


@dataclasses.dataclass(frozen=True)
class TableChange:
    """What an update did to one table."""

    dropped: int
    returned: int  # of those, regrown at once, with their value
    kept: int  # elements of the table, before and after


class DynamicSparseLearning(TrainingMethod):
    r"""Moves the masks of packed embedding tables while they train.

    Args:
        layers: packed layers of layout "bitmask" or "row_remap", by name, or a model, of which all are
            taken. ``MaskedEmbedding(V, D, density=...)`` starts as the paper does: a random mask.
        fraction: rho, ``step -> share of kept elements dropped``. The paper: ``cosine(0.5, 0.005,
            end_step=steps)``, which is what an int, the number of training steps, stands for.
        update_every: steps between updates (the paper's dT: 3000 for LightGCN, 2000 NeuMF, 100 MultVAE).
        optimizers: whose state moves along; one, several, or none. Fused optimizers are found by themselves.
        score: gradients that rank what is regrown: of the "last" batch (the paper), the sum over the last
            ``score_batches`` ("accumulate"), or a moving average over all ("ema", weight ``ema_decay``).
        candidate_rows: for the last two: the number of rows of which gradients are held.
        regrow: "gradient", or "random".
        optimizer_state: of regrown elements. "kept": 0, but what returns at once keeps its own; "zeroed":
            all start at 0; "paper": there Adam's moments of masked elements live on, which packed ones
            cannot; those of new elements start as if the gradient that chose them had always been so
            (moments g and g^2), and SGD's momentum at 0, as there.
        seed: ranks equal scores.
        group: process group whose ranks decide together. Scores are means over the ranks.

    Call ``step()`` after ``optimizer.step()``; all backward passes since the last call count as one batch.
    Before an update (with "last" the one pass before it) layers note gradients of their outputs: those
    passes run outside ``torch.compile``'s full graphs. An error leaves the model as it was and forgets the
    gradients noted for this step: after one of a batch whose gradients overflowed (and that a ``GradScaler``
    skipped), catch it and go on with the next.

    Example:
        >>> model = nn.Sequential(MaskedEmbedding(1000, 16, density=0.5), nn.Linear(16, 1))
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> method = DynamicSparseLearning(model, fraction=100, update_every=10, optimizers=optimizer)
        >>> for _ in range(100):
        ...     model(torch.randint(1000, (64,))).square().mean().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     _ = method.step()
    """

    def __init__(
        self,
        layers: nn.Module | Mapping[str, Packed] | Sequence[Packed],
        fraction: Callable[[int], float] | int,
        update_every: int,
        *,
        optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] = (),
        score: str = "last",
        score_batches: int = 8,
        ema_decay: float = 0.9,
        candidate_rows: int = 1 << 14,
        regrow: str = "gradient",
        optimizer_state: str = "kept",
        seed: int = 0,
        group: dist.ProcessGroup | None = None,
    ):
        self.layers = _named_layers(layers)
        if isinstance(fraction, int) and not isinstance(fraction, bool):
            check_count("fraction, as a number of steps,", fraction)
            fraction = cosine(0.5, 0.005, end_step=fraction)
        if not callable(fraction):
            raise TypeError(f"fraction must be a schedule or a number of steps; got {fraction!r}")
        self.fraction = fraction
        check_count("update_every", update_every)
        check_count("score_batches", score_batches)
        check_count("candidate_rows", candidate_rows)
        for name, value, allowed in (
            ("score", score, SCORES), ("regrow", regrow, REGROWS),
            ("optimizer_state", optimizer_state, OPTIMIZER_STATES),
        ):  # fmt: skip
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}; got {value!r}")
        if score == "accumulate" and score_batches > update_every:
            raise ValueError(
                f"score_batches must be at most update_every, {update_every}; got {score_batches}"
            )
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1); got {ema_decay}")
        self.update_every, self.score, self.score_batches = update_every, score, score_batches
        self.ema_decay, self.candidate_rows, self.regrow = ema_decay, candidate_rows, regrow
        self.optimizer_state, self.seed, self.group = optimizer_state, seed, group
        self.optimizers = as_optimizers(optimizers)
        self._collected = {name: self._no_rows(layer) for name, layer in self.layers.items()}
        self._arm()

    # ---- the schedule ----

    def is_update(self, step: int) -> bool:
        return step % self.update_every == 0

    def collects(self, step: int) -> bool:
        """Whether the gradients of this step are looked at."""
        if self.regrow == "random":
            return False
        if self.score == "ema":
            return True
        batches = self.score_batches if self.score == "accumulate" else 1
        return -step % self.update_every < batches

    @torch.no_grad()
    def step(self) -> dict[str, TableChange] | None:
        """After each optimizer step. Gives what changed, or None where no update was due.

        Raises:
            ValueError: a score or a weight is NaN or infinite; the schedule has ended.
            RuntimeError: an update is due, but no backward pass was seen; ranks disagree.
        """
        step = self.steps + 1
        fraction = self.fraction(step)
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction must be in [0, 1]; the schedule gives {fraction} at step {step}")
        try:
            collected, gradients = self._collect(step)
            decisions = None
            if self.is_update(step):
                decisions = {
                    name: self._decide(name, fraction, step, gradients.get(name)) for name in self.layers
                }
                self._check_ranks(decisions)
        except Exception:
            self._arm()
            raise
        changes = None
        if decisions is not None:
            changes = {
                name: self._carry_out(name, decisions[name], gradients.get(name)) for name in self.layers
            }
            if self.score == "accumulate":
                collected = {name: self._no_rows(layer) for name, layer in self.layers.items()}
        self._collected = collected
        self.steps = step
        self._arm()
        return changes

    def _collect(self, step: int) -> tuple[dict[str, CandidateRows], dict[str, Gradients]]:
        """What is collected after this step, and the gradients that rank what is regrown."""
        if not self.collects(step):
            return self._collected, {}
        gradients = {name: self._new_gradients(name) for name in self.layers}
        if self.score == "last":
            return self._collected, gradients
        collected = {name: self._merged(name, gradients[name], step) for name in self.layers}
        return collected, {name: self._gradients(name, [collected[name]]) for name in self.layers}

    def density(self) -> dict[str, float]:
        return {name: layer.density for name, layer in self.layers.items()}

    def detach(self) -> None:
        """Stop looking at the layers; they train on with the mask they have."""
        for layer in self.layers.values():
            layer.tap = None

    # ---- gradients ----

    def _arm(self) -> None:
        """Attach taps where the coming step's gradients count; forget what was noted."""
        wanted = self.collects(self.steps + 1)
        for layer in self.layers.values():
            layer.tap = GradientTap(layer) if wanted else None

    def _new_gradients(self, name: str) -> Gradients:
        if self.is_update(self.steps + 1) and not any(layer.tap.pieces for layer in self.layers.values()):
            raise RuntimeError(
                f"step {self.steps + 1} regrows by gradient, but no backward pass through any of "
                f"{list(self.layers)} was seen since the step before"
            )
        return self._gradients(name, self.layers[name].tap.pieces)

    def _gradients(self, name: str, pieces: list) -> Gradients:
        layer = self.layers[name]
        # what was collected is a mean over the ranks already, and adding equal means gives it again
        return Gradients(
            pieces, layer.num_embeddings, layer.embedding_dim, _wide(layer), layer.values.device, self.group
        )

    def _no_rows(self, layer: Packed) -> CandidateRows:
        return CandidateRows.empty(layer.embedding_dim, _wide(layer), layer.values.device)

    def _merged(self, name: str, new: Gradients, step: int) -> CandidateRows:
        keep, add = (1.0, 1.0) if self.score == "accumulate" else (self.ema_decay, 1 - self.ema_decay)
        together = max(1, BLOCK_ELEMENTS // self.layers[name].embedding_dim)
        merged = self._collected[name].merged(
            new, keep, add, self.candidate_rows, together, self._seed(name, step)
        )
        _finite(f"{name}: growth", merged.grads)
        return merged

    def _seed(self, name: str, step: int, *what: str) -> int:
        return generator(self.seed, name, step, *what).initial_seed()

    # ---- an update ----

    def _decide(self, name: str, fraction: float, step: int, gradients: Gradients | None) -> Decision:
        layer, packed = self.layers[name], PackedRows(self.layers[name])
        count = math.ceil(fraction * layer.nnz)
        values, dtype = layer.values.detach(), _wide(layer)
        magnitudes = ScoreStream(
            layer.nnz, lambda begin, end: _finite(name, -values[begin:end].to(dtype).abs()),
            values.device, dtype,
        )  # fmt: skip
        drop = select_largest(
            magnitudes, count, seed=self._seed(name, step, "drop"), names=[f"magnitudes of {name}"]
        )
        # the padding row gets no gradient: nothing is regrown there while there is room elsewhere
        left, padding = without(packed, drop), layer.padding_idx
        if padding is not None and layer.nnz > (packed.num_rows - 1) * packed.dim:
            padding = None

        def scores(begin: int, end: int) -> Tensor:
            first, last = begin // packed.dim, -(-end // packed.dim)
            free = ~_bits(left[first:last], packed.dim)
            if padding is not None and first <= padding < last:
                free[padding - first] = False
            out = torch.zeros(free.shape, dtype=dtype, device=values.device)
            if gradients is not None:
                ids = gradients.touched(first, last)
                out[ids - first] = _finite(f"{name}: growth", gradients.of(ids)).abs()
            out.masked_fill_(~free, -torch.inf)
            return out.view(-1)[begin - first * packed.dim : end - first * packed.dim]

        stream = ScoreStream(packed.num_rows * packed.dim, scores, values.device, dtype)
        grow = select_largest(
            stream, count, seed=self._seed(name, step, "grow"), names=[f"growth scores of {name}"]
        )
        return Decision(left, grow, count)

    def _check_ranks(self, decisions: dict[str, Decision]) -> None:
        """Equal weights and scores give equal decisions; weights that differ are found here."""
        if not is_distributed(self.group):
            return
        totals = {}
        for name, decision in decisions.items():
            packed = PackedRows(self.layers[name])
            total = 0
            for begin, end in packed.blocks():
                left, grown = decision.block(packed, begin, end)
                at = (left | grown).flatten().nonzero().squeeze(1) + begin * packed.dim
                total += int((at * -7046029254386353131 ^ (at >> 7)).sum())  # wraps
            totals[name] = total
        if names := unequal(totals, next(iter(self.layers.values())).values.device, self.group):
            raise RuntimeError(
                f"ranks would give {names} different masks: their weights or masks are no longer equal (a fused "
                "optimizer steps on its own rank's gradients); nothing was changed"
            )

    def _carry_out(self, name: str, decision: Decision, gradients: Gradients | None) -> TableChange:
        layer = self.layers[name]
        packed = PackedRows(layer)

        def gradient(ids: Tensor) -> Tensor:
            out = torch.zeros(len(ids), packed.dim, dtype=_wide(layer), device=ids.device)
            if gradients is not None and len(ids):
                touched = gradients.touched(int(ids[0]), int(ids[-1]) + 1)
                out[touched - ids[0]] = gradients.of(touched)
            return out

        moving = [Moving(layer.values.detach()), *self._moments(layer)]
        returned = change_mask(packed, decision, moving, gradient)
        layer.values.grad = None  # it belongs to the mask before
        return TableChange(decision.dropped, returned, layer.nnz)

    def _moments(self, layer: Packed) -> list[Moving]:
        held: list[tuple[str, Tensor]] = []
        for optimizer in self.optimizers:
            held += optimizer.state.get(layer.values, {}).items()
        if layer.fused is not None and layer.fused.kind == "adam":
            held += [("exp_avg", layer.fused.state), ("exp_avg_sq", layer.fused.second_state)]
        fresh = {}
        if self.optimizer_state == "paper":
            square = torch.square
            fresh = {"exp_avg": lambda g: g, "exp_avg_sq": square, "max_exp_avg_sq": square, "sum": square}
        shape = layer.values.shape
        return [
            Moving(tensor, self.optimizer_state != "zeroed", fresh.get(key))
            for key, tensor in held
            if isinstance(tensor, Tensor) and tensor.shape == shape and tensor.dim()
        ]

    # ---- state ----

    def _plan(self) -> dict[str, Any]:
        return {
            "tables": {
                name: (layer.num_embeddings, layer.embedding_dim, layer.nnz)
                for name, layer in self.layers.items()
            },
            "fraction": amount_text(self.fraction), "update_every": self.update_every, "score": self.score,
            "score_batches": self.score_batches,
            "ema_decay": self.ema_decay, "candidate_rows": self.candidate_rows, "regrow": self.regrow,
            "optimizer_state": self.optimizer_state, "seed": self.seed,
        }  # fmt: skip

    def _state(self) -> dict[str, Any]:
        fused = {
            name: {"step": f.step, "state": f.state, "second_state": f.second_state}
            for name, layer in self.layers.items()
            if (f := layer.fused) is not None
        }
        return {
            "masks": {name: PackedRows(layer).digest() for name, layer in self.layers.items()},
            "collected": {
                name: {"rows": held.rows, "grads": held.grads} for name, held in self._collected.items()
            },
            "fused": fused,
        }

    def _check_state(self, state: dict[str, Any]) -> None:
        for name, layer in self.layers.items():
            if state["masks"].get(name) != PackedRows(layer).digest():
                raise ValueError(
                    f"state_dict was saved with another mask of {name}: load the model's own state first"
                )
            held = state["collected"].get(name, {})
            rows, grads = held.get("rows"), held.get("grads")
            if not isinstance(rows, Tensor) or not isinstance(grads, Tensor):
                raise ValueError(f"collected[{name!r}] must hold rows and grads")
            if grads.shape != (len(rows), layer.embedding_dim) or len(rows) > self.candidate_rows:
                raise ValueError(
                    f"collected[{name!r}] must have at most {self.candidate_rows} rows of "
                    f"{layer.embedding_dim}; got {tuple(grads.shape)} for {len(rows)} rows"
                )
            known = rows.dtype == torch.int64 and not bool((rows.diff() <= 0).any())
            if not known or len(rows) and not 0 <= int(rows[0]) <= int(rows[-1]) < layer.num_embeddings:
                raise ValueError(
                    f"rows of collected[{name!r}] must be int64, ascending, in [0, {layer.num_embeddings})"
                )
        own = {name for name, layer in self.layers.items() if layer.fused is not None}
        if set(state["fused"]) != own:
            raise ValueError(
                f"state_dict has fused optimizers of {sorted(state['fused'])}; here {sorted(own)}"
            )
        for name in own:
            held = state["fused"][name]
            check_count(f"step of fused[{name!r}]", held["step"], 0)
            for key in ("state", "second_state"):
                check_tensor_state(
                    f"fused[{name!r}][{key!r}]", held[key], getattr(self.layers[name].fused, key)
                )

    def _take_state(self, state: dict[str, Any]) -> None:
        for name, layer in self.layers.items():
            held, device = state["collected"][name], layer.values.device
            self._collected[name] = CandidateRows(
                held["rows"].to(device), held["grads"].to(device, _wide(layer))
            )
        for name, held in state["fused"].items():
            fused = self.layers[name].fused
            fused.step = held["step"]
            fused.state.copy_(held["state"])
            fused.second_state.copy_(held["second_state"])

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._arm()


def _named_layers(layers) -> dict[str, Packed]:
    if isinstance(layers, nn.Module) and not isinstance(layers, Packed):
        found = {n: m for n, m in unwrap(layers).named_modules() if isinstance(m, Packed)}
        if not found:
            raise ValueError(f"{type(layers).__name__} has no MaskedEmbedding or MaskedEmbeddingBag")
        layers = found
    if isinstance(layers, Packed):
        layers = [layers]
    named = dict(layers) if isinstance(layers, Mapping) else {f"layers[{i}]": m for i, m in enumerate(layers)}
    if not named:
        raise ValueError("layers must hold at least one packed layer")
    for name, layer in named.items():
        if not isinstance(layer, Packed):
            raise TypeError(
                f"{name} must be a MaskedEmbedding or MaskedEmbeddingBag (from_dense makes one); "
                f"got {type(layer).__name__}"
            )
        if layer.layout == "fixed_k":
            raise ValueError(
                f"{name} has layout fixed_k, whose rows keep equally many elements, but elements move between "
                "rows: use layout bitmask"
            )
        if layer.frozen:
            raise ValueError(f"{name} is frozen: call unfreeze() first")
        if layer.nnz == 0:
            raise ValueError(
                f"{name} keeps nothing (density {layer.density:g}): at least one element is needed"
            )
    if len({id(layer) for layer in named.values()}) != len(named):
        raise ValueError("layers must be different; one is there twice")
    check_trained({name: layer.values for name, layer in named.items()})
    return named


def _wide(layer: Packed) -> torch.dtype:
    return torch.float64 if layer.values.dtype == torch.float64 else torch.float32


def _finite(name: str, scores: Tensor) -> Tensor:
    if not bool(scores.isfinite().all()):
        raise ValueError(f"{name}: scores must be finite; got {int((~scores.isfinite()).sum())} that are not")
    return scores
