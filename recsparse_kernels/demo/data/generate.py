"""Generated data with planted structure, for machines without any data.

Click log    logit = bias + season(t) + sum_f w_f[id_f] + sum_{f<g} <v_f[id_f], v_g[id_g]> + h(numbers, group)
             ids Zipf in every field; w and v of some fields turn with time, and so do the popular ids
Label data   each row is about a few labels of one topic; its words are drawn from the labels' words and noise
"""

import numpy as np

from ._types import ClickLog, LabelData, LabelSplit, Ragged
from .criteo import NUMERIC, split_by_time

# 26 fields, 0.45 M ids: as skewed in size as Criteo's, small enough for a laptop
FIELD_SIZES = (3, 4, 10, 15, 18, 27, 93, 105, 305, 553, 634, 1_400, 2_200, 3_100, 4_600, 5_600,
               8_300, 11_000, 14_000, 18_000, 24_000, 31_000, 45_000, 62_000, 90_000, 130_000)  # fmt: skip
DRIFTING_FIELDS = (6, 11, 14, 19, 22, 25)
FACTORS = 4  # of the pairwise term
CLICK_RATE = 0.25


def generate_click_log(rows: int, seed: int, field_sizes: tuple[int, ...] = FIELD_SIZES) -> ClickLog:
    """Clicks in time order, with the probability that each was drawn from."""
    rng = np.random.default_rng(seed)
    time = np.arange(rows) / rows
    activity = rng.standard_normal(rows).astype(np.float32)  # hidden: how busy the user is
    ids = np.empty((rows, len(field_sizes)), np.int64)
    first_order = np.zeros(rows)
    total, squares = np.zeros((rows, FACTORS)), np.zeros((rows, FACTORS))
    for field, size in enumerate(field_sizes):
        drift = np.sin(1.5 * np.pi * time) if field in DRIFTING_FIELDS else None
        ids[:, field] = _zipf(rng, rows, size, exponent=rng.uniform(1.1, 1.6), activity=activity, drift=drift)
        strength = rng.uniform(0.1, 0.3)
        first_order += strength * _of_id(rng, size, 1, ids[:, field], drift)[:, 0]
        factors = 0.6 * rng.uniform(0.3, 1.0) * _of_id(rng, size, FACTORS, ids[:, field], drift)
        total += factors
        squares += factors**2
    pairwise = 0.5 * (total**2 - squares).sum(axis=1) / np.sqrt(FACTORS)

    numbers = _numbers(rng, activity, ids[:, 3])
    known = np.nan_to_num(numbers)
    group = rng.standard_normal((field_sizes[2], NUMERIC))[
        ids[:, 2]
    ]  # the numbers count differently by group
    slopes = rng.standard_normal(NUMERIC) * 0.15 + 0.15 * group
    curved = np.tanh(known[:, 0] - 1.0) * np.sin(1.3 * known[:, 4]) + 0.6 * (known[:, 1] > known[:, 7])
    season = 0.25 * np.sin(6 * np.pi * time) + 0.3 * time
    logit = first_order + pairwise + (slopes * known).sum(axis=1) + curved + season
    logit = (logit - logit.mean()) * (2.2 / logit.std())
    probability = 1.0 / (1.0 + np.exp(-(logit + _shift_for_rate(logit, CLICK_RATE))))
    clicked = (rng.random(rows) < probability).astype(np.float32)

    train, valid, test = split_by_time("generated", rows)
    center, spread = np.nanmean(numbers[train], axis=0), np.nanstd(numbers[train], axis=0)
    numeric = np.nan_to_num((numbers - center) / spread).astype(np.float32)
    return ClickLog("generated click log", clicked, numeric, ids, tuple(field_sizes), train, valid, test,
                    probability=probability, notes=(f"seed {seed}",))  # fmt: skip


def _zipf(rng, rows: int, size: int, exponent: float, activity, drift) -> np.ndarray:
    """Ids with Zipf frequencies; busy users prefer popular ids, and with drift the popular ids change."""
    cumulative = np.cumsum(np.arange(1, size + 1) ** -exponent)
    uniform = rng.random(rows) ** np.exp(0.25 * activity)
    rank = np.searchsorted(cumulative / cumulative[-1], uniform, side="right").clip(max=size - 1)
    if drift is not None:
        # the most popular place moves through 40 ids, back and forth, in the course of the log
        rank = (rank + np.floor(20 * (1 + drift)).astype(np.int64)) % size
    return rng.permutation(size)[rank]


def _of_id(rng, size: int, width: int, ids: np.ndarray, drift) -> np.ndarray:
    """A normal draw for each id, [rows, width]; with drift it turns into another draw."""
    draw = rng.standard_normal((size, width))[ids]
    if drift is None:
        return draw
    other = rng.standard_normal((size, width))[ids]
    angle = 0.25 * np.pi * drift[:, None]
    return np.cos(angle) * draw + np.sin(angle) * other


def _numbers(rng, activity: np.ndarray, group: np.ndarray) -> np.ndarray:
    """[rows, 13]: logarithms of counts, blank (NaN) at a rate of each column's own."""
    rows = len(activity)
    loading = rng.uniform(0.0, 0.8, NUMERIC)
    level = rng.uniform(0.5, 3.0, NUMERIC)
    log_mean = level + loading * activity[:, None] + 0.3 * rng.standard_normal((16, NUMERIC))[group % 16]
    counts = rng.poisson(np.exp(np.minimum(log_mean + 0.5 * rng.standard_normal((rows, NUMERIC)), 8.0)))
    blank = rng.random((rows, NUMERIC)) < rng.uniform(0.0, 0.4, NUMERIC)
    return np.where(blank, np.nan, np.log1p(counts))


def _shift_for_rate(logit: np.ndarray, rate: float) -> float:
    """What to add to the logits for this mean probability (bisection)."""
    low, high = -20.0, 20.0
    for _ in range(50):
        middle = (low + high) / 2
        if (1.0 / (1.0 + np.exp(-(logit + middle)))).mean() < rate:
            low = middle
        else:
            high = middle
    return middle


def generate_label_data(
    rows: int,
    seed: int,
    num_labels: int = 20_000,
    num_features: int = 12_000,
    num_topics: int = 200,
    words_per_label: int = 12,
    words_per_row: int = 30,
) -> LabelData:
    """Documents with about 4 labels each, both labels and words Zipf."""
    rng = np.random.default_rng(seed)
    # topics own labels in turn, so that every topic has frequent and rare ones
    topic_words = rng.integers(0, num_features, (num_topics, 60))
    topic_of_label = np.arange(num_labels) % num_topics
    own = _zipf_words(rng, (num_labels, words_per_label), num_features)
    shared = np.take_along_axis(
        topic_words[topic_of_label],
        rng.integers(0, topic_words.shape[1], (num_labels, words_per_label)),
        axis=1,
    )
    label_words = np.where(rng.random((num_labels, words_per_label)) < 0.4, shared, own)

    labels_per_topic = num_labels // num_topics
    popularity = np.arange(1, labels_per_topic + 1) ** -1.2
    cumulative = np.cumsum(popularity) / popularity.sum()
    topic_weight = np.arange(1, num_topics + 1) ** -0.6
    topic = rng.choice(num_topics, rows, p=topic_weight / topic_weight.sum())

    count = 1 + rng.poisson(3.0, rows)  # labels of a row, before duplicates go
    row = np.repeat(np.arange(rows), count)
    rank = np.searchsorted(cumulative, rng.random(len(row))).clip(max=labels_per_topic - 1)
    label = topic[row] + num_topics * rank
    labels = _unique_per_row(row, label, rows)

    # words: each is from one of the row's labels, or noise
    word_row = np.repeat(np.arange(rows), words_per_row)
    pick = labels.offsets[word_row] + (rng.random(len(word_row)) * labels.lengths[word_row]).astype(np.int64)
    word = label_words[labels.values[pick], rng.integers(0, words_per_label, len(pick))]
    noise = _zipf_words(rng, word.shape, num_features)
    features = _unique_per_row(word_row, np.where(rng.random(len(word)) < 0.25, noise, word), rows)
    features = tf_idf(features, num_features)

    test_start, valid_start = rows - rows // 10, rows - rows // 10 - rows // 20
    edges = ((0, valid_start), (valid_start, test_start), (test_start, rows))
    ranges = [np.arange(start, stop) for start, stop in edges]
    splits = [LabelSplit(features.take(chosen), labels.take(chosen)) for chosen in ranges]
    return LabelData("generated documents", num_features, num_labels, *splits, notes=(f"seed {seed}",))


def tf_idf(features: Ragged, num_features: int) -> Ragged:
    """Inverse document frequency weights, each row scaled to length one."""
    frequency = np.bincount(features.values, minlength=num_features)
    weights = np.log(len(features) / np.maximum(frequency, 1))[features.values]
    norms = np.sqrt(np.bincount(features.row_of_value(), weights**2, minlength=len(features)))
    weights = weights / np.maximum(norms, 1e-12)[features.row_of_value()]
    return Ragged(features.offsets, features.values, weights.astype(np.float32))


def _zipf_words(rng, shape: tuple[int, ...], num_features: int) -> np.ndarray:
    cumulative = np.cumsum(np.arange(1, num_features + 1) ** -0.8)
    uniform = rng.random(shape)
    return np.searchsorted(cumulative / cumulative[-1], uniform).clip(max=num_features - 1)


def _unique_per_row(row: np.ndarray, value: np.ndarray, rows: int) -> Ragged:
    """Sorted, each value once a row."""
    width = int(value.max()) + 1
    row, value = np.divmod(np.unique(row * width + value), width)
    return Ragged(np.concatenate(([0], np.cumsum(np.bincount(row, minlength=rows)))), value)
