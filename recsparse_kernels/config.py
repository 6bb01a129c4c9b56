"""What was loaded, what is missing and why; the instruction level of the CPU kernels."""

import contextlib
import platform
import sys
from collections.abc import Iterator

import torch

from . import _native

CPU_LEVELS = ("portable", "avx2", "avx512")
CHECK_INDICES = ("raise", "clamp", "none")

HUGE_PAGES_FROM_BYTES = 1 << 22

_check_indices = "raise"
_CUDA_NAMESPACES = ["recsparse"] if _native.CUDA.loaded else []  # of ops; each library keeps its settings
_huge_pages = True


def cpu_levels() -> tuple[str, ...]:
    """Instruction levels built and run by this machine, lowest first; empty without the native library."""
    if not _native.CPU.loaded:
        return ()
    bits = torch.ops.recsparse.cpu_levels()
    return tuple(level for i, level in enumerate(CPU_LEVELS) if bits >> i & 1)


def cpu_level() -> str | None:
    """Instruction level in use: "portable", "avx2" or "avx512"; None without the native library."""
    return CPU_LEVELS[torch.ops.recsparse.cpu_level()] if _native.CPU.loaded else None


def set_cpu_level(level: str) -> None:
    """Force a lower instruction level than the machine has, for the whole process.

    Raises:
        ValueError: the level is unknown, was not built, or this machine does not run it.
    """
    if level not in cpu_levels():
        raise ValueError(f"level must be one of {cpu_levels()}, built and run here; got {level!r}")
    torch.ops.recsparse.set_cpu_level(CPU_LEVELS.index(level))


@contextlib.contextmanager
def use_cpu_level(level: str) -> Iterator[None]:
    """`set_cpu_level` for the length of a ``with`` block."""
    before = cpu_level()
    set_cpu_level(level)
    try:
        yield
    finally:
        set_cpu_level(before)


def use_huge_pages(*tensors: torch.Tensor | None) -> int:
    """Put large CPU tensors on 2 MB pages, where the system has them; the bytes for which it agreed.

    Random lookups in a table of many megabytes miss the TLB as often as the cache. Tables of this
    package are put on huge pages when they are made (`set_huge_pages`); call this for a dense table or
    for optimizer state. Values, shapes and addresses stay as they are; a copy is ordinary memory again.
    """
    if not _native.CPU.loaded:
        return 0
    large = [
        t for t in tensors if t is not None and t.device.type == "cpu" and t.nbytes >= HUGE_PAGES_FROM_BYTES
    ]
    return sum(torch.ops.recsparse.use_huge_pages(t.detach()) for t in large)


def set_huge_pages(enabled: bool) -> None:
    """Whether new tables and, on the CPU, outputs of 4 MB and more are put on huge pages (the default).

    Costs at most 2 MB each.
    """
    global _huge_pages
    _huge_pages = bool(enabled)
    if _native.CPU.loaded:
        torch.ops.recsparse.set_huge_pages(_huge_pages)


if _native.CPU.loaded:
    torch.library.register_fake("recsparse::use_huge_pages")(lambda tensor: 0)


def place_table(*tensors: torch.Tensor | None) -> None:
    """`use_huge_pages`, unless `set_huge_pages` says no."""
    if _huge_pages and not torch.compiler.is_compiling():
        use_huge_pages(*tensors)


def get_check_indices() -> str:
    """What GPU kernels do about indices out of range; see `set_check_indices`."""
    return _check_indices


def set_check_indices(mode: str) -> None:
    """How lookups on a GPU treat an index out of range. CPU kernels always raise ``IndexError``.

    Args:
        mode: "raise" (default): a device-side assertion, without a host sync, as torch's own
            embedding has. "clamp": the nearest valid index is used. "none": no check; such an index
            reads as a row of zeros and its gradient is dropped.

    Raises:
        ValueError: the mode is unknown.
    """
    global _check_indices
    if mode not in CHECK_INDICES:
        raise ValueError(f"mode must be one of {CHECK_INDICES}; got {mode!r}")
    _check_indices = mode
    for namespace in _CUDA_NAMESPACES:
        getattr(torch.ops, namespace).set_check_indices(CHECK_INDICES.index(mode))


def set_tf32(allowed: bool) -> None:
    """Whether the CUDA kernels of the 2:4 linear and its gradients may multiply float32 as tf32 (default: no).

    Tensor cores keep 10 bits of the mantissa of each factor, and sum in float32. The forward product of
    at most 16 rows, where the weight's bytes are the time, stays at full precision. The switches of torch
    (``torch.set_float32_matmul_precision``) are not read: a compiled graph would not see them change.
    """
    for namespace in _CUDA_NAMESPACES:
        getattr(torch.ops, namespace).set_tf32(bool(allowed))


def show_config() -> str:
    """Versions, libraries with the reason for each that is missing, and the backends in use."""
    lines = [
        f"python    {platform.python_version()} ({sys.platform}, {platform.machine()})",
        f"torch     {torch.__version__}",
        f"threads   {torch.get_num_threads()}",
    ]
    for library in _native.LIBRARIES:
        state = "loaded" if library.loaded else f"missing: {library.reason}"
        if library is _native.CUDA and library.loaded:
            state = _cuda_state()
        lines.append(f"{library.name.lstrip('_'):<13} {state}")
    lines.append(f"{'triton':<13} {_triton_state()}")
    if _native.CPU.loaded:
        lines.append(f"cpu level {cpu_level()} (built and run here: {', '.join(cpu_levels())})")
    else:
        lines.append("backend   reference only: correct, not fast")
    return "\n".join(lines)


def _cuda_state() -> str:
    runtime = torch.ops.recsparse.cuda_runtime_version()
    state = f"loaded (CUDA {runtime // 1000}.{runtime % 1000 // 10})"
    if not torch.cuda.is_available():
        return f"{state}; torch finds no GPU"
    reason = _native.why_not_on_gpu()
    return f"{state}; not used: {reason}" if reason else state


def _triton_state() -> str:
    from . import triton  # imports this module

    if triton.REASON:
        return f"missing: {triton.REASON}"
    return "interpreter (slow, for tests)" if triton.INTERPRETED else "loaded"
