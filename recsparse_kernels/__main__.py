"""Command line: ``python -m recsparse_kernels info | demo | bench | advise``."""

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from torch import nn

from . import microbench
from .advise import advise
from .config import show_config


def main(argv: list[str] | None = None) -> int:
    """Run a command; the exit status. What the user can mend is said in one line, not in a traceback."""
    parser = argparse.ArgumentParser(prog="python -m recsparse_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="versions, libraries and why one is missing")
    info.set_defaults(run=lambda args: print(show_config()) or 0)

    demo = commands.add_parser("demo", help="train, swap and compare on a click log and a label set")
    try:
        from . import demo as demo_package
    except ImportError as error:  # scikit-learn, matplotlib: the "demo" extra
        reason = str(error)

        def missing(args: argparse.Namespace) -> int:
            raise ValueError(f"demo needs pip install recsparse_kernels[demo]: {reason}")

        demo.set_defaults(run=missing)
    else:
        demo_package.add_arguments(demo)
        demo.set_defaults(run=demo_package.main)

    bench = commands.add_parser("bench", help="each family against its dense torch layer, in a minute")
    microbench.add_arguments(bench)
    bench.set_defaults(run=microbench.main)

    advice = commands.add_parser("advise", help="measure a model's layers here and propose what to swap")
    _add_advise_arguments(advice)
    advice.set_defaults(run=_advise)

    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, TypeError, OSError) as error:
        print(f"{parser.prog} {args.command}: {error}", file=sys.stderr)
        return 2


def _add_advise_arguments(parser: argparse.ArgumentParser) -> None:
    def add(name: str, text: str, **options: Any) -> None:
        parser.add_argument(name, help=text, **options)

    add("model", "module:factory or file.py:factory; it returns the model, or (model, sample input)")
    add("--sample", "module:factory of the sample input, when the model's factory gives none")
    add("--memory", "memory budget: up to 1 a fraction of the model, above 1 bytes", type=float)
    add("--max-error", "largest relative output error of a layer, before fine-tuning", type=float)
    add("--allow-slower", "also propose what saves memory alone", action="store_true")
    add("--include", "name pattern; may be given again", action="append")
    add("--exclude", "name pattern; may be given again", action="append")
    add("--all", "show all that was measured", action="store_true")


def _advise(args: argparse.Namespace) -> int:
    model = load_object(args.model)()
    sample = load_object(args.sample)() if args.sample else None
    if isinstance(model, tuple) and len(model) == 2 and sample is None:
        model, sample = model
    if not isinstance(model, nn.Module):
        raise TypeError(f"{args.model} must return a torch.nn.Module; got {type(model).__name__}")
    if sample is None:
        raise ValueError(f"{args.model} returned no sample input: return (model, sample), or give --sample")
    budget = None if args.memory is None else (args.memory if args.memory <= 1 else int(args.memory))
    advice = advise(
        model, sample, memory_budget=budget, max_error=args.max_error, allow_slower=args.allow_slower,
        include=args.include, exclude=args.exclude,
    )  # fmt: skip
    advice.show(every=args.all)
    print(advice.code())
    return 0


def load_object(spec: str) -> Any:
    """The object that "package.module:name" or "path/to/file.py:name" stands for.

    Raises:
        ValueError: the text has no colon, or there is no such module or name.
    """
    module_name, separator, name = spec.rpartition(":")
    if not separator or not module_name or not name:
        raise ValueError(f"{spec!r} must be module:name or file.py:name")
    if module_name.endswith(".py"):
        path = Path(module_name)
        if not path.is_file():
            raise ValueError(f"{spec!r}: there is no file {module_name}")
        found = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(found)
        sys.modules[path.stem] = module
        found.loader.exec_module(module)
    else:
        sys.path.insert(0, str(Path.cwd()))
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise ValueError(f"{spec!r}: {error}") from error
        finally:
            sys.path.pop(0)
    if not hasattr(module, name):
        raise ValueError(f"{spec!r}: {module_name} has no {name}")
    return getattr(module, name)


if __name__ == "__main__":
    sys.exit(main())
