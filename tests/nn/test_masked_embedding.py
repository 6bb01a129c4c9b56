"""MaskedEmbedding and MaskedEmbeddingBag: drop-ins whose state is packed."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.testing._internal.common_methods_invocations import op_db

from recsparse_kernels.nn.masked_embedding import MaskedEmbedding, MaskedEmbeddingBag
from recsparse_kernels.ops import masked_embedding_table as tables
from recsparse_kernels.ops.masked_embedding import (
    masked_embedding,
    masked_embedding_bag,
    masked_embedding_pack,
)

LAYOUTS = tables.LAYOUTS
both = pytest.mark.parametrize("cls", [MaskedEmbedding, MaskedEmbeddingBag])
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def make(cls, V=100, D=20, **options):
    torch.manual_seed(0)
    return cls(V, D, **options)


def inputs(V=100):
    return torch.randint(V, (6, 5), generator=torch.Generator().manual_seed(1))


@both
@layouts
def test_from_dense_and_back(cls, layout):
    torch.manual_seed(0)
    dense = cls.dense_type(100, 20, padding_idx=3).to(torch.bfloat16).eval()
    own = cls.from_dense(dense, density=0.25, layout=layout)
    assert own.nnz == 500 and own.layout == layout and own.values.dtype == torch.bfloat16
    assert not own.training and own.padding_idx == 3
    mask = own.mask
    assert torch.equal(own.weight, dense.weight * mask)
    back = own.to_dense()
    assert type(back) is cls.dense_type and torch.equal(back.weight, dense.weight * mask)
    assert back.padding_idx == 3 and not back.training
    assert torch.equal(own(inputs()), back(inputs())) or torch.allclose(
        own(inputs()), back(inputs()), atol=2e-2
    )
    again = cls.from_dense(back, mask=mask, layout=layout)
    assert torch.equal(again.values, own.values) and torch.equal(again.rows, own.rows)


@both
def test_from_dense_masks(cls):
    dense = cls.dense_type(30, 8)
    mask = torch.rand(30, 8) < 0.5
    assert torch.equal(cls.from_dense(dense, mask=mask).mask, mask)
    assert cls.from_dense(dense).nnz == 240  # nothing is 0
    prune.random_unstructured(dense, "weight", 0.5)
    assert torch.equal(cls.from_dense(dense).mask, dense.weight_mask.bool())
    frozen = cls.dense_type(30, 8)
    frozen.weight.requires_grad_(False)
    assert not cls.from_dense(frozen, density=0.5).values.requires_grad
    kept = cls.from_dense(frozen, density=0.5)
    assert frozen.weight[kept.mask].abs().min() >= frozen.weight[~kept.mask].abs().max()
    with pytest.raises(ValueError, match="not both"):
        cls.from_dense(frozen, density=0.5, mask=mask)
    with pytest.raises(TypeError, match="nn.Embedding"):
        cls.from_dense(nn.Linear(3, 3), density=0.5)


@layouts
@both
def test_random_start(cls, layout):
    own = make(cls, padding_idx=-1, density=0.2, layout=layout)
    assert own.nnz == round(0.2 * 100 * 20) and own.density == pytest.approx(0.2)
    assert torch.equal(own.values, make(cls, padding_idx=-1, density=0.2, layout=layout).values)
    assert own.padding_idx == 99 and not own.weight[99].any() and own.weight[:99].any()
    assert [name for name, _ in own.named_parameters()] == ["values"]
    assert "density=0.2" in repr(own) and layout in repr(own)


def test_training_is_packed():
    own = make(MaskedEmbeddingBag, mode="sum")
    optimizer = torch.optim.Adam(own.parameters())
    own(inputs()).square().sum().backward()
    assert own.values.grad.shape == own.values.shape
    optimizer.step()
    report = own.memory_report(optimizer)
    assert report.dense_bytes == 100 * 20 * 4
    assert report.own_bytes == 400 * 4 + 100 * (3 + 4) + 8
    assert report.ratio == report.own_bytes / report.dense_bytes
    assert report.optimizer_bytes <= 2 * 4 * own.nnz + 4  # and the step count
    own.fuse_optimizer("rowwise_adagrad", 0.1)
    assert own.memory_report().optimizer_bytes == 100 * 4


@pytest.mark.parametrize("kind", ["sgd", "rowwise_adagrad", "adam"])
def test_fused_optimizer_trains(kind):
    own = make(MaskedEmbeddingBag, mode="sum")
    target = torch.randn(6, 20)
    fused = own.fuse_optimizer(kind, 0.05)
    losses = []
    for _ in range(20):
        loss = (own(inputs()) - target).square().mean()
        loss.backward()
        losses.append(loss.item())
    assert own.values.grad is None and fused.step == 20
    assert losses[-1] < losses[0] and torch.isfinite(own.values).all()


@both
@layouts
def test_repack_in_place(cls, layout):
    own = make(cls, layout=layout)
    optimizer = torch.optim.Adam(own.parameters())
    own(inputs()).square().sum().backward()
    optimizer.step()
    own.fuse_optimizer("adam", 0.1)
    parameter, address, weight = own.values, own.values.data_ptr(), own.weight.detach().clone()
    moment = optimizer.state[parameter]["exp_avg"]
    dense_moment = torch.zeros(100, 20)
    dense_moment[own.mask] = moment.flatten()
    if layout == "fixed_k":
        mask = tables.row_magnitude_mask(torch.rand(100, 20), 4)
    else:
        bits = tables.random_mask_bits(100, 20, 0.2, "bitmask")
        mask = tables.unpack_bits(bits, 20)
    own.repack(mask, optimizer)
    assert own.values is parameter and own.values.data_ptr() == address
    assert torch.equal(own.weight, weight * mask) and torch.equal(own.mask, mask)
    assert torch.equal(optimizer.state[parameter]["exp_avg"].flatten(), dense_moment[mask])
    assert own.fused.state.shape == own.values.shape
    if layout != "fixed_k":
        fewer = mask & (torch.rand(100, 20) < 0.5)
        own.repack(tables.pack_bits(fewer))
        assert own.values is parameter and own.nnz == int(fewer.sum())
        own.fused = None
        own(inputs()).sum().backward()


def test_whole_table():
    own = make(MaskedEmbedding)
    x = torch.randn(3, 2, 20)
    torch.testing.assert_close(own.matmul_t(x), x @ own.weight.T)
    adjacency = (torch.rand(9, 100) < 0.1).float().to_sparse_csr()
    torch.testing.assert_close(own.propagate(adjacency), adjacency.to_dense() @ own.weight)
    assert torch.equal(own.all_rows(), own.weight)
    own.all_rows().sum().backward()
    assert torch.equal(own.values.grad, torch.ones_like(own.values))


@both
@layouts
def test_freeze(cls, layout):
    own = make(cls, padding_idx=3, layout=layout).to(torch.bfloat16)
    weight, out, nnz, values = (
        own.weight.detach(),
        own(inputs()).detach(),
        own.nnz,
        own.values.detach().clone(),
    )
    report = own.memory_report()
    assert own.freeze() is own and own.freeze() is own
    assert not any(p.requires_grad for p in own.parameters())
    assert torch.equal(own(inputs()), out) and torch.equal(own.weight, weight) and own.nnz == nnz
    # one padding byte a row, and the rest of the last line
    assert own.memory_report().own_bytes <= report.own_bytes + 100 + 64
    if layout != "row_remap":
        assert own.frozen and not list(own.parameters()) and "frozen" in repr(own)
        other = make(cls, density=0.1, layout=layout).to(torch.bfloat16).freeze()
        if layout == "bitmask":
            other.load_state_dict(own.state_dict())
            assert torch.equal(other.weight, weight) and other.nnz == nnz
            state = own.state_dict()
            state["records"] = state["records"][:-1]
            with pytest.raises(RuntimeError, match="records"):
                other.load_state_dict(state)
        with pytest.raises(RuntimeError, match="unfreeze"):
            own.repack(own.mask)
    assert torch.equal(own.unfreeze().values, values)
    own(inputs()).sum().backward()
    assert own.values.grad is not None


def test_freeze_applies_max_norm():
    own = make(MaskedEmbedding, max_norm=1.0)
    frozen = copy.deepcopy(own).freeze()
    torch.testing.assert_close(frozen(inputs()), own(inputs()))


# ---- state ----


@both
@layouts
def test_state_dict_round_trip(cls, layout, tmp_path):
    own = make(cls, layout=layout)
    other = cls(100, 20, layout=layout)  # another mask
    parameter = other.values
    other.load_state_dict(own.state_dict())
    assert other.values is parameter and torch.equal(other.weight, own.weight)
    for clone in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert torch.equal(clone.weight, own.weight)
    torch.save(own.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt"), assign=True)
    assert torch.equal(other.weight, own.weight) and other.values.requires_grad
    half = copy.deepcopy(own).to(torch.bfloat16)
    assert half.values.dtype == torch.bfloat16 and torch.equal(half.weight, own.weight.bfloat16())


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    own = make(MaskedEmbedding)
    safetensors.save_file(own.state_dict(), tmp_path / "state.safetensors")
    other = MaskedEmbedding(100, 20)
    other.load_state_dict(safetensors.load_file(tmp_path / "state.safetensors"))
    assert torch.equal(other.weight, own.weight)


@both
@pytest.mark.parametrize("layout", ["bitmask", "row_remap"])
def test_checkpoint_with_another_number_of_values(cls, layout):
    own, other = make(cls, density=0.1, layout=layout), make(cls, density=0.4, layout=layout)
    parameter = other.values
    model = nn.Sequential(other)
    model.load_state_dict({"0." + key: value for key, value in own.state_dict().items()})
    assert other.values is parameter and other.nnz == own.nnz and torch.equal(other.weight, own.weight)
    other(inputs()).sum().backward()
    assert other.values.grad.shape == own.values.shape


@layouts
def test_inconsistent_checkpoint_changes_nothing(layout):
    own, other = make(MaskedEmbedding, layout=layout), make(MaskedEmbedding, density=0.4, layout=layout)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    good = own.state_dict()

    def reject(match, **changes):
        state = {k: v for k, v in {**good, **changes}.items() if v is not None}
        with pytest.raises(RuntimeError, match=match):
            other.load_state_dict(state)
        for key, value in other.state_dict().items():
            assert torch.equal(value, before[key])

    reject(r"values.*\(\d+.*this layer has.*\(\d+", values=good["values"][:-1])
    reject("rows", rows=good["rows"][:-1])
    reject("Missing key.*values", values=None)
    flipped = good["rows"].clone()
    flipped[0, 0] ^= 1
    reject("values", rows=flipped)
    if layout == "bitmask":
        moved = good["rows"].clone()
        moved[1, -4] += 1
        reject("rows does not fit the mask", rows=moved)
        reject("bases", bases=good["bases"] + 1)
    if layout == "row_remap":
        reject("columns", columns=good["columns"].flip(0))


@both
def test_dense_state_dict(cls):
    dense = cls.dense_type(100, 20)
    own = cls.from_dense(dense, density=0.3)
    other = cls.dense_type(100, 20)
    own.load_dense_state_dict(other.state_dict())
    assert own.nnz == 600 and torch.equal(own.weight, cls.from_dense(other, density=0.3).weight)
    third = cls.dense_type(100, 20)
    third.load_state_dict(own.dense_state_dict())
    assert torch.equal(third.weight, own.weight)
    fixed = make(cls)
    mask = fixed.mask
    fixed.load_dense_state_dict(other.state_dict())
    assert torch.equal(fixed.weight, other.weight * mask)
    with pytest.raises(ValueError, match="shape"):
        own.load_dense_state_dict({"weight": torch.zeros(3, 3)})


@both
@layouts
def test_meta_and_assign(cls, layout):
    own = cls(100, 20, device="meta", layout=layout)
    assert own.values.is_meta and own.rows.is_meta and own(inputs().to("meta")).shape[-1] == 20
    trained = make(cls, layout=layout)
    own.load_state_dict(trained.state_dict(), assign=True)
    assert torch.equal(own.weight, trained.weight)


def test_from_pretrained():
    weight = torch.randn(10, 8)
    own = MaskedEmbedding.from_pretrained(weight, padding_idx=2, density=0.5)
    assert not own.values.requires_grad and own.nnz == 40 and own.padding_idx == 2
    bag = MaskedEmbeddingBag.from_pretrained(weight, freeze=False, mode="max", density=0.5)
    assert bag.values.requires_grad and bag.mode == "max"


@both
def test_errors(cls):
    with pytest.raises(ValueError, match="density"):
        cls(10, 8, density=1.5)
    with pytest.raises(ValueError, match="layout"):
        cls(10, 8, layout="csr")
    with pytest.raises(ValueError, match="padding_idx"):
        cls(10, 8, padding_idx=10)
    with pytest.raises(IndexError):
        make(cls)(torch.full((2, 2), 100))
    with pytest.raises(ValueError, match="mode"):
        MaskedEmbeddingBag(10, 8, mode="min")


@pytest.mark.parametrize("compiler", ["aot_eager"])
def test_compile_and_export(compiler):
    own = make(MaskedEmbeddingBag, mode="mean")
    x, offsets = inputs().flatten(), torch.tensor([0, 4, 10])
    compiled = torch.compile(own, fullgraph=True, backend=compiler)
    torch.testing.assert_close(compiled(x, offsets), own(x, offsets))
    compiled(x, offsets).sum().backward()
    assert own.values.grad is not None
    exported = torch.export.export(own, (x, offsets))
    torch.testing.assert_close(exported.module()(x, offsets), own(x, offsets))


def test_autocast_keeps_the_table_dtype():
    own = make(MaskedEmbedding)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert own(inputs()).dtype == torch.float32  # as nn.Embedding


# ---- PyTorch's own sample inputs, at full density ----


def samples(name):
    op = next(op for op in op_db if op.name == name)
    return op, list(op.sample_inputs("cpu", torch.float32, requires_grad=True))


def packed(weight):
    return masked_embedding_pack(weight.detach(), torch.ones(weight.shape, dtype=torch.bool))


def test_torch_samples_of_embedding():
    op, cases = samples("nn.functional.embedding")
    assert len(cases) >= 3
    for sample in cases:  # torch's op_db calls embedding(weight, indices)
        weight, indices = sample.input, sample.args[0]
        options = {k: v for k, v in sample.kwargs.items() if k != "sparse"}
        table = packed(weight)
        values = table.values.clone().requires_grad_()
        ours = masked_embedding(indices, table._replace(values=values), **options)
        theirs_weight = weight.detach().clone().requires_grad_()
        theirs = op(theirs_weight, indices, **options)
        assert torch.equal(ours, theirs)
        ours.sum().backward()
        theirs.sum().backward()
        torch.testing.assert_close(values.grad.view(weight.shape), theirs_weight.grad)
        module = MaskedEmbedding.from_pretrained(weight.detach(), **options, mask=torch.ones_like(weight) > 0)
        assert torch.equal(module(indices), ours)


def test_torch_samples_of_embedding_bag():
    op, cases = samples("nn.functional.embedding_bag")
    assert len(cases) > 10
    for sample in cases:  # torch's op_db calls embedding_bag(weight, indices)
        weight, indices = sample.input, sample.args[0]
        options = {k: v for k, v in sample.kwargs.items() if k != "sparse"}
        psw = options.pop("per_sample_weights", None)
        table = packed(weight)
        values = table.values.clone().requires_grad_()
        our_psw = psw.detach().clone().requires_grad_() if psw is not None else None
        their_psw = psw.detach().clone().requires_grad_() if psw is not None else None
        ours = masked_embedding_bag(
            indices, table._replace(values=values), per_sample_weights=our_psw, **options
        )
        theirs_weight = weight.detach().clone().requires_grad_()
        theirs = op(theirs_weight, indices, per_sample_weights=their_psw, **options)
        torch.testing.assert_close(ours, theirs)
        ours.sum().backward()
        theirs.sum().backward()
        torch.testing.assert_close(values.grad.view(weight.shape), theirs_weight.grad)
        if psw is not None:
            torch.testing.assert_close(our_psw.grad, their_psw.grad)
        offsets = options.pop("offsets", None)
        mask = torch.ones_like(weight) > 0
        module = MaskedEmbeddingBag.from_pretrained(weight.detach(), **options, mask=mask)
        torch.testing.assert_close(module(indices, offsets, psw), theirs)
