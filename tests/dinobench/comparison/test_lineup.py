from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dinobench.comparison.candidates import Candidate, read_record, read_run
from dinobench.comparison.lineup import Lineup, line_up
from dinobench.files import write_json
from pretrain.errors import DinobenchError, UsageError
from pretrain.training.recipe import recipe_hash


def steps(lineup: Lineup, suite: str = "digits_knn@1") -> list[int]:
    return [place.at.step for place in lineup.places[suite]]


def test_runs_meet_at_the_last_step_that_all_have(measurer: Any) -> None:
    long = read_run(measurer.run("dino", 0, 90.0, steps=(20, 40, 60)))
    short = read_run(measurer.run("dino_vmf", 0, 90.0, steps=(20, 40)))
    lineup = line_up([long, short])
    assert steps(lineup) == [40, 40]
    assert any("is compared at step 40, its last checkpoint is at 60" in note for note in lineup.notes)
    last = line_up([long, short], "last")
    assert steps(last) == [60, 40]
    assert any("different training steps (40, 60)" in note for note in last.notes)


def test_runs_of_other_batch_sizes_meet_at_the_images_seen(measurer: Any) -> None:
    batch = measurer.run("dino", 0, 90.0).recipe()["optim"]["batch_size"]
    dino = read_run(measurer.run("dino", 1, 90.0, steps=(20, 40)))
    twice = ("optim.batch_size=" + str(2 * batch),)
    vmf = read_run(measurer.run("dino_vmf", 1, 90.0, steps=(10, 20), overrides=twice))
    assert steps(line_up([dino, vmf])) == [20, 20]
    assert steps(line_up([dino, vmf], "images")) == [40, 20]


def test_no_common_step_says_what_to_do(measurer: Any) -> None:
    runs = [read_run(measurer.run(m, 0, 90.0, steps=s)) for m, s in (("dino", (20,)), ("dino_vmf", (30,)))]
    with pytest.raises(DinobenchError, match="no training step at which all were measured .*--align last"):
        line_up(runs)
    with pytest.raises(DinobenchError, match="no number of images seen"):
        line_up(runs, "images")


def test_of_many_runs_the_message_names_a_few(measurer: Any) -> None:
    runs = [read_run(measurer.run("dino", seed, 90.0, steps=(20,))) for seed in range(5)]
    runs.append(read_run(measurer.run("dino_vmf", 0, 90.0, steps=(30,))))
    with pytest.raises(DinobenchError, match=r"and 2 more: 20; \S*dino_vmf\S*: 30\)"):
        line_up(runs)


def test_a_named_checkpoint_is_taken_as_it_is(measurer: Any) -> None:
    run = measurer.run("dino", 0, 90.0)
    early = Candidate(run.path, "dino", 0, {}, read_run(run).checkpoints[:1], named=True)
    late = Candidate(run.path, "dino", 0, {}, read_run(run).checkpoints[1:], named=True)
    lineup = line_up([early, late])
    assert steps(lineup) == [20, 40]
    assert lineup.names == ["dino s0 step 20", "dino s0 step 40"]


def test_versions_of_a_suite_are_not_mixed(measurer: Any) -> None:
    one, two = measurer.run("dino", 0, 90.0), measurer.run("dino_vmf", 0, 90.0, steps=())
    measurer.measure(two, 0, 90.0, 40, suite="digits_knn@2")
    with pytest.raises(UsageError, match="digits_knn@1 and digits_knn@2 are different measurements"):
        line_up([read_run(one), read_run(two)])
    # both have both: nothing is mixed
    measurer.measure(one, 0, 90.0, 40, suite="digits_knn@2")
    assert "digits_knn@2" in line_up([read_run(one), read_run(two)]).places
    assert "digits_knn@1" not in line_up([read_run(one), read_run(two)]).places


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"receipt": {"dataset": {"test": {"fingerprint": "e" * 40}}}}, "different test images"),
        ({"receipt": {}}, "does not say on which images"),
        ({"suite_fingerprint": "bad"}, "different definitions of this version"),
    ],
    ids=["other images", "no fingerprint", "other definition"],
)
def test_other_images_and_other_definitions_are_refused(measurer: Any, changes: dict, said: str) -> None:
    one, two = measurer.run("dino", 0, 90.0), measurer.run("dino_vmf", 0, 90.0, steps=())
    measurer.measure(two, 0, 90.0, 40, **changes)
    with pytest.raises(DinobenchError, match=said):
        line_up([read_run(one), read_run(two)])


def test_a_method_is_a_recipe_under_any_seed(measurer: Any) -> None:
    runs = [measurer.run("dino", seed, 90.0) for seed in (0, 1)]
    other = measurer.run("dino", 2, 90.0, overrides=("optim.lr=0.125",))
    lr = runs[0].recipe()["optim"]["lr"]
    lineup = line_up([read_run(run) for run in (*runs, other)])
    assert lineup.methods == [f"dino optim.lr={lr}"] * 2 + ["dino optim.lr=0.125"]
    assert line_up([read_run(run) for run in runs]).methods == ["dino", "dino"]


def test_a_record_joins_the_run_of_its_recipe(measurer: Any, tmp_path: Path) -> None:
    run = measurer.run("dino", 0, 90.0)
    result = {"headline": "top1", "scores": {"top1": 80.0}, "n": 200, "suite_fingerprint": "f00"}
    record: dict[str, Any] = {
        "name": "dino",
        "seed": 7,
        "provenance": {"step": 40, "label": "x", "recipe_hash": recipe_hash({**run.recipe(), "seed": 7})},
        "receipt": {"dataset": {"test": {"fingerprint": "d" * 40}}},
        "results": {"digits_knn@1": result},
    }
    write_json(tmp_path / "r.json", record)
    assert line_up([read_run(run), read_record(tmp_path / "r.json")]).methods == ["dino", "dino"]
    record["provenance"]["recipe_hash"] = "0" * 64
    write_json(tmp_path / "r.json", record)
    assert len(set(line_up([read_run(run), read_record(tmp_path / "r.json")]).methods)) == 2


def test_one_alone_and_nothing_in_common_are_refused(measurer: Any) -> None:
    run = read_run(measurer.run("dino", 0, 90.0))
    with pytest.raises(DinobenchError, match="a comparison needs two"):
        line_up([run])
    other = read_run(measurer.run("dino_vmf", 0, 90.0))
    with pytest.raises(DinobenchError, match="no suite was measured on two"):
        line_up([run.only(["digits_knn"]), other.only(["digits_prototypes"])])
