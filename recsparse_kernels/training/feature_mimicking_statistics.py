"""Statistics that feature mimicking needs, streamed, in float64; and what follows from them in closed form."""

import dataclasses
import heapq
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..nn import LowRankLinear
from ..nn._factorize import choose_rank
from ._method import all_reduce_sum, check_count

CHUNK_ROWS = 8192  # features taken to float64 at a time


class Moments:
    """Mean and scatter of the features of one layer, merged batch by batch without cancellation.

    ``scatter = sum (y - mean)(y - mean)^T`` over all rows seen (Chan, Golub and LeVeque 1979): the
    difference ``Q / n - mu mu^T`` of large sums is never formed.
    """

    def __init__(self, features: int, device):
        options = {"dtype": torch.float64, "device": device}
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.mean = torch.zeros(features, **options)
        self.scatter = torch.zeros(features, features, **options)

    @torch.no_grad()
    def add(self, features: Tensor) -> None:
        """``[..., features]``, any floating dtype."""
        rows = features.detach().reshape(-1, features.shape[-1])
        for begin in range(0, rows.shape[0], CHUNK_ROWS):
            part = rows[begin : begin + CHUNK_ROWS].double()
            mean = part.mean(0)
            part = part - mean
            self._merge(part.shape[0], mean, part.t() @ part)

    def _merge(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        delta = mean - self.mean
        self.scatter += scatter
        self.scatter.addr_(delta, delta * (self.count.double() * count / total))
        self.mean += delta * (count / total)
        self.count = total

    def over_ranks(self, group=None) -> "Moments":
        """Of the rows of all ranks; without a process group, a copy."""
        merged = Moments(len(self.mean), self.mean.device)
        merged.count = self.count.clone()
        all_reduce_sum([merged.count], group)
        share = self.count.double() / merged.count.clamp_min(1)
        merged.mean = self.mean * share
        all_reduce_sum([merged.mean], group)
        delta = self.mean - merged.mean
        merged.scatter = torch.addr(self.scatter, delta, delta * self.count)
        all_reduce_sum([merged.scatter], group)
        return merged

    @property
    def covariance(self) -> Tensor:
        return self.scatter / self.count.clamp_min(1)


@dataclasses.dataclass
class Spectrum:
    """What a layer loses at each rank: ``energies`` (falling), and the basis that goes with them."""

    energies: Tensor  # [n] float64: the squared error that dropping a direction costs, per feature row
    basis: Tensor | None = None  # [O, O]
    mean: Tensor | None = None  # [O]

    def dropped(self, rank: int) -> float:
        return float(self.energies[rank:].sum())

    @property
    def total(self) -> float:
        return float(self.energies.sum())


def spectrum(moments: Moments) -> Spectrum:
    """Eigenvalues and eigenvectors of the covariance of the features."""
    values, vectors = torch.linalg.eigh(moments.covariance)
    return Spectrum(values.flip(0).clamp_min(0), vectors.flip(1), moments.mean)


def mimic_linear(linear: nn.Linear, found: Spectrum, rank: int, mid_activation: str | None) -> LowRankLinear:
    """The two factors whose output is the projection of ``linear``'s on its principal features.

    ``down = U^T W``, ``up = U``; of the output ``U U^T (W x + b) + (I - U U^T) mu``. With an activation
    between, ``U^T b`` stays with the first factor (as arXiv 2405.18146 has it); without, one bias holds both.
    """
    basis = found.basis[:, :rank]
    weight = linear.weight.detach().double()
    bias = torch.zeros_like(found.mean) if linear.bias is None else linear.bias.detach().double()
    inner = basis.t() @ bias
    outer = found.mean - basis @ (basis.t() @ found.mean)
    dtype = linear.weight.dtype
    if mid_activation is None:
        outer, inner = outer + basis @ inner, None
    return LowRankLinear.from_factors(
        (basis.t() @ weight).to(dtype),
        basis.to(dtype),
        None if inner is None else inner.to(dtype),
        outer.to(dtype),
        mid_activation=mid_activation,
    )


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A layer that could be stored at some rank."""

    name: str
    energies: Tensor  # falling
    dense: int  # weights of the dense layer
    per_rank: int  # weights of each rank

    @property
    def most(self) -> int:
        """The largest rank that is smaller than dense; 0 where there is none."""
        return min(len(self.energies), max(0, (self.dense - 1) // self.per_rank))


def ranks_for_budget(candidates: Sequence[Candidate], budget: int) -> dict[str, int | None]:
    """Ranks whose weights together are at most ``budget``; None where a layer stays dense.

    Each step gives a rank to the layer where it saves the largest share of the layer's energy for its
    weights. Energies fall, so this is the best choice but for what is left over at the end.

    Raises:
        ValueError: not even rank 1 of every layer fits the budget.
    """
    ranks: dict[str, int | None] = {c.name: 1 if c.most else None for c in candidates}
    spent = sum(c.per_rank if c.most else c.dense for c in candidates)
    if spent > budget:
        raise ValueError(f"budget must be at least {spent} weights, rank 1 of each layer; got {budget}")

    def gain(candidate: Candidate, rank: int) -> float:
        total = float(candidate.energies.sum())
        return float(candidate.energies[rank]) / total / candidate.per_rank if total > 0 else 0.0

    queue = [(-gain(c, 1), i) for i, c in enumerate(candidates) if c.most > 1]
    heapq.heapify(queue)
    while queue:
        negative, i = heapq.heappop(queue)
        candidate = candidates[i]
        if negative == 0 or spent + candidate.per_rank > budget:
            continue
        rank = ranks[candidate.name] + 1
        ranks[candidate.name] = rank
        spent += candidate.per_rank
        if rank < candidate.most:
            heapq.heappush(queue, (-gain(candidate, rank), i))
    for candidate in candidates:  # what is left may pay for a layer whose largest rank is not enough
        rank = ranks[candidate.name]
        extra = candidate.dense - (rank or 0) * candidate.per_rank
        if rank == candidate.most and rank < len(candidate.energies) and 0 <= extra <= budget - spent:
            if float(candidate.energies[rank:].sum()) > 0:
                ranks[candidate.name] = None
                spent += extra
    return ranks


def pick_ranks(
    candidates: Sequence[Candidate],
    rank: int | Mapping[str, int | None] | None,
    energy: float | None,
    budget: int | float | None,
    multiple_of: int = 1,
) -> dict[str, int | None]:
    """A rank for each layer, by exactly one of ``rank``, ``energy`` and ``budget``; None: stays dense."""
    if sum(given is not None for given in (rank, energy, budget)) != 1:
        raise ValueError(
            f"give one of rank, energy and budget; got rank={rank}, energy={energy}, budget={budget}"
        )
    check_count("multiple_of", multiple_of)
    if budget is not None:
        if isinstance(budget, float):
            if not 0 < budget <= 1:
                raise ValueError(f"budget must be in (0, 1], a share of the weights; got {budget}")
            budget = int(budget * sum(c.dense for c in candidates))
        picked = ranks_for_budget(candidates, budget)
    elif energy is not None:
        picked = {c.name: choose_rank(c.energies, energy) for c in candidates}
    elif isinstance(rank, Mapping):
        unknown = sorted(set(rank) - {c.name for c in candidates})
        if unknown:
            raise ValueError(f"rank names layers that are not collected: {unknown}")
        picked = {c.name: rank.get(c.name) for c in candidates}
    else:
        picked = {c.name: rank for c in candidates}
    for candidate in candidates:
        chosen = picked[candidate.name]
        if chosen is None:
            continue
        check_count(f"rank of {candidate.name!r}", chosen)
        if rank is not None and chosen > len(candidate.energies):
            raise ValueError(
                f"rank of {candidate.name!r} must be at most {len(candidate.energies)}; got {chosen}"
            )
        if rank is None:
            picked[candidate.name] = min(-(-chosen // multiple_of) * multiple_of, len(candidate.energies))
    return picked
