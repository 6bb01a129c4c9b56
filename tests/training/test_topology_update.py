"""Rewiring of fixed fan-in layers: SET, RigL against a dense gradient, clusters, resume, two ranks, misuse."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from recsparse_kernels.nn import FanInHead, FixedFanInLinear
from recsparse_kernels.training import ClusterObjective, TopologyUpdate, cluster_labels, share_inputs
from recsparse_kernels.training import topology_update_gradient as gradient_file
from recsparse_kernels.training.schedules import constant, cosine

from .ranks import on_two_ranks

I, O, F, B = 24, 50, 6, 8


def positives(batch=B, labels=O, seed=0):
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 4, (batch,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return offsets, torch.randint(labels, (int(offsets[-1]),), generator=generator)


def state_of(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def unchanged(module, state):
    return all(
        torch.equal(value.nan_to_num(9.0), state[key].nan_to_num(9.0))
        for key, value in module.state_dict().items()
    )


@pytest.mark.parametrize("group_size", [1, 4])
def test_set_drops_the_smallest_and_draws_inputs(group_size):
    torch.manual_seed(0)
    layer = FixedFanInLinear(I, O, F, group_size=group_size)
    optimizer = torch.optim.Adam(layer.parameters())
    layer.loss(torch.randn(B, I), positives()).backward()
    optimizer.step()
    weight, indices = layer.packed_weight.detach().clone(), layer.indices.clone()
    moments = optimizer.state[layer.packed_weight]["exp_avg"]
    before = moments.clone()
    for reset in (False, True):
        trial = copy.deepcopy(layer)
        own = torch.optim.Adam(trial.parameters())
        own.load_state_dict(optimizer.state_dict())
        method = TopologyUpdate(
            trial, update_every=2, end_step=4, drop_fraction=0.2, reset_state=reset, optimizers=own
        )
        assert method.step() is None and torch.equal(trial.indices, indices)
        rewired = method.step()["layers[0]"]
        assert rewired == round(0.2 * indices.numel())
        moved = trial.packed_weight == 0
        rows = moved[::group_size]
        assert int(rows.sum()) == rewired
        assert torch.equal(trial.packed_weight[~moved], weight[~moved])
        assert torch.equal(trial.indices[~rows], indices[~rows])
        assert all(len(set(row.tolist())) == F for row in trial.indices)
        kept = own.state[trial.packed_weight]["exp_avg"]
        assert torch.equal(kept, before.masked_fill(moved, 0) if reset else before)
        method.step()
        last = method.step()["layers[0]"]
        assert last == rewired
        state = state_of(trial)
        for _ in range(4):  # past the last rewiring, training goes on
            assert method.step() is None
        assert unchanged(trial, state)


def test_threshold_schedule_as_the_paper():
    torch.manual_seed(1)
    layer = FixedFanInLinear(I, O, F)
    method = TopologyUpdate(
        layer, update_every=1, end_step=9, drop_threshold=cosine(0.2, 1e-4, end_step=9), allow_duplicates=True
    )
    small = int((layer.packed_weight.abs() < cosine(0.2, 1e-4, end_step=9)(1)).sum())
    assert method.step()["layers[0]"] == small > 0


def dense_gradient(layer, x, where, kind, use):
    weight = layer.dense_weight().detach().requires_grad_()
    logits = x @ weight.T + layer.bias.detach()
    if use == "linear":
        (logits.sin()).sum().backward()
        return weight.grad
    offsets, labels = where
    targets = torch.zeros_like(logits)
    targets[torch.arange(len(x)).repeat_interleave(offsets.diff()), labels] = 1
    if kind == "bce":
        loss = nn.functional.binary_cross_entropy_with_logits(logits, targets)
    else:
        loss = (1 - (2 * targets - 1) * logits).clamp(min=0).square().mean()
    loss.backward()
    return weight.grad


@pytest.mark.parametrize("use", ["linear", "bce", "squared_hinge", "step"])
@pytest.mark.parametrize("group_size", [1, 4])
@pytest.mark.parametrize("scope", ["layer", "row", "threshold"])
def test_rigl_takes_the_largest_gradients(use, group_size, scope, monkeypatch):
    monkeypatch.setattr(gradient_file, "BLOCK_ELEMENTS", 7 * I * group_size)
    torch.manual_seed(2)
    layer = FixedFanInLinear(I, O, F, group_size=group_size)
    x, where = torch.randn(B, I), positives()
    options = {"drop_threshold": 0.2} if scope == "threshold" else {"drop_fraction": 0.3, "scope": scope}
    method = TopologyUpdate(layer, update_every=1, end_step=5, regrow="gradient", **options)
    if use == "linear":
        layer(x).sin().sum().backward()
    elif use == "step":
        layer.fuse_optimizer("sgd", lr=0.0)
        layer.loss_step(x, where)
    else:
        layer.loss(x, where, kind=use).backward()
    kind = "bce" if use == "step" else use
    dense = dense_gradient(layer, x, where, kind, "linear" if use == "linear" else "loss")
    rows = layer.indices.shape[0]
    padded = nn.functional.pad(dense, (0, 0, 0, rows * group_size - O)).view(rows, group_size, I)
    score = padded.square().sum(1).sqrt()
    weight, indices = layer.packed_weight.detach().clone(), layer.indices.long().clone()
    size = nn.functional.pad(weight, (0, 0, 0, rows * group_size - O)).view(rows, group_size, F)
    members = torch.tensor([min(group_size, O - group_size * r) for r in range(rows)])
    size = (size.square().sum(1) / members.unsqueeze(1)).sqrt()
    if scope == "threshold":
        dropped = size < 0.2
    elif scope == "row":
        dropped = size <= size.sort(1).values[:, round(0.3 * F) - 1 : round(0.3 * F)]
    else:
        dropped = size <= size.flatten().sort().values[round(0.3 * rows * F) - 1]
    moved = method.step()["layers[0]"]
    new = layer.indices.long()
    fresh = 0
    for row in range(rows):
        kept = set(indices[row, ~dropped[row]].tolist())
        free = torch.tensor([i for i in range(I) if i not in kept])
        best = free[score[row, free].topk(int(dropped[row].sum())).indices]
        assert set(new[row].tolist()) == kept | set(best.tolist())
        same = new[row] == indices[row]
        assert bool(same[~dropped[row]].all())
        fresh += int((~same).sum())
        labels = slice(row * group_size, min(O, (row + 1) * group_size))
        assert torch.equal(
            layer.packed_weight[labels], weight[labels].masked_fill(~same.expand_as(weight[labels]), 0)
        )
    assert moved == fresh > 0


class Net(nn.Module):
    def __init__(self, fused=None):
        super().__init__()
        self.encoder = nn.Linear(10, I)
        self.head = FanInHead(I, O, F, intermediate=32, dense_labels=5, group_size=2)
        if fused:
            self.head.sparse.fuse_optimizer(fused, lr=0.05)

    def forward(self, x, where):
        return self.head.loss(torch.relu(self.encoder(x)), where)


def parts(fused=None, seed=0, **options):
    torch.manual_seed(seed)
    net = Net(fused)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    method = TopologyUpdate(net, update_every=3, end_step=20, optimizers=optimizer, **options)
    return net, optimizer, method


def train(net, optimizer, method, begin, end):
    for step in range(begin, end):
        x = torch.randn(B, 10, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(x, positives(seed=step)).backward()
        optimizer.step()
        method.step()


@pytest.mark.parametrize(
    "options",
    [
        {"drop_fraction": 0.2},
        {"fused": "adam", "drop_threshold": cosine(0.1, 1e-4, end_step=20), "reset_state": True},
        {"drop_fraction": cosine(0.3, end_step=20), "regrow": "gradient"},
    ],
    ids=["set", "fused", "rigl"],
)
def test_resumes_bit_for_bit(options):
    whole = parts(**options)
    train(*whole, 0, 24)
    for cut in (5, 6):
        first = parts(**options)
        train(*first, 0, cut)
        saved = copy.deepcopy([part.state_dict() for part in first])
        again = parts(**options, seed=5)
        for part, state in zip(again, saved, strict=True):
            part.load_state_dict(state)
        train(*again, cut, 24)
        for key, value in whole[0].state_dict().items():
            assert torch.equal(again[0].state_dict()[key], value), key


@pytest.mark.parametrize("regrow", ["random", "gradient"])
def test_not_finite_changes_nothing(regrow):
    net, optimizer, method = parts(drop_fraction=0.3, regrow=regrow)
    train(net, optimizer, method, 0, 2)
    net(torch.randn(B, 10), positives()).backward()
    with torch.no_grad():
        net.head.sparse.packed_weight[3, 2] = torch.nan
    state = state_of(net)
    with pytest.raises(ValueError, match="head.sparse: weights must be finite; got 1"):
        method.step()
    assert unchanged(net, state) and method.steps == 2
    if regrow == "gradient":
        with torch.no_grad():
            net.head.sparse.packed_weight[3, 2] = 0
        net(torch.randn(B, 10) * torch.inf, positives()).backward()
        state = state_of(net)
        with pytest.raises(ValueError, match="gradients must be finite"):
            method.step()
        assert unchanged(net, state)
        net(torch.randn(B, 10), positives()).backward()  # that batch is forgotten
        assert method.step()


def test_misuse_is_told():
    layer = FixedFanInLinear(I, O, F)
    given = {"update_every": 1, "end_step": 3}
    with pytest.raises(ValueError, match="either"):
        TopologyUpdate(layer, **given)
    with pytest.raises(ValueError, match="either"):
        TopologyUpdate(layer, **given, drop_fraction=0.1, drop_threshold=0.1)
    with pytest.raises(ValueError, match="drop_fraction"):
        TopologyUpdate(layer, **given, drop_fraction=1.5)
    with pytest.raises(TypeError, match="drop_threshold must be a number or a schedule"):
        TopologyUpdate(layer, **given, drop_threshold="0.1")
    with pytest.raises(TypeError, match="optimizers must be"):
        TopologyUpdate(layer, **given, drop_fraction=0.1, optimizers=[torch.zeros(1)])
    with pytest.raises(ValueError, match="does not train"):
        TopologyUpdate(copy.deepcopy(layer).requires_grad_(False), **given, drop_fraction=0.1)
    other = FixedFanInLinear(I, O, F)
    other._parameters["weight"] = layer.packed_weight
    with pytest.raises(ValueError, match="share their weight"):
        TopologyUpdate([layer, other], **given, drop_fraction=0.1)
    with pytest.raises(ValueError, match="too large for regrow"):
        TopologyUpdate(layer, **given, drop_fraction=0.1, regrow="gradient", max_dense_elements=100)
    with pytest.raises(ValueError, match="regrow"):
        TopologyUpdate(layer, **given, drop_fraction=0.1, regrow="best")
    with pytest.raises(TypeError, match="must be a FixedFanInLinear"):
        TopologyUpdate({"head": nn.Linear(3, 3)}, **given, drop_fraction=0.1)
    with pytest.raises(ValueError, match="no FixedFanInLinear"):
        TopologyUpdate(nn.Sequential(nn.Linear(3, 3)), **given, drop_fraction=0.1)
    with pytest.raises(ValueError, match="twice"):
        TopologyUpdate([layer, layer], **given, drop_fraction=0.1)
    method = TopologyUpdate(layer, **given, drop_fraction=cosine(0.3, end_step=2))
    method.step(), method.step()
    state = state_of(layer)
    with pytest.raises(ValueError, match="past the end"):
        method.step()
    assert unchanged(layer, state) and method.steps == 2
    method = TopologyUpdate(layer, **given, drop_fraction=constant(2.0))
    with pytest.raises(ValueError, match="schedule gives 2"):
        method.step()
    method = TopologyUpdate(layer, **given, drop_fraction=0.1, regrow="gradient")
    with pytest.raises(RuntimeError, match="no backward pass"):
        method.step()
    assert layer.tap is not None and copy.deepcopy(layer).tap is None
    assert pickle.loads(pickle.dumps(layer)).tap is None
    method.detach()
    assert layer.tap is None


def test_a_checkpoint_of_another_topology_changes_nothing():
    first, other = parts(drop_fraction=0.2), parts(drop_fraction=0.2, seed=1)
    train(*first, 0, 4)
    with pytest.raises(ValueError, match="other inputs of head.sparse"):
        other[2].load_state_dict(first[2].state_dict())
    assert other[2].steps == 0
    with pytest.raises(ValueError, match="another drop_fraction"):
        parts(drop_fraction=0.3)[2].load_state_dict(first[2].state_dict())


def test_a_damaged_checkpoint_changes_nothing():
    net, optimizer, method = parts(fused="adam", drop_fraction=0.2)
    train(net, optimizer, method, 0, 2)
    update, saved, name = net.head.sparse.update, method.state_dict(), "head.sparse"
    before = [moment.clone() for moment in update.state]
    for spoil in (
        lambda s: s.update(inputs=None),
        lambda s: s.update(fused=None),
        lambda s: s["fused"][name].pop("step"),
        lambda s: s["fused"][name].update(step=None),
        lambda s: s["fused"][name].pop("state"),
        lambda s: s["fused"][name]["state"].pop(),
        lambda s: s["fused"][name].update(state=[m.double() for m in s["fused"][name]["state"]]),
        lambda s: s["fused"][name].update(state=[1, 2, 3, 4]),
    ):
        given = {**copy.deepcopy(saved), "steps": 1}
        spoil(given)
        with pytest.raises(ValueError):
            method.load_state_dict(given)
        assert method.steps == 2 and update.step == 2
        assert all(torch.equal(a, b) for a, b in zip(update.state, before, strict=True))
    states = [parts(drop_fraction=constant(share))[2].state_dict() for share in (0.2, 0.3)]
    with pytest.raises(ValueError, match="another drop_fraction"):
        parts(drop_fraction=constant(0.2))[2].load_state_dict(states[1])


def test_scores_of_an_input_that_is_a_weight_are_those_before_its_step():
    torch.manual_seed(5)
    layer, query = FixedFanInLinear(I, O, F), nn.Parameter(torch.randn(B, I))
    other = copy.deepcopy(layer)
    optimizer, grad = torch.optim.SGD([query], lr=100.0), torch.randn(B, O)
    for each in (other, layer):
        method = TopologyUpdate(each, update_every=1, end_step=2, drop_fraction=0.4, regrow="gradient")
        query.grad = None
        each(query).backward(grad)
        if each is layer:
            optimizer.step()
        method.step()
    assert torch.equal(layer.indices, other.indices)


def test_cluster_objective():
    torch.manual_seed(3)
    clusters = torch.arange(O) // 10
    objective = ClusterObjective(I, clusters, cosine(0.4, end_step=10))
    hidden, where = torch.randn(B, I), positives()
    main = torch.tensor(2.0)
    targets = torch.zeros(B, 5)
    targets[torch.arange(B).repeat_interleave(where[0].diff()), clusters[where[1]]] = 1
    auxiliary = nn.functional.binary_cross_entropy_with_logits(objective.head(hidden), targets)
    torch.testing.assert_close(objective(0, main, hidden, where), 0.6 * main + 0.4 * auxiliary)
    torch.testing.assert_close(objective(5, main, hidden, where), 0.8 * main + 0.2 * auxiliary)
    assert objective(10, main, hidden, where) is main
    optimizer = torch.optim.Adam([*objective.parameters(), nn.Parameter(torch.zeros(1))])
    objective(0, main, hidden, where).backward()
    optimizer.step()
    objective.drop(optimizer)
    assert len(optimizer.param_groups[0]["params"]) == 1 and not optimizer.state
    assert not list(objective.parameters()) and objective(0, main, hidden, where) is main
    again = ClusterObjective(I, clusters, cosine(0.4, end_step=10))
    again.load_state_dict(objective.state_dict())
    assert again.head is None
    state = ClusterObjective(I, clusters, constant(0.1)).state_dict()
    for foreign in (
        {"other": torch.zeros(1)},
        {key: value for key, value in state.items() if key != "head.weight"},
        {"clusters": clusters[:-1]},
    ):
        whole = ClusterObjective(I, clusters, constant(0.1))
        with pytest.raises(RuntimeError, match="head.weight"):
            whole.load_state_dict(foreign)
        assert whole.head is not None
    for offsets in (where[0][:-1], where[0].flip(0), where[0] + 1):
        with pytest.raises(ValueError, match="offsets must"):
            whole.loss(hidden, (offsets, where[1]))
        with pytest.raises(ValueError, match="offsets must"):
            FanInHead(I, O, F, dense_labels=3).loss(hidden, (offsets, where[1]))
    with pytest.raises(TypeError, match="weight must be a schedule"):
        ClusterObjective(I, clusters, 0.1)
    with pytest.raises(IndexError, match="labels must be in"):
        ClusterObjective(I, clusters, constant(0.1)).loss(hidden, (where[0], where[1] + O))
    with pytest.raises(ValueError, match="clusters must be"):
        ClusterObjective(I, clusters.float(), constant(0.1))


def test_clusters_of_like_labels():
    torch.manual_seed(4)
    centre = torch.randn(5, 16)
    kind = torch.randperm(50) % 5
    clusters = cluster_labels(centre[kind] + 0.05 * torch.randn(50, 16), 10)
    assert torch.equal(clusters.bincount(), torch.full((5,), 10))
    pure = sum(int(kind[clusters == c].bincount().max()) for c in range(5))
    assert pure > 35
    with pytest.raises(ValueError, match="embeddings holds NaN"):
        cluster_labels(torch.full((5, 2), torch.nan), 2)
    with pytest.raises(ValueError, match="embeddings must have shape"):
        cluster_labels(torch.randn(5), 2)


def on_rank(rank):
    results = []
    for regrow in ("random", "gradient"):
        torch.manual_seed(rank)
        net = Net()
        share_inputs(net)
        wrapped = DistributedDataParallel(net)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        method = TopologyUpdate(wrapped, update_every=2, end_step=20, drop_fraction=0.3, regrow=regrow)
        for step in range(6):
            x = torch.randn(B, 10, generator=torch.Generator().manual_seed(10 * step + rank))
            optimizer.zero_grad()
            wrapped(x, positives(seed=10 * step + rank)).backward()
            optimizer.step()
            if regrow == "gradient" and step == 3 and rank == 1:  # what only one rank saw stops all
                net.head.sparse.tap.pieces[0].grad.fill_(torch.inf)
            try:
                method.step()
            except ValueError as error:
                assert step == 3 and ("1 other rank" in str(error)) == (rank == 0)
        assert method.steps == (6 if regrow == "random" else 5)
        results.append(
            [t.detach().clone().numpy() for t in (net.head.sparse.indices, net.head.sparse.packed_weight)]
        )
    with torch.no_grad():
        net.head.sparse.packed_weight[0, 0] += rank
    method = TopologyUpdate(net, update_every=1, end_step=2, drop_fraction=0.3)
    state = state_of(net)
    try:
        method.step()
    except RuntimeError as error:
        return results, str(error), unchanged(net, state)
    return results, "no error", True


def test_two_ranks(tmp_path):
    (first, text, same), (second, other_text, other_same) = on_two_ranks(on_rank, tmp_path)
    for (indices, weight), (other_indices, other_weight) in zip(first, second, strict=True):
        assert (indices == other_indices).all() and (weight == other_weight).all()
    assert "no longer hold equal" in text and "no longer hold equal" in other_text and same and other_same
