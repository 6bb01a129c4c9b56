"""What is compared: the rules of each swap, and the output layers."""

import dataclasses
from collections.abc import Callable

from torch import nn

from ..nn import FixedFanInLinear, LowRankEmbedding, LowRankLinear, MaskedEmbedding, Sparse24Linear
from ..swap import swap_modules
from ..swap_rules import Rules
from .models import EMBEDDING_DIM, HIDDEN

TABLE_DENSITY = 0.2
TABLE_RANK = EMBEDDING_DIM // 4
# The first layer (13 wide) and the last (1 wide) cost next to nothing
MIN_NUMEL = 8192
FAN_INS = (64, 32)


@dataclasses.dataclass(frozen=True)
class Variant:
    name: str
    rules: Rules | None  # of swap_modules; None: dense

    def swap(self, model: nn.Module) -> list[str]:
        """Replace layers in place; a line for each, with its bytes."""
        if self.rules is None:
            return []
        report = swap_modules(model, self.rules, min_numel=MIN_NUMEL)
        return [
            f"{entry.name}: {entry.before} -> {model.get_submodule(entry.name)}, "
            f"{entry.bytes_before:,} -> {entry.bytes_after:,} bytes"
            for entry in report.swapped
        ]


def low_rank_linear(linear: nn.Linear) -> nn.Module:
    """At a quarter of the narrower side, a multiple of 8."""
    return LowRankLinear.from_dense(
        linear, rank=max(8, min(linear.in_features, linear.out_features) // 32 * 8)
    )


MASKED_TABLE = (MaskedEmbedding, {"density": TABLE_DENSITY})
LOW_RANK_TABLE = (LowRankEmbedding, {"rank": TABLE_RANK})

CLICK_VARIANTS = (
    Variant("dense", None),
    Variant("2:4 MLP", {nn.Linear: Sparse24Linear}),
    Variant(f"masked tables, density {TABLE_DENSITY}", {nn.Embedding: MASKED_TABLE}),
    Variant("low-rank MLP and tables", {nn.Linear: low_rank_linear, nn.Embedding: LOW_RANK_TABLE}),
    Variant(
        "all together", {"top.0": low_rank_linear, nn.Linear: Sparse24Linear, nn.Embedding: MASKED_TABLE}
    ),
)


def label_heads(num_labels: int) -> list[tuple[str, Callable[[], nn.Module]]]:
    """Name and maker of each output layer, dense first."""

    def fixed(fan_in: int) -> Callable[[], nn.Module]:
        return lambda: FixedFanInLinear(HIDDEN, num_labels, fan_in)

    heads = [("dense head", lambda: nn.Linear(HIDDEN, num_labels))]
    return heads + [(f"fixed fan-in {fan_in} of {HIDDEN}", fixed(fan_in)) for fan_in in FAN_INS]
