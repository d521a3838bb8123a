from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from dinobench.tables import cells as module
from dinobench.tables.cells import Cells, collect, data_of, read_checkpoints, science_hash
from dinobench.tables.definition import SCALES, Table, load_table, table_names
from dinobench.tables.records import RecordStore
from pretrain.errors import UsageError
from pretrain.training.recipe import resolve

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def every() -> Cells:
    """All cells of the shipped tables at the embedded scale."""
    return collect([load_table(name) for name in table_names()], "digits")


def resolve_command(command: str) -> dict:
    """What `dinobench pretrain` makes of a command line, as `--dry-run --json` would print it."""
    words = shlex.split(command)
    assert words[:2] == ["dinobench", "pretrain"]
    preset, seed = words[words.index("--preset") + 1], int(words[words.index("--seed") + 1])
    overrides = [word for word in words if "=" in word]
    return resolve(words[2], preset=preset, seed=seed, overrides=overrides).model_dump(mode="json")


def test_a_cell_is_the_recipe_that_its_command_resolves(every: Cells) -> None:
    chosen = every.all[:: max(len(every.all) // 12, 1)]
    assert {cell.seed for cell in chosen} > {0}
    assert any(cell.overrides for cell in chosen)
    for cell in chosen:
        assert science_hash(resolve_command(cell.command)) == cell.science
        assert cell.recipe().model_dump(mode="json") == resolve_command(cell.command)


def test_every_committed_record_is_a_cell_that_is_done(every: Cells) -> None:
    store = RecordStore(ROOT / "results")
    found = {cell.key: store.find(cell) for cell in every.all}
    files = {record.file for record in found.values() if record is not None}
    assert files == {record.file for record in store.all()}
    assert len(files) >= 61
    for cell in every.all:
        if (record := found[cell.key]) is not None:
            assert (record.seed, record.lacks(cell.suites)) == (cell.seed, [])


def test_tables_share_what_they_both_need(every: Cells) -> None:
    for seed in range(3):
        shared = {every.of_row["methods", "dino"][seed], every.of_row["dino_table7", "DINO"][seed]}
        assert len(shared) == 1
    assert len({cell.science for cell in every.all}) == len(every.all)


def test_a_training_is_named_by_the_plainest_of_its_commands(every: Cells) -> None:
    # dino_longer_training writes out the 80 epochs that the recipe has anyway
    assert every.of_row["dino_longer_training", "800 epochs"][0] == every.of_row["methods", "dino"][0]
    assert [cell.overrides for cell in every.of("methods", "dino")] == 5 * [()]


def test_a_short_schedule_is_another_cell(every: Cells) -> None:
    assert every.of_row["dino_table15", "centring"] != every.of_row["methods", "dino"][:1]


def test_another_version_of_the_method_is_another_cell(
    tiny: Table, cells_of: Callable[..., Cells], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = [cell.key for cell in cells_of(tiny).all]
    monkeypatch.setitem(module.METHOD_VERSIONS, "dino", 2)
    second = [cell.key for cell in cells_of(tiny).all]
    assert first[0] != second[0]
    assert first[1] == second[1]


def test_seeds_given_stand_in_for_those_of_the_table(make_table: Callable[..., Table], cells_of: Callable) -> None:
    assert [cell.seed for cell in cells_of(make_table()).of("made", "vMF")] == [0, 1, 2, 3, 4]
    assert [cell.seed for cell in cells_of(make_table(), seeds=(3, 7)).of("made", "vMF")] == [3, 7]


def test_the_path_of_the_data_does_not_make_another_cell(make_table: Callable[..., Table], cells_of: Callable) -> None:
    here, there = (
        cells_of(make_table(), "paper", data=data_of([f"imagenet:/{folder}/imagenet"])).all[0]
        for folder in ("here", "there")
    )
    assert here.science == there.science
    assert "--data imagenet:/here/imagenet" in here.command


def test_released_weights_stand_in_for_a_training(
    make_table: Callable[..., Table], cells_of: Callable, tmp_path: Path
) -> None:
    file = tmp_path / "weights.pth"
    file.write_bytes(b"weights")
    row = {"label": "DINO", "recipe": "dino", "checkpoint": "dino_vits16", "published": [{"method": "1 DINO"}]}
    table = make_table(rows=[row])
    (trained,) = cells_of(table, "paper").all
    (released,) = cells_of(table, "paper", checkpoints={"dino_vits16": file}).all
    assert (trained.released, trained.weights) == (False, "dino_vits16")
    assert (released.released, released.checkpoint) == (True, file)
    assert all(not cell.released for cell in cells_of(table, checkpoints={"dino_vits16": file}).all)


def test_weights_that_no_table_has_are_refused_with_the_nearest_name(tmp_path: Path) -> None:
    file = tmp_path / "checkpoints.yaml"
    file.write_text("dino_vit16: x.pth")
    with pytest.raises(UsageError, match="did you mean 'dino_vits?b?16'"):
        read_checkpoints(file)
    file.write_text("dino_vits16: x.pth")
    assert read_checkpoints(file) == {"dino_vits16": tmp_path / "x.pth"}


def test_data_without_a_path_is_refused() -> None:
    with pytest.raises(UsageError, match="expected a URI"):
        data_of(["imagenet:"])


@pytest.mark.slow
@pytest.mark.parametrize("scale", SCALES)
def test_every_row_of_every_table_resolves_at_every_scale(scale) -> None:
    found = collect([load_table(name) for name in table_names()], scale)
    assert found.all
    assert all(cell.released or cell.recipe().head is not None for cell in found.all)
