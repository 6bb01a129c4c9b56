"""The commands of bench.methods on tiny data: they run, and an interrupted run ends as an uninterrupted one."""

import json
import random

import pytest

from bench.methods import session as session_file
from bench.methods.__main__ import main


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    (folder / "gowalla").mkdir()
    lines = {"train": [], "test": []}
    for user in range(40):
        items = draw.sample([i for i in range(60) if (i + user) % 3], 12)
        lines["train"].append(" ".join(map(str, [user, *items[:9]])))
        lines["test"].append(" ".join(map(str, [user, *items[9:]])))
    for name, text in lines.items():
        (folder / "gowalla" / f"{name}.txt").write_text("\n".join(text) + "\n")
    (folder / "delicious_983").mkdir()
    for name, rows in (("train", 60), ("test", 20)):
        text = [f"{rows} 30 25"]
        for _ in range(rows):
            features = sorted(draw.sample(range(30), 6))
            labels = sorted({(features[0] + k) % 25 for k in range(3)})
            text.append(",".join(map(str, labels)) + " " + " ".join(f"{f}:1" for f in features))
        (folder / "delicious_983" / f"{name}.txt").write_text("\n".join(text) + "\n")
    return folder


def figures(folder):
    """Key -> result and curve of each run, times left out."""
    lines = [json.loads(text) for text in (folder / "runs.jsonl").read_text().splitlines()]
    times = ("step_seconds",)
    return {
        line["key"]: ({k: v for k, v in line["result"].items() if k not in times}, line["curve"])
        for line in lines
    }


COMMANDS = {
    "mf": ["dynamic_sparse_learning", "--backbones", "mf", "--densities", "1,0.5"],
    "lightgcn": ["dynamic_sparse_learning", "--backbones", "lightgcn", "--densities", "0.5", "--score", "ema"],
    "neumf": ["dynamic_sparse_learning", "--backbones", "neumf", "--densities", "0.5"],
    "multvae": ["dynamic_sparse_learning", "--backbones", "multvae", "--densities", "0.2"],
    "delicious": [
        "topology_update", "--parts", "delicious",
        "--heads", "dense;RigL 8;SET 8, clusters;SET 8, dense 5;SET 16, bfloat16",
    ],
    "items": ["topology_update", "--parts", "gowalla", "--heads", "RigL 8"],
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_an_interrupted_command_ends_as_an_uninterrupted_one(name, data, tmp_path, monkeypatch, capsys):
    if name in ("delicious", "items"):
        from bench.methods import topology_update as command

        small = {
            "dense": command.Head(),
            "RigL 8": command.Head(8, "gradient"),
            "SET 8, clusters": command.Head(8, "threshold", clusters=5),
            "SET 8, dense 5": command.Head(8, "fraction", dense_labels=5, group_size=4, intermediate=24),
            "SET 16, bfloat16": command.Head(16, "fraction", dtype="bfloat16"),
        }
        monkeypatch.setattr(command, "HEADS", small)
    arguments = [
        *COMMANDS[name], "--data", str(data), "--batch", "32", "--epochs", "3", "--seeds", "0",
    ]  # fmt: skip
    main([*arguments, "--out", str(tmp_path / "whole")])
    wanted = figures(tmp_path / "whole")
    monkeypatch.setattr(session_file, "SAVE_SECONDS", 0.0)
    advance, count = session_file.Run.advance, 0

    def interrupted(run, step):
        nonlocal count
        count += 1
        if count % 7 == 0:
            raise KeyboardInterrupt
        advance(run, step)

    monkeypatch.setattr(session_file.Run, "advance", interrupted)
    for _ in range(200):
        try:
            main([*arguments, "--out", str(tmp_path / "parts")])
            break
        except KeyboardInterrupt:
            continue
    assert figures(tmp_path / "parts") == wanted
    assert len(wanted) >= 1 and list((tmp_path / "whole").glob("*.png"))
    capsys.readouterr()


def test_generated_labels(tmp_path, capsys):
    main(
        ["topology_update", "--parts", "generated", "--sizes", "3000", "--scale-steps", "1",
         "--scale-fan-in", "16", "--scale-batch", "8", "--out", str(tmp_path)]
    )  # fmt: skip
    lines = [json.loads(text)["result"] for text in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and all(line["peak_bytes"] >= 0 and line["step_seconds"] > 0 for line in lines)
    assert lines[1]["formula_bytes"] == 3000 * (16 * (4 + 4 + 2) + 8)
    capsys.readouterr()


@pytest.mark.parametrize("name", ["topology_update", "dynamic_sparse_learning"])
def test_a_folder_that_is_not_there_gets_one_line(name, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--data", str(tmp_path / "none"), "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"error: --data {tmp_path / 'none'}" in last and "no such file" in last.lower()
