"""MaskedLinear: a linear layer over a packed table."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import recsparse_kernels as rk
from recsparse_kernels.nn import MaskedEmbedding, MaskedLinear
from recsparse_kernels.ops.masked_embedding_table import pack_bits


def case(O=37, I=53, density=0.3, bias=True, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    dense = nn.Linear(I, O, bias, dtype=dtype)
    return dense, torch.rand(O, I) < density


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(37, 53), (1, 8), (16, 1), (64, 367)], ids=str)
def test_is_the_masked_dense_layer(shape, bias):
    dense, mask = case(*shape, bias=bias)
    layer = MaskedLinear.from_dense(dense, mask=mask)
    x = torch.randn(5, 2, shape[1], dtype=torch.float64, requires_grad=True)
    grad = torch.randn(5, 2, shape[0], dtype=torch.float64)
    out = layer(x)
    out.backward(grad)
    wanted_x = x.detach().clone().requires_grad_()
    weight = (dense.weight.detach() * mask).requires_grad_()
    wanted = nn.functional.linear(wanted_x, weight, dense.bias)
    wanted.backward(grad)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(x.grad, wanted_x.grad)
    torch.testing.assert_close(layer.packed.values.grad, weight.grad[mask])
    if bias:
        torch.testing.assert_close(layer.bias.grad, dense.bias.grad)


def test_from_dense():
    dense, mask = case(dtype=torch.float32)
    layer = MaskedLinear.from_dense(dense, density=0.25)
    kept = layer.mask
    assert int(kept.sum()) == round(0.25 * dense.weight.numel())
    assert dense.weight[kept].abs().min() >= dense.weight[~kept].abs().max()
    by_bits = MaskedLinear.from_dense(dense, mask=pack_bits(mask))
    assert torch.equal(by_bits.mask, mask) and torch.equal(by_bits.dense_weight(), dense.weight * mask)
    assert torch.equal(by_bits.to_dense().weight, dense.weight * mask)
    prune.l1_unstructured(dense, "weight", amount=0.5)
    assert torch.equal(MaskedLinear.from_dense(dense).mask, dense.weight_mask.bool())
    frozen = MaskedLinear.from_dense(nn.Linear(9, 4).requires_grad_(False).eval(), density=0.5)
    assert not frozen.training and not any(p.requires_grad for p in frozen.parameters())
    with pytest.raises(TypeError, match="must be a torch.nn.Linear"):
        MaskedLinear.from_dense(nn.Embedding(3, 4), density=0.5)
    with pytest.raises(ValueError, match="density or mask"):
        MaskedLinear.from_dense(nn.Linear(3, 4), density=0.5, mask=torch.ones(4, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask must"):
        MaskedLinear.from_dense(nn.Linear(3, 4), mask=torch.ones(3, 4, dtype=torch.bool))
    bits = pack_bits(torch.ones(4, 3, dtype=torch.bool)) | 128
    with pytest.raises(ValueError, match="bits past the 3 columns"):
        MaskedLinear.from_dense(nn.Linear(3, 4), mask=bits)


def test_new_layer():
    layer = MaskedLinear(400, 300, density=0.1)
    assert layer.packed.nnz == round(0.1 * 400 * 300)
    out, dense = layer(torch.randn(500, 400)), nn.Linear(400, 300)(torch.randn(500, 400))
    assert out.std().item() == pytest.approx(dense.std().item(), rel=0.15)
    assert "density=0.1" in repr(layer)
    report = layer.memory_report()
    assert report.dense_bytes == 4 * (400 * 300 + 300) and 0.1 < report.ratio < 0.16
    assert MaskedLinear(8, 4, device="meta").packed.values.is_meta


def test_state():
    dense, mask = case(dtype=torch.float32)
    layer, other = MaskedLinear.from_dense(dense, mask=mask), MaskedLinear(53, 37, density=0.6)
    state = copy.deepcopy(layer.state_dict())
    other.load_state_dict(state)  # another mask, other sizes of values
    x = torch.randn(4, 53)
    assert torch.equal(other(x), layer(x))
    for same in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(same(x), layer(x))
    before = copy.deepcopy(other.state_dict())
    wrong = {**MaskedLinear(53, 37, density=0.5).state_dict(), "bias": torch.zeros(3)}
    with pytest.raises(RuntimeError, match="bias"):
        other.load_state_dict(wrong)
    assert all(torch.equal(t, before[n]) for n, t in other.state_dict().items())


def test_refresh_stays_in_place():
    dense, mask = case(dtype=torch.float32)
    layer = MaskedLinear.from_dense(dense, mask=mask)
    addresses = {n: t.data_ptr() for n, t in layer.state_dict().items()}
    newer = torch.randn(37, 53)
    assert layer.refresh(newer, mask.flip(0)) is True
    assert {n: t.data_ptr() for n, t in layer.state_dict().items()} == addresses
    assert torch.equal(layer.dense_weight(), newer * mask.flip(0))
    parameter = layer.packed.values
    assert layer.refresh(newer, ~mask) is False  # another number of values
    assert layer.packed.values is parameter and torch.equal(layer.dense_weight(), newer * ~mask)
    with pytest.raises(ValueError, match=r"weight must have shape \(37, 53\)"):
        layer.refresh(newer.T, mask)
    table = MaskedEmbedding(5, 8, density=0.5, layout="fixed_k").table
    with pytest.raises(ValueError, match="table must be bitmask"):
        layer.packed.put(table)


def test_swap_and_optimizer_state():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(80, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model(torch.randn(9, 80)).square().mean().backward()
    optimizer.step()
    moment = optimizer.state[model[0].weight]["exp_avg"].clone()
    report = rk.swap_modules(model, {nn.Linear: (MaskedLinear, {"density": 0.2})})
    rk.remap_optimizer(optimizer, report)
    assert report.names == ["0"]
    held = optimizer.state[model[0].packed.values]["exp_avg"]
    assert torch.equal(held, moment[model[0].mask])
    optimizer.zero_grad()
    model(torch.randn(9, 80)).square().mean().backward()
    optimizer.step()
    rk.unswap_modules(model)
    assert type(model[0]) is nn.Linear


def test_compile():
    layer = MaskedLinear(40, 24, density=0.3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 40)
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).sum().backward()
    assert layer.packed.values.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_between_other_layers_under_autocast(dtype):
    """A linear layer before it gives autocast's dtype, one after it takes it."""
    torch.manual_seed(0)
    layer = MaskedLinear.from_dense(nn.Linear(32, 16), density=0.4)
    model = nn.Sequential(nn.Linear(24, 32), layer, nn.ReLU())
    input = torch.randn(5, 24)
    with torch.autocast("cpu", dtype):
        output = model(input)
    assert output.dtype == dtype
    output.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in model.parameters())
    with torch.no_grad():
        hidden = nn.functional.linear(input.to(dtype), model[0].weight.to(dtype), model[0].bias.to(dtype))
        wanted = layer(hidden.float()).relu()
        torch.testing.assert_close(output.float(), wanted, atol=0.02, rtol=0.02)
        with torch.autocast("cpu", dtype):
            assert torch.equal(model(input), output)
    with torch.autocast("cpu", dtype):
        assert layer.double()(torch.randn(2, 32, dtype=torch.float64)).dtype == torch.float64
