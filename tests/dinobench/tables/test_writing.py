from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path

import pytest

from breaking import room
from dinobench.tables.cells import Cells
from dinobench.tables.contents import Contents, fill
from dinobench.tables.definition import Table
from dinobench.tables.drawing import draw, numbers
from dinobench.tables.listing import write_index
from dinobench.tables.records import RecordStore
from dinobench.tables.writing import comma_separated, escape, latex, markdown, write_table
from pretrain.errors import DinobenchError

FOLDER = Path("results/tables/digits")


@pytest.fixture
def contents(
    make_table: Callable[..., Table], cells_of: Callable[..., Cells], write_record: Callable, tmp_path: Path
) -> Contents:
    """DINO with three seeds, DINO-vMF with one, of five."""
    table = make_table()
    cells = cells_of(table)
    for label, scores in (("DINO", [90.0, 92.0, 94.0]), ("vMF", [95.25])):
        for cell, score in zip(cells.of("made", label), scores, strict=False):
            write_record(cell, {"digits_knn@1": {"top1": score}})
    return fill(table, cells, RecordStore(tmp_path / "results"))


def test_markdown_has_published_and_measured_side_by_side(contents: Contents, tmp_path: Path) -> None:
    page = markdown(contents, tmp_path / "results" / "tables" / "digits")
    receipts = " ".join(f"[s{seed}](../../digits/records/dino-s{seed}.json)" for seed in range(3))
    assert f"| DINO | 3 | 72.8 | 92.0 ± 2.0 | other scale: not comparable | {receipts} |" in page
    assert "| vMF | 1 |  | 95.2 [93.2, 97.2] |" in page
    assert "- DINO (2104.14294), Table 7: arXiv 2104.14294 full text" in page


def test_receipts_lead_to_files(contents: Contents, tmp_path: Path) -> None:
    folder = tmp_path / "results" / "tables" / "digits"
    write_table(contents, folder)
    with (folder / "made.csv").open(newline="") as file:
        receipts = [path for row in csv.DictReader(file) for path in row["receipts"].split()]
    assert len(receipts) == 4
    assert all((folder / path).is_file() for path in receipts)


def test_csv_holds_every_number_with_three_decimals(contents: Contents) -> None:
    dino, vmf = csv.DictReader(io.StringIO(comma_separated(contents, FOLDER)))
    assert (dino["mean"], dino["sd"], dino["n"], dino["seeds"]) == ("92.000", "2.000", "3", "0 1 2")
    assert (dino["published"], dino["published_in"]) == ("72.8", "DINO, Table 7")
    assert (vmf["mean"], vmf["sd"], vmf["low"], vmf["high"]) == ("95.250", "", "93.250", "97.250")


def test_both_figures_stand_with_their_source_where_papers_differ(
    make_table: Callable[..., Table], cells_of: Callable, tmp_path: Path
) -> None:
    other = {"paper": "iBOT (2111.07832)", "table": "Table 1", "method": "SwAV", "arch": "ViT-S/16"}
    table = make_table(rows=[{"label": "SwAV", "recipe": "swav", "published": [{"method": "9 SwAV"}, other]}])
    page = markdown(fill(table, cells_of(table), RecordStore(tmp_path)), FOLDER)
    assert "64.7 (DINO, Table 7) / 66.3 (iBOT, Table 1)" in page


def test_latex_has_booktabs_rules_and_escapes(contents: Contents) -> None:
    text = latex(contents)
    assert all(rule in text for rule in (r"\toprule", r"\midrule", r"\bottomrule"))
    assert r"DINO & 3 & 72.8 & 92.0 $\pm$ 2.0 \\" in text
    assert escape("50 % of x_1 & \\") == r"50 \% of x\_1 \& \textbackslash{}"


def test_a_short_schedule_is_marked_everywhere(
    make_table: Callable[..., Table], cells_of: Callable, tmp_path: Path
) -> None:
    table = make_table(at={"digits": {"preset": "digits", "short_schedule": ["schedule.epochs=2"]}})
    short = fill(table, cells_of(table), RecordStore(tmp_path))
    assert "**Short schedule**: `schedule.epochs=2`" in markdown(short, FOLDER)
    assert "Short schedule (schedule.epochs=2)" in latex(short)
    assert all(row["short_schedule"] for row in csv.DictReader(io.StringIO(comma_separated(short, FOLDER))))


def test_the_picture_shows_the_numbers_of_the_csv(contents: Contents) -> None:
    shown = numbers(contents)["kNN"]
    for row in csv.DictReader(io.StringIO(comma_separated(contents, FOLDER))):
        assert shown[row["row"]]["mean"] == float(row["mean"])
    assert (shown["DINO"]["low"], shown["DINO"]["high"]) == (90.0, 94.0)
    assert draw(contents).numbers == numbers(contents)


def test_written_again_nothing_changes_and_no_picture_is_drawn(contents: Contents, tmp_path: Path) -> None:
    folder = tmp_path / "results" / "tables" / "digits"
    names = {path.name for path in write_table(contents, folder)}
    assert names == {"made.md", "made.csv", "made.tex", "made.png", "made.svg"}
    write_index([contents], folder.parent)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    assert write_table(contents, folder) == []
    assert write_index([contents], folder.parent) == []
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before


@pytest.mark.promise("disk full: tables and their figures", "the old pages stay whole; exit 3")
def test_a_table_that_does_not_fit_leaves_the_old_pages_whole(contents: Contents, tmp_path: Path) -> None:
    folder = tmp_path / "results" / "tables" / "digits"
    write_table(contents, folder)
    for name in ("made.md", "made.csv", "made.png"):
        (folder / name).write_bytes(b"stale" * 1000)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with room(100), pytest.raises(DinobenchError, match="cannot write .*free some space") as error:
        write_table(contents, folder)
    assert error.value.exit_code == 3
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert write_table(contents, folder)


def test_new_numbers_are_written_and_drawn(contents: Contents, write_record: Callable, tmp_path: Path) -> None:
    folder = tmp_path / "results" / "tables" / "digits"
    write_table(contents, folder)
    (folder / "made.csv").write_text("stale")
    assert {path.name for path in write_table(contents, folder)} == {"made.csv", "made.png", "made.svg"}


def test_the_index_counts_records_and_verdicts(contents: Contents, tmp_path: Path) -> None:
    write_index([contents], tmp_path)
    text = (tmp_path / "digits" / "README.md").read_text()
    assert "| [A table](made.md) |  | 4 of 10 | full | 2 other scale: not comparable |" in text
    assert "[digits](digits/README.md)" in (tmp_path / "README.md").read_text()
