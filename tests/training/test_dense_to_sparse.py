"""Adaptive dense-to-sparse: what is kept, what a refresh leaves in its place, and that a run resumes exactly."""

import copy

import pytest
import torch
from torch import nn

from recsparse_kernels.nn import MaskedEmbedding, MaskedLinear
from recsparse_kernels.training import AdaptiveDenseToSparse, CostAware, GradientWeighted, Magnitude

from .ranks import on_two_ranks


class Clicks(nn.Module):
    def __init__(self, sparse_table=False):
        super().__init__()
        self.table = nn.Embedding(200, 8, sparse=sparse_table)
        self.bag = nn.EmbeddingBag(60, 8, mode="sum")
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, ids):
        x = torch.cat((self.table(ids[:, 0]), self.bag(ids[:, 1:] % 60)), dim=1)
        return self.mlp(x).squeeze(1)


LAYERS = ["table", "bag", "mlp.0"]


def clicks(seed=0, **options):
    torch.manual_seed(seed)
    return Clicks(**options)


def window(number, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + number)
    ids = (torch.rand(3, 32, 4, generator=generator).square() * 200).long()
    return [(part, (part[:, 0] % 3 == number % 2).float()) for part in ids]


def optimizers(model):
    tables = [p for n, p in model.named_parameters() if n.startswith("table")]
    rest = [p for n, p in model.named_parameters() if not n.startswith("table")]
    return [
        torch.optim.Adagrad(tables, lr=0.05, initial_accumulator_value=0.1),
        torch.optim.Adam(rest, lr=0.01),
    ]


def train(model, optimizers, batches, observe=lambda: None):
    losses = []
    for ids, clicked in batches:
        loss = nn.functional.binary_cross_entropy_with_logits(model(ids), clicked)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        observe()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    return losses


def build(score=None, sparse_table=False, **options):
    dense = clicks(sparse_table=sparse_table)
    dense_optimizers = optimizers(dense)
    settings = {"budget": 0.3, "refresh_every": 2, "layers": LAYERS, "seed": 3, **options}
    method = AdaptiveDenseToSparse(dense, score=score, dense_optimizers=dense_optimizers, **settings)
    method.sparse_optimizers = optimizers(method.sparse)
    return dense, dense_optimizers, method


def run(dense, dense_optimizers, method, begin, end):
    losses, refreshes = [], []
    for number in range(begin, end):
        losses += train(dense, dense_optimizers, window(number), method.observe)
        losses += train(method.sparse, method.sparse_optimizers, window(number))
        refreshes.append(method.step())
    return losses, refreshes


def dense_mask(method, name):
    return method.sparse.get_submodule(name).mask


def test_global_budget_sets_each_layers_density():
    dense = clicks()
    with torch.no_grad():
        dense.table.weight.normal_(std=1.0)
        dense.bag.weight.normal_(std=0.1)
        dense.mlp[0].weight.normal_(std=0.7)
    total = 200 * 8 + 60 * 8 + 16 * 32
    method = AdaptiveDenseToSparse(dense, 0.25, layers=LAYERS, score=Magnitude(relative=False), floor=0.02)
    kept = {name: int(dense_mask(method, name).sum()) for name in LAYERS}
    assert sum(kept.values()) == method.budget == round(0.25 * total)
    assert method.densities["table"] > method.densities["mlp.0"]
    assert kept["bag"] == 10  # the floor: 2 % of 480, rounded up
    # the largest of all weights together, floors aside
    for name in ("table", "mlp.0"):
        weight, mask = dense.get_submodule(name).weight.detach().abs(), dense_mask(method, name)
        assert weight[mask].min() >= max(
            dense.get_submodule(other).weight.detach().abs()[~dense_mask(method, other)].max()
            for other in ("table", "mlp.0")
        )
    # over the layer's own mean the three are alike
    relative = AdaptiveDenseToSparse(dense, 0.25, layers=LAYERS).densities
    assert max(relative.values()) - min(relative.values()) < 0.05


def test_sparse_model_is_the_masked_dense_model():
    dense, _, method = build()
    masked = copy.deepcopy(dense)
    with torch.no_grad():
        for name in LAYERS:
            masked.get_submodule(name).weight *= dense_mask(method, name)
    ids = window(0)[0][0]
    assert isinstance(method.sparse.table, MaskedEmbedding) and isinstance(method.sparse.mlp[0], MaskedLinear)
    torch.testing.assert_close(method.sparse(ids), masked(ids))


def test_training_keeps_the_mask_and_equals_masked_training():
    dense, _, method = build(refresh_every=0)
    masked = copy.deepcopy(dense)
    masks = {name: dense_mask(method, name) for name in LAYERS}
    with torch.no_grad():
        for name in LAYERS:
            masked.get_submodule(name).weight *= masks[name]
    masked_optimizers = optimizers(masked)
    for number in range(3):
        for batch in window(number):
            wanted = train(masked, masked_optimizers, [batch])
            with torch.no_grad():
                for name in LAYERS:
                    masked.get_submodule(name).weight *= masks[name]
            assert train(method.sparse, method.sparse_optimizers, [batch]) == pytest.approx(wanted, rel=1e-4)
        assert method.step() is None
    for name in LAYERS:
        assert torch.equal(dense_mask(method, name), masks[name])


def test_refresh_takes_values_mask_and_state_from_dense_in_place():
    dense, dense_optimizers, method = build()
    before = {n: (p, p.data_ptr(), p.shape) for n, p in method.sparse.named_parameters()}
    buffers = {n: b.data_ptr() for n, b in method.sparse.named_buffers()}
    _, refreshes = run(dense, dense_optimizers, method, 0, 4)
    assert [r is not None for r in refreshes] == [False, True, False, True]
    assert refreshes[1].reallocated == () and 0 < max(refreshes[1].moved.values()) < 1
    after = dict(method.sparse.named_parameters())
    for name, (parameter, address, shape) in before.items():
        assert after[name] is parameter and parameter.data_ptr() == address and parameter.shape == shape
    assert {n: b.data_ptr() for n, b in method.sparse.named_buffers()} == buffers
    ids = window(9)[0][0]
    masked = copy.deepcopy(dense)
    with torch.no_grad():
        for name in LAYERS:
            masked.get_submodule(name).weight *= dense_mask(method, name)
    torch.testing.assert_close(method.sparse.eval()(ids), masked.eval()(ids))
    held = method.sparse_optimizers[0].state[method.sparse.table.values]["sum"]
    wanted = dense_optimizers[0].state[dense.table.weight]["sum"][dense_mask(method, "table")]
    assert torch.equal(held, wanted)
    step = method.sparse_optimizers[1].state[method.sparse.mlp[0].packed.values]["step"]
    assert step == dense_optimizers[1].state[dense.mlp[0].weight]["step"]


@pytest.mark.parametrize("state", ["zero", "carry"])
def test_other_optimizer_state(state):
    dense, dense_optimizers, method = build(state=state)
    run(dense, dense_optimizers, method, 0, 1)
    train(dense, dense_optimizers, window(1))
    old_mask = dense_mask(method, "mlp.0")
    values = method.sparse.mlp[0].packed.values
    old = torch.zeros(32, 16)
    old[old_mask] = method.sparse_optimizers[1].state[values]["exp_avg"]
    method.step()
    new = torch.zeros(32, 16)
    new[dense_mask(method, "mlp.0")] = method.sparse_optimizers[1].state[values]["exp_avg"]
    sums = method.sparse_optimizers[0].state[method.sparse.table.values]["sum"]
    if state == "zero":
        assert new.abs().max() == 0 and bool((sums == 0.1).all())
    else:
        both = old_mask & dense_mask(method, "mlp.0")
        assert both.sum() > 20 and torch.equal(new[both], old[both])
        assert new[~both].abs().max() == 0


def test_relearn_moves_weights_between_layers():
    dense, dense_optimizers, method = build(relearn=True, refresh_every=1)
    run(dense, dense_optimizers, method, 0, 1)
    first = method.densities
    with torch.no_grad():  # the drift: half of the table no longer matters
        dense.table.weight[:100] *= 1e-3
    refresh = method.step()
    assert sum(int(dense_mask(method, n).sum()) for n in LAYERS) == method.budget
    assert method.densities["table"] != first["table"] and "table" in refresh.reallocated
    assert not bool(dense_mask(method, "table")[:100].any())
    shares = method.densities
    method.refresh(relearn=False)
    assert method.densities == shares
    for optimizer in method.sparse_optimizers:
        for parameter, held in optimizer.state.items():
            assert all(v.dim() == 0 or v.shape == parameter.shape for v in held.values())
    run(dense, dense_optimizers, method, 2, 4)  # goes on training


def test_a_loss_still_in_scope():
    """A graph that is alive keeps gradient accumulators that know the old number of values."""
    _, _, method = build(relearn=True, refresh_every=1)
    for number in range(2):
        for ids, clicked in window(number):
            loss = nn.functional.binary_cross_entropy_with_logits(method.sparse(ids), clicked)
            loss.backward()
        with torch.no_grad():
            method._dense.table.weight.mul_(3 - number)
            method._dense.bag.weight.pow_(3)
        assert method.step().reallocated
    method.sparse(window(0)[0][0]).sum().backward()


@pytest.mark.parametrize("sparse_table", [False, True])
def test_gradient_weighted_importance(sparse_table):
    """The running mean against the plain formula on dense tensors; rows not touched fade as well."""
    dense = clicks(sparse_table=sparse_table)
    score = GradientWeighted(magnitude=0.5, gradient=2.0, decay=0.8)
    method = AdaptiveDenseToSparse(dense, 0.3, layers=LAYERS, score=score)
    mean = torch.zeros(200, 8)
    for ids, clicked in window(0) + window(1):
        dense.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(dense(ids), clicked).backward()
        method.observe()
        mean = 0.8 * mean + 0.2 * (dense.table.weight * dense.table.weight.grad.to_dense()).abs()
    held = method._importance["table"]
    torch.testing.assert_close(held.read(0, 1600), mean.detach().flatten(), rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(held.read(37, 803), mean.detach().flatten()[37:803], rtol=1e-4, atol=1e-9)
    view = method._view("table")
    weight = dense.table.weight.detach().abs().flatten()
    wanted = 0.5 * weight / weight.mean() + 2.0 * mean.detach().flatten() / mean.mean().item()
    torch.testing.assert_close(score(view, 0, 1600), wanted, rtol=1e-3, atol=1e-5)


def test_cost_aware():
    dense = clicks()
    plain = AdaptiveDenseToSparse(dense, 0.3, layers=LAYERS, score=Magnitude()).densities
    aware = CostAware(Magnitude(), {"mlp.0": 4.0})
    costly = AdaptiveDenseToSparse(dense, 0.3, layers=LAYERS, score=aware).densities
    assert costly["mlp.0"] < plain["mlp.0"] and costly["table"] > plain["table"]


def test_gradients_that_overflowed_are_left_out():
    """As GradScaler leaves out their step; else no refresh would ever be possible again."""
    method = build(score=GradientWeighted())[2]
    dense = method._dense
    ids, clicked = window(0)[0]
    nn.functional.binary_cross_entropy_with_logits(dense(ids), clicked).backward()
    method.observe()
    before = method.state_dict()["importance"]
    dense.mlp[0].weight.grad[3, 3] = torch.inf
    method.observe()
    torch.testing.assert_close(method.state_dict()["importance"], before, rtol=0, atol=0)


def test_float64_scores_are_compared_in_float64():
    dense = nn.Sequential(nn.Linear(40, 25)).double()
    order = torch.randperm(1000).view(25, 40)
    with torch.no_grad():
        dense[0].weight.copy_(1 + 1e-12 * order.double())  # all equal in float32
    method = AdaptiveDenseToSparse(dense, 0.3, layers=["0"])
    assert torch.equal(dense_mask(method, "0"), order >= 700)


@pytest.mark.parametrize("other", [torch.optim.Adagrad, lambda p: torch.optim.Adam(p, amsgrad=True)])
def test_optimizers_of_two_kinds(other):
    """Before the sparse one has state: it would take the other's for its own, and miss some."""
    dense, dense_optimizers, method = build(refresh_every=1)
    method.dense_optimizers = [torch.optim.Adam(dense.parameters())]
    method.sparse_optimizers = [other(method.sparse.parameters())]
    train(dense, method.dense_optimizers, window(0))
    with pytest.raises(ValueError, match="needs optimizers of one kind"):
        method.step()
    assert method.steps == 0


def test_any_mask():
    dense, _, method = build()
    masks = {n: torch.rand_like(dense.get_submodule(n).weight) < 0.5 for n in LAYERS}
    method.refresh(masks)
    for name, mask in masks.items():
        assert torch.equal(dense_mask(method, name), mask)
        packed = method.sparse.get_submodule(name)
        torch.testing.assert_close(packed.dense_weight(), dense.get_submodule(name).weight * mask)


@pytest.mark.parametrize("options", [{}, {"relearn": True}, {"state": "carry"}], ids=str)
@pytest.mark.parametrize("sparse_table", [False, True])
def test_resume_is_exact(options, sparse_table):
    def make():
        return build(score=GradientWeighted(decay=0.9), sparse_table=sparse_table, **options)

    straight = make()
    losses, _ = run(*straight, 0, 6)
    for stop in (1, 2, 3):
        dense, dense_optimizers, method = make()
        run(dense, dense_optimizers, method, 0, stop)
        parts = [method, dense, method.sparse, *dense_optimizers, *method.sparse_optimizers]
        saved = copy.deepcopy([part.state_dict() for part in parts])
        dense, dense_optimizers, method = make()
        parts = [method, dense, method.sparse, *dense_optimizers, *method.sparse_optimizers]
        for part, state in zip(parts, saved, strict=True):
            part.load_state_dict(state)
        assert run(dense, dense_optimizers, method, stop, 6)[0] == losses[len(losses) * stop // 6 :]
        for own, wanted in ((dense, straight[0]), (method.sparse, straight[2].sparse)):
            for name, tensor in wanted.state_dict().items():
                assert torch.equal(own.state_dict()[name], tensor), (stop, name)


def test_no_dense_copy_is_made():
    """No tensor of the table's size is allocated, neither by building nor by refreshing."""
    dense = nn.Sequential(nn.Embedding(400_000, 32))
    table_bytes = 400_000 * 32 * 4

    def storages(tree):
        tensors = [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]
        return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            given = storages((args, kwargs))
            fresh = [size for at, size in storages(out).items() if at not in given]
            Watch.largest = max([Watch.largest, *fresh])
            return out

    with Watch():
        method = AdaptiveDenseToSparse(dense, 0.05, floor=0.0)
        built = Watch.largest
        method.refresh()
    assert 0.05 * table_bytes <= built and Watch.largest < table_bytes / 3, (built, Watch.largest)
    with Watch():
        dense[0].weight.detach().clone()
    assert Watch.largest == table_bytes  # the watch does see one


def test_bad_input():
    dense = clicks()
    for options, error, message in [
        (dict(budget=0.02), ValueError, "below the floor of 0.05 of each layer"),
        (dict(budget=10**6), ValueError, "budget must be at most 2592"),
        (dict(budget=1.5), ValueError, r"budget must be in \(0, 1\]"),
        (dict(budget=0), ValueError, "budget must be an int of at least 1"),
        (dict(refresh_every=-1), ValueError, "refresh_every must be"),
        (dict(floor=1.0), ValueError, r"floor must be in \[0, 1\)"),
        (dict(state="maybe"), ValueError, "state must be one of"),
        (dict(layers=["mlp.1"]), TypeError, "'mlp.1' must be one of Linear, Embedding, EmbeddingBag"),
        (dict(layers=["mlp.9"]), ValueError, "'mlp.9' is not in the model"),
        (dict(layers=None), ValueError, "nothing in the model"),
        (dict(score=lambda layer, b, e: torch.full((e - b,), torch.nan)), ValueError, "must not hold NaN"),
        (dict(score=lambda layer, b, e: torch.ones(3)), ValueError, "wanted .* scores"),
    ]:
        with pytest.raises(error, match=message):
            AdaptiveDenseToSparse(dense, **{"budget": 0.3, "layers": LAYERS, **options})
    with pytest.raises(TypeError, match="score of 'table' must be a floating tensor; got torch.int64"):
        AdaptiveDenseToSparse(
            dense, 0.3, layers=LAYERS, score=lambda layer, b, e: layer.weight[b:e].abs().long()
        )
    with pytest.raises(ValueError, match="layer '0' computes its weight"):
        AdaptiveDenseToSparse(nn.Sequential(nn.utils.spectral_norm(nn.Linear(80, 80))), 0.3)
    tied = nn.Sequential(nn.Linear(80, 80), nn.Linear(80, 80))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="'0' shares its weight: 0.weight, 1.weight"):
        AdaptiveDenseToSparse(tied, 0.3)
    with pytest.raises(ValueError, match="observe.. must be called after backward"):
        AdaptiveDenseToSparse(dense, 0.3, layers=LAYERS, score=GradientWeighted()).observe()


def test_nan_leaves_the_sparse_model():
    dense, dense_optimizers, method = build(refresh_every=1)
    run(dense, dense_optimizers, method, 0, 1)
    before = copy.deepcopy(method.sparse.state_dict())
    with torch.no_grad():
        dense.mlp[0].weight[3, 3] = torch.nan
    with pytest.raises(ValueError, match="score of 'mlp.0' must not hold NaN"):
        method.step()
    assert method.steps == 1
    assert all(torch.equal(t, before[n]) for n, t in method.sparse.state_dict().items())
    state = method.state_dict()
    with pytest.raises(ValueError, match="another budget"):
        build(budget=0.4)[2].load_state_dict(state)
    with pytest.raises(ValueError, match="counts of 'bag' must be an int"):
        method.load_state_dict({**state, "counts": {**state["counts"], "bag": 10**6}})
    with pytest.raises(ValueError, match="another score"):
        build(score=GradientWeighted(), refresh_every=1)[2].load_state_dict(state)


def _nan_on_one(rank):
    dense = clicks()
    method = AdaptiveDenseToSparse(dense, 0.3, layers=LAYERS)
    with torch.no_grad():
        dense.mlp[0].weight[0, 0] = torch.nan if rank else 1.0
    with pytest.raises(ValueError, match="must not hold NaN" if rank else "1 other rank"):
        method.step()
    return method.steps


def test_nan_on_one_rank_stops_all(tmp_path):
    assert on_two_ranks(_nan_on_one, tmp_path) == [0, 0]


def _two_ranks(rank):
    dense, dense_optimizers, method = build(score=GradientWeighted(decay=0.5))
    sparse_wrapped = nn.parallel.DistributedDataParallel(method.sparse)
    wrapped = nn.parallel.DistributedDataParallel(dense)
    for number in range(4):
        train(wrapped, dense_optimizers, window(number, seed=rank), method.observe)
        train(sparse_wrapped, method.sparse_optimizers, window(number, seed=rank))
        method.step()
    return {n: t for n, t in method.sparse.state_dict().items() if "running" not in n}


def test_ranks_agree(tmp_path):
    first, second = on_two_ranks(_two_ranks, tmp_path)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
