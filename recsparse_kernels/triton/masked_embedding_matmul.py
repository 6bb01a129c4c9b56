"""Masked embedding tables, Triton: products with the whole table, without a dense copy.

    masked_embedding_matmul_t              output[b, i]     = sum_d input[b, d] W[i, d]
    masked_embedding_matmul_t_grad_input   output[b, d]     = sum_i grad_output[b, i] W[i, d]
    masked_embedding_matmul_t_grad_values  output[at(i, d)] = sum_b grad_output[b, i] input[b, d], where kept

Tiles of the table are expanded in registers and multiplied as dense ones (`tl.dot`, float32 accumulation,
"ieee" for float32): this saves the bytes of the table, not operations. The sum over the table's rows is cut
into parts, which are added in order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._configs import Configs
from ._launch import NO_SPILL, launch, launcher
from ._precision import cast, dot
from .masked_embedding_cases import SAMPLES, sample_tables
from .masked_embedding_rows import cdiv, locate, read_rows, table_of

# Rows of the batch and of the table in a tile. A tile of the table is 64 x 64, 16 elements a thread in 8
# warps: expanding it takes positions beside values, and 4 warps spill.
CONFIGS = Configs(
    "masked_embedding_matmul",
    {
        "small_batch": dict(BLOCK_B=16, BLOCK_V=64, num_warps=8, num_stages=2),
        # for the gradient to values, whose product holds both operands in registers
        "small_batch_fp32": dict(BLOCK_B=16, BLOCK_V=32, num_warps=8, num_stages=2),
        "large_batch_fp32": dict(BLOCK_B=32, BLOCK_V=64, num_warps=8, num_stages=2),
        "large_batch": dict(BLOCK_B=64, BLOCK_V=64, num_warps=8, num_stages=2),
    },
)
MAX_DOT_COLUMNS = 64
ROWS_OF_PART = 1024  # rows of the table that one program sums over, at least
MAX_PARTS = 256


def dot_config(batch: int, dtype: torch.dtype) -> dict:
    if batch <= 16:
        return CONFIGS["small_batch"]
    return CONFIGS["large_batch_fp32" if dtype == torch.float32 else "large_batch"]


def grad_values_config(batch: int, dtype: torch.dtype) -> dict:
    if batch <= 16 and dtype == torch.float32:
        return CONFIGS["small_batch_fp32"]
    return dot_config(batch, dtype)


@triton.jit
def _matmul_t_kernel(
    input_ptr,   # [B, D]
    values_ptr, rows_ptr, bases_ptr, starts_ptr, columns_ptr,
    output_ptr,  # [B, V]
    B, V, D, K, nnz, kept_rows,
    LAYOUT: tl.constexpr, WIDE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    # one program: BLOCK_B x BLOCK_V outputs
    b = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    row = tl.program_id(0).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    total = tl.zeros((BLOCK_B, BLOCK_V), tl.float32)
    for first_column in range(0, D, BLOCK_D):
        d = first_column + tl.arange(0, BLOCK_D)
        weight = read_rows(
            values_ptr, rows_ptr, bases_ptr, starts_ptr, columns_ptr, row, row < V, first_column, D, K, nnz,
            kept_rows, LAYOUT, WIDE, BLOCK_D,
        )  # fmt: skip
        x = tl.load(
            input_ptr + b[:, None] * D + d[None, :], mask=(b < B)[:, None] & (d < D)[None, :], other=0.0
        )
        total = dot(x, tl.trans(weight), total)
    tl.store(
        output_ptr + b[:, None] * V + row[None, :],
        cast(total, output_ptr.dtype.element_ty),
        mask=(b < B)[:, None] & (row < V)[None, :],
    )


@triton.jit
def _matmul_t_grad_input_kernel(
    grad_ptr,    # [B, V]
    values_ptr, rows_ptr, bases_ptr, starts_ptr, columns_ptr,
    output_ptr,  # [parts, B, D] float32, or with one part [B, D]
    B, rows_of_part, V, D, K, nnz, kept_rows,
    LAYOUT: tl.constexpr, WIDE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    # one program: BLOCK_B x BLOCK_D outputs, summed over one part of the table's rows
    part = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    first_column = tl.program_id(2) * BLOCK_D
    d = first_column + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for begin in range(0, rows_of_part, BLOCK_V):
        row = part * rows_of_part + begin + tl.arange(0, BLOCK_V)
        weight = read_rows(
            values_ptr, rows_ptr, bases_ptr, starts_ptr, columns_ptr, row, row < V, first_column, D, K, nnz,
            kept_rows, LAYOUT, WIDE, BLOCK_D,
        )  # fmt: skip
        grad = tl.load(
            grad_ptr + b[:, None] * V + row[None, :], mask=(b < B)[:, None] & (row < V)[None, :], other=0.0
        )
        total = dot(grad, weight, total)
    at = (part * B + b)[:, None] * D + d[None, :]
    tl.store(
        output_ptr + at, cast(total, output_ptr.dtype.element_ty), mask=(b < B)[:, None] & (d < D)[None, :]
    )


@triton.jit
def _matmul_t_grad_values_kernel(
    grad_ptr,    # [B, V]
    input_ptr,   # [B, D]
    output_ptr,  # as values
    rows_ptr, bases_ptr, starts_ptr, columns_ptr,
    B, V, D, K, nnz, kept_rows,
    LAYOUT: tl.constexpr, WIDE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    # one program: BLOCK_V rows x BLOCK_D columns of the table
    row = tl.program_id(0).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    first_column = tl.program_id(1) * BLOCK_D
    d = first_column + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_V, BLOCK_D), tl.float32)
    for begin in range(0, B, BLOCK_B):
        b = begin + tl.arange(0, BLOCK_B).to(tl.int64)
        grad = tl.load(
            grad_ptr + b[:, None] * V + row[None, :], mask=(b < B)[:, None] & (row < V)[None, :], other=0.0
        )
        x = tl.load(
            input_ptr + b[:, None] * D + d[None, :], mask=(b < B)[:, None] & (d < D)[None, :], other=0.0
        )
        total = dot(tl.trans(grad), x, total)
    kept, start, within = locate(
        rows_ptr, bases_ptr, starts_ptr, columns_ptr, row, row < V, first_column, D, K, nnz, kept_rows,
        LAYOUT, WIDE, 1, BLOCK_D,
    )  # fmt: skip
    tl.store((output_ptr + start)[:, None] + within, cast(total, output_ptr.dtype.element_ty), mask=kept)


# ---- launchers ----


@launcher
def masked_embedding_matmul_t(
    input: Tensor,
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
    tile, config = table.tile_of(MAX_DOT_COLUMNS), dot_config(input.shape[0], input.dtype)
    output = input.new_empty((input.shape[0], num_embeddings))
    launch(
        _matmul_t_kernel, (cdiv(num_embeddings, config["BLOCK_V"]), cdiv(input.shape[0], config["BLOCK_B"])),
        input.contiguous(), values, *table.tensors, output, input.shape[0], num_embeddings, *table.sizes,
        **tile, **config,
    )  # fmt: skip
    return output


@launcher
def masked_embedding_matmul_t_grad_input(
    grad_output: Tensor,
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
    batch = grad_output.shape[0]
    tile, config = table.tile_of(MAX_DOT_COLUMNS), dot_config(batch, grad_output.dtype)
    if num_embeddings == 0:
        return grad_output.new_zeros((batch, embedding_dim))
    # As many parts as fill a GPU, and no more than keep their sums smaller than grad_output.
    parts = max(1, min(cdiv(num_embeddings, ROWS_OF_PART), MAX_PARTS, num_embeddings // (4 * embedding_dim)))
    rows_of_part = cdiv(cdiv(num_embeddings, parts), config["BLOCK_V"]) * config["BLOCK_V"]
    parts = cdiv(num_embeddings, rows_of_part)
    dtype = grad_output.dtype if parts == 1 else torch.float32
    sums = grad_output.new_empty((parts, batch, embedding_dim), dtype=dtype)
    launch(
        _matmul_t_grad_input_kernel,
        (parts, cdiv(batch, config["BLOCK_B"]), cdiv(embedding_dim, tile["BLOCK_D"])),
        grad_output.contiguous(), values, *table.tensors, sums, batch, rows_of_part, num_embeddings, *table.sizes,
        **tile, **config,
    )  # fmt: skip
    return sums[0] if parts == 1 else sums.sum(0).to(grad_output.dtype)


@launcher
def masked_embedding_matmul_t_grad_values(
    grad_output: Tensor,
    input: Tensor,
    values: Tensor,
    rows: Tensor,
    bases: Tensor | None,
    starts: Tensor | None,
    columns: Tensor | None,
    num_embeddings: int,
    embedding_dim: int,
) -> Tensor:
    table = table_of(values, rows, bases, starts, columns, num_embeddings, embedding_dim)
    tile, config = table.tile_of(MAX_DOT_COLUMNS), grad_values_config(input.shape[0], input.dtype)
    output = values.new_empty(values.shape)
    launch(
        _matmul_t_grad_values_kernel,
        (cdiv(num_embeddings, config["BLOCK_V"]), cdiv(embedding_dim, tile["BLOCK_D"])),
        grad_output.contiguous(), input.contiguous(), output, *table.tensors, input.shape[0], num_embeddings,
        *table.sizes, **tile, **config, **NO_SPILL,
    )  # fmt: skip
    return output


# ---- what is compiled ahead of time ----


def compile_cases():
    """(name, callable) for `recsparse_kernels.triton.compile`: every kernel and configuration."""
    for layout, D, dtype in SAMPLES:
        table = sample_tables(1_000_000, D, 0.2, dtype)[layout]
        for batch in (8, 512):

            def products(table=table, batch=batch, dtype=dtype):
                x = torch.empty(batch, table[-1], dtype=dtype, device="meta")
                grad = torch.empty(batch, table[-2], dtype=dtype, device="meta")
                masked_embedding_matmul_t(x, *table)
                masked_embedding_matmul_t_grad_input(grad, *table)
                masked_embedding_matmul_t_grad_values(grad, x, *table)

            yield f"{layout} D={D} batch {batch} {dtype}", products
