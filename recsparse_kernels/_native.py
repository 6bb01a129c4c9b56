"""Loads the op libraries that were built, and remembers why the others are missing."""

import dataclasses
import functools
from pathlib import Path

import torch

MINIMUM_TORCH = (2, 10)  # TORCH_TARGET_VERSION in CMakeLists.txt


@dataclasses.dataclass(frozen=True)
class Library:
    name: str
    path: Path
    loaded: bool
    reason: str  # why not loaded; "" when it is


def _load(name: str) -> Library:
    path = Path(__file__).with_name(f"{name}.so")
    if not path.exists():
        return Library(
            name, path, False, f"{path.name} is not there: it was not built, see README.md, Install"
        )
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < MINIMUM_TORCH:
        return Library(name, path, False, f"needs torch >= 2.10, this is torch {torch.__version__}")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return Library(name, path, False, f"does not load: {error}")
    return Library(name, path, True, "")


def _load_cpu() -> Library:
    library = _load("_native_cpu")
    reason = ""
    if library.loaded and not hasattr(torch.ops.recsparse, "cpu_levels"):
        reason = "was built from other sources than this package: build it again"
    elif library.loaded and torch.ops.recsparse.cpu_levels() == 0:
        reason = "was built for another machine's instructions (RECSPARSE_CPU_LEVELS=NATIVE)"
    return dataclasses.replace(library, loaded=False, reason=reason) if reason else library


MINIMUM_CAPABILITY = (8, 0)  # of a GPU: mma.sp and cp.async


def _load_cuda(cpu: Library) -> Library:
    """The CUDA kernels, where they can run. Nothing here starts CUDA, so that a process may fork later."""
    name = "_native_cuda"
    path = Path(__file__).with_name(f"{name}.so")

    def missing(reason: str) -> Library:
        return Library(name, path, False, reason)

    if not path.exists():
        return missing(
            f"{path.name} is not there: the package was built without nvcc (make demo leaves it out)"
        )
    if torch.version.cuda is None:
        return missing("torch is not a CUDA build")
    if not cpu.loaded:
        return missing(f"needs {cpu.path.name}, which defines the ops")
    library = _load(name)
    if not library.loaded:
        return library
    runtime, driver = torch.ops.recsparse.cuda_runtime_version(), torch.ops.recsparse.cuda_driver_version()
    if driver // 1000 < runtime // 1000:
        have = f"supports CUDA {driver // 1000}.{driver % 1000 // 10}" if driver else "is missing"
        return missing(f"built with CUDA {runtime // 1000}.{runtime % 1000 // 10}; the NVIDIA driver {have}")
    return library


@functools.cache
def why_not_on_gpu() -> str:
    """Why the CUDA kernels do not run on the GPUs of this process; "" when they do. Starts CUDA."""
    if not CUDA.loaded:
        return CUDA.reason
    for device in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(device)
        if capability < MINIMUM_CAPABILITY:
            return (
                f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}; "
                f"the kernels need {MINIMUM_CAPABILITY[0]}.{MINIMUM_CAPABILITY[1]}"
            )
    return ""


CPU = _load_cpu()
CUDA = _load_cuda(CPU)
LIBRARIES = (CPU, CUDA)
