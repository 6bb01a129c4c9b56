"""Data files of each format, small, and where the real ones are."""

import os
from pathlib import Path

import numpy as np
import pytest

DATA = Path(os.environ.get("RECSPARSE_DATA") or Path(__file__).parents[2].parent / "shared" / "data")


def real(name: str) -> Path:
    """A folder of real data; skips the test, with the reason, where it is absent."""
    if not (DATA / name).is_dir():
        pytest.skip(f"{DATA / name} is not on this machine (RECSPARSE_DATA names the folder)")
    return DATA / name


def tsv_lines(rows: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(rows):
        numbers = [str(rng.integers(-2, 500)) if rng.random() < 0.8 else "" for _ in range(13)]
        ids = [f"{rng.integers(0, 5):08x}" if rng.random() < 0.9 else "" for _ in range(26)]
        lines.append("\t".join([str(rng.integers(0, 2)), *numbers, *ids]))
    return lines


def csv_lines(rows: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [",".join(map(str, [rng.integers(0, 2), *rng.integers(0, 9, 39)])) for _ in range(rows)]


def interaction_lines(users: int, items: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [
        " ".join(map(str, [user, *rng.choice(items, rng.integers(2, 8), replace=False)]))
        for user in range(users)
    ]


def xmc_lines(rows: int, features: int, labels: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    lines = [f"{rows} {features} {labels}"]
    for row in range(rows):
        chosen = rng.choice(labels, 0 if row == 1 else 3, replace=False)
        words = rng.choice(features, 4, replace=False)
        pairs = " ".join(f"{word}:{rng.random():.3f}" for word in words)
        lines.append(f"{','.join(map(str, chosen))} {pairs}")
    return lines


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
