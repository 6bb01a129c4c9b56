"""The random numbers of reference.fan_in, bit for bit: counters through a hash."""

import triton.language as tl

from ._device import device_function

GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
ROUND = tl.constexpr(0xD1B54A32D192ED03)
MASK64 = 2**64 - 1


def hash64(x: int) -> int:
    """`_hash` of reference.fan_in, on the host."""
    x &= MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def halves(key: int) -> tuple[int, int]:
    """64 bits as two signed 32-bit arguments: one kernel whatever the value."""
    return tuple((part & 0xFFFFFFFF ^ 2**31) - 2**31 for part in (key, key >> 32))


@device_function
def whole(low, high):
    """The uint64 of two `halves`."""
    return (high.to(tl.uint32).to(tl.uint64) << 32) | low.to(tl.uint32).to(tl.uint64)


@device_function
def hashed(x):
    """`hash64` of each uint64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@device_function
def mix32(x):
    """`_mix` of reference.fan_in, of each uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)
