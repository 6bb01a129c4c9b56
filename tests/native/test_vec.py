"""csrc/cpu/vec.h and vec_math.h on every instruction level, against numpy and torch."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import recsparse_kernels as rk
from recsparse_kernels.config import CPU_LEVELS
from recsparse_kernels.reference._activation import activate, activate_grad
from recsparse_kernels.testing import assert_close

sys.path.insert(0, str(Path(__file__).parent))
native = pytest.importorskip("_native_test", reason="built by cmake -DRECSPARSE_TESTS=ON (make test does)")

IDENTITY, EXP, ERF, SOFTPLUS, ACTIVATE, ACTIVATE_GRAD = range(6)
ALL_BITS = np.arange(65536, dtype=np.uint16)


@pytest.fixture(params=rk.cpu_levels())
def level(request):
    native.set_level(CPU_LEVELS.index(request.param))
    return request.param


def special_and_random() -> np.ndarray:
    rng = np.random.default_rng(0)
    any_bits = rng.integers(0, 2**32, 100_003, dtype=np.uint32).view(np.float32)
    half_range = rng.normal(size=50_000).astype(np.float32) * 10.0 ** rng.integers(-9, 5, 50_000)
    # every float16 and bfloat16 value and the points half-way between neighbours, where rounding decides
    with np.errstate(invalid="ignore", over="ignore"):
        halves = ALL_BITS.view(np.float16).astype(np.float32)
    nudged = (halves.view(np.uint32)[:, None] + np.array([0, 0xFFF, 0x1000, 0x1001], np.uint32)).ravel()
    brains = (
        ALL_BITS.astype(np.uint32)[:, None] << 16 | np.array([0, 0x7FFF, 0x8000, 0x8001], np.uint32)
    ).ravel()
    return np.concatenate(
        [any_bits, half_range.astype(np.float32), nudged.view(np.float32), brains.view(np.float32)]
    )


def assert_same_bits_or_both_nan(actual, wanted, to_float):
    actual, wanted = torch.from_numpy(actual).view(to_float), wanted.view(to_float)
    assert torch.equal(actual.isnan(), wanted.isnan())
    number = ~wanted.isnan()
    assert torch.equal(actual.view(torch.int16)[number], wanted.view(torch.int16)[number])


@pytest.mark.parametrize("scalar", [False, True], ids=["vector", "scalar"])
@pytest.mark.parametrize("name, dtype", [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_rounding_to_16_bit_is_torchs(level, name, dtype, scalar):
    x = special_and_random()
    actual = getattr(native, f"narrow_{name}")(x, scalar)
    assert_same_bits_or_both_nan(actual, torch.from_numpy(x).to(dtype), dtype)


@pytest.mark.parametrize("name, dtype", [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_widening_is_exact(level, name, dtype):
    actual = torch.from_numpy(getattr(native, f"widen_{name}")(ALL_BITS))
    wanted = torch.from_numpy(ALL_BITS.view(np.int16)).view(dtype).float()
    assert torch.equal(actual.isnan(), wanted.isnan())
    assert torch.equal(actual[~wanted.isnan()], wanted[~wanted.isnan()])


def test_partial_vectors(level):
    for n in range(2 * native.lanes() + 2):
        x = np.arange(n, dtype=np.float32)
        assert np.array_equal(native.apply(IDENTITY, 0, x), x)
        assert np.array_equal(native.widen_f16(x.astype(np.float16).view(np.uint16)), x)
        assert np.array_equal(native.narrow_f16(x, False), x.astype(np.float16).view(np.uint16))


def test_lane_reductions(level):
    rng = np.random.default_rng(1)
    x = rng.integers(-1000, 1000, native.lanes()).astype(np.float32)  # integers: exact in any order
    assert native.sum_lanes(x) == x.sum()
    assert native.max_lanes(x) == x.max()


def ulps(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest error in units of the last place of the exact value; below 2^-126, of 2^-149."""
    spacing = torch.from_numpy(np.spacing(np.maximum(np.abs(exact.numpy()), 2.0**-126).astype(np.float32)))
    return ((actual.double() - exact).abs() / spacing.double()).max().item()


@pytest.mark.parametrize(
    "function, exact, low, high, bound",
    [
        (EXP, torch.exp, -87.0, 88.7, 2.0),
        (SOFTPLUS, torch.nn.functional.softplus, -80.0, 80.0, 3.0),
        (ERF, torch.erf, -5.0, 5.0, 4.0),
    ],
    ids=["exp", "softplus", "erf"],
)
def test_functions_are_accurate(level, function, exact, low, high, bound):
    x = torch.linspace(low, high, 400_001)
    assert ulps(torch.from_numpy(native.apply(function, 0, x.numpy())), exact(x.double())) <= bound


def test_exp_saturates(level):
    x = np.array([89.0, 200.0, np.inf, -104.0, -1e30, -np.inf, np.nan, -100.0], np.float32)
    actual = native.apply(EXP, 0, x)
    assert np.isinf(actual[:3]).all() and (actual[3:6] == 0).all() and np.isnan(actual[6])
    assert actual[7] == pytest.approx(np.exp(-100.0), rel=2e-2)  # subnormal


@pytest.mark.parametrize("gradient", [False, True], ids=["value", "derivative"])
@pytest.mark.parametrize("activation", range(6))
def test_activations_are_as_good_as_torchs(level, activation, gradient):
    x = torch.cat([torch.linspace(-12, 12, 100_001), torch.linspace(-1e-3, 1e-3, 1001)])
    definition = activate_grad if gradient else activate
    exact, torchs = definition(x.double(), activation), definition(x, activation)
    actual = torch.from_numpy(native.apply(ACTIVATE_GRAD if gradient else ACTIVATE, activation, x.numpy()))
    assert_close("activation", actual, exact, torchs)


@pytest.mark.parametrize("activation", range(6))
def test_activations_pass_nan_and_infinity_like_torch(level, activation):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e30, -1e30])
    actual = torch.from_numpy(native.apply(ACTIVATE, activation, x.numpy()))
    wanted = activate(x.double(), activation).float()  # in float32, torch's GELU of infinity is sometimes NaN
    torch.testing.assert_close(actual, wanted, equal_nan=True, rtol=0, atol=0)
