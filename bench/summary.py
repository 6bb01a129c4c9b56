"""The newest figures of bench/results as one Markdown table: `python -m bench.summary [FILE]`."""

import json
import sys
from pathlib import Path

from .harness import RESULTS


def lines_of(path: Path) -> list[dict]:
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


def newest(path: Path) -> dict[tuple, dict[str, dict]]:
    """(op, passes, shape, dtype) -> backend -> line; a later line of the file replaces an earlier one."""
    cases: dict[tuple, dict[str, dict]] = {}
    for line in lines_of(path):
        if "passes" in line:  # not of bench.gpu
            case = line["op"], line["passes"], line["shape"], line["dtype"]
            cases.setdefault(case, {})[line["backend"]] = line
    return cases


def table(path: Path) -> str:
    """Rows: op, passes, shape, dtype, ours against dense (with the spread of ours), best peer."""
    rows = ["| op | passes | shape | dtype | ours / dense | spread | best peer / dense |", "|" + " --- |" * 7]
    for (op, passes, shape, dtype), lines in newest(path).items():
        ours = [line for name, line in lines.items() if name.startswith("ours")]
        if not ours:
            continue
        first = ours[0]  # the form the bench names first: the spread is its
        scale = first["speedup_over_dense"] * first["p50_ms"]
        spread = f"{scale / first['p80_ms']:.2f}-{scale / first['p20_ms']:.2f}"
        peers = [
            line
            for name, line in lines.items()
            if not name.startswith("ours") and abs(line["speedup_over_dense"] - 1) > 1e-9
        ]
        peer = max(peers, key=lambda line: line["speedup_over_dense"], default=None)
        peer_text = f"{peer['speedup_over_dense']:.2f}x {peer['backend']}" if peer else ""
        forms = [
            (line["backend"].removeprefix("ours").lstrip("-"), line["speedup_over_dense"]) for line in ours
        ]
        speedup = ", ".join(f"{ratio:.2f}x" + (f" {form}" if form else "") for form, ratio in forms)
        rows.append(f"| {op} | {passes} | {shape} | {dtype} | {speedup} | {spread} | {peer_text} |")
    return "\n".join(rows)


def gpu_checks(path: Path) -> str:
    """What bench.gpu has checked: cases of ops by backend, and each check that failed."""
    found: dict[tuple, dict] = {}
    for line in lines_of(path):
        if "check" in line:
            found[line["check"], line.get("op"), line.get("backend")] = line
    out, ops = [], [line for line in found.values() if "cases" in line]
    for backend in sorted({line["backend"] for line in ops}):
        own = [line for line in ops if line["backend"] == backend]
        cases, of, failures = (sum(line[key] for line in own) for key in ("cases", "of", "failures"))
        out.append(f"- {backend}: {len(own)} ops, {cases} of {of} cases, {failures} failures")
        out += [f"  - {line['op']}: {line['failures']}, {line['first']}" for line in own if line["failures"]]
    for (check, *_), line in found.items():
        if "passed" in line:
            out.append(f"- {check}: {'passed' if line['passed'] else 'FAILED: ' + line['tail'][-200:]}")
    return "\n".join(out)


def gpu_table(path: Path) -> str:
    """The benches of bench.gpu: for each case the dense op, CUDA C++, Triton and the peers side by side.

    "calls" are timed as they are made, "graph" are many in a CUDA graph: without what Python takes.
    """
    cases: dict[tuple, dict[str, dict]] = {}
    for line in lines_of(path):
        if "bench" in line and "backend" in line:
            case = line["bench"], line["shape"], "graph" if line.get("graph") else "calls"
            cases.setdefault(case, {})[line["backend"]] = line
    heads = ["bench", "shape", "timed", "dense", "CUDA", "Triton", "others"]
    rows = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for case, lines in cases.items():
        cells: dict[str, list[str]] = {head: [] for head in heads[3:]}
        for name, line in lines.items():
            column = next(
                (c for c, own in (("CUDA", "ours-native"), ("Triton", "ours-triton")) if own in name), ""
            )
            if name == line.get("dense") and not column:
                column = "dense"
            shown = name.removeprefix("ours-native").removeprefix("ours-triton").strip("- ")
            cells[column or "others"].append(" ".join([shown, *_figures(line)]).strip())
        rows.append("| " + " | ".join([*case, *("<br>".join(own) for own in cells.values())]) + " |")
    return "\n".join(rows)


def _figures(line: dict) -> list[str]:
    if "missing" in line:
        return [f"({line['missing'].splitlines()[0][:60]})"]
    if "peak_gib" in line:
        return [f"{line['peak_gib']:.2f} GiB"]
    out = [f"{line['p50_ms']:.4g} ms"]
    if line["speedup_over_dense"] and line["backend"] != line["dense"]:
        out.insert(0, f"{line['speedup_over_dense']:.2f}x")
    if line["gb_per_s"]:
        out.append(f"{line['gb_per_s']:.0f} GB/s")
    return out


def report(path: Path) -> str:
    """All that the file has."""
    found = lines_of(path)
    parts = [table(path)] if any("passes" in line for line in found) else []
    parts += [gpu_checks(path)] if any("check" in line for line in found) else []
    parts += [gpu_table(path)] if any("bench" in line for line in found) else []
    return "\n\n".join([path.stem, *parts])


if __name__ == "__main__":
    paths = [Path(argument) for argument in sys.argv[1:]] or sorted(RESULTS.glob("*.jsonl"))
    for path in paths:
        print(f"{report(path)}\n")
