"""Sparse and low-rank layers for recommender and extreme-classification models in PyTorch."""

from . import ops
from .config import cpu_level, cpu_levels, set_cpu_level, show_config

__version__ = "0.1.0"
__all__ = ["cpu_level", "cpu_levels", "ops", "set_cpu_level", "show_config"]
