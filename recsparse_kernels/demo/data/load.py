"""Open a data file or folder: what it is, is read off its content, not its name."""

from pathlib import Path

from . import criteo, interactions, xmc
from ._text import read_lines
from ._types import ClickLog, DataError, LabelData

FORMATS = {"criteo_tsv": criteo.read_tsv, "criteo_ids": criteo.read_ids,
           "interactions": interactions.read, "xmc": xmc.read}  # fmt: skip
WANTED = (
    "one of: Criteo TSV (label, 13 integers, 26 hex ids, tab-separated), id CSV (label and 39 ids, "
    "comma-separated), interactions (`user item item ...`), XMC text (`rows features labels`, then "
    "`label,label feature:value ...`)"
)


def load(path: Path, max_rows: int, seed: int) -> ClickLog | LabelData:
    """Read ``path``, a data file, or a folder with one or with a train and a test file.

    Args:
        max_rows: of a longer click log, the first rows are read.
        seed: of the split, where the data brings none.

    Raises:
        DataError: the first line that is not what its format wants.
        FileNotFoundError: there is no such path.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"--data {path}: no such file or folder")
    train, test = find_files(path) if path.is_dir() else (path, None)
    kind = detect(train)
    if test is not None and detect(test) != kind:
        raise DataError(test, None, f"the format of {train.name} ({kind})", detect(test))
    return FORMATS[kind](train, test, max_rows=max_rows, seed=seed)


def find_files(folder: Path) -> tuple[Path, Path | None]:
    """The train and test file of a folder, or its only data file."""
    files = [f for f in sorted(folder.iterdir()) if f.is_file() and not f.name.startswith(".")]
    files = [f for f in files if f.suffix.lower() != ".md" and f.stem.lower() != "readme"]
    train = [f for f in files if "train" in f.name.lower()]
    test = [f for f in files if "test" in f.name.lower()]
    if len(train) == 1 and len(test) == 1:
        return train[0], test[0]
    if len(files) == 1:
        return files[0], None
    names = ", ".join(f.name for f in files) or "no file"
    raise DataError(
        folder, None, "one data file, or one file with `train` and one with `test` in its name", names
    )


def detect(path: Path) -> str:
    """The format of a file, from its first lines."""
    head = [line.rstrip("\n") for _, line in zip(range(20), read_lines(path), strict=False)]
    if not any(line.strip() for line in head):
        raise DataError(path, None, WANTED, "an empty file")
    if "\t" in head[0]:
        return "criteo_tsv"
    if any(":" in line for line in head):
        return "xmc"
    if "," in head[0]:
        return "criteo_ids"
    if all(word.lstrip("-").isdigit() for word in head[0].split()):
        return "interactions"
    raise DataError(path, 1, WANTED, repr(head[0][:80]))
