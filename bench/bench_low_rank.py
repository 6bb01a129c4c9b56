"""Low-rank layers against the same formula in torch (eager and compiled), and against the dense layer."""

import pytest
import torch
from torch.nn import functional as F

from bench.harness import Case, compare, relative_error, rotating
from recsparse_kernels.ops import low_rank_cross, low_rank_embedding_bag, low_rank_fields, low_rank_linear

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
on_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])


def name(dtype):
    return str(dtype).removeprefix("torch.")


def cross_eager(x0, x, down, up, bias):
    return x0 * (F.linear(F.linear(x, down), up) + bias) + x


def linear_eager(x, down, up, mid_bias, bias):
    return F.relu(F.linear(F.relu(F.linear(x, down, mid_bias)), up, bias))


def linear_ours(x, down, up, mid_bias, bias):
    return low_rank_linear(x, down, up, mid_bias, bias, mid_activation="relu", activation="relu")


def forward(function, weights):
    def call(*inputs):
        with torch.no_grad():
            return function(*inputs, *weights)

    return call


def training(function, weights, grad):
    weights = [w.clone().requires_grad_() for w in weights]

    def call(*inputs):
        leaves = [t.detach().requires_grad_() for t in inputs]
        return torch.autograd.grad(function(*leaves, *weights), (*leaves, *weights), grad)

    return call


def three_ways(eager, ours, make, weights, grad, case, backward, benchmark, **work):
    """Eager torch (the row that speedups are against), torch.compile, ours; forward or with the gradients."""
    compiled = torch.compile(eager, dynamic=False)
    wrap = (lambda f: training(f, weights, grad)) if backward else (lambda f: forward(f, weights))
    bytes_each = sum(t.numel() * t.element_size() for t in make(0))
    calls = {"torch": eager, "torch.compile": compiled, "ours": ours}
    candidates = {key: rotating(make, wrap(f), bytes_each, limit=8) for key, f in calls.items()}

    def check():
        inputs = make(0)
        exact = eager(*(t.double() for t in (*inputs, *weights)))
        assert relative_error(ours(*inputs, *weights), exact) < TOLERANCE[inputs[0].dtype]

    compare(case, candidates, dense="torch", check=check, rounds=15, benchmark=benchmark, **work)


@on_dtypes
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("B, I, R", [(1024, 3456, 64), (1024, 3456, 512), (64, 3456, 64)], ids=str)
def test_cross(B, I, R, backward, dtype, benchmark):
    weights = [(torch.randn(s) * k).to(dtype) for s, k in (((R, I), I**-0.5), ((I, R), R**-0.5), ((I,), 1))]
    grad = torch.randn(B, I).to(dtype)
    case = Case(
        "low_rank_cross", "forward+backward" if backward else "forward", f"B={B} I={I} R={R}", name(dtype)
    )

    def make(_):
        return torch.randn(B, I).to(dtype), torch.randn(B, I).to(dtype)

    flops = 4 * B * I * R * (3 if backward else 1)
    three_ways(cross_eager, low_rank_cross, make, weights, grad, case, backward, benchmark, work_flops=flops)


LINEAR = [
    (1, 400, 64, 400),
    (1024, 400, 64, 400),
    (10_000, 400, 64, 400),
    (1024, 2000, 320, 2000),
    (1024, 3456, 512, 3456),
]


@on_dtypes
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("B, I, R, O", LINEAR, ids=str)
def test_linear(B, I, R, O, backward, dtype, benchmark):
    shapes = (((R, I), I**-0.5), ((O, R), R**-0.5), ((R,), 1), ((O,), 1))
    weights = [(torch.randn(s) * k).to(dtype) for s, k in shapes]
    grad = torch.randn(B, O).to(dtype)
    passes = "forward+backward" if backward else "forward"
    case = Case("low_rank_linear", passes, f"B={B} I={I} R={R} O={O}", name(dtype))

    def make(_):
        return (torch.randn(B, I).to(dtype),)

    work = {"work_flops": 2 * B * R * (I + O) * (3 if backward else 1), "dense_flops": 2 * B * I * O}
    three_ways(linear_eager, linear_ours, make, weights, grad, case, backward, benchmark, **work)


@on_dtypes
@pytest.mark.parametrize("V, D, R", [(1_000_000, 128, 16), (1_000_000, 64, 8), (100_000, 128, 16)], ids=str)
def test_bag(V, D, R, dtype, benchmark):
    """2048 bags of 20 against ATen's bag over the dense table, and against pooling then F.linear in torch."""
    bags, length = 2048, 20
    table, up = torch.randn(V, R).to(dtype), torch.randn(D, R).to(dtype)
    dense = torch.randn(V, D).to(dtype)
    offsets = torch.arange(0, bags * length, length)

    def make(i):
        return (torch.randint(0, V, (bags * length,), generator=torch.Generator().manual_seed(i)),)

    def composed(indices):
        return F.linear(F.embedding_bag(indices, table, offsets, mode="sum"), up)

    def ours(indices):
        return low_rank_embedding_bag(indices, table, up, None, offsets, mode="sum")

    def check():
        (indices,) = make(0)
        exact = F.embedding_bag(indices, table.double(), offsets, mode="sum") @ up.double().t()
        assert relative_error(ours(indices), exact) < TOLERANCE[dtype]

    calls = {
        "torch": lambda indices: F.embedding_bag(indices, dense, offsets, mode="sum"),
        "torch-composed": composed,
        "ours": ours,
    }
    case = Case(
        "low_rank_embedding_bag", "forward", f"V={V} D={D} R={R} bags={bags}x{length}", name(dtype), R / D
    )
    candidates = {key: rotating(make, call, bags * length * R * 4) for key, call in calls.items()}
    moved = bags * length * (8 + R * table.element_size()) + bags * D * table.element_size()
    compare(case, candidates, dense="torch", check=check, work_bytes=moved, benchmark=benchmark)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense-grad", "sparse-grad"])
def test_bag_training(sparse, benchmark):
    """Forward, backward to both factors and an SGD step on them; dense-gradient and sparse-gradient bags."""
    V, D, R, bags, length = 1_000_000, 128, 16, 2048, 20
    grad = torch.randn(bags, D)
    indices, offsets = torch.randint(0, V, (bags * length,)), torch.arange(0, bags * length, length)
    table, up, dense = torch.randn(V, R), torch.randn(D, R), torch.randn(V, D)

    def step(function, *parameters):
        parameters = [torch.nn.Parameter(p) for p in parameters]
        optimizer = torch.optim.SGD(parameters, lr=1e-3)

        def call():
            optimizer.zero_grad()
            function(*parameters).backward(grad)
            optimizer.step()

        return call

    candidates = {
        "torch": step(lambda w: F.embedding_bag(indices, w, offsets, mode="sum", sparse=sparse), dense),
        "ours": step(
            lambda t, u: low_rank_embedding_bag(indices, t, u, None, offsets, mode="sum", sparse=sparse),
            table,
            up,
        ),
    }
    kind = "sparse" if sparse else "dense"
    case = Case("low_rank_embedding_bag", "step", f"V={V} D={D} R={R} bags={bags}x{length} grad={kind}")
    compare(case, candidates, dense="torch", rounds=10, benchmark=benchmark)


@pytest.mark.parametrize("interaction", [False, True], ids=["x", "fm"])
@pytest.mark.parametrize("fields, rank, dim", [(26, 2, 16), (22, 8, 50)], ids=str)
def test_fields(fields, rank, dim, interaction, benchmark):
    """Lookup and projection of all fields, or the FM term alone, against the authors' einsum in torch."""
    batch, rows = 4096, 50_000
    table, projections = torch.randn(fields * rows, rank), torch.randn(fields, rank, dim)
    bias, starts = torch.randn(fields, dim), torch.arange(fields + 1) * rows

    def make(i):
        return (torch.randint(0, rows, (batch, fields), generator=torch.Generator().manual_seed(i)),)

    def composed(indices):
        x = torch.einsum("ijk,jkl->ijl", F.embedding(indices + starts[:-1], table), projections) + bias
        return 0.5 * (x.sum(1).square() - x.square().sum(1)).sum(1, keepdim=True) if interaction else x

    def ours(indices):
        options = {"output": not interaction, "interaction": interaction}
        result = low_rank_fields(indices, table, starts, projections, bias, **options)
        return result.interaction if interaction else result.x

    def check():
        assert relative_error(ours(*make(0)), composed(*make(0))) < 1e-4

    what = "fm" if interaction else "x"
    case = Case("low_rank_fields", "forward", f"B={batch} F={fields} R={rank} D={dim} out={what}")
    candidates = {
        key: rotating(make, call, batch * fields * 8)
        for key, call in {"torch": composed, "ours": ours}.items()
    }
    compare(case, candidates, dense="torch", check=check, benchmark=benchmark)
