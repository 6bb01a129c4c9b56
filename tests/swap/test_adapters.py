"""Layers of other libraries: by look-alikes, and by the real ones where they are installed."""

import copy

import pytest
import torch
from torch import nn

import recsparse_kernels as rk
from recsparse_kernels import register_adapter, swap_modules, unswap_modules
from recsparse_kernels.adapters import ADAPTERS

from .layers import Conv1D, FMEmbedding, HalfEmbedding, HalfLinear, PyGLinear

RULES = {nn.Linear: HalfLinear, nn.Embedding: HalfEmbedding}


def check_round_trip(model, input, cls, packed):
    """Swap and unswap give the output of the masked original, of the original class."""
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    report = swap_modules(model, RULES)
    assert report.names == ["0"] and any(isinstance(m, packed) for m in model.modules())
    output = model(input)
    assert {key: value.shape for key, value in rk.dense_state_dict(model).items()} == shapes
    twin = copy.deepcopy(model)
    unswap_modules(twin)
    assert type(twin[0]) is cls
    torch.testing.assert_close(twin(input), output)
    rk.load_dense_state_dict(model, twin.state_dict())
    torch.testing.assert_close(model(input), output)
    assert {key: value.shape for key, value in twin.state_dict().items()} == shapes


@pytest.mark.parametrize("bias", [True, False])
def test_pyg_linear(bias):
    model = nn.Sequential(PyGLinear(64, 128, bias))
    check_round_trip(model, torch.randn(5, 64), PyGLinear, HalfLinear)
    assert (model[0].in_channels, model[0].out_channels) == (64, 128)


def test_conv1d():
    model = nn.Sequential(Conv1D(96, 64))
    check_round_trip(model, torch.randn(2, 3, 64), Conv1D, HalfLinear)
    assert (model[0].nf, model[0].nx) == (96, 64)


def test_conv1d_prunes_along_its_input():
    conv = Conv1D(96, 64)
    linear = nn.Linear(64, 96)
    linear.load_state_dict({"weight": conv.weight.t(), "bias": conv.bias})
    model = nn.Sequential(conv)
    swap_modules(model, RULES)
    x = torch.randn(5, 64)
    torch.testing.assert_close(model(x), HalfLinear.from_dense(linear)(x))


def test_fm_embedding():
    model = nn.Sequential(FMEmbedding([100, 200, 50], 16))
    input = torch.stack([torch.randint(0, n, (7,)) for n in (100, 200, 50)], 1)
    check_round_trip(model, input, FMEmbedding, HalfEmbedding)
    assert type(model[0]) is FMEmbedding and model[0].offsets == [0, 100, 300]


def test_fm_embedding_original_is_not_changed():
    original = FMEmbedding([100, 200], 16)
    model = nn.Sequential(original)
    swap_modules(model, RULES)
    assert model[0] is not original and type(original.embedding) is nn.Embedding


def test_rule_for_the_foreign_class_itself():
    model = nn.Sequential(PyGLinear(64, 64), nn.Linear(64, 64))
    assert swap_modules(model, {PyGLinear: HalfLinear}).names == ["0"]


def test_subclass_with_a_forward_of_its_own_is_left():
    class Twice(PyGLinear):
        def forward(self, x):
            return 2 * super().forward(x)

    report = swap_modules(nn.Sequential(Twice(64, 64)), RULES)
    assert not report and "forward of its own" in report.left[0].reason


class Negated(nn.Module):
    """x @ -kernel: no torch layer, no adapter of ours."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(64, 64))

    def forward(self, x):
        return x @ -self.kernel


def negated_to_dense(module):
    linear = nn.Linear(64, 64, bias=False)
    linear.weight.data = -module.kernel.detach().t().contiguous()
    return linear


def test_register_adapter():
    x, model = torch.randn(3, 64), nn.Sequential(Negated())
    assert not swap_modules(model, RULES)
    register_adapter(Negated, dense_type=nn.Linear, to_dense=negated_to_dense)
    try:
        wanted = x @ HalfLinear.from_dense(negated_to_dense(model[0])).dense_weight().t()
        assert swap_modules(model, RULES).names == ["0"]
        torch.testing.assert_close(model(x), wanted)
        unswap_modules(model)
        assert type(model[0]) is nn.Linear  # no restore was given
        torch.testing.assert_close(model(x), wanted)
    finally:
        del ADAPTERS[f"{Negated.__module__}.{Negated.__qualname__}"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"cls": 3, "dense_type": nn.Linear, "to_dense": len},
            "cls must be a module class or its path; got 3",
        ),
        ({"cls": "a.B", "dense_type": 3, "to_dense": len}, "dense_type must be a torch layer class; got 3"),
        ({"cls": "a.B", "dense_type": nn.Linear, "to_dense": 3}, "to_dense must be callable; got int"),
        (
            {"cls": "a.B", "dense_type": nn.Linear, "to_dense": len, "wrap": 3},
            "wrap must be callable; got int",
        ),
    ],
)
def test_register_adapter_refuses(arguments, message):
    with pytest.raises(TypeError, match=message):
        register_adapter(**arguments)
    assert "a.B" not in ADAPTERS


def test_real_pyg_linear():
    dense = pytest.importorskip("torch_geometric.nn.dense.linear", reason="torch_geometric is not installed")
    check_round_trip(nn.Sequential(dense.Linear(64, 128)), torch.randn(5, 64), dense.Linear, HalfLinear)


def test_real_conv1d():
    utils = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed")
    check_round_trip(nn.Sequential(utils.Conv1D(96, 64)), torch.randn(5, 64), utils.Conv1D, HalfLinear)
