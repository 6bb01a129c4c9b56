"""Tables with nothing in them, for the launches of the masked embedding files that are compiled ahead of time."""

import torch

from .masked_embedding_rows import cdiv


def sample_tables(V: int, D: int, density: float, dtype: torch.dtype, device: str = "meta") -> dict:
    """By layout, arguments with nothing in them: values, rows, bases, starts, columns, V, D."""
    nnz, mask_bytes, kept = int(V * D * density), cdiv(D, 8), max(1, int(D * density))

    def empty(*shape, dtype):
        return torch.empty(shape, dtype=dtype, device=device)

    bases = empty(cdiv(V, 65536), dtype=torch.int64)
    tables = {
        "bitmask": (
            empty(nnz, dtype=dtype),
            empty(V, mask_bytes + 4, dtype=torch.uint8),
            bases,
            None,
            None,
            V,
            D,
        ),
        "fixed_k": (
            empty(V, kept, dtype=dtype),
            empty(V, mask_bytes, dtype=torch.uint8),
            None,
            None,
            None,
            V,
            D,
        ),
    }
    if D <= 256:
        rows, starts = empty(cdiv(V, 64), 12, dtype=torch.uint8), empty(V // 8 + 1, dtype=torch.int32)
        columns = empty(V // 8 * 2, dtype=torch.uint8)
        tables["row_remap"] = (empty(V // 8 * 2, dtype=dtype), rows, bases, starts, columns, V, D)
    return tables


# Layout, D and dtype of what is compiled: every tile width, every layout, every dtype.
SAMPLES = [("bitmask", D, torch.float32) for D in (10, 32, 64, 128, 256, 512)]
SAMPLES += [("fixed_k", 64, torch.float32), ("row_remap", 64, torch.float32)]
SAMPLES += [("bitmask", 64, torch.bfloat16), ("bitmask", 64, torch.float16)]
