"""Masked embedding tables, Triton: gradients of pooled and plain lookups, and the optimizer step.

    g[i, :] = sum over lookups j of row i of scale(j) grad_output[bag(j), :]          (for max: where j won)
    scale(j) = weights[j] / (lookups of its bag, for mean) / (lookups of its row, for scale_grad_by_freq)
Deterministic, without atomics: lookups are sorted by row and summed in windows, in masked_embedding_windows.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import NO_SPILL, checked_indices, launch, launcher
from .masked_embedding import EACH, MAX, MEAN, SUM, bags_of, rows_in_tile
from .masked_embedding_cases import SAMPLES, sample_tables
from .masked_embedding_rows import Table, bag_range, cdiv, key_dtype, locate, read_rows, table_of
from .masked_embedding_windows import (
    ADAGRAD,
    ADAM,
    PARTIALS_AT_ONCE,
    WRITE,
    _grad_spans_kernel,
    _grad_window_kernel,
)

# Sorted lookups of a window: at 2048 elements in 4 warps a thread holds 16 sums.
WINDOW_ELEMENTS, WINDOW_WARPS = 2048, 4
SCALE_BAGS = 128


@triton.jit
def _bag_scale_kernel(
    indices_ptr,  # [N]
    offsets_ptr,  # [entries], or None: bags of L
    scale_ptr,    # [bags] float32
    bags, entries, N, L, padding_idx,
    BLOCK_B: tl.constexpr,
):  # fmt: skip
    # one program: BLOCK_B bags; 1 / lookups that are not padding
    bag = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    begin, end = bag_range(offsets_ptr, bag, bags, entries, N, L)
    count = tl.maximum(end - begin, 0)
    if padding_idx >= 0:
        for at in range(0, tl.max(count, 0)):
            index = tl.load(indices_ptr + begin + at, mask=begin + at < end, other=-1).to(tl.int64)
            count -= (index == padding_idx).to(tl.int64)
    tl.store(scale_ptr + bag, 1.0 / tl.maximum(count, 1).to(tl.float32), mask=bag < bags)


@triton.jit
def _grad_weights_kernel(
    grad_ptr,     # [bags, D]
    values_ptr, rows_ptr, bases_ptr, starts_ptr, columns_ptr,
    indices_ptr,  # [N]
    bag_ptr,      # [N] bag of each lookup, or None: lookup // L
    scale_ptr,    # [bags] float32, or None
    output_ptr,   # [N] float32
    bags, N, L, padding_idx, V, D, K, nnz, kept_rows,
    LAYOUT: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # one program: BLOCK_N lookups; output[j] = scale <grad_output[bag], W[index]>
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.load(indices_ptr + n, mask=n < N, other=-1).to(tl.int64)
    if bag_ptr is None:
        bag = n // L
    else:
        bag = tl.load(bag_ptr + n, mask=n < N, other=0).to(tl.int64)
    valid = (n < N) & (row >= 0) & (row < V) & (row != padding_idx) & (bag < bags)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for first_column in range(0, D, BLOCK_D):
        d = first_column + tl.arange(0, BLOCK_D)
        tile = read_rows(
            values_ptr, rows_ptr, bases_ptr, starts_ptr, columns_ptr, row, valid, first_column, D, K, nnz,
            kept_rows, LAYOUT, WIDE, BLOCK_D,
        ).to(tl.float32)  # fmt: skip
        grad = tl.load(
            grad_ptr + bag[:, None] * D + d[None, :], mask=valid[:, None] & (d < D)[None, :], other=0.0
        )
        total += tl.sum(tile * grad.to(tl.float32), 1)
    if scale_ptr is not None:
        total *= tl.load(scale_ptr + bag, mask=valid, other=0.0)
    tl.store(output_ptr + n, total, mask=n < N)


@triton.jit
def _positions_kernel(
    rows_ptr, bases_ptr, starts_ptr, columns_ptr,
    touched_ptr,        # [n] rows
    output_starts_ptr,  # [n] int64: where each row's positions go; None: only count
    output_ptr,         # counts [n] int64, or positions in ``values`` [.] int64
    N, D, K, nnz, kept_rows,
    LAYOUT: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # one program: BLOCK_N rows
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.load(touched_ptr + n, mask=n < N, other=0).to(tl.int64)
    count = tl.zeros((BLOCK_N,), tl.int64)
    if output_starts_ptr is not None:
        first = tl.load(output_starts_ptr + n, mask=n < N, other=0)
    for first_column in range(0, D, BLOCK_D):
        kept, start, within = locate(
            rows_ptr, bases_ptr, starts_ptr, columns_ptr, row, n < N, first_column, D, K, nnz, kept_rows,
            LAYOUT, WIDE, 1, BLOCK_D,
        )  # fmt: skip
        if output_starts_ptr is None:
            count += tl.sum(kept.to(tl.int32), 1)
        else:
            tl.store(output_ptr + first[:, None] + within, start[:, None] + within, mask=kept)
    if output_starts_ptr is None:
        tl.store(output_ptr + n, count, mask=n < N)


# ---- what the gradients share ----


def _bag_of_lookup(offsets: Tensor | None, bags: int, num_indices: int) -> Tensor | None:
    """Bag of each lookup [N]; ``bags`` for those after the last; None without offsets."""
    if offsets is None or bags == 0:
        return None
    every = torch.arange(num_indices, device=offsets.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets, every, right=True, out_int32=True) - 1


def _bag_scales(
    indices: Tensor, offsets: Tensor | None, bags: int, entries: int, length: int, pooling_mode: int, padding_idx: int
) -> Tensor | None:  # fmt: skip
    if pooling_mode != MEAN:
        return None
    scale = torch.empty(bags, dtype=torch.float32, device=indices.device)
    launch(
        _bag_scale_kernel, (cdiv(bags, SCALE_BAGS),), indices, offsets, scale, bags, entries, indices.numel(),
        length, padding_idx, BLOCK_B=SCALE_BAGS, num_warps=4,
    )  # fmt: skip
    return scale


class _SortedLookups:
    """Lookups in the order of their rows: what both window kernels read."""

    def __init__(
        self, table: Table, indices: Tensor, offsets: Tensor | None, num_embeddings: int, pooling_mode: int,
        padding_idx: int, include_last_offset: bool, scale_grad_by_freq: bool,
    ):  # fmt: skip
        indices = checked_indices("indices", indices, num_embeddings).contiguous()
        self.offsets = offsets = (
            offsets.contiguous() if offsets is not None and pooling_mode != EACH else None
        )
        self.bags, entries, self.length = bags_of(indices, offsets, pooling_mode, include_last_offset)
        self.count, self.padding_idx, self.num_embeddings = indices.numel(), padding_idx, num_embeddings
        self.bag = _bag_of_lookup(offsets, self.bags, self.count)
        self.scale = _bag_scales(indices, offsets, self.bags, entries, self.length, pooling_mode, padding_idx)
        dtype = key_dtype(num_embeddings)
        keys = indices.reshape(-1).to(dtype)
        if include_last_offset and self.bag is not None:  # what comes after the last bag is in none
            keys = torch.where(self.bag < self.bags, keys, num_embeddings)
        if dtype != indices.dtype:  # an index out of range must not wrap into it
            keys = torch.where(
                (indices.reshape(-1) >= 0) & (indices.reshape(-1) < num_embeddings), keys, num_embeddings
            )
        self.keys, self.lookup = keys.sort(stable=True)
        self.frequency = None
        if scale_grad_by_freq:
            ends = torch.searchsorted(self.keys, self.keys, right=True)
            self.frequency = 1.0 / (ends - torch.searchsorted(self.keys, self.keys)).float()
        self.block_w = max(WINDOW_ELEMENTS // table.tile["BLOCK_D"], 8)
        self.windows = cdiv(self.count, self.block_w)

    def run(
        self, table: Table, grad_output: Tensor, per_sample_weights: Tensor | None, argmax: Tensor | None,
        values: Tensor | None, states: tuple, output: Tensor | None, output_starts: Tensor | None, optimizer: int,
        numbers: tuple,
    ) -> None:  # fmt: skip
        """Both kernels: the gradients go to ``output``, or with an optimizer into ``values``."""
        if self.bags == 0 or self.count == 0:
            return
        D = table.sizes[0]
        partials = torch.empty((2 * self.windows, D), dtype=torch.float32, device=self.keys.device)
        whole_rows = optimizer == ADAGRAD.value
        grid = (self.windows, 1 if whole_rows else cdiv(D, table.tile["BLOCK_D"]))
        weights = per_sample_weights.contiguous() if per_sample_weights is not None else None
        argmax = argmax.contiguous() if argmax is not None else None
        # a program that goes through the tiles of whole rows holds more
        warps = 2 * WINDOW_WARPS if whole_rows and table.tile["WIDE"] else WINDOW_WARPS
        launch(
            _grad_window_kernel, grid,
            grad_output.contiguous(), argmax, self.keys, self.lookup, self.bag, self.offsets, self.scale, weights,
            self.frequency, output_starts, values, *states, output, partials, *table.tensors,
            self.count, max(self.length, 1), self.padding_idx, self.num_embeddings, *table.sizes, *numbers,
            OPTIMIZER=optimizer, **table.tile, BLOCK_W=self.block_w, num_warps=warps, **NO_SPILL,
        )  # fmt: skip
        launch(
            _grad_spans_kernel, grid,
            self.keys, output_starts, values, *states, output, partials, *table.tensors,
            self.count, self.padding_idx, self.num_embeddings, *table.sizes, *numbers,
            OPTIMIZER=optimizer, **table.tile, BLOCK_W=self.block_w, BLOCK_P=PARTIALS_AT_ONCE, num_warps=4,
        )  # fmt: skip


_NO_STATES, _NO_NUMBERS = (None, None), (0.0,) * 7


# ---- launchers ----


@launcher
def masked_embedding_bag_grad_per_sample_weights(
    grad_output: Tensor,
    values: Tensor,
    rows: Tensor,
    bases: Tensor | None,
    starts: Tensor | None,
    columns: Tensor | None,
    indices: Tensor,
    offsets: Tensor | None,
    num_embeddings: int,
    embedding_dim: int,
    pooling_mode: int,
    padding_idx: int,
    include_last_offset: bool,
) -> Tensor:
    values = values.contiguous()
    table = table_of(values, rows, bases, starts, columns, num_embeddings, embedding_dim)
    indices = checked_indices("indices", indices, num_embeddings).contiguous()
    offsets = offsets.contiguous() if offsets is not None and pooling_mode != EACH else None
    bags, entries, length = bags_of(indices, offsets, pooling_mode, include_last_offset)
    output = values.new_empty(indices.shape, dtype=torch.float32)
    if bags == 0:
        return output.zero_()
    per_tile, warps = rows_in_tile("gradients", table.tile["BLOCK_D"])
    launch(
        _grad_weights_kernel, (cdiv(indices.numel(), per_tile),),
        grad_output.contiguous(), values, *table.tensors, indices, _bag_of_lookup(offsets, bags, indices.numel()),
        _bag_scales(indices, offsets, bags, entries, length, pooling_mode, padding_idx), output,
        bags, indices.numel(), max(length, 1), padding_idx, num_embeddings, *table.sizes,
        **table.tile, BLOCK_N=per_tile, num_warps=warps,
    )  # fmt: skip
    return output


@launcher
def masked_embedding_bag_grad_values(
    grad_output: Tensor,
    values: Tensor,
    rows: Tensor,
    bases: Tensor | None,
    starts: Tensor | None,
    columns: Tensor | None,
    indices: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    argmax: Tensor | None,
    num_embeddings: int,
    embedding_dim: int,
    pooling_mode: int,
    padding_idx: int,
    include_last_offset: bool,
    scale_grad_by_freq: bool,
) -> Tensor:
    table = table_of(values, rows, bases, starts, columns, num_embeddings, embedding_dim)
    lookups = _SortedLookups(
        table, indices, offsets, num_embeddings, pooling_mode, padding_idx, include_last_offset, scale_grad_by_freq
    )  # fmt: skip
    output = values.new_zeros(values.shape)
    lookups.run(
        table, grad_output, per_sample_weights, argmax, None, _NO_STATES, output, None, WRITE.value, _NO_NUMBERS
    )  # fmt: skip
    return output


@launcher
def masked_embedding_bag_grad_touched(
    grad_output: Tensor,
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
) -> tuple[Tensor, Tensor]:
    table = table_of(values, rows, bases, starts, columns, num_embeddings, embedding_dim)
    lookups = _SortedLookups(
        table, indices, offsets, num_embeddings, pooling_mode, padding_idx, include_last_offset, scale_grad_by_freq
    )  # fmt: skip
    # How much is touched decides the size of the output: the host has to wait here.
    every, which = torch.unique_consecutive(lookups.keys, return_inverse=True)
    wanted = (every >= 0) & (every < num_embeddings) & (every != padding_idx)
    if lookups.bags == 0:
        wanted = torch.zeros_like(wanted)
    touched = every[wanted].long()
    per_tile, warps = rows_in_tile("gradients", table.tile["BLOCK_D"])
    grid = (cdiv(len(touched), per_tile),)
    options = dict(**table.tile, BLOCK_N=per_tile, num_warps=warps)
    if values.dim() == 2:
        first = torch.arange(len(touched), device=touched.device) * values.shape[1]
        total = len(touched) * values.shape[1]
    else:
        count = torch.zeros_like(touched)
        launch(
            _positions_kernel,
            grid,
            *table.tensors,
            touched,
            None,
            count,
            len(touched),
            *table.sizes,
            **options,
        )
        ends = count.cumsum(0)
        first = ends - count
        total = int(ends[-1]) if len(touched) else 0
    output_starts = first.new_zeros(len(every))
    output_starts[wanted] = first
    output_starts = output_starts[which]  # by position among the sorted lookups
    grads = values.new_zeros(total)
    lookups.run(
        table, grad_output, per_sample_weights, None, None, _NO_STATES, grads, output_starts, WRITE.value, _NO_NUMBERS
    )  # fmt: skip
    if values.dim() == 2:
        return touched, grads.view(len(touched), values.shape[1])
    positions = touched.new_empty(total)
    launch(
        _positions_kernel,
        grid,
        *table.tensors,
        touched,
        first,
        positions,
        len(touched),
        *table.sizes,
        **options,
    )
    return positions, grads


@launcher
def masked_embedding_bag_update(
    values: Tensor,
    state: Tensor,
    second_state: Tensor,
    grad_output: Tensor,
    rows: Tensor,
    bases: Tensor | None,
    starts: Tensor | None,
    columns: Tensor | None,
    indices: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    argmax: Tensor | None,
    num_embeddings: int,
    embedding_dim: int,
    pooling_mode: int,
    padding_idx: int,
    include_last_offset: bool,
    scale_grad_by_freq: bool,
    optimizer: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
) -> None:
    wanted = {0: ((0,), (0,)), 1: ((num_embeddings,), (0,)), 2: (values.shape, values.shape)}[optimizer]
    for name, tensor, shape in (("state", state, wanted[0]), ("second_state", second_state, wanted[1])):
        if optimizer and (tensor.shape != shape or tensor.dtype != torch.float32):
            raise ValueError(
                f"{name} must be float32 of shape {tuple(shape)}; got {tensor.dtype} {tuple(tensor.shape)}"
            )
    if not all(t.is_contiguous() for t in (values, state, second_state)):
        raise ValueError("values, state and second_state must be contiguous: they are changed in place")
    table = table_of(values, rows, bases, starts, columns, num_embeddings, embedding_dim)
    lookups = _SortedLookups(
        table, indices, offsets, num_embeddings, pooling_mode, padding_idx, include_last_offset, scale_grad_by_freq
    )  # fmt: skip
    root2 = 1.0
    if optimizer == ADAM.value:
        lr, root2 = lr / (1 - beta1**step), (1 - beta2**step) ** 0.5
    numbers = tuple(float(x) for x in (lr, beta1, beta2, 1 - beta1, 1 - beta2, eps, root2))
    lookups.run(
        table, grad_output, per_sample_weights, argmax, values, (state, second_state), None, None, optimizer, numbers
    )  # fmt: skip


# ---- what is compiled ahead of time ----


def compile_cases():
    """(name, callable) for `recsparse_kernels.triton.compile`: every kernel and configuration."""

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    for layout, D, dtype in SAMPLES:
        values, *rest = sample_tables(1_000_000, D, 0.2, dtype)[layout]
        index, sizes = rest[:4], rest[4:]
        indices, offsets = empty(8192, dtype=torch.int64), empty(1024, dtype=torch.int64)
        grad, argmax = empty(1024, D, dtype=dtype), empty(1024, D, dtype=torch.int32)

        def gradients(
            values=values, index=index, sizes=sizes, indices=indices, offsets=offsets, grad=grad, argmax=argmax
        ):  # fmt: skip
            cases = [(SUM, empty(8192), None), (MEAN, None, None), (MAX, None, argmax)]
            for mode, weights, where in cases if sizes[1] == 64 else cases[:1]:
                masked_embedding_bag_grad_values(
                    grad, values, *index, indices, offsets, weights, where, *sizes, mode, 3, False, False
                )
            masked_embedding_bag_grad_values(
                empty(8192, sizes[1], dtype=grad.dtype), values, *index, indices, None, None, None, *sizes, EACH, -1,
                False, True,
            )  # fmt: skip
            masked_embedding_bag_grad_per_sample_weights(
                grad, values, *index, indices, offsets, *sizes, MEAN, -1, False
            )

        yield f"gradients {layout} D={D} {dtype}", gradients

        def updates(values=values, index=index, sizes=sizes, indices=indices, offsets=offsets, grad=grad):
            none, moments = empty(0), empty(*values.shape)
            states = [(none, none), (empty(sizes[0]), none), (moments, moments)]
            for optimizer, (first, second) in enumerate(states):
                masked_embedding_bag_update(
                    values, first, second, grad, *index, indices, offsets, None, None, *sizes, SUM, -1, False, False,
                    optimizer, 0.1, 0.9, 0.999, 1e-8, 1,
                )  # fmt: skip

        yield f"updates {layout} D={D} {dtype}", updates

        # the size of this output depends on data
        table = sample_tables(4096, D, 0.2, dtype, device="cpu")[layout]
        table = [t.zero_() if isinstance(t, Tensor) else t for t in table]

        def touched(table=table, D=D, dtype=dtype):
            masked_embedding_bag_grad_touched(
                torch.zeros(16, D, dtype=dtype), *table[:5], torch.arange(64), torch.arange(0, 64, 4), None,
                *table[5:], SUM, -1, False, False,
            )  # fmt: skip

        yield f"touched {layout} D={D} {dtype}", touched
