"""The main job: a click model and a many-label model, dense beside packed, in accuracy, bytes and time."""

import argparse
import importlib.util
import sys
import time
from pathlib import Path

GENERATED_ROWS, GENERATED_DOCUMENTS = 400_000, 24_000  # so that the whole run takes minutes on two cores
READ_ROWS = 1_000_000  # of a longer click log, unless --rows says otherwise
NEEDED = {"rich": "rich", "matplotlib": "matplotlib", "sklearn": "scikit-learn"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m recsparse_kernels demo``."""
    parser.add_argument(
        "--data", type=Path, metavar="PATH",
        help="a file, or a folder with a train and a test file: Criteo TSV or id CSV, interactions, or XMC "
        "text; without it, data is generated",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for report.md, report.json and report.png"
    )
    parser.add_argument("--seed", type=int, default=0, help="of generated data, splits, weights (default 0)")
    parser.add_argument(
        "--rows", type=int, default=None, metavar="N",
        help="generated rows of the click log, or the first rows to read of one (default 400,000; 1,000,000)",
    )  # fmt: skip
    parser.add_argument(
        "--passes", type=int, default=None, metavar="N", help="at most this many passes over the data"
    )
    parser.add_argument(
        "--timing-seconds", type=float, default=10.0, metavar="S",
        help="how long to time each group of models (default 10)",
    )  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """Run it. Returns 0, or 2 where the arguments or the data are wrong, with the reason on stderr."""
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f"demo needs {', '.join(missing)}: pip install 'recsparse_kernels[demo]'", file=sys.stderr)
        return 2
    from .data import DataError
    from .report import check_out

    try:
        if args.rows is not None and args.rows < 10:
            raise ValueError(f"--rows must be at least 10; got {args.rows}")
        if args.passes is not None and args.passes < 1:
            raise ValueError(f"--passes must be at least 1; got {args.passes}")
        if args.out is not None:
            check_out(args.out)
        sources = _sources(args)
    except (DataError, ValueError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    _run(args, sources)
    return 0


def _sources(args: argparse.Namespace) -> list:
    """What to train on: the data asked for, or a generated click log and generated documents."""
    import rich.console

    from .data import generate_click_log, generate_label_data, load

    with rich.console.Console(stderr=True).status(f"reading {args.data}" if args.data else "generating data"):
        if args.data is not None:
            return [load(args.data, max_rows=args.rows or READ_ROWS, seed=args.seed)]
        rows = args.rows or GENERATED_ROWS
        documents = min(args.rows or GENERATED_DOCUMENTS, GENERATED_DOCUMENTS)
        return [generate_click_log(rows, args.seed), generate_label_data(documents, args.seed)]


def _run(args: argparse.Namespace, sources: list) -> None:
    import dataclasses

    import rich.console
    import rich.progress
    import torch

    from . import report
    from .data import ClickLog
    from .run import label_plan, run_clicks, run_labels
    from .train import ClickPlan

    started = time.perf_counter()
    # Adagrad builds sparse tensors; torch warns where nobody has said that it need not check them
    torch.sparse.check_sparse_tensor_invariants.disable()
    console = rich.console.Console(width=None if sys.stdout.isatty() else 170)
    columns = (
        rich.progress.TextColumn("{task.description:<44}"), rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(), rich.progress.TimeElapsedColumn(),
        rich.progress.TimeRemainingColumn(),
    )  # fmt: skip
    sections = []
    terminal = rich.console.Console(stderr=True)
    with rich.progress.Progress(*columns, console=terminal, disable=not terminal.is_terminal) as bars:

        def progress(what: str, steps: int):
            if not terminal.is_terminal:  # a log file gets a line instead of a bar
                print(f"{time.perf_counter() - started:6.0f} s  {what}", file=sys.stderr, flush=True)
            for early in bars.tasks:  # stopped before its last step
                bars.update(early.id, total=early.completed)
            task = bars.add_task(what, total=steps)
            return lambda count: bars.advance(task, count)

        for source in sources:
            common = {"seed": args.seed, "timing_seconds": args.timing_seconds, "progress": progress}
            if isinstance(source, ClickLog):
                plan = ClickPlan.for_rows(source.rows)
                run = run_clicks
            else:
                plan = label_plan(source, generated=args.data is None)
                run = run_labels
            if args.passes is not None:
                plan = dataclasses.replace(plan, max_passes=args.passes)
            sections.append(run(source, plan, **common))
    made = report.Report(sections, _header(args, time.perf_counter() - started))
    report.show(made, console)
    if args.out is not None:
        for path in report.write(made, args.out):
            console.print(f"wrote {path}", highlight=False)


def _header(args: argparse.Namespace, seconds: float) -> dict[str, str]:
    from .. import show_config

    config = [" ".join(line.split()) for line in show_config().splitlines()]
    return {
        "data": str(args.data) if args.data is not None else "generated",
        "seed": str(args.seed),
        "seconds": f"{seconds:.0f}",
        "configuration": "; ".join(config),
    }
