"""The table on the terminal, report.md, report.json and the picture."""

import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path

from .results import INFERENCE_BATCHES, TOP, Row, Section


@dataclasses.dataclass(frozen=True)
class Report:
    sections: list[Section]
    header: dict[str, str]  # machine, versions, command, seed


def check_out(out: Path) -> None:
    """That the folder can be written, before the work.

    Raises:
        ValueError: it is a file, or its place cannot be written to.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder; {out} is a file")
    place = out
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        raise ValueError(f"--out must be a folder that can be written; {place} cannot")


def write(report: Report, out: Path) -> list[Path]:
    """Write report.md, report.json and report.png: all of them, or none."""
    out.mkdir(parents=True, exist_ok=True)
    parts = Path(tempfile.mkdtemp(prefix=".report-", dir=out))
    try:
        (parts / "report.json").write_text(json.dumps(as_json(report), indent=1) + "\n", encoding="utf-8")
        (parts / "report.md").write_text(as_markdown(report), encoding="utf-8")
        draw(report, parts / "report.png")
        names = sorted(file.name for file in parts.iterdir())
        for name in names:
            os.replace(parts / name, out / name)
    finally:
        shutil.rmtree(parts, ignore_errors=True)
    return [out / name for name in names]


def as_json(report: Report) -> dict:
    return {**report.header, "sections": [dataclasses.asdict(section) for section in report.sections]}


def as_markdown(report: Report) -> str:
    columns = [name.replace("\n", " ") for name in column_names()]
    lines = ["# recsparse_kernels demo", ""]
    lines += [f"- {key}: {value}" for key, value in report.header.items()]
    lines += ["", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for section in report.sections:
        lines.append(f"| **{section.title}** " + "| " * (len(columns) - 1) + "|")
        rows = [[cell.replace("\n", "<br>") for cell in cells(row, section)] for row in section.rows]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", legend(report)]
    for section in report.sections:
        lines += ["", f"## {section.title}", ""]
        lines += [f"- {line}" for line in section.description]
        lines += [f"- {name}: {value:.4f}" for name, value in section.extra.items()]
        for row in section.rows:
            lines += ["", f"{row.model} (passes over the training rows: {row.passes})", ""]
            lines += [f"- {line}" for line in row.swapped]
    lines += ["", "![accuracy against bytes, and speed](report.png)", ""]
    return "\n".join(lines)


def legend(report: Report) -> str:
    batches = " and ".join(str(section.batch) for section in report.sections)
    return (
        "± is one standard error over test rows; of a difference to dense, that of the paired difference. "
        "In brackets: bytes as a share of dense, speed as a multiple of dense (above 1 is faster). "
        f"Step: forward, backward, update, at batch {batches}. Inference of many labels gives the top {TOP}. "
        "Times are medians, the models taking turns in one process."
    )


def column_names() -> list[str]:
    inference = [f"inference p50\nbatch {size}" for size in INFERENCE_BATCHES]
    return [
        "model",
        "AUC or P@1",
        "logloss or P@3, P@5",
        "parameters",
        "optimizer",
        "training\nstep",
        *inference,
    ]


def cells(row: Row, section: Section) -> list[str]:
    """One row of the table; below each figure its ratio to dense."""
    return [row.model, *_accuracy(row), *_costs(row, section.rows[0])]


def _accuracy(row: Row) -> list[str]:
    if row.clicks is not None:
        m = row.clicks
        auc = f"AUC {m.auc:.4f} ± {m.auc_error:.4f}"
        gain = f"\n({m.auc_gain:+.4f} ± {m.auc_gain_error:.4f})" if m.auc_gain_error else ""
        return [auc + gain, f"logloss {m.logloss:.4f}\n± {m.logloss_error:.4f}"]
    m = row.labels
    first, third, fifth = (100 * value for value in m.precision.values())
    best = f"P@1 {first:.2f} ± {100 * m.precision_error:.2f}"
    others = f"P@3 {third:.2f}, P@5 {fifth:.2f}"
    if m.recall is not None:
        best += f"\nRecall@20 {m.recall:.4f}"
        others += f"\nNDCG@20 {m.ndcg:.4f}"
    return [best, others]


def _costs(row: Row, dense: Row) -> list[str]:
    def of(own: int, base: int) -> str:
        return f"{_bytes(own)}\n({own / base:.2f})" if base else _bytes(own)

    costs = [of(row.parameter_bytes, dense.parameter_bytes), of(row.optimizer_bytes, dense.optimizer_bytes)]
    times = [(row.step, dense.step)] + [
        (row.inference[size], dense.inference[size]) for size in INFERENCE_BATCHES
    ]
    return costs + [f"{_ms(own.p50_ms)}\n({base.p50_ms / own.p50_ms:.2f}x)" for own, base in times]


def _bytes(count: int) -> str:
    return f"{count / 2**20:.2f} MiB" if count < 100 * 2**20 else f"{count / 2**20:.0f} MiB"


def _ms(value: float) -> str:
    return f"{value:.3f} ms" if value < 10 else f"{value:.1f} ms"


def show(report: Report, console) -> None:
    """Print the table."""
    from rich.table import Table

    shown = Table(caption=legend(report), caption_justify="left")
    for column in column_names():
        left = column in ("model", "AUC or P@1", "logloss or P@3, P@5")
        shown.add_column(column, justify="left" if left else "right")
    for section in report.sections:
        shown.add_row(f"[bold]{section.title}[/bold]", end_section=True)
        for row in section.rows:
            shown.add_row(*cells(row, section), end_section=True)
    console.print(shown)
    for section in report.sections:
        for name, value in section.extra.items():
            console.print(f"{name}: {value:.4f}", highlight=False)


def draw(report: Report, path: Path) -> None:
    """One row of panels a section: accuracy against bytes, and speed against dense."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count = len(report.sections)
    figure, panels = pyplot.subplots(
        count, 2, figsize=(13, 4.6 * count), squeeze=False, layout="constrained", width_ratios=(1, 1.3)
    )
    for section, (left, right) in zip(report.sections, panels, strict=True):
        _draw_accuracy(section, left)
        _draw_speed(section, right)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_accuracy(section: Section, panel) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    colors = _colors(section)
    for row, color in zip(section.rows, colors, strict=True):
        if row.clicks is not None:
            value, error = row.clicks.auc, row.clicks.auc_gain_error
        else:
            value, error = 100 * row.labels.precision[1], 100 * row.labels.precision_error
        size = (row.parameter_bytes + row.optimizer_bytes) / 2**20
        panel.errorbar(
            size, value, yerr=error, fmt="o", color=color, markersize=9, capsize=4, label=row.model
        )
    panel.set_xlabel("parameters and optimizer state, MiB (log scale)")
    panel.set_xscale("log")
    sizes = [(row.parameter_bytes + row.optimizer_bytes) / 2**20 for row in section.rows]
    panel.set_xlim(min(sizes) / 1.6, max(sizes) * 1.6)
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    panel.xaxis.set_major_formatter("{x:.4g}")
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_ylabel("AUC (bar: ± standard error of the difference to dense)" if section.kind == "clicks"
                     else "P@1, % (bar: ± standard error)", fontsize=9)  # fmt: skip
    panel.set_title(section.title, loc="left")
    panel.margins(y=0.2)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)


def _draw_speed(section: Section, panel) -> None:
    dense, others = section.rows[0], section.rows[1:]
    groups = ["training step", *(f"inference\nbatch {size}" for size in INFERENCE_BATCHES)]
    colors = _colors(section)[1:]
    width = 0.8 / max(len(others), 1)
    for i, (row, color) in enumerate(zip(others, colors, strict=True)):
        speeds = [dense.step.p50_ms / row.step.p50_ms]
        speeds += [dense.inference[size].p50_ms / row.inference[size].p50_ms for size in INFERENCE_BATCHES]
        places = [g - 0.4 + (i + 0.5) * width for g in range(len(groups))]
        bars = panel.bar(places, speeds, width * 0.92, color=color, label=row.model)
        back = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}  # over the line of dense
        panel.bar_label(bars, fmt="%.2f", fontsize=7, padding=2, bbox=back)
    panel.axhline(1.0, color="black", linewidth=1)
    panel.set_xlim(-0.55, len(groups) - 0.2)
    panel.annotate(
        "dense", (len(groups) - 0.22, 1.0), xytext=(0, 3), textcoords="offset points", fontsize=8, ha="right"
    )
    panel.set_xticks(range(len(groups)), groups)
    panel.set_ylabel("speed, times dense (higher is better)", fontsize=9)
    panel.set_title(f"speed, batch {section.batch} in training", loc="left")
    panel.margins(y=0.12)
    panel.grid(axis="y", alpha=0.3)
    panel.set_axisbelow(True)


def _colors(section: Section) -> list[str]:
    palette = ["#333333", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9"]
    return [palette[i % len(palette)] for i in range(len(section.rows))]
