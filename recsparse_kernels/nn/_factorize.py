"""Truncated factorisations: the factors that low-rank layers start from, and the choice of a rank."""

import torch
from torch import Tensor

CHUNK_ROWS = 65_536  # rows of a table taken to float64 at a time


def choose_rank(energies: Tensor, energy: float, multiple_of: int = 1) -> int:
    """Smallest rank that keeps the share ``energy`` of the sum of ``energies`` (falling), rounded up.

    ``energies`` are squared singular values, or eigenvalues of a covariance.

    Raises:
        ValueError: ``energy`` is not in (0, 1], or ``multiple_of`` is not positive.
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy must be in (0, 1], the share of the squared norm to keep; got {energy}")
    if multiple_of < 1:
        raise ValueError(f"multiple_of must be at least 1; got {multiple_of}")
    kept = torch.cumsum(energies.clamp_min(0), 0)
    wanted = energy * kept[-1] * (1 - 1e-12)  # the sum itself rounds
    rank = int(torch.searchsorted(kept, wanted)) + 1
    return min(-(-rank // multiple_of) * multiple_of, energies.numel())


def pick_rank(energies: Tensor, rank: int | None, energy: float | None, multiple_of: int = 1) -> int:
    """``rank`` if given, else by ``energy``.

    Raises:
        ValueError: both or none given, or the rank is not in [1, number of energies].
    """
    if (rank is None) == (energy is None):
        raise ValueError(f"give either rank or energy; got rank={rank}, energy={energy}")
    if rank is None:
        return choose_rank(energies, energy, multiple_of)
    if not 1 <= rank <= energies.numel():
        raise ValueError(f"rank must be in [1, {energies.numel()}], the smaller side; got {rank}")
    return rank


def _falling_eigen(gram: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def factorize(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Squared singular values (falling), ``down`` and ``up`` of full rank in float64: ``weight = up @ down``.

    By the eigenvectors of the smaller Gram matrix, projected: exact at full rank whatever the
    conditioning. Balanced: row r of ``down`` and column r of ``up`` have the same norm, the root of the
    singular value, so that both factors take gradient steps of one size.
    """
    weight = weight.detach().double()
    if weight.shape[0] <= weight.shape[1]:
        values, up = _falling_eigen(weight @ weight.t())
        down = up.t() @ weight
        sizes = down.norm(dim=1)
    else:
        values, vectors = _falling_eigen(weight.t() @ weight)
        down = vectors.t()
        up = weight @ vectors
        sizes = up.norm(dim=0)
    balance = torch.where(sizes > 0, sizes, 1).sqrt()
    if weight.shape[0] <= weight.shape[1]:
        return values, down / balance[:, None], up * balance
    return values, down * balance[:, None], up / balance


def table_basis(
    table: Tensor, *, center: bool, counts: Tensor | None = None, skip_row: int | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Eigenvalues (falling), eigenvectors ``[D, D]`` of the rows' second moment, and their mean; in float64.

    Args:
        center: about the mean row (a principal component analysis); else about zero, and no mean.
        counts: ``[V]``, how often each row is looked up: the error then counts lookups, not rows.
        skip_row: a row left out (padding).
    """
    table = table.detach()
    rows, dim = table.shape
    weights = (
        torch.ones(rows, dtype=torch.float64, device=table.device) if counts is None else counts.double()
    )
    if skip_row is not None:
        weights = weights.clone()
        weights[skip_row] = 0
    total = weights.sum().clamp_min(1e-300)
    mean = torch.zeros(dim, dtype=torch.float64, device=table.device)
    for start in range(0, rows if center else 0, CHUNK_ROWS):
        mean += weights[start : start + CHUNK_ROWS] @ table[start : start + CHUNK_ROWS].double()
    mean /= total
    gram = torch.zeros(dim, dim, dtype=torch.float64, device=table.device)
    for start in range(0, rows, CHUNK_ROWS):
        chunk = table[start : start + CHUNK_ROWS].double() - mean
        gram += (weights[start : start + CHUNK_ROWS, None] * chunk).t() @ chunk
    values, vectors = _falling_eigen(gram / total)
    return values, vectors, mean if center else None


def project_table(table: Tensor, basis: Tensor, mean: Tensor | None, plain_row: int | None = None) -> Tensor:
    """``(table - mean) @ basis`` in the table's dtype, a chunk of rows at a time; ``plain_row`` uncentred."""
    table = table.detach()
    out = table.new_empty(table.shape[0], basis.shape[1])
    for start in range(0, table.shape[0], CHUNK_ROWS):
        chunk = table[start : start + CHUNK_ROWS].double()
        out[start : start + CHUNK_ROWS] = (chunk if mean is None else chunk - mean) @ basis
    if plain_row is not None and mean is not None:
        out[plain_row] = table[plain_row].double() @ basis
    return out


def fit_rank(factor: Tensor, rank: int, dim: int) -> Tensor:
    """The first ``rank`` slices along ``dim``; where there are fewer, all and then zeros."""
    if rank <= factor.shape[dim]:
        return factor.narrow(dim, 0, rank)
    extra = list(factor.shape)
    extra[dim] = rank - factor.shape[dim]
    return torch.cat([factor, factor.new_zeros(extra)], dim)
