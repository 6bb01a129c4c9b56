"""Data of the demo: readers for public formats, and generators for machines without any."""

from ._types import ClickLog, DataError, LabelData, LabelSplit, Ragged
from .generate import generate_click_log, generate_label_data
from .load import load

__all__ = [
    "ClickLog",
    "DataError",
    "LabelData",
    "LabelSplit",
    "Ragged",
    "generate_click_log",
    "generate_label_data",
    "load",
]
