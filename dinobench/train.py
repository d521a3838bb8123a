"""A pretraining from recipe to numbers: folder, loop, tracking, evaluation of its checkpoints, figures.

The loop knows nothing of all this: it gets `log` and `progress` and gives back checkpoints.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinobench import environment, plots, tracking
from dinobench.condition import refuse_unfinished
from dinobench.evaluate import Evaluation, Failure, evaluate_all, missing
from dinobench.files import write_text
from dinobench.mirror import Mirror
from dinobench.results import Result
from dinobench.runs import RunFolder, RunState, find_run, now
from pretrain.errors import CheckFailed, DinobenchError

if TYPE_CHECKING:
    from dinobench.reporter import Reporter
    from pretrain.training.recipe import Recipe
    from pretrain.training.runtime import Runtime
    from suites.suite import Suite


@dataclass(frozen=True)
class Request:
    """What the command asks for, beside the recipe."""

    output: Path
    command: str
    """As typed, for messages and environment.json."""
    resume: bool = False
    new: bool = False
    evaluate: bool = True


@dataclass(frozen=True)
class Summary:
    """How a pretraining ended, for printing."""

    run: RunFolder
    state: RunState
    trained: bool
    """False when the run was finished before and nothing was trained."""
    results: list[Result] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    links: dict[str, str] = field(default_factory=dict)
    """Pages of the tracking server, without its address."""


@dataclass(frozen=True)
class _Job:
    """What rank 0 decided; the other ranks follow it."""

    folder: Path
    train: bool
    resume: bool


def pretrain(recipe: Recipe, request: Request, reporter: Reporter) -> Summary | None:
    """Train, continue, or find finished; then evaluate. None on ranks other than 0.

    Raises:
        DinobenchError: the folder is taken, of another recipe, unfinished without --resume, or the training fails.
    """
    from pretrain.training.runtime import Runtime
    from suites.suite import load_suite

    suites = [load_suite(name) for name in recipe.evaluation.suites]  # a wrong name is told now, not after the training
    runtime = Runtime.start(recipe.runtime)
    if not runtime.is_main:
        return _follow(recipe, runtime)
    with ExitStack() as held:
        job = _agree(runtime, lambda: _claim(recipe, request, held))
        run = RunFolder(job.folder)
        reporter.keep(run.log_file)
        reporter.say(f"run folder {run.path}")
        checkpoints = run.kept_checkpoints()
        settings = Evaluation(output=request.output, device=recipe.runtime.device)
        todo = _applicable(suites, recipe, reporter.say) if request.evaluate else []
        shown = run.state().mirrored or not recipe.tracking.enabled
        if not job.train and shown and not missing(checkpoints, todo, settings):
            reporter.say("this recipe is finished here: nothing to train (--new starts another run)")
            results, failures = _evaluate(run, todo, settings, None, lambda text: None)
            return Summary(run, run.state(), False, results, failures)
        return _Session(recipe, request, reporter, run, runtime).work(job, todo, settings)


def _applicable(suites: list[Suite], recipe: Recipe, say: Callable[[str], None]) -> list[Suite]:
    """The suites that say something about the checkpoints of this recipe."""
    if recipe.head.num_prototypes:
        return suites
    for suite in suites:
        if suite.needs_prototypes:
            say(f"{suite.id} does not apply: {recipe.method.name} has no prototypes")
    return [suite for suite in suites if not suite.needs_prototypes]


def _follow(recipe: Recipe, runtime: Runtime) -> None:
    """A rank other than 0: trains along, writes nothing, and says only that another rank is lost."""
    from pretrain.training.distributed import LostRank
    from pretrain.training.loop import train

    try:
        job = _agree(runtime, None)
        if job.train:
            train(recipe, folder=job.folder, resume=job.resume)
    except LostRank:  # it may be rank 0 that is lost
        raise
    except DinobenchError as error:  # rank 0 tells it
        raise SystemExit(error.exit_code) from error


def _agree(runtime: Runtime, claim: Callable[[], _Job] | None) -> _Job:
    """Rank 0 claims the folder; every rank gets its decision, or its error."""
    answer: list[_Job | DinobenchError | None] = [None]
    if claim is not None:
        try:
            answer = [claim()]
        except DinobenchError as error:
            answer = [error]
    if runtime.world_size > 1:
        import torch.distributed as dist

        dist.broadcast_object_list(answer, src=0, device=runtime.device)
    decided = answer[0]
    if isinstance(decided, DinobenchError):
        raise decided
    assert decided is not None
    return decided


def _claim(recipe: Recipe, request: Request, held: ExitStack) -> _Job:
    """Find and lock the run folder, and decide what there is to do in it."""
    run = find_run(recipe, request.output, new=request.new)
    held.enter_context(run.lock())
    if not request.resume:
        refuse_unfinished(run, ours=True)
    if not run.exists:
        started = bool(run.kept_checkpoints())
        run.create(recipe)
        return _Job(run.path, train=True, resume=started)
    if not run.recipe_file.is_file():
        write_text(run.recipe_file, recipe.to_yaml())
    unfinished = run.state().status != "finished"
    return _Job(run.path, train=unfinished, resume=unfinished)


class _Session:
    """One start of a run, on rank 0."""

    def __init__(self, recipe: Recipe, request: Request, reporter: Reporter, run: RunFolder, runtime: Runtime):
        self.recipe, self.request, self.reporter, self.run, self.runtime = recipe, request, reporter, run, runtime
        self.mirror: Mirror | None = None

    def work(self, job: _Job, suites: Sequence[Suite], settings: Evaluation) -> Summary:
        """Train if there is something to train, evaluate if it finished, draw, and bring MLflow up to date."""
        results: list[Result] = []
        failures: list[Failure] = []
        first = self._first_step() if job.resume else 0
        if job.train:
            self.run.journal.cut(first)
            resumed = first if job.resume else None
            facts = environment.describe(
                self.request.command, str(self.runtime.device), now(), resumed, self.runtime.world_size
            )
            self.run.started(facts)
        self._start_mirror()
        try:
            if job.train:
                if job.resume:
                    self.reporter.say(f"resuming at step {first}")
                self._train(job)
            elif self.mirror:  # a kill after the training may have left the MLflow run open
                self.mirror.finish(self.run.state().status)
            self._draw()
            if self.run.state().status == "finished":
                results, failures = _evaluate(self.run, suites, settings, self.mirror, self.reporter.say)
        finally:
            links = self._stop_mirror()
        return Summary(self.run, self.run.state(), job.train, results, failures, links)

    def _first_step(self) -> int:
        """Where a resumed training goes on.

        Raises:
            DinobenchError: every checkpoint is damaged.
        """
        from pretrain.training.checkpoints import CheckpointFolder, damage_of

        start = CheckpointFolder(self.run.checkpoints, writes=False).resume_from()
        last = self.run.last_checkpoint
        if start is not None and start != last:
            reason = damage_of(last) if last.is_file() else f"there is no {last}"
            self.reporter.warn(f"{reason}; going on from {start.name}, the newest checkpoint that is whole")
        return checkpoint_step(start) if start else 0

    def _train(self, job: _Job) -> None:
        from pretrain.training.loop import train

        status, note = "failed", ""
        done: dict[str, float] = {}
        try:
            outcome = train(
                self.recipe,
                folder=self.run.path,
                resume=job.resume,
                log=self._log,
                on_checkpoint=lambda path, step: self.reporter.say(f"checkpoint {path.name} at step {step}"),
                progress=self.reporter.progress,
            )
            status, note = outcome.status, outcome.note
            if outcome.limited_by:
                self.reporter.say(outcome.limited_by)
            seconds = self.run.state().seconds + outcome.seconds
            done = {"step": outcome.step, "seconds": seconds, "images_per_second": outcome.images_per_second}
        except KeyboardInterrupt:
            status, note = "interrupted", "SIGINT"
            raise
        except SystemExit as error:  # of the handler outside the loop: before its first step, or after its last
            status, note = "interrupted", _signal_name(error)
            raise
        except CheckFailed as error:
            status, note = "collapsed", str(error)
            raise
        except BaseException as error:
            note = str(error)
            raise
        finally:
            self.reporter.close_bar()
            if self.mirror:
                self.mirror.finish(status)
            self._note(ended_well=bool(done), status=status, note=note, **done)

    def _note(self, *, ended_well: bool, **changes: Any) -> None:
        """Write how the training ended to run.json; where that fails too, what ended it is told, not this."""
        try:
            self.run.update(**changes)
        except DinobenchError as error:
            if ended_well:
                raise
            self.reporter.warn(str(error))

    def _draw(self) -> None:
        """The figures; a training does not fail for them."""
        try:
            draw_figures(self.run)
        except DinobenchError as error:
            self.reporter.warn(f"no figures: {error}")

    def _log(self, metrics: dict[str, float], step: int) -> None:
        """Note a point. On a slow disk a step that logs waits for this one append, one that writes a checkpoint for its
        file, and every few seconds one for a line of train.log; all others touch no file.
        """
        point = self.run.journal.append(metrics, step)
        if self.mirror:
            self.mirror.log(point)

    def _start_mirror(self) -> None:
        if not self.recipe.tracking.enabled:
            return
        uri = tracking.tracking_uri(self.request.output)
        self.reporter.say(f"tracking in {tracking.masked(uri)}")
        self.mirror = Mirror(self.run, uri, self.reporter.warn)
        if self.recipe.tracking.require:
            self.mirror.require()

    def _stop_mirror(self) -> dict[str, str]:
        if self.mirror is None:
            return {}
        self.run.update(mirrored=self.mirror.close())
        return self.mirror.links


def _evaluate(
    run: RunFolder, suites: Sequence[Suite], settings: Evaluation, mirror: Mirror | None, say: Callable[[str], None]
) -> tuple[list[Result], list[Failure]]:
    """All suites on every kept checkpoint, the oldest first; one that cannot be read does not stop the others."""
    record = mirror.result if mirror else (lambda result: None)
    return evaluate_all(run.kept_checkpoints() if suites else [], suites, settings, say, record)


def _signal_name(error: SystemExit) -> str:
    number = int(error.code or 0) - 128
    return signal.Signals(number).name if number in signal.valid_signals() else str(error)


def checkpoint_step(checkpoint: Path) -> int:
    """The training step of a checkpoint."""
    from pretrain.models.checkpoint_file import read_own

    return read_own(checkpoint)["step"]


def draw_figures(run: RunFolder) -> None:
    """The curves of a run and the histogram of its last checkpoint's prototypes."""
    plots.draw_curves(run.journal, run.figures)
    if not run.last_checkpoint.is_file():
        return
    from pretrain.models.checkpoint import load

    model = load(run.last_checkpoint)
    if model.prototypes is None:
        return
    norms = model.prototypes.norms().detach().float().flatten()
    kappas = (norms / model.temperature).tolist() if model.temperature else None
    plots.draw_prototypes(norms.tolist(), kappas, run.figures / "prototype_norms.png")
