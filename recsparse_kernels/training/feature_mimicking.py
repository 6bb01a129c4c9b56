"""Unified Low-rank Compression Framework for Click-through Rate Prediction, arXiv 2405.18146.

Weights need not be low-rank for their outputs to be: project each layer's *features* on their principal
components. One pass over training data, no gradients, then closed-form factors; the expected squared
error is the sum of the eigenvalues dropped. Embedding tables likewise, with rows weighted by how often
they are looked up. The activation-between variant and the folding of a table's projection into the linear
layer that reads it are the paper's as well; choosing ranks by energy or budget is ours.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..nn import LowRankEmbedding, LowRankEmbeddingBag, LowRankFields, LowRankLinear
from ..nn._factorize import factorize, table_basis
from ..swap import swap_modules
from ..swap_report import SwapReport
from ._method import (
    TrainingMethod,
    agree,
    all_reduce_sum,
    check_count,
    check_own_weight,
    check_tensor_state,
    unwrap,
)
from .feature_mimicking_fields import check_readers, field_tables
from .feature_mimicking_statistics import Candidate, Moments, Spectrum, mimic_linear, pick_ranks, spectrum

FACTORS = ("mimic", "svd")
MIN_SIDE = 8  # of layers that are taken unless named: the rest is not worth two factors


@dataclasses.dataclass(frozen=True)
class Compressed:
    """One compressed layer."""

    name: str
    rank: int
    weights_before: int
    weights_after: int
    expected_error: float  # squared, of a feature row: the sum of what was dropped
    relative_error: float  # over the sum of all


@dataclasses.dataclass
class CompressionReport:
    """Result of `FeatureMimicking.compress`."""

    compressed: list[Compressed]
    left: dict[str, str]  # layers left dense, and why
    swap: SwapReport  # for `remap_optimizer`; factors start with new optimizer state
    folded: list[str]  # linear layers that now read a table's low-rank rows

    @property
    def weights_before(self) -> int:
        return sum(entry.weights_before for entry in self.compressed)

    @property
    def weights_after(self) -> int:
        return sum(entry.weights_after for entry in self.compressed)


class FeatureMimicking(TrainingMethod):
    r"""Collect feature statistics of a trained model, then replace its layers by low-rank ones.

    Example::

        method = FeatureMimicking(model, fields={"embeddings": "dnn.0"}, batches=200)
        with method.collecting(), torch.no_grad():
            for batch in itertools.islice(loader, 200):
                model(batch); method.step()
        report = method.compress(budget=0.25)
        # fine-tune with a new optimizer

    Args:
        model: looked at by forward hooks; changed in place by `compress`.
        layers: names of ``nn.Linear``, ``nn.Embedding`` and ``nn.EmbeddingBag`` layers; None: all of them
            with sides of at least 8.
        fields: {name of a `FieldEmbeddings`, or any module of one ``nn.Embedding`` a field with the same
            output: name of the linear layer that reads its ``z``, flattened, and nothing else, or None}.
        batches: how many to collect; `step` counts them.
        max_features: linear layers with more outputs are refused: their covariance is that wide squared.
        process_group: whose ranks pool their statistics; None: the default group.

    Raises:
        TypeError: a named layer is of a type that has no low-rank form here.
        ValueError: a name is not in the model, a layer is too wide, or shares or computes its weight.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str] | None = None,
        *,
        fields: Mapping[str, str | None] | None = None,
        batches: int | None = None,
        max_features: int = 8192,
        process_group=None,
    ):
        if batches is not None:
            check_count("batches", batches)
        self._model, self._group, self.batches = unwrap(model), process_group, batches
        self.fields = dict(fields or {})
        modules = dict(self._model.named_modules())
        for name in (*(layers or ()), *self.fields, *(n for n in self.fields.values() if n)):
            if name not in modules:
                raise ValueError(f"layer {name!r} is not in the model")
        self._field_tables = {name: field_tables(name, modules[name]) for name in self.fields}
        inside = {id(t) for tables in self._field_tables.values() for t in tables}
        if layers is None:
            layers = [n for n, m in modules.items() if _worthwhile(m) and id(m) not in inside]
        for name in layers:
            if type(modules[name]) not in (nn.Linear, nn.Embedding, nn.EmbeddingBag):
                raise TypeError(
                    f"layer {name!r} must be an nn.Linear, nn.Embedding or nn.EmbeddingBag; "
                    f"got {type(modules[name]).__name__}"
                )
            check_own_weight(self._model, name, modules[name])
            wide = isinstance(modules[name], nn.Linear) and modules[name].out_features > max_features
            if wide:
                raise ValueError(
                    f"layer {name!r} has {modules[name].out_features} outputs, more than max_features="
                    f"{max_features}: leave it out of layers, or take LowRankLinear.from_dense"
                )
        check_readers(self.fields, self._field_tables, modules)
        if not layers and not self.fields:
            raise ValueError("layers: nothing in the model to compress")
        self.layers = {name: modules[name] for name in layers}
        self._moments = {
            n: Moments(m.out_features, m.weight.device)
            for n, m in self.layers.items()
            if isinstance(m, nn.Linear)
        }
        tables = {n: m for n, m in self.layers.items() if n not in self._moments}
        for name, parts in self._field_tables.items():
            tables.update({f"{name}.{k}": table for k, table in enumerate(parts)})
        self._tables = tables
        self._counts = {
            n: torch.zeros(m.num_embeddings, dtype=torch.int64, device=m.weight.device)
            for n, m in tables.items()
        }
        self._hooks: list = []

    # -- collecting --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Put the hooks on; forward passes are then counted in."""
        if self._hooks:
            raise RuntimeError("collecting has started already")
        for name, moments in self._moments.items():
            self._hooks.append(self.layers[name].register_forward_hook(
                lambda module, args, output, moments=moments: moments.add(output)))  # fmt: skip
        for name, table in self._tables.items():
            counts = self._counts[name]
            self._hooks.append(table.register_forward_pre_hook(
                lambda module, args, kwargs, counts=counts: _count(counts, args[0] if args else kwargs["input"]),
                with_kwargs=True))  # fmt: skip

    def stop(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @contextlib.contextmanager
    def collecting(self) -> Iterator["FeatureMimicking"]:
        """`start` on entry, `stop` on exit."""
        self.start()
        try:
            yield self
        finally:
            self.stop()

    def step(self) -> bool:
        """Call after each forward pass that was collected. True once ``batches`` of them are: the hooks
        are then off.

        Raises:
            ValueError: called more often than that.
        """
        if self.batches is not None and self.steps >= self.batches:
            raise ValueError(f"batch {self.steps + 1} is past the end of the plan, {self.batches}")
        self.steps += 1
        done = self.steps == self.batches
        if done:
            self.stop()
        return done

    # -- ranks -------------------------------------------------------------------------------------------

    def spectra(self, factors: str = "mimic") -> dict[str, list[Spectrum]]:
        """What each layer loses at each rank; of ``fields`` one for each table.

        Raises:
            ValueError: nothing was collected for a layer, or its features were not finite.
        """
        if factors not in FACTORS:
            raise ValueError(f"factors must be one of {FACTORS}; got {factors!r}")
        if factors == "svd":
            found = {n: [Spectrum(factorize(self.layers[n].weight)[0])] for n in self._moments}
            bases = {n: Spectrum(table_basis(t.weight, center=False)[0]) for n, t in self._tables.items()}
        else:
            found = {}
            for name, own in self._moments.items():
                moments = own.over_ranks(self._group)
                _check_collected(name, int(moments.count), moments.scatter)
                found[name] = [spectrum(moments)]
            bases = {}
            for name, counts in self._total_counts().items():
                table = self._tables[name]
                center = table.max_norm is None
                values, vectors, mean = table_basis(
                    table.weight, center=center, counts=counts, skip_row=table.padding_idx
                )
                _check_collected(name, int(counts.sum()), values)
                bases[name] = Spectrum(values, vectors, mean)
        found.update({n: [bases[n]] for n in self.layers if n not in self._moments})
        for name, tables in self._field_tables.items():
            found[name] = [bases[f"{name}.{k}"] for k in range(len(tables))]
        return found

    def _total_counts(self) -> dict[str, Tensor]:
        total = {name: counts.clone() for name, counts in self._counts.items()}
        all_reduce_sum(total.values(), self._group)
        return total

    def _candidate(self, name: str, spectra: list[Spectrum]) -> Candidate:
        if name in self._field_tables:
            tables = self._field_tables[name]
            rows, dim = sum(t.num_embeddings for t in tables), tables[0].embedding_dim
            shares = sum(s.energies / max(s.total, 1e-300) for s in spectra)
            return Candidate(name, shares, rows * dim, rows + len(tables) * dim)
        weight = self.layers[name].weight
        return Candidate(name, spectra[0].energies, weight.numel(), sum(weight.shape))

    # -- compressing -------------------------------------------------------------------------------------

    def compress(
        self,
        *,
        rank: int | Mapping[str, int | None] | None = None,
        energy: float | None = None,
        budget: int | float | None = None,
        multiple_of: int = 1,
        mid_activation: str | Mapping[str, str] | None = None,
        factors: str = "mimic",
        keep_smaller: bool = True,
    ) -> CompressionReport:
        """Replace the layers, in place, all or nothing.

        Args:
            rank: one for all layers, or one each (None, or not named: stays dense); or
            energy: share of each layer's feature variance to keep: the smallest rank that does; or
            budget: weights of all layers together, or their share of the dense ones: ranks are given to
                where they save the most of a layer's variance for their size.
            multiple_of: ranks chosen by energy or budget are rounded up to it.
            mid_activation: between the factors of linear layers ("relu", ...), or {layer: activation}: no
                projection any more, so that the model must be fine-tuned.
            factors: "mimic", or "svd": the best approximation of the weights, which needs no statistics.
            keep_smaller: leave a layer dense where its rank would not make it smaller.

        Raises:
            ValueError: not exactly one of rank, energy, budget; out of range; a budget below rank 1 of
                each layer; nothing collected, or features that are not finite; the layers were replaced
                since, as by an earlier call. The model is unchanged.
        """
        self.stop()
        self._check_in_place()
        spectra = self.spectra(factors)
        candidates = {name: self._candidate(name, found) for name, found in spectra.items()}
        picked = pick_ranks(list(candidates.values()), rank, energy, budget, multiple_of)
        unknown = (
            sorted(set(mid_activation) - set(self._moments)) if isinstance(mid_activation, Mapping) else []
        )
        if unknown:
            raise ValueError(f"mid_activation names layers that are not collected linear layers: {unknown}")
        left = {name: "no rank was given for it" for name, r in picked.items() if r is None}
        for name, candidate in candidates.items():
            if picked[name] is not None and keep_smaller and picked[name] > candidate.most:
                left[name] = f"rank {picked[name]} is not smaller than dense"
        chosen = {name: r for name, r in picked.items() if name not in left}
        counts = self._total_counts() if factors == "mimic" else {}

        new_fields, folded, readers = {}, {}, set(self.fields.values())
        for name in self._field_tables:
            if name in chosen:
                new_fields[name] = self._new_fields(name, chosen[name], factors, counts)
                reader = self.fields[name]
                if reader is not None:
                    folded[reader] = new_fields[name].fold_linear(self._model.get_submodule(reader))
        new_layers = {}
        for name in self.layers:
            if name in chosen:
                source = folded.pop(name, None) if name in folded else self.layers[name]
                between = mid_activation.get(name) if isinstance(mid_activation, Mapping) else mid_activation
                new_layers[name] = self._new_layer(
                    name, source, spectra[name][0], chosen[name], between, factors, counts
                )
        for part in (*new_fields.values(), *folded.values(), *new_layers.values()):
            agree([p.data for p in part.parameters()], self._group)

        entries = [self._entry(n, chosen[n], spectra[n], {**new_layers, **new_fields}[n]) for n in chosen]
        swap = swap_modules(self._model, lambda module, name: new_layers.get(name))
        swapped = set(swap.names)
        for entry in swap.left:
            if entry.name in new_layers and entry.name not in swapped:
                left[entry.name] = entry.reason
                if entry.name in readers:  # what it reads is narrower now, so it cannot stay
                    folded[entry.name] = new_layers[entry.name]
        for name, module in (*new_fields.items(), *folded.items()):
            _put(self._model, name, module)
        return CompressionReport(
            [e for e in entries if e.name not in left], left, swap, [r for r in self.fields.values() if r]
        )

    def _check_in_place(self) -> None:
        modules = dict(self._model.named_modules())
        gone = [n for n, m in self.layers.items() if modules.get(n) is not m]
        for name, tables in self._field_tables.items():
            inside = {id(m) for m in modules[name].modules()} if name in modules else set()
            gone += [] if inside.issuperset(map(id, tables)) else [name]
        if gone:
            raise ValueError(
                f"layers {gone} of the model were replaced since they were collected: make a new FeatureMimicking"
            )

    def _new_layer(self, name, source, found, rank, mid_activation, factors, counts) -> nn.Module:
        if isinstance(source, nn.Linear):
            if factors == "svd":
                new = LowRankLinear.from_dense(
                    source, min(rank, *source.weight.shape), mid_activation=mid_activation
                )
            else:
                new = mimic_linear(source, found, rank, mid_activation)
        else:
            packed = LowRankEmbedding if isinstance(source, nn.Embedding) else LowRankEmbeddingBag
            center = False if factors == "svd" else None
            new = packed.from_dense(source, rank, center=center, counts=counts.get(name))
        new.requires_grad_(source.weight.requires_grad)
        return new.train(source.training)

    def _new_fields(self, name, rank, factors, counts) -> LowRankFields:
        module, tables = self._model.get_submodule(name), self._field_tables[name]
        given = [counts[f"{name}.{k}"] for k in range(len(tables))] if factors == "mimic" else None
        return LowRankFields.from_dense(
            tables,
            rank,
            center=factors == "mimic",
            counts=given,
            output=True,
            interaction=bool(getattr(module, "interaction", False)),
        )

    def _entry(self, name: str, rank: int, spectra: list[Spectrum], new: nn.Module) -> Compressed:
        dropped, total = sum(s.dropped(rank) for s in spectra), sum(s.total for s in spectra)
        before = self._field_tables[name] if name in self._field_tables else [self.layers[name]]
        return Compressed(
            name, rank, sum(p.numel() for m in before for p in m.parameters()),
            sum(p.numel() for p in new.parameters()), dropped, dropped / total if total else 0.0,
        )  # fmt: skip

    # -- state -------------------------------------------------------------------------------------------

    def _plan(self):
        return {
            "batches": self.batches, "fields": self.fields,
            "layers": {n: tuple(m.weight.shape) for n, m in {**self.layers, **self._tables}.items()},
        }  # fmt: skip

    def _state(self):
        moments = {
            n: {"count": m.count, "mean": m.mean, "scatter": m.scatter} for n, m in self._moments.items()
        }
        return {"moments": moments, "counts": dict(self._counts)}

    def _check_state(self, state) -> None:
        own = self._state()
        for part in ("moments", "counts"):
            if set(state[part]) != set(own[part]):
                raise ValueError(f"{part} must have {sorted(own[part])}; got {sorted(state[part])}")
        for name, like in own["moments"].items():
            for key, tensor in like.items():
                check_tensor_state(f"{key} of {name!r}", state["moments"][name].get(key), tensor)
        for name, like in own["counts"].items():
            check_tensor_state(f"counts of {name!r}", state["counts"][name], like)

    def _take_state(self, state) -> None:
        for name, moments in self._moments.items():
            moments.count.copy_(state["moments"][name]["count"])
            moments.mean.copy_(state["moments"][name]["mean"])
            moments.scatter.copy_(state["moments"][name]["scatter"])
        for name, counts in self._counts.items():
            counts.copy_(state["counts"][name])


def _worthwhile(module: nn.Module) -> bool:
    if type(module) is nn.Linear:
        return min(module.in_features, module.out_features) >= MIN_SIDE
    return type(module) in (nn.Embedding, nn.EmbeddingBag) and module.embedding_dim >= MIN_SIDE


@torch.no_grad()
def _count(counts: Tensor, ids: Tensor) -> None:
    ids = ids.detach().reshape(-1)
    counts.index_add_(0, ids.long(), torch.ones_like(ids, dtype=counts.dtype))


def _check_collected(name: str, count: int, energies: Tensor) -> None:
    if count == 0:
        raise ValueError(
            f"nothing was collected for {name!r}: run the model under collecting() first, and not as compiled "
            "before, when there were no hooks"
        )
    if not bool(torch.isfinite(energies).all()):
        raise ValueError(f"the features of {name!r} are not finite (NaN or infinity): fix the model or data")


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, key = name.rpartition(".")
    setattr(model.get_submodule(parent), key, module)
