"""2:4 semi-structured linear, defined in plain torch.

Storage of a weight W [O, I] with at most two kept in each group of four along I, I padded with zero
columns to P, a multiple of 16:

    values    [O, P / 2]   two for each group, in column order
    metadata  [O, P / 8]   uint8; four kept values a byte, 2 bits each, low bits first: the column of
                           the value within its group; first < second in every group

A group that keeps fewer than two still stores two: a zero value at the highest free columns. So a
transposable mask cut off at an edge fills up beyond it, and what is stored is 2:4 both ways.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from ._activation import activate

PADDING = 16
PAIRS = tuple(itertools.combinations(range(4), 2))


def padded(in_features: int) -> int:
    """I rounded up to a multiple of 16."""
    return (in_features + PADDING - 1) // PADDING * PADDING


def patterns() -> Tensor:
    """The 90 4 x 4 patterns with two in every row and column, in the order that decides ties."""
    rows = torch.zeros(6, 4, dtype=torch.bool)
    for i, pair in enumerate(PAIRS):
        rows[i, list(pair)] = True
    choices = torch.tensor(list(itertools.product(range(6), repeat=4)))
    tiles = rows[choices]
    return tiles[(tiles.sum(1) == 2).all(1)]


def sparse24_mask(weight: Tensor, transposable: bool) -> Tensor:
    size = weight.detach().double().abs()
    size = torch.where(size.isnan(), float("inf"), size)  # what is not a number is kept first
    O, I = weight.shape
    if not transposable:
        groups = F.pad(size, (0, -I % 4), value=-1.0).view(O, (I + 3) // 4, 4)
        order = groups.argsort(dim=2, descending=True, stable=True)
        mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, order[:, :, :2], True)
        return mask.flatten(1)[:, :I].contiguous()
    tiles = F.pad(size, (0, -I % 4, 0, -O % 4))
    down, across = tiles.shape[0] // 4, tiles.shape[1] // 4
    tiles = tiles.view(down, 4, across, 4).permute(0, 2, 1, 3)  # [down, across, row, column]
    pairs = torch.stack([tiles[..., i] + tiles[..., j] for i, j in PAIRS], dim=-1)
    best = torch.full((down, across), -1.0, dtype=torch.double, device=weight.device)
    chosen = torch.zeros(down, across, dtype=torch.long, device=weight.device)
    every = patterns().to(weight.device)
    for n, pattern in enumerate(every):
        row = [PAIRS.index(tuple(r.nonzero().flatten().tolist())) for r in pattern]
        score = (pairs[..., 0, row[0]] + pairs[..., 1, row[1]]) + (
            pairs[..., 2, row[2]] + pairs[..., 3, row[3]]
        )
        better = score > best
        best = torch.where(better, score, best)
        chosen = torch.where(better, n, chosen)
    mask = every[chosen].permute(0, 2, 1, 3).reshape(down * 4, across * 4)
    return mask[:O, :I].contiguous()


def check_kept(mask: Tensor, line: str = "row", others: str = "columns") -> None:
    """Raises ValueError, naming the first place, where a line of the mask keeps more than two of four."""
    lines, length = mask.shape
    kept = F.pad(mask, (0, -length % 4)).view(lines, (length + 3) // 4, 4).sum(2)
    too_many = (kept > 2).nonzero()
    if len(too_many):
        at, group = too_many[0].tolist()
        raise ValueError(
            f"mask must keep at most 2 in each group of 4 {others}; {line} {at} keeps "
            f"{int(kept[at, group])} in {others} {4 * group} to {4 * group + 3}"
        )


def sparse24_compress(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    check_kept(mask)
    O, I = weight.shape
    P = padded(I)
    kept = F.pad(mask, (0, P - I)).view(O, P // 4, 4)
    # columns that are kept first, then the highest others, in column order
    order = 3 - kept.flip(2).to(torch.uint8).argsort(dim=2, descending=True, stable=True)
    columns = order[:, :, :2].sort(dim=2).values
    dense = F.pad(torch.where(mask, weight, 0), (0, P - I)).view(O, P // 4, 4)
    values = dense.gather(2, columns).reshape(O, P // 2)
    shifts = torch.tensor([0, 2, 4, 6], device=weight.device)
    metadata = (columns.reshape(O, P // 8, 4) << shifts).sum(2).to(torch.uint8)
    return values, metadata


def sparse24_prune(weight: Tensor, transposable: bool) -> tuple[Tensor, Tensor]:
    return sparse24_compress(weight, sparse24_mask(weight, transposable))


def sparse24_compress_both(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The packs of W and of W', for a mask that keeps at most two of four in rows and in columns."""
    check_kept(mask)
    check_kept(mask.t(), "column", "rows")
    return (*sparse24_compress(weight, mask), *sparse24_compress(weight.t(), mask.t()))


def sparse24_prune_both(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return sparse24_compress_both(weight, sparse24_mask(weight, True))


def sparse24_transpose(values: Tensor, metadata: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
    """The pack of W' from that of W; of more than two stored in four rows of a column, the first two."""
    O, P = metadata.shape[0], padded(in_features)
    stored = torch.zeros(O, P, dtype=torch.bool, device=metadata.device)
    stored = stored.scatter_(1, kept_columns(metadata), True)[:, :in_features].t()
    groups = F.pad(stored, (0, -O % 4)).view(in_features, (O + 3) // 4, 4)
    first = (groups & (groups.cumsum(2) <= 2)).flatten(1)[:, :O]
    return sparse24_compress(sparse24_decompress(values, metadata, in_features).t(), first)


def kept_columns(metadata: Tensor) -> Tensor:
    """Column of each kept value, [O, P / 2] int64."""
    O, bytes_each = metadata.shape
    shifts = torch.tensor([0, 2, 4, 6], device=metadata.device)
    in_group = (metadata.unsqueeze(2).long() >> shifts) & 3
    group = torch.arange(bytes_each * 4, device=metadata.device) // 2 * 4
    return in_group.reshape(O, bytes_each * 4) + group


def sparse24_gather(dense: Tensor, metadata: Tensor) -> Tensor:
    full = F.pad(dense, (0, metadata.shape[1] * 8 - dense.shape[1]))
    return full.gather(1, kept_columns(metadata))


def sparse24_decompress(values: Tensor, metadata: Tensor, in_features: int) -> Tensor:
    full = values.new_zeros(values.shape[0], values.shape[1] * 2)
    return full.scatter(1, kept_columns(metadata), values)[:, :in_features].clone()


def sparse24_linear(
    input: Tensor,
    values: Tensor,
    metadata: Tensor,
    bias: Tensor | None,
    activation: int,
    keep_sum: bool,
    transposable: bool,
) -> tuple[Tensor, Tensor]:
    """The output, and the sum before the activation when ``keep_sum`` (else an empty tensor);
    ``transposable`` is for the gradient to the input, which may then use `sparse24_transpose`."""
    weight = sparse24_decompress(values, metadata, input.shape[1])
    total = F.linear(input, weight, bias)
    output = activate(total, activation)
    if keep_sum:
        return output if output is not total else total.clone(), total
    return output, total.new_empty(0)


def sparse24_linear_ste(
    input: Tensor,
    weight: Tensor,
    values: Tensor,
    metadata: Tensor,
    values_t: Tensor | None,
    metadata_t: Tensor | None,
    bias: Tensor | None,
    activation: int,
    keep_sum: bool,
    decay: float,
) -> tuple[Tensor, Tensor]:
    """`sparse24_linear`; ``weight``, the dense tensor behind ``values``, only receives the gradient, and
    ``values_t``, ``metadata_t``, the pack of W' if given, serve the gradient to the input."""
    return sparse24_linear(input, values, metadata, bias, activation, keep_sum, False)


def sparse24_linear_grad_input(
    grad_sum: Tensor, values: Tensor, metadata: Tensor, in_features: int
) -> Tensor:
    return grad_sum @ sparse24_decompress(values, metadata, in_features)


def sparse24_linear_grad_values(grad_sum: Tensor, input: Tensor, metadata: Tensor) -> Tensor:
    return sparse24_gather(grad_sum.t() @ input, metadata)
