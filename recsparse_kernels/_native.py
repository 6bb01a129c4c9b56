"""Loads the op libraries that were built, and remembers why the others are missing."""

import dataclasses
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


CPU = _load("_native_cpu")
LIBRARIES = (CPU,)
