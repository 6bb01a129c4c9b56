"""What is compared: the rules of each swap, and the heads."""

import dataclasses
from collections.abc import Callable

from torch import nn

from .models import HIDDEN


@dataclasses.dataclass(frozen=True)
class Variant:
    name: str
    swap: Callable[[nn.Module], list[str]]  # in place; a line for each swapped layer


CLICK_VARIANTS = (Variant("dense", lambda model: []),)


def label_heads(num_labels: int) -> list[tuple[str, Callable[[], nn.Module]]]:
    return [("dense head", lambda: nn.Linear(HIDDEN, num_labels))]
