"""Low-rank linear and cross layers against their definition in float64, on every backend and level."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from recsparse_kernels.ops import low_rank_cross, low_rank_linear
from recsparse_kernels.ops._activation import ACTIVATIONS
from recsparse_kernels.ops._backend import OPS
from recsparse_kernels.testing import assert_close, backends
from recsparse_kernels.testing.low_rank import CROSS_SHAPES, LINEAR_SHAPES, make_cross, make_linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
on_backends = pytest.mark.parametrize("backend", backends("low_rank_linear"), indirect=True)
on_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def run(function, tensors, grad, dtype, **options):
    """Output and the gradient of every tensor given."""
    leaves = [None if t is None else t.to(dtype).clone().requires_grad_() for t in tensors]
    output = function(*leaves, **options)
    output.backward(grad.to(dtype))
    return [output, *(leaf.grad for leaf in leaves if leaf is not None)]


def check(names, function, tensors, grad, dtype, backend, **options):
    tensors = [None if t is None else t.to(dtype) for t in tensors]
    grad = grad.to(dtype)
    actual = run(function, tensors, grad, dtype, backend=backend, **options)
    exact = run(function, tensors, grad, torch.float64, backend="reference", **options)
    baseline = run(function, tensors, grad, dtype, backend="reference", **options)
    for name, *three in zip(names, actual, exact, baseline, strict=True):
        assert_close(name, *three)


LINEAR = ("output", "grad_input", "grad_down", "grad_up", "grad_mid_bias", "grad_bias")
CROSS = ("output", "grad_x0", "grad_x", "grad_down", "grad_up", "grad_bias")


@on_backends
@on_dtypes
@pytest.mark.parametrize("shape", LINEAR_SHAPES, ids=str)
def test_linear(shape, dtype, backend):
    *tensors, grad = make_linear(*shape)
    check(LINEAR, low_rank_linear, tensors, grad, dtype, backend)


@on_backends
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", [(7, 37, 41, 53), (70, 64, 16, 64)], ids=str)
def test_memory_that_begins_anywhere(shape, dtype, backend):
    """Every tensor one element behind an aligned address: the same bits as from an aligned one."""
    tensors = [t.to(dtype) for t in make_linear(*shape)]
    moved = [torch.cat([t.new_full((1,), torch.nan), t.flatten()])[1:].view(t.shape) for t in tensors]
    *aligned, _ = tensors
    *elsewhere, _ = moved
    wanted = low_rank_linear(*aligned, backend=backend)
    assert torch.equal(low_rank_linear(*elsewhere, backend=backend), wanted)


@on_backends
@on_dtypes
@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a])
@pytest.mark.parametrize("rows", [3, 50])
def test_activations(rows, activation, dtype, backend):
    """Forward and derivative of each activation at either place; rows below and above the packing limit."""
    *tensors, grad = make_linear(rows, 20, 37, 45)
    check(LINEAR, low_rank_linear, tensors, grad, dtype, backend, mid_activation=activation)
    check(LINEAR, low_rank_linear, tensors, grad, dtype, backend, activation=activation)


@on_backends
def test_both_activations_without_biases(backend):
    input, down, up, _, _, grad = make_linear(50, 20, 37, 45)
    for mid_activation, activation in itertools.product(("relu", "tanh"), ("gelu", "sigmoid")):
        options = {"mid_activation": mid_activation, "activation": activation}
        names = LINEAR[:4]
        check(names, low_rank_linear, (input, down, up, None, None), grad, torch.float32, backend, **options)


@on_backends
@pytest.mark.parametrize("mid_activation", ["relu", "silu"])
@pytest.mark.parametrize("activation", ["gelu", "tanh"])
def test_activations_at_a_large_rank(activation, mid_activation, backend):
    *tensors, grad = make_linear(9, 20, 140, 30)
    options = {"mid_activation": mid_activation, "activation": activation}
    check(LINEAR, low_rank_linear, tensors, grad, torch.bfloat16, backend, **options)


@on_backends
@on_dtypes
@pytest.mark.parametrize("shape", CROSS_SHAPES, ids=str)
def test_cross(shape, dtype, backend):
    *tensors, grad = make_cross(*shape)
    check(CROSS, low_rank_cross, tensors, grad, dtype, backend)
    check(CROSS[:-1], low_rank_cross, (*tensors[:-1], None), grad, dtype, backend)


@on_backends
@pytest.mark.parametrize("rows", [4, 40])
def test_extreme_activations(rows, backend):
    """Large and special values pass as in torch."""
    special = torch.tensor(
        [0.0, -0.0, 1e-30, -1e-30, 20.0, -20.0, 1e4, -1e4, torch.inf, -torch.inf, torch.nan]
    )
    input = special[:, None].repeat(rows // 4 + 1, 1)[: max(rows, 11)]
    one = torch.ones(1, 1)
    for activation in ACTIVATIONS:
        if activation == "gelu":  # torch's own float32 and float64 differ at minus infinity
            input = input.nan_to_num(0.0, 30.0, -30.0)
        actual = low_rank_linear(input, one, one, activation=activation, backend=backend)
        exact = low_rank_linear(input.double(), one.double(), one.double(), activation=activation)
        baseline = low_rank_linear(input, one, one, activation=activation, backend="reference")
        assert_close(str(activation), actual, exact, baseline)


@on_backends
def test_only_the_gradients_asked_for(backend):
    *tensors, grad = make_linear(33, 20, 7, 45)
    full = run(low_rank_linear, tensors, grad, torch.float32, backend=backend, activation="relu")[1:]
    for wanted in range(5):
        leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
        low_rank_linear(*leaves, activation="relu", backend=backend).backward(grad)
        assert [leaf.grad is not None for leaf in leaves] == [i == wanted for i in range(5)]
        torch.testing.assert_close(leaves[wanted].grad, full[wanted])
    *tensors, grad = make_cross(33, 20, 7)
    full = run(low_rank_cross, tensors, grad, torch.float32, backend=backend)[1:]
    for wanted in range(5):
        leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
        low_rank_cross(*leaves, backend=backend).backward(grad)
        torch.testing.assert_close(leaves[wanted].grad, full[wanted])


@on_backends
def test_strided_and_leading_dimensions(backend):
    input, down, up, mid_bias, bias, _ = make_linear(30, 24, 5, 11)
    expected = low_rank_linear(input, down, up, mid_bias, bias, backend=backend)
    transposed = [t.t().contiguous().t() for t in (input, down, up)]
    strided = [torch.stack([t, -t], 1)[:, 0] for t in (mid_bias, bias)]
    torch.testing.assert_close(low_rank_linear(*transposed, *strided, backend=backend), expected)
    wide = torch.cat([input, input], 1)[:, :24]
    torch.testing.assert_close(low_rank_linear(wide, down, up, mid_bias, bias, backend=backend), expected)
    cube = low_rank_linear(input.view(5, 6, 24), down, up, mid_bias, bias, backend=backend)
    torch.testing.assert_close(cube, expected.view(5, 6, 11))
    one = low_rank_linear(input[0], down, up, mid_bias, bias, backend=backend)
    torch.testing.assert_close(one, expected[0])
    empty = low_rank_linear(input.view(5, 6, 24)[:, :0], down, up, backend=backend)
    assert empty.shape == (5, 0, 11)


def test_gradcheck():
    *tensors, _ = make_linear(4, 5, 3, 6, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in tensors]
    for mid_activation, activation in zip(ACTIVATIONS, reversed(ACTIVATIONS), strict=True):
        options = {"mid_activation": mid_activation, "activation": activation, "backend": "reference"}
        assert torch.autograd.gradcheck(lambda *t, o=options: low_rank_linear(*t, **o), leaves)
    *tensors, _ = make_cross(4, 5, 3, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *t: low_rank_cross(*t, backend="reference"), leaves)


def test_definition_is_the_dense_formula():
    input, down, up, mid_bias, bias, _ = make_linear(9, 7, 5, 6, dtype=torch.float64)
    expected = F.gelu(F.linear(F.silu(F.linear(input, down, mid_bias)), up, bias))
    actual = low_rank_linear(input, down, up, mid_bias, bias, mid_activation="silu", activation="gelu")
    torch.testing.assert_close(actual, expected)
    x0, x, down, up, bias, _ = make_cross(9, 7, 5, dtype=torch.float64)
    torch.testing.assert_close(
        low_rank_cross(x0, x, down, up, bias), x0 * (F.linear(x, up @ down) + bias) + x
    )


@pytest.mark.parametrize("backend", backends("low_rank_linear", interpreter=False)[-1:], indirect=True)
def test_same_result_for_any_number_of_threads(backend):
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            *tensors, grad = make_linear(333, 130, 40, 70)
            result = run(low_rank_linear, tensors, grad, torch.float32, backend=backend, activation="gelu")
            *tensors, grad = make_cross(333, 130, 40)
            results.append(result + run(low_rank_cross, tensors, grad, torch.float32, backend=backend))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", ["native", "triton", "reference"])
def test_opcheck(name):
    if name not in OPS["low_rank_linear"].backends():
        pytest.skip("the native library is not built, or there is no Triton")
    *tensors, grad = make_linear(9, 7, 5, 6)
    leaves = [t.requires_grad_() for t in tensors]
    for activation in (0, 1, 2):
        torch.library.opcheck(OPS["low_rank_linear"].overload(name), (*leaves, 3, activation, True))
    input, down, up, _, bias = tensors
    mid = torch.randn(9, 5)
    args = (grad, input.detach(), down.detach(), up.detach(), mid, bias.detach(), torch.rand(9, 6), 0, 1, 31)
    torch.library.opcheck(OPS["low_rank_linear_grad"].overload(name), args)
    *tensors, grad = make_cross(9, 7, 5)
    torch.library.opcheck(
        OPS["low_rank_cross"].overload(name), (*(t.requires_grad_() for t in tensors), True)
    )
    x0, x, down, up, bias = (t.detach() for t in tensors)
    torch.library.opcheck(OPS["low_rank_cross_grad"].overload(name), (grad, x0, x, down, up, mid, bias, 55))


@pytest.mark.parametrize(
    "compiler, backend", [("aot_eager", None), ("inductor", None), ("aot_eager", "triton")]
)
def test_compile(compiler, backend):
    if backend and backend not in OPS["low_rank_linear"].backends():
        pytest.skip("there is no Triton")
    *tensors, grad = make_linear(19, 7, 5, 6)

    def both(input, down, up, mid_bias, bias):
        y = low_rank_linear(input, down, up, mid_bias, bias, activation="relu", backend=backend)
        return low_rank_cross(y, y, up.t().reshape(5, 6), up, bias, backend=backend)

    expected = run(both, tensors, grad, torch.float32)
    actual = run(torch.compile(both, fullgraph=True, backend=compiler), tensors, grad, torch.float32)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_autocast():
    *tensors, grad = make_linear(19, 7, 5, 6)
    leaves = [t.requires_grad_() for t in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        output = low_rank_linear(*leaves, activation="silu")
        mixed = low_rank_linear(leaves[0].bfloat16(), *leaves[1:])
    assert output.dtype == mixed.dtype == torch.bfloat16
    output.float().backward(grad)
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)
    cast = low_rank_linear(*(t.detach().bfloat16() for t in leaves), activation="silu")
    assert torch.equal(output, cast)


def test_no_second_derivative():
    *tensors, _ = make_linear(3, 7, 5, 6)
    leaves = [t.requires_grad_() for t in tensors]
    grad = torch.autograd.grad(
        low_rank_linear(*leaves, activation="gelu").sum(), leaves[0], create_graph=True
    )[0]
    with pytest.raises(RuntimeError, match="no gradient"):
        grad.sum().backward()


BAD = [
    (lambda t: t.update(down=t["down"][:, 1:]), ValueError, r"down must have shape \[R, I\] = \(any, 7\)"),
    (
        lambda t: t.update(up=t["up"][:, 1:]),
        ValueError,
        r"up must have shape \[O, R\] = \(any, 5\); got \(6, 4\)",
    ),
    (lambda t: t.update(mid_bias=t["mid_bias"][1:]), ValueError, "mid_bias must have shape"),
    (lambda t: t.update(bias=t["bias"][1:]), ValueError, "bias must have shape"),
    (lambda t: t.update(up=t["up"].double()), TypeError, "up must have the dtype of input"),
    (lambda t: t.update(input=t["input"].long()), TypeError, "input must be one of float32"),
    (lambda t: t.update(down=[1]), TypeError, "down must be a tensor"),
    (lambda t: t.update(input=t["input"][0, 0]), ValueError, "input must have shape"),
    (lambda t: t.update(activation="swish"), ValueError, "activation must be one of"),
    (lambda t: t.update(mid_activation=1), ValueError, "mid_activation must be one of"),
    (lambda t: t.update(backend="tpu"), ValueError, "backend must be one of"),
    (lambda t: t.update(bias=t["bias"].to("meta")), ValueError, "on the device of input"),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=[b[2][:20] for b in BAD])
def test_bad_input(change, error, message):
    names = ("input", "down", "up", "mid_bias", "bias")
    arguments = dict(zip(names, make_linear(3, 7, 5, 6), strict=False))
    change(arguments)
    with pytest.raises(error, match=message):
        low_rank_linear(**arguments)


def test_bad_cross():
    x0, x, down, up, bias, _ = make_cross(3, 7, 5)
    with pytest.raises(ValueError, match=r"x0 must have shape the shape of x = \(3, 7\); got \(2, 7\)"):
        low_rank_cross(x0[:2], x, down, up, bias)
    with pytest.raises(ValueError, match=r"up must have shape \[I, R\]"):
        low_rank_cross(x0, x, down, up[:6], bias)


def test_native_checks():
    """The second fence: the ops themselves refuse what does not fit."""
    if "native" not in OPS["low_rank_linear"].backends():
        pytest.skip("the native library is not built")
    input, down, up, mid_bias, bias, grad = make_linear(3, 7, 5, 6)
    op, grad_op = OPS["low_rank_linear"], OPS["low_rank_linear_grad"]
    mid = torch.randn(3, 5)
    with pytest.raises(ValueError, match=r"down must be \[R, I\] with I = 7"):
        op(input, down[:, 1:], up, None, None, 0, 0, False, backend="native")
    with pytest.raises(TypeError, match="up must have the dtype of input"):
        op(input, down, up.bfloat16(), None, None, 0, 0, False, backend="native")
    with pytest.raises(ValueError, match=r"activation must be in \[0, 5\]; got 9"):
        op(input, down, up, None, None, 0, 9, False, backend="native")
    with pytest.raises(ValueError, match=r"mid must be \[3, 5\]"):
        grad_op(grad, input, down, up, mid[1:], None, None, 0, 0, 31, backend="native")
    with pytest.raises(ValueError, match="output must be given"):
        grad_op(grad, input, down, up, mid, None, None, 0, 1, 31, backend="native")
