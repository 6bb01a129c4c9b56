"""JSON files of what was measured: shipped beside the package, and the user's own in the cache folder."""

import contextlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def cache_folder() -> Path:
    """The user's: in XDG_CACHE_HOME, or the platform's cache folder."""
    if os.environ.get("XDG_CACHE_HOME"):
        root = Path(os.environ["XDG_CACHE_HOME"])
    elif sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    else:
        root = Path.home() / ".cache"
    return root / "recsparse_kernels"


def read_json(path: Path, version: int, parse: Callable[[Any], T], empty: T, advice: str) -> T:
    """What ``parse`` makes of the file; ``empty`` where there is none, or one of another version.

    A file that cannot be read or parsed is left aside with a warning that ends in ``advice``.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return empty
    except (OSError, UnicodeDecodeError) as error:
        warnings.warn(f"{path} cannot be read and is left aside: {error}", stacklevel=4)
        return empty
    try:
        content = json.loads(text)
        return parse(content) if content["version"] == version else empty
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(
            f"{path} is not a table of measurements and is left aside; {advice}: {type(error).__name__}: {error}",
            stacklevel=4,
        )
        return empty


def write_json(path: Path, content: Any) -> Path:
    """Replaces the file in one step: whoever reads it finds the old content or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    return path
