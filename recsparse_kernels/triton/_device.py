"""Functions that kernels call."""

from collections.abc import Callable

import triton

from . import INTERPRETED


def device_function(function: Callable) -> Callable:
    """``triton.jit`` for a function called by kernels, not launched.

    In the interpreter it is the function itself, which runs as part of the calling kernel: a jitted one
    would patch ``triton.language`` anew at every call, which costs more than most bodies.
    """
    return function if INTERPRETED else triton.jit(function)
