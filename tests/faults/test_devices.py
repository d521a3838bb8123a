"""What happens to a process: a worker killed, no memory left, a clock that jumps, images that go away."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from breaking import QUIET, TINY, Listener, run_of, start, tiny, until
from dinobench.cli import app
from dinobench.evaluate import Evaluation, evaluate
from dinobench.runs import RunFolder
from pretrain.errors import DinobenchError
from pretrain.faults import is_out_of_memory, out_of_memory_told, workers_told
from pretrain.models import checkpoint
from pretrain.training.loop import train
from pretrain.training.trainer import Trainer
from suites import passes
from suites.cache import FeatureCache, content_key
from suites.measure import measure
from suites.memory import InHalves
from suites.suite import load_suite

EVERY = "checkpoint.every_steps=3"
HOST = (
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
)
NO_MEMORY = {
    "GPU": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "host": lambda: RuntimeError(HOST),
    "python": MemoryError,
}


def picture(number: int) -> Image.Image:
    generator = torch.Generator().manual_seed(number)
    return Image.fromarray(torch.randint(0, 256, (12, 12, 3), generator=generator, dtype=torch.uint8).numpy())


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """64 PNG files of two classes, of two sizes, so that they stay files."""
    for number in range(64):
        path = tmp_path / "images" / f"class{number % 2}" / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).resize((12 + number % 3, 12)).save(path)
    return tmp_path / "images"


def from_files(images: Path, *overrides: str) -> Any:
    return tiny(*QUIET, EVERY, *overrides, data=f"folder:{images}")


def weights(folder: Path) -> dict[str, Tensor]:
    return checkpoint.read(folder / "checkpoints" / "last.pt")["teacher"]


def children() -> set[int]:
    path = Path(f"/proc/self/task/{os.getpid()}/children")
    return {int(number) for number in path.read_text().split()}


@pytest.mark.slow
@pytest.mark.promise("a dataloader worker killed (SIGKILL)", "told as such, exit 3; resumed from the last checkpoint")
def test_a_killed_worker_ends_the_run_with_a_reason_and_is_resumed(images: Path, tmp_path: Path) -> None:
    recipe, before = from_files(images, "runtime.workers=1"), children()

    def kill(step: int) -> None:
        if step == 4:
            for number in children() - before:
                os.kill(number, signal.SIGKILL)
            time.sleep(0.1)

    with pytest.raises(DinobenchError, match=r"decodes images (is killed by signal: Killed|exited).*workers") as error:
        start(recipe, tmp_path / "runs", Listener(kill))
    assert error.value.exit_code == 3
    (folder,) = (tmp_path / "runs").glob("dino-*")
    assert checkpoint.read(folder / "checkpoints" / "last.pt")["step"] == 3
    assert start(recipe, tmp_path / "runs", resume=True).state.status == "finished"
    train(recipe, folder=tmp_path / "whole")
    assert all(torch.equal(value, weights(folder)[name]) for name, value in weights(tmp_path / "whole").items())


@pytest.mark.promise("an error of ours inside a worker", "its sentence, without the worker's traceback")
def test_an_error_of_a_worker_comes_without_its_traceback() -> None:
    passed_on = (
        "Caught DinobenchError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File\n"
        "pretrain.errors.DinobenchError: folder train: no image like a.png can be read\n"
    )
    with pytest.raises(DinobenchError) as error, workers_told("x"):
        raise DinobenchError(passed_on)
    assert str(error.value) == "folder train: no image like a.png can be read"
    with pytest.raises(DinobenchError, match="^plain$"), workers_told("x"):
        raise DinobenchError("plain")
    with pytest.raises(RuntimeError, match="other"), workers_told("x"):
        raise RuntimeError("other")


@pytest.mark.promise("images removed while a training reads them", "a few are named and replaced; the run goes on")
@pytest.mark.promise("the disk of the images is gone during a training", "named, exit 3; the last checkpoint is kept")
@pytest.mark.parametrize("gone", [2, 60])
def test_images_that_go_missing_are_named(
    gone: int, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = from_files(images, "runtime.workers=0", "schedule.steps_per_epoch=4")

    def remove(step: int) -> None:
        if step == 3:
            for path in sorted(images.rglob("*.png"))[:gone]:
                path.unlink()

    if gone == 2:
        with caplog.at_level(logging.WARNING):
            assert start(recipe, tmp_path / "runs", Listener(remove)).state.status == "finished"
        assert re.search(r"unreadable image, replaced .*class0/000\.png", caplog.text)
        return
    with pytest.raises(DinobenchError, match=r"of 64 images have become unreadable.*not mounted.*\.png") as error:
        start(recipe, tmp_path / "runs", Listener(remove))
    assert error.value.exit_code == 3
    (folder,) = (tmp_path / "runs").glob("dino-*")
    assert checkpoint.read(folder / "checkpoints" / "last.pt")["step"] == 3


@pytest.mark.promise("images removed, replaced or added before a resume", "both fingerprints are named; exit 3")
@pytest.mark.parametrize("change", ["removed", "replaced", "added"])
def test_changed_images_are_named_when_a_run_is_resumed(change: str, images: Path, tmp_path: Path) -> None:
    recipe = from_files(images, "runtime.workers=0")
    until(recipe, tmp_path / "run", 3)
    before = checkpoint.read(tmp_path / "run" / "checkpoints" / "last.pt")["images"]
    kept = {path: path.read_bytes() for path in images.rglob("*.png")}
    first = images / "class0" / "000.png"
    if change == "removed":
        first.unlink()
    else:
        picture(999).save(first if change == "replaced" else images / "class0" / "999.png")
    number = {"removed": 63, "replaced": 64, "added": 65}[change]
    now = recipe.data.open().fingerprint
    said = rf"has changed since .*64 images \(fingerprint {before['fingerprint'][:12]}\), now {number} \({now[:12]}\)"
    with pytest.raises(DinobenchError, match=said) as error:
        train(recipe, folder=tmp_path / "run", resume=True)
    assert error.value.exit_code == 3
    (images / "class0" / "999.png").unlink(missing_ok=True)
    for path, content in kept.items():
        path.write_bytes(content)
    assert train(recipe, folder=tmp_path / "run", resume=True).status == "finished"


@pytest.mark.promise("a checkpoint from before images were noted in it", "resumed as before")
def test_a_checkpoint_that_does_not_say_its_images_is_resumed(tmp_path: Path) -> None:
    recipe = tiny(*QUIET, EVERY)
    until(recipe, tmp_path, 3)
    last = tmp_path / "checkpoints" / "last.pt"
    payload = checkpoint.read(last)
    del payload["images"]
    checkpoint.save(last, payload)
    assert train(recipe, folder=tmp_path, resume=True).status == "finished"


@pytest.mark.promise("out of memory at the evaluation", "the batch halves itself and says so; the scores stay")
def test_a_batch_that_does_not_fit_is_halved_and_the_scores_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_of(tiny(*QUIET), tmp_path)
    train(tiny(*QUIET), folder=run.path)
    sizes: list[int] = []
    whole = passes.describe

    def describe(backbone: torch.nn.Module, x: Tensor, blocks: Any) -> Tensor:
        sizes.append(len(x))
        if len(x) > 70:
            raise NO_MEMORY["GPU"]()
        return whole(backbone, x, blocks)

    model, suite = checkpoint.load(run.last_checkpoint), load_suite("digits_knn")
    undisturbed = measure(suite, model, baselines=False)
    monkeypatch.setattr(passes, "describe", describe)
    with caplog.at_level(logging.WARNING):
        halved = measure(suite, model, baselines=False)
    assert (halved.scores, halved.interval) == (undisturbed.scores, undisturbed.interval)
    assert "out of memory at 256 images at once, going on with 128" in caplog.text
    assert "out of memory at 128 images at once, going on with 64" in caplog.text
    assert sizes.count(256) == sizes.count(128) == 2, "once for each split, not for every batch"


@pytest.mark.promise("not even one image fits in memory", "its size is named, the suite fails, the others go on")
@pytest.mark.parametrize("kind", NO_MEMORY)
def test_one_image_that_does_not_fit_is_told(kind: str) -> None:
    def never(batch: Tensor) -> Tensor:
        raise NO_MEMORY[kind]()

    with pytest.raises(DinobenchError, match=r"one image of 24 x 32 px \(.*emory.*--device cpu"):
        InHalves()(never, torch.zeros(5, 3, 24, 32))
    with pytest.raises(RuntimeError, match="shapes"):  # no matter of memory
        InHalves()(lambda batch: torch.ones(2) @ torch.ones(3, 3), torch.zeros(4, 1))


def test_parts_of_any_size_give_what_the_batch_gives() -> None:
    batch, apply = torch.arange(22.0).view(11, 2), InHalves()
    for limit in (None, 1, 2, 4, 11, 20):
        apply.limit = limit
        assert torch.equal(apply(lambda part: part * 2, batch), batch * 2)


@pytest.mark.promise("out of memory in a protocol of the evaluation", "suite and way out are named, the others go on")
def test_a_protocol_without_memory_fails_its_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from suites.protocols import knn

    run = run_of(tiny(*QUIET), tmp_path)
    train(tiny(*QUIET), folder=run.path)

    def fail(*inputs: Any) -> None:
        raise NO_MEMORY["host"]()

    monkeypatch.setattr(knn, "run", fail)
    suites = [load_suite("digits_knn"), load_suite("digits_fewshot")]
    results, failures = evaluate(run.last_checkpoint, suites, Evaluation(output=tmp_path, device="cpu"), lambda t: None)
    assert [result.suite_name for result in results] == ["digits_fewshot"]
    assert [failure.suite for failure in failures] == ["digits_knn@1"]
    assert "out of memory at suite digits_knn@1" in failures[0].reason


@pytest.mark.promise("out of memory in a training step", "exit 3 with the keys that save memory; last checkpoint kept")
@pytest.mark.parametrize("kind", NO_MEMORY)
def test_a_training_without_memory_says_what_saves_some(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Trainer.step

    def step(self: Trainer, batch: Any, number: int) -> None:
        if number == 4:
            raise NO_MEMORY[kind]()
        whole(self, batch, number)

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(DinobenchError, match=r"out of memory on cpu .*runtime\.accumulate=2") as error:
        train(tiny(EVERY), folder=tmp_path)
    assert error.value.exit_code == 3
    assert checkpoint.read(tmp_path / "checkpoints" / "last.pt")["step"] == 3


@pytest.mark.promise("out of memory anywhere else", "exit 3, no traceback")
def test_no_memory_is_no_bug(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(output: Path) -> None:
        raise MemoryError

    monkeypatch.setattr("dinobench.runs.list_runs", fail)
    assert app.run(["runs", "ls"]) == 3
    assert capsys.readouterr().err.startswith("error: out of memory")
    assert not is_out_of_memory(RuntimeError("size mismatch"))
    with pytest.raises(RuntimeError, match="size mismatch"), out_of_memory_told("x", "y"):
        raise RuntimeError("size mismatch")


@pytest.mark.promise("the clock is set back or forward by an hour", "durations, rates and ETAs stay those of the steps")
@pytest.mark.parametrize("jump", [-3600.0, 3600.0])
def test_a_jump_of_the_clock_changes_no_duration(jump: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, offset = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + offset[0])

    class Clock(Listener):
        def progress(self, progress: Any) -> None:
            super().progress(progress)
            offset[0] = jump * (progress.step >= 5)
            assert progress.images_per_second > 0
            assert 0 <= progress.eta_seconds < 600

    began = time.monotonic()
    summary = start(tiny(*QUIET), tmp_path, Clock())
    took = time.monotonic() - began
    assert 0 < summary.state.seconds <= took
    assert summary.state.images_per_second > 0
    rates = summary.run.journal.curve("speed/images_per_second")[1]
    assert len(rates) == 5 and min(rates) > 0
    assert [point.step for point in summary.run.journal.read() if "loss/total" in point.metrics] == [2, 4, 6, 8, 10]


@pytest.mark.promise("the clock jumps over the age of abandoned cache files", "it costs time, no result")
def test_a_cache_file_taken_for_abandoned_costs_time_and_not_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, other = FeatureCache(tmp_path), FeatureCache(tmp_path)
    ahead = time.time() + 48 * 3600

    def write(path: Path, known: dict[str, str]) -> None:
        path.write_bytes(b"half")
        with monkeypatch.context() as jumped:
            jumped.setattr("suites.cache.time.time", lambda: ahead)
            other.get_or_compute(content_key(other=1), lambda: ({"x": torch.ones(2)}, {}))
        assert not path.exists()

    with pytest.warns(UserWarning, match="could not be written"):
        assert cache.get_or_write(content_key(one=1), write) is None
    assert cache.read(content_key(one=1)) is None
    assert cache.read(content_key(other=1)) is not None


NO_HOME = """
import pwd
def unlisted(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = unlisted
from dinobench.cli.app import main
main()
"""
NAMES = ("HOME", "DINOBENCH_CACHE", "USER", "LOGNAME", "LNAME", "USERNAME")


@pytest.mark.faults
@pytest.mark.promise("a user of no name without a home, as in a container", "pretrains and evaluates")
def test_a_user_without_name_and_home_can_work(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in NAMES}
    environment |= {"TMPDIR": str(tmp_path), "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    arguments = ["pretrain", "dino", "--preset", "digits", *TINY, "evaluation.suites=[digits_knn]"]
    command = [sys.executable, "-c", NO_HOME, *arguments, "--output", str(tmp_path / "runs")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    (folder,) = (tmp_path / "runs").glob("dino-*")
    assert RunFolder(folder).state().mirrored
    assert list(tmp_path.glob("**/features/*/*.safetensors"))


@pytest.mark.promise("an optional package is absent", "told with the command that installs it, or done without; exit 3")
@pytest.mark.parametrize(("package", "module"), [("mlflow", "dinobench.tracking"), ("submitit", "dinobench.slurm")])
def test_an_absent_package_is_named(package: str, module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    use: Callable[[], Any]
    if package == "mlflow":
        from dinobench import tracking

        use = lambda: tracking.connect(f"sqlite:///{tmp_path / 'mlflow.db'}")  # noqa: E731
    else:
        from dinobench import slurm

        use = lambda: slurm.submit(["pretrain", "dino"], {}, tmp_path)  # noqa: E731
    with pytest.raises(DinobenchError, match=rf"{package}.*install") as error:
        use()
    assert error.value.exit_code == 3
