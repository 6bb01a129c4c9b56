"""Embeddings whose rows have rank R and are projected up after pooling.

row(v) = table[v] up^T + mean                                   table [V, R]   up [D, R]   mean [D]
bag:     sum or mean of weight * row(index) = pooled up^T + total * mean
fields:  z[b, k] = table[starts[k] + indices[b, k]],  x[b, k] = z[b, k] projections[k] + bias[k],
         fm[b] = 1/2 sum_d ((sum_k x)^2 - sum_k x^2)
"""

import torch
from torch import Tensor

SUM, MEAN, MAX = 0, 1, 2


def _check_range(name: str, indices: Tensor, limit: int) -> None:
    if indices.numel() and not (0 <= int(indices.min()) and int(indices.max()) < limit):
        wrong = indices[(indices < 0) | (indices >= limit)].reshape(-1)[0].item()
        raise IndexError(f"{name} must be in [0, {limit}); got {wrong}")


def _starts(offsets: Tensor, lookups: int, include_last_offset: bool) -> Tensor:
    """[B + 1] from offsets."""
    starts = offsets.long()
    if not include_last_offset:
        starts = torch.cat([starts, starts.new_tensor([lookups])])
    if starts.numel() > 1 and starts[0] != 0:
        raise ValueError(f"offsets must begin with 0; got {int(starts[0])}")
    if bool((starts[1:] < starts[:-1]).any()) or (starts.numel() and int(starts[-1]) > lookups):
        raise ValueError(
            f"offsets must not decrease or pass the end of {lookups} indices; got {starts.tolist()}"
        )
    return starts


def _lookups(
    table: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    pooling_mode: int,
    padding_idx: int,
    include_last_offset: bool,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Lookups that count: their positions, bags and weights; and the number of bags."""
    keep = indices != padding_idx
    if offsets is None:
        bags = indices.numel()
        bag = torch.arange(bags, device=indices.device)
    else:
        starts = _starts(offsets, indices.numel(), include_last_offset)
        bags = starts.numel() - 1
        bag = torch.repeat_interleave(torch.arange(bags, device=indices.device), starts.diff())
        keep = keep[: bag.numel()]
    position = keep.nonzero().reshape(-1)
    bag = bag[position]
    weight = table.new_ones(position.numel()) if per_sample_weights is None else per_sample_weights[position]
    if pooling_mode == MEAN:
        weight = weight / torch.bincount(bag, minlength=bags)[bag].to(weight.dtype)
    return position, bag, weight, bags


def low_rank_embedding_bag(
    table: Tensor,
    up: Tensor,
    mean: Tensor | None,
    indices: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    pooling_mode: int,
    padding_idx: int,
    include_last_offset: bool,
    scale_grad_by_freq: bool,
    sparse: bool,
    keep_pooled: bool,
) -> tuple[Tensor, Tensor]:
    """Output [B, D], and pooled [B, R] (empty unless keep_pooled), for the gradients.

    Without offsets each index is looked up on its own; the row of padding_idx is then looked up too,
    but without ``mean`` and without gradient.
    """
    _check_range("indices", indices, table.shape[0])
    position, bag, weight, bags = _lookups(
        table, indices, offsets, per_sample_weights, pooling_mode, padding_idx, include_last_offset
    )
    if offsets is None:
        pooled = table[indices]
    else:
        rows = table[indices[position]] * weight[:, None]
        pooled = table.new_zeros(bags, table.shape[1]).index_add(0, bag, rows)
    output = pooled @ up.t()
    if mean is not None:
        output = output + table.new_zeros(bags).index_add(0, bag, weight)[:, None] * mean
    return output, pooled if keep_pooled else pooled.new_empty(0, table.shape[1])


def low_rank_embedding_bag_grad(
    grad_output: Tensor,
    table: Tensor,
    up: Tensor,
    mean: Tensor | None,
    indices: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    pooled: Tensor,
    pooling_mode: int,
    padding_idx: int,
    include_last_offset: bool,
    needs_sample_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to pooled [B, R], up [D, R], mean [D] and per_sample_weights [N], empty where absent."""
    position, bag, weight, bags = _lookups(
        table, indices, offsets, per_sample_weights, pooling_mode, padding_idx, include_last_offset
    )
    if offsets is None:
        grad_output = grad_output * (indices != padding_idx)[:, None]
    grad_pooled = grad_output @ up
    grad_up = grad_output.t() @ pooled
    total = table.new_zeros(bags).index_add(0, bag, weight)
    grad_mean = table.new_empty(0) if mean is None else (grad_output * total[:, None]).sum(0)
    if not needs_sample_weights:
        return grad_pooled, grad_up, grad_mean, table.new_empty(0)
    each = (table[indices[position]] * grad_pooled[bag]).sum(1)
    if mean is not None:
        each = each + (grad_output @ mean)[bag]
    if pooling_mode == MEAN:
        each = each / torch.bincount(bag, minlength=bags)[bag].to(each.dtype)
    grad_weights = table.new_zeros(indices.numel()).index_add(0, position, each)
    return grad_pooled, grad_up, grad_mean, grad_weights


def low_rank_embedding_bag_max(
    table: Tensor,
    up: Tensor,
    mean: Tensor | None,
    indices: Tensor,
    offsets: Tensor,
    padding_idx: int,
    include_last_offset: bool,
) -> tuple[Tensor, Tensor]:
    """Elementwise maximum of the rows of each bag [B, D], and the lookup that won [B, D], -1 if none."""
    _check_range("indices", indices, table.shape[0])
    position, bag, _, bags = _lookups(table, indices, offsets, None, MAX, padding_idx, include_last_offset)
    rows = table[indices[position]] @ up.t()
    index = bag[:, None].expand_as(rows)
    best = rows.new_zeros(bags, up.shape[0]).scatter_reduce(0, index, rows, "amax", include_self=False)
    # the first lookup that reaches the maximum
    none = indices.numel()
    reached = torch.where(rows == best[bag], position[:, None], none)
    winner = reached.new_full((bags, up.shape[0]), none).scatter_reduce(0, index, reached, "amin")
    winner = torch.where(winner == none, -1, winner)
    if mean is not None:
        best = best + mean * (winner >= 0)
    return best, winner


def low_rank_embedding_bag_max_grad(
    grad_output: Tensor, table: Tensor, up: Tensor, indices: Tensor, positions: Tensor, needs_mean: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to table [V, R], up [D, R] and mean [D] (empty unless needs_mean)."""
    bag, dim = (positions >= 0).nonzero(as_tuple=True)
    row = indices[positions[bag, dim]].long()
    grad = grad_output[bag, dim][:, None]
    grad_table = torch.zeros_like(table).index_add(0, row, grad * up[dim])
    grad_up = torch.zeros_like(up).index_add(0, dim, grad * table[row])
    grad_mean = up.new_zeros(up.shape[0] if needs_mean else 0)
    return grad_table, grad_up, grad_mean.index_add(0, dim, grad[:, 0]) if needs_mean else grad_mean


def low_rank_rows_grad(
    grad_pooled: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    num_embeddings: int,
    pooling_mode: int,
    padding_idx: int,
    include_last_offset: bool,
) -> Tensor:
    """Gradient to table [V, R]: sum over the lookups of each row of weight * grad_pooled[bag]."""
    position, bag, weight, _ = _lookups(
        grad_pooled, indices, offsets, per_sample_weights, pooling_mode, padding_idx, include_last_offset
    )
    grad = grad_pooled.new_zeros(num_embeddings, grad_pooled.shape[1])
    return grad.index_add(0, indices[position].long(), weight[:, None] * grad_pooled[bag])


def low_rank_rows_grad_sparse(
    grad_pooled: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    num_embeddings: int,
    pooling_mode: int,
    padding_idx: int,
    include_last_offset: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same over the rows looked up: rows [N] rising, gradients [N, R], and how many of them count [1].

    What follows repeats the last row with a gradient of zero: sizes depend on sizes alone.
    """
    position, bag, weight, _ = _lookups(
        grad_pooled, indices, offsets, per_sample_weights, pooling_mode, padding_idx, include_last_offset
    )
    unique, place = torch.unique(indices[position].long(), return_inverse=True)
    rows = unique.new_full((indices.numel(),), int(unique[-1]) if unique.numel() else 0)
    rows[: unique.numel()] = unique
    values = grad_pooled.new_zeros(indices.numel(), grad_pooled.shape[1])
    values = values.index_add(0, place, weight[:, None] * grad_pooled[bag])
    return rows, values, unique.new_tensor([unique.numel()])


def low_rank_fields(
    table: Tensor,
    starts: Tensor,
    projections: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    with_output: bool,
    with_interaction: bool,
    sparse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """z [B, F, R]; x [B, F, D] and fm [B, 1], each empty unless wanted."""
    fields, rank, dim = projections.shape
    for k in range(fields):
        _check_range(f"indices of field {k}", indices[:, k], int(starts[k + 1] - starts[k]))
    mid = table[indices + starts[:-1]]
    output = torch.einsum("bkr,krd->bkd", mid, projections).contiguous()
    if bias is not None:
        output = output + bias
    empty = table.new_empty(0, fields, dim), table.new_empty(0, 1)
    total = output.sum(1)
    interaction = 0.5 * (total * total - (output * output).sum(1)).sum(1, keepdim=True)
    return mid, output if with_output else empty[0], interaction if with_interaction else empty[1]


def low_rank_fields_grad(
    grad_mid: Tensor | None,
    grad_output: Tensor | None,
    grad_interaction: Tensor | None,
    mid: Tensor,
    projections: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients at the rows looked up [B, F, R], to projections [F, R, D] and bias [F, D] (empty if None)."""
    grad = mid.new_zeros(*mid.shape[:2], projections.shape[2]) if grad_output is None else grad_output
    if grad_interaction is not None:
        output = torch.einsum("bkr,krd->bkd", mid, projections)
        if bias is not None:
            output = output + bias
        grad = grad + grad_interaction[:, :, None] * (output.sum(1, keepdim=True) - output)
    grad_rows = torch.einsum("bkd,krd->bkr", grad, projections).contiguous()
    if grad_mid is not None:
        grad_rows = grad_rows + grad_mid
    grad_bias = mid.new_empty(0, projections.shape[2]) if bias is None else grad.sum(0)
    return grad_rows, torch.einsum("bkr,bkd->krd", mid, grad).contiguous(), grad_bias
