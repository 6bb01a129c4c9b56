"""Alternate growth and pruning: what shrinks, what comes back, and that a run resumes exactly."""

import copy

import pytest
import torch
from torch import nn

from recsparse_kernels.nn import Sparse24Linear
from recsparse_kernels.training import AlternateGrowthPruning, HiddenUnits, alternating, find_hidden_units

from .ranks import on_two_ranks

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, initial_accumulator_value=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
}


class Tower(nn.Module):
    """Two chains, as DLRM has, with what may stand between."""

    def __init__(self, width=16, norm=True):
        super().__init__()
        between = [nn.BatchNorm1d(width)] if norm else []
        self.bottom = nn.Sequential(nn.Linear(7, width), *between, nn.ReLU(), nn.Linear(width, 9), nn.ReLU())
        self.top = nn.Sequential(
            nn.Linear(9, width), nn.GELU(), nn.Dropout(0.0),
            nn.Sequential(nn.Linear(width, 12, bias=False), nn.ReLU()), nn.Linear(12, 1),
        )  # fmt: skip

    def forward(self, x):
        return self.top(self.bottom(x)).squeeze(1)


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


def tower(dtype=torch.float32, seed=0, **options):
    torch.manual_seed(seed)
    return Tower(**options).to(dtype)


def batches(steps, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(32, 7, generator=generator, dtype=torch.float64).to(dtype)
        yield x, (x[:, 0] * x[:, 1]).tanh()


def train_step(model, optimizer, batch):
    x, y = batch
    optimizer.zero_grad()
    loss = (model(x) - y).square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


def test_find_hidden_units():
    found = find_hidden_units(tower())
    assert found == [
        HiddenUnits("bottom.0", "bottom.3", ("bottom.1",)),
        HiddenUnits("top.0", "top.3.0"),
        HiddenUnits("top.3.0", "top.4"),
    ]
    layer = nn.Linear(4, 4)
    assert find_hidden_units(nn.Sequential(layer, nn.ReLU(), layer)) == []  # shared: its columns are its rows
    last = nn.Linear(4, 1)
    assert find_hidden_units(nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), last)) == []
    tied = nn.Linear(4, 4)
    tied.weight = layer.weight
    assert find_hidden_units(nn.Sequential(layer, nn.ReLU(), tied, nn.ReLU(), last)) == []
    assert find_hidden_units(nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)), nn.ReLU(), last)) == []
    assert find_hidden_units(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))) == []
    positions = nn.BatchNorm1d(10)  # of [B, 10, 4]: not over the units
    assert find_hidden_units(nn.Sequential(nn.Linear(4, 4), positions, nn.Linear(4, 4))) == []
    norm = nn.BatchNorm1d(4, affine=False)
    twice = nn.Sequential(nn.Linear(4, 4), norm, nn.Linear(4, 4), norm, last)
    assert find_hidden_units(twice) == []
    inner = nn.Linear(4, 4)
    inner.bias = layer.bias
    assert find_hidden_units(nn.Sequential(layer, nn.ReLU(), inner, nn.ReLU(), last)) == []
    residual = Residual(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    assert find_hidden_units(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), residual, last)) == []


def test_shapes_and_work():
    model = tower()
    optimizer = torch.optim.Adam(model.parameters())
    phases = [(2, 0.0), (5, 0.5), (8, 0.0)]
    method = AlternateGrowthPruning(model, phases, optimizers=[optimizer])
    full, macs = {n: p.shape for n, p in model.named_parameters()}, method.macs()
    assert macs == 7 * 16 + 16 * 9 + 9 * 16 + 16 * 12 + 12
    objects, spent, changes = dict(model.named_parameters()), 0, []
    for batch in batches(8):
        spent += 3 * method.macs()
        train_step(model, optimizer, batch)
        changes.append(method.step())
    assert [i for i, c in enumerate(changes) if c] == [1, 4]
    assert changes[1].kept == {"bottom.0": (8, 16), "top.0": (8, 16), "top.3.0": (6, 12)}
    assert changes[1].macs == 7 * 8 + 8 * 9 + 9 * 8 + 8 * 6 + 6 and changes[4].macs == macs
    assert method.planned_macs() == (spent, 8 * 3 * macs)
    assert {n: p.shape for n, p in model.named_parameters()} == full
    assert all(objects[n] is p for n, p in model.named_parameters())
    with pytest.raises(ValueError, match="step 9 is past the end of the plan, 8"):
        method.step()
    for parameter in model.parameters():
        for value in optimizer.state[parameter].values():
            assert value.dim() == 0 or value.shape == parameter.shape


def dead(model, method_kept, units):
    """The units that are not kept, as boolean masks over each producer's outputs."""
    masks = {}
    for unit in units:
        mask = torch.ones(model.get_submodule(unit.producer).out_features, dtype=torch.bool)
        mask[method_kept[unit.producer]] = False
        masks[unit] = mask
    return masks


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_trains_as_the_masked_dense_model(name):
    """The compact model is the dense one whose dropped units have no weights in or out."""
    model = tower(torch.float64, norm=False)
    optimizer = OPTIMIZERS[name](model.parameters())
    for batch in batches(3, torch.float64):
        train_step(model, optimizer, batch)
    masked = copy.deepcopy(model)
    masked_optimizer = OPTIMIZERS[name](masked.parameters())
    masked_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    units = find_hidden_units(model)
    method = AlternateGrowthPruning(model, [(5, 0.5), (6, 0.0)], optimizers=[optimizer], grow="frozen")
    dropped = dead(masked, method._kept, units)

    def zero(of):
        for unit, mask in dropped.items():
            for tensor, dim in ((masked.get_submodule(unit.producer).weight, 0),
                                (masked.get_submodule(unit.consumer).weight, 1),
                                (masked.get_submodule(unit.producer).bias, 0)):  # fmt: skip
                if tensor is not None:
                    of(tensor).index_fill_(dim, mask.nonzero().squeeze(1), 0)

    with torch.no_grad():
        zero(lambda p: p)
    for batch in batches(5, torch.float64, seed=2):
        loss = train_step(model, optimizer, batch)
        x, y = batch
        masked_optimizer.zero_grad()
        wanted = (masked(x) - y).square().mean()
        wanted.backward()
        zero(lambda p: p.grad)
        masked_optimizer.step()
        with torch.no_grad():
            zero(lambda p: p)
        torch.testing.assert_close(loss, wanted.detach(), rtol=1e-12, atol=1e-12)
    # grown back: kept units have what they learned, the state of the others is as new
    for _ in range(5):
        method.step()
    with torch.no_grad():
        for unit, mask in dropped.items():
            grown, like = model.get_submodule(unit.producer), masked.get_submodule(unit.producer)
            columns = torch.ones(grown.in_features, dtype=torch.bool)
            for other, m in dropped.items():
                if other.consumer == unit.producer:
                    columns = ~m
            torch.testing.assert_close(grown.weight[~mask][:, columns], like.weight[~mask][:, columns])
            for key, value in optimizer.state[grown.weight].items():
                if value.dim():
                    wanted = 0.1 if name == "adagrad" else 0.0
                    assert bool((value[mask] == wanted).all()), key
                    torch.testing.assert_close(
                        value[~mask][:, columns],
                        masked_optimizer.state[like.weight][key][~mask][:, columns],
                    )


@pytest.mark.parametrize("compiled", [False, True])
def test_a_loss_still_in_scope(compiled):
    """Autograd keeps the gradient accumulators of a graph that is alive, and what they know of shapes."""
    model = tower()
    net = torch.compile(model, backend="aot_eager") if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = AlternateGrowthPruning(net, [(1, 0.0), (2, 0.5), (4, 0.0)], optimizers=[optimizer])
    seen = []
    model.top[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(tuple(p.grad.shape)))
    for x, y in batches(4):
        loss = (net(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        method.step()
    assert seen == [(16, 9), (8, 9), (16, 9), (16, 9)]
    assert list(method.state_dict()["plan"]["widths"]) == ["bottom.0", "top.0", "top.3.0"]


def test_zero_out_preserves_the_function():
    model = tower().eval()
    method = AlternateGrowthPruning(model, [(1, 0.6), (2, 0.0)], grow="zero_out")
    x = torch.randn(50, 7)
    before = model(x)
    assert method.step().kept["top.0"] == (16, 16)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-6)
    weights = model.top[0].weight
    assert bool((weights.norm(dim=1) > 0).all())  # regrown units have something to learn with


def test_frozen_brings_everything_back():
    model = tower()
    before = copy.deepcopy(model.state_dict())
    method = AlternateGrowthPruning(model, [(1, 0.6), (2, 0.0)], grow="frozen")
    assert model.top[0].weight.shape == (6, 9)
    method.step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_score_picks_the_units():
    model = tower(norm=False)
    with torch.no_grad():
        model.top[0].weight[5] *= 100
        model.top[0].weight[3] *= 1e-3
    unit = HiddenUnits("top.0", "top.3.0")
    method = AlternateGrowthPruning(model, [(1, 15 / 16), (2, 0.0)], units=[unit], score="norm")
    assert method._kept["top.0"].tolist() == [5]
    model = tower()
    AlternateGrowthPruning(model, [(1, 0.75), (2, 0.0)], units=[unit], score=lambda p, c: torch.arange(16.0))
    assert model.top[0].out_features == 4 and model.top[3][0].in_features == 4


def test_alternating():
    assert alternating(1000, 0.5) == ((100, 0.0), (700, 0.5), (1000, 0.0))
    assert alternating(1000, 0.5, cycles=2, warmup=0, final=0.2, dense_share=0.25) == (
        (300, 0.5), (500, 0.0), (800, 0.5), (1000, 0.0),
    )  # fmt: skip
    assert alternating(4, 0.5) == ((3, 0.5), (4, 0.0))  # too short for a warm-up
    with pytest.raises(ValueError, match=r"warmup \+ final < 1"):
        alternating(1000, 0.5, warmup=0.5, final=0.5)


def build(mode, grow, wide=False):
    model = tower(width=64 if wide else 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    units = ["top.0", "top.3.0"] if mode == "2:4" else None
    phases = [(3, 0.0), (6, 0.5), (8, 0.0), (11, 0.5), (14, 0.0)]
    method = AlternateGrowthPruning(
        model, phases, units=units, optimizers=[optimizer], grow=grow, mode=mode, seed=5
    )
    return model, optimizer, method


@pytest.mark.parametrize("mode", ["neuron", "2:4"])
@pytest.mark.parametrize("grow", ["zero_out", "frozen", "random"])
def test_resume_is_exact(mode, grow):
    def run(model, optimizer, method, begin, end):
        losses = []
        for i, batch in enumerate(batches(14)):
            if begin <= i < end:
                losses.append(train_step(model, optimizer, batch).item())
                method.step()
        return losses

    straight = build(mode, grow)
    losses = run(*straight, 0, 14)
    for stop in (2, 4, 6, 9, 12):
        first = build(mode, grow)
        run(*first, 0, stop)
        saved = copy.deepcopy([part.state_dict() for part in (first[2], first[0], first[1])])
        model, optimizer, method = build(mode, grow)
        method.load_state_dict(saved[0])
        model.load_state_dict(saved[1])
        optimizer.load_state_dict(saved[2])
        assert run(model, optimizer, method, stop, 14) == losses[stop:]
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, straight[0].state_dict()[name]), (stop, name)


def test_two_four_mode():
    model, optimizer, method = build("2:4", "frozen")
    before = None
    for i, batch in enumerate(batches(14)):
        train_step(model, optimizer, batch)
        if i == 2:
            before = copy.deepcopy(model.top[0])
        change = method.step()
        if i == 2:
            assert isinstance(model.top[0], Sparse24Linear) and change.sparsity == 0.5
            mask = model.top[0].mask()
            # transposable: the transposed weight is 2:4 as well, whole 4 x 4 tiles
            tiles = mask[:, :8].reshape(4, 4, 2, 4)
            assert bool((tiles.sum(1) == 2).all()) and bool((tiles.sum(3) == 2).all())
            held = optimizer.state[model.top[0].values]
            assert held["exp_avg"].shape == model.top[0].values.shape
            method_macs = method.macs()
            assert method._macs_at(0.5) == method_macs  # 9 inputs are stored as 16
        if i == 5:
            assert type(model.top[0]) is nn.Linear
            assert torch.equal(model.top[0].weight[~mask], before.weight[~mask])  # came back
            assert method.macs() > method_macs
            assert optimizer.state[model.top[0].weight]["exp_avg"][~mask].abs().max() == 0
    assert not any(isinstance(m, Sparse24Linear) for m in model.modules())


def test_bad_input_changes_nothing():
    model = tower()
    before = copy.deepcopy(model.state_dict())
    bad = [
        (dict(phases=[(5, 0.5)]), ValueError, "last phase must have sparsity 0"),
        (dict(phases=[(5, 1.0), (6, 0.0)]), ValueError, r"in \[0, 1\); got 1.0"),
        (dict(phases=[(5, 0.5), (4, 0.0)]), ValueError, "end_step must be an int above 5"),
        (dict(grow="maybe"), ValueError, "grow must be one of"),
        (dict(mode="4:8"), ValueError, "mode must be one of"),
        (dict(score="best"), ValueError, "score must be one of"),
        (dict(mode="2:4", phases=[(1, 0.3), (2, 0)]), ValueError, "must be 0 or 0.5"),
        (dict(units=[HiddenUnits("top.0", "bottom.0")]), ValueError, "must take the 16 outputs"),
        (dict(units=[HiddenUnits("top.0", "nowhere")]), ValueError, "'nowhere' is not in the model"),
        (dict(units=[HiddenUnits("top.1", "top.0")]), TypeError, "must be an nn.Linear"),
        (dict(optimizers=[torch.optim.LBFGS(model.parameters())]), TypeError, "LBFGS"),
        (dict(optimizers=[torch.optim.Adafactor(model.parameters())]), TypeError, "Adafactor"),
        (dict(score=lambda p, c: torch.full((p.out_features,), torch.nan)), ValueError, "holds NaN"),
        (dict(score=lambda p, c: torch.ones(3)), ValueError, r"must have shape \(16,\); got \(3,\)"),
    ]  # fmt: skip
    for options, error, message in bad:
        with pytest.raises(error, match=message):
            AlternateGrowthPruning(model, **{"phases": [(5, 0.5), (6, 0.0)], **options})
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    with pytest.raises(ValueError, match="found none"):
        AlternateGrowthPruning(nn.Linear(3, 3), [(1, 0.5), (2, 0)])


@pytest.mark.parametrize("mode", ["neuron", "2:4"])
def test_weights_that_are_shared_or_computed_are_refused(mode):
    """Cutting one layer would cut the other too, or be undone by what computes the weight."""
    units = [HiddenUnits("0", "2")] if mode == "neuron" else ["0", "2"]

    def refused(model, message):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=message):
            AlternateGrowthPruning(model, [(1, 0.0), (5, 0.5), (6, 0.0)], units=units, mode=mode)
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())

    tied = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    tied[2].weight = tied[0].weight
    refused(tied, "layer '0' shares its weight: 0.weight, 2.weight")
    normed = nn.Sequential(nn.utils.weight_norm(nn.Linear(64, 64)), nn.ReLU(), nn.Linear(64, 64))
    refused(normed, "layer '0' computes its weight")
    pruned = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    nn.utils.prune.l1_unstructured(pruned[2], "weight", 0.5)
    refused(pruned, "layer '2' computes its weight")


def test_two_four_mode_takes_a_layer_that_is_used_twice():
    layer = nn.Linear(64, 64)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    method = AlternateGrowthPruning(model, [(1, 0.5), (2, 0.0)], mode="2:4")
    assert model[0] is model[2] and isinstance(model[0], Sparse24Linear)
    method.step()
    assert model[0] is model[2] and type(model[0]) is nn.Linear


def test_nan_weights_stop_a_phase_change():
    model = tower()
    method = AlternateGrowthPruning(model, [(1, 0.0), (3, 0.5), (4, 0.0)])
    with torch.no_grad():
        model.top[0].weight[2, 2] = torch.nan
    shapes = [p.shape for p in model.parameters()]
    with pytest.raises(ValueError, match="score of 'top.0' holds NaN"):
        method.step()
    assert method.steps == 0 and [p.shape for p in model.parameters()] == shapes


class MeanUpTo:
    """A score that gives up on wide layers: after growth, not before."""

    width = 99

    def __call__(self, producer, consumer):
        if producer.out_features > self.width:
            raise RuntimeError("too wide")
        return producer.weight.detach().abs().mean(1)


@pytest.mark.parametrize("grow", ["zero_out", "frozen"])
def test_a_score_that_fails_after_growth_changes_nothing(grow):
    model, score = tower(), MeanUpTo()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    method = AlternateGrowthPruning(
        model, [(2, 0.5), (4, 0.25), (6, 0.0)], optimizers=[optimizer], score=score, grow=grow
    )
    train_step(model, optimizer, next(batches(1)))
    method.step()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"], method._state()))
    score.width = 8
    with pytest.raises(RuntimeError, match="too wide"):
        method.step()
    after = (model.state_dict(), optimizer.state_dict()["state"], method._state())
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    score.width = 99
    assert method.step().sparsity == 0.25
    resumed = AlternateGrowthPruning(tower(), method.plan.pieces, score=MeanUpTo(), grow=grow)
    resumed.load_state_dict(method.state_dict())  # the address of a score is not part of the plan


def test_odd_optimizer_state_is_refused():
    model = tower()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = AlternateGrowthPruning(model, [(1, 0.0), (3, 0.5), (4, 0.0)], optimizers=[optimizer])
    optimizer.state[model.top[0].weight]["row"] = torch.zeros(16)
    with pytest.raises(ValueError, match="'row' of top.0.weight has shape"):
        method.step()
    assert model.top[0].out_features == 16


def test_checkpoints_that_do_not_fit():
    method = build("neuron", "frozen")[2]
    state = method.state_dict()
    shapes = [p.shape for p in method.model.parameters()]
    for change, message in [
        ({"plan": {**state["plan"], "seed": 6}}, "saved with another seed: 6"),
        ({"plan": {**state["plan"], "widths": {"a": 3}}}, "saved with another widths"),
        ({"method": "Other"}, "must be of AlternateGrowthPruning"),
        ({"kept": {"top.0": torch.arange(8)}, "sparsity": 0.5}, "kept must be empty or have"),
        ({"steps": -1}, "steps must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            method.load_state_dict({**state, **change})
    with pytest.raises(ValueError, match="missing"):
        method.load_state_dict({"steps": 1})
    other = build("neuron", "frozen")
    for batch in batches(3):
        train_step(other[0], other[1], batch)
        other[2].step()
    cut = other[2].state_dict()
    kept, stash = cut["kept"], cut["stash"]
    short = {**stash["bottom.0"], "bottom.3.weight": stash["bottom.0"]["bottom.3.weight"][:, 1:]}
    for change, message in [
        ({"kept": {**kept, "top.0": kept["top.0"].flip(0)}}, "8 ascending units below 16"),
        ({"kept": {**kept, "top.0": [1]}}, "kept of 'top.0' must be a tensor"),
        ({"kept": None}, "kept must be a mapping"),
        ({"plan": 3}, "plan must be a mapping"),
        ({"sparsity": 0.25}, "sparsity must be one of the plan"),
        ({"stash": {**stash, "bottom.0": short}}, r"bottom.3.weight must be .* of shape \(9, 8\)"),
        ({"stash": {**stash, "bottom.0": {}}}, "stash of 'bottom.0' must have"),
    ]:
        with pytest.raises(ValueError, match=message):
            method.load_state_dict({**cut, **change})
    assert [p.shape for p in method.model.parameters()] == shapes and method.steps == 0


def _two_ranks(rank):
    model = tower(seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    method = AlternateGrowthPruning(
        model, [(2, 0.0), (4, 0.5), (6, 0.0)], optimizers=[optimizer], grow="random"
    )
    ddp = nn.parallel.DistributedDataParallel(method.model)
    for batch in batches(6, seed=10 + rank):
        train_step(ddp, optimizer, batch)
        if method.step():  # the old wrapper lives on until the new one is there
            ddp = nn.parallel.DistributedDataParallel(method.model)
    return {name: tensor for name, tensor in model.state_dict().items() if "running" not in name}


def test_ranks_agree(tmp_path):
    first, second = on_two_ranks(_two_ranks, tmp_path)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
