"""The package's own layers through swap, optimizer remap, dense checkpoints, tune, explain and back."""

import copy
import functools

import pytest
import torch
from torch import nn

import recsparse_kernels as rk
from recsparse_kernels import nn as layers


def linear():
    return nn.Linear(96, 80), torch.randn(12, 96)


def embedding():
    return nn.Embedding(500, 16, padding_idx=3), torch.randint(0, 500, (12, 4))


def bag():
    return nn.EmbeddingBag(500, 16, mode="sum"), torch.randint(0, 500, (12, 4))


# class name, options of from_dense, dense layer and input, whether its parameters have positions
CASES = [
    ("Sparse24Linear", {}, linear, True),
    ("LowRankLinear", {"rank": 8}, linear, False),
    ("FixedFanInLinear", {"fan_in": 12}, linear, True),
    ("MaskedEmbedding", {"density": 0.3}, embedding, True),
    ("MaskedEmbeddingBag", {"density": 0.3}, bag, True),
    ("LowRankEmbedding", {"rank": 4}, embedding, False),
    ("LowRankEmbeddingBag", {"rank": 4}, bag, False),
]


@pytest.fixture(params=CASES, ids=[case[0] for case in CASES])
def case(request):
    """A model around one dense layer, the rule for it, an input, whether there are positions."""
    name, options, make, positional = request.param
    torch.manual_seed(0)
    dense, input = make()
    cls = getattr(layers, name, None)
    if cls is None:
        pytest.skip(f"this build of the package has no {name}")
    return nn.Sequential(dense), {type(dense): functools.partial(cls, **options)}, input, positional, cls


def train(model, optimizer, input):
    optimizer.zero_grad()
    model(input).square().mean().backward()
    optimizer.step()


def test_swap_and_back(case):
    model, rules, input, _, cls = case
    keys = {key: value.shape for key, value in model.state_dict().items()}
    dense = copy.deepcopy(model)
    report = rk.swap_modules(model, rules)
    assert report.names == ["0"] and type(model[0]) is cls and report.stale == []
    assert report.bytes_after < report.bytes_before
    output = model(input).detach()
    assert {key: value.shape for key, value in rk.dense_state_dict(model).items()} == keys
    rk.load_dense_state_dict(model, dense.state_dict())
    torch.testing.assert_close(model(input), output, rtol=1e-4, atol=1e-5)
    rk.unswap_modules(model)
    assert type(model[0]) is type(dense[0])
    torch.testing.assert_close(model(input), output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.Adagrad, torch.optim.RMSprop])
def test_optimizer_state_follows(case, kind):
    model, rules, input, positional, _ = case
    optimizer = kind(model.parameters(), lr=0.01)
    train(model, optimizer, input)
    moments = {k: v for k, v in optimizer.state[model[0].weight].items() if v.dim()}
    result = rk.remap_optimizer(optimizer, rk.swap_modules(model, rules))
    states = {entry.name.split(".")[-1]: entry.state for entry in result.entries}
    states.pop("bias", None)
    assert set(states.values()) == {"carried" if positional else "fresh"}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    if positional:
        name, parameter = next((n, p) for n, p in model[0].named_parameters() if n != "bias")
        for key, value in moments.items():
            assert torch.equal(optimizer.state[parameter][key], model[0].pack_state(name, value))
    train(model, optimizer, input)


def test_pack_state_is_the_inverse_of_the_dense_view(case):
    model, rules, _, positional, _ = case
    rk.swap_modules(model, rules)
    name, parameter = next((n, p) for n, p in model[0].named_parameters() if n != "bias")
    packed = model[0].pack_state(name, model[0].dense_weight().detach())
    if positional:
        assert torch.equal(packed, parameter.detach())
    else:
        assert packed is None


def test_explain_and_tune(case, tmp_path, monkeypatch):
    model, rules, input, _, _ = case
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rk.swap_modules(model, rules)
    rows = rk.explain(model, input).rows
    assert rows and all(row[3] in ("native", "reference") for row in rows)
    assert all(row[3] in ("native", "reference") for row in rk.explain(model).rows)
    try:
        report = rk.tune(model, input, rounds=1)
        measured = {entry.op for entry in report.entries}
        assert not report.skipped and (measured or not rk.cpu_levels())
        assert any(row[4].startswith("measured: ") for row in rk.explain(model, input).rows) == bool(measured)
    finally:
        monkeypatch.undo()
        rk.tuning.load()


def test_default_candidates_of_advise():
    missing = [name for name, *_ in CASES if not hasattr(layers, name)]
    if missing:
        pytest.skip(f"this build of the package has no {', '.join(missing)}")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.bag = nn.Embedding(1000, 16), nn.EmbeddingBag(1000, 16, mode="sum")
            self.hidden, self.head = nn.Linear(32, 128), nn.Linear(128, 17_000)

        def forward(self, ids):
            return self.head(self.hidden(torch.cat([self.table(ids[:, 0]), self.bag(ids)], -1)))

    model = Model()
    advice = rk.advise(model, torch.randint(0, 1000, (8, 5)), memory_budget=0.5, rounds=1, allow_slower=True)
    labels = {entry.name: {m.label.partition("(")[0] for m in entry.measurements} for entry in advice.layers}
    assert labels == {
        "table": {"MaskedEmbedding", "LowRankEmbedding"},
        "bag": {"MaskedEmbeddingBag", "LowRankEmbeddingBag"},
        "hidden": {"Sparse24Linear", "LowRankLinear"},
        "head": {"Sparse24Linear", "LowRankLinear", "FixedFanInLinear"},
    }
    assert advice.met and not any(entry.failures for entry in advice.layers)
    assert rk.swap_modules(model, advice.rules).model_bytes_after == advice.advised_bytes
