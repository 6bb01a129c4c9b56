"""Triton backend: one file per family, launchers beside kernels.

Loaded where it can run: torch was built for a GPU (CUDA or ROCm), or Triton's interpreter is on
(``TRITON_INTERPRET=1`` in the environment before the first import), which runs the same kernels on
CPU tensors, slowly, for tests. Also where nothing runs but all is compiled (`recsparse_kernels.triton.compile`).
"""

import importlib.util
import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
# Set by recsparse_kernels.triton.compile for its own process: launchers are there to be recorded.
COMPILING = not INTERPRETED and os.environ.get("RECSPARSE_TRITON_COMPILE", "0") == "1"


def _why_not() -> str:
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed"
    if not (torch.version.cuda or torch.version.hip or INTERPRETED or COMPILING):
        return "torch is a CPU build"
    return ""


REASON = _why_not()  # why the backend is missing; "" when it is there
LAUNCHERS: dict = {}  # op -> function with the signature of its reference
DEVICE_TYPES: tuple[str, ...] = ()

if not REASON:
    from . import (  # noqa: F401  (register their launchers)
        _launch,
        fan_in,
        fan_in_loss,
        fan_in_rewire,
        fan_in_topk,
        low_rank,
        low_rank_embedding,
        low_rank_embedding_max,
        low_rank_fields,
        masked_embedding,
        masked_embedding_grad,
        masked_embedding_matmul,
        masked_embedding_table,
        masked_embedding_windows,
        sparse24,
        sparse24_linear,
    )

    LAUNCHERS, DEVICE_TYPES = _launch.LAUNCHERS, _launch.DEVICE_TYPES
