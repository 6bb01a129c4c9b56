"""2:4 linear against the dense `F.linear` (which has the same weight, masked)."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from bench.harness import Case, compare, relative_error, rotating
from recsparse_kernels import ops
from recsparse_kernels.ops._backend import OPS
from recsparse_kernels.testing.sparse24 import make_case, make_weight

DENSITY = 0.5
BAR_SHAPES = [(512, 1024, 1024), (2048, 1024, 1024), (1, 4096, 4096), (8, 4096, 4096)]  # B, I, O
NEIGHBOURS = [(16, 4096, 4096), (64, 4096, 4096), (128, 1024, 1024), (33, 1024, 1024), (600, 1000, 1000)]
DLRM_LAYERS = [(13, 512), (512, 256), (367, 512), (415, 512), (479, 1024), (1024, 1024)]
STE_SHAPES = [(128, 1024, 1024), (2048, 1024, 1024), (2048, 367, 512)]
DLRM = [(B, I, O) for I, O in DLRM_LAYERS for B in (128, 2048, 16384)]


def inputs(B, I, O, dtype, seed):
    """x, values, metadata, bias, the dense weight, the gradient of the output."""
    x, values, metadata, bias, grad = make_case(B, I, O, dtype=dtype, seed=seed)
    return x, values, metadata, bias, ops.sparse24_decompress(values, metadata, I), grad


def rotate(B, I, O, dtype, call):
    size = (B * I + B * O + O * I) * dtype.itemsize
    return rotating(lambda i: inputs(B, I, O, dtype, i), call, size, limit=8)


def check(B, I, O, dtype):
    x, values, metadata, bias, weight, _ = inputs(B, I, O, dtype, 0)
    exact = F.linear(x.double(), weight.double(), bias.double())
    limit = 2 * relative_error(F.linear(x, weight, bias), exact) + torch.finfo(dtype).eps
    assert relative_error(ops.sparse24_linear(x, values, metadata, bias), exact) <= limit


@pytest.mark.parametrize("shape", BAR_SHAPES + NEIGHBOURS + DLRM, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward(shape, dtype, benchmark):
    B, I, O = shape
    packed = O * I // 2 * dtype.itemsize + O * I // 8

    def dense(x, values, metadata, bias, weight, grad):
        return F.linear(x, weight, bias)

    def ours(x, values, metadata, bias, weight, grad):
        return ops.sparse24_linear(x, values, metadata, bias, backend="native")

    compare(
        Case("sparse24_linear", "forward", f"B={B} I={I} O={O}", str(dtype).removeprefix("torch."), DENSITY),
        {"F.linear": rotate(B, I, O, dtype, dense), "ours": rotate(B, I, O, dtype, ours)},
        dense="F.linear",
        check=lambda: check(B, I, O, dtype),
        rounds=15,
        work_bytes=packed + (B * I + B * O) * dtype.itemsize,
        work_flops=B * I * O,
        dense_flops=2 * B * I * O,
        benchmark=benchmark,
    )


@pytest.mark.parametrize("shape", [(512, 1024, 1024), (2048, 1024, 1024), *DLRM], ids=str)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_forward_backward(shape, activation, benchmark):
    B, I, O = shape
    dtype = torch.float32

    def dense(x, values, metadata, bias, weight, grad):
        x, weight, bias = (t.requires_grad_() for t in (x, weight, bias))
        output = F.linear(x, weight, bias)
        output = torch.relu(output) if activation else output
        return torch.autograd.grad(output, (x, weight, bias), grad)

    def ours(x, values, metadata, bias, weight, grad):
        x, values, bias = (t.requires_grad_() for t in (x, values, bias))
        output = ops.sparse24_linear(x, values, metadata, bias, activation=activation, backend="native")
        return torch.autograd.grad(output, (x, values, bias), grad)

    compare(
        Case(
            "sparse24_linear",
            "forward+backward",
            f"B={B} I={I} O={O} {activation or ''}".strip(),
            "float32",
            DENSITY,
        ),
        {"F.linear": rotate(B, I, O, dtype, dense), "ours": rotate(B, I, O, dtype, ours)},
        dense="F.linear",
        rounds=11,
        work_flops=3 * B * I * O,
        dense_flops=6 * B * I * O,
        benchmark=benchmark,
    )


PRUNE = {
    "magnitude": ops.sparse24_prune,
    "transposable": partial(ops.sparse24_prune, transposable=True),
    "transposable, both packs": ops.sparse24_prune_both,
}


@pytest.mark.parametrize("name", PRUNE)
def test_prune_and_compress(name, benchmark):
    """What a refresh costs, next to one dense product of 2048 rows."""
    weight, x = torch.randn(1024, 1024), torch.randn(2048, 1024)

    def ours():
        return PRUNE[name](weight)

    compare(
        Case("sparse24_mask+compress", "forward", f"O=1024 I=1024 {name}", "float32", DENSITY),
        {"F.linear B=2048": lambda: F.linear(x, weight), "ours": ours},
        dense="F.linear B=2048",
        rounds=11,
        benchmark=benchmark,
    )


@pytest.mark.parametrize("shape", STE_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grad_input_from_either_pack(shape, dtype, benchmark):
    """Packing and the gradient to the input: from the pack of W, and as a product with the pack of W'."""
    B, I, O = shape
    mask = ops.sparse24_mask(make_weight(O, I, dtype=dtype), transposable=True)
    grad_input = partial(OPS["sparse24_linear_grad_input"], backend="native")

    def one_pack(weight, grad):
        return grad_input(grad, *ops.sparse24_compress(weight, mask), I)

    def both_packs(weight, grad):
        return ops.sparse24_linear(grad, *ops.sparse24_compress_both(weight, mask)[2:], backend="native")

    def inputs_of(seed):
        return make_weight(O, I, dtype=dtype, seed=seed), make_case(B, I, O, dtype=dtype, seed=seed)[4]

    def check():
        weight, grad = inputs_of(0)
        exact = grad.double() @ torch.where(mask, weight, 0).double()
        limit = 2 * relative_error(one_pack(weight, grad), exact) + torch.finfo(dtype).eps
        assert relative_error(both_packs(weight, grad), exact) <= limit

    calls = {
        "dense": lambda weight, grad: grad @ weight,
        "ours-one-pack": one_pack,
        "ours-both-packs": both_packs,
    }
    size = (B * I + B * O + O * I) * dtype.itemsize
    name = str(dtype).removeprefix("torch.")
    compare(
        Case("sparse24_linear_ste", "grad_input", f"B={B} I={I} O={O}", name, DENSITY),
        {call: rotating(inputs_of, function, size, limit=8) for call, function in calls.items()},
        dense="dense",
        check=check,
        rounds=11,
        work_flops=B * I * O,
        dense_flops=2 * B * I * O,
        benchmark=benchmark,
    )
