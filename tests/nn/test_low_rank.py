"""Low-rank layers: dense conversions, state, and torch's own sample inputs at full rank."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.testing._internal.common_methods_invocations import op_db

from recsparse_kernels.nn import (
    CrossNet,
    LowRankCross,
    LowRankCrossNet,
    LowRankEmbedding,
    LowRankEmbeddingBag,
    LowRankFields,
    LowRankLinear,
)
from recsparse_kernels.nn._factorize import choose_rank


def fields():
    return nn.ModuleList(nn.Embedding(rows, 12) for rows in (7, 30, 1))


# (dense layer, packed class, full rank, inputs)
CASES = {
    "linear": (lambda: nn.Linear(13, 9), LowRankLinear, 9, lambda: (torch.randn(5, 13),)),
    "tall linear": (lambda: nn.Linear(9, 13, bias=False), LowRankLinear, 9, lambda: (torch.randn(5, 9),)),
    "embedding": (
        lambda: nn.Embedding(40, 11),
        LowRankEmbedding,
        11,
        lambda: (torch.randint(0, 40, (5, 3)),),
    ),
    "padded embedding": (
        lambda: nn.Embedding(40, 11, padding_idx=2),
        LowRankEmbedding,
        11,
        lambda: (torch.tensor([[2, 1], [0, 2]]),),
    ),
    "bag": (
        lambda: nn.EmbeddingBag(40, 11, mode="sum"),
        LowRankEmbeddingBag,
        11,
        lambda: (torch.randint(0, 40, (9,)), torch.tensor([0, 4, 4])),
    ),
    "max bag": (
        lambda: nn.EmbeddingBag(40, 11, mode="max", padding_idx=-1),
        LowRankEmbeddingBag,
        11,
        lambda: (torch.randint(0, 40, (4, 3)),),
    ),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@cases
def test_full_rank_is_exact(case):
    make, packed_type, rank, inputs = case
    dense, args = make(), inputs()
    before = copy.deepcopy(dense.state_dict())
    packed = packed_type.from_dense(dense.eval(), rank=rank)
    assert not packed.training
    torch.testing.assert_close(packed(*args), dense(*args), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed.weight, dense.weight, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed.to_dense()(*args), packed(*args), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(before[key], value) for key, value in dense.state_dict().items())
    fresh = packed_type.from_dense(make(), rank=rank)
    fresh.load_dense_state_dict({"model." + k: v for k, v in dense.state_dict().items()}, prefix="model.")
    torch.testing.assert_close(fresh(*args), dense(*args), atol=1e-5, rtol=1e-5)
    assert packed.dense_state_dict().keys() == dense.state_dict().keys()
    with pytest.raises(ValueError, match="must have shape"):
        fresh.load_dense_state_dict({k: v[:1] for k, v in dense.state_dict().items()})


@cases
def test_truncation_is_the_best_one(case):
    """The error of the weight is that of its truncated singular values (about the mean row for tables)."""
    make, packed_type, _, _ = case
    dense = make()
    options = {} if packed_type is LowRankLinear else {"center": False}
    packed = packed_type.from_dense(dense, rank=4, **options)
    weight = dense.weight.double()
    keep = torch.ones(weight.shape[0], dtype=torch.bool)
    if getattr(dense, "padding_idx", None) is not None:
        keep[dense.padding_idx] = False
    dropped = torch.linalg.svdvals(weight[keep])[4:].norm()
    torch.testing.assert_close((packed.weight.double() - weight)[keep].norm(), dropped, rtol=1e-4, atol=1e-5)
    by_energy = packed_type.from_dense(dense, energy=0.9, **options)
    singular = torch.linalg.svdvals(weight[keep])
    assert by_energy.rank == choose_rank(singular.square(), 0.9)
    report = packed.memory_report()
    assert report.own_bytes == sum(t.numel() * 4 for t in packed.state_dict().values())
    assert report.dense_bytes == sum(t.numel() * 4 for t in dense.state_dict().values())


@cases
def test_state(case):
    make, packed_type, _, inputs = case
    packed, args = packed_type.from_dense(make(), rank=3), inputs()
    expected = packed(*args)
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(other(*args), expected)
    fresh = packed_type.from_dense(make(), rank=3)
    fresh.load_state_dict(packed.state_dict())
    assert torch.equal(fresh(*args), expected)
    wrong = {key: value[:-1] for key, value in packed.state_dict().items()}
    kept = copy.deepcopy(fresh.state_dict())
    with pytest.raises(RuntimeError, match="this layer has shape"):
        fresh.load_state_dict(wrong)
    assert all(torch.equal(kept[key], value) for key, value in fresh.state_dict().items())
    assert "rank=3" in repr(packed)
    frozen = make().requires_grad_(False)
    assert not any(p.requires_grad for p in packed_type.from_dense(frozen, rank=3).parameters())
    half = packed_type.from_dense(make().bfloat16(), rank=3)
    assert all(p.dtype == torch.bfloat16 for p in half.parameters())


def test_meta_construction():
    for layer in (
        LowRankLinear(5, 4, 2, mid_bias=True, device="meta"),
        LowRankCross(5, 2, device="meta"),
        LowRankCrossNet(5, 2, 2, device="meta"),
        LowRankEmbedding(5, 4, padding_idx=0, rank=2, mean=True, device="meta"),
        LowRankEmbeddingBag(5, 4, rank=2, device="meta"),
        LowRankFields([5, 4], 3, 2, device="meta"),
    ):
        real = layer.to_empty(device="cpu")
        real.reset_parameters()
        assert all(t.isfinite().all() for t in real.state_dict().values())


def test_init_has_the_scale_of_the_dense_layer():
    torch.manual_seed(0)
    for packed, dense in (
        (LowRankLinear(300, 200, 20), nn.Linear(300, 200)),
        (LowRankEmbedding(300, 200, rank=20), nn.Embedding(300, 200)),
        (LowRankFields([300], 200, 20), nn.Embedding(300, 200)),
    ):
        assert 0.8 < packed.weight.std() / dense.weight.std() < 1.25


def test_linear_biases_and_activations():
    layer = LowRankLinear(7, 6, 3, bias=False, mid_bias=True)
    x = torch.randn(4, 7)
    torch.testing.assert_close(layer.to_dense()(x), layer(x))
    active = LowRankLinear(7, 6, 3, mid_activation="relu", activation="silu")
    expected = nn.functional.silu(torch.relu(x @ active.down.t()) @ active.up.t() + active.bias)
    torch.testing.assert_close(active(x), expected)
    with pytest.raises(ValueError, match="no dense weight"):
        active.to_dense()
    for options, message in (
        ({"rank": 7}, r"rank must be in \[1, 6\]"),
        ({"rank": 2, "energy": 0.5}, "either rank or energy"),
        ({}, "either rank or energy"),
        ({"energy": 1.5}, r"energy must be in \(0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            LowRankLinear.from_dense(nn.Linear(7, 6), **options)
    assert LowRankLinear.from_dense(nn.Linear(64, 64), energy=0.5, multiple_of=8).rank % 8 == 0


def test_cross():
    dense = nn.Linear(9, 9)
    layer = LowRankCross.from_dense(dense, rank=9)
    x0, x = torch.randn(4, 9), torch.randn(4, 9)
    torch.testing.assert_close(layer(x0, x), x0 * dense(x) + x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.to_dense().weight, dense.weight, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="must be square"):
        LowRankCross.from_dense(nn.Linear(9, 8), rank=2)


def test_cross_net_has_the_names_of_torchrec():
    net = LowRankCrossNet(6, 3, 2)
    shapes = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    assert shapes == {
        **{f"W_kernels.{i}": (6, 2) for i in range(3)},
        **{f"V_kernels.{i}": (2, 6) for i in range(3)},
        **{f"bias.{i}": (6,) for i in range(3)},
    }
    x = expected = torch.randn(5, 6)
    for i in range(3):
        through = nn.functional.linear(nn.functional.linear(expected, net.V_kernels[i]), net.W_kernels[i])
        expected = x * (through + net.bias[i]) + expected
    torch.testing.assert_close(net(x), expected)
    dense = CrossNet(6, 3)
    nn.init.normal_(dense.bias[1])
    full = LowRankCrossNet.from_dense(dense, rank=6)
    torch.testing.assert_close(full(x), dense(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(full.to_dense()(x), dense(x), atol=1e-5, rtol=1e-5)


def test_fields():
    dense = fields()
    layer = LowRankFields.from_dense(dense, rank=12, interaction=True)
    input = torch.stack([torch.randint(0, n, (20,)) for n in (7, 30, 1)], 1)
    z, x, interaction = layer(input)
    expected = torch.stack([e(input[:, k]) for k, e in enumerate(dense)], 1)
    torch.testing.assert_close(x, expected, atol=1e-5, rtol=1e-5)
    total = expected.sum(1)
    term = 0.5 * (total.square() - expected.square().sum(1)).sum(1, keepdim=True)
    torch.testing.assert_close(interaction, term, atol=1e-4, rtol=1e-4)
    for a, b in zip(layer.to_dense(), dense, strict=True):
        torch.testing.assert_close(a.weight, b.weight, atol=1e-5, rtol=1e-5)
    linear = nn.Linear(36, 4)
    torch.testing.assert_close(
        layer.fold_linear(linear)(z.flatten(1)), linear(x.flatten(1)), atol=1e-5, rtol=1e-5
    )
    small = LowRankFields.from_dense(dense, rank=2)
    small.load_dense_state_dict(dense.state_dict())
    assert small.memory_report().dense_bytes == 38 * 12 * 4


def test_max_norm():
    dense = nn.Embedding(20, 6, max_norm=1.0)
    packed = LowRankEmbedding.from_dense(dense, rank=6)
    index = torch.tensor([1, 4, 4])
    torch.testing.assert_close(packed(index), dense(index), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed.weight, dense.weight, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="max_norm"):
        LowRankEmbedding(20, 6, max_norm=1.0, rank=2, mean=True)


def test_counts_weigh_the_error():
    torch.manual_seed(0)
    dense = nn.Embedding(50, 8)
    counts = torch.zeros(50)
    counts[:3] = 5
    layer = LowRankEmbedding.from_dense(dense, rank=2, counts=counts)
    torch.testing.assert_close(
        layer.weight[:3], dense.weight[:3], atol=1e-5, rtol=1e-5
    )  # 3 rows: 2 about a mean


def test_training_reduces_the_loss():
    torch.manual_seed(0)
    bag = LowRankEmbeddingBag(100, 16, mode="sum", sparse=True, rank=4)
    head = LowRankLinear(16, 1, 1)
    sparse, rest = [bag.table], [bag.up, *head.parameters()]
    optimizers = torch.optim.SparseAdam(sparse, lr=0.02), torch.optim.Adam(rest, lr=0.02)
    indices, target = torch.randint(0, 100, (64, 5)), torch.rand(64, 1).round()
    losses = []
    for _ in range(40):
        loss = nn.functional.binary_cross_entropy_with_logits(head(bag(indices)), target)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def samples(name):
    (info,) = (op for op in op_db if op.name == name)
    return list(itertools.islice(info.sample_inputs("cpu", torch.float32), 60))


def test_torch_samples_of_linear():
    run = 0
    for sample in samples("nn.functional.linear"):
        weight, bias = sample.args[0], sample.args[1] if len(sample.args) > 1 else None
        if weight.dim() != 2 or min(weight.shape) == 0:
            continue
        dense = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
        with torch.no_grad():
            dense.weight.copy_(weight)
            if bias is not None:
                dense.bias.copy_(bias)
        packed = LowRankLinear.from_dense(dense, rank=min(weight.shape))
        torch.testing.assert_close(packed(sample.input), dense(sample.input), atol=1e-4, rtol=1e-4)
        run += 1
    assert run > 3


def test_torch_samples_of_embedding():
    run = 0
    for sample in samples("nn.functional.embedding"):
        table, index, options = sample.input, sample.args[0], dict(sample.kwargs)
        dense = nn.Embedding(*table.shape, _weight=table.detach().clone(), **options)
        packed = LowRankEmbedding.from_dense(dense, rank=table.shape[1])
        torch.testing.assert_close(packed(index), dense(index), atol=1e-4, rtol=1e-4)
        run += 1
    assert run > 3


def test_torch_samples_of_embedding_bag():
    run = 0
    for sample in samples("nn.functional.embedding_bag"):
        table, index, options = sample.input, sample.args[0], dict(sample.kwargs)
        offsets, weights = options.pop("offsets", None), options.pop("per_sample_weights", None)
        dense = nn.EmbeddingBag(*table.shape, _weight=table.detach().clone(), **options)
        packed = LowRankEmbeddingBag.from_dense(dense, rank=table.shape[1])
        args = index, offsets, weights
        torch.testing.assert_close(packed(*args), dense(*args), atol=1e-4, rtol=1e-4)
        run += 1
    assert run > 3
