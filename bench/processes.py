"""Named pieces of work in a process of their own: one that crashes or hangs does not take the others along.

A GPU's error ends every later call of its process, and a kernel that never ends cannot be interrupted. So a
process goes through the pieces in order and writes to a file, as they come, the lines of each piece and then
{"done": name}. If it dies, or says nothing for too long, the piece that it was at is to blame, and a new
process goes on behind it.
"""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

POLL_SECONDS = 0.2
START_SECONDS = 90  # to the first line, if that is more than what is allowed between lines
END_SECONDS = 20  # that a process which was killed is waited for
TAIL = 2000  # characters of what a process that died has printed


def run_each(
    command: Callable[[list[str], Path], Sequence[str]],
    names: Sequence[str],
    write: Callable[[dict], None],
    *,
    seconds: float,
    silent: float,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
) -> dict[str, str]:
    """Does the pieces of work ``names`` in as few processes as that takes.

    Args:
        command: (names, file) -> the command that does these pieces and writes their lines to the file.
        write: is called with each line.
        seconds: for all of them; what is left then is not begun.
        silent: seconds without a line after which a process is stopped.

    Returns:
        Why, for each name that was not done: what its process printed last, or that it was stopped.
    """
    end, left, failed = time.monotonic() + seconds, list(names), {}
    while left:
        remaining = end - time.monotonic()
        if remaining <= 0:
            return failed | dict.fromkeys(left, "out of time: not begun")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "lines.jsonl"
            done, why = _follow(command(left, file), file, write, remaining, silent, env, cwd)
        left = [name for name in left if name not in done]
        if left:
            failed[left[0]] = why
            left = left[1:]
    return failed


def _follow(command, file: Path, write, seconds: float, silent: float, env, cwd) -> tuple[set[str], str]:
    """One process to its end: the names it has done, and why it ended."""
    done: set[str] = set()
    file.touch()
    with tempfile.TemporaryFile("w+", errors="replace") as printed, open(file, encoding="utf-8") as lines:
        process = subprocess.Popen(
            command, stdout=printed, stderr=subprocess.STDOUT, env=env, cwd=cwd, start_new_session=True
        )
        stopped, begun = "", time.monotonic()
        last, rest, allowed = begun, "", max(silent, START_SECONDS)
        try:
            while True:
                running = process.poll() is None  # asked first: what it wrote before is read below
                rest += lines.read()
                *whole, rest = rest.split("\n")
                for line in map(json.loads, filter(None, whole)):
                    last, allowed = time.monotonic(), silent
                    if "done" in line:
                        done.add(line["done"])
                    else:
                        write(line)
                if not running:
                    break
                now = time.monotonic()
                if now - begun > seconds:
                    stopped = f"stopped: out of time after {now - begun:.0f} s"
                elif now - last > allowed:
                    stopped = f"stopped: nothing for {allowed:.0f} s"
                if stopped:
                    break
                time.sleep(POLL_SECONDS)
        finally:
            end_group(process)
        printed.seek(0)
        return done, stopped or f"ended with status {process.returncode}: {printed.read()[-TAIL:]}"


def end_group(process: subprocess.Popen) -> None:
    """Ends the process, which began a session of its own, and what it has started. A driver may hold on to one
    whose kernel hangs: it is not waited for long."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_SECONDS)


def run_side_by_side(
    command: Callable[[list[str], Path], Sequence[str]],
    names: Sequence[str],
    write: Callable[[dict], None],
    processes: int,
    **options,
) -> dict[str, str]:
    """`run_each` on so many shares of the names at once; ``write`` is called from threads."""
    shares = [names[n::processes] for n in range(processes) if names[n::processes]]
    with ThreadPoolExecutor(max(1, len(shares))) as pool:
        found = list(pool.map(lambda share: run_each(command, share, write, **options), shares))
    return {name: why for failed in found for name, why in failed.items()}


class Lines:
    """The other end: where a piece of work writes its lines."""

    def __init__(self, file: Path):
        self.file = file

    def write(self, line: dict) -> None:
        with open(self.file, "a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")

    def each(self, names: Sequence[str]) -> Iterator[str]:
        """The names in turn; each is done when the next is asked for."""
        for name in names:
            yield name
            self.write({"done": name})
