"""Fixed fan-in linear layers for extreme classification: the definitions.

    output[b, o] = sum_f weight[o, f] * input[b, indices[o // G, f]] + bias[o]

    input [B, I]   weight [O, F]   bias [O] or None
    indices [ceil(O / G), F] int16 or int32, values in [0, I)

Labels are taken in chunks, so that neither [B, O] (in losses and top-k) nor [B, O, F] ever exists.
float16 and bfloat16 are widened: sums are in float32.
"""

from typing import List, Tuple  # noqa: UP035  (read by torch.library.infer_schema)

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**21  # of [B, labels, F], the largest temporary here

BCE, SQUARED_HINGE = 0, 1
MEAN, SUM, BATCHMEAN = 0, 1, 2
SGD, ADAM, ADAMW = 0, 1, 2
THRESHOLD, FRACTION = 0, 1
LAYER, ROW = 0, 1


# ---- linear ----


def fan_in_linear(
    input: Tensor, weight: Tensor, indices: Tensor, bias: Tensor | None, group_size: int
) -> Tensor:
    """[B, O]"""
    _check_indices(indices, input.shape[1])
    x, output = _wide(input), input.new_empty(input.shape[0], weight.shape[0])
    for begin, end in _chunks(output.shape, weight.shape[1]):
        output[:, begin:end] = _logits(x, weight, indices, bias, group_size, begin, end)
    return output


def fan_in_linear_grad_input(
    grad_output: Tensor, weight: Tensor, indices: Tensor, in_features: int, group_size: int
) -> Tensor:
    """grad_input[b, i] = sum over (o, f) with indices[o // G, f] = i of grad_output[b, o] * weight[o, f]"""
    _check_indices(indices, in_features)
    grad_input = _wide(grad_output).new_zeros(grad_output.shape[0], in_features)
    for begin, end in _chunks(grad_output.shape, weight.shape[1]):
        _add_grad_input(grad_input, _wide(grad_output[:, begin:end]), weight, indices, group_size, begin, end)
    return grad_input.to(grad_output.dtype)


def fan_in_linear_grad_weight(grad_output: Tensor, input: Tensor, indices: Tensor, group_size: int) -> Tensor:
    """grad_weight[o, f] = sum_b grad_output[b, o] * input[b, indices[o // G, f]]"""
    _check_indices(indices, input.shape[1])
    x = _wide(input)
    grad_weight = input.new_empty(grad_output.shape[1], indices.shape[1])
    for begin, end in _chunks(grad_output.shape, indices.shape[1]):
        grad_weight[begin:end] = _grad_weight(
            x, _wide(grad_output[:, begin:end]), indices, group_size, begin, end
        )
    return grad_weight


def fan_in_linear_update(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    state: List[Tensor],  # noqa: UP006
    group_size: int,
    optimizer: int,
    lr: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    stochastic_rounding: bool,
    seed: int,
) -> None:
    """One optimizer step on weight and bias, without a gradient tensor of the size of the weight.

    ``state`` holds the float32 moments of the weight, then those of the bias: none, [momentum], or
    [first, second] each. ``beta1`` is SGD's momentum.
    """
    _check_indices(indices, input.shape[1])
    x = _wide(input)
    hyper = (optimizer, lr, weight_decay, beta1, beta2, eps, step, stochastic_rounding, seed)
    for begin, end in _chunks(grad_output.shape, weight.shape[1]):
        grad = _wide(grad_output[:, begin:end])
        grad_weight = _grad_weight(x, grad, indices, group_size, begin, end)
        _update_labels(weight, bias, state, grad_weight, grad.sum(0), begin, end, *hyper)


# ---- loss ----


def fan_in_loss(
    input: Tensor,
    weight: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    labels: Tensor,
    kind: int,
    reduction: int,
    group_size: int,
) -> Tensor:
    """Multi-label loss; the positives of row b are the set labels[offsets[b]:offsets[b + 1]].

    With z the logits, and t = 1 at positives, 0 elsewhere, the sum over rows and labels of
        0, BCE             log(1 + e^z) - t z
        1, squared hinge   max(0, 1 - z)^2 where t = 1, max(0, 1 + z)^2 elsewhere
    over B O, 1 or B for the reductions mean (0), sum (1), batchmean (2). Accumulated in float64;
    scalar of the dtype of the input, float32 for 16-bit inputs.
    """
    _check_indices(indices, input.shape[1])
    rows = _positive_rows(offsets, labels, input.shape[0], weight.shape[0])
    x = _wide(input)
    total = torch.zeros((), dtype=torch.float64, device=input.device)
    for begin, end in _chunks((input.shape[0], weight.shape[0]), weight.shape[1]):
        z = _logits(x, weight, indices, bias, group_size, begin, end)
        total += _loss_terms(z, _targets(z, rows, labels, begin), kind)[0].sum(dtype=torch.float64)
    return (total * _scale(reduction, input.shape[0], weight.shape[0])).to(x.dtype)


def fan_in_loss_grad(
    grad_loss: Tensor,
    input: Tensor,
    weight: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    labels: Tensor,
    kind: int,
    reduction: int,
    group_size: int,
    input_grad: bool,
    weight_grad: bool,
) -> Tuple[Tensor, Tensor, Tensor]:  # noqa: UP006
    """Gradients to input, weight and bias; the logits are computed again, chunk by chunk.

    Gradients not asked for are empty. The bias's goes with the weight's.
    """
    _check_indices(indices, input.shape[1])
    rows = _positive_rows(offsets, labels, input.shape[0], weight.shape[0])
    x = _wide(input)
    scale = grad_loss.to(x.dtype) * _scale(reduction, input.shape[0], weight.shape[0])
    grad_input = torch.zeros_like(x) if input_grad else x.new_empty(0)
    grad_weight = torch.empty_like(weight) if weight_grad else weight.new_empty(0)
    grad_bias = torch.empty_like(bias) if weight_grad and bias is not None else weight.new_empty(0)
    for begin, end in _chunks((input.shape[0], weight.shape[0]), weight.shape[1]):
        z = _logits(x, weight, indices, bias, group_size, begin, end)
        grad = _loss_terms(z, _targets(z, rows, labels, begin), kind)[1] * scale
        if input_grad:
            _add_grad_input(grad_input, grad, weight, indices, group_size, begin, end)
        if weight_grad:
            grad_weight[begin:end] = _grad_weight(x, grad, indices, group_size, begin, end)
            if bias is not None:
                grad_bias[begin:end] = grad.sum(0)
    return grad_input.to(input.dtype), grad_weight, grad_bias


def fan_in_loss_step(
    grad_loss: Tensor,
    input: Tensor,
    weight: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    labels: Tensor,
    state: List[Tensor],  # noqa: UP006
    kind: int,
    reduction: int,
    group_size: int,
    input_grad: bool,
    optimizer: int,
    lr: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    stochastic_rounding: bool,
    seed: int,
) -> Tuple[Tensor, Tensor]:  # noqa: UP006
    """Loss, gradient to the input, and one optimizer step on weight and bias, in one pass over the labels.

    Loss and gradients are those at the weights before the step. ``state`` as in `fan_in_linear_update`.
    """
    _check_indices(indices, input.shape[1])
    rows = _positive_rows(offsets, labels, input.shape[0], weight.shape[0])
    x = _wide(input)
    factor = _scale(reduction, input.shape[0], weight.shape[0])
    scale = grad_loss.to(x.dtype) * factor
    hyper = (optimizer, lr, weight_decay, beta1, beta2, eps, step, stochastic_rounding, seed)
    grad_input = torch.zeros_like(x) if input_grad else x.new_empty(0)
    total = torch.zeros((), dtype=torch.float64, device=input.device)
    for begin, end in _chunks((input.shape[0], weight.shape[0]), weight.shape[1]):
        z = _logits(x, weight, indices, bias, group_size, begin, end)
        terms, grad = _loss_terms(z, _targets(z, rows, labels, begin), kind)
        total += terms.sum(dtype=torch.float64)
        grad = grad * scale
        if input_grad:
            _add_grad_input(grad_input, grad, weight, indices, group_size, begin, end)
        grad_weight = _grad_weight(x, grad, indices, group_size, begin, end)
        _update_labels(weight, bias, state, grad_weight, grad.sum(0), begin, end, *hyper)
    return (total * factor).to(x.dtype), grad_input.to(input.dtype)


# ---- top-k and candidate scores ----


def fan_in_topk(
    input: Tensor, weight: Tensor, indices: Tensor, bias: Tensor | None, k: int, group_size: int
) -> Tuple[Tensor, Tensor]:  # noqa: UP006
    """The k largest logits of each row, largest first, and their labels (int64).

    Equal logits: lowest label first. NaN counts as the largest, as in torch.topk.
    """
    _check_indices(indices, input.shape[1])
    x = _wide(input)
    values = x.new_empty(input.shape[0], 0)
    best = torch.empty(input.shape[0], 0, dtype=torch.int64, device=input.device)
    for begin, end in _chunks((input.shape[0], weight.shape[0]), weight.shape[1]):
        z = _logits(x, weight, indices, bias, group_size, begin, end)
        chunk = torch.arange(begin, end, device=input.device).expand(z.shape)
        values, order = torch.cat([values, z], 1).sort(dim=1, descending=True, stable=True)
        values = values[:, :k].contiguous()
        best = torch.cat([best, chunk], 1).gather(1, order[:, :k])
    return values.to(input.dtype), best


def fan_in_score(
    input: Tensor,
    weight: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    candidates: Tensor,
    group_size: int,
) -> Tensor:
    """output[b, c] = the logit of row b for label candidates[b, c]: [B, C]"""
    _check_indices(indices, input.shape[1])
    _check_candidates(candidates, weight.shape[0])
    x, output = _wide(input), input.new_empty(candidates.shape)
    for begin, end in _chunks(candidates.shape, weight.shape[1]):
        label = candidates[:, begin:end].long()
        z = (_gather_columns(x, indices, label, group_size) * _wide(weight[label])).sum(2)
        output[:, begin:end] = z if bias is None else z + _wide(bias[label])
    return output


def fan_in_score_grad_input(
    grad_output: Tensor,
    weight: Tensor,
    indices: Tensor,
    candidates: Tensor,
    in_features: int,
    group_size: int,
) -> Tensor:
    """grad_input[b, indices[label // G, f]] += grad_output[b, c] * weight[label, f]: [B, I]"""
    _check_indices(indices, in_features)
    _check_candidates(candidates, weight.shape[0])
    grad_input = _wide(grad_output).new_zeros(grad_output.shape[0], in_features)
    for begin, end in _chunks(candidates.shape, weight.shape[1]):
        label = candidates[:, begin:end].long()
        products = _wide(grad_output[:, begin:end]).unsqueeze(2) * _wide(weight[label])
        columns = indices[label // group_size].long()
        grad_input.scatter_add_(1, columns.flatten(1), products.flatten(1))
    return grad_input.to(grad_output.dtype)


def fan_in_score_grad_weight(
    grad_output: Tensor,
    input: Tensor,
    indices: Tensor,
    candidates: Tensor,
    out_features: int,
    group_size: int,
) -> Tensor:
    """grad_weight[label, f] += grad_output[b, c] * input[b, indices[label // G, f]]: [O, F]"""
    _check_indices(indices, input.shape[1])
    _check_candidates(candidates, out_features)
    x = _wide(input)
    grad_weight = x.new_zeros(out_features, indices.shape[1])
    for begin, end in _chunks(candidates.shape, indices.shape[1]):
        label = candidates[:, begin:end].long()
        products = _wide(grad_output[:, begin:end]).unsqueeze(2) * _gather_columns(
            x, indices, label, group_size
        )
        grad_weight.index_add_(0, label.flatten(), products.flatten(0, 1))
    return grad_weight.to(input.dtype)


# ---- prune and regrow ----


def fan_in_rewire(
    weight: Tensor,
    indices: Tensor,
    state: List[Tensor],  # noqa: UP006
    in_features: int,
    group_size: int,
    criterion: int,
    scope: int,
    amount: float,
    init_scale: float,
    allow_duplicates: bool,
    seed: int,
) -> Tensor:
    """Drop small connections and regrow as many at random inputs, in place; gives how many (int64 scalar).

    The score of a connection is the root mean square of its weights over the labels of the group
    (their magnitude at G = 1). Dropped are
        criterion 0, threshold   scores below ``amount``
        criterion 1, fraction    the floor(amount * N + 1/2) smallest: N = all connections (scope 0, layer),
                                 or the F of each index row (scope 1, row)
    Ties go by `_hash` of the position, so the number is exact; NaN is the largest score. A regrown
    connection reads a uniformly random input: any (``allow_duplicates``), or one that no other
    connection of its row reads, drawn in rounds (`_draw_without_duplicates`). Its weight is 0, or
    uniform in (-init_scale, init_scale); the same elements of each ``state`` tensor become 0.
    All of it depends on ``seed`` only.
    """
    _check_indices(indices, in_features)
    rows, fan_in = indices.shape
    key = _hash(torch.tensor(seed, device=weight.device))
    position = torch.arange(rows * fan_in, device=weight.device)
    scores = _group_scores(weight, rows, group_size).flatten()
    if criterion == THRESHOLD:
        dropped = scores < amount
    else:
        tie = (_hash(key - position * GOLDEN) >> 32) & 0xFFFFFFFF
        order = (scores.view(torch.int32).long() & 0x7FFFFFFF) * 2**32 + tie
        per_row = scope == ROW
        order = order.view(rows, fan_in) if per_row else order.view(1, -1)
        smallest = order.sort(dim=1, stable=True).indices[:, : int(amount * order.shape[1] + 0.5)]
        dropped = torch.zeros_like(order, dtype=torch.bool).scatter_(1, smallest, True).flatten()
    where = dropped.nonzero().flatten()
    if allow_duplicates:
        drawn = _draw(key, where, 0, in_features)
    else:
        drawn = _draw_without_duplicates(key, where, indices, dropped, in_features)
    indices.view(-1)[where] = drawn.to(indices.dtype)
    mask = dropped.view(rows, fan_in).repeat_interleave(group_size, 0)[: weight.shape[0]]
    if init_scale == 0:
        weight.masked_fill_(mask, 0)
    else:
        element = mask.flatten().nonzero().flatten()
        uniform = ((_hash(~key + element * GOLDEN) >> 40) & 0xFFFFFF).float() * 2.0**-24
        weight.view(-1)[element] = ((2 * uniform - 1) * init_scale).to(weight.dtype)
    for moments in state:
        moments.masked_fill_(mask, 0)
    return dropped.sum()


# ---- random numbers: counters through a hash, so that they depend on position and seed alone ----

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15
ROUND = -3335678366873096957  # 0xD1B54A32D192ED03
DRAW_ROUNDS = 64


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift right of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _hash(x: Tensor) -> Tensor:
    """The finalizer of SplitMix64, on int64 that wraps."""
    x = (x ^ _shift(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _shift(x, 31)


def _draw(key: Tensor, position: Tensor, attempt: int, in_features: int) -> Tensor:
    """Uniform in [0, I) for each connection."""
    bits = _shift(_hash(key + position * GOLDEN + torch.tensor(attempt, device=position.device) * ROUND), 32)
    return (bits * in_features) >> 32


def _draw_without_duplicates(
    key: Tensor, where: Tensor, indices: Tensor, dropped: Tensor, in_features: int
) -> Tensor:
    """In each round every connection still without an input draws one; it keeps it if no connection of
    its row has it, the lowest position going first. After DRAW_ROUNDS the rest take the next free input
    above their last draw (cyclically)."""
    fan_in = indices.shape[1]
    columns = torch.where(dropped, -1, indices.flatten().long())
    waiting = where
    for attempt in range(DRAW_ROUNDS):
        if waiting.numel() == 0:
            break
        drawn = _draw(key, waiting, attempt, in_features)
        row = waiting // fan_in
        taken = (columns.view(-1, fan_in)[row] == drawn.unsqueeze(1)).any(1)
        cell, order = (row * in_features + drawn).sort(dim=0, stable=True)
        later = torch.zeros_like(taken)
        later[order[1:]] = cell[1:] == cell[:-1]
        keep = ~(taken | later)
        columns[waiting[keep]] = drawn[keep]
        waiting = waiting[~keep]
    for position in waiting.tolist():
        own = columns.view(-1, fan_in)[position // fan_in]
        column = int(_draw(key, torch.tensor(position), DRAW_ROUNDS - 1, in_features))
        while bool((own == column).any()):
            column = (column + 1) % in_features
        columns[position] = column
    return columns[where]


def _round_stochastically(values: Tensor, first: int, step: int, seed: int) -> Tensor:
    """float32 to bfloat16, up with the probability of the distance: 16 random bits are added below."""
    key = _hash(torch.tensor(seed, device=values.device) + torch.tensor(step, device=values.device) * GOLDEN)
    element = first + torch.arange(values.numel(), device=values.device).view(values.shape)
    x = _mix((element & 0xFFFFFFFF) ^ (key & 0xFFFFFFFF))
    x = _mix((x + ((element >> 32) ^ _shift(key, 32))) & 0xFFFFFFFF)
    bits = values.view(torch.int32).long()
    rounded = ((bits + (x >> 16)) & ~0xFFFF).to(torch.int32).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).bfloat16()


def _mix(x: Tensor) -> Tensor:
    """A 32-bit integer hash (multiply and xor-shift), on int64."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


# ---- pieces ----


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _chunks(shape, fan_in: int):
    """Ranges of labels whose [B, labels, F] stays within CHUNK_ELEMENTS."""
    size = max(1, CHUNK_ELEMENTS // max(1, shape[0] * fan_in))
    return [(begin, min(begin + size, shape[1])) for begin in range(0, shape[1], size)]


def _columns(indices: Tensor, group_size: int, begin: int, end: int) -> Tensor:
    """[labels, F]"""
    return indices[torch.arange(begin, end, device=indices.device) // group_size].long()


def _gather_columns(x: Tensor, indices: Tensor, label: Tensor, group_size: int) -> Tensor:
    """x[b, indices[label[b, c] // G, f]]: [B, C, F]"""
    columns = indices[label // group_size].long()
    return x.gather(1, columns.flatten(1)).view(columns.shape)


def _logits(x, weight, indices, bias, group_size, begin, end) -> Tensor:
    columns = _columns(indices, group_size, begin, end)
    z = torch.einsum("bnf,nf->bn", x[:, columns], _wide(weight[begin:end]))
    return z if bias is None else z + _wide(bias[begin:end])


def _add_grad_input(grad_input, grad, weight, indices, group_size, begin, end) -> None:
    columns = _columns(indices, group_size, begin, end).flatten()
    grad_input.index_add_(1, columns, (grad.unsqueeze(2) * _wide(weight[begin:end])).flatten(1))


def _grad_weight(x, grad, indices, group_size, begin, end) -> Tensor:
    return torch.einsum("bn,bnf->nf", grad, x[:, _columns(indices, group_size, begin, end)])


def _scale(reduction: int, batch: int, out_features: int) -> float:
    count = {MEAN: batch * out_features, SUM: 1, BATCHMEAN: batch}[reduction]
    return 1.0 / count if count else float("nan")


def _loss_terms(z: Tensor, targets: Tensor, kind: int) -> Tuple[Tensor, Tensor]:  # noqa: UP006
    """The terms of the loss, and their derivatives by z."""
    if kind == BCE:
        terms = z.clamp(min=0) - torch.where(targets, z, 0) + torch.log1p(torch.exp(-z.abs()))
        return terms, torch.sigmoid(z) - targets.to(z.dtype)
    sign = torch.where(targets, -1.0, 1.0).to(z.dtype)
    margin = (1 + sign * z).clamp(min=0)
    return margin * margin, 2 * sign * margin


def _positive_rows(offsets: Tensor, labels: Tensor, batch: int, out_features: int) -> Tensor:
    """The row of each positive; checks the two tensors."""
    begin, end = offsets[:-1], offsets[1:]
    if int(offsets[0]) != 0 or int(offsets[-1]) != labels.numel() or bool((begin > end).any()):
        raise ValueError(
            f"offsets must start at 0, never decrease and end at the number of labels, {labels.numel()}; "
            f"got {offsets.tolist()[:8]}... ending at {int(offsets[-1])}"
        )
    if labels.numel() and not (0 <= int(labels.min()) and int(labels.max()) < out_features):
        raise IndexError(
            f"labels must be in [0, {out_features}); "
            f"got values from {int(labels.min())} to {int(labels.max())}"
        )
    return torch.arange(batch, device=offsets.device).repeat_interleave((end - begin).long())


def _targets(z: Tensor, rows: Tensor, labels: Tensor, begin: int) -> Tensor:
    """Multi-hot bool, of the shape of the logits of the chunk of labels from ``begin``."""
    targets = torch.zeros_like(z, dtype=torch.bool)
    inside = (labels >= begin) & (labels < begin + z.shape[1])
    targets[rows[inside], labels[inside].long() - begin] = True
    return targets


def _update_labels(weight, bias, state, grad_weight, grad_bias, begin, end, *hyper) -> None:
    moments = len(state) // (1 if bias is None else 2)
    rows = [m[begin:end] for m in state]
    _update(weight[begin:end], grad_weight, rows[:moments], begin * weight.shape[1], *hyper)
    if bias is not None:  # its elements are numbered after the weight's
        _update(bias[begin:end], grad_bias, rows[moments:], weight.numel() + begin, *hyper)


def _update(
    parameter,
    grad,
    state,
    first,
    optimizer,
    lr,
    weight_decay,
    beta1,
    beta2,
    eps,
    step,
    stochastic_rounding,
    seed,
) -> None:
    """As torch.optim.SGD (momentum), Adam and AdamW; state in float32 (float64 for float64 parameters)."""
    w = _wide(parameter)
    if optimizer == ADAMW:
        w = w * (1 - lr * weight_decay)
    elif weight_decay:
        grad = grad + weight_decay * w
    if optimizer == SGD:
        if state:
            state[0].mul_(beta1).add_(grad)
            grad = state[0]
        w = w - lr * grad
    else:
        state[0].mul_(beta1).add_(grad, alpha=1 - beta1)
        state[1].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = (state[1] / (1 - beta2**step)).sqrt() + eps
        w = w - lr / (1 - beta1**step) * state[0] / root
    parameter.copy_(_round_stochastically(w, first, step, seed) if stochastic_rounding else w)


def _group_scores(weight: Tensor, rows: int, group_size: int) -> Tensor:
    """Root mean square of the weights of each connection over its group: [rows, F] float32."""
    if group_size == 1:
        return weight.abs().float()
    square = weight.double() ** 2
    padded = torch.cat([square, square.new_zeros(rows * group_size - weight.shape[0], weight.shape[1])])
    count = torch.full((rows, 1), group_size, dtype=torch.float64, device=weight.device)
    if rows:
        count[-1] = weight.shape[0] - (rows - 1) * group_size
    return (padded.view(rows, group_size, weight.shape[1]).sum(1) / count).sqrt().float()


def _check_indices(indices: Tensor, in_features: int) -> None:
    if indices.numel() and not (0 <= int(indices.min()) and int(indices.max()) < in_features):
        raise IndexError(
            f"indices must be in [0, {in_features}); "
            f"got values from {int(indices.min())} to {int(indices.max())}"
        )


def _check_candidates(candidates: Tensor, out_features: int) -> None:
    if candidates.numel() and not (0 <= int(candidates.min()) and int(candidates.max()) < out_features):
        raise IndexError(
            f"candidates must be in [0, {out_features}); "
            f"got values from {int(candidates.min())} to {int(candidates.max())}"
        )
