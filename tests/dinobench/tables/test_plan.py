from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dinobench.tables import plan as module
from dinobench.tables.cells import Cells, data_of
from dinobench.tables.definition import Table
from dinobench.tables.plan import make_plan, read_throughput
from dinobench.tables.records import RecordStore
from pretrain.errors import UsageError

SCORES = {"digits_knn@1": {"top1": 90.0}}


def test_the_plan_says_what_is_done_and_what_is_to_run(
    tiny: Table, cells_of: Callable[..., Cells], write_record: Callable, tmp_path: Path
) -> None:
    cells = cells_of(tiny)
    write_record(cells.all[1], SCORES)
    plan = make_plan(cells, RecordStore(tmp_path / "results"))
    assert [step.done for step in plan.steps] == [False, True]
    assert [step.cell.name for step in plan.to_run] == ["dino"]
    assert plan.waiting == []


def test_times_come_from_measured_records_of_the_method_else_of_the_network(
    tiny: Table, cells_of: Callable[..., Cells], write_record: Callable, tmp_path: Path
) -> None:
    cells = cells_of(tiny)
    # 6400 images in 100 s; 2 epochs of 20 steps of 64 images are 2560: 40 s. SimCLR itself: 200 s.
    write_record(replace(cells.all[0], science="another recipe"), SCORES)
    write_record(replace(cells.all[1], science="one more", overrides=()), SCORES, seconds=200.0)
    dino, simclr = make_plan(cells, RecordStore(tmp_path / "results")).steps
    assert (dino.seconds, simclr.seconds) == (pytest.approx(40), pytest.approx(80))
    plan = make_plan(cells, RecordStore(tmp_path / "results"))
    assert plan.minutes(1) == pytest.approx(2)
    assert plan.minutes(2) == pytest.approx(80 / 60)


def test_nothing_is_estimated_where_nothing_was_measured(tiny: Table, cells_of: Callable, tmp_path: Path) -> None:
    plan = make_plan(cells_of(tiny), RecordStore(tmp_path))
    assert [step.seconds for step in plan.steps] == [None, None]
    assert plan.minutes(2) is None


def test_what_is_not_here_is_named_and_waited_for(make_table: Callable, cells_of: Callable, tmp_path: Path) -> None:
    plan = make_plan(cells_of(make_table(), "paper"), RecordStore(tmp_path))
    assert plan.to_run == []
    assert [step.absent for step in plan.waiting] == [["--data imagenet:/path"]] * 2
    assert plan.steps[0].gpu_hours is None


def test_weights_that_the_reader_could_give_are_named(make_table: Callable, cells_of: Callable, tmp_path: Path) -> None:
    table = make_table(rows=[{"label": "DINO ViT-S/8", "checkpoint": "dino_vits8"}])
    (step,) = make_plan(cells_of(table, "paper"), RecordStore(tmp_path)).steps
    assert step.needs(["imagenet_knn@1"]) == ["checkpoint dino_vits8 in checkpoints.yaml", "--data imagenet:/path"]
    assert step.gpu_hours is None


def test_suites_whose_images_are_not_here_do_not_hold_up_the_others(
    make_table: Callable, cells_of: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DINOBENCH_DATA", raising=False)
    columns = [
        {"label": "kNN", "at": {"digits": "digits_knn@1:top1"}},
        {"label": "mAP", "at": {"digits": "coil20_retrieval@1:map"}},
    ]
    (step,) = make_plan(
        cells_of(make_table(columns=columns, rows=[{"label": "DINO", "recipe": "dino"}]), seeds=(0,)),
        RecordStore(tmp_path),
    ).steps
    assert step.ready
    assert "coil20_retrieval@1" in step.missing
    assert "coil20_retrieval@1" not in step.cell.suites
    assert step.absent == ["coil20 under DINOBENCH_DATA"]


def test_gpu_hours_come_from_measured_throughput(
    make_table: Callable, cells_of: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "throughput.yaml"
    entry = "method: dino, preset: imagenet_vits16, images_per_second: 1000, gpus: 8, device: none, source: test"
    file.write_text(f"entries: [{{{entry}}}]")
    entries = read_throughput(file)
    monkeypatch.setattr(module, "read_throughput", lambda: entries)
    first, second = make_plan(cells_of(make_table(), "paper"), RecordStore(tmp_path)).steps
    images = 800 * (1_281_167 // 1024) * 1024
    assert first.gpu_hours == pytest.approx(images / 1000 / 3600 * 8)
    assert second.gpu_hours is None


def test_the_shipped_throughputs_can_be_read_and_a_wrong_key_is_told(tmp_path: Path) -> None:
    assert all(entry.source for entry in read_throughput())
    file = tmp_path / "throughput.yaml"
    file.write_text("entries: [{method: dino, gpu: 1}]")
    with pytest.raises(UsageError, match="throughput.yaml"):
        read_throughput(file)


def test_data_given_makes_a_suite_ready(make_table: Callable, cells_of: Callable, tmp_path: Path) -> None:
    plan = make_plan(cells_of(make_table(), "paper", data=data_of(["imagenet:/no/such"])), RecordStore(tmp_path))
    assert plan.steps[0].absent == ["imagenet:/no/such under DINOBENCH_DATA"]
