"""The passes over scores that `training.select_largest` makes."""

import torch

from ..reference import selection as reference
from ._backend import Op

HISTOGRAM = Op(
    reference.selection_histogram,
    fake=lambda scores, ties_of, first_position, shift, width, first: scores.new_empty(
        1 << width, dtype=torch.int64
    ),
    autocast=False,
)
MASK = Op(
    reference.selection_mask,
    fake=lambda scores, key, tie, first_position: torch.empty_like(scores, dtype=torch.bool),
    autocast=False,
)
