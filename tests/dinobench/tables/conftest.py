"""Tables of the tests, and records without trainings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dinobench.tables.cells import Cell, Cells, Inputs, collect
from dinobench.tables.definition import Scale, Table, load_table
from dinobench.tables.records import RecordStore
from suites.suite import load_suite

DEFINITIONS = Path(__file__).parent / "definitions"


@pytest.fixture
def tiny() -> Table:
    """Two methods, a few steps."""
    return load_table("tiny", DEFINITIONS)


@pytest.fixture
def make_table() -> Callable[..., Table]:
    """A table of kNN scores of DINO and of DINO-vMF, with DINO's published figure."""

    def make(**changes: Any) -> Table:
        values: dict[str, Any] = {
            "title": "A table",
            "name": "made",
            "tolerance": 1.0,
            "paper": {"paper": "DINO (2104.14294)", "table": "Table 7"},
            "at": {"digits": {"preset": "digits", "seeds": 5}},
            "columns": [
                {
                    "label": "kNN",
                    "at": {"digits": "digits_knn@1:top1", "paper": "imagenet_knn@1:top1"},
                    "published": [{"suite": "ImageNet kNN", "metric": "top1"}],
                }
            ],
            "rows": [
                {"label": "DINO", "recipe": "dino", "published": [{"method": "1 DINO"}]},
                {"label": "vMF", "recipe": "dino_vmf"},
            ],
        }
        return Table.model_validate({**values, **changes})

    return make


@pytest.fixture
def write_record(tmp_path: Path) -> Callable[..., Path]:
    """Writes the record of a cell: suite -> score -> value."""

    def write(of: Cell, scores: dict[str, dict[str, float]], /, root: Path | None = None, **changes: Any) -> Path:
        suites = {name: load_suite(name) for name in scores}
        results = {
            name: {
                "headline": suite.headline,
                "suite_fingerprint": suite.fingerprint(),
                "scores": scores[name],
                "interval": [scores[name].get(suite.headline, 0.0) - 2, scores[name].get(suite.headline, 0.0) + 2],
                "n": 500,
            }
            for name, suite in suites.items()
        }
        content = {
            "name": of.name,
            "seed": of.seed,
            "steps": 100,
            "seconds": 100.0,
            "cell": {"science": of.science, "data": of.data_fingerprint, "version": of.version},
            "provenance": {"method": of.method, "label": of.label, "images_seen": 6400},
            "receipt": {"device": "cpu"},
            "results": results,
            "curve": {},
            "last_interval": {},
            **changes,
        }
        path = RecordStore(root or tmp_path / "results").path(of)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
        return path

    return write


@pytest.fixture
def cells_of() -> Callable[..., Cells]:
    def collect_one(table: Table, scale: Scale = "digits", **inputs: Any) -> Cells:
        return collect([table], scale, Inputs(**inputs))

    return collect_one
