"""Products and casts of every kernel: sums in float32, and bfloat16 right in the interpreter too."""

import triton.language as tl

from . import INTERPRETED
from ._device import device_function

# The interpreter multiplies bfloat16 by its bits and loses the carry when it rounds to bfloat16.
_INTERPRETED = tl.constexpr(INTERPRETED)


@device_function
def dot(a, b, acc):
    """acc + a b; float32 operands are multiplied in full (tf32 keeps 10 bits of them)."""
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@device_function
def cast(x, dtype: tl.constexpr):
    """A float32 tile in ``dtype``, rounded to nearest even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x != x, 0x7FC00000, bits + 0x7FFF + ((bits >> 16) & 1))
        y = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(dtype)
    return y
