import copy
import io
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.testing._internal.common_methods_invocations import op_db

from recsparse_kernels import ops
from recsparse_kernels.nn import (
    SemiSparseLinear,
    Sparse24Linear,
    Sparse24LinearSTE,
    swap_linear_with_semi_sparse_linear,
    swap_semi_sparse_linear_with_linear,
)
from recsparse_kernels.ops import _backend
from recsparse_kernels.testing import backends
from recsparse_kernels.testing.sparse24 import as_torch_packs

pytestmark = pytest.mark.usefixtures("cpu_level") if len(backends("sparse24_linear")) > 1 else []


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(37, 11)


def test_from_dense_is_the_masked_layer(linear):
    before = copy.deepcopy(linear.state_dict())
    layer = Sparse24Linear.from_dense(linear, activation="gelu")
    mask = ops.sparse24_mask(linear.weight)
    input = torch.randn(6, 37)
    torch.testing.assert_close(layer(input), F.gelu(F.linear(input, linear.weight * mask, linear.bias)))
    assert torch.equal(layer.mask(), mask)
    dense = layer.to_dense()
    assert torch.equal(dense.weight, linear.weight * mask) and torch.equal(dense.bias, linear.bias)
    assert torch.equal(layer.weight, linear.weight * mask)
    assert all(torch.equal(before[key], linear.state_dict()[key]) for key in before)
    again = Sparse24Linear.from_dense(dense)
    assert torch.equal(again.values, layer.values) and torch.equal(again.metadata, layer.metadata)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(13, 512), (367, 512), (415, 512), (479, 1024), (1, 1), (3, 1)], ids=str)
def test_odd_sizes(shape, dtype):
    layer = Sparse24Linear(*shape, dtype=dtype, activation="relu")
    output = layer(torch.randn(3, shape[0], dtype=dtype))
    assert output.shape == (3, shape[1]) and output.isfinite().all()
    output.float().sum().backward()
    assert layer.values.grad.shape == layer.values.shape and layer.values.grad.isfinite().all()


@pytest.mark.parametrize("width", [36, 38, 48])
def test_input_of_another_width_is_refused(linear, width):
    """37 inputs are padded to 48: the op alone could not tell them from 38."""
    layer = Sparse24Linear.from_dense(linear)
    with pytest.raises(ValueError, match=rf"in_features = 37; got \(2, {width}\)"):
        layer(torch.ones(2, width))


def test_new_layer_is_a_pruned_new_linear():
    torch.manual_seed(7)
    dense = nn.Linear(20, 6)
    torch.manual_seed(7)
    layer = Sparse24Linear(20, 6)
    expected = Sparse24Linear.from_dense(dense)
    assert torch.equal(layer.values, expected.values) and torch.equal(layer.bias, expected.bias)


def test_from_dense_keeps_what_the_layer_was(linear):
    linear = linear.to(torch.bfloat16).eval().requires_grad_(False)
    layer = Sparse24Linear.from_dense(linear)
    assert layer.values.dtype == layer.bias.dtype == torch.bfloat16
    assert not layer.training and not any(p.requires_grad for p in layer.parameters())
    assert Sparse24Linear.from_dense(nn.Linear(4, 3, bias=False)).bias is None
    with pytest.raises(TypeError, match="module must be a torch.nn.Linear; got Conv1d"):
        Sparse24Linear.from_dense(nn.Conv1d(4, 4, 1))


def test_masks_of_the_user(linear):
    mask = torch.zeros(11, 37, dtype=torch.bool)
    mask[:, ::3] = True
    layer = Sparse24Linear.from_dense(linear, mask=mask)
    assert torch.equal(layer.weight, linear.weight * mask)
    mask[4, 8:12] = True
    with pytest.raises(ValueError, match="row 4 keeps 4 in columns 8 to 11"):
        Sparse24Linear.from_dense(linear, mask=mask)


def test_masks_of_torch_prune(linear):
    mask = ops.sparse24_mask(torch.randn(11, 37))
    prune.custom_from_mask(linear, "weight", mask)
    input = torch.randn(4, 37)
    for cls in (Sparse24Linear, Sparse24LinearSTE):
        layer = cls.from_dense(linear)
        torch.testing.assert_close(layer(input), linear(input))
    unstructured = prune.random_unstructured(nn.Linear(64, 8), "weight", 0.2)
    with pytest.raises(ValueError, match="at most 2 in each group of 4"):
        Sparse24Linear.from_dense(unstructured)


def test_transposable_mask_is_24_both_ways(linear):
    linear = nn.Linear(40, 24)
    layer = Sparse24Linear.from_dense(linear, transposable=True)
    mask = layer.mask()
    assert bool((mask.view(24, 10, 4).sum(2) == 2).all()) and bool(
        (mask.t().reshape(40, 6, 4).sum(2) == 2).all()
    )
    ops.sparse24_compress(layer.weight.t(), mask.t())


def takes_second_pack(layer, monkeypatch):
    """Whether a step of training in bfloat16 on CUDA's kernels transposes the pack."""
    layer, names = copy.deepcopy(layer).bfloat16(), []
    input = torch.randn(6, layer.in_features, dtype=torch.bfloat16, requires_grad=True)
    with monkeypatch.context() as patch:
        patch.setattr(ops, "sparse24_linear", partial(ops.sparse24_linear, backend="cuda"))
        patch.setattr(_backend, "OBSERVERS", [lambda op, *_: names.append(op.name)])
        layer(input).sum().backward()
    expected = torch.ones(6, layer.out_features).bfloat16() @ layer.dense_weight()
    torch.testing.assert_close(input.grad, expected)
    return "sparse24_transpose" in names


@pytest.mark.skipif(
    "cuda" not in backends("sparse24_linear"), reason="CUDA's kernels are not built for tests"
)
def test_a_layer_sees_whether_its_mask_is_transposable(monkeypatch):
    dense, other = nn.Linear(37, 22), nn.Linear(37, 22)
    mask = ops.sparse24_mask(other.weight, transposable=True)

    def new(**options):
        return Sparse24Linear.from_dense(dense, **options)

    def loaded(layer, state, **options):
        layer.load_state_dict(copy.deepcopy(state), **options)
        return layer

    def refreshed(layer, *arguments, **options):
        layer.refresh(*arguments, **options)
        return layer

    def dense_loaded(layer):
        layer.load_dense_state_dict(other.state_dict())
        return layer

    both, one = new(transposable=True), new()
    ste = Sparse24LinearSTE.from_dense(dense, transposable=True)
    meta = Sparse24Linear(37, 22, device="meta")
    for layer in (
        both,
        new(mask=mask),
        new(mask=mask, transposable=True),
        Sparse24Linear(37, 22, transposable=True),
        copy.deepcopy(both),
        pickle.loads(pickle.dumps(both)),
        loaded(new(), both.state_dict()),
        loaded(meta, both.state_dict(), assign=True),
        dense_loaded(new(transposable=True)),
        refreshed(new(transposable=True), other.weight),
        refreshed(new(), other.weight, mask=mask),
        ste.to_sparse(),
    ):
        assert takes_second_pack(layer, monkeypatch)
    for layer in (
        one,
        loaded(new(transposable=True), one.state_dict()),
        dense_loaded(new()),
        refreshed(new(transposable=True), dense.weight, mask=one.mask()),
    ):
        assert not takes_second_pack(layer, monkeypatch)
    assert both.state_dict().keys() == one.state_dict().keys()


def test_training_equals_masked_dense_training(linear):
    """Plain SGD on the packed values follows a dense layer whose mask is applied after every step."""
    layer = Sparse24Linear.from_dense(linear).double()
    dense, mask = layer.to_dense(), layer.mask()
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (layer, dense))
    for step in range(5):
        torch.manual_seed(step)
        input, target = torch.randn(9, 37).double(), torch.randn(9, 11).double()
        for model, optimizer in ((layer, ours), (dense, theirs)):
            optimizer.zero_grad()
            F.mse_loss(model(input), target).backward()
        dense.weight.grad.mul_(mask)
        ours.step(), theirs.step()
    torch.testing.assert_close(layer.weight, dense.weight.data)
    torch.testing.assert_close(layer.bias, dense.bias)


def test_refresh_in_place(linear):
    layer = Sparse24Linear.from_dense(linear)
    pointers = layer.values.data_ptr(), layer.metadata.data_ptr()
    new = torch.randn(11, 37)
    layer.refresh(new)
    assert (layer.values.data_ptr(), layer.metadata.data_ptr()) == pointers
    assert torch.equal(layer.weight, new * ops.sparse24_mask(new))
    state = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=r"weight must have shape \(11, 37\); got \(11, 36\)"):
        layer.refresh(new[:, 1:])
    with pytest.raises(ValueError, match="row 0 keeps 4"):
        layer.refresh(new, mask=torch.ones(11, 37, dtype=torch.bool))
    assert all(torch.equal(state[key], layer.state_dict()[key]) for key in state)


def test_state_dict_copies_and_dtype(linear, tmp_path):
    layer = Sparse24Linear.from_dense(linear, activation="silu")
    assert sorted(layer.state_dict()) == ["bias", "metadata", "values"]
    input = torch.randn(3, 37)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = Sparse24Linear(37, 11, activation="silu")
    loaded.load_state_dict(torch.load(file))
    for other in (loaded, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(input), layer(input))
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.values.dtype == torch.bfloat16 and half.metadata.dtype == torch.uint8
    assert torch.equal(half.mask(), layer.mask())
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other = Sparse24Linear(37, 11, activation="silu")
    other.load_state_dict(safetensors.load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(other(input), layer(input))


def test_mismatched_state_dict_changes_nothing(linear):
    layer, other = Sparse24Linear.from_dense(linear), Sparse24Linear(53, 11)
    state = copy.deepcopy(layer.state_dict())
    with pytest.raises(
        RuntimeError, match=r"values: this layer has shape \(11, 24\), the state_dict \(11, 32\)"
    ):
        layer.load_state_dict(other.state_dict())
    assert all(torch.equal(state[key], layer.state_dict()[key]) for key in state)


def test_dense_state_dict(linear):
    layer = Sparse24Linear.from_dense(linear)
    assert torch.equal(layer.dense_state_dict("fc.")["fc.weight"], layer.weight)
    new = nn.Linear(37, 11)
    layer.load_dense_state_dict(new.state_dict())
    assert torch.equal(layer.weight, new.weight * ops.sparse24_mask(new.weight))
    assert torch.equal(layer.bias, new.bias)
    with pytest.raises(ValueError, match=r"'weight' must have shape \(11, 37\); got \(11, 36\)"):
        layer.load_dense_state_dict({"weight": torch.zeros(11, 36), "bias": torch.zeros(11)})


@pytest.mark.parametrize("dtype, ratio", [(torch.float32, 0.5 + 1 / 32), (torch.bfloat16, 0.5 + 1 / 16)])
def test_memory_report(dtype, ratio):
    report = Sparse24Linear(1024, 512, bias=False, dtype=dtype).memory_report()
    assert report.ratio == ratio
    assert report.optimizer_bytes * 2 == report.dense_optimizer_bytes


def test_pack_state(linear):
    layer = Sparse24Linear.from_dense(linear)
    moment = torch.rand(11, 37)
    assert torch.equal(layer.pack_state("values", moment), ops.sparse24_gather(moment, layer.metadata))
    assert layer.pack_state("bias", moment) is None


def test_meta_and_skip_init():
    meta = Sparse24Linear(37, 11, device="meta")
    assert meta(torch.empty(2, 37, device="meta")).shape == (2, 11)
    layer = nn.utils.skip_init(Sparse24Linear, 37, 11)
    layer.reset_parameters()
    assert layer(torch.randn(2, 37)).isfinite().all()


def test_repr(linear):
    text = repr(Sparse24Linear.from_dense(linear, activation="relu"))
    assert (
        text == "Sparse24Linear(in_features=37, out_features=11, bias=True, activation='relu', sparsity=2:4)"
    )
    with pytest.raises(ValueError, match="activation must be one of"):
        Sparse24Linear(4, 4, activation="swish")


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(linear, backend, cpu_level):
    if backend == "inductor" and cpu_level != "avx512":
        pytest.skip("slow to compile: once is enough")
    layer = Sparse24Linear.from_dense(linear, activation="gelu")
    input = torch.randn(5, 37)
    layer(input).sum().backward()
    expected = layer.values.grad.clone()
    layer.zero_grad()
    output = torch.compile(layer, fullgraph=True, backend=backend)(input)
    output.sum().backward()
    torch.testing.assert_close(output, layer(input))
    torch.testing.assert_close(layer.values.grad, expected)


def test_export(linear):
    layer = Sparse24Linear.from_dense(linear, activation="relu").eval()
    batch = torch.export.Dim("batch", min=2, max=1024)
    program = torch.export.export(layer, (torch.randn(4, 37),), dynamic_shapes=({0: batch},))
    assert any("sparse24_linear" in str(node.target) for node in program.graph.nodes)
    input = torch.randn(9, 37)
    torch.testing.assert_close(program.module()(input), layer(input))


# ---- straight-through and torchao's names ----


def test_ste_layer(linear):
    layer = Sparse24LinearSTE.from_dense(linear, activation="relu", decay=0.1)
    input = torch.randn(6, 37)
    mask = ops.sparse24_mask(linear.weight)
    torch.testing.assert_close(layer(input), torch.relu(F.linear(input, linear.weight * mask, linear.bias)))
    layer(input).sum().backward()
    assert bool((layer.weight.grad[~mask] != 0).any())
    with torch.no_grad():
        layer.weight.copy_(torch.randn(11, 37))
    assert torch.equal(layer.mask, mask)
    layer.update_mask()
    assert torch.equal(layer.mask, ops.sparse24_mask(layer.weight))
    sparse = layer.to_sparse()
    torch.testing.assert_close(sparse(input), layer(input))
    assert torch.equal(layer.to_dense().weight, sparse.weight)
    assert sorted(layer.state_dict()) == ["bias", "mask", "weight"]
    with pytest.raises(ValueError, match="refresh must be 'manual' or 'forward'"):
        Sparse24LinearSTE(4, 4, refresh="sometimes")


@pytest.mark.parametrize("cls", [Sparse24Linear, Sparse24LinearSTE])
def test_a_mask_that_is_not_transposable_is_refused(linear, cls):
    mask = ops.sparse24_mask(linear.weight)
    mask[:3, 0], mask[:3, 1:4] = True, False
    cls.from_dense(linear, mask=mask)
    for build in (SemiSparseLinear.from_dense, partial(cls.from_dense, transposable=True)):
        with pytest.raises(ValueError, match="column 0 keeps"):
            build(linear, mask=mask)


def test_torchao_names():
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 4)))
    before = list(model.modules())
    with pytest.raises(ValueError, match="'2.5' is not a torch.nn.Linear of the model; got NoneType"):
        swap_linear_with_semi_sparse_linear(model, {"0": SemiSparseLinear, "2.5": SemiSparseLinear})
    assert list(model.modules()) == before
    swap_linear_with_semi_sparse_linear(model, {"0": SemiSparseLinear, "2.0": Sparse24Linear})
    assert isinstance(model[0], SemiSparseLinear) and isinstance(model[2][0], Sparse24Linear)
    assert type(model[2][1]) is nn.Linear
    input = torch.randn(5, 16)
    expected = model(input)
    expected.sum().backward()
    assert model[0].weight.grad.shape == (32, 16)
    mask = model[0].mask
    assert bool((mask.view(32, 4, 4).sum(2) == 2).all()) and bool(
        (mask.t().reshape(16, 8, 4).sum(2) == 2).all()
    )
    swap_semi_sparse_linear_with_linear(model)
    assert type(model[0]) is nn.Linear and type(model[2][0]) is nn.Linear
    torch.testing.assert_close(model(input), expected)


def test_converts_torch_semi_structured():
    weight = torch.randn(64, 128, dtype=torch.bfloat16)
    weight = weight * ops.sparse24_mask(weight)
    linear = nn.Linear(128, 64, dtype=torch.bfloat16)
    linear.weight = nn.Parameter(as_torch_packs(weight))
    layer = Sparse24Linear.from_dense(linear)
    assert torch.equal(layer.weight, weight) and torch.equal(layer.bias, linear.bias)


# ---- PyTorch's own sample inputs ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opinfo_linear(dtype):
    """Every sample of torch's nn.functional.linear, with a weight that is 2:4 already."""
    (info,) = [op for op in op_db if op.name == "nn.functional.linear"]
    count = 0
    for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
        weight, bias = (
            sample.args[0],
            (*sample.args[1:], None)[0] if sample.args[1:] else sample.kwargs.get("bias"),
        )
        if weight.dim() != 2:
            continue
        pruned = (weight * ops.sparse24_mask(weight)).detach()
        dense = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias is not None, dtype=dtype)
        with torch.no_grad():
            dense.weight.copy_(pruned)
            if bias is not None:
                dense.bias.copy_(bias)
        layer = Sparse24Linear.from_dense(dense)
        inputs = [sample.input.detach().clone().requires_grad_() for _ in range(2)]
        outputs = [m(x) for m, x in zip((dense, layer), inputs, strict=True)]
        grad = torch.randn_like(outputs[0])
        for output in outputs:
            output.backward(grad)
        torch.testing.assert_close(outputs[1], outputs[0])
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
        torch.testing.assert_close(layer.values.grad, ops.sparse24_gather(dense.weight.grad, layer.metadata))
        if bias is not None:
            torch.testing.assert_close(layer.bias.grad, dense.bias.grad)
        count += 1
    assert count > 5
