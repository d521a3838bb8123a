"""A feature cache that is full, read-only, damaged, or not a folder costs time and never the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from breaking import (
    leftovers,
    nobody,
    read_only,
    room,
    start,
    tiny,
)
from suites.cache import FeatureCache, content_key, default_folder
from suites.rows import RowFile

KEY = content_key(test="disk")


@pytest.mark.promise("disk full: feature cache", "the result is given; no half entry under a real name; it is said")
@pytest.mark.parametrize("kind", ["features in memory", "features row by row", "scores of baselines"])
def test_a_cache_that_is_full_costs_time_and_not_the_result(kind: str, tmp_path: Path) -> None:
    cache, values = FeatureCache(tmp_path / "cache"), torch.arange(40_000.0).view(1000, 40)

    def write(path: Path, known: dict[str, str]) -> None:
        with RowFile.create(path, 1000, 40, torch.float32) as file:
            file.write(0, values)
            file.finish([], {})

    with room(4096), pytest.warns(UserWarning, match="could not be written .*DINOBENCH_CACHE"):
        if kind == "features in memory":
            assert torch.equal(cache.get_or_compute(KEY, lambda: ({"x": values}, {})).tensors["x"], values)
        elif kind == "features row by row":
            assert cache.get_or_write(KEY, write) is None  # the caller keeps them in memory
        else:
            cache.write_scores(KEY, {str(number): 1.0 for number in range(1000)})
    assert cache.read(KEY) is None and cache.read_scores(KEY) is None
    assert leftovers(tmp_path) == []


@pytest.mark.slow
@pytest.mark.promise("a file where the cache folder should be", "the evaluation gives its scores; it is said")
def test_a_cache_folder_that_is_a_file_costs_time_and_not_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = start(tiny("tracking.enabled=false", "evaluation.suites=[digits_knn]"), tmp_path / "a").results[-1].scores
    (tmp_path / "taken").write_text("mine")
    monkeypatch.setenv("DINOBENCH_CACHE", str(tmp_path / "taken"))
    with pytest.warns(UserWarning, match="DINOBENCH_CACHE"):  # one warning each
        summary = start(tiny("tracking.enabled=false", "evaluation.suites=[digits_knn]"), tmp_path / "b")
    assert summary.results[-1].scores == scores
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.promise("a cache of another user, read-only", "it serves what it holds; what it lacks is computed")
def test_a_read_only_cache_serves_what_it_holds(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "cache")
    cache.get_or_compute(KEY, lambda: ({"x": torch.ones(3)}, {}))
    cache.write_scores(KEY, {"top1": 90.0})
    read_only(cache.folder)

    def must_not() -> Any:
        raise AssertionError("computed although it was in the cache")

    with nobody():
        assert cache.get_or_compute(KEY, must_not).tensors["x"].sum() == 3
        assert cache.read_scores(KEY) == {"top1": 90.0}
        with pytest.warns(UserWarning, match="could not be written"):
            assert (
                cache.get_or_compute(content_key(other=1), lambda: ({"x": torch.ones(2)}, {})).tensors["x"].sum() == 2
            )
    assert cache.read(KEY) is not None


@pytest.mark.promise("a damaged entry in a read-only cache", "computed again, with a warning; no crash")
def test_a_damaged_entry_that_cannot_be_removed_is_computed_again(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "cache")
    cache.get_or_compute(KEY, lambda: ({"x": torch.ones(3)}, {}))
    cache.write_scores(KEY, {"top1": 90.0})
    for path in cache.folder.glob("*/*/*"):
        path.write_bytes(path.read_bytes()[:-2] + b"??")
    read_only(cache.folder)
    with (
        nobody(),
        pytest.warns(UserWarning, match="damaged cache entry"),
        pytest.warns(UserWarning, match="not be wri"),
    ):
        assert cache.get_or_compute(KEY, lambda: ({"x": torch.ones(3)}, {})).tensors["x"].sum() == 3
        assert cache.read_scores(KEY) is None


@pytest.mark.promise("a user without a home", "the cache goes to the temporary folder")
def test_a_user_without_home_has_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("DINOBENCH_CACHE")
    monkeypatch.setattr(Path, "home", homeless)
    assert default_folder().name.startswith("dinobench-")
    assert default_folder().parent.is_dir()
