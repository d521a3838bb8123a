from __future__ import annotations

from pathlib import Path

from dinobench import plots
from dinobench.journal import Journal

PNG = b"\x89PNG"


def test_curves_are_drawn_for_the_metrics_that_are_there(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    for step in (10, 20):
        journal.append({"loss/total": 1 / step, "health/information": 2.0}, step)
    files = plots.draw_curves(journal, tmp_path / "figures")
    assert [file.name for file in files] == ["loss.png", "health.png"]
    assert all(file.read_bytes().startswith(PNG) for file in files)


def test_a_run_without_metrics_has_no_curves(tmp_path: Path) -> None:
    assert plots.draw_curves(Journal(tmp_path / "metrics.jsonl"), tmp_path) == []


def test_prototypes_of_equal_norm_can_be_drawn(tmp_path: Path) -> None:
    file = plots.draw_prototypes([1.0] * 5, None, tmp_path / "norms.png")
    assert file.read_bytes().startswith(PNG)
    assert plots.draw_prototypes([0.5, 2.0], [5.0, 20.0], file) == file
