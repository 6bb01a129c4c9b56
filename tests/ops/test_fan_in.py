"""Fixed fan-in linear, losses, top-k and candidate scores, with every gradient."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import recsparse_kernels as rk
from recsparse_kernels import ops
from recsparse_kernels.ops import fan_in as fan_in_ops
from recsparse_kernels.reference import fan_in as reference
from recsparse_kernels.testing import assert_close, backends
from recsparse_kernels.testing.fan_in import dense_weight, make_case, multi_hot

# (B, I, O, F, G): smallest, nothing aligned, empty, tile and panel edges, realistic
SHAPES = [
    (1, 8, 1, 1, 1), (2, 9, 5, 3, 1), (5, 123, 41, 7, 1), (0, 16, 4, 2, 1), (4, 16, 0, 2, 1), (3, 8, 6, 0, 1),
    (7, 40, 65, 17, 2), (16, 64, 128, 16, 16), (17, 50, 130, 33, 16), (33, 96, 200, 32, 32),
    (40, 70, 333, 31, 64),
    (9, 30, 150, 8, 100), (64, 512, 256, 32, 1), (70, 60, 500, 20, 1), (32, 768, 1500, 32, 1),
    (70, 20, 70, 3, 1), (70, 20, 70, 5, 32),
]  # fmt: skip
# Triton's interpreter takes about a millisecond for each operation of each program: not these
TOO_MANY_PROGRAMS = {
    (5, 123, 41, 7, 1), (16, 64, 128, 16, 16), (33, 96, 200, 32, 32), (64, 512, 256, 32, 1),
    (70, 60, 500, 20, 1), (32, 768, 1500, 32, 1),
}  # fmt: skip
# CUDA kernels run on the CPU with every access checked: of these only as named, in one dtype
MODELLED = {(33, 96, 200, 32, 32): torch.bfloat16, (70, 60, 500, 20, 1): torch.float16}
SLOW = ("triton", "cuda")
INTERPRETED_AT_16_BIT = {(7, 40, 65, 17, 2), (9, 30, 150, 8, 100)}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["bce", "squared_hinge"]


def every_case(op, shapes=SHAPES, interpreted_rows=100):
    """Parametrizes a test with shape, dtype and backend; Triton's interpreter gets B up to a limit."""
    cases = []
    for backend in backends(op):
        for dtype in DTYPES:
            for shape in shapes:
                few = shape not in TOO_MANY_PROGRAMS and shape[0] <= interpreted_rows
                few = few and (dtype == torch.float32 or shape in INTERPRETED_AT_16_BIT)
                if backend == "cuda":
                    few = shape not in TOO_MANY_PROGRAMS or MODELLED.get(shape) == dtype
                if backend not in SLOW or few:
                    cases.append(pytest.param(shape, dtype, backend, id=f"{backend}-{dtype}-{shape}"))
    return pytest.mark.parametrize("shape, dtype, backend", cases, indirect=["backend"])


native_only = pytest.mark.skipif(not rk.cpu_levels(), reason="the native library is not built")


REFERENCE_RESULTS = {}  # of a test's cases, which every backend and instruction level shares


def check(name, op, arguments, backend, case, *key):
    """The twice rule for one op; ``arguments(case)`` gives its arguments, ``key`` names the case."""
    key = (op.name, name, *key)
    if key not in REFERENCE_RESULTS:
        REFERENCE_RESULTS[key] = [_tuple(op.reference(*arguments(c))) for c in (case.double(), case)]
    exact, baseline = REFERENCE_RESULTS[key]
    actual = _tuple(op(*arguments(case), backend=backend))
    for i, parts in enumerate(zip(actual, exact, baseline, strict=True)):
        assert_close(f"{name}[{i}]", *parts)


def _tuple(result):
    return result if isinstance(result, tuple) else (result,)


@every_case("fan_in_linear")
def test_linear_and_gradients(shape, dtype, backend):
    case = make_case(*shape, dtype=dtype)
    group, in_features = case.group_size, case.input.shape[1]
    grad = torch.randn(shape[0], shape[2], generator=torch.Generator().manual_seed(5)).to(dtype)

    def wide(c):
        return grad.to(c.weight.dtype)

    check("output", fan_in_ops.LINEAR, lambda c: (*c.layer, group), backend, case, shape, dtype)
    check(
        "output without bias",
        fan_in_ops.LINEAR,
        lambda c: (*c.layer[:3], None, group),
        backend,
        case,
        shape,
        dtype,
    )
    check(
        "grad_input",
        fan_in_ops.LINEAR_GRAD_INPUT,
        lambda c: (wide(c), c.weight, c.indices, in_features, group),
        backend,
        case,
        shape,
        dtype,
    )
    check(
        "grad_weight",
        fan_in_ops.LINEAR_GRAD_WEIGHT,
        lambda c: (wide(c), c.input, c.indices, group),
        backend,
        case,
        shape,
        dtype,
    )


@every_case(
    "fan_in_linear",
    shapes=[(b, 96, 40, 64, g) for b, g in ((1, 1), (3, 1), (5, 1), (40, 1), (1, 16), (40, 16))],
)
def test_bias_much_larger_than_the_products(shape, dtype, backend):
    """Added first, it would take digits from each product."""
    case = make_case(*shape, dtype=dtype)
    case = dataclasses.replace(case, input=case.input * 1e-4)
    check("large bias", fan_in_ops.LINEAR, lambda c: (*c.layer, c.group_size), backend, case, shape, dtype)


@native_only
@pytest.mark.parametrize("index_dtype", [torch.int16, torch.int32], ids=str)
@pytest.mark.parametrize("batch, dtype", [(17, torch.float32), (33, torch.bfloat16)], ids=str)
def test_output_too_large_for_the_cache(batch, dtype, index_dtype, cpu_level):
    """From 8 MiB on outputs are written in another way; odd sizes, so that no two rows are aligned alike."""
    case = make_case(batch, 9, 131_231, 5, dtype=dtype, index_dtype=index_dtype)
    check("output", fan_in_ops.LINEAR, lambda c: (*c.layer, 1), "native", case, batch, dtype, index_dtype)


@every_case("fan_in_loss")
@pytest.mark.parametrize("kind", [0, 1], ids=KINDS)
def test_loss_and_gradients(shape, dtype, kind, backend):
    case = make_case(*shape, dtype=dtype)

    def arguments(c):
        return (*c.layer, *c.positives, kind, reference.SUM, c.group_size)

    def grad_arguments(c):
        scale = torch.tensor(1.5, dtype=torch.float64 if c.input.dtype == torch.float64 else torch.float32)
        return (scale, *arguments(c), True, True)

    check("loss", fan_in_ops.LOSS, arguments, backend, case, shape, dtype, kind)
    check("loss_grad", fan_in_ops.LOSS_GRAD, grad_arguments, backend, case, shape, dtype, kind)


@every_case("fan_in_score", [s for s in SHAPES if s[2]], interpreted_rows=20)
def test_topk_and_score(shape, dtype, backend):
    case = make_case(*shape, dtype=dtype)
    group = case.group_size
    generator = torch.Generator().manual_seed(3)
    candidates = torch.randint(0, shape[2], (shape[0], 21), generator=generator)
    grad = torch.randn(shape[0], 21, generator=generator).to(dtype)

    def wide(c):
        return grad.to(c.weight.dtype)

    check("score", fan_in_ops.SCORE, lambda c: (*c.layer, candidates, group), backend, case, shape, dtype)
    check(
        "score, int32",
        fan_in_ops.SCORE,
        lambda c: (*c.layer, candidates.int(), group),
        backend,
        case,
        shape,
        dtype,
    )
    check(
        "grad_input",
        fan_in_ops.SCORE_GRAD_INPUT,
        lambda c: (wide(c), c.weight, c.indices, candidates, shape[1], group),
        backend,
        case,
        shape,
        dtype,
    )
    check(
        "grad_weight",
        fan_in_ops.SCORE_GRAD_WEIGHT,
        lambda c: (wide(c), c.input, c.indices, candidates, shape[2], group),
        backend,
        case,
        shape,
        dtype,
    )
    for k in {0, 1, min(5, shape[2]), min(70, shape[2])} if backend not in SLOW else {min(5, shape[2])}:
        values, labels = ops.fan_in_topk(*case.layer, k, group_size=group, backend=backend)
        wide_case = case.double()
        logits = reference.fan_in_linear(*wide_case.layer, group)
        exact = logits.topk(k).values
        baseline = reference.fan_in_linear(*case.layer, group).topk(k).values
        assert_close("values", values, exact, baseline)
        assert_close("values of the labels", values, logits.gather(1, labels), baseline)
        assert all(len(set(row)) == k for row in labels.tolist())


@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_definition_is_the_dense_layer(group_size, kind):
    """Reference against scatter + F.linear and torch's losses, gradients by torch's autograd."""
    case = make_case(6, 20, 33, 5, group_size).double()
    leaves = [t.requires_grad_() for t in (case.input, case.weight, case.bias)]
    dense = F.linear(case.input, dense_weight(case), case.bias)
    torch.testing.assert_close(ops.fan_in_linear(*case.layer, group_size=group_size), dense)
    targets = multi_hot(case)
    if kind == "bce":
        wanted = F.binary_cross_entropy_with_logits(dense, targets)
    else:
        wanted = (1 - (2 * targets - 1) * dense).clamp(min=0).square().mean()
    loss = ops.fan_in_loss(*case.layer, *case.positives, kind=kind, group_size=group_size)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(wanted, leaves))


@pytest.mark.parametrize("group_size", [1, 2])
def test_gradcheck(group_size):
    case = make_case(2, 5, 7, 3, group_size).double()
    leaves = tuple(t.requires_grad_() for t in (case.input, case.weight, case.bias))
    candidates = torch.tensor([[0, 6, 0], [3, 3, 1]])
    options = {"group_size": group_size, "backend": "reference"}

    def call(op, *rest, **more):
        return lambda x, w, b: op(x, w, case.indices, b, *rest, **options, **more)

    assert torch.autograd.gradcheck(call(ops.fan_in_linear), leaves)
    assert torch.autograd.gradcheck(call(ops.fan_in_score, candidates), leaves)
    assert torch.autograd.gradcheck(lambda *t: call(ops.fan_in_topk, 3)(*t)[0], leaves)
    for kind in KINDS:
        for reduction in ("mean", "sum", "batchmean"):
            loss = call(ops.fan_in_loss, *case.positives, kind=kind, reduction=reduction)
            assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("backend", backends("fan_in_linear"), indirect=True)
def test_backward_through_public_functions(backend):
    """Each gradient alone, and all of them, equal those of the reference in float64."""
    case = make_case(20, 50, 120, 9, 4)
    candidates = torch.arange(60).view(20, 3)
    calls = {
        "linear": lambda c, b: ops.fan_in_linear(*c.layer, group_size=4, backend=b).square().mean(),
        "loss": lambda c, b: 3 * ops.fan_in_loss(*c.layer, *c.positives, group_size=4, backend=b),
        "topk": lambda c, b: ops.fan_in_topk(*c.layer, 5, group_size=4, backend=b)[0].square().mean(),
        "score": lambda c, b: ops.fan_in_score(*c.layer, candidates, group_size=4, backend=b).square().mean(),
    }
    names = ("input", "weight", "bias")
    parts = (names[:1], names[1:2], names[2:], names)
    for name, call in calls.items():
        for wanted in parts if backend not in SLOW else parts[2:]:
            grads = []
            for c, b in ((case, backend), (case.double(), "reference"), (case, "reference")):
                c = dataclasses.replace(
                    c, **{n: getattr(c, n).clone().requires_grad_(n in wanted) for n in names}
                )
                grads.append(torch.autograd.grad(call(c, b), [getattr(c, n) for n in wanted]))
            for leaf, actual, exact, baseline in zip(wanted, *grads, strict=True):
                assert_close(f"{name}: grad of {leaf}", actual, exact, baseline)


@pytest.mark.parametrize("backend", backends("fan_in_linear"), indirect=True)
def test_input_shapes_and_strides(backend):
    case = make_case(24, 40, 90, 6)
    wanted = ops.fan_in_linear(*case.layer, backend=backend)
    transposed = case.input.t().contiguous().t()
    assert torch.equal(ops.fan_in_linear(transposed, *case.layer[1:], backend=backend), wanted)
    strided = torch.stack([case.weight, case.weight], 2)[:, :, 0]
    every_other = torch.stack([case.indices, case.indices], 1).flatten(0, 1)[::2]
    assert torch.equal(
        ops.fan_in_linear(case.input, strided, every_other, case.bias, backend=backend), wanted
    )
    cube = ops.fan_in_linear(case.input.view(2, 3, 4, 40), *case.layer[1:], backend=backend)
    assert torch.equal(cube, wanted.view(2, 3, 4, 90))
    row = ops.fan_in_linear(case.input[0], *case.layer[1:], backend=backend)
    torch.testing.assert_close(row, wanted[0])
    wide = case.indices.int()
    assert torch.equal(ops.fan_in_linear(case.input, case.weight, wide, case.bias, backend=backend), wanted)
    expanded = torch.ones((), dtype=torch.float32).expand(24, 90)  # the gradient of sum(): strides 0
    x = case.input.clone().requires_grad_()
    ops.fan_in_linear(x, *case.layer[1:], backend=backend).sum().backward()
    wanted_grad = fan_in_ops.LINEAR_GRAD_INPUT(
        expanded.contiguous(), case.weight, case.indices, 40, 1, backend=backend
    )
    assert torch.equal(x.grad, wanted_grad)


@native_only
@pytest.mark.parametrize("group_size", [1, 16])
def test_same_for_any_number_of_threads(group_size):
    case = make_case(70, 100, 5000, 12, group_size)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            c = dataclasses.replace(
                case, **{n: getattr(case, n).clone().requires_grad_() for n in ("input", "weight")}
            )
            out = ops.fan_in_linear(*c.layer, group_size=group_size)
            loss = ops.fan_in_loss(*c.layer, *c.positives, group_size=group_size)
            best = ops.fan_in_topk(*c.layer, 9, group_size=group_size)
            score = ops.fan_in_score(*c.layer, torch.arange(70 * 9).view(70, 9) % 50, group_size=group_size)
            total = out.square().sum() + loss + score.sum()
            results.append([out, loss, *best, score, *torch.autograd.grad(total, (c.input, c.weight))])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", backends("fan_in_topk"), indirect=True)
def test_topk_ties_and_special_values(backend):
    bias = torch.zeros(700)
    bias[[5, 300, 699]] = 1.0
    many = 2 if backend in SLOW else 20  # the interpreter is slow
    x, w = torch.zeros(many, 8), torch.zeros(700, 2)
    indices = torch.zeros(700, 2, dtype=torch.int16)
    for rows in (1, many):
        values, labels = ops.fan_in_topk(x[:rows], w, indices, bias, 5, backend=backend)
        assert labels.tolist() == [[5, 300, 699, 0, 1]] * rows
        assert values.tolist() == [[1, 1, 1, 0, 0]] * rows
    bias[[650, 20]] = float("nan")
    bias[400], bias[401] = float("inf"), float("-inf")
    values, labels = ops.fan_in_topk(x, w, indices, bias, 700, backend=backend)
    assert labels[0, :4].tolist() == [20, 650, 400, 5] and labels[0, -1] == 401
    torch.testing.assert_close(values[0], bias.topk(700).values, equal_nan=True)


@pytest.mark.parametrize("backend", backends("fan_in_linear"), indirect=True)
def test_nan_and_inf_pass_through(backend):
    case = make_case(20, 30, 70, 5, bias=False)
    case.input[3, 2], case.input[4, 7] = float("nan"), float("inf")
    dense = (case.input.unsqueeze(1).expand(20, 70, 30)).gather(2, case.indices.long().expand(20, 70, 5))
    wanted = (dense * case.weight).sum(2)
    for rows in (slice(3, 5), slice(0, 20)):  # gathers; panels
        output = ops.fan_in_linear(case.input[rows], *case.layer[1:], backend=backend)
        torch.testing.assert_close(output, wanted[rows], equal_nan=True)
    assert ops.fan_in_loss(*case.layer, *case.positives, backend=backend).isnan()


@pytest.mark.parametrize("backend", backends("fan_in_loss"), indirect=True)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_at_large_logits(kind, backend):
    x, indices = torch.ones(2, 1), torch.zeros(6, 1, dtype=torch.int16)
    logits = torch.tensor([-300.0, -90.0, -1e-4, 0.0, 90.0, 300.0])
    offsets, labels = torch.tensor([0, 6, 6]), torch.arange(6)
    for sign in (1, -1):
        w = (sign * logits).view(6, 1).requires_grad_()
        loss = ops.fan_in_loss(
            x, w, indices, None, offsets, labels, kind=kind, reduction="sum", backend=backend
        )
        exact = w.detach().double().requires_grad_()
        case = ops.fan_in_loss(x.double(), exact, indices, None, offsets, labels, kind=kind, reduction="sum")
        torch.testing.assert_close(loss, case.float(), rtol=1e-6, atol=0)
        torch.testing.assert_close(
            torch.autograd.grad(loss, w)[0], torch.autograd.grad(case, exact)[0].float(), rtol=1e-6, atol=1e-7
        )  # a sum of sigmoid(z) - 1 and sigmoid(z): float32 rounding of 1


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 40), in_features=st.integers(1, 40), out_features=st.integers(0, 150),
    fan_in=st.integers(0, 20), group_size=st.integers(1, 70),
    index=st.sampled_from([torch.int16, torch.int32]),
    seed=st.integers(0, 99),
)  # fmt: skip
@native_only
def test_any_shape_equals_the_dense_layer(batch, in_features, out_features, fan_in, group_size, index, seed):
    case = make_case(batch, in_features, out_features, fan_in, group_size, index_dtype=index, seed=seed)
    for leaf in (case.input, case.weight, case.bias):
        leaf.requires_grad_()
    leaves = (case.input, case.weight, case.bias)
    ours = ops.fan_in_linear(*case.layer, group_size=group_size)
    loss = ops.fan_in_loss(*case.layer, *case.positives, reduction="sum", group_size=group_size)
    dense = F.linear(case.input, dense_weight(case), case.bias)
    wanted = F.binary_cross_entropy_with_logits(dense, multi_hot(case), reduction="sum")
    torch.testing.assert_close(ours, dense, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-3)
    ours, wanted = (torch.autograd.grad(t, leaves, allow_unused=True) for t in (loss, wanted))
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-4, atol=1e-4)


# ---- torch.library, torch.compile, torch.export, autocast ----


def _op_cases(case):
    group, (offsets, labels) = case.group_size, case.positives
    grad = torch.ones(case.input.shape[0], case.weight.shape[0])
    candidates = torch.zeros(case.input.shape[0], 3, dtype=torch.int64)
    scores = torch.ones(candidates.shape)
    hyper = (1, 0.1, 0.0, 0.9, 0.99, 1e-8, 1, False, 0)

    def state():
        return [torch.zeros_like(p) for p in (case.weight, case.bias) for _ in range(2)]

    layer = (case.input, case.weight, case.indices, case.bias)
    detached = tuple(t.detach().clone() for t in layer)
    one = torch.tensor(1.0)
    return {
        "fan_in_linear": (*layer, group),
        "fan_in_linear_grad_input": (grad, detached[1], detached[2], detached[0].shape[1], group),
        "fan_in_linear_grad_weight": (grad, detached[0], detached[2], group),
        "fan_in_linear_update": (grad, *detached, state(), group, *hyper),
        "fan_in_loss": (*layer, offsets, labels, 0, 0, group),
        "fan_in_loss_grad": (one, *detached, offsets, labels, 0, 0, group, True, True),
        "fan_in_loss_step": (one, *detached, offsets, labels, state(), 0, 0, group, True, *hyper),
        "fan_in_topk": (*layer, 3, group),
        "fan_in_score": (*layer, candidates, group),
        "fan_in_score_grad_input": (
            scores,
            detached[1],
            detached[2],
            candidates,
            detached[0].shape[1],
            group,
        ),
        "fan_in_score_grad_weight": (
            scores,
            detached[0],
            detached[2],
            candidates,
            detached[1].shape[0],
            group,
        ),
        "fan_in_rewire": (
            detached[1],
            detached[2],
            state()[:1],
            detached[0].shape[1],
            group,
            1,
            0,
            0.3,
            0.0,
            False,
            1,
        ),
    }


@pytest.mark.parametrize("name", sorted(_op_cases(make_case(2, 5, 6, 2))))
@pytest.mark.parametrize("backend", ["native", "reference", "triton", "cuda"])
def test_opcheck(name, backend):
    op = rk.ops._backend.OPS[name]
    if backend not in op.backends():
        pytest.skip("the native library is not built, or Triton not installed")
    case = make_case(5, 12, 40, 3, 2)
    for leaf in (case.input, case.weight, case.bias):
        leaf.requires_grad_()
    torch.library.opcheck(op.overload(backend), _op_cases(case)[name])


def _training(case, candidates):
    def run(x, w, b):
        out = ops.fan_in_linear(x, w, case.indices, b, group_size=case.group_size)
        loss = ops.fan_in_loss(x, w, case.indices, b, *case.positives, group_size=case.group_size)
        best, labels = ops.fan_in_topk(x, w, case.indices, b, 3, group_size=case.group_size)
        score = ops.fan_in_score(x, w, case.indices, b, candidates, group_size=case.group_size)
        return out.square().mean() + loss + best.mean() + score.mean(), labels

    return run


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile(compiler):
    case = make_case(6, 20, 50, 4, 2)
    leaves = [t.requires_grad_() for t in (case.input, case.weight, case.bias)]
    run = _training(case, torch.zeros(6, 2, dtype=torch.int64))
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend=compiler)
    (wanted, labels), (actual, same_labels) = run(*leaves), compiled(*leaves)
    torch.testing.assert_close(actual, wanted)
    assert torch.equal(labels, same_labels)
    torch.testing.assert_close(torch.autograd.grad(actual, leaves), torch.autograd.grad(wanted, leaves))


def test_export():
    case = make_case(6, 20, 50, 4)

    class Model(torch.nn.Module):
        def forward(self, x):
            return ops.fan_in_topk(x, *case.layer[1:], 3), ops.fan_in_linear(x, *case.layer[1:])

    program = torch.export.export(
        Model(), (case.input,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)
    )
    x = torch.randn(9, 20)
    torch.testing.assert_close(program.module()(x), Model()(x))


def test_autocast():
    case = make_case(6, 20, 50, 4)
    low = dataclasses.replace(case, **{n: getattr(case, n).bfloat16() for n in ("input", "weight", "bias")})
    case.weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = ops.fan_in_linear(low.input, case.weight, case.indices, case.bias)  # mixed dtypes meet here
        loss = ops.fan_in_loss(*case.layer, *case.positives)
    assert torch.equal(output, ops.fan_in_linear(*low.layer))
    assert loss.dtype == torch.float32
    assert torch.equal(loss, ops.fan_in_loss(*low.layer, *low.positives))
    loss.backward()
    assert case.weight.grad.dtype == torch.float32 and case.weight.grad.abs().sum() > 0


# ---- bad input ----


def test_error_messages():
    case = make_case(4, 10, 20, 3)
    x, w, indices, bias = case.layer
    offsets, labels = case.positives
    with pytest.raises(
        TypeError, match="input must have the dtype of weight, torch.float32; got torch.float64"
    ):
        ops.fan_in_linear(x.double(), w, indices, bias)
    with pytest.raises(
        ValueError, match=r"indices must have shape \[ceil\(O / group_size\), F\] = \(10, 3\); got \(20, 3\)"
    ):
        ops.fan_in_linear(x, w, indices, bias, group_size=2)
    with pytest.raises(TypeError, match="indices must be one of int16, int32; got torch.int64"):
        ops.fan_in_linear(x, w, indices.long(), bias)
    with pytest.raises(ValueError, match="group_size must be a whole number of at least 1; got 0"):
        ops.fan_in_linear(x, w, indices, bias, group_size=0)
    with pytest.raises(ValueError, match=r"bias must have shape \[O\] = \(20\); got \(19,\)"):
        ops.fan_in_linear(x, w, indices, bias[:19])
    with pytest.raises(ValueError, match=r"weight must have shape \[O, F\]"):
        ops.fan_in_linear(x, w[0], indices, bias)
    with pytest.raises(ValueError, match="kind must be one of 'bce', 'squared_hinge'; got 'hinge'"):
        ops.fan_in_loss(*case.layer, offsets, labels, kind="hinge")
    with pytest.raises(ValueError, match=r"offsets must have shape \[B \+ 1\] = \(5\); got \(4,\)"):
        ops.fan_in_loss(*case.layer, offsets[:-1], labels)
    with pytest.raises(ValueError, match=r"k must be in \[0, O\], O = 20; got 21"):
        ops.fan_in_topk(*case.layer, 21)
    with pytest.raises(ValueError, match=r"candidates must have shape \[B, C\] = \(4, any\); got \(3, 2\)"):
        ops.fan_in_score(*case.layer, torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="backend must be one of"):
        ops.fan_in_linear(*case.layer, backend="fastest")


@pytest.mark.parametrize("backend", backends("fan_in_loss"), indirect=True)
@pytest.mark.parametrize("batch", [2, 20])
def test_values_out_of_range(batch, backend):
    case = make_case(batch, 10, 100, 3, 2)
    offsets, labels = torch.arange(batch + 1), torch.arange(batch)
    options = {"group_size": 2, "backend": backend}

    def loss(offsets, labels):
        return ops.fan_in_loss(*case.layer, offsets, labels, **options)

    for bad in (-1, 100):
        with pytest.raises(IndexError, match=r"labels must be in \[0, 100\); got"):
            loss(offsets, torch.cat([labels[:-1], torch.tensor([bad])]))
        with pytest.raises(IndexError, match=r"candidates must be in \[0, 100\); got"):
            ops.fan_in_score(*case.layer, torch.full((batch, 2), bad), **options)
    for bad in (offsets.flip(0), offsets + 1, offsets * 2):
        with pytest.raises(
            ValueError, match="offsets must start at 0, never decrease and end at the number of labels"
        ):
            loss(bad, labels)
    for bad in (-1, 10):
        case.indices[-1, -1] = bad
        calls = [
            lambda: ops.fan_in_linear(*case.layer, **options),
            lambda: loss(offsets, labels),
            lambda: ops.fan_in_topk(*case.layer, 2, **options),
            lambda: ops.fan_in_score(*case.layer, torch.full((batch, 2), 99), **options),
        ]
        for call in calls:
            with pytest.raises(IndexError, match=r"indices must be in \[0, 10\)"):
                call()
