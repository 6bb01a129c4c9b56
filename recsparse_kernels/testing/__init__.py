"""What tests and benches share: the twice rule, the backends to run, and (one file a family) the cases."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from .. import config
from ..config import cpu_levels
from ..ops._backend import OPS, TEST_BACKENDS, add_test_backend


def load_cuda_on_cpu(path: Path) -> bool:
    """Adds the backend "cuda", the CUDA kernels run on the CPU; False where their library is not built."""
    if not path.exists():
        return False
    torch.ops.load_library(path)
    add_test_backend("cuda", "recsparse_cuda_on_cpu")
    config._CUDA_NAMESPACES.append("recsparse_cuda_on_cpu")
    return True


def backends(
    op: str, device_type: str = "cpu", dtype: torch.dtype = torch.float32, *, interpreter: bool = True
) -> list:
    """pytest parameters: the reference, the native backend once for each instruction level, GPU kernels.

    Use with the ``backend`` fixture of tests/conftest.py, which sets the level.

    Args:
        interpreter: False leaves out Triton in its interpreter and CUDA on the CPU, for cases too large.
    """
    out = ["reference"]
    available = OPS[op].backends(device_type, dtype)
    if "native" in available:
        out += [f"native-{level}" for level in cpu_levels()]
    if interpreter:
        out += [b for b in ("triton", *TEST_BACKENDS) if b in available]
    return out


def assert_close(
    name: str,
    actual: Tensor,
    exact: Tensor,
    baseline: Tensor,
    factor: float = 2.0,
    terms: Tensor | None = None,
) -> None:
    """The kernel may err at most ``factor`` times as much as the reference does in the working dtype.

    Args:
        actual: from the kernel.
        exact: from the reference in float64.
        baseline: from the reference in the dtype of ``actual``.
        terms: sums of the sizes of what was added up. For a tensor of a few sums that cancel, which the
            baseline may have rounded well by chance.

    The largest error over the tensor counts. To it comes one rounding of the working dtype at the
    size of the largest exact value: the final store may round the other way; or at that of the largest of
    ``terms``.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, wanted {tuple(exact.shape)}"
    assert actual.dtype == baseline.dtype, f"{name}: dtype {actual.dtype}, wanted {baseline.dtype}"
    if exact.numel() == 0:
        return
    rounding = torch.finfo(baseline.dtype).eps
    actual, baseline, exact = actual.detach().double(), baseline.detach().double(), exact.detach().double()
    same_special = (actual.isnan() == exact.isnan()) & (actual.isinf() == exact.isinf())
    assert bool(same_special.all()), f"{name}: NaN or Inf where the definition has none, or the reverse"
    finite = exact.isfinite()
    if not bool(finite.any()):
        return
    error = (actual - exact)[finite].abs().max().item()
    allowed = factor * (baseline - exact)[finite].nan_to_num(0.0, 0.0, 0.0).abs().max().item()
    largest = exact[finite].abs().max().item()
    if terms is not None:
        largest = max(largest, terms.abs().max().item())
    allowed += rounding * largest
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def skip_without(path) -> None:
    """Skip the test, with the reason, when a data file is absent."""
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
