"""Checkpoints x suites -> results. What is measured already is read, not measured again.

Several processes may evaluate the same checkpoints: each result has a lock, held while it is measured. Work is divided
by checkpoint as long as there are enough of them, because the suites of one share its features; then by suite.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import Timeout

from dinobench.environment import code_commit
from dinobench.files import not_writable
from dinobench.loading import Loading, checkpoint_digest, is_partial, load_report
from dinobench.results import Result, ResultStore, plain
from dinobench.runs import now, run_of_checkpoint
from pretrain.errors import DinobenchError

if TYPE_CHECKING:
    from pretrain.models.checkpoint import LoadedModel
    from suites.suite import Suite

LINE_SECONDS = 5.0
"""Between two lines about one feature pass."""
Say = Callable[[str], None]
Patience = Literal["leave", "skip", "wait"]
"""At a result that another process measures: leave the checkpoint, go on with its next suite, or wait."""


@dataclass(frozen=True)
class Failure:
    """A suite that could not be measured, and why."""

    suite: str
    checkpoint: Path
    reason: str


@dataclass(frozen=True)
class Evaluation:
    """What to measure with, the same for all suites of a call."""

    output: Path
    """Where the results of a checkpoint outside any run folder go."""
    data: str | None = None
    """A data set in place of the suite's own."""
    device: str = "auto"
    seed: int = 0
    loading: Loading = field(default_factory=Loading)
    """Which network of the checkpoint."""

    def store(self, checkpoint: Path) -> ResultStore:
        from pretrain.models.pixels import is_pixels

        run = None if is_pixels(checkpoint) else run_of_checkpoint(checkpoint)
        return ResultStore((run.path if run else self.output) / self.loading.label)

    def find(self, checkpoint: Path, digest: str, suite: Suite) -> Result | None:
        """The stored result, if these settings would give it again."""
        found = self.store(checkpoint).find(suite.id, suite.fingerprint(), digest, self.data, self.seed)
        # a backbone that does not fit is refused also when someone has measured it with --allow-partial
        refused = found is not None and is_partial(found.provenance) and not self.loading.allow_partial
        return None if refused else found


def evaluate(
    checkpoint: Path, suites: Sequence[Suite], settings: Evaluation, say: Say
) -> tuple[list[Result], list[Failure]]:
    """All suites on one checkpoint. The checkpoint is loaded only when something is missing.

    Raises:
        DinobenchError: the checkpoint cannot be read. A suite that fails is listed and the others go on.
    """
    work = _Work(checkpoint, suites, settings, say)
    work.go("skip")
    work.go("wait")
    return work.results(), work.failures


def evaluate_all(
    checkpoints: Sequence[Path],
    suites: Sequence[Suite],
    settings: Evaluation,
    say: Say,
    record: Callable[[Result], None] = lambda result: None,
) -> tuple[list[Result], list[Failure]]:
    """All suites on all checkpoints, in their order; what another process measures meanwhile is read at the end.

    Args:
        record: gets every result, stored or new, as soon as there is one; no other process has its lock then.

    A checkpoint that cannot be read is listed as a failure and the others go on.
    """
    works = [_Work(checkpoint, suites, settings, say, record) for checkpoint in checkpoints]
    patience: Patience
    for patience in ("leave", "skip", "wait"):
        for work in works:
            try:
                work.go(patience)
            except DinobenchError as error:
                work.give_up(str(error))
    return [result for work in works for result in work.results()], [f for work in works for f in work.failures]


class _Work:
    """One checkpoint and the suites of which there is no result yet."""

    def __init__(
        self,
        checkpoint: Path,
        suites: Sequence[Suite],
        settings: Evaluation,
        say: Say,
        record: Callable[[Result], None] = lambda result: None,
    ):
        self.checkpoint, self.suites, self.settings = checkpoint, suites, settings
        self.failures: list[Failure] = []
        self._say, self._record = say, record
        self._found: dict[str, Result] = {}
        self._left = list(suites)

    def results(self) -> list[Result]:
        """What was found, in the order of the suites."""
        return [self._found[suite.id] for suite in self.suites if suite.id in self._found]

    def give_up(self, reason: str) -> None:
        """List what is left as failed."""
        self.failures += [Failure(suite.id, self.checkpoint, reason) for suite in self._left]
        self._left = []

    def go(self, patience: Patience) -> None:
        """Read or measure what is left.

        Raises:
            DinobenchError: the checkpoint cannot be read, or there is no writing beside it.
        """
        model: LoadedModel | None = None
        for suite in list(self._left):
            with self._claim(suite, patience) as mine:
                if not mine and patience == "leave":
                    return
                if not mine:
                    continue
                try:
                    result = self._stored(suite)
                except DinobenchError as error:  # damaged; the other suites are not
                    self._fail(suite, error)
                    continue
                if result is None:
                    model = model or self._load()
                    result = self._measured(suite, model)
                if result is not None:
                    self._found[suite.id] = result
                    self._record(result)
                    self._left.remove(suite)

    def _load(self) -> LoadedModel:
        model = self.settings.loading.load(self.checkpoint)
        for line in load_report(model):
            self._say(line)
        return model

    @cached_property
    def _digest(self) -> str:
        return checkpoint_digest(self.checkpoint)

    @cached_property
    def _store(self) -> ResultStore:
        return self.settings.store(self.checkpoint)

    @contextmanager
    def _claim(self, suite: Suite, patience: Patience) -> Iterator[bool]:
        """Hold the lock of a result; False when another process has it and we do not wait."""
        lock = self._store.lock(suite.id, self._digest, self.settings.data)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if patience != "wait":
                yield False
                return
            self._say(f"{suite.id} on {self.checkpoint.name}: another process measures it, waiting for the result")
            lock.acquire()
        except OSError as error:
            raise not_writable(Path(lock.lock_file), error) from error
        try:
            yield True
        finally:
            lock.release()

    def _stored(self, suite: Suite) -> Result | None:
        found = self.settings.find(self.checkpoint, self._digest, suite)
        if found is not None:
            self._say(f"{suite.id} on {self.checkpoint.name}: stored result, nothing measured")
        return found

    def _measured(self, suite: Suite, model: LoadedModel) -> Result | None:
        self._say(f"{suite.id} on {self.checkpoint.name}: measuring")
        try:
            return _measure(self.checkpoint, suite, model, self.settings, self._store, self._say, self._left)
        except DinobenchError as error:
            self._fail(suite, error)
            return None

    def _fail(self, suite: Suite, error: DinobenchError) -> None:
        self.failures.append(Failure(suite.id, self.checkpoint, str(error)))
        self._left.remove(suite)


def missing(checkpoints: Sequence[Path], suites: Sequence[Suite], settings: Evaluation) -> bool:
    """Whether any of these results is not stored yet."""
    digests = {path: checkpoint_digest(path) for path in checkpoints}
    return any(settings.find(path, digest, suite) is None for path, digest in digests.items() for suite in suites)


def _measure(
    checkpoint: Path,
    suite: Suite,
    model: LoadedModel,
    settings: Evaluation,
    store: ResultStore,
    say: Say,
    left: Sequence[Suite],
) -> Result:
    """Measure and store; one pass over the images serves the suites that are left too."""
    from pretrain.models.pixels import is_pixels
    from pretrain.training.runtime import Runtime, RuntimeConfig
    from suites.features import FeatureCache
    from suites.measure import measure

    measured = measure(
        suite,
        model,
        data=settings.data,
        beside=[other for other in left if other is not suite],
        cache=FeatureCache(),
        device=str(Runtime.start(RuntimeConfig(device=settings.device)).device),
        seed=settings.seed,
        progress=feature_lines(say),
    )
    provenance: dict[str, Any] = plain(model.provenance)
    receipt = {"data": settings.data, "loading": settings.loading.receipt(), "code": code_commit()}
    result = Result(
        suite=suite.id,
        suite_fingerprint=suite.fingerprint(),
        protocol=suite.protocol,
        dataset=dataset_name(settings.data or suite.dataset.name),
        headline=measured.headline,
        scores=plain(measured.scores),
        n=measured.n,
        interval=plain(measured.interval),
        baselines=plain(measured.baselines),
        seed=settings.seed,
        checkpoint=provenance["path"] if is_pixels(checkpoint) else str(checkpoint.absolute()),
        provenance=provenance,
        receipt={**plain(measured.receipt), **receipt},
        seconds=round(measured.seconds, 3),
        created=now(),
        from_cache=measured.from_cache,
        notes=measured.notes,
    )
    store.save(result, provenance["sha256"], settings.data, measured.samples, measured.tables)
    return result


def feature_lines(say: Say) -> Callable[[str, int, int], None]:
    """Says how far a feature pass is, a line every few seconds: passes over large sets take hours."""
    last = time.monotonic()

    def progress(what: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= LINE_SECONDS:
            last = time.monotonic()
            say(f"{what}: {done} of {total} images")

    return progress


def dataset_name(name: str | None) -> str:
    """A data set as a part of a metric name: imagenet:/data/in1k -> imagenet."""
    kind, _, path = (name or "data").partition(":")
    return Path(path).stem if kind == "folder" else kind
