"""The op calls that the tests make, recorded on the CPU and made again on a GPU.

    python -m bench.gpu_cases record FILE                    runs tests/ops on the reference and keeps its calls
    python -m bench.gpu_cases replay FILE --backend native   makes them on the GPU and compares

A GPU so gets every case that the tests have, without a second set of tests. As there, a kernel may err at
most twice as much as the reference does in the working dtype.
"""

import argparse
import collections
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from recsparse_kernels.ops._backend import NATIVE_DTYPES, OBSERVERS, OPS
from recsparse_kernels.testing import assert_close

ROOT = Path(__file__).parents[1]
MOST_OF_AN_OP = 300  # calls; the tests make some ops' calls by the thousand
MOST_BYTES = 1 << 22  # of a call's tensors
# Integers that are only one of several right answers (equal scores); their floats are compared.
ANY_OF_EQUALS = {"fan_in_topk"}

Calls = dict[str, list[tuple]]


def _signature(value) -> object:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(_signature(v) for v in value)
    return repr(value)


def tensors_of(value) -> Iterator[Tensor]:
    """The tensors of an argument list or of a result, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from tensors_of(v)


def _map(value, function):
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_map(v, function) for v in value)
    return value


class Recorder:
    """An observer of `recsparse_kernels.ops._backend` that keeps one call of each kind."""

    def __init__(self):
        self.calls: Calls = collections.defaultdict(list)
        self._seen = set()

    def __call__(self, op, args, backend, asked) -> None:
        device, dtype = op.device_and_dtype(args)
        kind = (op.name, _signature(args))
        mine = self.calls[op.name]
        if device != "cpu" or dtype not in NATIVE_DTYPES or kind in self._seen or len(mine) >= MOST_OF_AN_OP:
            return
        if sum(t.nbytes for t in tensors_of(args)) > MOST_BYTES:
            return
        self._seen.add(kind)
        mine.append(_map(tuple(args), lambda t: t.detach().clone()))


def record(paths: tuple[str, ...] = ("tests/ops",), select: str = "reference") -> Calls:
    """Calls of the tests under ``paths`` whose names contain ``select``."""
    import pytest

    recorder = Recorder()
    OBSERVERS.append(recorder)
    try:
        arguments = ["-q", "-p", "no:cacheprovider", "-k", select, *(str(ROOT / p) for p in paths)]
        status = pytest.main(arguments)
    finally:
        OBSERVERS.remove(recorder)
    if status not in (0, 5):
        raise RuntimeError(f"the tests that are recorded fail (pytest's status {int(status)})")
    return {name: calls for name, calls in recorder.calls.items() if calls}


def _run(op, backend: str, args: tuple) -> list[Tensor]:
    """Results, and after them the arguments that the op writes to."""
    result = list(tensors_of(op.overload(backend)(*args)))
    schema = op.overload("reference")._schema.arguments
    for argument, value in zip(schema, args, strict=False):
        if argument.name in op.mutates:
            result += tensors_of(value)
    return result


def replay(name: str, args: tuple, backend: str, device: str) -> None:
    """Makes one recorded call and compares.

    Raises:
        AssertionError: the results differ by more than rounding explains.
    """
    op = OPS[name]
    with torch.no_grad():
        baseline = _run(op, "reference", _map(args, torch.clone))
        try:
            wide = _map(args, lambda t: t.double() if t.is_floating_point() else t.clone())
            exact = _run(op, "reference", wide)
        except (RuntimeError, TypeError, ValueError):  # bit patterns of another dtype: no wider form
            exact = baseline
        actual = _run(op, backend, _map(args, lambda t: t.to(device, copy=True)))
    assert len(actual) == len(baseline)
    for n, (a, e, b) in enumerate(zip(actual, exact, baseline, strict=True)):
        a = a.cpu()
        if a.is_floating_point():
            assert_close(f"{name}, tensor {n}", a, e, b)
        elif name not in ANY_OF_EQUALS:
            assert torch.equal(a, b.to(a.dtype)), f"{name}, tensor {n}: integers differ"


def replay_all(calls: Calls, backend: str, device: str, most: int | None = None) -> list[dict]:
    """One line for each op that the backend has on the device: cases, failures, the first failure."""
    lines = []
    for name, every in sorted(calls.items()):
        failures, first, cases = 0, "", 0
        for args in every[:most]:
            dtype = OPS[name].device_and_dtype(args)[1]
            if backend not in OPS[name].backends(device, dtype):
                continue
            cases += 1
            try:
                replay(name, args, backend, device)
            except (AssertionError, RuntimeError) as error:
                failures += 1
                first = first or str(error).splitlines()[0]
        if cases:
            lines.append(dict(op=name, backend=backend, cases=cases, failures=failures, first=first))
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["record", "replay"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--backend", default="native")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--most", type=int, help="calls of each op")
    parser.add_argument("--select", default="reference", help="record: pytest's -k")
    args = parser.parse_args(argv)
    if args.command == "record":
        calls = record(select=args.select)
        torch.save(calls, args.file)
        print(f"{sum(map(len, calls.values()))} calls of {len(calls)} ops")
        return 0
    calls = torch.load(args.file, weights_only=False)
    lines = replay_all(calls, args.backend, args.device, args.most)
    for line in lines:
        print(f"{line['op']:<50} {line['cases']:5} cases, {line['failures']} failures {line['first']}")
    return int(any(line["failures"] for line in lines) or not lines)


if __name__ == "__main__":
    sys.exit(main())
