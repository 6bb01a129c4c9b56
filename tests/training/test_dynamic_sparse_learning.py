"""Dynamic Sparse Learning against the same method on a dense table with a mask, as the paper's code has it."""

import copy
import math

import pytest
import torch
from torch import nn

from recsparse_kernels.nn import MaskedEmbedding, MaskedEmbeddingBag
from recsparse_kernels.training import DynamicSparseLearning
from recsparse_kernels.training import dynamic_sparse_learning_table as table_file
from recsparse_kernels.training.dynamic_sparse_learning_scores import Gradients, GradientTap
from recsparse_kernels.training.schedules import constant, cosine

V, D = 150, 20


def dense_of(layer):
    return layer.to_dense().weight.detach().clone()


def expected_change(weight, mask, grad, fraction):
    """One update on a dense weight; the scores must have no ties."""
    count = math.ceil(fraction * int(mask.sum()))
    size = torch.where(mask, weight.abs(), torch.inf)
    dropped = torch.zeros_like(mask).view(-1)
    dropped[size.view(-1).topk(count, largest=False).indices] = True
    left = mask & ~dropped.view(mask.shape)
    score = torch.where(left, -1.0, grad.abs())
    grown = torch.zeros_like(mask).view(-1)
    grown[score.view(-1).topk(count).indices] = True
    grown = grown.view(mask.shape)
    return left | grown, torch.where(left | (grown & mask), weight, 0)


def one_update(layer, run, fraction=0.4, **options):
    """Mask and weight before, gradient of the dense weight, the change."""
    method = DynamicSparseLearning(layer, constant(fraction), 1, **options)
    before, mask = dense_of(layer), layer.mask
    weight = before.clone().requires_grad_()
    run(layer, weight)
    return mask, before, weight.grad, method.step()["layers[0]"]


USES = {
    "lookup": (
        lambda: MaskedEmbedding(V, D, padding_idx=3, density=0.3),
        lambda x, i, o, w: x(i),
        lambda x, weight, i, o, w: nn.functional.embedding(i, weight, padding_idx=3),
    ),
    "lookup by frequency": (
        lambda: MaskedEmbedding(V, D, scale_grad_by_freq=True, density=0.3),
        lambda x, i, o, w: x(i),
        lambda x, weight, i, o, w: nn.functional.embedding(i, weight, scale_grad_by_freq=True),
    ),
    "sum": (
        lambda: MaskedEmbeddingBag(V, D, mode="sum", padding_idx=3, density=0.3),
        lambda x, i, o, w: x(i, o, w),
        lambda x, weight, i, o, w: nn.functional.embedding_bag(
            i, weight, o, mode="sum", per_sample_weights=w, padding_idx=3
        ),
    ),
    "mean": (
        lambda: MaskedEmbeddingBag(V, D, mode="mean", density=0.3),
        lambda x, i, o, w: x(i, o),
        lambda x, weight, i, o, w: nn.functional.embedding_bag(i, weight, o, mode="mean"),
    ),
    "max": (
        lambda: MaskedEmbeddingBag(V, D, mode="max", density=0.3),
        lambda x, i, o, w: x(i, o),
        lambda x, weight, i, o, w: nn.functional.embedding_bag(i, weight, o, mode="max"),
    ),
    "all rows": (
        lambda: MaskedEmbedding(V, D, density=0.3),
        lambda x, i, o, w: x.all_rows(),
        lambda x, weight, i, o, w: weight * 1.0,
    ),
    "products": (
        lambda: MaskedEmbedding(V, D, density=0.3),
        lambda x, i, o, w: x.matmul_t(w[:100].view(5, D)),
        lambda x, weight, i, o, w: w[:100].view(5, D) @ weight.T,
    ),
    "propagation": (
        lambda: MaskedEmbedding(V, D, density=0.3),
        lambda x, i, o, w: x.propagate(graph()),
        lambda x, weight, i, o, w: graph().to_dense() @ weight,
    ),
}


def graph():
    generator = torch.Generator().manual_seed(5)
    kept = torch.rand(60, V, generator=generator) < 0.1
    return (kept * torch.rand(60, V, generator=generator)).to_sparse_csr()


@pytest.mark.parametrize("use", USES, ids=str)
def test_gradients_of_rows_are_those_of_the_dense_weight(use):
    torch.manual_seed(0)
    make, forward, dense_forward = USES[use]
    layer = make()
    weight = dense_of(layer).requires_grad_()
    i, o, w = torch.randint(V, (200,)), torch.tensor([0, 30, 30, 90]), torch.rand(200)
    layer.tap = GradientTap(layer)
    expected = dense_forward(layer, weight, i, o, w)
    grad = torch.randn(expected.shape)
    if use == "max":  # where nothing is kept, maxima are ties, which backward may give to any lookup
        grad *= (expected != 0).float()
    expected.backward(grad)
    output = forward(layer, i, o, w)
    torch.testing.assert_close(output, expected)
    output.backward(grad)
    found = Gradients(layer.tap.pieces, V, D, torch.float32, torch.device("cpu"))
    torch.testing.assert_close(found.of(torch.arange(V)), weight.grad, rtol=1e-4, atol=1e-5)
    some = found.touched(20, 70)
    torch.testing.assert_close(found.of(some), weight.grad[some], rtol=1e-4, atol=1e-5)
    untouched = torch.ones(V, dtype=torch.bool)
    untouched[found.touched(0, V)] = False
    assert not weight.grad[untouched].any()


@pytest.mark.parametrize("layout", ["bitmask", "row_remap"])
@pytest.mark.parametrize("density", [0.02, 0.3, 0.9])
@pytest.mark.parametrize("block", [1 << 20, 4 * D])
def test_update_is_that_of_the_masked_dense_table(layout, density, block, monkeypatch):
    monkeypatch.setattr(table_file, "BLOCK_ELEMENTS", block)
    torch.manual_seed(1)
    layer = MaskedEmbedding(V, D, density=density, layout=layout)
    grad = torch.randn(V, D)

    def run(layer, weight):
        layer.all_rows().backward(grad)
        (weight * grad).sum().backward()

    places = layer.values.data_ptr(), layer.rows.data_ptr()
    parameter = layer.values
    mask, before, gradient, change = one_update(layer, run)
    wanted_mask, wanted = expected_change(before, mask, gradient, 0.4)
    assert torch.equal(layer.mask, wanted_mask)
    assert torch.equal(dense_of(layer), wanted)
    assert layer.values is parameter and parameter.grad is None
    assert layer.nnz == int(mask.sum()) == change.kept
    assert change.dropped == math.ceil(0.4 * layer.nnz)
    assert change.returned == change.dropped - int((wanted_mask & ~mask).sum())
    if layout == "bitmask":
        assert places == (layer.values.data_ptr(), layer.rows.data_ptr())
    check = MaskedEmbedding(V, D, density=density, layout=layout)
    check.load_state_dict(layer.state_dict())  # checks that the index agrees with itself


@pytest.mark.parametrize("state", ["kept", "zeroed", "paper"])
def test_moments_move_with_their_elements(state):
    torch.manual_seed(2)
    layer = MaskedEmbedding(V, D, density=0.3)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01, amsgrad=True)
    grad = torch.randn(V, D)
    layer.all_rows().backward(grad)
    optimizer.step()
    held = optimizer.state[layer.values]

    def dense(moment):
        out = torch.zeros(V, D)
        out[layer.mask] = moment
        return out

    old = {key: dense(held[key]) for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")}
    optimizer.zero_grad()

    def run(layer, weight):
        layer.all_rows().backward(grad)
        (weight * grad).sum().backward()

    mask, before, gradient, _ = one_update(layer, run, optimizers=optimizer, optimizer_state=state)
    count = math.ceil(0.4 * layer.nnz)
    stayed = torch.zeros(V * D, dtype=torch.bool)
    stayed[torch.where(mask, before.abs(), 0).view(-1).topk(layer.nnz - count).indices] = True
    stayed = stayed.view(V, D)
    assert bool((layer.mask & mask & ~stayed).any()) and bool((layer.mask & ~mask).any())
    for key, moment in old.items():
        fresh = grad if key == "exp_avg" else grad.square()
        wanted = torch.where(mask if state != "zeroed" else stayed, moment, fresh if state == "paper" else 0)
        torch.testing.assert_close(dense(held[key]), torch.where(layer.mask, wanted, 0), rtol=0, atol=0)


def test_fused_adam_moves_too():
    torch.manual_seed(3)
    layer = MaskedEmbedding(V, D, density=0.3)
    fused = layer.fuse_optimizer("adam", lr=0.01)
    method = DynamicSparseLearning(layer, constant(0.3), 2)
    for _ in range(4):
        layer(torch.randint(V, (60,))).square().sum().backward()
        marks = fused.state.clone()
        before = layer.mask
        change = method.step()
        kept = torch.zeros(V, D)
        kept[before] = marks
        if change:
            assert torch.equal(fused.state, torch.where(layer.mask & before, kept, 0)[layer.mask])
        else:
            assert torch.equal(fused.state, marks)


@pytest.mark.parametrize("score", ["accumulate", "ema"])
@pytest.mark.parametrize("limit", [V, 40])
def test_scores_over_batches(score, limit):
    torch.manual_seed(4)
    layer = MaskedEmbedding(V, D, density=0.3)
    method = DynamicSparseLearning(
        layer, constant(0.05), 4, score=score, score_batches=3, ema_decay=0.5, candidate_rows=limit
    )
    total = torch.zeros(V, D)
    for step in range(1, 5):
        ids, grad = torch.randint(V, (60,)), torch.randn(60, D)
        mask, before = layer.mask, dense_of(layer)
        layer(ids).backward(grad)
        batch = torch.zeros(V, D).index_add(0, ids, grad)
        if score == "ema":
            total = 0.5 * total + 0.5 * batch
        elif step >= 2:
            total = total + batch
        if limit < V:
            lengths = total.square().sum(1)
            total[lengths < lengths.topk(limit).values[-1]] = 0
        changed = method.step()
        assert (changed is not None) == (step == 4)
    wanted, weight = expected_change(before, mask, total, 0.05)
    assert torch.equal(layer.mask, wanted) and torch.equal(dense_of(layer), weight)


def test_several_passes_make_one_batch():
    torch.manual_seed(5)
    layer = MaskedEmbedding(V, D, density=0.3)
    grads = torch.randn(2, V, D)

    def run(layer, weight):
        for grad in grads:
            layer.all_rows().backward(grad)
            (weight * grad).sum().backward()

    mask, before, gradient, _ = one_update(layer, run)
    torch.testing.assert_close(gradient, grads.sum(0))
    assert torch.equal(layer.mask, expected_change(before, mask, grads.sum(0), 0.4)[0])


def test_rows_without_gradient_are_filled_by_seed():
    def run(seed):
        torch.manual_seed(6)
        layer = MaskedEmbedding(V, D, padding_idx=0, density=0.3)
        method = DynamicSparseLearning(layer, constant(0.9), 1, seed=seed)
        layer(torch.arange(1, 4)).sum().backward()
        method.step()
        return layer.mask

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))
    torch.manual_seed(6)
    start = MaskedEmbedding(V, D, padding_idx=0, density=0.3).mask
    assert not bool((run(0) & ~start)[0].any())  # nothing new in the padding row
    spread = (run(0) & ~start)[4:].sum(1).float()
    assert 0.5 * spread.mean() < spread[:73].mean() < 1.5 * spread.mean()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.users = MaskedEmbedding(V, D, density=0.3)
        self.items = MaskedEmbeddingBag(V, D, density=0.5, mode="sum")
        self.top = nn.Linear(D, 1)

    def forward(self, ids):
        return self.top(self.users(ids[:, 0]) * self.items(ids)).squeeze(1)


def parts(score="last", steps=24, seed=0):
    torch.manual_seed(seed)
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    method = DynamicSparseLearning(
        model, steps, 4, optimizers=optimizer, score=score, score_batches=2, candidate_rows=50
    )
    return model, optimizer, method


def train(model, optimizer, method, begin, end):
    for step in range(begin, end):
        ids = torch.randint(V, (32, 3), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(ids) - (ids.sum(1) % 2)).square().mean().backward()
        optimizer.step()
        method.step()


@pytest.mark.parametrize("score", ["last", "accumulate", "ema"])
def test_resumes_bit_for_bit(score):
    whole = parts(score)
    train(*whole, 0, 24)
    for cut in (7, 8, 10):
        first = parts(score)
        train(*first, 0, cut)
        saved = copy.deepcopy([part.state_dict() for part in first])
        again = parts(score, seed=9)
        for part, state in zip(again, saved, strict=True):
            part.load_state_dict(state)
        train(*again, cut, 24)
        for key, value in whole[0].state_dict().items():
            assert torch.equal(again[0].state_dict()[key], value), key


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def unchanged(model, state):
    return all(
        torch.equal(value.nan_to_num(7.0), state[key].nan_to_num(7.0))
        for key, value in model.state_dict().items()
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_change_nothing(value):
    model, optimizer, method = parts()
    train(model, optimizer, method, 0, 3)
    (model(torch.randint(V, (8, 3))) * value).sum().backward()
    state = state_of(model)
    with pytest.raises(ValueError, match="finite"):
        method.step()
    assert unchanged(model, state) and method.steps == 3
    model.zero_grad()
    with torch.no_grad():
        model.items.values[5] = value
    state = state_of(model)
    model.users(torch.arange(5)).sum().backward()
    with pytest.raises(ValueError, match="items: scores must be finite"):
        method.step()
    assert unchanged(model, state)


@pytest.mark.parametrize("score", ["last", "accumulate", "ema"])
def test_goes_on_after_a_batch_that_overflowed(score):
    """As training in float16 does: the batch is skipped, and with it what it would have left in the scores."""
    one, other = parts(score), parts(score)
    for model, optimizer, method in (one, other):
        train(model, optimizer, method, 0, 3)
        if method is one[2]:
            (model(torch.randint(V, (8, 3))) * torch.inf).sum().backward()
            with pytest.raises(ValueError, match="must be finite|must not hold NaN"):
                method.step()
        train(model, optimizer, method, 3, 8)
        assert method.steps == 8
    assert torch.equal(one[0].users.mask, other[0].users.mask)


def test_scores_of_products_with_a_weight_are_those_before_its_step():
    torch.manual_seed(9)
    layer, query = MaskedEmbedding(V, D, density=0.3), nn.Parameter(torch.randn(4, D))
    optimizer = torch.optim.SGD([query], lr=100.0)
    grad = torch.randn(4, V)

    def run(layer, weight):
        (query.detach() @ weight.T).backward(grad)
        layer.matmul_t(query).backward(grad)
        optimizer.step()

    mask, before, gradient, _ = one_update(layer, run)
    assert torch.equal(layer.mask, expected_change(before, mask, gradient, 0.4)[0])


def test_misuse_is_told():
    with pytest.raises(ValueError, match="no MaskedEmbedding"):
        DynamicSparseLearning(nn.Linear(2, 2), 10, 1)
    with pytest.raises(TypeError, match="layers\\[0\\] must be a MaskedEmbedding"):
        DynamicSparseLearning([nn.Embedding(5, 4)], 10, 1)
    with pytest.raises(ValueError, match="fixed_k"):
        DynamicSparseLearning(MaskedEmbedding(5, 4, density=0.5, layout="fixed_k"), 10, 1)
    with pytest.raises(ValueError, match="unfreeze"):
        DynamicSparseLearning(MaskedEmbedding(5, 4, density=0.5).freeze(), 10, 1)
    with pytest.raises(ValueError, match="keeps nothing"):
        DynamicSparseLearning(MaskedEmbedding(5, 4, density=0.01), 10, 1)
    layer = MaskedEmbedding(5, 4, density=0.5)
    with pytest.raises(ValueError, match="twice"):
        DynamicSparseLearning([layer, layer], 10, 1)
    other = MaskedEmbedding(5, 4, density=0.5)
    other.values = layer.values
    with pytest.raises(ValueError, match="share their weight"):
        DynamicSparseLearning([layer, other], 10, 1)
    other.values = nn.Parameter(layer.values.detach().clone(), requires_grad=False)
    with pytest.raises(ValueError, match="layers\\[1\\] does not train"):
        DynamicSparseLearning([layer, other], 10, 1)
    with pytest.raises(TypeError, match="optimizers must be"):
        DynamicSparseLearning(layer, 10, 1, optimizers=layer.parameters())
    with pytest.raises(ValueError, match="score_batches"):
        DynamicSparseLearning(layer, 10, 2, score="accumulate", score_batches=3)
    for name in ("score", "regrow", "optimizer_state"):
        with pytest.raises(ValueError, match=name):
            DynamicSparseLearning(layer, 10, 2, **{name: "best"})
    method = DynamicSparseLearning(layer, 2, 1)
    with pytest.raises(RuntimeError, match="no backward pass"):
        method.step()
    assert method.steps == 0
    for _ in range(2):
        layer(torch.arange(5)).sum().backward()
        method.step()
    layer(torch.arange(5)).sum().backward()
    state = state_of(layer)
    with pytest.raises(ValueError, match="past the end"):
        method.step()
    assert unchanged(layer, state) and method.steps == 2
    method = DynamicSparseLearning(layer, constant(1.5), 1, regrow="random")
    with pytest.raises(ValueError, match="schedule gives 1.5"):
        method.step()


def test_a_checkpoint_of_another_topology_changes_nothing():
    model, optimizer, method = parts()
    train(model, optimizer, method, 0, 8)
    saved = method.state_dict()
    other = parts(seed=1)
    with pytest.raises(ValueError, match="another mask of users"):
        other[2].load_state_dict(saved)
    assert other[2].steps == 0
    other[0].load_state_dict(model.state_dict())
    other[2].load_state_dict(saved)
    assert other[2].steps == 8
    with pytest.raises(ValueError, match="another fraction"):
        constant_rate = DynamicSparseLearning(model, constant(0.1), 2).state_dict()
        DynamicSparseLearning(model, constant(0.2), 2).load_state_dict(constant_rate)
    with pytest.raises(ValueError, match="another candidate_rows"):
        DynamicSparseLearning(model, 24, 3).load_state_dict(saved)
    with pytest.raises(ValueError, match="missing"):
        method.load_state_dict({"steps": 3})


def test_a_damaged_checkpoint_changes_nothing():
    layer = MaskedEmbedding(V, D, density=0.3)
    fused = layer.fuse_optimizer("adam", lr=0.1)
    method = DynamicSparseLearning(layer, constant(0.3), 3, score="ema")
    layer(torch.arange(9)).sum().backward()
    method.step()
    saved, name = method.state_dict(), "layers[0]"
    for spoil in (
        lambda s: s.update(plan=None),
        lambda s: s.update(masks=None),
        lambda s: s.update(steps=True),
        lambda s: s["collected"][name].update(rows=s["collected"][name]["rows"] + V),
        lambda s: s["collected"][name].update(rows=s["collected"][name]["rows"].flip(0)),
        lambda s: s["collected"][name].update(grads=None),
        lambda s: s["fused"][name].pop("step"),
        lambda s: s["fused"][name].update(state=s["fused"][name]["state"][:-1]),
        lambda s: s["fused"][name].update(second_state=None),
    ):
        given = {**copy.deepcopy(saved), "steps": 7}
        given["fused"][name]["state"] += 1
        spoil(given)
        with pytest.raises(ValueError):
            method.load_state_dict(given)
        assert method.steps == 1 and torch.equal(fused.state, saved["fused"][name]["state"])


def test_names_are_those_of_the_model_inside_torch_compile():
    """Names go into checkpoints and into the draws among equal scores."""
    assert list(DynamicSparseLearning(torch.compile(Model()), 10, 1).layers) == ["users", "items"]


def test_random_regrowth_and_copies():
    torch.manual_seed(7)
    layer = MaskedEmbedding(V, D, density=0.3)
    method = DynamicSparseLearning(layer, cosine(0.5, 0.005, end_step=10), 1, regrow="random")
    before = layer.mask
    change = method.step()["layers[0]"]
    assert change.dropped == math.ceil(cosine(0.5, 0.005, end_step=10)(1) * layer.nnz)
    assert int((layer.mask & ~before).sum()) == change.dropped - change.returned > 0
    watched = DynamicSparseLearning(layer, 10, 1)
    assert layer.tap is not None and copy.deepcopy(layer).tap is None
    watched.detach()
    assert layer.tap is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    torch.manual_seed(8)
    layer = MaskedEmbedding(V, D, density=0.3, dtype=dtype)
    method = DynamicSparseLearning(layer, constant(0.3), 1)
    layer(torch.randint(V, (500,))).square().sum().backward()
    nnz = layer.nnz
    method.step()
    assert layer.nnz == nnz and layer.values.dtype == dtype
