"""float32 on tensor cores, where `rk.set_tf32` allows it: the CUDA kernels of the 2:4 linear."""

import pytest
import torch

import recsparse_kernels as rk
from recsparse_kernels.ops._backend import OPS
from recsparse_kernels.testing import assert_close, backends
from recsparse_kernels.testing.sparse24 import make_case

pytestmark = pytest.mark.skipif(
    "cuda" not in backends("sparse24_linear"), reason="_cuda_on_cpu.so is not built"
)
SHAPES = [(17, 16, 8), (33, 75, 40), (20, 500, 9), (257, 40, 530), (130, 24, 129)]


@pytest.fixture
def tf32():
    rk.set_tf32(True)
    yield
    rk.set_tf32(False)


def rounded(x):
    """To 10 bits of mantissa, ties away from zero, as PTX ISA has it for cvt.rna.tf32."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def products(case, activation, backend, dtype=torch.float32):
    """Output, gradient to the input, gradient to the values."""
    input, values, metadata, bias, grad = (t.to(dtype) if t.is_floating_point() else t for t in case)
    output, _ = OPS["sparse24_linear"](
        input, values, metadata, bias, activation, False, False, backend=backend
    )
    return (
        output,
        OPS["sparse24_linear_grad_input"](grad, values, metadata, input.shape[1], backend=backend),
        OPS["sparse24_linear_grad_values"](grad, input, metadata, backend=backend),
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_factors_are_rounded_and_nothing_else_is(shape, tf32):
    case = make_case(*shape)
    input, values, metadata, bias, grad = case
    near = rounded(input), rounded(values), metadata, bias, rounded(grad)
    actual = products(case, 1, "cuda")
    exact = products(near, 1, "reference", torch.float64)
    baseline = products(near, 1, "reference")
    for name, *three in zip(("output", "grad_input", "grad_values"), actual, exact, baseline, strict=True):
        assert_close(name, *three)


def test_full_precision_unless_allowed_and_for_few_rows():
    for shape, differs in (((40, 64, 48), True), ((16, 64, 48), False)):
        case = make_case(*shape)
        full = products(case, 0, "cuda")[0]
        rk.set_tf32(True)
        try:
            assert torch.equal(full, products(case, 0, "cuda")[0]) != differs
        finally:
            rk.set_tf32(False)
        assert torch.equal(full, products(case, 0, "cuda")[0])
