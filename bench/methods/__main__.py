"""`python -m bench.methods NAME [options]`: every module of this folder with a `run` is a NAME."""

import argparse
import importlib
import os
import pkgutil
import sys
from pathlib import Path

from . import __path__ as folder
from .session import Session

DATA = Path(os.environ.get("RECSPARSE_DATA", "data"))


def commands() -> dict:
    """NAME -> module with ``HELP``, ``add_arguments(parser)`` and ``run(args, session)``."""
    names = [m.name for m in pkgutil.iter_modules(folder) if not m.name.startswith("_")]
    modules = {name: importlib.import_module(f"{__package__}.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "run")}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.methods", description=__doc__)
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    found = commands()
    for name, module in found.items():
        sub = names.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("--data", type=Path, default=DATA, help="folder that holds the data sets' folders")
        sub.add_argument("--out", type=Path, help="default: bench/results/methods/NAME")
        sub.add_argument("--seeds", type=_seeds, default=(0, 1, 2), metavar="0,1,2")
        sub.add_argument("--fresh", action="store_true", help="start over: forget lines and checkpoints")
        sub.add_argument("--threads", type=int, help="of torch")
        module.add_arguments(sub)
    args = parser.parse_args(arguments)
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    out = args.out or Path(__file__).parent.parent / "results" / "methods" / args.name
    try:
        with Session(args.name, out, fresh=args.fresh) as session:
            found[args.name].run(args, session)
    except FileNotFoundError as error:
        of_data = error.filename is not None and Path(error.filename).is_relative_to(args.data)
        if not of_data and "--data" not in str(error):
            raise
        parser.error(f"--data {args.data}: {error}" if of_data else str(error))
    return 0


def _seeds(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
