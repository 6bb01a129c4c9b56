"""Lines and integers out of text files."""

import gzip
from collections.abc import Iterator
from pathlib import Path

from ._types import DataError


def read_lines(path: Path) -> Iterator[str]:
    """Lines of a text file, plain or gzip."""
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8")
    with opened as file:
        try:
            yield from file
        except UnicodeDecodeError as error:
            raise DataError(path, None, "text in UTF-8", f"{error.reason} at byte {error.start}") from error
        except (gzip.BadGzipFile, EOFError) as error:
            raise DataError(path, None, "a gzip file", str(error)) from error


def parse_ints(words: list[str], path: Path, line: int, wanted: str, below: int | None = None) -> list[int]:
    """Integers >= 0 (and below a limit), or the error that shows the word which is none."""
    try:
        values = list(map(int, words))
    except ValueError:
        bad = next(word for word in words if not _is_int(word))
        raise DataError(path, line, wanted, repr(bad)) from None
    if values and (min(values) < 0 or (below is not None and max(values) >= below)):
        limit = f"in [0, {below})" if below is not None else ">= 0"
        bad = next(v for v in values if v < 0 or (below is not None and v >= below))
        raise DataError(path, line, f"{wanted} {limit}", str(bad))
    if values and max(values) >= 2**63:
        raise DataError(path, line, f"{wanted} below 2**63", str(max(values)))
    return values


def _is_int(word: str) -> bool:
    try:
        int(word)
    except ValueError:
        return False
    return True
