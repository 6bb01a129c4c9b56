"""bench/processes.py: what crashes or hangs does not take the rest along."""

import sys
import time
from pathlib import Path

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
