"""Runs of a method that can be interrupted: finished ones are lines of a file, the current one a checkpoint.

    with Session("name", folder) as session:
        for seed in seeds:
            result = session.run({"model": "dlrm", "seed": seed}, steps, body)

``body(run)`` trains and returns the figures (a dict of plain values); it is not called when the line is
there already. Inside, ``run.resume()`` gives the last checkpoint or None, ``run.save(state)`` writes one
(at most every ``SAVE_SECONDS``), ``run.log(step, loss=...)`` adds a point to the learning curve,
``run.advance(step)`` moves the bar. A run that was interrupted ends with the same figures, except times.
"""

import contextlib
import hashlib
import json
import os
import pickle
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ..harness import machine

SAVE_SECONDS = 30.0


class Run:
    """One training run, as its body sees it."""

    def __init__(self, config: dict, checkpoint: Path, progress: Callable[[int], None]):
        self.config = config
        self.curve: list[dict] = []
        self.resumed = False
        self._checkpoint, self._progress = checkpoint, progress
        self._saved_at, self._started, self._seconds = time.perf_counter(), time.perf_counter(), 0.0

    @property
    def seconds(self) -> float:
        """Spent in this run, interruptions left out."""
        return self._seconds + time.perf_counter() - self._started

    def resume(self) -> dict | None:
        if not self._checkpoint.exists():
            return None
        try:
            held = torch.load(self._checkpoint, weights_only=False)
        except (RuntimeError, ValueError, EOFError, OSError, pickle.UnpicklingError) as error:
            name = self._checkpoint.name
            print(f"{name} cannot be read, the run starts anew: {error}".split("\n")[0], file=sys.stderr)
            return None
        self.curve, self._seconds, self.resumed = held["curve"], held["seconds"], True
        return held["state"]

    def save(self, state: Callable[[], dict], *, now: bool = False) -> None:
        """Write ``state()`` as the checkpoint, if the last is old enough. Replaces the file at once."""
        if not now and time.perf_counter() - self._saved_at < SAVE_SECONDS:
            return
        part = self._checkpoint.with_suffix(".part")
        torch.save({"state": state(), "curve": self.curve, "seconds": self.seconds}, part)
        os.replace(part, self._checkpoint)
        self._saved_at = time.perf_counter()

    def log(self, step: int, **figures: float) -> None:
        self.curve.append({"step": step, **figures})

    def advance(self, step: int) -> None:
        self._progress(step)


class Session:
    """The runs of one command: ``runs.jsonl``, ``checkpoints/`` and pictures in one folder."""

    def __init__(self, method: str, folder: Path, *, fresh: bool = False):
        self.method, self.folder = method, folder
        self.lines = folder / "runs.jsonl"
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        if fresh:
            self.lines.unlink(missing_ok=True)
            for checkpoint in (folder / "checkpoints").iterdir():
                checkpoint.unlink()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Session":
        import rich.console
        import rich.progress

        terminal = rich.console.Console(stderr=True)
        columns = (
            rich.progress.TextColumn("{task.description:<52}"), rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(), rich.progress.TimeElapsedColumn(),
            rich.progress.TimeRemainingColumn(),
        )  # fmt: skip
        self._terminal = terminal.is_terminal
        self._bars = rich.progress.Progress(*columns, console=terminal, disable=not self._terminal)
        self._stack.enter_context(self._bars)
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()

    def finished(self) -> dict[str, dict]:
        """Key -> line of each finished run; of a key that is there twice, the later."""
        if not self.lines.exists():
            return {}
        found = {}
        for number, text in enumerate(self.lines.read_text(encoding="utf-8").splitlines(), 1):
            try:
                line = json.loads(text)
                found[line["key"]] = line
            except (ValueError, KeyError, TypeError):  # cut off: the process was killed while it wrote
                print(f"{self.lines.name}:{number} cannot be read and is left aside", file=sys.stderr)
        return found

    def run(self, config: dict, steps: int, body: Callable[[Run], dict]) -> dict:
        """The line of this run, from the file or from ``body``. ``config`` is what tells runs apart."""
        key = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
        done = self.finished().get(key)
        what = " ".join(str(value) for value in config.values())
        if done is not None:
            print(f"{what}: in {self.lines.name} already", file=sys.stderr)
            return done
        started = time.perf_counter()
        checkpoint = self.folder / "checkpoints" / f"{key}.pt"
        task = self._bars.add_task(what[:52], total=steps)
        run = Run(config, checkpoint, lambda step: self._bars.update(task, completed=step))
        result = body(run)
        line = {
            "key": key, "method": self.method, "run": config, "result": result, "curve": run.curve,
            "seconds": run.seconds, "resumed": run.resumed, "threads": torch.get_num_threads(), **machine(),
        }  # fmt: skip
        whole = not self.lines.exists() or self.lines.read_bytes()[-1:] in (b"", b"\n")
        with open(self.lines, "a", encoding="utf-8") as file:  # never behind a line that was cut off
            file.write(("" if whole else "\n") + json.dumps(line) + "\n")
        checkpoint.unlink(missing_ok=True)
        self._bars.update(task, completed=steps)
        if not self._terminal:  # a log file gets a line instead of a bar
            print(f"{time.perf_counter() - started:6.0f} s  {what}", file=sys.stderr, flush=True)
        return line

    def picture(self, name: str, curves: dict[str, list[list[dict]]], x: str, y: str, title: str) -> Path:
        """Learning curves as ``name.png``: label -> curves of its seeds, drawn as mean and range."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(8, 4.5))
        for label, seeds in curves.items():
            points: dict[float, list[float]] = {}
            for curve in seeds:
                for point in curve:
                    if y in point:
                        points.setdefault(point[x], []).append(point[y])
            at = sorted(points)
            (line,) = axes.plot(at, [sum(points[p]) / len(points[p]) for p in at], label=label)
            low, high = [min(points[p]) for p in at], [max(points[p]) for p in at]
            axes.fill_between(at, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set(xlabel=x, ylabel=y, title=title)
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
        path = self.folder / f"{name}.png"
        figure.savefig(path, dpi=120, bbox_inches="tight")
        pyplot.close(figure)
        print(f"wrote {path}", file=sys.stderr)
        return path

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        import rich.console
        import rich.table

        made = rich.table.Table(*columns, title=title, title_justify="left")
        for row in rows:
            made.add_row(*row)
        rich.console.Console(width=None if sys.stdout.isatty() else 150).print(made)


def spread(values: list[float], digits: int = 4) -> str:
    """``mean ± standard deviation (lowest..highest)`` over seeds."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    deviation = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
    return f"{mean:.{digits}f} ± {deviation:.{digits}f} ({min(values):.{digits}f}..{max(values):.{digits}f})"
