"""The name of a GPU, as files of measured choices have it."""

import functools

import torch


def gpu_name(device: torch.device | None = None) -> str | None:
    """As "NVIDIA H200, compute capability 9.0"; by default of the current GPU.

    None where this process has not started CUDA (or ROCm); it is not started for this.
    """
    if not torch.cuda.is_initialized():
        return None
    index = device.index if device is not None else None
    return _name_of(torch.cuda.current_device() if index is None else index)


@functools.cache
def _name_of(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"
