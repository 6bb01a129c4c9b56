"""Checks of what only the caller can fix: which argument, what was wanted, what came."""

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)


def shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def check_tensor(name: str, value) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")


def check_dtype(name: str, tensor: Tensor, wanted: tuple[torch.dtype, ...] = FLOAT_DTYPES) -> None:
    check_tensor(name, tensor)
    if tensor.dtype not in wanted:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in wanted)
        raise TypeError(f"{name} must be one of {names}; got {tensor.dtype}")


def check_like(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Same dtype and device."""
    check_tensor(name, tensor)
    if tensor.dtype != like.dtype:
        raise TypeError(f"{name} must have the dtype of {like_name}, {like.dtype}; got {tensor.dtype}")
    check_device(name, tensor, like_name, like)


def check_device(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name}, {like.device}; got {tensor.device}")


def in_autocast(tensor: Tensor) -> bool:
    """Whether ops cast the tensor; never one without data."""
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


def check_in_features(input: Tensor, in_features: int) -> None:
    """The width a layer was made for; an op that pads or reads chosen columns would take others too."""
    check_tensor("input", input)
    if input.shape[-1:] != (in_features,):
        raise ValueError(
            f"input must have shape [..., I], I = in_features = {in_features}; got {shape(input)}"
        )


def check_shape(name: str, tensor: Tensor, wanted: tuple, letters: str = "") -> None:
    """``wanted`` holds sizes, or None where any size will do; ``letters`` explains them: "[O, F]"."""
    check_tensor(name, tensor)
    sizes = tensor.shape
    fits = len(sizes) == len(wanted)
    if fits:
        for size, want in zip(sizes, wanted, strict=True):  # three times as fast as all(): every call pays
            if want is not None and size != want:
                fits = False
                break
    if not fits:
        text = "(" + ", ".join("any" if w is None else str(w) for w in wanted) + ")"
        raise ValueError(
            f"{name} must have shape {letters or ''}{' = ' if letters else ''}{text}; got {shape(tensor)}"
        )
