import math
import pickle

import pytest

from recsparse_kernels.training.schedules import constant, cosine, cubic, linear, piecewise


def test_values():
    rho = cosine(0.5, 0.005, end_step=1000)
    assert rho(0) == 0.5 and rho(1000) == 0.005
    # METHODS P4: rho = 0.005 + (rho0 - 0.005) / 2 * (1 + cos(pi t / T))
    assert rho(300) == pytest.approx(0.005 + 0.495 / 2 * (1 + math.cos(math.pi * 0.3)))
    ramp = linear(0.0, 1.0, begin_step=10, end_step=20)
    assert [ramp(s) for s in (0, 10, 15, 20)] == [0.0, 0.0, 0.5, 1.0]
    assert cubic(0.0, 0.8, end_step=10)(5) == pytest.approx(0.8 - 0.8 * 0.5**3)
    assert constant(0.3)(10**9) == 0.3
    steps = piecewise((10, 0.0), (70, 0.5), (100, 0.0))
    assert [steps(s) for s in (0, 9, 10, 69, 70, 99)] == [0, 0, 0.5, 0.5, 0, 0]
    assert steps.end_step == 100 and steps.index(70) == 2


@pytest.mark.parametrize("make", [cosine, linear, cubic])
def test_past_the_end(make):
    with pytest.raises(ValueError, match=f"step 11 is past the end of {make.__name__}.0.5, 0, end_step=10"):
        make(0.5, end_step=10)(11)
    assert make(0.5, 0.1, end_step=10, hold=True)(11) == 0.1


def test_errors():
    with pytest.raises(ValueError, match="below end_step; got 5 and 5"):
        cosine(0.5, begin_step=5, end_step=5)
    with pytest.raises(ValueError, match="finite"):
        linear(math.nan, end_step=5)
    with pytest.raises(TypeError, match="end_step must be an int"):
        cosine(0.5, end_step=2.5)
    with pytest.raises(ValueError, match="at least 0"):
        cosine(0.5, end_step=5)(-1)
    with pytest.raises(ValueError, match="above 10; got 10"):
        piecewise((10, 0.5), (10, 0.0))
    with pytest.raises(ValueError, match="past the end of piecewise"):
        piecewise((10, 0.5))(10)


def test_pickle_and_equality():
    for schedule in (cosine(0.5, end_step=3), constant(0.1), piecewise((3, 0.1))):
        assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert cosine(0.5, end_step=3) != cosine(0.5, end_step=4)
