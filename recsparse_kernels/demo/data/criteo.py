"""Criteo click logs: the raw TSV, and the CSV of per-field ids (as DeepLight ships it).

TSV   label, 13 integers (may be blank), 26 hex ids (may be blank); tab-separated, in time order
CSV   label, 39 ids: 13 bucketed numeric fields, 26 categorical ones; comma-separated
"""

import itertools
from pathlib import Path

import numpy as np

from ._text import read_lines
from ._types import ClickLog, DataError

NUMERIC, CATEGORICAL = 13, 26
COLUMNS = 1 + NUMERIC + CATEGORICAL
VALID_SHARE = TEST_SHARE = 0.1
# A Python list of split lines takes about 4 KB a row; chunks bound it
CHUNK_ROWS = 50_000
RARE, BLANK = 0, 1  # rows of every field's table; other ids follow, the most frequent first


def read_tsv(path: Path, test_path: Path | None, *, max_rows: int, seed: int) -> ClickLog:
    """Numeric features: log(1 + max(x, 0)), standardised over the training rows, blank as the mean.

    Categorical: ids in at least ``min_count`` training rows get a row each, the rest of a field shares one.
    """
    clicked, numbers, ids = _parse_tsv(path, max_rows)
    train_rows = None
    if test_path is not None:
        train_rows = len(clicked)
        clicked, numbers, ids = (
            np.concatenate(both)
            for both in zip((clicked, numbers, ids), _parse_tsv(test_path, max_rows), strict=True)
        )
    train, valid, test = split_by_time(path, len(clicked), train_rows)
    numeric = np.log1p(np.maximum(numbers, 0))
    center, spread = np.nanmean(numeric[train], axis=0), np.nanstd(numeric[train], axis=0)
    center, spread = np.nan_to_num(center), np.where(spread > 0, spread, 1.0)
    numeric = np.nan_to_num((numeric - center) / spread).astype(np.float32)
    # on few rows an id must come back soon to teach anything; on many, the usual 10
    min_count = 2 if train.stop < 100_000 else 10
    mapped = [_map_ids(ids[:, field], train, min_count) for field in range(CATEGORICAL)]
    note = f"ids in fewer than {min_count} training rows share one row of their field"
    return ClickLog(path.name, clicked, numeric, np.stack([m[0] for m in mapped], 1),
                    tuple(m[1] for m in mapped), train, valid, test, notes=(note,))  # fmt: skip


def read_ids(path: Path, test_path: Path | None, *, max_rows: int, seed: int) -> ClickLog:
    """All 39 fields are table lookups: the ids of the bucketed numeric fields are in no order."""
    values = _parse_ids(path, max_rows)
    train_rows = None
    if test_path is not None:
        train_rows = len(values)
        values = np.concatenate((values, _parse_ids(test_path, max_rows)))
    train, valid, test = split_by_time(path, len(values), train_rows)
    ids = np.ascontiguousarray(values[:, 1:])
    note = "a field's table has a row for each id up to the largest in the files"
    sizes = tuple(int(size) for size in ids.max(axis=0) + 1)
    clicked, numeric = values[:, 0].astype(np.float32), np.empty((len(values), 0), np.float32)
    return ClickLog(path.name, clicked, numeric, ids, sizes, train, valid, test, notes=(note,))


def split_by_time(path: Path, rows: int, train_rows: int | None = None) -> tuple[slice, slice, slice]:
    """First rows to train, next to validate, last to test; a test file of its own is the test part."""
    if train_rows is None:
        test_start = rows - int(rows * TEST_SHARE)
        valid_start = test_start - int(rows * VALID_SHARE)
    else:
        test_start, valid_start = train_rows, train_rows - int(train_rows * VALID_SHARE)
    if not 0 < valid_start < test_start < rows:
        raise DataError(
            path, None, "at least 10 rows, for a training, a validation and a test part", f"{rows} rows"
        )
    return slice(0, valid_start), slice(valid_start, test_start), slice(test_start, rows)


def _chunks(path: Path, separator: str, what: str, max_rows: int):
    """First line number and split lines, CHUNK_ROWS at a time, each with the right number of columns."""
    lines = itertools.islice(read_lines(path), max_rows)
    first = 1
    while chunk := [line.rstrip("\r\n").split(separator) for line in itertools.islice(lines, CHUNK_ROWS)]:
        for line, words in enumerate(chunk, first):
            if len(words) != COLUMNS:
                found = "an empty line" if words == [""] else f"{len(words)} columns"
                raise DataError(path, line, f"{COLUMNS} {what}", found)
        yield first, chunk
        first += len(chunk)


def _parse_tsv(path: Path, max_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """clicked [N], numbers [N, 13] with NaN for blank, ids [N, 26] with -1 for blank."""
    parts = []
    for first, chunk in _chunks(
        path, "\t", "tab-separated columns (label, 13 integers, 26 hex ids)", max_rows
    ):
        columns = list(zip(*chunk, strict=True))
        clicked = _column(columns[0], _label, path, first, 1, "label 0 or 1")
        numbers = [_column(columns[i], _integer_or_nan, path, first, i + 1, "an integer or blank")
                   for i in range(1, 1 + NUMERIC)]  # fmt: skip
        ids = [_column(columns[i], _hex_or_blank, path, first, i + 1, "a hex id or blank")
               for i in range(1 + NUMERIC, COLUMNS)]  # fmt: skip
        parts.append((np.array(clicked, np.float32), np.array(numbers).T, np.array(ids, np.int64).T))
    return tuple(np.concatenate(part) for part in zip(*parts, strict=True))


def _parse_ids(path: Path, max_rows: int) -> np.ndarray:
    """[N, 40] int64."""
    parts = []
    for first, chunk in _chunks(path, ",", "comma-separated columns (label, 39 ids)", max_rows):
        columns = list(zip(*chunk, strict=True))
        label = _column(columns[0], _label, path, first, 1, "label 0 or 1")
        ids = [
            _column(columns[i], _id, path, first, i + 1, "an integer id in [0, 2**31)")
            for i in range(1, COLUMNS)
        ]
        parts.append(np.array([label, *ids], np.int64).T)
    return np.concatenate(parts)


def _column(words: tuple[str, ...], parse, path: Path, first_line: int, number: int, wanted: str) -> list:
    try:
        return list(map(parse, words))
    except ValueError:
        for line, word in enumerate(words, first_line):
            try:
                parse(word)
            except ValueError:
                raise DataError(path, line, f"{wanted} in column {number}", repr(word)) from None
        raise


def _label(word: str) -> int:
    if word not in ("0", "1"):
        raise ValueError
    return word == "1"


def _integer_or_nan(word: str) -> float:
    return int(word) if word else float("nan")


def _hex_or_blank(word: str) -> int:
    if not word:
        return -1
    if len(word) > 15 or not word.isalnum():  # 60 bits fit int64; int() would take a sign and any length
        raise ValueError
    return int(word, 16)


def _id(word: str) -> int:
    value = int(word)
    if not 0 <= value < 2**31:
        raise ValueError
    return value


def _map_ids(ids: np.ndarray, train: slice, min_count: int) -> tuple[np.ndarray, int]:
    """Ids to table rows, and the number of rows."""
    known, counts = np.unique(ids[train], return_counts=True)
    counts = counts[known != -1]
    known = known[known != -1]
    order = np.argsort(-counts, kind="stable")
    kept = known[order[counts[order] >= min_count]]
    by_id = np.argsort(kept)
    position = np.searchsorted(kept[by_id], ids)
    position = np.minimum(position, max(len(kept) - 1, 0))
    found = kept[by_id][position] == ids if len(kept) else np.zeros(len(ids), bool)
    rows = np.where(found, by_id[position] + 2 if len(kept) else 0, RARE)
    return np.where(ids == -1, BLANK, rows), len(kept) + 2
