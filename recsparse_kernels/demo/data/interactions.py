"""User-item interactions, one user a line: ``user item item ...`` (0-based ids), as LightGCN ships them.

A user's history is the features, items the labels: training hides part of the history at the input
and asks for all of it; testing asks for the items held out.
"""

from pathlib import Path

import numpy as np

from ._text import parse_ints, read_lines
from ._types import DataError, LabelData, LabelSplit, Ragged

HELD_OUT_SHARE = 0.2  # of each user's items, without a test file
VALID_USERS = 2000


def read(path: Path, test_path: Path | None, *, max_rows: int, seed: int) -> LabelData:
    rng = np.random.default_rng(seed)
    history = parse(path)
    if test_path is not None:
        held_out = parse(test_path)
        note = "test: the items of the test file"
    else:
        history, held_out = _hold_out(history, rng)
        note = f"test: {HELD_OUT_SHARE:.0%} of each user's items, drawn with seed {seed}"
    users = sorted(history)
    if not users:
        raise DataError(path, None, "at least one user with an item", "none")
    num_items = 1 + max(int(items.max()) for part in (history, held_out) for items in part.values())
    # validation: some users' histories lose a share of their items for training as well
    chosen = rng.choice(users, min(VALID_USERS, max(1, len(users) // 10)), replace=False).tolist()
    valid_input, valid_target = _hold_out({user: history[user] for user in chosen}, rng)
    train = [valid_input.get(user, history[user]) for user in users]
    tested = [user for user in users if user in held_out]
    if not tested:
        raise DataError(test_path or path, None, "held-out items of users that have a history", "none")
    validated = [user for user in chosen if user in valid_target]
    return LabelData(
        name=path.parent.name or path.name,
        num_features=num_items,
        num_labels=num_items,
        train=LabelSplit(_histories(train), Ragged.from_lists(train)),
        valid=LabelSplit(_histories([valid_input[u] for u in validated]),
                         Ragged.from_lists([valid_target[u] for u in validated])),
        test=LabelSplit(_histories([history[u] for u in tested]),
                        Ragged.from_lists([held_out[u] for u in tested])),
        items=True,
        notes=(note, "the user's known items are left out of the ranking"),
    )  # fmt: skip


def _histories(lists: list[np.ndarray]) -> Ragged:
    """Multi-hot, scaled to length one, so that long histories do not drown the bias."""
    return Ragged.from_lists(lists, [np.full(len(items), max(len(items), 1) ** -0.5) for items in lists])


def parse(path: Path) -> dict[int, np.ndarray]:
    users = {}
    for line, text in enumerate(read_lines(path), 1):
        words = text.split()
        if not words:
            raise DataError(path, line, "`user item item ...`", "an empty line")
        user, *items = parse_ints(words, path, line, "integer ids")
        if items:
            users.setdefault(user, []).extend(items)
    return {user: np.unique(items) for user, items in users.items()}


def _hold_out(users: dict[int, np.ndarray], rng) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Each user's items in two: kept, and held out (users with one item keep it)."""
    kept, held = {}, {}
    for user, items in users.items():
        out = min(max(1, round(len(items) * HELD_OUT_SHARE)), len(items) - 1)
        order = rng.permutation(items)
        kept[user] = np.sort(order[out:])
        if out:
            held[user] = np.sort(order[:out])
    return kept, held
