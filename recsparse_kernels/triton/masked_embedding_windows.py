"""Masked embedding tables, Triton: sums over the lookups of each row, and what becomes of them.

Deterministic, without atomics: lookups are sorted by row, and each window of BLOCK_W sorted lookups is the
work of one program. Rows that begin and end within a window are finished there: their kept elements are
written, or take their optimizer step. A row that spans windows leaves a partial sum in each,

    partials[2 w]       window w's share of a row that began before it
    partials[2 w + 1]   window w's share of a row that begins in it and goes on

which a second kernel adds up, in order, in the program of the window where the row begins. A popular row
is so the work of many programs, and nothing depends on how many rows there are: no host sync.
"""

import triton
import triton.language as tl

from ._device import device_function
from ._precision import cast
from .masked_embedding_rows import locate

# What becomes of a row's gradient: written where the row's values are, or an optimizer step.
WRITE = tl.constexpr(-1)
ADAGRAD = tl.constexpr(1)
ADAM = tl.constexpr(2)

PARTIALS_AT_ONCE = 8  # windows whose partial sums are added side by side


@device_function
def _window_sums(
    grad_ptr, argmax_ptr, keys_ptr, lookup_ptr, bag_ptr, offsets_ptr, scale_ptr, weights_ptr, frequency_ptr,
    position, row, used, first_column, L, D, BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """[BLOCK_W, BLOCK_D]: gradients of the window's lookups, summed over those of the same row up to each."""
    lane = tl.arange(0, BLOCK_W)
    d = first_column + tl.arange(0, BLOCK_D)
    inside = used[:, None] & (d < D)[None, :]
    lookup = tl.load(lookup_ptr + position, mask=used, other=0)
    if bag_ptr is None:
        bag = lookup // L
    else:
        bag = tl.load(bag_ptr + lookup, mask=used, other=0).to(tl.int64)
    sums = tl.load(grad_ptr + bag[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
    if argmax_ptr is not None:
        if bag_ptr is None:
            place = lookup - bag * L
        else:
            place = lookup - tl.load(offsets_ptr + bag, mask=used, other=0).to(tl.int64)
        winner = tl.load(argmax_ptr + bag[:, None] * D + d[None, :], mask=inside, other=-1)
        sums = tl.where(winner == place.to(tl.int32)[:, None], sums, 0.0)
    if scale_ptr is not None:
        sums *= tl.load(scale_ptr + bag, mask=used, other=0.0)[:, None]
    if weights_ptr is not None:
        sums *= tl.load(weights_ptr + lookup, mask=used, other=0.0)[:, None]
    if frequency_ptr is not None:
        sums *= tl.load(frequency_ptr + position, mask=used, other=0.0)[:, None]
    # After the step of length s each lane holds the sum of up to 2 s lanes of its row that end with it.
    # Equal keys are neighbours: none at distance s means none further.
    step = 1
    more = 1
    while (step < BLOCK_W) & (more > 0):
        back = tl.load(keys_ptr + position - step, mask=used & (lane >= step), other=-1).to(tl.int64) == row
        source = tl.broadcast_to(tl.maximum(lane - step, 0)[:, None], (BLOCK_W, BLOCK_D))
        back = back & used & (lane >= step)
        sums = tl.where(back[:, None], sums + tl.gather(sums, source, 0), sums)
        more = tl.max(back.to(tl.int32), 0)
        step *= 2
    return sums


@device_function
def _apply(
    values_ptr, state_ptr, second_state_ptr, output_ptr,
    rows_ptr, bases_ptr, starts_ptr, columns_ptr, output_starts_ptr,
    sums, row, done, position, first_column, D, K, nnz, kept_rows, lr, beta1, beta2, rest1, rest2, eps, root2,
    denominator,
    OPTIMIZER: tl.constexpr, LAYOUT: tl.constexpr, WIDE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the rows that are done, or step their values with it."""
    kept, start, within = locate(
        rows_ptr, bases_ptr, starts_ptr, columns_ptr, row, done, first_column, D, K, nnz, kept_rows,
        LAYOUT, WIDE, 1, BLOCK_D,
    )  # fmt: skip
    if OPTIMIZER == WRITE:
        if output_starts_ptr is not None:  # the output holds the touched rows only
            start = tl.load(output_starts_ptr + position, mask=done, other=0)
        at = start[:, None] + within
        tl.store(output_ptr + at, cast(sums, output_ptr.dtype.element_ty), mask=kept)
    else:
        at = start[:, None] + within
        if OPTIMIZER == ADAGRAD:
            delta = lr * sums / denominator[:, None]
        elif OPTIMIZER == ADAM:
            m = beta1 * tl.load(state_ptr + at, mask=kept, other=0.0) + rest1 * sums
            v = beta2 * tl.load(second_state_ptr + at, mask=kept, other=0.0) + rest2 * sums * sums
            tl.store(state_ptr + at, m, mask=kept)
            tl.store(second_state_ptr + at, v, mask=kept)
            delta = lr * m / (tl.sqrt(v) / root2 + eps)
        else:
            delta = lr * sums
        value = tl.load(values_ptr + at, mask=kept, other=0.0).to(tl.float32)
        tl.store(values_ptr + at, cast(value - delta, values_ptr.dtype.element_ty), mask=kept)


@device_function
def _add_squares(
    squares, sums, rows_ptr, bases_ptr, starts_ptr, columns_ptr, row, done, first_column, D, K, nnz, kept_rows,
    LAYOUT: tl.constexpr, WIDE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``squares`` plus those of the kept elements of a tile of gradients, [N]."""
    kept, _, _ = locate(
        rows_ptr, bases_ptr, starts_ptr, columns_ptr, row, done, first_column, D, K, nnz, kept_rows,
        LAYOUT, WIDE, 1, BLOCK_D,
    )  # fmt: skip
    return squares + tl.sum(tl.where(kept, sums * sums, 0.0), 1)


@device_function
def _step_row_state(state_ptr, row, done, squares, D, eps):
    """Row-wise Adagrad's state after this step; returns what divides the gradient."""
    state = tl.load(state_ptr + row, mask=done, other=0.0) + squares / D
    tl.store(state_ptr + row, state, mask=done)
    return tl.sqrt(state) + eps


@device_function
def _store_partials(partials_ptr, sums, window, continued, open_, first_column, D, BLOCK_D: tl.constexpr):
    """Shares of rows that this window does not finish; ``continued``: they began before it."""
    d = first_column + tl.arange(0, BLOCK_D)
    slot = 2 * window + tl.where(continued, 0, 1)
    tl.store(partials_ptr + slot[:, None] * D + d[None, :], sums, mask=open_[:, None] & (d < D)[None, :])


@triton.jit
def _grad_window_kernel(
    grad_ptr,           # [bags, D]
    argmax_ptr,         # [bags, D] int32: place in its bag of each maximum; None: not max
    keys_ptr,           # [N] rows, ascending; V and more: in no bag
    lookup_ptr,         # [N] int64: which lookup that was
    bag_ptr,            # [N] bag of each lookup; None: lookup // L
    offsets_ptr,        # [.] first lookup of each bag; None: bag * L
    scale_ptr,          # [bags] float32, or None
    weights_ptr,        # [N] float32 by lookup, or None
    frequency_ptr,      # [N] float32 by position: 1 / lookups of the row; or None
    output_starts_ptr,  # [N] int64 by position: where the row's gradient goes; None: where its values are
    values_ptr, state_ptr, second_state_ptr,  # changed in place; None to write the gradient
    output_ptr,         # gradient of the values; None to step
    partials_ptr,       # [2 windows, D] float32
    rows_ptr, bases_ptr, starts_ptr, columns_ptr,
    N, L, padding_idx, V, D, K, nnz, kept_rows, lr, beta1, beta2, rest1, rest2, eps, root2,
    OPTIMIZER: tl.constexpr, LAYOUT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # one program: a window of BLOCK_W sorted lookups x BLOCK_D columns (row-wise Adagrad: all columns)
    window = tl.program_id(0).to(tl.int64)
    position = window * BLOCK_W + tl.arange(0, BLOCK_W)
    row = tl.load(keys_ptr + position, mask=position < N, other=-1).to(tl.int64)
    following = tl.load(keys_ptr + position + 1, mask=position + 1 < N, other=-2).to(tl.int64)
    before = tl.load(keys_ptr + window * BLOCK_W - 1, mask=window > 0, other=-2).to(tl.int64)
    used = (position < N) & (row >= 0) & (row < V) & (row != padding_idx)
    ends = row != following
    continued = row == before
    done = used & ends & (row != before)
    last = tl.arange(0, BLOCK_W) == BLOCK_W - 1
    open_ = used & ((ends & continued) | (last & (row == following)))
    denominator = tl.zeros((BLOCK_W,), tl.float32)
    first_column = tl.program_id(1) * BLOCK_D
    if OPTIMIZER == ADAGRAD and WIDE:
        squares = tl.zeros((BLOCK_W,), tl.float32)
        for column in range(0, D, BLOCK_D):
            sums = _window_sums(
                grad_ptr, argmax_ptr, keys_ptr, lookup_ptr, bag_ptr, offsets_ptr, scale_ptr, weights_ptr,
                frequency_ptr, position, row, used, column, L, D, BLOCK_W, BLOCK_D,
            )  # fmt: skip
            _store_partials(partials_ptr, sums, window, continued, open_, column, D, BLOCK_D)
            squares = _add_squares(
                squares, sums, rows_ptr, bases_ptr, starts_ptr, columns_ptr, row, done, column, D, K, nnz,
                kept_rows, LAYOUT, WIDE, BLOCK_D,
            )  # fmt: skip
        denominator = _step_row_state(state_ptr, row, done, squares, D, eps)
        for column in range(0, D, BLOCK_D):
            sums = _window_sums(
                grad_ptr, argmax_ptr, keys_ptr, lookup_ptr, bag_ptr, offsets_ptr, scale_ptr, weights_ptr,
                frequency_ptr, position, row, used, column, L, D, BLOCK_W, BLOCK_D,
            )  # fmt: skip
            _apply(
                values_ptr, state_ptr, second_state_ptr, output_ptr, rows_ptr, bases_ptr, starts_ptr, columns_ptr,
                output_starts_ptr, sums, row, done, position, column, D, K, nnz, kept_rows, lr, beta1, beta2,
                rest1, rest2, eps, root2, denominator, OPTIMIZER, LAYOUT, WIDE, BLOCK_D,
            )  # fmt: skip
    else:
        sums = _window_sums(
            grad_ptr, argmax_ptr, keys_ptr, lookup_ptr, bag_ptr, offsets_ptr, scale_ptr, weights_ptr,
            frequency_ptr, position, row, used, first_column, L, D, BLOCK_W, BLOCK_D,
        )  # fmt: skip
        _store_partials(partials_ptr, sums, window, continued, open_, first_column, D, BLOCK_D)
        if OPTIMIZER == ADAGRAD:
            squares = _add_squares(
                denominator, sums, rows_ptr, bases_ptr, starts_ptr, columns_ptr, row, done, first_column, D, K,
                nnz, kept_rows, LAYOUT, WIDE, BLOCK_D,
            )  # fmt: skip
            denominator = _step_row_state(state_ptr, row, done, squares, D, eps)
        _apply(
            values_ptr, state_ptr, second_state_ptr, output_ptr, rows_ptr, bases_ptr, starts_ptr, columns_ptr,
            output_starts_ptr, sums, row, done, position, first_column, D, K, nnz, kept_rows, lr, beta1, beta2,
            rest1, rest2, eps, root2, denominator, OPTIMIZER, LAYOUT, WIDE, BLOCK_D,
        )  # fmt: skip


@device_function
def _partial_sum(
    keys_ptr, partials_ptr, window, row, first_column, N, D, BLOCK_W: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """[1, BLOCK_D]: the sum of the row that begins in ``window``, over all windows it spans."""
    d = first_column + tl.arange(0, BLOCK_D)
    total = tl.load(partials_ptr + (2 * window + 1) * D + d, mask=d < D, other=0.0)
    sums = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    first = window + 1
    more = 1
    while more > 0:
        later = first + tl.arange(0, BLOCK_P)
        inside = later * BLOCK_W < N
        goes_on = inside & (tl.load(keys_ptr + later * BLOCK_W, mask=inside, other=-1).to(tl.int64) == row)
        at = 2 * later[:, None] * D + d[None, :]
        sums += tl.load(partials_ptr + at, mask=goes_on[:, None] & (d < D)[None, :], other=0.0)
        more = tl.min(goes_on.to(tl.int32), 0)
        first += BLOCK_P
    return (total + tl.sum(sums, 0))[None, :]


@triton.jit
def _grad_spans_kernel(
    keys_ptr,           # [N] rows, ascending
    output_starts_ptr,  # [N] int64 by position, or None
    values_ptr, state_ptr, second_state_ptr, output_ptr,
    partials_ptr,       # [2 windows, D] float32
    rows_ptr, bases_ptr, starts_ptr, columns_ptr,
    N, padding_idx, V, D, K, nnz, kept_rows, lr, beta1, beta2, rest1, rest2, eps, root2,
    OPTIMIZER: tl.constexpr, LAYOUT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # one program: the row that begins in a window and goes on after it, if there is one
    window = tl.program_id(0).to(tl.int64)
    end = (window + 1) * BLOCK_W
    last = tl.load(keys_ptr + end - 1, mask=end - 1 < N, other=-1).to(tl.int64)
    following = tl.load(keys_ptr + end, mask=end < N, other=-2).to(tl.int64)
    before = tl.load(keys_ptr + window * BLOCK_W - 1, mask=window > 0, other=-2).to(tl.int64)
    used = (last >= 0) & (last < V) & (last != padding_idx)
    if used & (last == following) & (last != before):
        one = tl.zeros((1,), tl.int64)
        row = one + last
        position = one + end - 1
        done = row >= 0
        denominator = tl.zeros((1,), tl.float32)
        first_column = tl.program_id(1) * BLOCK_D
        if OPTIMIZER == ADAGRAD and WIDE:
            squares = tl.zeros((1,), tl.float32)
            for column in range(0, D, BLOCK_D):
                sums = _partial_sum(
                    keys_ptr, partials_ptr, window, last, column, N, D, BLOCK_W, BLOCK_P, BLOCK_D
                )
                squares = _add_squares(
                    squares, sums, rows_ptr, bases_ptr, starts_ptr, columns_ptr, row, done, column, D, K, nnz,
                    kept_rows, LAYOUT, WIDE, BLOCK_D,
                )  # fmt: skip
            denominator = _step_row_state(state_ptr, row, done, squares, D, eps)
            for column in range(0, D, BLOCK_D):
                sums = _partial_sum(
                    keys_ptr, partials_ptr, window, last, column, N, D, BLOCK_W, BLOCK_P, BLOCK_D
                )
                _apply(
                    values_ptr, state_ptr, second_state_ptr, output_ptr, rows_ptr, bases_ptr, starts_ptr,
                    columns_ptr, output_starts_ptr, sums, row, done, position, column, D, K, nnz, kept_rows, lr,
                    beta1, beta2, rest1, rest2, eps, root2, denominator, OPTIMIZER, LAYOUT, WIDE, BLOCK_D,
                )  # fmt: skip
        else:
            sums = _partial_sum(
                keys_ptr, partials_ptr, window, last, first_column, N, D, BLOCK_W, BLOCK_P, BLOCK_D
            )
            if OPTIMIZER == ADAGRAD:
                squares = _add_squares(
                    denominator, sums, rows_ptr, bases_ptr, starts_ptr, columns_ptr, row, done, first_column, D,
                    K, nnz, kept_rows, LAYOUT, WIDE, BLOCK_D,
                )  # fmt: skip
                denominator = _step_row_state(state_ptr, row, done, squares, D, eps)
            _apply(
                values_ptr, state_ptr, second_state_ptr, output_ptr, rows_ptr, bases_ptr, starts_ptr, columns_ptr,
                output_starts_ptr, sums, row, done, position, first_column, D, K, nnz, kept_rows, lr, beta1,
                beta2, rest1, rest2, eps, root2, denominator, OPTIMIZER, LAYOUT, WIDE, BLOCK_D,
            )  # fmt: skip
