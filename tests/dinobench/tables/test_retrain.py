from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dinobench.tables.cells import Cells
from dinobench.tables.records import RecordStore
from dinobench.tables.retrain import choose, retrain
from dinobench.tables.worker import Workplace
from pretrain.errors import DinobenchError


@pytest.fixture
def cells(make_table: Callable, cells_of: Callable[..., Cells]) -> Cells:
    overrides = ["evaluation.suites=[]"]
    return cells_of(make_table(at={"digits": {"preset": "digits", "seeds": 5, "overrides": overrides}}))


@pytest.fixture
def store(cells: Cells, write_record: Callable, tmp_path: Path) -> RecordStore:
    """Five seeds of DINO, and three of DINO-vMF."""
    for cell in (*cells.of("made", "DINO"), *cells.of("made", "vMF")[:3]):
        write_record(cell, {"digits_knn@1": {"top1": 84.0}})
    return RecordStore(tmp_path / "results")


def test_commits_take_turns_over_the_recorded_cells(cells: Cells, store: RecordStore) -> None:
    chosen = [choose(cells, store, commit) for commit in "012345"]
    assert set(chosen[:5]) == set(cells.of("made", "DINO"))  # three seeds do not tell how far another may go
    assert chosen[5] == chosen[0]
    assert choose(cells, store, "a1b2c3") == chosen[0xA1B2C3 % 5]


def test_what_is_no_commit_is_refused(cells: Cells, store: RecordStore, tmp_path: Path) -> None:
    with pytest.raises(DinobenchError, match="not the hash of a commit"):
        choose(cells, store, "main")
    with pytest.raises(DinobenchError, match="no training of these tables is recorded"):
        choose(cells, RecordStore(tmp_path / "empty"), "a1")


@pytest.mark.parametrize(("recorded", "holds"), [(91.0, True), (75.0, True), (60.0, False)])
def test_the_spread_over_seeds_is_what_may_differ(
    recorded: float, holds: bool, cells: Cells, write_record: Callable, tmp_path: Path, fake_loop: Any, measured: Any
) -> None:
    # the measurement of the test always finds 91.5; seeds of standard deviation 3.16 allow 4.60 x 3.16 x 1.41 points
    own = cells.of("made", "DINO")
    for cell, score in zip(own, recorded + 2 * np.arange(5.0), strict=True):
        write_record(cell, {"digits_knn@1": {"top1": score}})
    place = Workplace(tmp_path / "apart" / "runs", tmp_path / "apart" / "results")
    (compared,) = retrain(own[0], cells, RecordStore(tmp_path / "results"), place, lambda text: None)
    assert (compared.recorded, compared.found, compared.allowed) == (recorded, 91.5, pytest.approx(20.6, abs=0.05))
    assert compared.holds is holds
    assert fake_loop.calls == [False]


def test_two_points_are_always_allowed(
    cells: Cells, write_record: Callable, tmp_path: Path, fake_loop: Any, measured: Any
) -> None:
    cell = cells.of("made", "vMF")[0]
    write_record(cell, {"digits_knn@1": {"top1": 90.0}})
    place = Workplace(tmp_path / "apart" / "runs", tmp_path / "apart" / "results")
    (compared,) = retrain(cell, cells, RecordStore(tmp_path / "results"), place, lambda text: None)
    assert (compared.allowed, compared.holds) == (2.0, True)


def test_a_place_that_has_the_record_already_is_refused(cells: Cells, store: RecordStore, tmp_path: Path) -> None:
    cell = choose(cells, store, "0")
    with pytest.raises(DinobenchError, match="give an empty folder"):
        retrain(cell, cells, store, Workplace(tmp_path / "runs", store.root), lambda text: None)
