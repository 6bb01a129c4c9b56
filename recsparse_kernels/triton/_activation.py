"""The fused activations in Triton, by the numbers of recsparse_kernels/ops/_activation.py.

0 none, 1 ReLU, 2 GELU (erf form), 3 SiLU, 4 sigmoid, 5 tanh. NaN passes through all of them.
"""

import triton.language as tl

from ._device import device_function


@device_function
def _tanh(x):
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    large = (1.0 - e) / (1.0 + e)
    large = tl.where(x < 0, -large, large)
    # near zero 1 - e cancels: the series, up to x^9, is good to 1e-8 there
    q = x * x
    series = x * (1.0 + q * (-0.33333333333 + q * (0.13333333333 + q * (-0.05396825397 + q * 0.02186948854))))
    return tl.where(size < 0.25, series, large)


@device_function
def activate(x, CODE: tl.constexpr):
    """The activation of a float32 tile."""
    if CODE == 1:
        y = tl.where(x <= 0, 0.0, x)
    elif CODE == 2:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif CODE == 3:
        y = x / (1.0 + tl.exp(-x))
    elif CODE == 4:
        y = 1.0 / (1.0 + tl.exp(-x))
    elif CODE == 5:
        y = _tanh(x)
    else:
        y = x
    return y


@device_function
def slope(x, CODE: tl.constexpr):
    """d activate(x) / dx of a float32 tile, CODE not 0."""
    if CODE == 1:
        y = tl.where(x > 0, 1.0, 0.0)
    elif CODE == 2:
        y = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif CODE == 3:
        s = 1.0 / (1.0 + tl.exp(-x))
        y = s * (1.0 + x * (1.0 - s))
    elif CODE == 4:
        s = 1.0 / (1.0 + tl.exp(-x))
        y = s * (1.0 - s)
    else:
        t = _tanh(x)
        y = 1.0 - t * t
    return y


@device_function
def slope_of_output(y, CODE: tl.constexpr):
    """The same from y = activate(x): ReLU, sigmoid and tanh."""
    if CODE == 1:
        d = tl.where(y > 0, 1.0, 0.0)
    elif CODE == 4:
        d = y * (1.0 - y)
    else:
        d = 1.0 - y * y
    return d
