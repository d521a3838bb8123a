"""Printing results: tables for people, one JSON document for programs. Both go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

PLAIN_WIDTH = 140
"""Columns where stdout is not a terminal: wide enough that tables are not wrapped in a log."""


def print_json(document: Any) -> None:
    """The one document of --json."""
    sys.stdout.write(json.dumps(document, indent=2, allow_nan=False, default=str) + "\n")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table; its first column is text, numbers line up on the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
    for index, name in enumerate(columns):
        numeric = index > 0 and all(_is_number(row[index]) for row in rows) and bool(rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)


def print_text(text: str) -> None:
    sys.stdout.write(text + "\n")


def _is_number(cell: str) -> bool:
    return all(character in "0123456789.,-+%[] e/" for character in cell)
