"""Drop-in layers."""

from .fan_in import FixedFanInLinear
from .fan_in_head import FanInHead, label_order

__all__ = ["FanInHead", "FixedFanInLinear", "label_order"]
