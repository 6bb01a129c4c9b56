"""Accuracy, with its standard error where few rows make that matter."""

import dataclasses

import numpy as np

from .data import Ragged


@dataclasses.dataclass(frozen=True)
class ClickMetrics:
    auc: float
    auc_error: float  # standard error over test rows
    logloss: float
    logloss_error: float
    auc_gain: float  # over dense
    auc_gain_error: float


def click_metrics(clicked: np.ndarray, score: np.ndarray, dense_score: np.ndarray) -> ClickMetrics:
    """Of logits on test rows; AUC and logloss by scikit-learn, standard errors after DeLong.

    DeLong, DeLong and Clarke-Pearson 1988: AUC is a mean of placements over the positives and over the
    negatives; their variances give its own, and paired differences that of two models on the same rows.
    """
    from sklearn.metrics import log_loss, roc_auc_score

    score = score.astype(np.float64)
    probability = 1.0 / (1.0 + np.exp(-score))
    own, dense = _placements(clicked, score), _placements(clicked, dense_score)
    losses = np.logaddexp(0.0, np.where(clicked > 0, -score, score))
    return ClickMetrics(
        auc=float(roc_auc_score(clicked, score)),
        auc_error=_error(*own),
        logloss=float(log_loss(clicked, probability, labels=[0, 1])),
        logloss_error=float(losses.std(ddof=1) / np.sqrt(len(losses))),
        auc_gain=float(own[0].mean() - dense[0].mean()),
        auc_gain_error=_error(own[0] - dense[0], own[1] - dense[1]),
    )


def _placements(clicked: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each positive the share of negatives below it, for each negative of positives above it."""
    positive, negative = np.sort(score[clicked > 0]), np.sort(score[clicked <= 0])
    below = np.searchsorted(negative, score[clicked > 0], "left") + np.searchsorted(
        negative, score[clicked > 0], "right"
    )
    above = np.searchsorted(positive, score[clicked <= 0], "left") + np.searchsorted(
        positive, score[clicked <= 0], "right"
    )
    return below / (2 * len(negative)), 1 - above / (2 * len(positive))


def _error(of_positives: np.ndarray, of_negatives: np.ndarray) -> float:
    variance = sum(v.var(ddof=1) / len(v) for v in (of_positives, of_negatives) if len(v) > 1)
    return float(np.sqrt(variance))


@dataclasses.dataclass(frozen=True)
class LabelMetrics:
    precision: dict[int, float]  # P@1, 3, 5
    precision_error: float  # standard error of P@1 over test rows
    recall: float | None = None  # Recall@20 and NDCG@20, for recommendation
    ndcg: float | None = None


def label_metrics(best: np.ndarray, labels: Ragged, items: bool) -> LabelMetrics:
    """Of the best labels of each row [rows, k], best first.

    P@k is a mean over all rows. Recall@20 and NDCG@20 as LightGCN has them: hits over the row's labels;
    gains 1 / log2(rank + 1) over those of a perfect ranking; a mean over rows.
    """
    width = int(max(best.max(initial=0), labels.values.max(initial=0))) + 1
    wanted = labels.row_of_value() * width + labels.values
    hits = np.isin(np.arange(len(best))[:, None] * width + best, wanted)
    precision = {k: float(hits[:, :k].mean()) for k in (1, 3, 5)}
    error = float(hits[:, 0].std() / np.sqrt(len(hits)))
    if not items:
        return LabelMetrics(precision, error)
    gain = 1.0 / np.log2(np.arange(2, 22))
    perfect = np.concatenate(([0.0], np.cumsum(gain)))[np.minimum(labels.lengths, 20)]
    recall = (hits[:, :20].sum(axis=1) / np.maximum(labels.lengths, 1)).mean()
    ndcg = ((hits[:, :20] * gain).sum(axis=1) / np.maximum(perfect, 1e-12)).mean()
    return LabelMetrics(precision, error, float(recall), float(ndcg))
