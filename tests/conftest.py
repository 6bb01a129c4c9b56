import os
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # before the package is imported

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

import recsparse_kernels as rk  # noqa: E402
from recsparse_kernels.config import get_check_indices, use_cpu_level  # noqa: E402
from recsparse_kernels.testing import load_cuda_on_cpu  # noqa: E402

# New memory is filled with NaN (integers: their maximum), so an element never written is found.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True

# Examples follow from the test alone, so that a commit passes or fails whenever it is tested;
# ``--hypothesis-profile default`` draws others each time.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("repeatable")

# Before tests are collected: their parameters ask which backends there are.
load_cuda_on_cpu(Path(__file__).with_name("native") / "_cuda_on_cpu.so")


@pytest.fixture(autouse=True)
def seed():
    """Every test sees the same numbers, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def backend(request):
    """Parametrize with ``testing.backends(op)``, indirect: sets the instruction level, gives the backend.

    "cuda-90" runs the CUDA kernels on the CPU as host code picks them for that architecture.
    """
    name, _, level = request.param.partition("-")
    if not level:
        yield name
        return
    if name == "cuda":
        torch.ops.recsparse_cuda_on_cpu.set_architecture(int(level))
        yield name
        torch.ops.recsparse_cuda_on_cpu.set_architecture(80)
        return
    with use_cpu_level(level):
        yield name


@pytest.fixture
def threads():
    """`torch.set_num_threads`, set back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def check_indices():
    """`rk.set_check_indices`, set back after the test."""
    before = get_check_indices()
    yield rk.set_check_indices
    rk.set_check_indices(before)


@pytest.fixture(params=rk.cpu_levels() or [None], ids=str)
def cpu_level(request):
    """Runs the test once for each instruction level of the machine."""
    if request.param is None:
        pytest.skip("the native library is not built")
    with use_cpu_level(request.param):
        yield request.param
