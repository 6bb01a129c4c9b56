"""What every family's launchers share: registration, the launch itself, the check of indices."""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from ..config import get_check_indices
from . import COMPILING, INTERPRETED

LAUNCHERS: dict[str, Callable] = {}
DEVICE_TYPES = ("cuda", "cpu") if INTERPRETED or COMPILING else ("cuda",)  # ROCm says "cuda" too

# An option of `launch`. By itself ptxas wants as many programs at once on a multiprocessor as can be, and
# spills a register or two where that makes room for one more; with it none is spilled that need not be.
NO_SPILL = {"ptx_options": "--minnctapersm=1"}

# While this is a list, launches are written to it instead of run: (kernel, arguments, options).
# recsparse_kernels.triton.compile uses it to build, without a GPU, what the launchers would run.
_recorded: list | None = None


def hip_options(options: dict) -> dict:
    """The options of `launch` as they are for AMD GPUs: no ptxas, 64 KiB of shared memory, which two stages
    of our largest tiles fit in, and warps of 64: four have the threads of eight, and all the registers."""
    kept = {name: value for name, value in options.items() if name not in NO_SPILL}
    for name, most in (("num_stages", 2), ("num_warps", 4)):
        if name in kept:
            kept[name] = min(most, kept[name])
    return kept


def launcher(function: Callable) -> Callable:
    """Registers the Triton implementation of the op of the same name; signature as in ``reference``."""
    LAUNCHERS[function.__name__] = function
    return function


def launch(kernel, grid: tuple[int, ...], *args, **options) -> None:
    """``kernel[grid](*args, **options)`` on the device of the first tensor; nothing for an empty grid.

    ``options``: the kernel's constexpr arguments by name, ``num_warps``, ``num_stages``, ``NO_SPILL``.
    """
    if _recorded is not None:
        _recorded.append((kernel, args, options))
        return
    if 0 in grid:
        return
    if INTERPRETED or torch.version.hip:
        options = hip_options(options)
    first = next(arg for arg in args if isinstance(arg, Tensor))
    with torch.cuda.device_of(first):
        kernel[grid](*args, **options)


@contextlib.contextmanager
def recording():
    """Within the block launches are collected, not run; gives the list."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def checked_indices(name: str, indices: Tensor, size: int) -> Tensor:
    """The indices to use, each in [0, size) as `recsparse_kernels.set_check_indices` asks; no host sync on a GPU.

    Kernels must be memory-safe without it: an index out of range reads nothing and writes nothing.

    Raises:
        IndexError: on CPU tensors (the interpreter). On a GPU the device asserts, as torch's own
            embedding does.
    """
    mode = get_check_indices()
    if mode == "none" or indices.numel() == 0 or _recorded is not None:
        return indices
    if mode == "clamp":
        return indices.clamp(0, max(size - 1, 0))
    low, high = torch.aminmax(indices)
    inside = (low >= 0) & (high < size)
    if indices.device.type == "cpu":
        if not bool(inside):
            raise IndexError(f"{name} must be in [0, {size}); got values in [{int(low)}, {int(high)}]")
    else:
        torch._assert_async(inside, f"{name} must be in [0, {size})")
    return indices
