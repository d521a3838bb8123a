"""The committed tables are what the committed records say."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from dinobench.tables.cells import collect
from dinobench.tables.contents import Contents, fill
from dinobench.tables.definition import load_table, table_names
from dinobench.tables.drawing import SUFFIXES
from dinobench.tables.listing import index
from dinobench.tables.records import RecordStore
from dinobench.tables.writing import SUFFIXES as TEXTS
from dinobench.tables.writing import texts

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "results" / "tables" / "digits"
STALE = "stale: run `dinobench table --scale digits` (it trains what is missing), or edit no table by hand"


@pytest.fixture(scope="module")
def filled() -> dict[str, Contents]:
    every = [load_table(name) for name in table_names()]
    cells = collect(every, "digits")
    records = RecordStore(ROOT / "results")
    return {table.name: fill(table, cells, records) for table in every}


@pytest.mark.parametrize("name", table_names())
def test_a_committed_table_regenerates_byte_for_byte(name: str, filled: dict[str, Contents]) -> None:
    contents = filled[name]
    found = {path.suffix: path for path in FOLDER.glob(f"{name}.*")}
    if not contents.lines or not contents.columns:
        assert found == {}
        return
    for suffix, text in texts(contents, FOLDER).items():
        assert found[suffix].read_bytes().decode() == text, f"{found[suffix].name} is {STALE}"


@pytest.mark.parametrize("name", table_names())
def test_a_table_with_records_has_its_pictures(name: str, filled: dict[str, Contents]) -> None:
    expected = set(SUFFIXES) if filled[name].num_records else set()
    assert {path.suffix for path in FOLDER.glob(f"{name}.*")} - set(TEXTS) == expected


def test_the_index_regenerates_byte_for_byte(filled: dict[str, Contents]) -> None:
    assert (FOLDER / "README.md").read_text("utf-8") == index(list(filled.values())), f"README.md is {STALE}"


def test_no_file_of_a_table_that_is_gone_is_left() -> None:
    assert {path.stem for path in FOLDER.iterdir()} - {"README"} <= set(table_names())


def test_every_receipt_of_a_committed_table_is_a_committed_file() -> None:
    receipts = set()
    for file in FOLDER.glob("*.csv"):
        with file.open(newline="") as opened:
            receipts |= {
                (FOLDER / path).resolve() for row in csv.DictReader(opened) for path in row["receipts"].split()
            }
    assert len(receipts) >= 61
    assert all(path.is_file() for path in receipts)
