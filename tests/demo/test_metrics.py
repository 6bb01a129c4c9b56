import numpy as np
import pytest

from recsparse_kernels.demo.data import Ragged
from recsparse_kernels.demo.metrics import click_metrics, label_metrics

pytest.importorskip("sklearn")


def draw(rng, rows, noise):
    clicked = (rng.random(rows) < 0.3).astype(np.float32)
    return clicked, clicked + noise * rng.standard_normal(rows)


def test_standard_errors_are_those_of_repeated_draws():
    """The reported errors against the spread over fresh data; 400 draws know it to about 4 %."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(400):
        clicked, score = draw(rng, 500, 1.5)
        found.append(click_metrics(clicked, score, score + 0.5 * rng.standard_normal(500)))
    for name in ("auc", "auc_gain", "logloss"):
        spread = np.std([getattr(m, name) for m in found])
        assert np.mean([getattr(m, f"{name}_error") for m in found]) == pytest.approx(spread, rel=0.15), name


def test_click_metrics_of_ties_and_extremes():
    clicked = np.array([0, 0, 1, 1], np.float32)
    same = click_metrics(clicked, np.zeros(4, np.float32), np.zeros(4, np.float32))
    assert same.auc == 0.5 and same.auc_gain == 0 and same.auc_gain_error == 0
    assert same.logloss == pytest.approx(np.log(2))
    sure = click_metrics(clicked, np.array([-200, -200, 200, 200], np.float32), np.zeros(4, np.float32))
    assert sure.auc == 1 and sure.auc_gain == 0.5 and np.isfinite(sure.logloss_error)


def test_label_metrics_against_loops():
    rng = np.random.default_rng(1)
    best = np.stack([rng.permutation(60)[:20] for _ in range(40)])
    lists = [np.sort(rng.choice(60, rng.integers(1, 30), replace=False)) for _ in range(40)]
    lists[3] = np.empty(0, np.int64)
    found = label_metrics(best, Ragged.from_lists(lists), items=True)
    for k in (1, 3, 5):
        wanted = np.mean([len(set(row[:k]) & set(own)) / k for row, own in zip(best, lists, strict=True)])
        assert found.precision[k] == pytest.approx(wanted)
    recall, ndcg = [], []
    for row, own in zip(best, lists, strict=True):
        gains = [1 / np.log2(rank + 2) for rank, item in enumerate(row) if item in own]
        perfect = sum(1 / np.log2(rank + 2) for rank in range(min(len(own), 20)))
        recall.append(len(gains) / max(len(own), 1))
        ndcg.append(sum(gains) / perfect if perfect else 0.0)
    assert found.recall == pytest.approx(np.mean(recall)) and found.ndcg == pytest.approx(np.mean(ndcg))
