from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dinobench import mirror, tracking
from dinobench.files import write_json
from dinobench.tables.cells import Cells
from dinobench.tables.contents import fill
from dinobench.tables.definition import Table
from dinobench.tables.overview import describe, log_tables
from dinobench.tables.records import RecordStore
from dinobench.tables.writing import write_table
from dinobench.tracking import LONGEST_TEXT, TABLE_EXPERIMENT

pytestmark = pytest.mark.filterwarnings("ignore")


class Run:
    """What `describe` needs of a run in MLflow."""

    def __init__(self, number: int):
        self.info = type("Info", (), {"experiment_id": "1", "run_id": f"{number:032}"})


def test_a_table_is_logged_once_and_brought_up_to_date(
    tiny: Table, cells_of: Callable[..., Cells], write_record: Callable, measurer: Any, database: Path, tmp_path: Path
) -> None:
    cells = cells_of(tiny, seeds=(0,))
    (cell,) = cells.of("tiny", "DINO")
    run = measurer.run("dino", 0, 80.0)
    write_json(run.cell_file, {"key": cell.key})
    store = tracking.connect(f"sqlite:///{shutil.copy(database, tmp_path)}")
    training = mirror.open_pretraining(store, run)

    folder = tmp_path / "tables"
    for records, shown in ((0, "| DINO | - | - |"), (1, "| DINO | 81.2 [79.2, 83.2] | 30.0 |")):
        if records:
            write_record(cell, {"digits_knn@1": {"top1": 81.25}, "digits_prototypes@1": {"used": 30.0}})
        contents = fill(tiny, cells, RecordStore(tmp_path / "results"))
        write_table(contents, folder)
        pages = log_tables(store, [contents], cells, folder)
        (logged,) = store.search([store.experiments()[TABLE_EXPERIMENT]], {})
        text = logged.data.tags["mlflow.note.content"]
        assert shown in text
        assert f"[s0](#/experiments/1/runs/{training}?workflowType=machine_learning)" in text
        assert logged.data.tags["records"] == f"{records} of 2"
        assert logged.info.run_name == "tiny/digits" and logged.info.status == "FINISHED"
        assert pages["table tiny"] == f"/#/experiments/{logged.info.experiment_id}/runs/{logged.info.run_id}?" + (
            "workflowType=machine_learning"
        )
    files = {file.path for file in store.client.list_artifacts(logged.info.run_id)}
    assert files == {"tiny.md", "tiny.csv", "tiny.tex", "tiny.png", "tiny.svg"}


def test_a_long_table_is_cut_between_rows_and_says_so(
    make_table: Callable[..., Table], cells_of: Callable[..., Cells], tmp_path: Path
) -> None:
    rows = [{"label": f"row {k}", "recipe": "dino", "overrides": [f"optim.lr=0.{k + 1}"]} for k in range(40)]
    table = make_table(rows=rows)
    cells = cells_of(table)
    known = {cell.key: Run(number) for number, cell in enumerate(cells.all)}
    text = describe(fill(table, cells, RecordStore(tmp_path)), cells, known)
    assert len(text) <= LONGEST_TEXT
    lines = [line for line in text.splitlines() if line.startswith("| row ")]
    shown = len(lines) - 1  # its head begins so too
    assert f"| ... {40 - shown} more rows |" in text
    assert all(line.count("(#/experiments/1/runs/") == 5 for line in lines[1:])


def test_a_few_runs_can_be_compared_on_one_page(
    make_table: Callable[..., Table], cells_of: Callable[..., Cells], tmp_path: Path
) -> None:
    table = make_table()
    cells = cells_of(table, seeds=(0,))
    contents = fill(table, cells, RecordStore(tmp_path))
    known = {cell.key: Run(number) for number, cell in enumerate(cells.all)}
    assert "[Compare the 2 runs](#/compare-runs?runs=%5B%22" in describe(contents, cells, known)
    assert "Compare" not in describe(contents, cells, {})
