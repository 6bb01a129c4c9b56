"""Masked embedding tables: the definitions.

    W[i, d] = values[start(i) + rank(i, d)] if bit d of row i is set, else 0

where rank counts the kept elements of the row before column d. A table is five tensors, of which a
layout uses some (csrc/cpu/masked_embedding_kernels.h draws them):

    layout      values     rows                       bases   starts            columns
    bitmask     [nnz]      [V, ceil(D/8) + 4] uint8   int64   -                 -
    fixed_k     [V, k]     [V, ceil(D/8)] uint8       -       -                 -
    row_remap   [nnz]      [ceil(V/64), 12] uint8     int64   [kept rows + 1]   [nnz] uint8

Bags are ``indices[offsets[b] : offsets[b + 1]]``, or without offsets the rows of ``indices [B, L]``.
``pooling_mode`` is 0 sum, 1 mean, 2 max, or 3: each index is a bag of its own, padding is looked up too.
A ``padding_idx`` of -1 means none.
"""

import torch
from torch import Tensor

BASE_ROWS = 65536  # rows that share a 64-bit base
SUM, MEAN, MAX, EACH = range(4)


def _unsigned(bytes_: Tensor) -> Tensor:
    """Little-endian bytes [..., n] as int64 (for n = 8: the two's complement)."""
    shifts = 8 * torch.arange(bytes_.shape[-1], device=bytes_.device)
    return (bytes_.long() << shifts).sum(-1)


def _bits(bytes_: Tensor, count: int) -> Tensor:
    """Bits of the bytes [..., n], low bit first, as bool [..., count]."""
    shifts = torch.arange(8, device=bytes_.device, dtype=torch.uint8)
    return ((bytes_.unsqueeze(-1) >> shifts) & 1).flatten(-2)[..., :count].bool()


def row_positions(
    values: Tensor,
    rows: Tensor,
    bases: Tensor | None,
    starts: Tensor | None,
    columns: Tensor | None,
    embedding_dim: int,
    indices: Tensor,
) -> tuple[Tensor, Tensor]:
    """Of the rows at ``indices [N]``: which columns are kept, bool [N, D], and where in
    ``values.flatten()`` each kept one is, int64 [N, D] (0 where not kept)."""
    mask_bytes = (embedding_dim + 7) // 8
    indices = indices.long()
    if columns is not None:
        block = rows[indices // 64]
        occupied = _bits(block[:, :8], 64)
        bit = (indices % 64).unsqueeze(1)
        before = (occupied & (torch.arange(64, device=rows.device) < bit)).sum(1)
        here = occupied.gather(1, bit).squeeze(1)
        rank = torch.where(here, _unsigned(block[:, 8:]) + before, 0)
        low = starts.long() & 0xFFFFFFFF
        start = bases[rank // BASE_ROWS] + low[rank]
        end_rank = torch.where(here, rank + 1, 0)
        end = torch.where(here, bases[end_rank // BASE_ROWS] + low[end_rank], start)
        kept = torch.zeros(len(indices), embedding_dim, dtype=torch.bool, device=rows.device)
        count = end - start
        row = torch.repeat_interleave(torch.arange(len(indices), device=rows.device), count)
        within = torch.arange(len(row), device=rows.device) - torch.repeat_interleave(
            count.cumsum(0) - count, count
        )
        kept[row, columns[start[row] + within].long()] = True
    else:
        kept = _bits(rows[indices, :mask_bytes], embedding_dim)
        if values.dim() == 2:
            start = indices * values.shape[1]
        else:
            start = bases[indices // BASE_ROWS] + _unsigned(rows[indices, mask_bytes:])
    rank = kept.long().cumsum(1) - 1
    return kept, torch.where(kept, start.unsqueeze(1) + rank, 0)


def _lookup(values, rows, bases, starts, columns, embedding_dim, indices) -> Tensor:
    """Dense rows [N, D]."""
    kept, at = row_positions(values, rows, bases, starts, columns, embedding_dim, indices)
    if values.numel() == 0:
        return values.new_zeros(kept.shape)
    return torch.where(kept, values.flatten()[at], values.new_zeros(()))


def _check_indices(indices: Tensor, num_embeddings: int) -> None:
    if indices.numel() == 0:
        return
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= num_embeddings:
        got = low if low < 0 else high
        raise IndexError(f"indices must be in [0, {num_embeddings}), the rows of the table; got {got}")


def _bags(
    indices: Tensor, offsets: Tensor | None, pooling_mode: int, include_last_offset: bool, num_embeddings: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Flat indices [N], the bag of each [N] (indices in no bag are cut off), first lookup of each bag [B]."""
    _check_indices(indices, num_embeddings)
    flat = indices.reshape(-1)
    device = flat.device
    if pooling_mode == EACH:
        each = torch.arange(flat.numel(), device=device)
        return flat, each, each
    if offsets is None:
        bags, length = indices.shape
        return (
            flat,
            torch.arange(bags, device=device).repeat_interleave(length),
            torch.arange(bags, device=device) * length,
        )
    offsets = offsets.long()
    if include_last_offset and offsets.numel() == 0:
        raise ValueError("offsets must have at least one entry with include_last_offset")
    if offsets.numel():
        if offsets[0] != 0:
            raise ValueError(f"offsets must start at 0; got {int(offsets[0])}")
        if bool((offsets.diff() < 0).any()):
            raise ValueError("offsets must not descend")
        if offsets[-1] > flat.numel():
            raise ValueError(
                f"offsets must not pass the number of indices, {flat.numel()}; got {int(offsets[-1])}"
            )
    ends = offsets if include_last_offset else torch.cat([offsets, offsets.new_tensor([flat.numel()])])
    if ends.numel() == 1:
        return flat[:0], flat[:0].long(), ends[:0]
    bag = torch.arange(ends.numel() - 1, device=device).repeat_interleave(ends.diff())
    return flat[: int(ends[-1])], bag, ends[:-1]


def _bag_scale(
    flat: Tensor, bag: Tensor, bags: int, pooling_mode: int, padding_idx: int, dtype: torch.dtype
) -> Tensor:
    """1, or for mean 1 / number of lookups without padding, [B]."""
    if pooling_mode != MEAN:
        return torch.ones(bags, dtype=dtype, device=flat.device)
    count = torch.zeros(bags, dtype=torch.long, device=flat.device)
    count.index_add_(0, bag, (flat != padding_idx).long())
    return 1.0 / count.clamp_min(1).to(dtype)


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
    """``W[indices]``, [*indices.shape, D]. The last three arguments only matter to the gradient."""
    _check_indices(indices, num_embeddings)
    dense = _lookup(values, rows, bases, starts, columns, embedding_dim, indices.reshape(-1))
    return dense.reshape(*indices.shape, embedding_dim)


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
    """Pooled rows [B, D]; and for max where in its bag each maximum is, int32 [B, D] (-1: empty bag),
    for the other modes [0, D]. The last two arguments only matter to the gradient."""
    flat, bag, first = _bags(indices, offsets, pooling_mode, include_last_offset, num_embeddings)
    bags = len(first)
    looked_up = _lookup(values, rows, bases, starts, columns, embedding_dim, flat)
    counted = flat != padding_idx
    if pooling_mode == MAX:
        output = looked_up.new_zeros(bags, embedding_dim)
        argmax = torch.full((bags, embedding_dim), -1, dtype=torch.int32, device=values.device)
        for b in range(bags):
            (places,) = torch.nonzero((bag == b) & counted, as_tuple=True)
            for n, j in enumerate(places.tolist()):  # the first of equal ones; NaN only wins when first
                better = torch.ones_like(output[b], dtype=torch.bool) if n == 0 else looked_up[j] > output[b]
                output[b] = torch.where(better, looked_up[j], output[b])
                argmax[b] = torch.where(better, int(j - first[b]), argmax[b])
        return output, argmax
    wide = looked_up if values.dtype == torch.float64 else looked_up.float()
    if per_sample_weights is not None:
        wide = wide * per_sample_weights.reshape(-1)[: len(flat)].to(wide.dtype).unsqueeze(1)
    wide = torch.where(counted.unsqueeze(1), wide, 0)
    output = wide.new_zeros(bags, embedding_dim).index_add_(0, bag, wide)
    output = output * _bag_scale(flat, bag, bags, pooling_mode, padding_idx, wide.dtype).unsqueeze(1)
    return output.to(values.dtype), torch.empty(0, embedding_dim, dtype=torch.int32, device=values.device)


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
    """``grad[j] = scale(b) <grad_output[b], W[indices[j]]>``, float32 (float64 for a float64 table)."""
    flat, bag, first = _bags(indices, offsets, pooling_mode, include_last_offset, num_embeddings)
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    looked_up = _lookup(values, rows, bases, starts, columns, embedding_dim, flat).to(wide)
    scale = _bag_scale(flat, bag, len(first), pooling_mode, padding_idx, wide)
    dots = (grad_output.to(wide)[bag] * looked_up).sum(1) * scale[bag]
    grad = torch.zeros(indices.shape, dtype=wide, device=values.device)
    grad.view(-1)[: len(flat)] = torch.where(flat != padding_idx, dots, 0)
    return grad


def _lookup_gradients(
    grad_output, flat, bag, first, per_sample_weights, argmax, pooling_mode, padding_idx, scale_grad_by_freq
) -> Tensor:
    """Gradient with respect to each looked-up row, [N, D]; 0 for padding."""
    wide = torch.float64 if grad_output.dtype == torch.float64 else torch.float32
    grads = grad_output.to(wide)[bag]
    if pooling_mode == MAX:
        place = torch.arange(len(flat), device=flat.device) - first[bag]
        grads = torch.where(argmax[bag] == place.unsqueeze(1), grads, 0)
    scale = _bag_scale(flat, bag, len(first), pooling_mode, padding_idx, wide)[bag]
    if per_sample_weights is not None:
        scale = scale * per_sample_weights.reshape(-1)[: len(flat)].to(wide)
    if scale_grad_by_freq:
        _, which, count = torch.unique(flat, return_inverse=True, return_counts=True)
        scale = scale / count[which].to(wide)
    grads = grads * scale.unsqueeze(1)
    return torch.where((flat != padding_idx).unsqueeze(1), grads, 0)


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
    """Gradient of the kept values, of the shape of ``values``; looked-up rows are summed in order."""
    flat, bag, first = _bags(indices, offsets, pooling_mode, include_last_offset, num_embeddings)
    kept, at = row_positions(values, rows, bases, starts, columns, embedding_dim, flat)
    grads = _lookup_gradients(
        grad_output,
        flat,
        bag,
        first,
        per_sample_weights,
        argmax,
        pooling_mode,
        padding_idx,
        scale_grad_by_freq,
    )
    grad = grads.new_zeros(values.numel()).index_add_(0, at[kept], grads[kept])
    return grad.view(values.shape).to(values.dtype)


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
    """The gradient of the values of touched rows: positions in ``values`` ascending [n], gradients [n];
    in layout fixed_k rows ascending [n], gradients [n, k]."""
    grad = masked_embedding_bag_grad_values(
        grad_output, values, rows, bases, starts, columns, indices, offsets, per_sample_weights, None,
        num_embeddings, embedding_dim, pooling_mode, padding_idx, include_last_offset, scale_grad_by_freq,
    )  # fmt: skip
    flat, _, _ = _bags(indices, offsets, pooling_mode, include_last_offset, num_embeddings)
    touched = torch.unique(flat[flat != padding_idx].long())
    if values.dim() == 2:
        return touched, grad[touched]
    kept, at = row_positions(values, rows, bases, starts, columns, embedding_dim, touched)
    return at[kept], grad[at[kept]]


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
    """One optimizer step on the touched rows, g their gradient:

    0 SGD          v -= lr g
    1 row Adagrad  state[i] += sum(g^2) / D;  v -= lr g / (sqrt(state[i]) + eps)
    2 Adam         as torch.optim.SparseAdam: moments of untouched rows stay
    """
    flat, bag, first = _bags(indices, offsets, pooling_mode, include_last_offset, num_embeddings)
    grads = _lookup_gradients(
        grad_output,
        flat,
        bag,
        first,
        per_sample_weights,
        argmax,
        pooling_mode,
        padding_idx,
        scale_grad_by_freq,
    )
    touched, which = torch.unique(flat.long(), return_inverse=True)
    g = grads.new_zeros(len(touched), embedding_dim).index_add_(0, which, grads)
    keep = touched != padding_idx
    touched, g = touched[keep], g[keep]
    kept, at = row_positions(values, rows, bases, starts, columns, embedding_dim, touched)
    flat_values, at_kept = values.view(-1), at[kept]
    if optimizer == 1:
        state[touched] += torch.where(kept, g * g, 0).sum(1) / embedding_dim
        delta = (lr * g / (state[touched].sqrt().unsqueeze(1) + eps))[kept]
    elif optimizer == 2:
        m, v = state.view(-1), second_state.view(-1)
        m[at_kept] = beta1 * m[at_kept] + (1 - beta1) * g[kept]
        v[at_kept] = beta2 * v[at_kept] + (1 - beta2) * g[kept] ** 2
        denominator = v[at_kept].sqrt() / (1 - beta2**step) ** 0.5 + eps
        delta = lr / (1 - beta1**step) * m[at_kept] / denominator
    else:
        delta = lr * g[kept]
    flat_values[at_kept] = (flat_values[at_kept].to(delta.dtype) - delta).to(values.dtype)


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
    """Scales the looked-up rows whose norm is above ``max_norm`` down to it, in place."""
    _check_indices(indices, num_embeddings)
    looked_up = torch.unique(indices.reshape(-1).long())
    kept, at = row_positions(values, rows, bases, starts, columns, embedding_dim, looked_up)
    if values.numel() == 0:
        return
    dense = torch.where(kept, values.view(-1)[at], 0)
    wide = dense if values.dtype == torch.float64 else dense.float()
    norm = torch.linalg.vector_norm(wide, norm_type, dim=1, keepdim=True)
    scaled = torch.where(norm > max_norm, wide * (max_norm / (norm + 1e-7)), wide)
    values.view(-1)[at[kept]] = scaled[kept].to(values.dtype)


def masked_embedding_unpack(
    values: Tensor,
    rows: Tensor,
    bases: Tensor | None,
    starts: Tensor | None,
    columns: Tensor | None,
    num_embeddings: int,
    embedding_dim: int,
) -> Tensor:
    """The dense table [V, D]."""
    every = torch.arange(num_embeddings, device=values.device)
    return _lookup(values, rows, bases, starts, columns, embedding_dim, every)


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
    """The kept elements of a dense [V, D], in the order and shape of ``values`` (whose data is not read)."""
    every = torch.arange(num_embeddings, device=rows.device)
    kept, at = row_positions(values, rows, bases, starts, columns, embedding_dim, every)
    out = grad_output.new_empty(values.numel())
    out[at[kept]] = grad_output[kept]
    return out.view(values.shape)


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
    """Values for another mask of the same table: the old where both keep, else 0. Of ``new_values``
    only the shape is read."""
    dense = masked_embedding_unpack(values, rows, bases, starts, columns, num_embeddings, embedding_dim)
    return masked_embedding_unpack_grad_values(
        dense, new_values, new_rows, new_bases, new_starts, new_columns, num_embeddings, embedding_dim
    )


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
    """``input [B, D] @ W.T``, [B, V]."""
    return (
        input
        @ masked_embedding_unpack(values, rows, bases, starts, columns, num_embeddings, embedding_dim).t()
    )


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
    """``grad_output [B, V] @ W``, [B, D]."""
    return grad_output @ masked_embedding_unpack(
        values, rows, bases, starts, columns, num_embeddings, embedding_dim
    )


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
    """``grad_output.T @ input`` at the kept elements, of the shape of ``values``."""
    return masked_embedding_unpack_grad_values(
        grad_output.t() @ input, values, rows, bases, starts, columns, num_embeddings, embedding_dim
    )


def record_begins(
    like: Tensor,
    records: Tensor,
    starts: Tensor,
    bases: Tensor,
    num_embeddings: int,
    embedding_dim: int,
    kept: int,
) -> tuple[Tensor, int]:
    """First element of each record [V], and how many elements of it are mask."""
    mask_elements = -(-((embedding_dim + 7) // 8) // like.element_size())
    row = torch.arange(num_embeddings, device=records.device)
    if kept >= 0:
        return row * (mask_elements + kept), mask_elements
    return bases[row // BASE_ROWS] + (starts.long() & 0x7FFFFFFF), mask_elements


def record_masks(
    like: Tensor,
    records: Tensor,
    starts: Tensor,
    bases: Tensor,
    num_embeddings: int,
    embedding_dim: int,
    kept: int,
) -> tuple[Tensor, Tensor, int]:
    """Mask bits [V, ceil(D/8)] of a table in records, and what `record_begins` gives."""
    begins, mask_elements = record_begins(like, records, starts, bases, num_embeddings, embedding_dim, kept)
    bytes_ = torch.arange((embedding_dim + 7) // 8, device=records.device)
    return (
        records.view(torch.uint8)[(begins * like.element_size()).unsqueeze(1) + bytes_],
        begins,
        mask_elements,
    )


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
    """Lookups in a table whose rows are records of mask and values (ops/masked_embedding_records.py):
    pooled rows [B, D], or [N, D] in pooling_mode 3. ``kept`` is k of layout fixed_k, else -1."""
    bits, begins, mask_elements = record_masks(
        like, records, starts, bases, num_embeddings, embedding_dim, kept
    )
    keep = _bits(bits, embedding_dim)
    at = (begins + mask_elements).unsqueeze(1) + keep.long().cumsum(1) - 1
    weight = like.new_zeros(keep.shape)
    weight[keep] = records.view(like.dtype)[at[keep]]
    full = torch.nn.functional.pad(weight.new_ones(keep.shape, dtype=torch.uint8), (0, -embedding_dim % 8))
    places = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=like.device)
    rows = (full.unflatten(1, (-1, 8)) * places).sum(2, dtype=torch.uint8)
    output, _ = masked_embedding_bag(
        weight, rows, None, None, None, indices, offsets, per_sample_weights, num_embeddings, embedding_dim,
        pooling_mode, padding_idx, include_last_offset, False, False,
    )  # fmt: skip
    return output
