"""Extreme-classification text: ``rows features labels``, then ``label,label feature:value ...`` a row.

Ids are 0-based; a line that starts with a space has no label.
"""

from pathlib import Path

import numpy as np

from ._text import parse_ints, read_lines
from ._types import DataError, LabelData, LabelSplit, Ragged

VALID_SHARE, TEST_SHARE = 0.05, 0.2


def read(path: Path, test_path: Path | None, *, max_rows: int, seed: int) -> LabelData:
    features, labels, num_features, num_labels = _parse(path)
    order = np.random.default_rng(seed).permutation(len(features))
    if test_path is not None:
        test_features, test_labels, *size = _parse(test_path)
        if size != [num_features, num_labels]:
            wanted = f"`rows {num_features} {num_labels}`, as in {path.name}"
            raise DataError(test_path, 1, wanted, f"{size[0]} features and {size[1]} labels")
        test = LabelSplit(test_features, test_labels)
        note = f"validation: {VALID_SHARE:.0%} of the training file, drawn with seed {seed}"
    else:
        cut = max(1, int(len(order) * TEST_SHARE))
        test = LabelSplit(features.take(order[:cut]), labels.take(order[:cut]))
        order = order[cut:]
        shares = f"test: {TEST_SHARE:.0%} of the file, validation: {VALID_SHARE:.0%} of the rest"
        note = f"{shares}, drawn with seed {seed}"
    cut = max(1, int(len(order) * VALID_SHARE))
    if len(order) - cut < 1 or len(test.labels) < 1:
        raise DataError(
            path, None, "at least 4 rows, for a training, a validation and a test part", f"{len(features)}"
        )
    return LabelData(
        name=path.parent.name or path.name,
        num_features=num_features,
        num_labels=num_labels,
        train=LabelSplit(features.take(order[cut:]), labels.take(order[cut:])),
        valid=LabelSplit(features.take(order[:cut]), labels.take(order[:cut])),
        test=test,
        notes=(note,),
    )


def _parse(path: Path) -> tuple[Ragged, Ragged, int, int]:
    lines = read_lines(path)
    header = next(lines, "").split()
    if len(header) != 3:
        raise DataError(path, 1, "the header `rows features labels`", f"{len(header)} words")
    rows, num_features, num_labels = parse_ints(
        header, path, 1, "the header `rows features labels`, integers"
    )
    if num_features == 0 or num_labels == 0:
        raise DataError(path, 1, "a header with at least one feature and one label", " ".join(header))
    features, weights, labels = [], [], []
    for line, text in enumerate(lines, 2):
        text = text.rstrip("\r\n")
        if len(labels) == rows:
            if not text.strip():
                continue
            raise DataError(path, line, f"{rows} rows, as line 1 says", "more")
        head, _, tail = text.partition(" ")
        words = head.split(",") if head else []
        labels.append(np.array(parse_ints(words, path, line, "labels", num_labels), np.int64))
        pairs = [pair.split(":") for pair in tail.split()]
        if any(len(pair) != 2 for pair in pairs):
            bad = next(pair for pair in pairs if len(pair) != 2)
            raise DataError(path, line, "`feature:value` pairs", repr(":".join(bad)))
        features.append(
            np.array(parse_ints([p[0] for p in pairs], path, line, "features", num_features), np.int64)
        )
        weights.append(_values([p[1] for p in pairs], path, line))
    if len(labels) != rows:
        raise DataError(path, len(labels) + 2, f"{rows} rows, as line 1 says", f"the end after {len(labels)}")
    return Ragged.from_lists(features, weights), Ragged.from_lists(labels), num_features, num_labels


def _values(words: list[str], path: Path, line: int) -> np.ndarray:
    try:
        values = np.array(list(map(float, words)), np.float32)
    except ValueError:
        values = np.array([np.nan])
    if not np.isfinite(values).all():
        bad = next(word for word in words if not _is_finite(word))
        raise DataError(path, line, "a finite number as the value of a feature", repr(bad))
    return values


def _is_finite(word: str) -> bool:
    try:
        return bool(np.isfinite(np.float32(word)))
    except ValueError:
        return False
