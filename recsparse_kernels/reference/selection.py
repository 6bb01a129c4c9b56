"""Histograms and masks over the order of scores, of which an exact selection is made (training/selection.py).

The key of a score is a whole number in the order of the floats: the bits of float32 (of float64 for float64
scores), counted down for negative ones; -0 is 0. Scores of equal key are ranked by their tie keys, a
permutation of all 64-bit integers (the finalizer of SplitMix64) at ``first_position + i``.
"""

import torch
from torch import Tensor

MOST_DIGIT_BITS = 12  # csrc/selection_keys.h


def selection_histogram(
    scores: Tensor, ties_of: int | None, first_position: int, shift: int, width: int, first: int
) -> Tensor:
    """``counts[d]``, int64 ``[2 ** width]``: how many keys have ``key >> shift == first + d``.

    Counted are the keys of scores ``[n]`` or, with ``ties_of``, the tie keys of those whose key that is.
    """
    _check(scores)
    if not 0 <= shift < 64:
        raise ValueError(f"shift must be in [0, 64); got {shift}")
    if not 1 <= width <= MOST_DIGIT_BITS:
        raise ValueError(f"width must be in [1, {MOST_DIGIT_BITS}]; got {width}")
    keys = _keys(scores)
    if ties_of is not None:
        keys = _tie_keys(first_position, len(scores), scores.device)[keys == ties_of]
    digit = (keys >> shift) - first
    return torch.bincount(digit[(digit >= 0) & (digit < 1 << width)], minlength=1 << width)


def selection_mask(scores: Tensor, key: int, tie: int | None, first_position: int) -> Tensor:
    """Bool ``[n]``: keys above ``key`` and, unless ``tie`` is None, equal ones of tie keys of at least that."""
    _check(scores)
    keys = _keys(scores)
    taken = keys > key
    if tie is not None:
        taken |= (keys == key) & (_tie_keys(first_position, len(scores), scores.device) >= tie)
    return taken


def _check(scores: Tensor) -> None:
    if scores.dim() != 1:
        raise ValueError(f"scores must be [n], one-dimensional; got shape {list(scores.shape)}")


def _keys(scores: Tensor) -> Tensor:
    if scores.dtype == torch.float64:
        bits = (scores + 0.0).view(torch.int64)  # + 0.0: -0 becomes 0
        return bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    bits = (scores.to(torch.float32) + 0.0).view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()


def _tie_keys(begin: int, length: int, device: torch.device) -> Tensor:
    x = torch.arange(length, dtype=torch.int64, device=device) + begin
    x = (x ^ _shifted(x, 30)) * signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def signed(number: int) -> int:
    """The 64-bit integer of the same low bits."""
    number &= 0xFFFFFFFFFFFFFFFF
    return number - (1 << 64) if number >> 63 else number


def _shifted(x: Tensor, places: int) -> Tensor:
    """Shift right, filling with zeros."""
    return (x >> places) & ((1 << (64 - places)) - 1)
