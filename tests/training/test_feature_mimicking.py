"""Feature mimicking: the error identity, what is folded, ranks, and that collecting resumes exactly."""

import copy

import pytest
import torch
from torch import nn

from recsparse_kernels.nn import LowRankEmbedding, LowRankEmbeddingBag, LowRankFields, LowRankLinear
from recsparse_kernels.training import FeatureMimicking, FieldEmbeddings
from recsparse_kernels.training.feature_mimicking_statistics import Candidate, Moments, ranks_for_budget

from .ranks import on_two_ranks

FIELDS = (50, 7, 300)


class Clicks(nn.Module):
    """A small DeepFM: z into the first layer, the interaction beside it."""

    def __init__(self, dim=8):
        super().__init__()
        self.embeddings = FieldEmbeddings(FIELDS, dim, interaction=True)
        self.first = nn.Linear(len(FIELDS) * dim, 32)
        self.dnn = nn.Sequential(nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 1))

    def forward(self, ids):
        z, _, interaction = self.embeddings(ids)
        return (self.dnn(self.first(z.flatten(1))) + interaction).squeeze(1)


def clicks(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return Clicks().to(dtype)


def ids(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.rand(rows, generator=generator).pow(3) * size for size in FIELDS]  # skewed
    return torch.stack(draw, 1).long()


def collect(model, data, **options):
    method = FeatureMimicking(model, **options)
    with method.collecting(), torch.no_grad():
        for part in data.split(100):
            model(part)
            method.step()
    return method


@pytest.mark.parametrize("rank", [1, 5, 16])
def test_error_identity_of_a_linear_layer(rank):
    """The mean squared error on the data collected is the sum of the eigenvalues dropped."""
    torch.manual_seed(0)
    mixing = torch.randn(6, 40, dtype=torch.float64)
    x = torch.randn(1000, 6, dtype=torch.float64) @ mixing + 0.1 * torch.randn(1000, 40, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(40, 24)).double()
    before = model(x)
    report = collect(model, x, layers=["0"]).compress(rank=rank, keep_smaller=False)
    error = (model(x) - before).square().sum(1).mean()
    assert isinstance(model[0], LowRankLinear) and model[0].rank == rank
    assert error.item() == pytest.approx(report.compressed[0].expected_error, rel=1e-9)
    # no factors of this rank do better; those of the weight do worse
    svd = nn.Sequential(nn.Linear(40, 24)).double()
    torch.manual_seed(0)
    torch.randn(6, 40, dtype=torch.float64), torch.randn(1000, 6, dtype=torch.float64)
    svd_model = nn.Sequential(LowRankLinear.from_dense(svd[0], rank))
    assert (svd_model(x) - svd(x)).square().sum(1).mean() > error


@pytest.mark.parametrize("bag", [False, True])
def test_error_identity_of_a_table(bag):
    """Over the lookups, not over the rows."""
    torch.manual_seed(0)
    table = nn.EmbeddingBag(300, 12, mode="sum") if bag else nn.Embedding(300, 12)
    model = nn.Sequential(table).double()
    with torch.no_grad():
        table.weight += 3.0  # a mean that centring takes care of
    looked_up = ids(2000)[:, 2:]
    data = looked_up if bag else looked_up.squeeze(1)
    before = model(data)
    report = collect(model, data).compress(rank=4)
    error = (model(data) - before).square().sum(1).mean()
    assert isinstance(model[0], LowRankEmbeddingBag if bag else LowRankEmbedding)
    assert error.item() == pytest.approx(report.compressed[0].expected_error, rel=1e-9)


def test_fields_and_folding():
    """z goes into the folded layer; the interaction takes the projected rows."""
    model, data = clicks(), ids(500)
    wanted = model(data)
    method = collect(model, data, layers=[], fields={"embeddings": "first"})
    report = method.compress(rank=8, keep_smaller=False)  # full rank: nothing is lost
    assert isinstance(model.embeddings, LowRankFields) and report.folded == ["first"]
    torch.testing.assert_close(model(data), wanted, rtol=1e-9, atol=1e-9)

    model = clicks()
    x = model.embeddings(data).x
    report = collect(model, data, layers=[], fields={"embeddings": "first"}).compress(rank=3)
    out = model.embeddings(data)
    assert out.z.shape == (500, 3, 3) and model.first.in_features == 9
    error = (out.x - x).square().sum(2).mean(0).sum()
    assert error.item() == pytest.approx(report.compressed[0].expected_error, rel=1e-9)
    dense_first = clicks().first
    torch.testing.assert_close(model.first(out.z.flatten(1)), dense_first(out.x.flatten(1)))


def test_folded_layer_is_compressed_too():
    model, data = clicks(), ids(500)
    method = collect(model, data, layers=["first", "dnn.1"], fields={"embeddings": "first"})
    report = method.compress(rank={"embeddings": 4, "first": 8, "dnn.1": 6})
    assert model.first.down.shape == (8, 12) and model.dnn[1].rank == 6
    assert model(data).shape == (500,)
    assert {e.name for e in report.compressed} == {"embeddings", "first", "dnn.1"}
    assert report.weights_after == sum(
        p.numel() for m in (model.embeddings, model.first, model.dnn[1]) for p in m.parameters()
    )


def test_activation_between():
    model, data = clicks(), ids(500)
    dense = copy.deepcopy(model)
    method = collect(model, data, layers=["dnn.1"])
    with pytest.raises(ValueError, match="not collected linear layers: .'first'"):
        method.compress(rank=6, mid_activation={"first": "relu"})
    method.compress(rank=6, mid_activation={"dnn.1": "relu"})
    layer = model.dnn[1]
    assert layer.mid_activation == "relu" and layer.mid_bias is not None
    x = torch.randn(9, 32, dtype=torch.float64)
    wanted = torch.relu(x @ layer.down.T + layer.mid_bias) @ layer.up.T + layer.bias
    torch.testing.assert_close(layer(x), wanted)
    # b1 = U^T b: the paper's
    torch.testing.assert_close(layer.mid_bias, layer.up.T @ dense.dnn[1].bias)
    # fine-tuning reaches every factor
    model(data).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_ranks_by_energy_and_budget():
    model, data = clicks(), ids(2000)
    method = collect(model, data, fields={"embeddings": "first"})
    state = copy.deepcopy(model.state_dict())
    spectra = method.spectra()
    report = method.compress(energy=0.9)
    for entry in report.compressed:
        assert entry.relative_error <= 0.1 + 1e-9
        energies = sum(s.energies / s.total for s in spectra[entry.name])
        assert energies[: entry.rank - 1].sum() < 0.9 * energies.sum()
    model = clicks()
    model.load_state_dict(state)
    method = collect(model, data, fields={"embeddings": "first"})
    dense = sum(FIELDS) * 8 + 24 * 32 + 32 * 24
    report = method.compress(budget=0.4)
    weights = sum(p.numel() for m in (model.embeddings, model.first, model.dnn[1]) for p in m.parameters())
    assert weights <= 0.4 * dense + 32 + 24 + 24  # biases aside
    model = clicks()
    with pytest.raises(ValueError, match="budget must be at least"):
        collect(model, data, fields={"embeddings": "first"}).compress(budget=100)
    assert type(model.first) is nn.Linear


def test_budget_goes_where_it_saves_most():
    flat, steep = torch.ones(10), torch.tensor([100.0, *[1e-3] * 9])
    candidates = [Candidate("flat", flat, 10_000, 100), Candidate("steep", steep, 10_000, 100)]
    assert ranks_for_budget(candidates, 900) == {"flat": 8, "steep": 1}
    assert ranks_for_budget(candidates, 200) == {"flat": 1, "steep": 1}


def test_svd_baseline_needs_no_statistics():
    model = clicks()
    weight = model.dnn[1].weight.detach().clone()
    FeatureMimicking(model, ["dnn.1"]).compress(rank=6, factors="svd")
    u, s, v = torch.linalg.svd(weight)
    torch.testing.assert_close(model.dnn[1].dense_weight(), u[:, :6] * s[:6] @ v[:6])


def test_moments_do_not_cancel():
    """A mean 1e8 times the spread: the naive Q / n - mu mu^T has no correct digit left."""
    torch.manual_seed(0)
    y = torch.randn(5000, 3, dtype=torch.float64) + 1e8
    moments = Moments(3, "cpu")
    for part in y.split(37):
        moments.add(part)
    exact = torch.cov(y.T, correction=0)
    assert (moments.covariance - exact).abs().max() < 1e-6
    naive = y.T @ y / 5000 - torch.outer(y.mean(0), y.mean(0))
    assert (naive - exact).abs().max() > 0.1


def test_half_precision_models_collect_in_float64():
    model, data = clicks(torch.bfloat16), ids(200)
    method = collect(model, data, layers=["dnn.1"])
    assert method._moments["dnn.1"].mean.dtype == torch.float64
    method.compress(rank=4)
    assert model.dnn[1].down.dtype == torch.bfloat16


def test_resume_is_exact():
    data = ids(1000)
    straight, resumed = clicks(torch.float32), clicks(torch.float32)
    options = dict(fields={"embeddings": "first"}, batches=10)
    whole = collect(straight, data, **options)
    part = collect(resumed, data[:400], **options)
    state = copy.deepcopy(part.state_dict())
    rest = FeatureMimicking(resumed, **options)
    rest.load_state_dict(state)
    with rest.collecting(), torch.no_grad():
        for i, batch in enumerate(data[400:].split(100)):
            resumed(batch)
            assert rest.step() == (i == 5)
    with pytest.raises(ValueError, match="batch 11 is past the end of the plan, 10"):
        rest.step()
    whole.compress(rank=3)
    rest.compress(rank=3)
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_tables_called_by_keyword():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag, self.table = nn.EmbeddingBag(40, 16), nn.Embedding(40, 16)

        def forward(self, ids):
            offsets = torch.arange(0, ids.numel(), 2)
            return self.bag(offsets=offsets, input=ids) + self.table(input=ids[::2])

    model, data = Keywords(), ids(300)[:, 0] % 40
    method = collect(model, data)
    assert torch.equal(method._counts["bag"], data.bincount(minlength=40))
    parts = torch.cat([part[::2] for part in data.split(100)])
    assert torch.equal(method._counts["table"], parts.bincount(minlength=40))
    method.compress(rank=4)


def test_a_compiled_model():
    """Names are those of the model inside, as for the swap; a reader that is folded stays frozen."""
    model, data = clicks(), ids(300)
    model.first.requires_grad_(False)
    wanted = model(data)
    compiled = torch.compile(model, backend="eager")
    method = collect(compiled, data, layers=["dnn.1"], fields={"embeddings": "first"})
    method.compress(rank={"embeddings": 8, "dnn.1": 24}, keep_smaller=False)
    torch.testing.assert_close(compiled(data), wanted, rtol=1e-9, atol=1e-9)
    assert not any(p.requires_grad for p in model.first.parameters())
    with pytest.raises(ValueError, match="were replaced since they were collected"):
        method.compress(rank=2)


def test_shared_or_computed_weights_are_refused():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    with pytest.raises(ValueError, match="layer '0' shares its weight: 0.weight, 2.weight"):
        FeatureMimicking(model)
    with pytest.raises(ValueError, match="layer '0' computes its weight"):
        FeatureMimicking(nn.Sequential(nn.utils.weight_norm(nn.Linear(16, 16))))


def test_bad_input_changes_nothing():
    model, data = clicks(), ids(300)
    before = copy.deepcopy(model.state_dict())
    for options, error, message in [
        (dict(layers=["nowhere"]), ValueError, "'nowhere' is not in the model"),
        (dict(layers=["dnn.0"]), TypeError, "'dnn.0' must be an nn.Linear.*got ReLU"),
        (dict(layers=["dnn.1"], max_features=8), ValueError, "24 outputs, more than max_features=8"),
        (dict(fields={"dnn": None}), TypeError, "must hold nn.Embedding tables"),
        (dict(fields={"embeddings": "dnn.1"}), ValueError, "must take its 24 features; it takes 32"),
        (dict(fields={"embeddings": "dnn.0"}), TypeError, "must be an nn.Linear; got ReLU"),
        (dict(batches=0), ValueError, "batches must be an int of at least 1"),
    ]:
        with pytest.raises(error, match=message):
            FeatureMimicking(model, **options)
    method = collect(model, data, fields={"embeddings": "first"})
    for options, message in [
        (dict(), "give one of rank, energy and budget"),
        (dict(rank=2, energy=0.5), "give one of"),
        (dict(rank=99), "must be at most"),
        (dict(energy=1.5), r"energy must be in \(0, 1\]"),
        (dict(budget=2.0), r"budget must be in \(0, 1\]"),
        (dict(rank={"dnn.9": 2}), "not collected"),
        (dict(rank=2, factors="best"), "factors must be one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            method.compress(**options)
    model.embeddings.tables[1].max_norm = 1.0
    with pytest.raises(TypeError, match="without padding_idx and max_norm"):
        FeatureMimicking(model, fields={"embeddings": "first"})
    model.embeddings.tables[1].max_norm = None
    with pytest.raises(ValueError, match="nothing was collected for"):
        FeatureMimicking(model).compress(rank=2)
    with torch.no_grad():
        model.first.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="features of 'first' are not finite"):
        collect(model, data, layers=["first"]).compress(rank=2)
    with torch.no_grad():
        model.first.weight.copy_(before["first.weight"])
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    state = method.state_dict()
    with pytest.raises(ValueError, match="saved with another fields"):
        FeatureMimicking(model, ["dnn.1"]).load_state_dict(state)
    with pytest.raises(ValueError, match="must be a mapping; got NoneType"):
        method.load_state_dict({**state, "moments": dict.fromkeys(state["moments"])})
    state["counts"]["embeddings.0"] = state["counts"]["embeddings.0"][:-1]
    with pytest.raises(ValueError, match="checkpoint of another topology"):
        method.load_state_dict(state)


def _two_ranks(rank):
    model = clicks()
    collect(model, ids(1000)[rank::2], fields={"embeddings": "first"}).compress(rank=3)
    return model.state_dict()


def test_ranks_pool_their_statistics(tmp_path):
    first, second = on_two_ranks(_two_ranks, tmp_path)
    assert all(torch.equal(t, second[n]) for n, t in first.items())
    alone, data = clicks(), ids(1000)
    collect(alone, data, fields={"embeddings": "first"}).compress(rank=3)
    together = clicks()
    collect(together, data[:1], fields={"embeddings": "first"}).compress(rank=3)
    together.load_state_dict(first)
    torch.testing.assert_close(together(data), alone(data), rtol=1e-8, atol=1e-8)
