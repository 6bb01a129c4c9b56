"""The newest figures of bench/results as one Markdown table: `python -m bench.summary [FILE]`."""

import json
import sys
from pathlib import Path

from .harness import RESULTS


def newest(path: Path) -> dict[tuple, dict[str, dict]]:
    """(op, passes, shape, dtype) -> backend -> line; a later line of the file replaces an earlier one."""
    cases: dict[tuple, dict[str, dict]] = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        cases.setdefault((line["op"], line["passes"], line["shape"], line["dtype"]), {})[line["backend"]] = (
            line
        )
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


if __name__ == "__main__":
    paths = [Path(argument) for argument in sys.argv[1:]] or sorted(RESULTS.glob("*.jsonl"))
    for path in paths:
        print(f"{path.stem}\n\n{table(path)}\n")
