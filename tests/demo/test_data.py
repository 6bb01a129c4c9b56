import gzip

import numpy as np
import pytest

from recsparse_kernels.demo.data import (
    ClickLog,
    DataError,
    LabelData,
    Ragged,
    generate_click_log,
    generate_label_data,
    load,
)

from . import files

CONTENT = {
    "tsv": files.tsv_lines(40),
    "csv": files.csv_lines(40),
    "interactions": files.interaction_lines(30, 50),
    "xmc": files.xmc_lines(40, 20, 12),
}


def read(path):
    return load(path, max_rows=10_000, seed=0)


@pytest.mark.parametrize("kind", CONTENT)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_the_format_is_read_off_the_content(kind, packed, tmp_path):
    path = tmp_path / "anything"
    if packed:
        path = path.with_suffix(".gz")
        path.write_bytes(gzip.compress(("\n".join(CONTENT[kind]) + "\n").encode()))
    else:
        files.write(path, CONTENT[kind])
    data = read(path)
    if kind in ("tsv", "csv"):
        assert isinstance(data, ClickLog) and data.rows == 40
        assert data.numeric.shape[1] == (13 if kind == "tsv" else 0)
        assert len(data.field_sizes) == (26 if kind == "tsv" else 39)
    else:
        assert isinstance(data, LabelData) and data.items == (kind == "interactions")


@pytest.mark.parametrize("kind", CONTENT)
def test_a_folder_with_a_train_and_a_test_file(kind, tmp_path):
    files.write(tmp_path / "my_train.txt", CONTENT[kind])
    files.write(tmp_path / "my_test.txt", CONTENT[kind])
    (tmp_path / "README.md").write_text("not data")
    data = read(tmp_path)
    if kind in ("tsv", "csv"):
        assert data.rows == 80 and data.test == slice(40, 80) and data.valid.stop == 40
    elif kind == "xmc":
        assert len(data.test.labels) == 40
    else:
        assert len(data.test.labels) == 30 and data.num_labels == data.num_features


def test_criteo_values(tmp_path):
    """Blank, negative and rare values; the vocabulary is that of the training rows."""
    lines = [line.split("\t") for line in files.tsv_lines(20)]
    for row, words in enumerate(lines):
        words[1] = ["-3", "7", ""][row] if row < 3 else "0"
        words[14] = (
            "" if row == 5 else ("00000abc" if row < 10 else "0000000f" if row >= 18 else f"{row:08x}")
        )
    log = read(files.write(tmp_path / "log", ["\t".join(words) for words in lines]))
    assert log.train == slice(0, 16) and log.test == slice(18, 20)
    first = np.log1p(np.array([0, 7] + [0] * 13))  # without the blank one
    wanted = (np.log1p(7) - first.mean()) / first.std()
    np.testing.assert_allclose(log.numeric[1, 0], wanted, rtol=1e-5)
    assert log.numeric[0, 0] == log.numeric[3, 0] and log.numeric[2, 0] == 0
    frequent, blank = log.ids[0, 0], log.ids[5, 0]
    assert (log.ids[[0, 1, 2, 9], 0] == frequent).all() and blank != frequent
    assert (log.ids[10:, 0] == log.ids[12, 0]).all()  # rare or not in the training rows: one row for all
    assert log.field_sizes[0] == 3 and (log.ids < np.array(log.field_sizes)).all()


def test_first_rows_only(tmp_path):
    path = files.write(tmp_path / "log", CONTENT["tsv"])
    assert load(path, max_rows=25, seed=0).rows == 25


def test_xmc_values(tmp_path):
    train = files.write(tmp_path / "train", ["3 5 4", "0,3 1:0.5 4:2", " 2:1", "2", ""])
    files.write(tmp_path / "test", ["1 5 4", "1 0:1"])
    data = load(tmp_path, max_rows=10, seed=0)
    assert train.exists() and (data.num_features, data.num_labels) == (5, 4)
    rows = {}
    for split in (data.train, data.valid):
        for row in range(len(split.labels)):
            one = split.features.take(np.array([row]))
            rows[tuple(split.labels.take(np.array([row])).values)] = (
                one.values.tolist(),
                one.weights.tolist(),
            )
    assert rows == {(0, 3): ([1, 4], [0.5, 2.0]), (): ([2], [1.0]), (2,): ([], [])}
    assert data.test.labels.values.tolist() == [1]


def test_interactions_are_held_out(tmp_path):
    files.write(tmp_path / "train.txt", ["0 1 2 3 4 5", "1 2 3", "2 7", "7"])
    files.write(tmp_path / "test.txt", ["0 6", "1 9 1", "5 1"])
    data = load(tmp_path, max_rows=10, seed=0)
    assert data.num_labels == 10 and len(data.test.labels) == 2  # user 5 has no history
    assert data.test.labels.values.tolist() == [6, 1, 9]
    np.testing.assert_allclose(data.test.features.weights[:5], 5**-0.5, rtol=1e-6)
    known = {tuple(data.train.labels.take(np.array([row])).values) for row in range(3)}
    assert (7,) in known  # a single item is never held out


def replaced(lines, number, text):
    return [*lines[: number - 1], text, *lines[number:]]


def in_columns(line, separator, column, word):
    words = line.split(separator)
    words[column - 1] = word
    return separator.join(words)


TSV, CSV, XMC, ITEMS = CONTENT["tsv"], CONTENT["csv"], CONTENT["xmc"], CONTENT["interactions"]
MALFORMED = {
    "tsv column missing": (replaced(TSV, 7, TSV[6].rpartition("\t")[0]), 7, "40 tab-separated", "39 columns"),
    "tsv label": (replaced(TSV, 3, in_columns(TSV[2], "\t", 1, "2")), 3, "label 0 or 1 in column 1", "'2'"),
    "tsv number": (
        replaced(TSV, 9, in_columns(TSV[8], "\t", 4, "1.5")),
        9,
        "an integer or blank in column 4",
        "'1.5'",
    ),
    "tsv id": (
        replaced(TSV, 40, in_columns(TSV[39], "\t", 40, "xyz")),
        40,
        "hex id or blank in column 40",
        "'xyz'",
    ),
    "tsv signed id": (replaced(TSV, 2, in_columns(TSV[1], "\t", 15, "-1f")), 2, "hex id", "'-1f'"),
    "tsv empty line": (replaced(TSV, 5, ""), 5, "40 tab-separated", "an empty line"),
    "csv column missing": (replaced(CSV, 2, "1,2,3"), 2, "40 comma-separated", "3 columns"),
    "csv id": (replaced(CSV, 8, in_columns(CSV[7], ",", 11, "x")), 8, "in column 11", "'x'"),
    "csv negative id": (replaced(CSV, 8, in_columns(CSV[7], ",", 40, "-1")), 8, "in column 40", "'-1'"),
    "xmc header": (replaced(XMC, 1, "40 20"), 1, "rows features labels", "2 words"),
    "xmc header word": (replaced(XMC, 1, "40 x 12"), 1, "rows features labels", "'x'"),
    "xmc label too large": (replaced(XMC, 6, "3,12 1:1"), 6, "labels in [0, 12)", "12"),
    "xmc label": (replaced(XMC, 6, "3,q 1:1"), 6, "labels", "'q'"),
    "xmc feature too large": (replaced(XMC, 6, "3 20:1"), 6, "features in [0, 20)", "20"),
    "xmc pair": (replaced(XMC, 6, "3 2"), 6, "feature:value", "'2'"),
    "xmc value": (replaced(XMC, 6, "3 2:nan"), 6, "finite number", "'nan'"),
    "xmc too few rows": (XMC[:-1], 41, "40 rows", "the end after 39"),
    "xmc too many rows": ([*XMC, "1 1:1"], 42, "40 rows", "more"),
    "interactions word": (replaced(ITEMS, 12, "11 4 five"), 12, "integer ids", "'five'"),
    "interactions negative": (replaced(ITEMS, 12, "11 4 -5"), 12, "integer ids >= 0", "-5"),
    "interactions empty line": (replaced(ITEMS, 12, ""), 12, "user item item", "an empty line"),
    "unknown": (["some words", "and more"], 1, "Criteo TSV", "'some words'"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_file(case, tmp_path):
    lines, line, wanted, found = MALFORMED[case]
    path = files.write(tmp_path / "data", lines)
    with pytest.raises(DataError) as error:
        read(path)
    assert isinstance(error.value, ValueError)
    assert (error.value.path, error.value.line) == (path, line)
    assert f"{path}:{line}: wanted" in str(error.value)
    assert wanted in error.value.wanted and found in error.value.found


def test_other_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read(tmp_path / "absent")
    with pytest.raises(DataError, match="no file"):
        read(tmp_path)
    (tmp_path / "empty").write_text("")
    with pytest.raises(DataError, match="an empty file"):
        read(tmp_path)
    files.write(tmp_path / "other", CONTENT["tsv"])
    with pytest.raises(DataError, match="empty, other"):
        read(tmp_path)
    (tmp_path / "bytes").write_bytes(b"0\t\xff\xfe\n")
    with pytest.raises(DataError, match="UTF-8"):
        read(tmp_path / "bytes")
    with pytest.raises(DataError, match="at least 10 rows"):
        read(files.write(tmp_path / "short", CONTENT["tsv"][:5]))
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    files.write(mixed / "train", CONTENT["tsv"])
    files.write(mixed / "test", CONTENT["csv"])
    with pytest.raises(DataError, match="criteo_tsv"):
        read(mixed)


def test_ragged_take():
    ragged = Ragged.from_lists([np.array([3, 1]), np.array([], int), np.array([7])])
    taken = ragged.take(np.array([2, 0, 1, 0]))
    assert taken.offsets.tolist() == [0, 1, 3, 3, 5] and taken.values.tolist() == [7, 3, 1, 3, 1]
    assert taken.row_of_value().tolist() == [0, 1, 1, 3, 3]


def test_generated_click_log():
    sizes = (3, 4, 16, 20, 30, 50, 100, 500)
    log, again, other = (generate_click_log(20_000, seed, sizes) for seed in (3, 3, 4))
    assert (log.ids == again.ids).all() and (log.clicked == again.clicked).all()
    assert (log.numeric == again.numeric).all() and not (log.ids == other.ids).all()
    assert (log.ids >= 0).all() and (log.ids < np.array(sizes)).all() and np.isfinite(log.numeric).all()
    assert abs(log.clicked.mean() - 0.25) < 0.02
    counts = np.sort(np.bincount(log.ids[:, 7]))[::-1]
    assert counts[:50].sum() > 0.5 * counts.sum()  # Zipf
    # drift: the most frequent id of a drifting field changes
    early, late = log.ids[:2000, 6], log.ids[13_000:15_000, 6]
    assert np.bincount(early).argmax() != np.bincount(late).argmax()


def test_generated_label_data():
    data = generate_label_data(2_000, 1, num_labels=3_000, num_features=1_000, num_topics=30)
    again = generate_label_data(2_000, 1, num_labels=3_000, num_features=1_000, num_topics=30)
    assert (data.train.labels.values == again.train.labels.values).all()
    assert (data.train.features.weights == again.train.features.weights).all()
    for split in (data.train, data.valid, data.test):
        assert (split.labels.lengths >= 1).all() and split.labels.values.max() < 3_000
        assert (split.features.lengths >= 1).all() and split.features.values.max() < 1_000
    assert len(data.train.labels) + len(data.valid.labels) + len(data.test.labels) == 2_000
    counts = np.bincount(data.train.labels.values, minlength=3_000)
    assert counts.max() > 50 and np.median(counts) <= 1


def test_real_files():
    log = read(files.real("criteo_10k"))
    assert log.rows == 10_000 and round(float(log.clicked.mean()), 4) == 0.2182
    log = read(files.real("criteo_deeplight_20k"))
    assert log.rows == 20_000 and sum(log.field_sizes) == 429_705 and log.test == slice(10_000, 20_000)
    data = read(files.real("gowalla"))
    assert (len(data.train.labels), data.num_labels) == (29_858, 40_981)
    assert len(data.test.labels.values) == 217_242
    data = read(files.real("delicious_983"))
    assert len(data.train.labels) + len(data.valid.labels) == 12_920 and len(data.test.labels) == 3_185
    assert (data.num_features, data.num_labels) == (500, 983)
