from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dinobench.tables.cells import Cells, data_of
from dinobench.tables.contents import Contents, fill
from dinobench.tables.definition import Table
from dinobench.tables.records import RecordStore

KNN = "digits_knn@1"
OTHER_PAPER = {"paper": "iBOT (2111.07832)", "table": "Table 1", "method": "SwAV", "arch": "ViT-S/16"}


@pytest.fixture
def filled(
    make_table: Callable[..., Table], cells_of: Callable[..., Cells], write_record: Callable, tmp_path: Path
) -> Callable[..., Contents]:
    """A table with kNN scores of DINO and of DINO-vMF, one per seed."""

    def fill_with(dino: list[float], vmf: list[float], scale: str = "digits", **changes: object) -> Contents:
        table = make_table(**changes)
        seeds = tuple(range(max(len(dino), len(vmf)))) or None
        cells = cells_of(table, scale, seeds=seeds)
        suite = KNN if scale == "digits" else "imagenet_knn@1"
        for label, scores in (("DINO", dino), ("vMF", vmf)):
            for cell, score in zip(cells.of("made", label) if scores else (), scores, strict=False):
                write_record(cell, {suite: {"top1": score}})
        return fill(table, cells, RecordStore(tmp_path / "results"))

    return fill_with


def test_seeds_are_averaged_with_their_sample_standard_deviation(filled: Callable[..., Contents]) -> None:
    dino, vmf = filled([90.0, 92.0, 94.0], []).lines
    (entry,) = dino.entries
    assert (entry.n, entry.mean, entry.spread) == (3, pytest.approx(92), pytest.approx(2))
    assert entry.interval is None
    assert vmf.entries[0].verdict == "not run"


def test_a_single_seed_has_the_interval_over_images(filled: Callable[..., Contents]) -> None:
    (entry,) = filled([90.0], []).lines[0].entries
    assert (entry.mean, entry.spread, entry.interval) == (90.0, None, (88.0, 92.0))


def test_another_scale_is_not_compared_with_the_paper(filled: Callable[..., Contents]) -> None:
    (entry,) = filled([72.9], []).lines[0].entries
    assert (entry.verdict, entry.difference) == ("other scale: not comparable", None)
    assert [figure.value for figure in entry.published] == ["72.8"]


@pytest.mark.parametrize(
    ("score", "verdict", "outside"), [(73.5, "within tolerance", []), (70.0, "outside", ["DINO, kNN"])]
)
def test_at_the_scale_of_the_paper_the_tolerance_decides(
    score: float, verdict: str, outside: list[str], filled: Callable[..., Contents]
) -> None:
    contents = filled([score], [score], "paper")
    dino, vmf = (line.entries[0] for line in contents.lines)
    assert (dino.verdict, dino.difference) == (verdict, pytest.approx(score - 72.8))
    assert (vmf.verdict, vmf.difference) == ("no published figure", None)
    assert contents.outside == outside


def test_where_papers_differ_the_nearer_figure_counts_and_both_are_kept(filled: Callable[..., Contents]) -> None:
    row = {"label": "DINO", "recipe": "dino", "published": [{"method": "9 SwAV"}, OTHER_PAPER]}
    (line,) = filled([66.0], [], "paper", rows=[row]).lines
    (entry,) = line.entries
    assert [figure.value for figure in entry.published] == ["64.7", "66.3"]
    assert (entry.verdict, entry.difference) == ("within tolerance", pytest.approx(-0.3))


def test_only_what_five_seeds_support_is_bold(filled: Callable[..., Contents]) -> None:
    low, high = [90.0, 91.0, 90.5, 89.5, 90.2], [95.0, 96.1, 95.4, 94.6, 95.3]
    assert [line.entries[0].bold for line in filled(low, high).lines] == [False, True]


def test_four_seeds_are_never_bold_however_far_apart(filled: Callable[..., Contents]) -> None:
    assert not any(line.entries[0].bold for line in filled([50.0, 51, 52, 53], [95.0, 96, 97, 98]).lines)


def test_a_difference_within_the_spread_is_not_bold(filled: Callable[..., Contents]) -> None:
    contents = filled([90.0, 95.0, 91.0, 96.0, 92.0], [91.0, 94.0, 93.0, 94.0, 94.0])
    assert not any(line.entries[0].bold for line in contents.lines)


def test_a_score_of_a_redefined_suite_does_not_enter(
    filled: Callable[..., Contents], make_table: Callable, cells_of: Callable, tmp_path: Path
) -> None:
    filled([90.0, 92.0], [])
    for path in (tmp_path / "results").rglob("*.json"):
        text = path.read_text()
        start = text.index('"suite_fingerprint": "') + len('"suite_fingerprint": "')
        path.write_text(text[:start] + "0" * 12 + text[start + 12 :])
    table = make_table()
    contents = fill(table, cells_of(table, seeds=(0, 1)), RecordStore(tmp_path / "results"))
    assert contents.lines[0].entries[0].scores == {}


def test_a_suite_for_prototypes_does_not_apply_to_methods_without(
    tiny: Table, cells_of: Callable, write_record: Callable, tmp_path: Path
) -> None:
    cells = cells_of(tiny)
    write_record(cells.all[1], {KNN: {"top1": 90.0}})
    simclr = fill(tiny, cells, RecordStore(tmp_path / "results")).lines[1]
    assert [entry.verdict for entry in simclr.entries] == ["other scale: not comparable", "does not apply"]


def test_rows_of_other_scales_are_left_out_and_counted(
    make_table: Callable, cells_of: Callable, tmp_path: Path
) -> None:
    rows = [{"label": "DINO", "recipe": "dino"}, {"label": "large", "recipe": "dino", "only": ["paper"]}]
    table = make_table(rows=rows)
    digits = fill(table, cells_of(table), RecordStore(tmp_path))
    paper = fill(table, cells_of(table, "paper", data=data_of(["imagenet:/x"])), RecordStore(tmp_path))
    assert ([line.label for line in digits.lines], digits.left_out) == (["DINO"], 1)
    assert ([line.label for line in paper.lines], paper.left_out) == (["DINO", "large"], 0)
