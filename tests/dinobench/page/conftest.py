"""A small results folder as `dinobench table` leaves it, and HTML taken apart."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[3] / "results"
VOID = {"meta", "link", "img", "br", "hr"}


@dataclass
class Table:
    """The heads and the text of the cells of a table."""

    heads: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)

    def row(self, first: str) -> dict[str, str]:
        """A row by its first cell: head -> text."""
        (found,) = [row for row in self.rows if row[0] == first]
        return dict(zip(self.heads, found, strict=True))


class Parsed(HTMLParser):
    """Every element with its attributes, every table, and the text outside style and script."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.inside: list[str] = []
        self.tables: list[Table] = []
        self.text, self.style, self.script = "", "", ""
        self.feed(html)
        self.close()
        assert self.inside == []  # whatever was opened was closed

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.inside.append(tag)
        if tag == "table":
            self.tables.append(Table())
        elif tag == "tr" and "tbody" in self.inside:
            self.tables[-1].rows.append([])
        elif tag in ("th", "td"):
            self._cells().append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)  # HTML does not know <tag/>: it opens

    def handle_endtag(self, tag: str) -> None:
        assert self.inside.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.inside and self.inside[-1] in ("style", "script"):
            setattr(self, self.inside[-1], getattr(self, self.inside[-1]) + data)
            return
        self.text += data
        if {"th", "td"} & set(self.inside):
            self._cells()[-1] += data

    def _cells(self) -> list[str]:
        return self.tables[-1].rows[-1] if "tbody" in self.inside else self.tables[-1].heads

    def table(self, *heads: str) -> Table:
        """The only table that has these columns."""
        (found,) = [table for table in self.tables if set(heads) <= set(table.heads)]
        return found

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def figures(self) -> list[bytes]:
        """The content of every picture."""
        return [base64.b64decode(attributes["src"].partition(";base64,")[2]) for attributes in self.all("img")]


@pytest.fixture(scope="session")
def parse() -> Callable[[str], Parsed]:
    return Parsed


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part of the committed results: DINO's Table 7 and some of the records behind it."""
    folder = tmp_path_factory.mktemp("committed") / "results"
    names = ["tables/README.md", *(f"tables/digits/dino_table7.{suffix}" for suffix in ("md", "csv", "png", "tex"))]
    names += [f"digits/records/{name}.json" for name in ("baselines", "dino-s0", "dino-s1", "byol-s0")]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(RESULTS / name, folder / name)
    return folder
