from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dinobench import runs
from dinobench.runs import RunFolder, find_run
from pretrain.errors import DinobenchError
from pretrain.training.recipe import Recipe, resolve


def test_the_same_recipe_finds_the_same_folder(recipe: Recipe, run: RunFolder) -> None:
    assert find_run(recipe, run.path.parent) == run
    assert run.name == f"{recipe.label}-s0-{recipe.identity}"


def test_plumbing_keeps_the_folder_and_science_changes_it(recipe: Recipe, run: RunFolder) -> None:
    stored = str(run.recipe_file)
    same = resolve(stored, overrides=["runtime.log_every=7", "checkpoint.keep=1", "tracking.require=true"])
    assert find_run(same, run.path.parent) == run
    other = resolve(stored, overrides=["optim.lr=0.123"])
    assert find_run(other, run.path.parent) != run


def test_a_new_run_is_numbered_and_found_from_then_on(recipe: Recipe, run: RunFolder) -> None:
    second = find_run(recipe, run.path.parent, new=True)
    assert second.name == f"{run.name}-2"
    second.create(recipe)
    assert find_run(recipe, run.path.parent) == second
    assert find_run(recipe, run.path.parent, new=True).name == f"{run.name}-3"


def test_new_takes_the_plain_name_where_there_is_no_run(recipe: Recipe, tmp_path: Path) -> None:
    assert not find_run(recipe, tmp_path, new=True).name.endswith("-2")


def test_a_run_folder_is_refused_as_output(recipe: Recipe, run: RunFolder) -> None:
    with pytest.raises(DinobenchError, match="is a run folder with a recipe of its own"):
        find_run(recipe, run.path)


def test_a_folder_with_another_recipe_is_refused(recipe: Recipe, run: RunFolder) -> None:
    run.recipe_file.write_text(run.recipe_file.read_text().replace("seed: 0", "seed: 1"))
    with pytest.raises(DinobenchError, match=r"holds another recipe \(id .*, this one is .*"):
        find_run(recipe, run.path.parent)


@pytest.mark.promise("the run folder's name is taken by other files", "refused by name, nothing is touched")
def test_a_folder_of_something_else_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    folder = tmp_path / f"{recipe.label}-s0-{recipe.identity}"
    folder.mkdir()
    (folder / "thesis.tex").touch()
    with pytest.raises(DinobenchError, match=r"not a run folder but holds thesis\.tex"):
        find_run(recipe, tmp_path)


@pytest.mark.promise("a kill while a run folder is made", "the next start makes it")
def test_a_folder_killed_while_being_made_is_made_again(recipe: Recipe, run: RunFolder) -> None:
    run.state_file.unlink()
    again = find_run(recipe, run.path.parent)
    assert again == run
    assert not again.exists
    again.create(recipe)
    assert again.state().status == "running"


def test_the_stored_recipe_is_the_recipe(recipe: Recipe, run: RunFolder) -> None:
    assert resolve(str(run.recipe_file)).identity == recipe.identity


@pytest.mark.promise("two processes on one run", "the second is refused, with the holder's name")
def test_two_processes_do_not_work_in_one_folder(run: RunFolder) -> None:
    with (
        run.lock(),
        pytest.raises(DinobenchError, match=r"another process \(.*\) is working on .*--new"),
        RunFolder(run.path).lock(),
    ):
        pass
    with run.lock():
        pass


HOLD = """
import sys, time
from pathlib import Path
from dinobench.runs import RunFolder
with RunFolder(Path(sys.argv[1])).lock():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.promise("a lock file left by a process that died", "the next start takes it")
def test_the_lock_of_a_killed_process_does_not_block(run: RunFolder) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        assert runs.describe_status(run) == "running"
        # the second says who, before anything was written to run.json
        with (
            pytest.raises(DinobenchError, match=rf"another process \(.+:{process.pid}\) .*runs show {run.path}"),
            run.lock(),
        ):
            pass
        process.kill()
    assert (run.path / ".lock").exists()
    with run.lock():
        pass
    assert runs.describe_status(run) == "killed"


def test_two_who_look_at_a_killed_run_do_not_take_each_other_for_it(run: RunFolder) -> None:
    seen: list[str] = []
    lookers = [
        threading.Thread(target=lambda: seen.extend(runs.describe_status(RunFolder(run.path)) for _ in range(50)))
        for _ in range(4)
    ]
    for looker in lookers:
        looker.start()
    for looker in lookers:
        looker.join()
    assert set(seen) == {"killed"} and len(seen) == 200


def test_kept_checkpoints_come_in_the_order_of_their_steps(run: RunFolder) -> None:
    run.last_checkpoint.touch()
    (run.checkpoints / "step=copy.pt").touch()  # of the user
    assert run.kept_checkpoints() == [run.last_checkpoint]
    for step in (1000, 200):
        (run.checkpoints / f"step={step:08d}.pt").touch()
    assert [path.name for path in run.kept_checkpoints()] == ["step=00000200.pt", "step=00001000.pt"]


def test_every_start_is_kept_with_what_it_ran_on(run: RunFolder) -> None:
    run.started({"command": "one"})
    run.started({"command": "two"})
    starts = runs.read_json(run.path / "environment.json")["starts"]
    assert [start["command"] for start in starts] == ["one", "two"]


def test_a_checkpoint_knows_its_run_and_a_lone_file_has_none(run: RunFolder, tmp_path: Path) -> None:
    run.last_checkpoint.touch()
    assert runs.run_of_checkpoint(run.last_checkpoint) == run
    assert runs.run_of_checkpoint(tmp_path / "model.pt") is None


def test_a_damaged_state_is_named(run: RunFolder) -> None:
    run.state_file.write_text('{"status": "dancing"}')
    with pytest.raises(DinobenchError, match=r"run\.json was altered"):
        run.state()


def test_a_folder_without_a_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(DinobenchError, match="is not a run folder"):
        runs.open_run(tmp_path)
