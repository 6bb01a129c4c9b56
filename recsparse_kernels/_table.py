"""Tables for people: drawn by rich where it is installed, plain text elsewhere."""

import dataclasses
import sys
from typing import Any


@dataclasses.dataclass
class Table:
    title: str
    columns: list[str]
    rows: list[list[str]]
    right: frozenset[int] = frozenset()  # columns of figures, set flush right
    notes: list[str] = dataclasses.field(default_factory=list)  # lines below the table

    def __str__(self) -> str:
        cells = [self.columns, *self.rows]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]

        def line(row):
            parts = [
                cell.rjust(width) if i in self.right else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            return "  ".join(parts).rstrip()

        lines = (
            [self.title, line(self.columns), line(["-" * width for width in widths])]
            if self.rows
            else [self.title]
        )
        return "\n".join([*lines, *(line(row) for row in self.rows), *self.notes])

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(title=Text(self.title), title_justify="left")
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="right" if i in self.right else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*(Text(cell) for cell in row))
        return Group(table, *(Text(note) for note in self.notes))

    def show(self) -> None:
        """Print, by rich where it is installed."""
        show(self)


def show(*tables: Table) -> None:
    """Print, by rich where it is installed and the output is a terminal or notebook."""
    console = rich_console()
    for table in tables:
        if console is not None:
            console.print(table)
        else:
            print(table)


def rich_console():
    """rich's console, or None: not installed, or the output is a file (which gets plain text)."""
    try:
        from rich.console import Console
    except ImportError:
        return None
    console = Console(file=sys.stdout)
    return console if console.is_terminal or console.is_jupyter else None


def bytes_text(count: int) -> str:
    """Bytes as people read them: 812 B, 12.5 KiB, 3.1 MiB."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def ratio_text(own: int, dense: int) -> str:
    return f"{own / dense:.3f}" if dense else "-"
