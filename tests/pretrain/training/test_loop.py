"""The loop as a whole, on real digits: it resumes bit by bit, stops with a reason, and keeps what it promised."""

from __future__ import annotations

import math
import os
import signal

import pytest
import torch

from pretrain.errors import CheckFailed, DinobenchError, UsageError
from pretrain.models import checkpoint
from pretrain.training.checkpoints import CheckpointFolder
from pretrain.training.loop import train
from pretrain.training.recipe import resolve

# 1297 images / 256 = 5 steps an epoch.
SHORT = [
    "schedule.epochs=2",
    "schedule.warmup_epochs=0",
    "optim.batch_size=256",
    "head.hidden=32",
    "head.num_prototypes=24",
    "model.kwargs={img_size: 16, patch_size: 8, embed_dim: 24, depth: 1, num_heads: 2}",
    "model.drop_path=0.2",
    "runtime.log_every=3",
    "runtime.device=cpu",
    "checkpoint.every_epochs=1",
    "checkpoint.every_steps=0",
]


def _recipe(*overrides, method="dino_vmf"):
    return resolve(method, preset="digits", overrides=[*SHORT, *overrides])


def _weights(folder):
    payload = checkpoint.read(folder / "checkpoints" / "last.pt")
    return {**payload["student"], **{f"teacher.{k}": v for k, v in payload["teacher"].items()}}


def _recorder():
    lines = []
    return lines, lambda metrics, step: lines.append((step, metrics))


def _interrupt_at(step, number=signal.SIGTERM):
    def progress(state):
        if state.step == step:
            os.kill(os.getpid(), number)

    return progress


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Weights and log of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    lines, log = _recorder()
    train(_recipe(), folder=folder, log=log)
    return _weights(folder), lines


@pytest.mark.promise("SIGTERM at any step", "resumed, weights and log are those of the undisturbed run")
@pytest.mark.parametrize("stop_at", [1, 4, 5, 9])
def test_stopping_at_any_step_and_resuming_gives_the_same_weights_and_log(stop_at, whole, tmp_path):
    recipe = _recipe()
    parts, log_parts = _recorder()
    first = train(recipe, folder=tmp_path / "parts", log=log_parts, progress=_interrupt_at(stop_at))
    assert (first.status, first.step, first.note) == ("interrupted", stop_at, "SIGTERM")
    second = train(recipe, folder=tmp_path / "parts", log=log_parts, resume=True)
    assert (second.status, second.step) == ("finished", 10)
    weights, lines = whole
    for (name, value), other in zip(weights.items(), _weights(tmp_path / "parts").values(), strict=True):
        assert torch.equal(value, other), name

    def without_speed(lines):
        return [(step, {k: v for k, v in metrics.items() if not k.startswith("speed/")}) for step, metrics in lines]

    assert without_speed(parts) == without_speed(lines)


@pytest.mark.promise("the time of a job ends", "a checkpoint; resumed to equal weights")
def test_after_its_minutes_a_run_stops_with_a_checkpoint_and_goes_on_when_resumed(whole, tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr("pretrain.training.stop.monotonic", lambda: clock[0])

    def progress(state):
        clock[0] += 50

    recipe = _recipe("runtime.max_minutes=3")  # 180 s of steps of 50 s: the fourth ends after them
    folder = tmp_path / "parts"
    outcomes = [train(recipe, folder=folder, progress=progress, resume=True) for _ in range(3)]
    assert [(outcome.status, outcome.step) for outcome in outcomes] == [
        ("interrupted", 4),
        ("interrupted", 8),
        ("finished", 10),
    ]
    assert outcomes[0].note == "runtime.max_minutes"
    weights = _weights(folder)
    for name, value in whole[0].items():
        assert torch.equal(value, weights[name]), name


@pytest.mark.promise("SIGUSR1 or SIGUSR2 during a training", "a checkpoint after the step in progress")
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_the_signals_of_slurm_end_a_training_with_a_checkpoint(number, tmp_path):
    outcome = train(_recipe(), folder=tmp_path, progress=_interrupt_at(2, number))
    assert (outcome.status, outcome.step, outcome.note) == ("interrupted", 2, number.name)
    assert checkpoint.read(tmp_path / "checkpoints" / "last.pt")["step"] == 2


@pytest.mark.promise("SIGTERM while the last checkpoint is written", "obeyed after it; nothing is left to train")
def test_a_signal_during_the_last_checkpoint_is_not_lost(tmp_path):
    def tell(path, step):
        if step == 10:
            signal.raise_signal(signal.SIGTERM)

    told = train(_recipe(), folder=tmp_path, on_checkpoint=tell)
    assert (told.status, told.step, told.note) == ("interrupted", 10, "SIGTERM")
    again = train(_recipe(), folder=tmp_path, resume=True)
    assert (again.status, again.step, again.images_per_second) == ("finished", 10, 0.0)


def test_checkpoints_are_announced_kept_up_to_the_limit_and_last_is_whole(tmp_path):
    announced = []
    recipe = _recipe("schedule.epochs=4", "checkpoint.keep=2", "checkpoint.every_steps=2")
    outcome = train(recipe, folder=tmp_path, on_checkpoint=lambda path, step: announced.append((path.name, step)))
    assert [step for _, step in announced] == [5, 10, 15, 20]
    assert [path.name for path in outcome.checkpoints] == ["step=00000015.pt", "step=00000020.pt"]
    payload = checkpoint.read(tmp_path / "checkpoints" / "last.pt")
    assert (payload["step"], payload["images_seen"]) == (20, 20 * 256)


def test_every_interval_logs_health_prototypes_schedules_and_speed(tmp_path):
    lines, log = _recorder()
    train(_recipe(), folder=tmp_path, log=log)
    steps = [step for step, metrics in lines if "loss/total" in metrics]
    assert steps == [3, 6, 9, 10]
    metrics = dict(lines[0][1])
    assert all(math.isfinite(value) for value in metrics.values())
    wanted = {
        "loss/total",
        "loss/over_lnK",
        "loss/kl",
        "health/target_entropy",
        "health/mean_target_entropy",
        "health/information",
        "health/feature_std",
        "health/effective_rank",
        "health/collapsed",
        "prototypes/usage_entropy",
        "prototypes/used",
        "prototypes/norm_q50",
        "prototypes/kappa_q50",
        "optim/lr",
        "optim/teacher_temperature",
        "speed/images_per_second",
        "speed/data_wait_fraction",
        "speed/decode_wait_fraction",
    }
    assert wanted <= metrics.keys()
    assert any("prototypes/unique" in metrics for _, metrics in lines)
    assert all(name.count("/") == 1 for name in metrics)


@pytest.mark.promise("NaN in the loss", "metric and step named; last good checkpoint kept")
def test_a_loss_that_is_not_finite_stops_with_metric_and_step_and_keeps_the_last_good_checkpoint(tmp_path):
    recipe = _recipe("checkpoint.every_steps=1", "runtime.log_every=5", "schedule.epochs=3")
    original = CheckpointFolder.write

    def poison(self, trainer, step, *, kept):
        original(self, trainer, step, kept=kept)
        if step == 3:
            with torch.no_grad():
                next(trainer.method.student.parameters()).fill_(float("nan"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointFolder, "write", poison)
        with pytest.raises(DinobenchError, match="loss/total is not finite since step 4"):
            train(recipe, folder=tmp_path)
    payload = checkpoint.read(tmp_path / "checkpoints" / "last.pt")
    assert payload["step"] == 3
    assert all(torch.isfinite(value).all() for value in payload["student"].values())


@pytest.mark.promise("the targets collapse", "named and stopped; exit 4")
def test_a_collapsed_run_is_named_and_stopped(tmp_path):
    # A teacher so warm that every target is flat.
    recipe = _recipe(
        "target.temperature=50.0",
        "schedule.epochs=6",
        "runtime.log_every=2",
        "runtime.stop_on_collapse=true",
        method="dino",
    )
    lines, log = _recorder()
    with pytest.raises(CheckFailed, match=r"collapsed \(uniform\)"):
        train(recipe, folder=tmp_path, log=log)
    assert lines[-1][1]["health/collapsed"] == 1.0
    assert all(metrics.get("health/collapsed", 0.0) == 0.0 for _, metrics in lines[:-1])


AS_PRESET = ()
SMALL = (
    "head.hidden=32",
    "model.kwargs={img_size: 16, patch_size: 4, embed_dim: 24, depth: 1, num_heads: 2}",
    "optim.batch_size=128",
)


@pytest.mark.parametrize("sizes", [SMALL, pytest.param(AS_PRESET, marks=pytest.mark.slow)], ids=["small", "as preset"])
@pytest.mark.parametrize("method", ["dino", "dino_vmf", "dino_free"])
def test_a_healthy_run_never_triggers_the_collapse_stop(method, sizes, tmp_path):
    recipe = resolve(
        method,
        preset="digits",
        overrides=[*sizes, "schedule.epochs=8", "schedule.warmup_epochs=1", "runtime.log_every=10",
                   "runtime.device=cpu", "runtime.stop_on_collapse=true"],
    )  # fmt: skip
    lines, log = _recorder()
    assert train(recipe, folder=tmp_path, log=log).status == "finished"
    assert all(metrics.get("health/collapsed", 0.0) == 0.0 for _, metrics in lines)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.batch_size=2000", "1297 images, fewer than the batch of 2000"),
        ("views.local_size=7", "7"),
        ("data.name=digit", "did you mean 'digits'"),
        ("model.name=vit_smal_patch16_224", "did you mean vit_small_patch16_224"),
        ("model.kwargs={img_size: 16, patch_size: 8, embed_dim: 25, num_heads: 2}", "cannot be built"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(override, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        train(_recipe(override), folder=tmp_path)


def _damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()  # not through a second name of the same file
    path.write_bytes(content)


@pytest.mark.promise("a flipped bit in last.pt", "resume goes on from the newest whole checkpoint to the same weights")
def test_where_last_pt_is_damaged_a_run_resumes_from_the_newest_whole_checkpoint(tmp_path):
    recipe = _recipe()
    train(recipe, folder=tmp_path / "whole")
    train(recipe, folder=tmp_path / "parts", progress=_interrupt_at(7))
    _damage(tmp_path / "parts" / "checkpoints" / "last.pt")
    again = []
    assert train(recipe, folder=tmp_path / "parts", resume=True, progress=again.append).status == "finished"
    assert again[0].step == 6  # after step 5, which was kept
    for name, value in _weights(tmp_path / "whole").items():
        assert torch.equal(value, _weights(tmp_path / "parts")[name]), name


class _Writer:
    """A trainer of which only the writing is of interest: it writes a step and may spoil the file."""

    def __init__(self):
        self.spoil, self.full = False, False

    def save(self, path, step):
        if self.full:
            raise DinobenchError(f"cannot write {path} ([Errno 28] No space left on device)")
        checkpoint.save(path, {"format": checkpoint.FORMAT, "step": step, "student": {"w": torch.ones(1000)}})
        if self.spoil:
            path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.promise("last.pt cut short, gone, or with a flipped bit", "the newest whole checkpoint is resumed from")
@pytest.mark.parametrize("damage", ["cut short", "gone", "flipped bit"])
def test_the_newest_whole_checkpoint_is_resumed_from(damage, tmp_path):
    files, writer = CheckpointFolder(tmp_path, keep=2), _Writer()
    for step, kept in ((5, True), (10, True), (12, False)):
        files.write(writer, step, kept=kept)
    assert files.resume_from() == files.last
    _damage(files.path(10))
    if damage == "cut short":
        files.last.write_bytes(files.last.read_bytes()[:-1000])
    elif damage == "gone":
        files.last.unlink()
    else:
        _damage(files.last)
    assert files.resume_from() == files.path(5)


@pytest.mark.promise("every checkpoint of a run damaged", "resume refuses by name; it does not begin again unasked")
def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_again(tmp_path):
    files = CheckpointFolder(tmp_path, keep=2)
    assert files.resume_from() is None
    files.write(_Writer(), 5, kept=True)
    for file in (files.last, files.path(5)):
        _damage(file)
    with pytest.raises(DinobenchError, match=r"last.pt is damaged.* record .*step=00000005.pt is damaged.*--new"):
        files.resume_from()


@pytest.mark.promise("a checkpoint that is not whole on disk, or no room for it", "the last good one is never removed")
@pytest.mark.parametrize("trouble", ["spoil", "full"])
@pytest.mark.parametrize("keep", [1, 2])
def test_the_last_good_checkpoint_stays_when_the_next_one_is_not_whole(keep, trouble, tmp_path):
    files, writer = CheckpointFolder(tmp_path, keep), _Writer()
    for step in (5, 10):
        files.write(writer, step, kept=True)
    setattr(writer, trouble, True)
    with pytest.raises(DinobenchError, match="damaged|No space left"):
        files.write(writer, 15, kept=True)
    assert checkpoint.read(files.resume_from())["step"] == 10
    assert [checkpoint.read(path)["step"] for path in files.kept()[:keep]] == [5, 10][-keep:]
    setattr(writer, trouble, False)
    files.write(writer, 15, kept=True)
    assert [checkpoint.read(path)["step"] for path in files.kept()] == [5, 10, 15][-keep:]


@pytest.mark.promise("a damaged checkpoint of a later step", "it does not count as kept, and displaces no good one")
def test_a_damaged_later_checkpoint_displaces_no_good_one(tmp_path):
    files, writer = CheckpointFolder(tmp_path, keep=1), _Writer()
    for step in (20, 30):
        writer.save(files.path(step), step)
        _damage(files.path(step))
    (tmp_path / "step=copy.pt").write_bytes(b"of the user")
    files.write(writer, 15, kept=True)
    assert (files.path(15).is_file(), (tmp_path / "step=copy.pt").is_file()) == (True, True)
    assert files.resume_from() == files.last
    files.last.unlink()
    assert files.resume_from() == files.path(15)
