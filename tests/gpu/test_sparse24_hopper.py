"""The 2:4 linear of Hopper (wgmma.sp, bulk copies) on such a GPU: right, the same every time, and replaceable."""

import pytest
import torch

from bench.gpu import without_warpgroups
from recsparse_kernels.ops._backend import OPS
from recsparse_kernels.testing import assert_close
from recsparse_kernels.testing.sparse24 import make_case

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available()
    or torch.cuda.get_device_capability() != (9, 0)
    or "native" not in OPS["sparse24_linear"].backends("cuda", torch.bfloat16),
    reason="needs a GPU of compute capability 9.0 and the CUDA library",
)

# (B, I, O): each tile, its edges, the depth in parts, many tiles a block, masked and bulk stores
SHAPES = [
    (5, 120, 21),
    (16, 4096, 4096),
    (32, 1152, 200),
    (64, 8192, 1000),
    (100, 2048, 130),
    (129, 2048, 2048),
    (1000, 1024, 1048),
    (4096, 4096, 4096),
]


@pytest.fixture(params=SHAPES, ids=str)
def call(request):
    dtype = torch.bfloat16 if request.param[0] % 2 else torch.float16
    case = make_case(*request.param, dtype=dtype)[:4]
    return tuple(t.cuda() for t in case)


def run(call):
    return OPS["sparse24_linear"].overload("native")(*call, 2, True, False)


def test_equals_the_definition(call):
    input, values, metadata, bias = call
    exact = OPS["sparse24_linear"].overload("reference")(
        input.double(), values.double(), metadata, bias.double(), 2, True, False
    )
    baseline = OPS["sparse24_linear"].overload("reference")(*call, 2, True, False)
    for name, *three in zip(("output", "sum"), run(call), exact, baseline, strict=True):
        assert_close(name, *three)


def test_agrees_with_the_kernel_of_other_gpus(call):
    for name, own, other in zip(
        ("output", "sum"), run(call), without_warpgroups(lambda: run(call)), strict=True
    ):
        assert_close(name, own, other.double(), other)


def test_a_hundred_runs_give_the_same(call):
    wanted = run(call)
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(run(call), wanted, strict=True))
