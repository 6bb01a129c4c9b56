"""The table on the terminal, report.md, report.json and the picture."""

import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path

from .results import INFERENCE_BATCHES, Row, Section


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
    return {
        **report.header,
        "sections": [
            {**dataclasses.asdict(section), "rows": [dataclasses.asdict(row) for row in section.rows]}
            for section in report.sections
        ],
    }


def as_markdown(report: Report) -> str:
    lines = ["# recsparse_kernels demo", ""]
    lines += [f"- {key}: {value}" for key, value in report.header.items()]
    for section in report.sections:
        columns, rows = table(section)
        lines += ["", f"## {section.title}", ""]
        lines += [f"- {line}" for line in section.description]
        lines += [f"- {name}: {value:.4f}" for name, value in section.extra.items()]
        lines += ["", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        lines += ["| " + " | ".join(cell.replace("\n", "<br>") for cell in row) + " |" for row in rows]
        lines += ["", legend(section), ""]
        for row in section.rows:
            if row.swapped:
                lines += [f"{row.model}:", "", *(f"- {line}" for line in row.swapped), ""]
    lines += ["![accuracy against bytes, and speed](report.png)", ""]
    return "\n".join(lines)


def legend(section: Section) -> str:
    small = "In brackets: share of dense bytes, speed as a multiple of dense (above 1 is faster than dense)."
    times = f"Step: forward, backward, update at batch {section.batch}. Times: medians, models taking turns."
    if section.kind == "clicks":
        error = "± is one standard error over test rows; of the difference to dense, that of the paired one."
        return f"{error} {small} {times}"
    return f"± is one standard error over test rows. Inference asks for the top 5 labels. {small} {times}"


def table(section: Section) -> tuple[list[str], list[list[str]]]:
    """Column names and cells; a cell's second line is the ratio to dense."""
    accuracy = ["AUC", "against dense", "logloss"] if section.kind == "clicks" else ["P@1", "P@3", "P@5"]
    if section.kind == "labels" and section.rows[0].labels.recall is not None:
        accuracy += ["Recall@20", "NDCG@20"]
    columns = ["model", *accuracy, "parameters", "optimizer", "training step"]
    columns += [f"batch {size}" for size in INFERENCE_BATCHES]
    dense = section.rows[0]
    return columns, [[row.model, *_accuracy(row), *_costs(row, dense)] for row in section.rows]


def _accuracy(row: Row) -> list[str]:
    if row.clicks is not None:
        m = row.clicks
        gain = "" if m.auc_gain_error == 0 else f"{m.auc_gain:+.4f}\n± {m.auc_gain_error:.4f}"
        return [f"{m.auc:.4f}\n± {m.auc_error:.4f}", gain, f"{m.logloss:.4f}\n± {m.logloss_error:.4f}"]
    m = row.labels
    cells = [f"{100 * value:.2f}" for value in m.precision.values()]
    cells[0] += f"\n± {100 * m.precision_error:.2f}"
    return cells if m.recall is None else [*cells, f"{m.recall:.4f}", f"{m.ndcg:.4f}"]


def _costs(row: Row, dense: Row) -> list[str]:
    def of(own: int, base: int) -> str:
        return f"{_bytes(own)}\n({own / base:.2f})" if base else _bytes(own)

    cells = [of(row.parameter_bytes, dense.parameter_bytes), of(row.optimizer_bytes, dense.optimizer_bytes)]
    times = [(row.step, dense.step)] + [
        (row.inference[size], dense.inference[size]) for size in INFERENCE_BATCHES
    ]
    return cells + [f"{_ms(own.p50_ms)}\n({base.p50_ms / own.p50_ms:.2f}x)" for own, base in times]


def _bytes(count: int) -> str:
    return f"{count / 2**20:.2f} MiB" if count < 100 * 2**20 else f"{count / 2**20:.0f} MiB"


def _ms(value: float) -> str:
    return f"{value:.3f} ms" if value < 10 else f"{value:.1f} ms"


def show(report: Report, console) -> None:
    """Print the table: one, with a part for each section."""
    from rich.table import Table

    for section in report.sections:
        columns, rows = table(section)
        shown = Table(title=section.title, caption=legend(section), show_lines=True, title_justify="left",
                      caption_justify="left")  # fmt: skip
        for column in columns:
            shown.add_column(
                column, justify="left" if column == "model" else "right", no_wrap=column != "model"
            )
        for row in rows:
            shown.add_row(*row)
        console.print(shown)
        for name, value in section.extra.items():
            console.print(f"  {name}: {value:.4f}", highlight=False)


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
    panel.xaxis.set_minor_formatter("{x:.4g}")
    panel.xaxis.set_major_formatter("{x:.4g}")
    panel.tick_params(axis="x", which="both", labelsize=8)
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
        panel.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
    panel.axhline(1.0, color="black", linewidth=1)
    panel.annotate(
        "dense", (len(groups) - 0.55, 1.0), xytext=(0, 3), textcoords="offset points", fontsize=8, ha="right"
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
