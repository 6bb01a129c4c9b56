"""The commands: what they print, and that a mistake gets one line."""

import json
import os
import subprocess
import sys

import pytest
import torch

from recsparse_kernels import cpu_levels, microbench, nn, tuning
from recsparse_kernels.__main__ import load_object, main

every_layer = pytest.mark.skipif(
    not hasattr(nn, "LowRankLinear"), reason="this build of the package has no LowRankLinear"
)

MODEL = """
import torch
from torch import nn

def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128)), torch.randn(32, 128)

def alone():
    return small()[0]

def sample():
    return small()[1]

def number():
    return 3
"""


@pytest.fixture
def model_file(tmp_path):
    path = tmp_path / "models_of_a_user.py"
    path.write_text(MODEL)
    return path


def test_info(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "torch" in out and "native_cpu" in out


def test_module_runs_as_a_command():
    result = subprocess.run(
        [sys.executable, "-m", "recsparse_kernels", "info"], capture_output=True, text=True
    )
    assert result.returncode == 0 and "threads" in result.stdout, result.stderr


@every_layer
@pytest.mark.parametrize("budget", [["--memory", "0.7"], ["--max-error", "0.9", "--all", "--allow-slower"]])
def test_advise(capsys, model_file, budget):
    assert main(["advise", f"{model_file}:small", *budget]) == 0
    out = capsys.readouterr().out
    assert "Advice" in out and "swap_modules(model, {" in out and "Linear" in out


@every_layer
def test_advise_with_a_sample_of_its_own(capsys, model_file):
    assert main(["advise", f"{model_file}:alone", "--sample", f"{model_file}:sample", "--exclude", "2"]) == 0
    assert "excluded as 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, message",
    [
        ("alone", "returned no sample input"),
        ("number", "must return a torch.nn.Module; got int"),
        ("absent", "has no absent"),
    ],
)
def test_advise_mistakes_get_one_line(capsys, model_file, name, message):
    assert main(["advise", f"{model_file}:{name}"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "spec, message",
    [
        ("nocolon", "must be module:name"),
        ("no_such_module_at_all:x", "No module named"),
        ("/nowhere/file.py:x", "there is no file"),
    ],
)
def test_load_object_refuses(spec, message):
    with pytest.raises(ValueError, match=message):
        load_object(spec)


def test_bench(capsys):
    assert main(["bench", "--family", "fan_in", "--rounds", "1", "--json"]) == 0
    (row,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert row["layer"] == "FixedFanInLinear" and row["ms"] > 0 and row["bytes"] < row["dense_bytes"]
    assert main(["bench", "--rounds", "0"]) == 2


def test_bench_tune_stores_its_choices(tmp_path, capsys):
    path = tmp_path / "measured.json"
    assert main(["bench", "--family", "sparse24", "--rounds", "1", "--tune", str(path)]) == 0
    assert "op shapes measured" in capsys.readouterr().out
    try:
        if cpu_levels():
            entries = [entry for found in tuning._read(path).values() for entry in found]
            assert {entry.op for entry in entries} == {"sparse24_linear"}
            assert {entry.training for entry in entries} == {False, True}
    finally:
        tuning.load()  # without what was measured here


def test_bench_table_has_every_case(capsys):
    rows = [
        {"layer": case.layer, "shape": case.shape, "dense_ms": 2.0, "ms": 1.0, "speedup_over_dense": 2.0,
         "bytes": 1, "dense_bytes": 2, "device": "cpu", "dtype": "float32"}
        for case in microbench.cases()
    ]  # fmt: skip
    text = str(microbench.table(rows))
    assert all(case.shape in text for case in microbench.cases())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bench_without_the_gpu_asked_for(capsys):
    assert main(["bench", "--device", "cuda"]) == 2
    assert "--device cuda: torch sees no GPU" in capsys.readouterr().err


def test_import_takes_no_more_than_it_needs():
    """torch._dynamo takes a second to import, Triton and the plotting packages some tenths."""
    code = (
        "import sys, torch\n"
        "heavy = {'torch._dynamo', 'sympy', 'triton', 'rich', 'matplotlib', 'pandas', 'sklearn', 'scipy'}\n"
        "heavy -= set(sys.modules)\n"
        "import recsparse_kernels as rk\n"
        "model = torch.nn.Sequential(torch.nn.Linear(64, 64))\n"
        "assert rk.swap_modules(model, {torch.nn.Linear: rk.nn.Sparse24Linear}, min_numel=0).swapped\n"
        "model(torch.ones(1, 64)).sum().backward()\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr
