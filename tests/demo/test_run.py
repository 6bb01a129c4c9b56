import argparse
import json

import numpy as np
import pytest
import torch
from torch.nn import functional

from recsparse_kernels import demo
from recsparse_kernels.demo import measure
from recsparse_kernels.demo.data import Ragged, generate_click_log

from . import files

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from recsparse_kernels.demo import run, train  # noqa: E402
from recsparse_kernels.demo.models import DLRM, LabelModel, set_prior  # noqa: E402

QUICK = ["--timing-seconds", "0.01", "--passes", "1"]


def call(*words: str) -> int:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return demo.main(parser.parse_args([str(word) for word in words]))


def quiet(what: str, steps: int):
    return lambda count: None


SMALL = {
    "tsv": files.tsv_lines(400),
    "csv": files.csv_lines(400),
    "interactions": files.interaction_lines(60, 700),
    "xmc": files.xmc_lines(60, 40, 600),
}


@pytest.mark.parametrize("lines", SMALL.values(), ids=SMALL)
def test_a_file_of_each_format_gives_a_whole_report(lines, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    assert call("--data", files.write(tmp_path / "data", lines), "--out", out, *QUICK) == 0
    assert sorted(file.name for file in out.iterdir()) == ["report.json", "report.md", "report.png"]
    report = json.loads((out / "report.json").read_text())
    rows = report["sections"][0]["rows"]
    text = (out / "report.md").read_text()
    printed = capsys.readouterr().out
    for row in rows:
        assert row["model"] in text and row["model"] in printed
        assert row["parameter_bytes"] > 0 and row["optimizer_bytes"] > 0
        assert row["step"]["p50_ms"] > 0
        assert [timing["p50_ms"] > 0 for timing in row["inference"].values()] == [True] * 3
    assert report["seed"] == "0"


def test_a_malformed_file_stops_before_any_work(tmp_path, capsys):
    path = files.write(tmp_path / "data", [*files.tsv_lines(30), "1\t2"])
    assert call("--data", path, "--out", tmp_path / "out", *QUICK) == 2
    assert not (tmp_path / "out").exists()
    error = capsys.readouterr().err
    assert f"{path}:31: wanted 40 tab-separated columns" in error and "found 2 columns" in error


@pytest.mark.parametrize("words, message", [
    (["--data", "/no/such/file"], "no such file"),
    (["--rows", "3"], "--rows must be at least 10; got 3"),
    (["--passes", "0"], "--passes must be at least 1; got 0"),
    (["--out", __file__], "is a file"),
])  # fmt: skip
def test_bad_arguments(words, message, capsys):
    assert call(*words) == 2
    assert message in capsys.readouterr().err


def test_an_interrupted_report_leaves_nothing(tmp_path, monkeypatch):
    from recsparse_kernels.demo import report

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(report, "draw", fail)
    with pytest.raises(OSError, match="disk full"):
        report.write(report.Report([], {}), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None if name == "rich" else object())
    assert call() == 2
    assert "demo needs rich: pip install 'recsparse_kernels[demo]'" in capsys.readouterr().err


def test_dlrm_shapes():
    """Criteo Kaggle: 27 vectors of 16, 367 into the top MLP; and the interaction is all pairs of dots."""
    model = DLRM(13, (5,) * 26)
    linears = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    widths = [(linear.in_features, linear.out_features) for linear in linears]
    assert widths == [(13, 512), (512, 256), (256, 64), (64, 16), (367, 512), (512, 256), (256, 1)]
    vectors = torch.randn(3, 27, 16)
    dots = [(vectors[:, i] * vectors[:, j]).sum(1) for i in range(27) for j in range(i)]
    torch.testing.assert_close(model._dots(vectors), torch.stack(dots, dim=1))
    ids = torch.tensor([[4] * 26])
    looked_up = model.table(ids + model.field_start)[0]
    torch.testing.assert_close(looked_up, model.table.weight[torch.arange(26) * 5 + 4])


def test_label_loss_is_binary_cross_entropy():
    torch.manual_seed(0)
    model = LabelModel(30, torch.nn.Linear(512, 50)).eval()
    set_prior(model.head, torch.arange(50), 100)
    features = Ragged.from_lists([np.array([1, 4]), np.array([], int)], [np.array([0.5, 1.0]), np.array([])])
    labels = Ragged.from_lists([np.array([3, 49]), np.array([0])])
    target = torch.zeros(2, 50)
    target[0, [3, 49]] = 1
    target[1, 0] = 1
    scores = model.scores(features)
    torch.testing.assert_close(torch.sigmoid(model.head.bias), (torch.arange(50) + 0.5) / 101)
    wanted = functional.binary_cross_entropy_with_logits(scores, target, reduction="sum") / 2
    torch.testing.assert_close(model.loss(features, labels), wanted)


def test_hidden_half_of_a_history():
    rng = np.random.default_rng(0)
    lists = [np.arange(size) for size in (0, 1, 50, 2000)]
    half = train.hide_half(Ragged.from_lists(lists), rng)
    assert len(half) == 4 and 850 < half.lengths[3] < 1150
    norms = np.sqrt(np.bincount(half.row_of_value(), half.weights.astype(float) ** 2, minlength=4))
    np.testing.assert_allclose(norms[half.lengths > 0], 1.0, rtol=1e-5)


def test_training_keeps_the_best_pass():
    model = torch.nn.Linear(1, 1, bias=False)
    scores = iter([3.0, 2.0, 2.5, 2.6, 0.0])
    seen = []

    def one_pass():
        seen.append(None)
        torch.nn.init.constant_(model.weight, len(seen))

    assert train._until_worse(model, one_pass, lambda: next(scores), 10, patience=2) == 2
    assert len(seen) == 4 and model.weight.item() == 2


def test_bytes():
    model = torch.nn.Linear(10, 10)
    assert measure.parameter_bytes(model) == 440
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    assert measure.optimizer_bytes([optimizer]) == 0
    train.step(model(torch.ones(1, 10)).sum(), [optimizer])
    assert measure.optimizer_bytes([optimizer]) == 440


def test_dlrm_learns_the_planted_structure():
    """Clearly more than the click rates of the ids, which is what a model without interactions could have."""
    log = generate_click_log(40_000, 0, (3, 4, 16, 20, 30, 40, 50, 60, 80, 100, 120, 150))
    plan = train.ClickPlan.for_rows(100_000)
    section = run.run_clicks(log, plan, seed=0, timing_seconds=0.01, progress=quiet)
    dense = section.rows[0].clicks
    rates = section.extra["AUC of the summed click rates of single ids"]
    truth = section.extra["AUC of the probabilities that the clicks were drawn from"]
    assert dense.auc > rates + 0.03 and dense.auc < truth
