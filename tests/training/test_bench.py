"""The bench commands: an interrupted run ends with the figures of one that was not."""

import json
import os
from pathlib import Path

import pytest
import torch

from bench.methods import __main__ as command
from bench.methods import dense_to_sparse, feature_mimicking, session
from bench.methods._drift import generate_drift
from recsparse_kernels.demo.data import generate_click_log

DATA = Path(os.environ.get("RECSPARSE_DATA") or Path(__file__).parents[2].parent / "shared" / "data")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(session, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr("bench.methods._clicks.generate_click_log", lambda rows, seed: _log(rows, seed))
    monkeypatch.setattr(dense_to_sparse, "WINDOWS", 10)
    sizes = (3, 10, 50, 400)
    monkeypatch.setattr("bench.methods._drift.FIELD_SIZES", sizes)
    monkeypatch.setattr("bench.methods._drift.CHANGING", (1, 2, 3))


def _log(rows, seed):
    return generate_click_log(rows, seed, field_sizes=(3, 10, 50, 400, *[7] * 10))


def lines(folder) -> dict[str, dict]:
    with open(folder / "runs.jsonl", encoding="utf-8") as file:
        return {line["key"]: line for line in map(json.loads, file)}


COMMANDS = {
    "growth_pruning": [
        "--datasets", "generated", "--rows", "6000", "--passes", "1", "--seeds", "0", "--timing-seconds", "0",
        "--variants", "half, frozen;2:4",
    ],
    "dense_to_sparse": [
        "--datasets", "drift", "--rows", "3000", "--seeds", "0", "--timing-seconds", "0", "--budgets", "0.3",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_interrupted_runs_go_on(name, tmp_path, monkeypatch):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert command.main([name, *COMMANDS[name], "--out", str(straight)]) == 0
    save, saves = session.Run.save, []

    def interrupt(self, state, *, now=False):
        save(self, state, now=now)
        saves.append(1)
        if len(saves) in (4, 15):
            raise KeyboardInterrupt

    monkeypatch.setattr(session.Run, "save", interrupt)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            command.main([name, *COMMANDS[name], "--out", str(broken)])
    command.main([name, *COMMANDS[name], "--out", str(broken)])
    wanted, found = lines(straight), lines(broken)
    assert wanted.keys() == found.keys() and any(line["resumed"] for line in found.values())
    for key, line in wanted.items():
        assert found[key]["result"] == line["result"] and found[key]["curve"] == line["curve"]
    assert not list((broken / "checkpoints").iterdir())
    assert list(broken.glob("*.png"))
    count = len(saves)
    command.main([name, *COMMANDS[name], "--out", str(broken)])  # everything is there already
    assert len(saves) == count


def test_drift_has_known_change_points():
    log, changes = generate_drift(4000, seed=0)
    assert changes == (1600, 2400, 3200) and log.rows == 4000
    before, after = log.ids[800:1600, 3], log.ids[1600:2400, 3]
    popular = torch.bincount(torch.from_numpy(before), minlength=400).topk(10).indices.tolist()
    inside = torch.bincount(torch.from_numpy(log.ids[:800, 3]), minlength=400).topk(10).indices.tolist()
    shifted = torch.bincount(torch.from_numpy(after), minlength=400).topk(10).indices.tolist()
    assert len({*popular} & {*inside}) > len({*popular} & {*shifted})


@pytest.mark.skipif(not (DATA / "criteo_10k").is_dir(), reason=f"no criteo_10k in {DATA}")
def test_feature_mimicking_on_real_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_mimicking, "RATES", feature_mimicking.RATES[:2])
    monkeypatch.setattr(feature_mimicking, "FINETUNE", feature_mimicking.FINETUNE[:2])
    arguments = ["feature_mimicking", "--datasets", "criteo_10k", "--models", "DeepFM", "--budgets", "0.25",
                 "--seeds", "0", "--timing-seconds", "0", "--data", str(DATA), "--out", str(tmp_path)]  # fmt: skip
    command.main(arguments)
    results = {line["run"]["variant"]: line["result"] for line in lines(tmp_path).values()
               if "variant" in line["run"]}  # fmt: skip
    assert results["mimic"]["weights"] < 0.27 * results["dense"]["weights"]
    # four times smaller without any training, it ranks clicks about as well
    assert results["mimic"]["before"]["auc"] > results["dense"]["dense"]["auc"] - 0.03


def test_a_killed_process_leaves_no_run_unreadable(tmp_path, capsys):
    """A line cut off in the middle is run again and hides none after it; so is a checkpoint that is no file
    of torch's."""
    calls = []

    def body(run):
        calls.append((run.config["seed"], run.resume()))
        return {"figure": run.config["seed"]}

    with session.Session("test", tmp_path) as first:
        first.run({"seed": 0}, 1, body)
        first.run({"seed": 1}, 1, body)
    lines = tmp_path / "runs.jsonl"
    whole = lines.read_text()
    lines.write_text(whole[:-20])
    key = json.loads(whole.splitlines()[1])["key"]
    (tmp_path / "checkpoints" / f"{key}.pt").write_bytes(b"PK\x03\x04 cut off")
    with session.Session("test", tmp_path) as second:
        assert second.run({"seed": 1}, 1, body)["result"] == {"figure": 1}
        assert second.run({"seed": 0}, 1, body)["result"] == {"figure": 0}
    assert calls == [(0, None), (1, None), (1, None)]
    assert {line["run"]["seed"] for line in session.Session("test", tmp_path).finished().values()} == {0, 1}
    said = capsys.readouterr().err
    assert "runs.jsonl:2 cannot be read" in said and "the run starts anew" in said
