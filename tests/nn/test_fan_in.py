"""FixedFanInLinear and FanInHead: drop-in behaviour, state, conversion, fused optimizer, rewiring."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import nn

from recsparse_kernels.nn import FanInHead, FixedFanInLinear, label_order


def positives(batch=6, labels=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 5, (batch,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return offsets, torch.randint(0, labels, (int(offsets[-1]),), generator=generator)


def multi_hot(offsets, labels, count):
    targets = torch.zeros(offsets.numel() - 1, count)
    targets[torch.arange(offsets.numel() - 1).repeat_interleave(offsets.diff()), labels] = 1
    return targets


# ---- construction and state ----


@pytest.mark.parametrize("group_size", [1, 16])
def test_initial_state(group_size):
    torch.manual_seed(1)
    layer = FixedFanInLinear(64, 500, 9, group_size=group_size)
    assert layer.packed_weight.shape == (500, 9) and isinstance(layer.packed_weight, nn.Parameter)
    assert layer.indices.shape == (-(-500 // group_size), 9) and layer.indices.dtype == torch.int16
    assert all(len(set(row)) == 9 for row in layer.indices.tolist())
    assert layer.packed_weight.abs().max() <= 1 / 3 and abs(layer.packed_weight.std() - 1 / 3 / 3**0.5) < 0.02
    assert (layer.bias == 0).all()
    torch.manual_seed(1)
    assert torch.equal(FixedFanInLinear(64, 500, 9, group_size=group_size).indices, layer.indices)
    assert not torch.equal(FixedFanInLinear(64, 500, 9, group_size=group_size).indices, layer.indices)
    assert FixedFanInLinear(40_000, 2, 3).indices.dtype == torch.int32
    assert FixedFanInLinear(8, 4, 2, False).bias is None


def test_names_and_repr():
    layer = FixedFanInLinear(64, 50, 16, group_size=16)
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert list(layer.state_dict()) == ["weight", "bias", "indices"]
    assert dict(layer.named_parameters())["weight"] is layer.packed_weight
    assert repr(layer) == (
        "FixedFanInLinear(in_features=64, out_features=50, fan_in=16, bias=True, "
        "group_size=16, sparsity=0.750)"
    )


def test_constructor_errors():
    with pytest.raises(ValueError, match=r"fan_in must be in \[1, in_features\], in_features = 8; got 9"):
        FixedFanInLinear(8, 4, 9)
    with pytest.raises(ValueError, match="group_size must be at least 1; got 0"):
        FixedFanInLinear(8, 4, 2, group_size=0)
    with pytest.raises(TypeError, match="module must be an nn.Linear; got Embedding"):
        FixedFanInLinear.from_dense(nn.Embedding(3, 4), fan_in=2)


@pytest.mark.parametrize("width", [63, 65])
def test_input_of_another_width_is_refused(width):
    """The op reads chosen columns: of a wider input it would read the first ones."""
    layer, wrong = FixedFanInLinear(64, 50, fan_in=16), torch.ones(6, width)
    layer.fuse_optimizer("sgd", lr=0.1)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    for call in (
        layer,
        lambda x: layer.loss(x, positives()),
        lambda x: layer.loss_step(x, positives()),
        lambda x: layer.topk(x, 3),
        lambda x: layer.score(x, torch.zeros(6, 2, dtype=torch.int64)),
    ):
        with pytest.raises(ValueError, match=rf"in_features = 64; got \(6, {width}\)"):
            call(wrong)
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())


def test_copies():
    layer = FixedFanInLinear(20, 30, 4, group_size=3)
    x = torch.randn(5, 20)
    wanted = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), wanted) and other.packed_weight is not layer.packed_weight
    fresh = FixedFanInLinear(20, 30, 4, group_size=3)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), wanted)
    fresh = FixedFanInLinear(20, 30, 4, group_size=3, device="meta").to_empty(device="cpu")
    fresh.load_state_dict(load_safetensors(save_safetensors(layer.state_dict())))
    assert torch.equal(fresh(x), wanted)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.packed_weight.dtype == torch.bfloat16 and half.indices.dtype == torch.int16
    assert half(x.bfloat16()).dtype == torch.bfloat16
    state = {"weight": layer.packed_weight * 2, "bias": layer.bias * 2}
    torch.testing.assert_close(torch.func.functional_call(layer, state, (x,)), 2 * wanted)
    assert torch.equal(layer(x), wanted)


def test_failed_load_changes_nothing():
    layer = FixedFanInLinear(20, 30, 4)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match=r"indices.*shape \(30, 4\).*\(30, 5\)"):
        layer.load_state_dict({**before, "weight": before["weight"] + 1, "indices": torch.zeros(30, 5)})
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())


# ---- dense and back ----


@pytest.mark.parametrize("group_size", [1, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_from_dense_and_back(bias, group_size):
    dense = nn.Linear(24, 30, bias).double().eval()
    before = copy.deepcopy(dense.state_dict())
    layer = FixedFanInLinear.from_dense(dense, fan_in=7, group_size=group_size)
    assert layer.packed_weight.dtype == torch.float64 and not layer.training
    square = torch.cat([dense.weight.detach() ** 2, torch.zeros(-30 % group_size, 24)])
    best = square.view(-1, group_size, 24).sum(1).topk(7).indices.sort().values
    assert torch.equal(layer.indices.long(), best)
    back = layer.to_dense()
    kept = back.weight != 0
    assert (kept.sum(1) == 7).all() and torch.equal(back.weight[kept], dense.weight[kept])
    again = FixedFanInLinear.from_dense(back, fan_in=7, group_size=group_size)
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.state_dict().values(), layer.state_dict().values(), strict=True)
    )
    x = torch.randn(3, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x), back(x))
    assert all(torch.equal(before[k], v) for k, v in dense.state_dict().items())
    other = FixedFanInLinear(24, 30, 7, bias, group_size=group_size).double()
    other.load_dense_state_dict({f"head.{k}": v for k, v in dense.state_dict().items()}, prefix="head.")
    assert torch.equal(other(x), layer(x))
    assert list(layer.dense_state_dict("head.")) == [f"head.{k}" for k in dense.state_dict()]
    dense.requires_grad_(False)
    assert not FixedFanInLinear.from_dense(dense, fan_in=7).packed_weight.requires_grad


def test_dense_view():
    layer = FixedFanInLinear(20, 30, 4, group_size=4)
    x = torch.randn(3, 20)
    torch.testing.assert_close(F.linear(x, layer.weight, layer.bias), layer(x))
    layer.weight.sum().backward()
    assert torch.equal(layer.packed_weight.grad, torch.ones(30, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="builds a dense copy of 400 MiB"):
            _ = FixedFanInLinear(1024, 102_400, 1, device="meta").weight


def test_memory_report():
    layer = FixedFanInLinear(768, 1000, 32)
    report = layer.memory_report()
    assert report.dense_bytes == 4 * 1000 * 769
    assert report.own_bytes == 1000 * (32 * 4 + 32 * 2 + 4) and report.optimizer_bytes == 8 * 1000 * 33
    layer.fuse_optimizer("sgd", momentum=0.9)
    assert layer.memory_report().optimizer_bytes == 4 * 1000 * 33
    layer.fuse_optimizer("sgd")
    assert layer.memory_report().optimizer_bytes == 0


# ---- training ----


@pytest.mark.parametrize("kind", ["bce", "squared_hinge"])
def test_loss_topk_score(kind):
    layer, x, (offsets, labels) = FixedFanInLinear(20, 50, 4, group_size=4), torch.randn(6, 20), positives()
    logits, targets = layer(x), multi_hot(offsets, labels, 50)
    if kind == "bce":
        wanted = F.binary_cross_entropy_with_logits(logits, targets)
    else:
        wanted = (1 - (2 * targets - 1) * logits).clamp(min=0).square().mean()
    torch.testing.assert_close(layer.loss(x, (offsets, labels), kind), wanted)
    values, best = layer.topk(x, 5)
    torch.testing.assert_close(values, logits.topk(5).values)
    torch.testing.assert_close(layer.score(x, best), values)


def test_compile_module():
    layer, x, (offsets, labels) = FixedFanInLinear(20, 50, 4), torch.randn(6, 20), positives()
    torch._dynamo.reset()

    def run(x):
        return layer(x).square().mean() + layer.loss(x, (offsets, labels))

    wanted = run(x)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), wanted)
    gradient = torch.autograd.grad(wanted, layer.packed_weight)
    torch.testing.assert_close(torch.autograd.grad(compiled(x), layer.packed_weight), gradient)


def test_fused_training_equals_the_optimizer():
    """Body in autograd, head fused: as one torch.optim.SGD over everything."""
    torch.manual_seed(0)
    body, head = nn.Linear(8, 20), FixedFanInLinear(20, 50, 4)
    fused_body, fused = copy.deepcopy(body), copy.deepcopy(head)
    update = fused.fuse_optimizer("sgd", lr=0.5, momentum=0.9)
    plain = torch.optim.SGD([*body.parameters(), *head.parameters()], lr=0.5, momentum=0.9)
    rest = torch.optim.SGD([*fused_body.parameters(), *fused.parameters()], lr=0.5, momentum=0.9)
    for step in range(4):
        x, pairs = torch.randn(6, 8), positives(seed=step)
        for parts, optimizer in (((body, head), plain), ((fused_body, fused), rest)):
            optimizer.zero_grad()
            hidden = parts[0](x).relu()
            loss = (
                parts[1].loss(hidden, pairs, reduction="batchmean")
                if step
                else parts[1](hidden).square().mean()
            )
            loss.backward()
            optimizer.step()
    assert fused.packed_weight.grad is None and update.step == 4
    for a, b in zip([*body.parameters(), *head.parameters()], [*fused_body.parameters(), *fused.parameters()],
                    strict=True):  # fmt: skip
        torch.testing.assert_close(a, b)
    kept = fused.packed_weight.clone()
    fused.eval()
    fused.loss(hidden.detach().requires_grad_(), pairs).backward()  # evaluation leaves the weights alone
    assert torch.equal(fused.packed_weight, kept) and fused.packed_weight.grad is not None
    restored = fused.train().fuse_optimizer("sgd", lr=0.5, momentum=0.9)
    restored.load_state_dict(update.state_dict())
    assert restored.step == 4 and torch.equal(restored.state[0], update.state[0])


def test_fused_training_compiles_with_graph_breaks():
    head, x, pairs = FixedFanInLinear(20, 50, 4), torch.randn(6, 20, requires_grad=True), positives()
    other, y = copy.deepcopy(head), x.detach().clone().requires_grad_()
    for layer in (head, other):
        layer.fuse_optimizer("sgd", lr=0.5)
    torch._dynamo.reset()
    head.loss(x, pairs).backward()
    torch.compile(lambda y: other.loss(y, pairs), backend="aot_eager")(y).backward()
    torch.testing.assert_close(y.grad, x.grad)
    torch.testing.assert_close(other.packed_weight, head.packed_weight)


def test_loss_step():
    head, x, pairs = FixedFanInLinear(20, 50, 4), torch.randn(6, 20), positives()
    with pytest.raises(ValueError, match="call fuse_optimizer first"):
        head.loss_step(x, pairs)
    head.fuse_optimizer("adamw", lr=0.05)
    first, grad = head.loss_step(x, pairs)
    assert grad.shape == x.shape
    for _ in range(30):
        last, _ = head.loss_step(x, pairs)
    assert last < 0.5 * first


def test_fused_under_autocast():
    head, x, pairs = FixedFanInLinear(20, 50, 4), torch.randn(6, 20), positives()
    head.fuse_optimizer("sgd", lr=0.5)
    before = head.packed_weight.detach().clone()
    with torch.autocast("cpu", torch.bfloat16):
        hidden = F.linear(x, torch.eye(20, requires_grad=True))
        loss = head.loss(hidden, pairs)
    loss.backward()
    assert hidden.dtype == torch.bfloat16 and head.packed_weight.dtype == torch.float32
    assert not torch.equal(head.packed_weight, before)


def test_rewire_resets_optimizer_slots():
    torch.manual_seed(0)
    layer, x, pairs = FixedFanInLinear(20, 50, 4), torch.randn(6, 20), positives()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    layer.loss(x, pairs).backward()
    optimizer.step()
    moments = optimizer.state[layer.packed_weight]["exp_avg"]
    storage, before = layer.packed_weight.data_ptr(), layer.indices.clone()
    assert layer.rewire(fraction=0.2, seed=3) == 40 and (moments != 0).all()
    assert layer.packed_weight.data_ptr() == storage and int((layer.packed_weight == 0).sum()) == 40
    assert 30 <= int((layer.indices != before).sum()) <= 40  # a draw may give an input back
    assert layer.rewire(fraction=0.3, optimizer=optimizer, reset_state=True, init="random") == 60
    assert int((moments == 0).sum()) == 60
    assert layer.rewire(threshold=0.0) == 0
    layer.fuse_optimizer("adam")
    layer.loss(x, pairs).backward()
    layer.rewire(fraction=0.5, scope="row", reset_state=True)
    assert ((layer.update.state[0] == 0).sum(1) == 2).all()
    with pytest.raises(ValueError, match="init must be 'zero' or 'random'; got 'ones'"):
        layer.rewire(fraction=0.1, init="ones")


# ---- head ----


@pytest.mark.parametrize("kind", ["bce", "squared_hinge"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
@pytest.mark.parametrize("dense_labels", [0, 7, 50])
def test_head_equals_its_logits(dense_labels, reduction, kind):
    torch.manual_seed(0)
    order = torch.randperm(50)
    head = FanInHead(12, 50, 5, group_size=4, intermediate=20, dense_labels=dense_labels, label_order=order)
    x, (offsets, labels) = torch.randn(6, 12), positives()
    logits, targets = head(x), multi_hot(offsets, labels, 50)
    if kind == "bce":
        terms = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    else:
        terms = (1 - (2 * targets - 1) * logits).clamp(min=0).square()
    wanted = terms.sum() / {"mean": 300, "sum": 1, "batchmean": 6}[reduction]
    loss = head.loss(x, (offsets, labels), kind, reduction)
    torch.testing.assert_close(loss, wanted)
    for a, b in zip(*(torch.autograd.grad(t, head.parameters(), allow_unused=True) for t in (loss, wanted)),
                    strict=True):  # fmt: skip
        torch.testing.assert_close(a, b)
    values, best = head.topk(x, 9)
    torch.testing.assert_close(values, logits.topk(9).values)
    torch.testing.assert_close(logits.gather(1, best), values)
    candidates = torch.randint(0, 50, (6, 8))
    torch.testing.assert_close(head.score(x, candidates), logits.gather(1, candidates))
    hidden = head.intermediate(x)
    place = torch.empty(50, dtype=torch.int64)
    place[order] = torch.arange(50)
    parts = [head.sparse(hidden)] if head.dense is None else [head.dense(hidden), head.sparse(hidden)]
    assert torch.equal(torch.cat(parts, 1)[:, place], logits)
    assert head.rewire(fraction=0.5) == round(0.5 * 5 * -(-(50 - dense_labels) // 4) + 1e-9)


def test_head_state_and_errors():
    head = FanInHead(12, 50, 5, dense_labels=5)
    other = FanInHead(12, 50, 5, dense_labels=5, label_order=torch.randperm(50))
    other.load_state_dict(head.state_dict())
    x = torch.randn(3, 12)
    assert torch.equal(head(x), other(x))
    with pytest.raises(ValueError, match="label_order must be a permutation of the 50 labels"):
        FanInHead(12, 50, 5, label_order=torch.zeros(50))
    with pytest.raises(ValueError, match=r"dense_labels must be in \[0, out_features = 50\]; got 51"):
        FanInHead(12, 50, 5, dense_labels=51)
    with pytest.raises(ValueError, match="activation must be one of"):
        FanInHead(12, 50, 5, activation="tan")
    with pytest.raises(IndexError, match=r"labels must be in \[0, 50\)"):
        head.loss(x, (torch.tensor([0, 1, 1, 1]), torch.tensor([50])))
    with pytest.raises(ValueError, match="offsets must have shape"):
        head.loss(x, (torch.tensor([0, 1]), torch.tensor([5])))
    with pytest.raises(ValueError, match="offsets must start at 0, never decrease"):
        head.loss(x, (torch.tensor([0, 2, 1, 1]), torch.tensor([5])))
    with pytest.raises(IndexError, match=r"candidates must be in \[0, 50\)"):
        head.score(x, torch.full((3, 1), -1))


def test_label_order():
    counts = torch.tensor([5, 1, 9, 7, 3, 3])
    assert label_order(counts).tolist() == [2, 3, 0, 4, 5, 1]
    torch.manual_seed(0)
    centres = F.normalize(torch.randn(8, 16), dim=1)
    member = torch.arange(64) % 8
    embeddings = centres[member] + 0.02 * torch.randn(64, 16)
    order = label_order(torch.arange(64), dense_labels=0, embeddings=embeddings, group_size=8)
    assert sorted(order.tolist()) == list(range(64))
    assert all(len(set(member[order[i : i + 8]].tolist())) == 1 for i in range(0, 64, 8))
    with_head = label_order(torch.arange(64), dense_labels=10, embeddings=embeddings, group_size=8)
    assert with_head[:10].tolist() == list(range(63, 53, -1)) and sorted(with_head.tolist()) == list(
        range(64)
    )
