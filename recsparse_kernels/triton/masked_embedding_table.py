"""Masked embedding tables, Triton: the table as a whole.

    masked_embedding_unpack   output[i, :] = W[i, :], and back: values = the kept of a dense [V, D]
    masked_embedding_repack   the values of one table at the places that another keeps
    masked_embedding_renorm   rows looked up are scaled down to max_norm, in place

Rows are found by masked_embedding_rows.py; the tiles are those of lookups (masked_embedding.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import NO_SPILL, checked_indices, launch, launcher
from ._precision import cast
from .masked_embedding import dense_rows, rows_in_tile
from .masked_embedding_cases import SAMPLES, sample_tables
from .masked_embedding_rows import cdiv, key_dtype, locate, read_rows, table_of


@triton.jit
def _gather_kernel(
    dense_ptr,   # [V, D]
    values_ptr,  # [nnz], written
    rows_ptr, bases_ptr, starts_ptr, columns_ptr,
    V, D, K, nnz, kept_rows,
    LAYOUT: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # one program: BLOCK_N rows x BLOCK_D columns
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first_column = tl.program_id(1) * BLOCK_D
    d = first_column + tl.arange(0, BLOCK_D)
    kept, start, within = locate(
        rows_ptr, bases_ptr, starts_ptr, columns_ptr, row, row < V, first_column, D, K, nnz, kept_rows,
        LAYOUT, WIDE, 1, BLOCK_D,
    )  # fmt: skip
    tile = tl.load(dense_ptr + row[:, None] * D + d[None, :], mask=kept, other=0.0)
    tl.store((values_ptr + start)[:, None] + within, tile, mask=kept)


@triton.jit
def _repack_kernel(
    values_ptr,      # [nnz] of the old table
    rows_ptr, bases_ptr, starts_ptr, columns_ptr,
    new_values_ptr,  # [new nnz], written
    new_rows_ptr, new_bases_ptr, new_starts_ptr, new_columns_ptr,
    V, D, K, nnz, kept_rows, new_K, new_nnz, new_kept_rows,
    LAYOUT: tl.constexpr, NEW_LAYOUT: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # one program: BLOCK_N rows x BLOCK_D columns
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first_column = tl.program_id(1) * BLOCK_D
    tile = read_rows(
        values_ptr, rows_ptr, bases_ptr, starts_ptr, columns_ptr, row, row < V, first_column, D, K, nnz,
        kept_rows, LAYOUT, WIDE, BLOCK_D,
    )  # fmt: skip
    kept, start, within = locate(
        new_rows_ptr, new_bases_ptr, new_starts_ptr, new_columns_ptr, row, row < V, first_column, D, new_K,
        new_nnz, new_kept_rows, NEW_LAYOUT, WIDE, 1, BLOCK_D,
    )  # fmt: skip
    tl.store((new_values_ptr + start)[:, None] + within, tile, mask=kept)


@triton.jit
def _renorm_kernel(
    values_ptr,   # [nnz], changed in place
    rows_ptr, bases_ptr, starts_ptr, columns_ptr,
    indices_ptr,  # [N], ascending
    N, V, D, K, nnz, kept_rows, max_norm, norm_type,
    NORM: tl.constexpr, LAYOUT: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # one program: BLOCK_N lookups, of which the first of each row scales it. NORM 0: the largest
    # magnitude; 1, 2: that norm; 3: norm_type
    SIZE: tl.constexpr = values_ptr.dtype.element_ty.primitive_bitwidth // 8
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.load(indices_ptr + n, mask=n < N, other=-1).to(tl.int64)
    previous = tl.load(indices_ptr + n - 1, mask=(n > 0) & (n < N), other=-1).to(tl.int64)
    valid = (n < N) & (row >= 0) & (row < V) & (row != previous)
    norm = tl.zeros((BLOCK_N,), tl.float32)
    for first_column in range(0, D, BLOCK_D):
        tile = read_rows(
            values_ptr, rows_ptr, bases_ptr, starts_ptr, columns_ptr, row, valid, first_column, D, K, nnz,
            kept_rows, LAYOUT, WIDE, BLOCK_D,
        ).to(tl.float32)  # fmt: skip
        size = tl.abs(tile)
        if NORM == 0:
            norm = tl.maximum(norm, tl.max(size, 1))
            norm += tl.sum(tl.where(tile != tile, tile, 0.0), 1)  # max passes over NaN, which must stay
        elif NORM == 1:
            norm += tl.sum(size, 1)
        elif NORM == 2:
            norm += tl.sum(size * size, 1)
        else:
            power = tl.exp2(norm_type * tl.log2(tl.where(size > 0.0, size, 1.0)))
            norm += tl.sum(tl.where(size == 0.0, 0.0, tl.where(size > 0.0, power, size)), 1)  # NaN stays
    if NORM == 2:
        norm = tl.sqrt(norm)
    if NORM == 3:
        norm = tl.where(norm > 0.0, tl.exp2(tl.log2(tl.where(norm > 0.0, norm, 1.0)) / norm_type), norm)
    scale = max_norm / (norm + 1e-7)
    for first_column in range(0, D, BLOCK_D):
        kept, start, within = locate(
            rows_ptr, bases_ptr, starts_ptr, columns_ptr, row, valid & (norm > max_norm), first_column, D, K, nnz,
            kept_rows, LAYOUT, WIDE, SIZE, BLOCK_D,
        )  # fmt: skip
        at = (values_ptr + start)[:, None] + within
        tile = tl.load(at, mask=kept, other=0.0).to(tl.float32)
        tl.store(at, cast(tile * scale[:, None], values_ptr.dtype.element_ty), mask=kept)


# ---- launchers ----


@launcher
def masked_embedding_unpack(
    values: Tensor,
    rows: Tensor,
    bases: Tensor | None,
    starts: Tensor | None,
    columns: Tensor | None,
    num_embeddings: int,
    embedding_dim: int,
) -> Tensor:
    values = values.contiguous()
    table = table_of(values, rows, bases, starts, columns, num_embeddings, embedding_dim)
    output = values.new_empty((num_embeddings, embedding_dim))
    dense_rows(table, values, None, num_embeddings, output)
    return output


@launcher
def masked_embedding_unpack_grad_values(
    grad_output: Tensor,
    values: Tensor,
    rows: Tensor,
    bases: Tensor | None,
    starts: Tensor | None,
    columns: Tensor | None,
    num_embeddings: int,
    embedding_dim: int,
) -> Tensor:
    table = table_of(values, rows, bases, starts, columns, num_embeddings, embedding_dim)
    output = grad_output.new_empty(values.shape)
    block = table.tile["BLOCK_D"]
    per_tile, warps = rows_in_tile("rows", block)
    launch(
        _gather_kernel, (cdiv(num_embeddings, per_tile), cdiv(embedding_dim, block)),
        grad_output.contiguous(), output, *table.tensors, num_embeddings, *table.sizes,
        **table.tile, BLOCK_N=per_tile, num_warps=warps,
    )  # fmt: skip
    return output


@launcher
def masked_embedding_repack(
    values: Tensor,
    rows: Tensor,
    bases: Tensor | None,
    starts: Tensor | None,
    columns: Tensor | None,
    new_values: Tensor,
    new_rows: Tensor,
    new_bases: Tensor | None,
    new_starts: Tensor | None,
    new_columns: Tensor | None,
    num_embeddings: int,
    embedding_dim: int,
) -> Tensor:
    values = values.contiguous()
    old = table_of(values, rows, bases, starts, columns, num_embeddings, embedding_dim)
    new = table_of(new_values, new_rows, new_bases, new_starts, new_columns, num_embeddings, embedding_dim)
    output = values.new_empty(new_values.shape)
    block = old.tile["BLOCK_D"]
    per_tile, warps = rows_in_tile("pairs", block)
    launch(
        _repack_kernel, (cdiv(num_embeddings, per_tile), cdiv(embedding_dim, block)),
        values, *old.tensors, output, *new.tensors, num_embeddings, *old.sizes, *new.sizes[1:],
        **old.tile, NEW_LAYOUT=new.layout, BLOCK_N=per_tile, num_warps=warps,
    )  # fmt: skip
    return output


@launcher
def masked_embedding_renorm(
    values: Tensor,
    rows: Tensor,
    bases: Tensor | None,
    starts: Tensor | None,
    columns: Tensor | None,
    indices: Tensor,
    num_embeddings: int,
    embedding_dim: int,
    max_norm: float,
    norm_type: float,
) -> None:
    if not values.is_contiguous():
        raise ValueError(
            f"values must be contiguous, they are changed in place; got strides {values.stride()}"
        )
    table = table_of(values, rows, bases, starts, columns, num_embeddings, embedding_dim)
    indices = checked_indices("indices", indices, num_embeddings).reshape(-1)
    ascending = indices.to(key_dtype(num_embeddings)).sort().values
    per_tile, warps = rows_in_tile("norms", table.tile["BLOCK_D"])
    launch(
        _renorm_kernel, (cdiv(indices.numel(), per_tile),),
        values, *table.tensors, ascending, indices.numel(), num_embeddings, *table.sizes,
        float(max_norm), float(norm_type),
        NORM={float("inf"): 0, 1.0: 1, 2.0: 2}.get(norm_type, 3), **table.tile,
        BLOCK_N=per_tile, num_warps=warps, **NO_SPILL,
    )  # fmt: skip


# ---- what is compiled ahead of time ----


def compile_cases():
    """(name, callable) for `recsparse_kernels.triton.compile`: every kernel and configuration."""

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    for layout, D, dtype in SAMPLES:
        values, *rest = sample_tables(1_000_000, D, 0.2, dtype)[layout]
        index, sizes = rest[:4], rest[4:]

        def whole(values=values, index=index, sizes=sizes, dtype=dtype):
            indices = empty(4096, dtype=torch.int64)
            masked_embedding_unpack(values, *index, *sizes)
            masked_embedding_unpack_grad_values(empty(*sizes, dtype=dtype), values, *index, *sizes)
            masked_embedding_repack(values, *index, values, *index, *sizes)
            for norm in (1.0, 2.0, 3.0, float("inf")) if sizes[1] == 64 else (2.0,):
                masked_embedding_renorm(values, *index, indices, *sizes, 1.0, norm)

        yield f"{layout} D={D} {dtype}", whole
