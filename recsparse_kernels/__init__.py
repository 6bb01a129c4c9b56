"""Sparse and low-rank layers for recommender and extreme-classification models in PyTorch."""

from . import nn, ops, training
from .adapters import register_adapter
from .advise import advise
from .config import (
    cpu_level,
    cpu_levels,
    set_check_indices,
    set_cpu_level,
    set_huge_pages,
    set_tf32,
    show_config,
    use_huge_pages,
)
from .dense_checkpoint import dense_state_dict, load_dense_state_dict
from .explain import explain
from .optimizer_remap import remap_optimizer
from .swap import swap_modules, unswap_modules
from .tuning import load as _load_measured
from .tuning import tune

__version__ = "0.1.0"
__all__ = [
    "advise",
    "cpu_level",
    "cpu_levels",
    "dense_state_dict",
    "explain",
    "load_dense_state_dict",
    "nn",
    "ops",
    "register_adapter",
    "remap_optimizer",
    "set_check_indices",
    "set_cpu_level",
    "set_huge_pages",
    "set_tf32",
    "show_config",
    "swap_modules",
    "training",
    "tune",
    "unswap_modules",
    "use_huge_pages",
]

_load_measured()
