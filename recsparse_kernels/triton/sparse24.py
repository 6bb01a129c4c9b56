"""2:4 masks, packing and their inverses in Triton; the products are in sparse24_linear.py.

values    [O, P / 2]   two for each group of four columns, in column order
metadata  [O, P / 8]   uint8; four kept values a byte, 2 bits each, low bits first: the column within the group

P is I rounded up to 16. Packing and unpacking work on one byte of metadata at a time: 8 columns, 4 values.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.sparse24 import PAIRS, check_kept, padded, patterns
from ._configs import Configs
from ._device import device_function
from ._launch import NO_SPILL, launch, launcher

CONFIGS = Configs(
    "sparse24",
    {
        "mask": dict(BLOCK=256, num_warps=4),  # groups a program
        "transposable mask": dict(BLOCK=128, num_warps=4),  # tiles a program
        "pack": dict(BLOCK=128, num_warps=4),  # bytes of metadata a program
    },
)


def _pattern_digits() -> int:
    """The 90 patterns in their order, 12 bits each: the pair (0 to 5) of each row, 3 bits, first row low."""
    number = 0
    for n, tile in enumerate(patterns().tolist()):
        for row, kept in enumerate(tile):
            pair = PAIRS.index(tuple(i for i in range(4) if kept[i]))
            number |= pair << (12 * n + 3 * row)
    return number


PATTERNS = tl.constexpr(_pattern_digits())


@device_function
def _magnitude(w):
    """|w| in float32, NaN above everything."""
    w = tl.abs(w.to(tl.float32))
    return tl.where(w != w, float("inf"), w)


@device_function
def _before(a, b):
    """1 where a, which comes after b, goes before it; so that the first of equal ones is kept."""
    return (a > b).to(tl.int32)


@device_function
def top_two(a, b, c, d):
    """Whether each of four is among the two largest, of equal ones the first."""
    ba, ca, da = _before(b, a), _before(c, a), _before(d, a)
    cb, db, dc = _before(c, b), _before(d, b), _before(d, c)
    return (
        ba + ca + da < 2,
        (1 - ba) + cb + db < 2,
        (1 - ca) + (1 - cb) + dc < 2,
        (1 - da) + (1 - db) + (1 - dc) < 2,
    )


@device_function
def split_groups(tile, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """[ROWS, 4 * GROUPS] as four of [ROWS, GROUPS]: the columns 0 to 3 of each group."""
    pairs = tl.reshape(tile, (ROWS, GROUPS, 2, 2))  # column = 2 * third + fourth
    even, odd = tl.split(pairs)
    c0, c2 = tl.split(even)
    c1, c3 = tl.split(odd)
    return c0, c1, c2, c3


@device_function
def join_groups(c0, c1, c2, c3, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """The inverse of `split_groups`."""
    return tl.reshape(tl.join(tl.join(c0, c2), tl.join(c1, c3)), (ROWS, 4 * GROUPS))


@device_function
def select(position, c0, c1, c2, c3):
    """The column of the group that ``position`` (0 to 3) names."""
    return tl.where(position < 2, tl.where(position == 0, c0, c1), tl.where(position == 2, c2, c3))


@device_function
def scatter(first, second, v0, v1, COLUMN: tl.constexpr):
    """What column COLUMN of the group holds: v0, v1 or zero."""
    return tl.where(second == COLUMN, v1, tl.where(first == COLUMN, v0, tl.zeros_like(v0)))


@triton.jit
def _mask_kernel(
    weight_ptr,  # [O, I]
    mask_ptr,  # [O, I] bool
    I,
    groups,  # of a row
    all_groups,
    BLOCK: tl.constexpr,
):
    # one program: BLOCK groups, rows one after the other
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = (group % groups * 4)[:, None] + tl.arange(0, 4)[None, :]
    at = (group // groups)[:, None] * I + column
    inside = (group < all_groups)[:, None] & (column < I)
    size = _magnitude(tl.load(weight_ptr + at, mask=inside, other=0.0))
    size = tl.where(inside, size, -1.0)  # what is beyond the row is kept last
    c0, c1, c2, c3 = split_groups(size, BLOCK, 1)
    k0, k1, k2, k3 = top_two(c0, c1, c2, c3)
    kept = join_groups(k0.to(tl.int8), k1.to(tl.int8), k2.to(tl.int8), k3.to(tl.int8), BLOCK, 1)
    tl.store(mask_ptr + at, kept != 0, mask=inside)


@device_function
def _tile_row(weight_ptr, row, tile_column, O, I, inside, BLOCK: tl.constexpr):
    """The six pair sums, float64, of one row of BLOCK tiles; zero outside the weight."""
    column = tile_column[:, None] * 4 + tl.arange(0, 4)[None, :]
    mask = (inside & (row < O))[:, None] & (column < I)
    size = _magnitude(tl.load(weight_ptr + row[:, None] * I + column, mask=mask, other=0.0)).to(tl.float64)
    c0, c1, c2, c3 = split_groups(size, BLOCK, 1)
    return c0 + c1, c0 + c2, c0 + c3, c1 + c2, c1 + c3, c2 + c3


@device_function
def _score(pairs0, pairs1, pairs2, pairs3, PATTERN: tl.constexpr):
    """What a pattern (four pairs, 3 bits each) keeps of the tiles."""
    above = pairs0[PATTERN & 7] + pairs1[(PATTERN >> 3) & 7]
    below = pairs2[(PATTERN >> 6) & 7] + pairs3[PATTERN >> 9]
    return above + below


@device_function
def _store_tile_row(mask_ptr, pair, row, tile_column, O, I, inside, BLOCK: tl.constexpr):
    """The two columns of ``pair`` [BLOCK, 1]: 01 02 03 12 13 23."""
    column = tl.arange(0, 4)[None, :]
    low = tl.where(pair < 3, 0, tl.where(pair < 5, 1, 2))
    high = tl.where(pair < 3, pair + 1, tl.where(pair < 5, pair - 1, 3))
    kept = (column == low) | (column == high)
    at = tile_column[:, None] * 4 + column
    tl.store(mask_ptr + row[:, None] * I + at, kept, mask=(inside & (row < O))[:, None] & (at < I))


@triton.jit
def _transposable_mask_kernel(
    weight_ptr,  # [O, I]
    mask_ptr,  # [O, I] bool
    O,
    I,
    across,  # tiles across
    all_tiles,
    BLOCK: tl.constexpr,
):
    # one program: BLOCK tiles of 4 x 4; all 90 patterns are scored in the order that decides ties, in
    # float64 and with the sums of the definition, so that equal scores are equal here too
    tile = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = tile < all_tiles
    row, column = tile // across * 4, tile % across
    pairs0 = _tile_row(weight_ptr, row, column, O, I, inside, BLOCK)
    pairs1 = _tile_row(weight_ptr, row + 1, column, O, I, inside, BLOCK)
    pairs2 = _tile_row(weight_ptr, row + 2, column, O, I, inside, BLOCK)
    pairs3 = _tile_row(weight_ptr, row + 3, column, O, I, inside, BLOCK)
    best = tl.full((BLOCK, 1), -1.0, dtype=tl.float64)
    chosen = tl.zeros((BLOCK, 1), dtype=tl.int32)
    for n in tl.static_range(90):
        score = _score(pairs0, pairs1, pairs2, pairs3, (PATTERNS >> (12 * n)) & 0xFFF)
        better = score > best
        best = tl.where(better, score, best)
        chosen = tl.where(better, (PATTERNS >> (12 * n)) & 0xFFF, chosen)
    _store_tile_row(mask_ptr, chosen & 7, row, column, O, I, inside, BLOCK)
    _store_tile_row(mask_ptr, (chosen >> 3) & 7, row + 1, column, O, I, inside, BLOCK)
    _store_tile_row(mask_ptr, (chosen >> 6) & 7, row + 2, column, O, I, inside, BLOCK)
    _store_tile_row(mask_ptr, chosen >> 9, row + 3, column, O, I, inside, BLOCK)


@device_function
def _store_packed(values_ptr, metadata_ptr, byte, inside, k0, k1, k2, k3, weight, BLOCK: tl.constexpr):
    """Packs weight [BLOCK, 8], zero where not kept, for one byte each; k0 to k3 [BLOCK, 2]: 1 where kept."""
    w0, w1, w2, w3 = split_groups(weight, BLOCK, 2)
    s3, s2, s1, s0 = top_two(k3, k2, k1, k0)  # what is kept, then the highest others
    first = tl.where(s0, 0, tl.where(s1, 1, 2))
    second = tl.where(s3, 3, tl.where(s2, 2, 1))
    values = tl.reshape(tl.join(select(first, w0, w1, w2, w3), select(second, w0, w1, w2, w3)), (BLOCK, 4))
    value_at = byte[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(values_ptr + value_at, values, mask=inside[:, None])
    shift = tl.arange(0, 2)[None, :] * 4
    bits = tl.sum((first | second << 2) << shift, axis=1)
    tl.store(metadata_ptr + byte, bits.to(tl.uint8), mask=inside)


@triton.jit
def _compress_kernel(
    weight_ptr,  # [O, I]
    mask_ptr,  # [O, I] bool
    values_ptr,  # [O, 4 * row_bytes]
    metadata_ptr,  # [O, row_bytes] uint8
    wrong_ptr,  # [programs] int64: first group (of 4 columns, rows padded) that keeps more than two
    I,
    row_bytes,
    all_bytes,
    BLOCK: tl.constexpr,
):
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = (byte % row_bytes * 8)[:, None] + tl.arange(0, 8)[None, :]
    at = (byte // row_bytes)[:, None] * I + column
    inside = (byte < all_bytes)[:, None] & (column < I)
    kept = (tl.load(mask_ptr + at, mask=inside, other=0) != 0).to(tl.int32)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
    weight = tl.where(kept != 0, weight, tl.zeros_like(weight))  # a filled position stores zero
    k0, k1, k2, k3 = split_groups(kept, BLOCK, 2)
    _store_packed(values_ptr, metadata_ptr, byte, byte < all_bytes, k0, k1, k2, k3, weight, BLOCK)
    group = byte[:, None] * 2 + tl.arange(0, 2)[None, :]
    wrong = tl.where(k0 + k1 + k2 + k3 > 2, group, all_bytes * 2)
    tl.store(wrong_ptr + tl.program_id(0), tl.min(tl.min(wrong, axis=1), axis=0))


@device_function
def kept_positions(metadata, shift):
    """first, second column of the group whose nibble of ``metadata`` begins at ``shift``."""
    nibble = metadata.to(tl.int32) >> shift
    return nibble & 3, (nibble >> 2) & 3


@triton.jit
def _transpose_kernel(
    values_ptr,  # [O, 4 * row_bytes]
    metadata_ptr,  # [O, row_bytes] uint8
    out_values_ptr,  # [I, 4 * out_bytes]
    out_metadata_ptr,  # [I, out_bytes] uint8
    O,
    I,
    row_bytes,
    out_bytes,
    BLOCK: tl.constexpr,
):
    # one program: BLOCK bytes of the transposed metadata, columns of the weight one after the other, so that
    # neighbours read the same rows
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column, byte = at % I, at // I
    inside = byte < out_bytes
    row = (byte * 8)[:, None] + tl.arange(0, 8)[None, :]
    here = inside[:, None] & (row < O)
    code = tl.load(metadata_ptr + row * row_bytes + (column // 8)[:, None], mask=here, other=0)
    first, second = kept_positions(code, (column // 4 % 2 * 4)[:, None])
    place = (column % 4)[:, None]
    stored = here & ((first == place) | (second == place))
    value_at = row * (4 * row_bytes) + (column // 4 * 2)[:, None] + tl.where(second == place, 1, 0)
    weight = tl.load(values_ptr + value_at, mask=stored, other=0.0)
    out = column * out_bytes + byte
    k0, k1, k2, k3 = split_groups(stored.to(tl.int32), BLOCK, 2)
    s0, s1, s2, s3 = top_two(k0, k1, k2, k3)  # of more than two the first
    k0, k1, k2, k3 = k0 & s0, k1 & s1, k2 & s2, k3 & s3
    _store_packed(out_values_ptr, out_metadata_ptr, out, inside, k0, k1, k2, k3, weight, BLOCK)


@triton.jit
def _gather_kernel(
    dense_ptr,  # [O, I]
    metadata_ptr,  # [O, row_bytes] uint8
    values_ptr,  # [O, 4 * row_bytes]
    I,
    row_bytes,
    all_bytes,
    BLOCK: tl.constexpr,
):
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = (byte % row_bytes * 8)[:, None] + tl.arange(0, 8)[None, :]
    at = (byte // row_bytes)[:, None] * I + column
    inside = (byte < all_bytes)[:, None] & (column < I)
    c0, c1, c2, c3 = split_groups(tl.load(dense_ptr + at, mask=inside, other=0.0), BLOCK, 2)
    bits = tl.load(metadata_ptr + byte, mask=byte < all_bytes, other=0)
    first, second = kept_positions(bits[:, None], tl.arange(0, 2)[None, :] * 4)
    values = tl.join(select(first, c0, c1, c2, c3), select(second, c0, c1, c2, c3))
    value_at = byte[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(values_ptr + value_at, tl.reshape(values, (BLOCK, 4)), mask=(byte < all_bytes)[:, None])


@triton.jit
def _decompress_kernel(
    values_ptr,  # [O, 4 * row_bytes]
    metadata_ptr,  # [O, row_bytes] uint8
    dense_ptr,  # [O, I]
    I,
    row_bytes,
    all_bytes,
    BLOCK: tl.constexpr,
):
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value_at = byte[:, None] * 4 + tl.arange(0, 4)[None, :]
    values = tl.load(values_ptr + value_at, mask=(byte < all_bytes)[:, None], other=0.0)
    v0, v1 = tl.split(tl.reshape(values, (BLOCK, 2, 2)))
    bits = tl.load(metadata_ptr + byte, mask=byte < all_bytes, other=0)
    first, second = kept_positions(bits[:, None], tl.arange(0, 2)[None, :] * 4)
    c0, c1 = scatter(first, second, v0, v1, 0), scatter(first, second, v0, v1, 1)
    c2, c3 = scatter(first, second, v0, v1, 2), scatter(first, second, v0, v1, 3)
    dense = join_groups(c0, c1, c2, c3, BLOCK, 2)
    column = (byte % row_bytes * 8)[:, None] + tl.arange(0, 8)[None, :]
    inside = (byte < all_bytes)[:, None] & (column < I)
    tl.store(dense_ptr + (byte // row_bytes)[:, None] * I + column, dense, mask=inside)


@launcher
def sparse24_mask(weight: Tensor, transposable: bool) -> Tensor:
    weight = weight.contiguous()
    O, I = weight.shape
    mask = torch.empty((O, I), dtype=torch.bool, device=weight.device)
    across = triton.cdiv(I, 4)
    if transposable:
        tiles, config = triton.cdiv(O, 4) * across, CONFIGS["transposable mask"]
        args = (weight, mask, O, I, across, tiles)
        launch(_transposable_mask_kernel, (triton.cdiv(tiles, config["BLOCK"]),), *args, **config)
    else:
        groups, config = O * across, CONFIGS["mask"]
        grid = (triton.cdiv(groups, config["BLOCK"]),)
        launch(_mask_kernel, grid, weight, mask, I, across, groups, **config)
    return mask


def _check_kept(first_wrong: Tensor, mask: Tensor, groups: int, line: str, others: str) -> None:
    """Raises ValueError on CPU tensors (the interpreter), as the reference does; on a GPU the device asserts."""
    if first_wrong.is_meta or first_wrong.numel() == 0:
        return
    where = first_wrong.min()
    if where.device.type != "cpu":
        fits = where == mask.shape[0] * groups
        torch._assert_async(fits, f"mask must keep at most 2 in each group of 4 {others}")
    elif int(where) < mask.shape[0] * groups:
        check_kept(mask, line, others)


def _compress(
    weight: Tensor, mask: Tensor, line: str = "row", others: str = "columns"
) -> tuple[Tensor, Tensor]:
    weight, mask = weight.contiguous(), mask.contiguous()
    O, I = weight.shape
    row_bytes = padded(I) // 8
    values = weight.new_empty(O, 4 * row_bytes)
    metadata = torch.empty((O, row_bytes), dtype=torch.uint8, device=weight.device)
    config = CONFIGS["pack"]
    programs = triton.cdiv(O * row_bytes, config["BLOCK"])
    wrong = torch.empty(programs, dtype=torch.int64, device=weight.device)
    args = (weight, mask, values, metadata, wrong, I, row_bytes, O * row_bytes)
    launch(_compress_kernel, (programs,), *args, **config)
    _check_kept(wrong, mask, 2 * row_bytes, line, others)
    return values, metadata


@launcher
def sparse24_compress(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return _compress(weight, mask)


@launcher
def sparse24_compress_both(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (*_compress(weight, mask), *_compress(weight.t(), mask.t(), "column", "rows"))


@launcher
def sparse24_prune_both(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return sparse24_compress_both(weight, sparse24_mask(weight, True))


@launcher
def sparse24_prune(weight: Tensor, transposable: bool) -> tuple[Tensor, Tensor]:
    return sparse24_compress(weight, sparse24_mask(weight, transposable))


@launcher
def sparse24_transpose(values: Tensor, metadata: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
    values, metadata = values.contiguous(), metadata.contiguous()
    (O, row_bytes), I, out_bytes = metadata.shape, in_features, padded(metadata.shape[0]) // 8
    out_values = values.new_empty(I, 4 * out_bytes)
    out_metadata = metadata.new_empty(I, out_bytes)
    config = CONFIGS["pack"]
    args = (values, metadata, out_values, out_metadata, O, I, row_bytes, out_bytes)
    launch(_transpose_kernel, (triton.cdiv(I * out_bytes, config["BLOCK"]),), *args, **config)
    return out_values, out_metadata


@launcher
def sparse24_gather(dense: Tensor, metadata: Tensor) -> Tensor:
    dense, metadata = dense.contiguous(), metadata.contiguous()
    O, row_bytes = metadata.shape
    values = dense.new_empty(O, 4 * row_bytes)
    config = CONFIGS["pack"]
    args = (dense, metadata, values, dense.shape[1], row_bytes, O * row_bytes)
    launch(_gather_kernel, (triton.cdiv(O * row_bytes, config["BLOCK"]),), *args, **config)
    return values


@launcher
def sparse24_decompress(values: Tensor, metadata: Tensor, in_features: int) -> Tensor:
    values, metadata = values.contiguous(), metadata.contiguous()
    O, row_bytes = metadata.shape
    dense = values.new_empty(O, in_features)
    config = CONFIGS["pack"]
    args = (values, metadata, dense, in_features, row_bytes, O * row_bytes)
    launch(_decompress_kernel, (triton.cdiv(O * row_bytes, config["BLOCK"]),), *args, **config, **NO_SPILL)
    return dense


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that between them launch every kernel and configuration of this file."""
    for dtype in (torch.bfloat16, torch.float32):
        for O, I in ((4096, 4096), (367, 479)):
            weight = torch.empty((O, I), dtype=dtype, device="meta")
            mask = torch.empty((O, I), dtype=torch.bool, device="meta")
            values = torch.empty((O, padded(I) // 2), dtype=dtype, device="meta")
            metadata = torch.empty((O, padded(I) // 8), dtype=torch.uint8, device="meta")
            label = f"{O} x {I}, {str(dtype).removeprefix('torch.')}"
            yield f"mask, {label}", partial(sparse24_mask, weight, False)
            yield f"transposable mask, {label}", partial(sparse24_mask, weight, True)
            yield f"compress, {label}", partial(sparse24_compress, weight, mask)
            yield f"gather, {label}", partial(sparse24_gather, weight, metadata)
            yield f"transpose, {label}", partial(sparse24_transpose, values, metadata, I)
            yield f"decompress, {label}", partial(sparse24_decompress, values, metadata, I)
