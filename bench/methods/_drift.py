"""A click stream with known change points: between them nothing drifts, at each of them much does.

    logit = bias + sum_f w_f[id_f] + sum_{f<g} <v_f[id_f], v_g[id_g]> + slopes . numbers

At a change point the fields of `CHANGING` get new w and v for half of their ids, other ids become the
popular ones, and half of the slopes are drawn anew.
"""

import numpy as np

from recsparse_kernels.demo.data import ClickLog
from recsparse_kernels.demo.data.criteo import split_by_time

FIELD_SIZES = (4, 12, 40, 120, 400, 1_000, 2_500, 6_000, 12_000, 20_000)
CHANGING = (2, 4, 5, 7, 8, 9)
CHANGE_POINTS = (0.4, 0.6, 0.8)  # shares of the rows
FACTORS, NUMERIC = 4, 13


def generate_drift(rows: int, seed: int) -> tuple[ClickLog, tuple[int, ...]]:
    """The log, and the rows at which it changes."""
    rng = np.random.default_rng(seed)
    edges = [0, *(round(share * rows) for share in CHANGE_POINTS), rows]
    weights = [0.6 * rng.standard_normal(size) for size in FIELD_SIZES]
    factors = [0.5 * rng.standard_normal((size, FACTORS)) for size in FIELD_SIZES]
    places = [rng.permutation(size) for size in FIELD_SIZES]
    slopes = 0.25 * rng.standard_normal(NUMERIC)
    ids = np.empty((rows, len(FIELD_SIZES)), np.int64)
    numbers = rng.standard_normal((rows, NUMERIC))
    logit = np.empty(rows)
    for segment, (begin, end) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        if segment:
            for field in CHANGING:
                changed = rng.random(FIELD_SIZES[field]) < 0.5
                weights[field][changed] = 0.6 * rng.standard_normal(changed.sum())
                factors[field][changed] = 0.5 * rng.standard_normal((changed.sum(), FACTORS))
                places[field] = np.roll(places[field], max(1, FIELD_SIZES[field] // 10))
            changed = rng.random(NUMERIC) < 0.5
            slopes[changed] = 0.25 * rng.standard_normal(changed.sum())
        total = np.zeros((end - begin, FACTORS))
        squares, first = np.zeros((end - begin, FACTORS)), np.zeros(end - begin)
        for field, size in enumerate(FIELD_SIZES):
            cumulative = np.cumsum(np.arange(1, size + 1) ** -1.2)
            rank = np.searchsorted(cumulative / cumulative[-1], rng.random(end - begin)).clip(max=size - 1)
            ids[begin:end, field] = places[field][rank]
            first += weights[field][ids[begin:end, field]]
            chosen = factors[field][ids[begin:end, field]]
            total += chosen
            squares += chosen**2
        logit[begin:end] = first + 0.5 * (total**2 - squares).sum(1) + numbers[begin:end] @ slopes
    logit = (logit - logit.mean()) * (1.8 / logit.std()) - 1.2
    probability = 1 / (1 + np.exp(-logit))
    clicked = (rng.random(rows) < probability).astype(np.float32)
    train, valid, test = split_by_time("drift", rows)
    log = ClickLog("generated drift", clicked, numbers.astype(np.float32), ids, FIELD_SIZES, train, valid, test,
                   probability=probability, notes=(f"seed {seed}",))  # fmt: skip
    return log, tuple(edges[1:-1])
