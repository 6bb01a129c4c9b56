"""advise: what it measures, and that the choice follows from the figures and the budget alone."""

import copy
import functools

import pytest
import torch
from swap.layers import Conv1D, HalfEmbedding, HalfLinear, RankLinear, Tower, ids
from torch import nn

from recsparse_kernels import advise, swap_modules
from recsparse_kernels.advise import Candidate, LayerAdvice, Measurement, choose
from recsparse_kernels.swap_report import layer_bytes

CANDIDATES = {
    nn.Linear: [
        ("HalfLinear", HalfLinear),
        ("RankLinear(rank=2)", functools.partial(RankLinear.from_dense, rank=2)),
        Candidate("RankLinear(rank=8)", functools.partial(RankLinear.from_dense, rank=8)),
    ],
    nn.Embedding: [("HalfEmbedding", HalfEmbedding)],
}
LARGE = {"candidates": CANDIDATES, "rounds": 1, "progress": False, "allow_slower": True}


def layer(name, size, *options):
    """``options``: (label, bytes, error, milliseconds against 1.0 dense)."""
    measured = [Measurement(label, b, ms, 1.0, error, None) for label, b, error, ms in options]
    return LayerAdvice(name, "Linear", "1x1", 1, size, measured, [])


def chosen(entries, **options):
    options = {"memory_limit": None, "max_error": None, "allow_slower": False, **options}
    size = choose(entries, sum(entry.bytes for entry in entries), **options)
    return {entry.name: entry.choice.label if entry.choice else None for entry in entries}, size


# -- the choice -------------------------------------------------------------------------------------------


def three():
    return [
        layer("a", 1000, ("a1", 500, 0.1, 0.5), ("a2", 100, 0.5, 0.5)),
        layer("b", 1000, ("b1", 500, 0.3, 0.5), ("b2", 200, 0.35, 0.5)),
        layer("c", 100, ("c1", 50, 0.01, 1.5)),  # slower than dense
    ]


def test_without_budget_least_error_among_smaller_and_not_slower():
    assert chosen(three()) == ({"a": "a1", "b": "b1", "c": None}, 1100)


def test_error_budget_takes_the_smallest_within():
    assert chosen(three(), max_error=0.4)[0] == {"a": "a1", "b": "b2", "c": None}
    assert chosen(three(), max_error=0.05, allow_slower=True)[0] == {"a": None, "b": None, "c": "c1"}


def test_memory_budget_spends_the_least_error():
    assert chosen(three(), memory_limit=1600)[0] == {"a": "a1", "b": None, "c": None}
    assert chosen(three(), memory_limit=1000) == ({"a": "a1", "b": "b2", "c": None}, 800)
    assert chosen(three(), memory_limit=400) == ({"a": "a2", "b": "b2", "c": None}, 400)


def test_memory_budget_out_of_reach_gives_the_smallest():
    assert chosen(three(), memory_limit=1) == ({"a": "a2", "b": "b2", "c": None}, 400)


def test_both_budgets():
    assert chosen(three(), memory_limit=1, max_error=0.2)[0] == {"a": "a1", "b": None, "c": None}


def test_the_reasons():
    entries = three()
    chosen(entries, memory_limit=1600)
    assert entries[1].reason == "stays dense: the memory budget is reached without it"
    assert entries[2].reason == "stays dense: what is allowed is slower than dense here"
    entries = [layer("d", 10, ("d1", 10, 0.0, 0.1)), layer("e", 10), layer("f", 10, ("f1", 5, 0.9, 0.1))]
    chosen(entries, max_error=0.5)
    assert [entry.reason.removeprefix("stays dense: ") for entry in entries] == [
        "no replacement is smaller",
        "no replacement fits it",
        "least error 0.900 is above max_error",
    ]


def test_the_same_figures_give_the_same_choice():
    tie = [layer("a", 100, ("y", 50, 0.1, 0.5), ("x", 50, 0.1, 0.5)), layer("b", 100, ("x", 50, 0.1, 0.5))]
    results = [chosen(copy.deepcopy(tie), memory_limit=160) for _ in range(3)]
    assert results[0] == results[1] == results[2] == ({"a": "x", "b": None}, 150)


# -- the measurements ---------------------------------------------------------------------------------------


def test_figures_are_those_of_the_layers():
    model = Tower()
    advice = advise(model, ids(), **LARGE)
    head = next(entry for entry in advice.layers if entry.name == "head")
    half = next(m for m in head.measurements if m.label == "HalfLinear")
    packed = HalfLinear.from_dense(model.head)
    with torch.no_grad():
        hidden = model.mlp(torch.cat([model.tables["user"](ids()[0]), model.tables["item"](ids()[1])], -1))
        wanted = model.head(hidden)
        error = (packed(hidden) - wanted).norm() / wanted.norm()
    assert half.bytes == layer_bytes(packed) and head.bytes == layer_bytes(model.head)
    assert half.error == pytest.approx(error.item(), rel=1e-4)
    lost = 1 - packed.values.square().sum() / model.head.weight.square().sum()
    assert half.dropped_energy == pytest.approx(lost.item(), rel=1e-4)
    assert half.milliseconds > 0 and half.dense_milliseconds > 0 and head.calls == 1


def test_rules_are_usable_and_bytes_as_promised():
    model = Tower()
    advice = advise(model, ids(), memory_budget=0.6, **LARGE)
    assert advice.met
    report = swap_modules(model, advice.rules)
    assert set(report.names) == {entry.name for entry in advice.layers if entry.choice} == set(advice.rules)
    assert report.model_bytes_after == advice.advised_bytes <= 0.6 * report.model_bytes_before
    for entry in advice.layers:
        if entry.choice:
            assert type(model.get_submodule(entry.name)).__name__ == entry.choice.label.partition("(")[0]


def test_nothing_changes_in_the_model():
    model = Tower().train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    objects = [id(m) for m in model.modules()]
    random = torch.random.get_rng_state()
    advise(model, ids(), **LARGE)
    assert [id(m) for m in model.modules()] == objects and model.training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert torch.equal(random, torch.random.get_rng_state())


def test_a_budget_out_of_reach_is_said():
    advice = advise(Tower(), ids(), memory_budget=10, **LARGE)
    assert not advice.met and "NOT reached" in str(advice)


def test_texts():
    advice = advise(Tower(), ids(), max_error=0.9, **LARGE)
    text = str(advice)
    assert "tables.user" in text and "error at most 0.9" in text and "click" in text
    assert any(table.title == "Measured" for table in advice.tables(every=True))
    assert advice.code().startswith(
        "swap_modules(model, {\n"
    ) and "functools.partial(RankLinear.from_dense, rank=" in (advice.code())
    advice.show()


def test_layers_not_called_and_not_fit_are_named():
    model = Tower()
    model.unused = nn.Linear(128, 128)
    model.normed = nn.utils.parametrizations.weight_norm(nn.Linear(128, 128))
    advice = advise(model, ids(), **LARGE)
    reasons = {entry.name: entry.reason for entry in advice.layers}
    assert reasons["unused"] == "stays dense: not called by this sample"
    assert any(entry.name == "normed" and "parametrized" in entry.reason for entry in advice.left)


def test_a_replacement_that_refuses_is_named():
    def refuse(module):
        raise ValueError("columns must be even")

    advice = advise(Tower(), ids(), candidates={nn.Linear: [("Refusing", refuse)]}, rounds=1, progress=False)
    assert "Refusing refused: columns must be even" in str(advice)


def test_adapters_names_with_brackets_and_keyword_input():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleDict({"a[0]": Conv1D(96, 64)})

        def forward(self, x):
            return self.layers["a[0]"](x)

    model = Model()
    advice = advise(model, {"x": torch.randn(4, 64)}, **LARGE)
    assert swap_modules(model, advice.rules).names == ["layers.a[0]"]


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"memory_budget": 0}, ValueError, "memory_budget must be bytes .* above 0; got 0"),
        ({"memory_budget": "1 GB"}, ValueError, "got '1 GB'"),
        ({"max_error": -1.0}, ValueError, "max_error must be above 0 or None; got -1.0"),
        ({"rounds": 0}, ValueError, "rounds must be at least 1; got 0"),
        ({"include": 3}, TypeError, "not iterable"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        advise(Tower(), ids(), **options)
    with pytest.raises(TypeError, match="model must be a torch.nn.Module; got int"):
        advise(3, ids())
