"""Adaptive Dense-to-Sparse Paradigm for Pruning Online Recommendation System with Non-Stationary Data,
arXiv 2010.08655.

A full model stays under incremental training; every r windows of the stream a sparse model is pruned from
it, with new values and a new mask; in between the sparse one is served, and itself trained with its mask.
One budget over all layers leaves each layer the sparsity that the data ask for.

The paradigm is the paper's; the scores, the floor and the selection are ours (its pruner is not public).
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..nn import MaskedEmbedding, MaskedEmbeddingBag
from ..nn.masked_linear import MaskedLinear
from ..ops.masked_embedding import carry, masked_embedding_pack
from ..ops.masked_embedding_table import MaskedTable, check_mask, pack_bits, row_chunks, row_counts
from ._method import (
    TrainingMethod,
    agree,
    as_optimizers,
    check_count,
    check_fraction,
    check_own_weight,
    check_tensor_state,
    checked_together,
    described,
    unwrap,
)
from .dense_to_sparse_scores import Importance, LayerView, Magnitude, has_finite_gradient, mean_of
from .selection import ScoreStream, select_largest

PACKED = {nn.Linear: MaskedLinear, nn.Embedding: MaskedEmbedding, nn.EmbeddingBag: MaskedEmbeddingBag}
STATES = ("dense", "zero", "carry")
MIN_NUMEL = 4096  # a smaller weight is not worth a mask, unless its layer is named

Score = Callable[[LayerView, int, int], Tensor]


@dataclasses.dataclass(frozen=True)
class Refresh:
    """What a refresh did to the sparse model."""

    step: int
    density: dict[str, float]  # layer -> kept over all weights
    moved: dict[str, float]  # layer -> share of the kept positions that were not kept before
    reallocated: tuple[str, ...]  # layers whose values changed size: a DDP wrapper must be built anew


class AdaptiveDenseToSparse(TrainingMethod):
    r"""Keep a packed sparse copy of a model, pruned anew from the model every few windows.

    Example::

        method = AdaptiveDenseToSparse(model, 0.1, refresh_every=4, score=GradientWeighted())
        sparse = method.sparse                      # packed layers; give it an optimizer of its own
        for window in stream:
            serve(sparse, window)
            for batch in window:
                loss(model(batch)).backward(); method.observe(); optimizer.step()
                loss(sparse(batch)).backward(); sparse_optimizer.step()
            method.step()

    Args:
        dense: the full model; never changed.
        budget: weights kept over all layers together, or their share of all.
        refresh_every: windows (calls of `step`) between refreshes: the paper's r. 0: never, a fixed mask.
        layers: names of ``nn.Linear``, ``nn.Embedding``, ``nn.EmbeddingBag``; None: all with at least
            4096 weights and more than one column.
        score: ``score(layer, begin, end) -> [end - begin]``, the larger the rather kept; see
            `Magnitude`, `GradientWeighted`, `CostAware`.
        floor: share of each layer's weights that is kept whatever the scores.
        relearn: choose the layers' shares of the budget anew at every refresh. False: as the first
            pruning found them, and every refresh leaves all tensors in their place, so that
            DistributedDataParallel and CUDA graphs go on.
        state: what the sparse optimizer's state becomes at a refresh: "dense" takes the dense optimizer's
            at the new positions, as the values are; "zero" as new; "carry" stays where the mask stays.
        dense_optimizers, sparse_optimizers: for ``state``; the latter may also be set later, on
            ``method.sparse_optimizers``, since they are built around ``method.sparse``.
        seed: of ties between scores.
        process_group: whose ranks agree on the masks; None: the default group.

    Attributes:
        sparse: the packed model.

    To resume: build everything as at the start, load the method's state, then those of the models, then
    those of the optimizers.

    Raises:
        ValueError, TypeError: a layer that cannot be packed, tied weights, a budget below the floors or above
            all weights, NaN scores.
    """

    def __init__(
        self,
        dense: nn.Module,
        budget: int | float,
        *,
        refresh_every: int = 1,
        layers: Sequence[str] | None = None,
        score: Score | None = None,
        floor: float = 0.05,
        relearn: bool = False,
        state: str = "dense",
        dense_optimizers: Sequence[torch.optim.Optimizer] = (),
        sparse_optimizers: Sequence[torch.optim.Optimizer] = (),
        seed: int = 0,
        process_group=None,
    ):
        check_count("refresh_every", refresh_every, least=0)
        check_fraction("floor", floor, zero=True)
        if state not in STATES:
            raise ValueError(f"state must be one of {STATES}; got {state!r}")
        self._dense, self._group = unwrap(dense), process_group
        self.refresh_every, self.relearn, self.state, self.seed = refresh_every, relearn, state, seed
        self.score = score if score is not None else Magnitude()
        self.dense_optimizers = as_optimizers(dense_optimizers)
        self.sparse_optimizers = as_optimizers(sparse_optimizers)
        self._layers = _chosen(self._dense, layers)
        sizes = {name: layer.weight.numel() for name, layer in self._layers.items()}
        self.budget = _budget(budget, sizes)
        self._floors = {name: -int(-floor * numel // 1) for name, numel in sizes.items()}
        if sum(self._floors.values()) > self.budget:
            raise ValueError(
                f"budget is {self.budget} weights, below the floor of {floor:g} of each layer, "
                f"{sum(self._floors.values())} together"
            )
        self._importance: dict[str, Importance] = {}
        if getattr(self.score, "needs_gradients", False):
            decay = self.score.decay
            self._importance = {n: Importance(layer.weight, decay) for n, layer in self._layers.items()}
        self._counts: dict[str, int] = {}
        bits = self._select(0, relearn=True)
        self._counts = {name: int(row_counts(part).sum()) for name, part in bits.items()}
        self.sparse = _packed_copy(self._dense, self._layers, bits)

    @property
    def densities(self) -> dict[str, float]:
        """Kept over all weights of each layer: what the budget came to."""
        return {name: self._counts[name] / layer.weight.numel() for name, layer in self._layers.items()}

    @torch.no_grad()
    def observe(self) -> None:
        """Call after the dense model's backward, while gradients are there; only scores that weigh
        gradients need it. With a GradScaler, call it after ``unscale_``; gradients that are not finite are
        left out, as it leaves out their step.

        Raises:
            ValueError: no layer has a gradient.
        """
        with_grad = [n for n, layer in self._layers.items() if layer.weight.grad is not None]
        if self._importance and not with_grad:
            raise ValueError("observe() must be called after backward() and before zero_grad(): no gradients")
        finite = all(has_finite_gradient(self._layers[n].weight) for n in with_grad if self._importance)
        for name in with_grad if self._importance and finite else ():
            weight = self._layers[name].weight
            self._importance[name].add(weight.detach(), weight.grad)

    def step(self) -> Refresh | None:
        """Call at the end of each window. Refreshes every ``refresh_every`` windows.

        Raises:
            ValueError: NaN scores, optimizer state that does not fit; nothing has changed.
        """
        after = self.steps + 1
        result = None
        if self.refresh_every and after % self.refresh_every == 0:
            result = self.refresh(_step=after)
        self.steps = after
        return result

    def refresh(
        self,
        masks: Mapping[str, Tensor] | None = None,
        *,
        relearn: bool | None = None,
        _step: int | None = None,
    ) -> Refresh:
        """Prune the sparse model from the dense one as it is now, in place.

        Args:
            masks: layer -> bool mask of its weight, in place of the scores; all layers.
            relearn: choose the layers' shares of the budget anew, as at the end of a warm-up; None: as
                the method was told.
        """
        step = self.steps if _step is None else _step
        anew = self.relearn if relearn is None else relearn
        bits = self._select(step, anew) if masks is None else self._given(masks)
        tables = self._new_tables(bits)
        moved = {}
        for name, part in bits.items():
            new = int(row_counts(part & ~_masked(self.sparse, name).mask_bits).sum())
            moved[name] = new / max(1, int(row_counts(part).sum()))
        states = self._new_states(tables) if self.sparse_optimizers else []
        # nothing above has changed anything; nothing below can fail
        reallocated = [name for name, table in tables.items() if not _masked(self.sparse, name).put(table)]
        self._copy_the_rest()
        for held, key, value in states:
            same = isinstance(held.get(key), Tensor) and held[key].shape == value.shape
            held[key] = held[key].copy_(value) if same else value
        self._counts = {name: table.nnz for name, table in tables.items()}
        return Refresh(step, self.densities, moved, tuple(reallocated))

    # -- choosing ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _select(self, step: int, relearn: bool) -> dict[str, Tensor]:
        """Mask bits of each layer; the same on all ranks."""
        streams, names = [], list(self._layers)
        for name in names:
            view, weight = self._view(name), self._layers[name].weight
            dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
            streams.append(ScoreStream(
                weight.numel(), lambda b, e, view=view, dtype=dtype: _scores(self.score, view, b, e).to(dtype),
                weight.device, dtype,
            ))  # fmt: skip
        least, most = [self._floors[n] for n in names], None
        if not relearn:
            least = most = [self._counts[n] for n in names]
        budget = sum(least) if most is not None else self.budget
        seed = self.seed + step
        labels = [f"score of {n!r}" for n in names]
        with checked_together(self._layers[names[0]].weight.device, self._group):
            chosen = select_largest(streams, budget, minimum=least, maximum=most, seed=seed, names=labels)
        bits = {}
        for i, name in enumerate(names):
            rows, columns = self._layers[name].weight.shape
            packed = torch.empty(
                rows, (columns + 7) // 8, dtype=torch.uint8, device=self._layers[name].weight.device
            )
            for begin, end in row_chunks(rows, columns):
                mask = chosen.mask(i, begin * columns, end * columns)
                packed[begin:end] = pack_bits(mask.view(end - begin, columns))
            bits[name] = packed
        agree(bits.values(), self._group)
        return bits

    def _view(self, name: str) -> LayerView:
        flat = self._layers[name].weight.detach().view(-1)
        importance = self._importance.get(name)
        return LayerView(
            name,
            flat,
            importance.read if importance else None,
            mean_of(lambda b, e: flat[b:e].abs(), flat.numel()),
            mean_of(importance.read, flat.numel()) if importance else 0.0,
        )

    def _given(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if set(masks) != set(self._layers):
            raise ValueError(f"masks must name {sorted(self._layers)}; got {sorted(masks)}")
        bits = {}
        for name, layer in self._layers.items():
            check_mask(masks[name], *layer.weight.shape)
            bits[name] = pack_bits(masks[name].to(layer.weight.device))
        return bits

    # -- taking over -------------------------------------------------------------------------------------

    @torch.no_grad()
    def _new_tables(self, bits: dict[str, Tensor]) -> dict[str, MaskedTable]:
        return {n: masked_embedding_pack(self._layers[n].weight.detach(), part) for n, part in bits.items()}

    @torch.no_grad()
    def _copy_the_rest(self) -> None:
        """Biases, other layers and buffers."""
        own = dict(self.sparse.named_parameters()) | dict(self.sparse.named_buffers())
        for name, tensor in (*self._dense.named_parameters(), *self._dense.named_buffers()):
            layer, _, key = name.rpartition(".")
            if not (key == "weight" and layer in self._layers):
                own[name].copy_(tensor)

    @torch.no_grad()
    def _new_states(self, tables: dict[str, MaskedTable]) -> list[tuple[dict, str, Tensor]]:
        """(state dict of a sparse parameter, key, new tensor) for all that changes."""
        pairs = {}  # sparse parameter -> dense parameter, layer
        sparse = dict(self.sparse.named_parameters())
        for name, parameter in self._dense.named_parameters():
            layer, _, key = name.rpartition(".")
            packed = key == "weight" and layer in self._layers
            own = _masked(self.sparse, layer).values if packed else sparse[name]
            pairs[own] = (parameter, layer if packed else None)
        changes = []
        for optimizer in self.sparse_optimizers:
            for own in (p for group in optimizer.param_groups for p in group["params"] if p in pairs):
                changes += self._state_changes(optimizer, own, *pairs[own], tables)
        return changes

    def _state_changes(self, optimizer, own, parameter, layer, tables) -> list[tuple[dict, str, Tensor]]:
        tensors = {k: v for k, v in optimizer.state.get(own, {}).items() if isinstance(v, Tensor)}
        dense = next((o for o in self.dense_optimizers if parameter in o.state), optimizer)
        source = dense.state.get(parameter, {})
        given = {k: v for k, v in source.items() if isinstance(v, Tensor)}
        if self.state == "carry":
            new = self._carried(tensors, layer, tables)
        elif self.state == "dense" and given:
            new = self._packed_state(given, parameter, layer, tables)
            if tensors and set(tensors) != set(given):
                raise ValueError(
                    f"state='dense' needs optimizers of one kind: the dense one keeps {sorted(given)}, the "
                    f"sparse one {sorted(tensors)}"
                )
            if not tensors and _kind(dense) != _kind(optimizer):  # it would not make what is missing
                raise ValueError(
                    f"state='dense' needs optimizers of one kind: got {_kind(dense)} and {_kind(optimizer)}"
                )
        else:
            start = optimizer.defaults.get("initial_accumulator_value", 0.0)  # Adagrad's sum
            new = {
                key: value.new_full(
                    tables[layer].values.shape if layer and value.dim() else value.shape,
                    start if key == "sum" else 0.0,
                )
                for key, value in tensors.items()
            }
        held = optimizer.state[own] if new else {}
        return [(held, key, value) for key, value in new.items()]

    def _carried(self, tensors, layer, tables) -> dict[str, Tensor]:
        """A sparse parameter's own state, where the mask stays."""
        if layer is None:
            return {}
        old = _masked(self.sparse, layer).table
        like_values = {k: v for k, v in tensors.items() if v.dim() and v.shape == old.values.shape}
        return {key: carry(value, old, tables[layer]) for key, value in like_values.items()}

    @staticmethod
    def _packed_state(given, parameter, layer, tables) -> dict[str, Tensor]:
        """A dense parameter's state at the positions that are kept."""
        new = {}
        for key, value in given.items():
            if value.dim() and value.shape != parameter.shape:
                raise ValueError(
                    f"optimizer state {key!r} has shape {tuple(value.shape)}, not the parameter's "
                    f"{tuple(parameter.shape)}: it cannot be packed"
                )
            if layer is not None and value.dim():
                value = masked_embedding_pack(value.detach(), _bits_of(tables[layer])).values
            new[key] = value.detach().clone()
        return new

    # -- state -------------------------------------------------------------------------------------------

    def _plan(self):
        return {
            "budget": self.budget, "refresh_every": self.refresh_every, "relearn": self.relearn,
            "state": self.state, "seed": self.seed, "score": described(self.score), "floors": self._floors,
            "layers": {name: tuple(layer.weight.shape) for name, layer in self._layers.items()},
        }  # fmt: skip

    def _state(self):
        kept = {
            name: {"mean": i.mean, "row_steps": i.row_steps, "steps": i.steps}
            for name, i in self._importance.items()
        }
        return {"counts": dict(self._counts), "importance": kept}

    def _check_state(self, state) -> None:
        counts = state["counts"]
        if set(counts) != set(self._layers):
            raise ValueError(f"counts must have {sorted(self._layers)}; got {sorted(counts)}")
        for name, count in counts.items():
            numel = self._layers[name].weight.numel()
            if not isinstance(count, int) or not 0 <= count <= numel:
                raise ValueError(f"counts of {name!r} must be an int in [0, {numel}]; got {count!r}")
        if set(state["importance"]) != set(self._importance):
            raise ValueError("importance is of other layers: a checkpoint of another topology")
        for name, like in self._state()["importance"].items():
            for key, tensor in like.items():
                check_tensor_state(f"{key} of {name!r}", state["importance"][name].get(key), tensor)

    def _take_state(self, state) -> None:
        self._counts = dict(state["counts"])
        for name, importance in self._importance.items():
            for key in ("mean", "row_steps", "steps"):
                getattr(importance, key).copy_(state["importance"][name][key])


def _chosen(model: nn.Module, names: Sequence[str] | None) -> dict[str, nn.Module]:
    """Layers by name, checked."""
    modules = dict(model.named_modules())
    if names is None:
        names = [
            n for n, m in modules.items()
            if type(m) in PACKED and m.weight.numel() >= MIN_NUMEL and m.weight.shape[1] > 1
        ]  # fmt: skip
    if not names:
        raise ValueError("layers: nothing in the model to prune")
    for name in names:
        if name not in modules:
            raise ValueError(f"layer {name!r} is not in the model")
        layer = modules[name]
        if type(layer) not in PACKED:
            kinds = ", ".join(kind.__name__ for kind in PACKED)
            raise TypeError(f"layer {name!r} must be one of {kinds}; got {type(layer).__name__}")
        check_own_weight(model, name, layer, once=True)
        if not layer.weight.is_contiguous():
            raise ValueError(f"the weight of {name!r} must be contiguous")
    return {name: modules[name] for name in names}


def _budget(budget: int | float, sizes: dict[str, int]) -> int:
    total = sum(sizes.values())
    if isinstance(budget, float):
        check_fraction("budget", budget, one=True)
        return max(1, round(budget * total))
    check_count("budget", budget)
    if budget > total:
        raise ValueError(f"budget must be at most {total}, all weights of the layers; got {budget}")
    return budget


def _packed_copy(model: nn.Module, layers: dict[str, nn.Module], bits: dict[str, Tensor]) -> nn.Module:
    """A copy of the model with packed layers; the dense weights of these are not copied on the way."""
    packed = {name: PACKED[type(layer)].from_dense(layer, mask=bits[name]) for name, layer in layers.items()}
    memo = {id(layer): packed[name] for name, layer in layers.items()}
    return copy.deepcopy(model, memo)  # deepcopy takes what memo has for a layer


def _kind(optimizer: torch.optim.Optimizer) -> str:
    """What decides the state it keeps."""
    options = [key for key in ("amsgrad", "centered", "momentum") if optimizer.defaults.get(key)]
    return " ".join([type(optimizer).__name__.replace("AdamW", "Adam"), *options])


def _scores(score: Score, view: LayerView, begin: int, end: int) -> Tensor:
    scores = score(view, begin, end)
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        got = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"score of {view.name!r} must be a floating tensor; got {got}")
    return scores


def _masked(sparse: nn.Module, name: str) -> MaskedEmbedding:
    layer = sparse.get_submodule(name)
    return layer.packed if isinstance(layer, MaskedLinear) else layer


def _bits_of(table: MaskedTable) -> Tensor:
    return table.rows[:, : (table.embedding_dim + 7) // 8].contiguous()
