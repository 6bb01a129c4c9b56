"""Masked embedding tables, Triton: lookups, pooled lookups, records.

    masked_embedding          output[n, :] = W[indices[n], :]
    masked_embedding_bag      output[b, :] = scale(b) sum over lookups j of bag b of weights[j] W[indices[j], :]
                              or the maximum over them

A program holds a tile of rows times columns in flight: reading a row is a chain of loads (index, start and
mask, values), so what counts is how many rows wait at once. Bags share a tile: BLOCK_B bags times BLOCK_L
lookups of each, as many lookups as bags have on average (`bag_config`). Sums are in float32, in a fixed
order. Rows are found by masked_embedding_rows.py; gradients are in
masked_embedding_grad.py, what concerns the whole table in masked_embedding_table.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._configs import Configs
from ._launch import NO_SPILL, checked_indices, launch, launcher
from ._precision import cast
from .masked_embedding_cases import SAMPLES, sample_tables
from .masked_embedding_rows import (
    FIXED_RECORDS,
    RECORDS,
    Table,
    bag_range,
    cdiv,
    read_rows,
    table_of,
)

SUM, MEAN, MAX, EACH = range(4)  # pooling modes

# Elements of a tile and the warps that hold it: at 8 to 16 elements a thread registers suffice for many
# programs on a multiprocessor, which is what hides the loads.
CONFIGS = Configs(
    "masked_embedding",
    {
        "rows": dict(elements=1024, num_warps=4),  # a row for each index
        "bags": dict(elements=1024, num_warps=4),
        "gradients": dict(elements=1024, num_warps=4),
        "pairs": dict(elements=1024, num_warps=4),  # rows of two tables at once
        "norms": dict(elements=512, num_warps=4),  # rows read twice
    },
    others={
        "rows": {"large": dict(elements=2048, num_warps=8)},
        "bags": {"small": dict(elements=512, num_warps=2)},
    },
)


def rows_in_tile(config: str, columns: int) -> tuple[int, int]:
    """Rows of a tile of that many columns, and its warps."""
    chosen = CONFIGS[config]
    return chosen["elements"] // columns, chosen["num_warps"]


def bag_config(rows: int, num_indices: int, num_bags: int) -> tuple[int, int]:
    """BLOCK_B, BLOCK_L for tiles of that many rows: short bags side by side, long ones one after another."""
    mean_length = num_indices / max(num_bags, 1)
    if mean_length <= 3:
        return rows, 1
    if mean_length <= 12:
        length = min(4, rows)
        return rows // length, length
    return 1, rows


@triton.jit
def _rows_kernel(
    values_ptr,   # [nnz]
    rows_ptr, bases_ptr, starts_ptr, columns_ptr,
    indices_ptr,  # [N] int32 or int64; None: row n is n
    output_ptr,   # [N, D]
    N, V, D, K, nnz, kept_rows,
    LAYOUT: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # one program: BLOCK_N rows x BLOCK_D columns
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first_column = tl.program_id(1) * BLOCK_D
    d = first_column + tl.arange(0, BLOCK_D)
    row = n
    if indices_ptr is not None:
        row = tl.load(indices_ptr + n, mask=n < N, other=-1).to(tl.int64)
    valid = (n < N) & (row >= 0) & (row < V)
    tile = read_rows(
        values_ptr, rows_ptr, bases_ptr, starts_ptr, columns_ptr, row, valid, first_column, D, K, nnz, kept_rows,
        LAYOUT, WIDE, BLOCK_D,
    )  # fmt: skip
    tl.store(output_ptr + n[:, None] * D + d[None, :], tile, mask=(n < N)[:, None] & (d < D)[None, :])


@triton.jit
def _bag_kernel(
    values_ptr,   # [nnz]
    rows_ptr, bases_ptr, starts_ptr, columns_ptr,
    indices_ptr,  # [N]
    offsets_ptr,  # [entries], or None: bags of L
    weights_ptr,  # [N] float32, or None
    output_ptr,   # [bags, D]
    bags, entries, N, L, padding_idx, V, D, K, nnz, kept_rows,
    MEAN: tl.constexpr, LAYOUT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # one program: BLOCK_B bags x BLOCK_D columns, BLOCK_L lookups of each bag at a time
    first_bag = tl.program_id(0).to(tl.int64) * BLOCK_B
    first_column = tl.program_id(1) * BLOCK_D
    d = first_column + tl.arange(0, BLOCK_D)
    lane = tl.arange(0, BLOCK_B * BLOCK_L)  # a row of the tile: lane % BLOCK_L of bag lane // BLOCK_L
    begin, end = bag_range(offsets_ptr, first_bag + lane // BLOCK_L, bags, entries, N, L)
    total = tl.zeros((BLOCK_B * BLOCK_L, BLOCK_D), tl.float32)
    count = tl.zeros((BLOCK_B * BLOCK_L,), tl.int32)
    place = begin + lane % BLOCK_L
    for _ in range(0, (tl.max(end - begin, 0) + (BLOCK_L - 1)) // BLOCK_L):
        index = tl.load(indices_ptr + place, mask=place < end, other=0).to(tl.int64)
        counted = (place < end) & (index != padding_idx)
        valid = counted & (index >= 0) & (index < V)
        tile = read_rows(
            values_ptr, rows_ptr, bases_ptr, starts_ptr, columns_ptr, index, valid, first_column, D, K, nnz,
            kept_rows, LAYOUT, WIDE, BLOCK_D,
        ).to(tl.float32)  # fmt: skip
        if weights_ptr is not None:
            tile *= tl.load(weights_ptr + place, mask=counted, other=0.0)[:, None]
        total += tile
        count += counted.to(tl.int32)
        place += BLOCK_L
    if BLOCK_L > 1:
        total = tl.sum(tl.reshape(total, (BLOCK_B, BLOCK_L, BLOCK_D)), 1)
        count = tl.sum(tl.reshape(count, (BLOCK_B, BLOCK_L)), 1)
    if MEAN:
        total *= (1.0 / tl.maximum(count, 1).to(tl.float32))[:, None]
    bag = first_bag + tl.arange(0, BLOCK_B)
    tl.store(
        output_ptr + bag[:, None] * D + d[None, :],
        cast(total, output_ptr.dtype.element_ty),
        mask=(bag < bags)[:, None] & (d < D)[None, :],
    )


@triton.jit
def _bag_max_kernel(
    values_ptr,   # [nnz]
    rows_ptr, bases_ptr, starts_ptr, columns_ptr,
    indices_ptr,  # [N]
    offsets_ptr,  # [entries], or None: bags of L
    output_ptr,   # [bags, D]
    argmax_ptr,   # [bags, D] int32, or None
    bags, entries, N, L, padding_idx, V, D, K, nnz, kept_rows,
    LAYOUT: tl.constexpr, WIDE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # one program: BLOCK_B bags x BLOCK_D columns, each bag's lookups in order: the first of equal maxima
    # counts, and NaN only when it is first
    bag = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    first_column = tl.program_id(1) * BLOCK_D
    d = first_column + tl.arange(0, BLOCK_D)
    begin, end = bag_range(offsets_ptr, bag, bags, entries, N, L)
    best = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    where = tl.full((BLOCK_B, BLOCK_D), -1, tl.int32)
    for at in range(0, tl.max(end - begin, 0)):
        place = begin + at
        index = tl.load(indices_ptr + place, mask=place < end, other=0).to(tl.int64)
        counted = (place < end) & (index != padding_idx)
        valid = counted & (index >= 0) & (index < V)
        tile = read_rows(
            values_ptr, rows_ptr, bases_ptr, starts_ptr, columns_ptr, index, valid, first_column, D, K, nnz,
            kept_rows, LAYOUT, WIDE, BLOCK_D,
        ).to(tl.float32)  # fmt: skip
        better = counted[:, None] & ((where < 0) | (tile > best))
        best = tl.where(better, tile, best)
        where = tl.where(better, (place - begin).to(tl.int32)[:, None], where)
    inside = (bag < bags)[:, None] & (d < D)[None, :]
    tl.store(output_ptr + bag[:, None] * D + d[None, :], cast(best, output_ptr.dtype.element_ty), mask=inside)
    if argmax_ptr is not None:
        tl.store(argmax_ptr + bag[:, None] * D + d[None, :], where, mask=inside)


# ---- what lookups share ----


def bags_of(
    indices: Tensor, offsets: Tensor | None, pooling_mode: int, include_last_offset: bool
) -> tuple[int, int, int]:
    """Bags, entries of ``offsets``, and length of the bags without offsets (each index its own in EACH).

    Raises:
        ValueError: on CPU tensors (the interpreter), offsets that are not those of bags. On a GPU, where
            reading them would wait, bags are cut to the indices there are.
    """
    if pooling_mode == EACH:
        return indices.numel(), 0, 1
    if offsets is None:
        return indices.shape[0], 0, indices.shape[1]
    if include_last_offset and offsets.numel() == 0:
        raise ValueError("offsets must have at least one entry with include_last_offset")
    if offsets.device.type == "cpu" and offsets.numel():
        if int(offsets[0]) != 0:
            raise ValueError(f"offsets must start at 0; got {int(offsets[0])}")
        if bool((offsets.diff() < 0).any()):
            raise ValueError("offsets must not descend")
        if int(offsets[-1]) > indices.numel():
            raise ValueError(
                f"offsets must not pass the number of indices, {indices.numel()}; got {int(offsets[-1])}"
            )
    return offsets.numel() - int(include_last_offset), offsets.numel(), 0


def _pooled(
    table: Table, values: Tensor, indices: Tensor, offsets: Tensor | None, weights: Tensor | None,
    num_embeddings: int, pooling_mode: int, padding_idx: int, include_last_offset: bool, want_argmax: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and argmax of a pooled lookup in any layout."""
    D = table.sizes[0]
    indices = checked_indices("indices", indices, num_embeddings).contiguous()
    offsets = offsets.contiguous() if offsets is not None else None
    bags, entries, length = bags_of(indices, offsets, pooling_mode, include_last_offset)
    output = values.new_empty((bags, D))
    is_max = pooling_mode == MAX
    argmax = values.new_empty((bags if is_max and want_argmax else 0, D), dtype=torch.int32)
    columns = table.tile["BLOCK_D"]
    rows, warps = rows_in_tile("bags", columns)
    sizes = (bags, entries, indices.numel(), length, padding_idx, num_embeddings, *table.sizes)
    if is_max:
        launch(
            _bag_max_kernel, (cdiv(bags, rows), cdiv(D, columns)),
            values, *table.tensors, indices, offsets, output, argmax if want_argmax else None, *sizes,
            **table.tile, BLOCK_B=rows, num_warps=warps, **NO_SPILL,
        )  # fmt: skip
        return output, argmax
    block_b, block_l = bag_config(rows, indices.numel(), bags)
    launch(
        _bag_kernel, (cdiv(bags, block_b), cdiv(D, columns)),
        values, *table.tensors, indices, offsets, weights.contiguous() if weights is not None else None, output,
        *sizes, MEAN=pooling_mode == MEAN, **table.tile, BLOCK_B=block_b, BLOCK_L=block_l, num_warps=warps, **NO_SPILL,
    )  # fmt: skip
    return output, argmax


def dense_rows(
    table: Table, values: Tensor, indices: Tensor | None, num_embeddings: int, output: Tensor
) -> None:
    """Dense rows of the table into ``output [N, D]``; all in order without indices."""
    D = table.sizes[0]
    columns = table.tile["BLOCK_D"]
    rows, warps = rows_in_tile("rows", columns)
    launch(
        _rows_kernel, (cdiv(output.shape[0], rows), cdiv(D, columns)),
        values, *table.tensors, indices, output, output.shape[0], num_embeddings, *table.sizes,
        **table.tile, BLOCK_N=rows, num_warps=warps,
    )  # fmt: skip


# ---- launchers ----


@launcher
def masked_embedding(
    values: Tensor,
    rows: Tensor,
    bases: Tensor | None,
    starts: Tensor | None,
    columns: Tensor | None,
    indices: Tensor,
    num_embeddings: int,
    embedding_dim: int,
    padding_idx: int,
    scale_grad_by_freq: bool,
    sparse: bool,
) -> Tensor:
    values = values.contiguous()
    table = table_of(values, rows, bases, starts, columns, num_embeddings, embedding_dim)
    indices = checked_indices("indices", indices, num_embeddings).contiguous()
    output = values.new_empty((indices.numel(), embedding_dim))
    dense_rows(table, values, indices, num_embeddings, output)
    return output.view(*indices.shape, embedding_dim)


@launcher
def masked_embedding_bag(
    values: Tensor,
    rows: Tensor,
    bases: Tensor | None,
    starts: Tensor | None,
    columns: Tensor | None,
    indices: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    num_embeddings: int,
    embedding_dim: int,
    pooling_mode: int,
    padding_idx: int,
    include_last_offset: bool,
    scale_grad_by_freq: bool,
    sparse: bool,
) -> tuple[Tensor, Tensor]:
    values = values.contiguous()
    table = table_of(values, rows, bases, starts, columns, num_embeddings, embedding_dim)
    return _pooled(
        table, values, indices, offsets, per_sample_weights, num_embeddings, pooling_mode, padding_idx,
        include_last_offset,
    )  # fmt: skip


@launcher
def masked_embedding_records(
    like: Tensor,
    records: Tensor,
    starts: Tensor,
    bases: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    num_embeddings: int,
    embedding_dim: int,
    kept: int,
    pooling_mode: int,
    padding_idx: int,
    include_last_offset: bool,
) -> Tensor:
    records = records.contiguous()
    mask_elements = cdiv(cdiv(embedding_dim, 8), like.element_size())
    fixed = kept >= 0
    if not fixed and (starts.numel() != num_embeddings or bases.numel() < cdiv(num_embeddings, 65536)):
        raise ValueError(f"starts and bases must be those of {num_embeddings} records; got {starts.numel()}")
    table = Table(
        (records.view(torch.uint8), *((None, None) if fixed else (bases, starts.contiguous())), None),
        (embedding_dim, mask_elements + kept if fixed else 0, records.numel(), 0),
        (FIXED_RECORDS if fixed else RECORDS).value,
    )
    values = records.view(like.dtype)
    if pooling_mode != EACH:
        output, _ = _pooled(
            table, values, indices, offsets, per_sample_weights, num_embeddings, pooling_mode, padding_idx,
            include_last_offset, want_argmax=False,
        )  # fmt: skip
        return output
    indices = checked_indices("indices", indices, num_embeddings).contiguous()
    output = values.new_empty((indices.numel(), embedding_dim))
    dense_rows(table, values, indices, num_embeddings, output)
    return output


# ---- what is compiled ahead of time ----


def compile_cases():
    """(name, callable) for `recsparse_kernels.triton.compile`: every kernel and configuration."""

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    for layout, D, dtype in SAMPLES:
        values, *rest = sample_tables(1_000_000, D, 0.2, dtype)[layout]
        index, sizes = rest[:4], rest[4:]

        def bags(length, modes, values=values, index=index, sizes=sizes):
            indices = empty(4096, length, dtype=torch.int64)
            offsets, flat, weights = (
                empty(4096, dtype=torch.int64),
                indices.reshape(-1).int(),
                empty(4096 * length),
            )
            for mode in modes:
                masked_embedding_bag(
                    values, *index, flat, offsets, None, *sizes, mode, 0, False, False, False
                )
            masked_embedding_bag(values, *index, indices, None, weights, *sizes, SUM, -1, False, False, False)

        def plain(values=values, index=index, sizes=sizes):
            masked_embedding(values, *index, empty(4096, dtype=torch.int64), *sizes, -1, False, False)

        for length, modes in ((1, ()), (8, (SUM, MEAN, MAX)), (50, ())):
            yield f"{layout} D={D} {dtype} bags of {length}", lambda n=length, m=modes, run=bags: run(n, m)
        yield f"{layout} D={D} {dtype}", plain
    for dtype, integers in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16)):
        records, like = empty(2**32, dtype=integers), empty(0, dtype=dtype)  # 64-bit sizes
        starts, bases = empty(2**24, dtype=torch.int32), empty(256, dtype=torch.int64)
        for kept in (-1, 100):

            def frozen(records=records, like=like, starts=starts, bases=bases, kept=kept):
                indices = empty(8192, dtype=torch.int64)
                for mode in (SUM, MAX, EACH):
                    masked_embedding_records(
                        like, records, starts, bases, indices, indices[:1024], None, 2**24, 128, kept, mode, -1,
                        False,
                    )  # fmt: skip

            yield f"records of {kept} {dtype}", frozen
