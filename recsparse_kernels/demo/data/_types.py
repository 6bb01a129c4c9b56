"""What the readers and generators hand to the training."""

import dataclasses
from pathlib import Path

import numpy as np


class DataError(ValueError):
    """A data file that does not hold what its format wants: file, line, wanted, found."""

    def __init__(self, path: Path, line: int | None, wanted: str, found: str):
        self.path, self.line, self.wanted, self.found = path, line, wanted, found
        where = f"{path}:{line}" if line is not None else str(path)
        super().__init__(f"{where}: wanted {wanted}; found {found}")


@dataclasses.dataclass(frozen=True)
class Ragged:
    """Lists of different lengths: list ``b`` is ``values[offsets[b]:offsets[b + 1]]``."""

    offsets: np.ndarray  # [B + 1] int64
    values: np.ndarray  # [nnz] int64
    weights: np.ndarray | None = None  # [nnz] float32

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def take(self, rows: np.ndarray) -> "Ragged":
        """The lists of these rows, in this order."""
        lengths = self.lengths[rows]
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        position = np.arange(offsets[-1]) + np.repeat(self.offsets[rows] - offsets[:-1], lengths)
        weights = None if self.weights is None else self.weights[position]
        return Ragged(offsets, self.values[position], weights)

    def row_of_value(self) -> np.ndarray:
        """[nnz]: the list that each value belongs to."""
        return np.repeat(np.arange(len(self)), self.lengths)

    @staticmethod
    def from_lists(lists: list[np.ndarray], weights: list[np.ndarray] | None = None) -> "Ragged":
        offsets = np.concatenate(([0], np.cumsum([len(values) for values in lists]))).astype(np.int64)
        values = np.concatenate(lists).astype(np.int64) if lists else np.empty(0, np.int64)
        if weights is None:
            return Ragged(offsets, values)
        joined = np.concatenate(weights).astype(np.float32) if weights else np.empty(0, np.float32)
        return Ragged(offsets, values, joined)


@dataclasses.dataclass(frozen=True)
class ClickLog:
    """Rows in time order: clicked or not, numeric features, one id a field."""

    name: str
    clicked: np.ndarray  # [N] float32, 0 or 1
    numeric: np.ndarray  # [N, numeric features] float32, ready for the model
    ids: np.ndarray  # [N, fields] int64, below field_sizes
    field_sizes: tuple[int, ...]
    train: slice
    valid: slice
    test: slice
    probability: np.ndarray | None = None  # [N], what a generated label was drawn from
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        return len(self.clicked)


@dataclasses.dataclass(frozen=True)
class LabelSplit:
    features: Ragged
    labels: Ragged


@dataclasses.dataclass(frozen=True)
class LabelData:
    """Rows of sparse features, each with any number of labels out of many."""

    name: str
    num_features: int
    num_labels: int
    train: LabelSplit
    valid: LabelSplit
    test: LabelSplit
    # labels are items, features the items of the user's history, which are not asked for again
    items: bool = False
    notes: tuple[str, ...] = ()
