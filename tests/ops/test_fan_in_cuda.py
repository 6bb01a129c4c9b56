"""Fixed fan-in in CUDA C++, the kernels run on the CPU: what its own way of working makes worth a test."""

import dataclasses

import pytest
import torch

import recsparse_kernels as rk
from recsparse_kernels import ops
from recsparse_kernels.config import get_check_indices
from recsparse_kernels.ops import FanInUpdate
from recsparse_kernels.ops import fan_in as fan_in_ops
from recsparse_kernels.reference import fan_in as reference
from recsparse_kernels.testing import assert_close, backends
from recsparse_kernels.testing.fan_in import make_case

pytestmark = pytest.mark.skipif(
    "cuda" not in backends("fan_in_linear"), reason="_cuda_on_cpu.so is not built"
)


@pytest.fixture
def unchecked():
    before = get_check_indices()
    rk.set_check_indices("none")
    yield
    rk.set_check_indices(before)


def loss_step(case, backend):
    fresh = dataclasses.replace(case, weight=case.weight.clone(), bias=case.bias.clone())
    update = FanInUpdate("adamw", lr=0.1, weight_decay=0.1)
    out = ops.fan_in_loss_step(
        *fresh.layer, *fresh.positives, update, group_size=case.group_size, backend=backend
    )
    return *out, fresh.weight, fresh.bias, *update.state


@pytest.mark.parametrize("group_size, dtype", [(1, torch.float32), (16, torch.float32), (16, torch.bfloat16)])
def test_several_chunks_of_labels_in_any_order_of_threads(group_size, dtype):
    """64 KB of scratch: several chunks, the last one short. The same bits however threads take turns."""
    case = make_case(64, 30, 600, 4, group_size, dtype=dtype)
    wanted, results = loss_step(case, "reference"), []
    try:
        for order in (0, 2):
            torch.ops.recsparse_cuda_on_cpu.set_order(order, 7)
            results.append(loss_step(case, "cuda"))
    finally:
        torch.ops.recsparse_cuda_on_cpu.set_order(0, 0)
    for a, b, w in zip(*results, wanted, strict=True):
        if dtype == torch.float32:
            torch.testing.assert_close(a, w, rtol=1e-4, atol=1e-5)
        assert torch.equal(a, b)


# The last that fit into shared memory, one lane a label; and one more than left room for block_sum's array
@pytest.mark.parametrize("in_features", [5696, 5752])
def test_inputs_sums_and_arrays_share_what_a_block_has(in_features):
    case = make_case(8, in_features, 300, 128, 1, dtype=torch.bfloat16)
    got, wanted = (
        ops.fan_in_loss(*case.layer, *case.positives, group_size=1, backend=backend)
        for backend in ("cuda", "reference")
    )
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=0)


UPDATES = {"sgd": dict(lr=1.0, momentum=0.9, weight_decay=0.1), "adamw": dict(lr=0.1, eps=1.0)}


@pytest.mark.parametrize("kind", UPDATES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(70, 50, 90, 37, 40), (64, 30, 600, 8, 16), (3, 2000, 33, 5, 16)], ids=str)
def test_fused_pass(shape, dtype, kind):
    """Labels of a group in 16 bits: update and autograd, odd sizes, two chunks, the last group short, and
    inputs too many for sums in shared memory, where the gradient to them is summed by sorted entries."""
    case = make_case(*shape, dtype=dtype)
    results = []
    for source, backend in ((case.double(), "reference"), (case, "reference"), (case, "cuda")):
        c = dataclasses.replace(source, weight=source.weight.clone(), bias=source.bias.clone())
        update = FanInUpdate(kind, **UPDATES[kind])
        options = dict(reduction="sum", group_size=c.group_size, backend=backend)
        parameters = [t.clone().requires_grad_() for t in (c.input, c.weight, c.bias)]
        input, weight, bias = parameters
        loss = ops.fan_in_loss(input, weight, c.indices, bias, *c.positives, **options)
        gradients = torch.autograd.grad(loss, parameters)
        stepped = ops.fan_in_loss_step(*c.layer, *c.positives, update, **options)
        alone = dataclasses.replace(source, weight=source.weight.clone(), bias=source.bias.clone())
        update = FanInUpdate(kind, **UPDATES[kind])
        ops.fan_in_loss_step(*alone.layer, *alone.positives, update, input_grad=False, **options)
        assert torch.equal(alone.weight, c.weight) and torch.equal(alone.bias, c.bias)
        # moments in the dtype of the gradients of logits that they are made of
        moments = [m.to(source.weight.dtype) for m in update.state]
        results.append([*gradients, *stepped, c.weight, c.bias, *moments])
    names = "grad_input grad_weight grad_bias loss stepped_grad_input weight bias".split()
    for i, (exact, baseline, actual) in enumerate(zip(*results, strict=True)):
        assert_close(names[i] if i < len(names) else f"state {i}", actual, exact, baseline)


@pytest.mark.parametrize("shape", [(3, 3000, 40, 5, 16), (2, 3, 1200, 2, 1)], ids=str)
def test_gradient_to_the_input_by_sorted_entries(shape):
    """By group where the sums of all inputs do not fit in shared memory; long sums in parts."""
    case = make_case(*shape)
    grad = torch.randn(shape[0], shape[2], generator=torch.Generator().manual_seed(1))
    arguments = (case.indices, shape[1], shape[4])
    exact = reference.fan_in_linear_grad_input(grad.double(), case.weight.double(), *arguments)
    baseline = reference.fan_in_linear_grad_input(grad, case.weight, *arguments)
    actual = fan_in_ops.LINEAR_GRAD_INPUT(grad, case.weight, *arguments, backend="cuda")
    assert_close("grad_input", actual, exact, baseline)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("distinct", [True, False], ids=["distinct", "repeated"])
def test_inputs_that_a_group_reads_twice(distinct, dtype):
    case = make_case(9, 40, 48, 24, 16, dtype=dtype, duplicates=not distinct)
    if not distinct:
        case.indices[0] = 7
    grad = torch.randn(9, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = reference.fan_in_linear_grad_input(grad.double(), case.weight.double(), case.indices, 40, 16)
    baseline = reference.fan_in_linear_grad_input(grad, case.weight, case.indices, 40, 16)
    actual = fan_in_ops.LINEAR_GRAD_INPUT(grad, case.weight, case.indices, 40, 16, backend="cuda")
    assert_close("grad_input", actual, exact, baseline)


@pytest.mark.parametrize("group_size", [1, 16])
def test_unchecked_indices_read_zero(group_size, unchecked):
    """Out of range, "none": as if the weight there were zero; nothing is read or written outside."""
    case = make_case(3, 10, 40, 4, group_size)
    bad = dataclasses.replace(case, indices=case.indices.clone())
    bad.indices[0, 1], bad.indices[-1, 2] = -1, 10
    zero = dataclasses.replace(case, weight=case.weight.clone())
    zero.weight[:group_size, 1] = 0
    zero.weight[(bad.indices.shape[0] - 1) * group_size :, 2] = 0
    grad = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    options = dict(group_size=group_size, backend="cuda")
    torch.testing.assert_close(
        ops.fan_in_linear(*bad.layer, **options), ops.fan_in_linear(*zero.layer, **options)
    )
    for one, other in ((bad, zero),):
        pair = [
            fan_in_ops.LINEAR_GRAD_INPUT(grad, c.weight, c.indices, 10, group_size, backend="cuda")
            for c in (one, other)
        ]
        torch.testing.assert_close(*pair)
    grad_weight = fan_in_ops.LINEAR_GRAD_WEIGHT(grad, bad.input, bad.indices, group_size, backend="cuda")
    assert (grad_weight[:group_size, 1] == 0).all() and (grad_weight[-1:, 2] == 0).all()
    candidates = torch.tensor([[0, 39], [-1, 5], [40, 7]])
    score = ops.fan_in_score(*bad.layer, candidates, **options)
    wanted = ops.fan_in_score(*zero.layer, candidates.clamp(0, 39), **options)
    inside = (candidates >= 0) & (candidates < 40)
    torch.testing.assert_close(score[inside], wanted[inside])
    assert (score[~inside] == 0).all()
    wild = torch.tensor([0, -5, 40])  # labels that there are not
    loss = ops.fan_in_loss(*case.layer, torch.arange(4), wild, **options)
    one = ops.fan_in_loss(*case.layer, torch.tensor([0, 1, 1, 1]), wild[:1], **options)
    torch.testing.assert_close(loss, one)


def test_stochastic_rounding_bits_equal_the_reference():
    case = make_case(1, 8, 30, 9, dtype=torch.bfloat16)
    grad = torch.linspace(-3, 3, 30).view(1, 30).bfloat16()
    case.input[:] = torch.linspace(0.3, 1.7, 8).bfloat16()
    results = []
    for backend in ("cuda", "reference"):
        weight = torch.zeros_like(case.weight)
        update = FanInUpdate("sgd", lr=1.0, stochastic_rounding=True, seed=3)
        ops.fan_in_linear_update(grad, case.input, weight, case.indices, None, update, backend=backend)
        results.append(weight)
    assert torch.equal(*results)  # one product each: the same float32, so the same bits


def test_every_op_has_a_kernel():
    names = [name for name in vars(reference) if name.startswith("fan_in_")]
    assert len(names) == 12 and all("cuda" in backends(name) for name in names)
