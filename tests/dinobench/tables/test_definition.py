from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dinobench.tables.definition import SCALES, Table, load_table, table_names
from dinobench.tables.records import RecordStore
from pretrain.errors import UsageError
from suites.suite import load_suite

ROOT = Path(__file__).parents[3]
PROMISED = {
    *(f"dino_table{number}" for number in (2, 3, 4, 5, 7, 8, 9, 15)),
    *("dino_centre_momentum", "dino_teacher_temperature", "dino_head", "dino_prototypes", "dino_crop_scale"),
    *("ibot_table1", "ibot_fewshot", "ibot_table9", "ibot_output_dim"),
    *("vmf_main", "vmf_fewshot", "vmf_retrieval", "vmf_ablation", "vmf_utilisation", "vmf_figure2"),
    *("dinov2_table1", "partial_collapse", "methods"),
}


def test_the_tables_that_are_promised_are_there() -> None:
    assert set(table_names()) >= PROMISED


@pytest.mark.parametrize("name", table_names())
def test_every_published_key_of_a_table_resolves_to_one_figure(name: str) -> None:
    load_table(name).check_published()


@pytest.fixture(scope="module")
def scores() -> dict[str, set[str]]:
    """Protocol -> the scores it gives, from committed records where there are some."""
    known = {
        "retrieval": {"map", "map_easy", "map_medium", "map_hard"},
        "copy_detection": {"map"},
        "label_propagation": {"jf", "j_mean", "f_mean"},
        "linear_augmented": {"top1", "held_out_top1"},
    }
    for record in RecordStore(ROOT / "results").all():
        for suite, result in record.content["results"].items():
            known.setdefault(load_suite(suite).protocol, set()).update(result["scores"])
    return known


@pytest.mark.parametrize("name", table_names())
def test_a_table_names_suites_of_this_version_and_scores_that_they_give(name: str, scores: dict[str, set[str]]) -> None:
    table = load_table(name)
    for scale in SCALES:
        for column in table.measured_columns(scale):
            measure = column.at[scale]
            suite = load_suite(measure.suite)
            assert suite.id == measure.suite
            given = set(scores[suite.protocol])
            if suite.protocol == "fewshot":
                sizes = suite.resolved_parameters()
                given = {*(f"shot{n}" for n in sizes.shots), *(f"percent{n:g}" for n in sizes.percents)}
            assert measure.score in given


def write(folder: Path, text: str) -> None:
    (folder / "mine.yaml").write_text(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("titel: x", "did you mean 'title'"),
        ("{title: x, tolerance: 1, columns: [{label: a, at: {digits: 'digits_knn:top1'}}], rows: []}", "digits_knn"),
        ("{title: x, tolerance: 1, columns: [{label: a, att: {}}], rows: [{label: r}]}", "did you mean 'at'"),
        (
            "{title: x, tolerance: 1, columns: [{label: a, at: {}}], rows: [{label: r, published: [{metod: x}]}]}",
            "did you mean 'method'",
        ),
        ("{title: x, tolerance: 1, columns: [{label: a, at: {}}], rows: [{label: r}, {label: r}]}", "two rows"),
        ("{title: x, tolerance: 1, columns: [{label: a, at: {}}], rows: [{label: r, blank: [b]}]}", "unknown column"),
        ("{title: x, tolerance: 0, columns: [{label: a, at: {}}], rows: [{label: r}]}", "tolerance"),
    ],
)
def test_a_definition_that_is_wrong_says_where(text: str, said: str, tmp_path: Path) -> None:
    write(tmp_path, text)
    with pytest.raises(UsageError, match=said):
        load_table("mine", tmp_path)


def test_an_unknown_table_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'dino_table7'"):
        load_table("dino_tabel7")


def test_a_column_said_to_be_blank_must_be_blank_in_the_papers(make_table: Callable[..., Table]) -> None:
    row = {"label": "DINO", "published": [{"method": "1 DINO"}], "blank": ["kNN"]}
    with pytest.raises(UsageError, match="said to be blank, but published.csv has 72.8"):
        make_table(rows=[row]).check_published()


def test_a_key_that_fits_no_figure_is_refused_with_the_nearest_value(make_table: Callable[..., Table]) -> None:
    with pytest.raises(UsageError, match="did you mean '1 DINO'"):
        make_table(rows=[{"label": "DINO", "published": [{"method": "1 DINOO"}]}]).check_published()


def test_a_blank_column_does_not_hide_a_key_that_fits_nowhere(make_table: Callable[..., Table]) -> None:
    row = {"label": "DINO", "published": [{"method": "1 DINOO"}], "blank": ["kNN"]}
    with pytest.raises(UsageError, match="did you mean '1 DINO'"):
        make_table(rows=[row]).check_published()


def test_where_papers_print_one_checkpoint_differently_both_figures_are_kept() -> None:
    table = load_table("dino_table3")
    row = next(row for row in table.rows if row.label == "DINO ViT-S/16")
    found = [(figure.value, figure.cited) for figure in table.figures(row, table.columns[0])]
    assert found == [("41.8", "DINO, Table 3"), ("37.2", "iBOT, Table 16")]


def test_an_empty_published_cell_stays_empty() -> None:
    table = load_table("dino_table2")
    row = next(row for row in table.rows if row.label == "BYOL RN50w2")
    values = {column.label: [figure.value for figure in table.figures(row, column)] for column in table.columns}
    assert values == {"linear": ["77.4"], "kNN": []}


def test_what_a_row_is_depends_on_the_scale(make_table: Callable[..., Table]) -> None:
    row: dict[str, Any] = {"label": "K = 8192", "recipe": "ibot", "at": {"digits": {"label": "K = 128"}}}
    (made,) = make_table(rows=[row]).rows
    assert (made.label_at("digits"), made.label_at("paper")) == ("K = 128", "K = 8192")
