"""What a run on a GPU rests on: a piece of work that crashes, hangs or raises does not take the rest along."""

import json
import sys
import time
from pathlib import Path

import pytest

from bench import gpu, harness, summary
from bench.processes import Lines, run_each, run_side_by_side

ROOT = Path(__file__).parents[1]
WORK = """
import os, sys, time
from pathlib import Path
from bench.processes import Lines
lines = Lines(Path(sys.argv[2]))
for name in lines.each(sys.argv[1].split(",")):
    lines.write({"name": name, "process": os.getpid()})
    if name == "crashes":
        print("at the end", flush=True)
        os._exit(3)
    if name == "hangs":
        time.sleep(60)
"""


def command(names, file):
    return [sys.executable, "-c", WORK, ",".join(names), str(file)]


def run(names, function=run_each, **options):
    lines = []
    options = {"seconds": 60, "silent": 20, "cwd": ROOT, **options}
    return function(command, names, lines.append, **options), lines


def test_one_process_does_what_neither_crashes_nor_hangs():
    failed, lines = run(["a", "b", "c"])
    assert not failed
    assert [line["name"] for line in lines] == ["a", "b", "c"]
    assert len({line["process"] for line in lines}) == 1


def test_a_crash_costs_one_name():
    failed, lines = run(["a", "crashes", "b", "c"])
    assert (
        list(failed) == ["crashes"] and "status 3" in failed["crashes"] and "at the end" in failed["crashes"]
    )
    assert [line["name"] for line in lines] == ["a", "crashes", "b", "c"]
    assert len({line["process"] for line in lines}) == 2


def test_a_hang_costs_one_name_and_the_time_to_see_it():
    begin = time.monotonic()
    failed, lines = run(["a", "hangs", "b"], silent=3)
    assert list(failed) == ["hangs"] and "nothing for 3 s" in failed["hangs"]
    assert [line["name"] for line in lines] == ["a", "hangs", "b"]
    assert time.monotonic() - begin < 50


def test_nothing_is_begun_after_the_time():
    failed, lines = run(["hangs", "b"], seconds=3)
    assert "out of time" in failed["hangs"] and "not begun" in failed["b"]
    assert "b" not in [line["name"] for line in lines]


def test_shares_run_side_by_side():
    failed, lines = run(["a", "b", "crashes", "c"], run_side_by_side, processes=2)
    assert list(failed) == ["crashes"]
    assert sorted(line["name"] for line in lines) == ["a", "b", "c", "crashes"]


def test_a_name_is_done_when_the_next_is_asked_for(tmp_path):
    lines = Lines(tmp_path / "lines")
    names = lines.each(["a", "b"])
    next(names)
    assert not lines.file.exists()
    next(names)
    assert lines.file.read_text() == '{"done": "a"}\n'


def test_a_machine_without_git_is_described(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert harness.machine.__wrapped__()["commit"] == ""  # not what was found before


@pytest.fixture
def lines(tmp_path, monkeypatch):
    """Of the benches, on a GPU that takes one millisecond for everything."""
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)
    monkeypatch.setattr(gpu, "gpu_times", lambda calls, rounds=3: {name: [1.0] * 3 for name in calls})
    return Lines(tmp_path / "lines")


def written(lines):
    return [json.loads(line) for line in lines.file.read_text().splitlines()]


class CompilationError(Exception):
    """As Triton's: not a RuntimeError."""


def fails():
    raise CompilationError("does not compile")


def test_a_candidate_that_cannot_run_is_a_line(lines):
    gpu.compare(lines, "bag", "B=1", {"dense": lambda: 1, "ours-triton": fails}, "dense")
    missing, timed = written(lines)
    assert missing["backend"] == "ours-triton" and "does not compile" in missing["missing"]
    assert timed["backend"] == "dense" and timed["p50_ms"] == timed["speedup_over_dense"] == 1.0


def test_without_the_dense_candidate_there_is_no_ratio(lines):
    gpu.compare(lines, "bag", "B=1", {"dense": fails, "ours-native": lambda: 1}, "dense")
    assert written(lines)[1]["speedup_over_dense"] is None


def test_short_calls_are_timed_in_a_graph_where_they_can_be(lines, monkeypatch):
    monkeypatch.setattr(gpu, "gpu_times", lambda calls, rounds=3: {name: [0.5] * 3 for name in calls})
    monkeypatch.setattr(gpu, "in_graph", lambda call, count: call() if call is fails else call)
    monkeypatch.setattr(gpu, "GRAPH_BELOW_MS", 0.6)
    gpu.compare(lines, "bag", "B=1", {"dense": lambda: 1}, "dense")
    plain, graph = written(lines)
    assert (plain["graph"], plain["p50_ms"]) == (False, 0.5)
    assert (graph["graph"], graph["p50_ms"]) == (True, 0.5 / 4)  # ROUND_MS / 0.5 calls a graph


def test_a_bench_that_raises_does_not_end_the_others(lines, monkeypatch):
    done = []
    monkeypatch.setattr(gpu, "BENCHES", {"a": lambda report: fails(), "b": lambda report: done.append("b")})
    gpu.run_benches(["a", "b"], lines.file)
    error, *rest = written(lines)
    assert "does not compile" in error["error"] and done == ["b"]
    assert rest == [{"done": "a"}, {"done": "b"}]


def test_the_summary_shows_cuda_and_triton_side_by_side(lines):
    """As a run on a GPU writes them: checks first, candidates that ran and one that did not."""
    op = {"check": "op", "op": "bag", "backend": "triton", "cases": 3, "of": 4, "failures": 1, "first": "off"}
    for line in (op, {"check": "tests/gpu", "passed": False, "tail": "status 1"}):
        lines.write(line)
    calls = {
        "F.linear": int,
        "ours-native": int,
        "ours-triton": int,
        "ours-native-mma.sp": int,
        "peer": fails,
    }
    gpu.compare(lines, "sparse24", "B=1", calls, "F.linear", work_bytes=2_000_000)
    lines.write({"bench": "memory", "shape": "B=1", "backend": "ours-native", "peak_gib": 1.5})
    assert summary.gpu_checks(lines.file).splitlines() == [
        "- triton: 1 ops, 3 of 4 cases, 1 failures",
        "  - bag: 1, off",
        "- tests/gpu: FAILED: status 1",
    ]
    assert summary.gpu_table(lines.file).splitlines()[2:] == [
        "| sparse24 | B=1 | calls | F.linear 1 ms | 1.00x 1 ms 2 GB/s<br>mma.sp 1.00x 1 ms 2 GB/s "
        "| 1.00x 1 ms 2 GB/s | peer (CompilationError: does not compile) |",
        "| memory | B=1 | calls |  | 1.50 GiB |  |  |",
    ]
    assert summary.report(lines.file).count("\n\n") == 2  # no table of CPU benches


@pytest.mark.parametrize("line", [{"bench": "a", "error": "no"}, {"backend": "ours-triton", "missing": "no"},
                                  {"backend": "torch-cutlass", "missing": "no"},
                                  {"backend": "ours-triton", "graph": True, "missing": "no"}], ids=str)  # fmt: skip
def test_our_own_candidates_have_to_run(tmp_path, monkeypatch, line):
    monkeypatch.setattr(gpu, "run_each", lambda command, names, write, **options: write(line) or {})
    report = gpu.Report(tmp_path / "out", "cpu")
    gpu.check_benches(report, 60)
    failed = "error" in line or (line["backend"] == "ours-triton" and "graph" not in line)
    assert report.failures == failed


def test_a_slow_candidate_has_fewer_rounds(monkeypatch):
    now, called = [0.0], {"slow": 0, "quick": 0}

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            self.at = now[0]

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 1e3 * (end.at - self.at)

    def run(name, seconds):
        called[name] += 1
        now[0] += seconds

    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    monkeypatch.setattr("torch.cuda.Event", Event)
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    times = gpu.gpu_times({"slow": lambda: run("slow", 1.0), "quick": lambda: run("quick", 1e-3)}, rounds=10)
    assert called == {"slow": 4 + 3, "quick": 4 + 10 * 2}
    assert times["slow"] == pytest.approx([1e3] * 3) and times["quick"] == pytest.approx([1.0] * 10)


def test_commands_run_beside_each_other_and_fail_alone(tmp_path, monkeypatch):
    code = "import os, sys; print('at', os.environ['WHERE']); sys.exit(int(os.environ['STATUS']))"
    commands = [
        (name, [sys.executable, "-c", code], {"WHERE": name, "STATUS": status})
        for name, status in (("a", "0"), ("b", "9"), ("c", "0"))
    ]
    report = gpu.Report(tmp_path / "out", "cpu")
    gpu.run_beside(report, commands, 60)
    found = {line["check"]: line for line in map(json.loads, report.out.read_text().splitlines())}
    assert {name: line["passed"] for name, line in found.items()} == {"a": True, "b": False, "c": True}
    assert "status 9: at b" in found["b"]["tail"] and report.failures == 1


def test_a_backend_without_a_case_has_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "run_side_by_side", lambda *arguments, **options: {})
    report = gpu.Report(tmp_path / "out", "cpu")
    gpu.check_ops(report, "cpu", tmp_path / "calls", ["bag"], "cuda", 60, None, 1)
    assert report.failures == 1 and "no case was made" in report.out.read_text()


@pytest.mark.skipif(
    not (ROOT / "tests" / "native" / "_cuda_on_cpu.so").exists(),
    reason="built by cmake -DRECSPARSE_TESTS=ON",
)
def test_every_step_leaves_the_later_ones_their_time(tmp_path, monkeypatch):
    given = []
    planned = [(given.append, 100, 0), (given.append, 10, 10), (given.append, 100, 20)]
    monkeypatch.setattr(gpu, "steps", lambda *arguments: planned)
    assert gpu.main(["--device", "cpu", "--seconds", "60", "--out", str(tmp_path / "out")]) == 0
    assert [round(seconds) for seconds in given] == [30, 10, 60]
