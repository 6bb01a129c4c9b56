"""The op calls that the tests make, recorded on the CPU and made again on a GPU.

    python -m bench.gpu_cases record FILE                    runs tests/ops on the reference and keeps its calls;
                                                             needs no GPU
    python -m bench.gpu_cases replay FILE --backend native   makes them on the GPU and compares

A GPU so gets every case that the tests have, without a second set of tests. As there, a kernel may err at
most twice as much as the reference does in the working dtype.
"""

import argparse
import collections
import hashlib
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from recsparse_kernels.ops._backend import NATIVE_DTYPES, OBSERVERS, OPS
from recsparse_kernels.testing import assert_close, load_cuda_on_cpu

from .processes import Lines

ROOT = Path(__file__).parents[1]
MOST_OF_AN_OP = 300  # calls; the tests make some ops' calls by the thousand
MOST_BYTES = 1 << 22  # of a call's tensors
# The tests whose calls are recorded. What compiles or exports calls nothing that others do not.
SELECT = "reference and not compile and not export and not opcheck"
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
    """An observer of `recsparse_kernels.ops._backend` that keeps one call of each kind.

    Equal tensors are kept once: tests give the same layer to many ops, and the file has to travel.
    """

    def __init__(self):
        self.calls: Calls = collections.defaultdict(list)
        self._seen = set()
        self._kept: dict[tuple, Tensor] = {}

    def __call__(self, op, args, backend, asked) -> None:
        device, dtype = op.device_and_dtype(args)
        kind = (op.name, _signature(args))
        mine = self.calls[op.name]
        if device != "cpu" or dtype not in NATIVE_DTYPES or kind in self._seen or len(mine) >= MOST_OF_AN_OP:
            return
        if sum(t.nbytes for t in tensors_of(args)) > MOST_BYTES:
            return
        self._seen.add(kind)
        mine.append(_map(tuple(args), self._keep))

    def _keep(self, tensor: Tensor) -> Tensor:
        own = tensor.detach().clone()
        dense = torch.empty(own.shape, dtype=own.dtype).copy_(own)  # contiguous: its bytes can be viewed
        content = hashlib.sha256(dense.view(-1).view(torch.uint8).numpy()).digest()
        return self._kept.setdefault((*_signature(own), content), own)


class _Until:
    """A pytest plugin: no test begins after the time."""

    def __init__(self, end: float):
        self.end = end

    def pytest_runtest_teardown(self, item) -> None:
        if time.monotonic() > self.end:
            item.session.shouldstop = "out of time"


def record(paths: Sequence[str | Path], select: str = SELECT, seconds: float = float("inf")) -> Calls:
    """Calls of the tests in ``paths`` that pytest's ``-k select`` takes, of those too that fail here."""
    import pytest

    recorder = Recorder()
    OBSERVERS.append(recorder)
    try:
        arguments = ["-q", "-p", "no:cacheprovider", "-k", select, *map(str, paths)]
        status = pytest.main(arguments, plugins=[_Until(time.monotonic() + seconds)])
    finally:
        OBSERVERS.remove(recorder)
    if status not in (0, 5):
        print(f"some of the tests that are recorded fail (pytest's status {int(status)})", file=sys.stderr)
    return {name: calls for name, calls in recorder.calls.items() if calls}


def record_apart(paths: Sequence[Path], select: str, seconds: float, jobs: int) -> Calls:
    """The same, each file of tests in a process of its own, so many at once."""

    def one(path: Path) -> Calls:
        file = Path(folder) / f"{path.stem}.pt"
        command = [sys.executable, "-m", "bench.gpu_cases", "record", str(file), "--tests", str(path)]
        command += ["--select", select, "--seconds", str(seconds)]
        subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "2"})
        return torch.load(file, weights_only=False) if file.exists() else {}

    every: Calls = collections.defaultdict(list)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        for calls in pool.map(one, paths):
            for name, mine in calls.items():
                every[name] += mine
    return {name: calls[:MOST_OF_AN_OP] for name, calls in every.items()}


def _run(op, backend: str, args: tuple) -> list[Tensor]:
    """Results, and after them the arguments that the op writes to."""
    result = list(tensors_of(op.overload(backend)(*args)))
    schema = op.overload("reference")._schema.arguments
    for argument, value in zip(schema, args, strict=False):
        if argument.name in op.mutates:
            result += tensors_of(value)
    return result


class Refused(Exception):
    """The definition raises for these arguments: there is nothing to compare, and a GPU would assert."""


def replay(name: str, args: tuple, backend: str, device: str) -> None:
    """Makes one recorded call and compares.

    Raises:
        AssertionError: the results differ by more than rounding explains.
        Refused: the call is one of a test of error messages.
    """
    op = OPS[name]
    with torch.no_grad():
        try:
            baseline = _run(op, "reference", _map(args, torch.clone))
        except Exception as error:
            raise Refused(str(error)) from error
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


def replay_op(
    name: str,
    every: list[tuple],
    backend: str,
    device: str,
    most: int | None = None,
    seconds: float = float("inf"),
) -> dict | None:
    """The op's calls on the backend, at most so many and for so long: cases, failures, the first failure.

    None: the backend has the op for none of them. Ends the process when a call has left the GPU unusable.
    """
    failures, first, cases, end = 0, "", 0, time.monotonic() + seconds
    for args in random.Random(0).sample(every, len(every))[:most]:  # those that there is time for differ
        if cases and time.monotonic() > end:
            break
        dtype = OPS[name].device_and_dtype(args)[1]
        if backend not in OPS[name].backends(device, dtype):
            continue
        try:
            replay(name, args, backend, device)
        except Refused:
            continue
        except Exception as error:
            failures += 1
            first = first or f"{type(error).__name__}: {error}"[:500]
            _end_if_unusable(device, f"{name} on {backend}: {error}\n{_signature(args)}")
        cases += 1
    if not cases:
        return None
    return dict(op=name, backend=backend, cases=cases, of=len(every), failures=failures, first=first)


def _end_if_unusable(device: str, what: str) -> None:
    """A GPU's own errors stay: nothing works after them in this process."""
    if device != "cuda":
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"{what[-1500:]}\n{error}", flush=True)
        os._exit(3)


def replay_all(calls: Calls, backend: str, device: str, most: int | None = None) -> list[dict]:
    """One line for each op that the backend has on the device."""
    lines = (replay_op(name, every, backend, device, most) for name, every in sorted(calls.items()))
    return [line for line in lines if line]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["record", "replay"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--backend", default="native")
    parser.add_argument("--device", default="cuda", help="cpu: the CUDA kernels run on the CPU")
    parser.add_argument("--most", type=int, help="calls of each op")
    parser.add_argument(
        "--seconds",
        type=float,
        default=float("inf"),
        help="replay: for each op; record: for each file of tests",
    )
    parser.add_argument("--ops", help="comma-separated; default: all")
    parser.add_argument("--lines", type=Path, help="write what is found there, as it comes")
    parser.add_argument("--select", default=SELECT, help="record: pytest's -k")
    parser.add_argument(
        "--tests", type=Path, nargs="+", help="record: these files; default: all of tests/ops"
    )
    parser.add_argument("--jobs", type=int, default=1, help="record: processes at once")
    args = parser.parse_args(argv)
    if args.command == "record":
        tests = [test.resolve() for test in args.tests or []] or sorted(
            (ROOT / "tests" / "ops").glob("test_*.py")
        )
        if args.jobs > 1:
            calls = record_apart(tests, args.select, args.seconds, args.jobs)
        else:
            calls = record(tests, args.select, args.seconds)
        torch.save(calls, args.file)
        print(f"{sum(map(len, calls.values()))} calls of {len(calls)} ops")
        return int(not calls)
    if args.device == "cpu" and not load_cuda_on_cpu(ROOT / "tests" / "native" / "_cuda_on_cpu.so"):
        print("tests/native/_cuda_on_cpu.so is not built (make test)", file=sys.stderr)
        return 2
    # new memory is filled with NaN, as in the tests: an element never written is found
    warnings.filterwarnings("ignore", message=".*deterministic")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    calls = torch.load(args.file, weights_only=False)
    lines, out = [], Lines(args.lines or Path(os.devnull))
    for name in out.each(args.ops.split(",") if args.ops else sorted(calls)):
        line = replay_op(name, calls[name], args.backend, args.device, args.most, args.seconds)
        if line:
            lines.append(line)
            out.write(line)
            print(
                f"{name:<50} {line['cases']:5} cases, {line['failures']} failures {line['first']}", flush=True
            )
    return int(any(line["failures"] for line in lines) or not lines)


if __name__ == "__main__":
    sys.exit(main())
