"""Checkpoints x suites -> results. What is measured already is read, not measured again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinobench.environment import code_commit
from dinobench.files import make_folder, sha256
from dinobench.results import Result, ResultStore, plain
from dinobench.runs import now, run_of_checkpoint
from pretrain.errors import DinobenchError

if TYPE_CHECKING:
    from pretrain.models.checkpoint import LoadedModel
    from suites.suite import Suite


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

    def store(self, checkpoint: Path) -> ResultStore:
        run = run_of_checkpoint(checkpoint)
        return ResultStore(run.path if run else self.output)


def evaluate(
    checkpoint: Path, suites: Sequence[Suite], settings: Evaluation, say: Callable[[str], None]
) -> tuple[list[Result], list[Failure]]:
    """All suites on one checkpoint. The checkpoint is loaded once, and only when something is missing.

    Raises:
        DinobenchError: the checkpoint cannot be read. A suite that fails is listed and the others go on.
    """
    digest = sha256(checkpoint)
    store = settings.store(checkpoint)
    make_folder(store.root)
    results: list[Result] = []
    failures: list[Failure] = []
    model: LoadedModel | None = None
    for suite in suites:
        found = store.find(suite.id, suite.fingerprint(), digest, settings.data, settings.seed)
        if found is not None:
            say(f"{suite.id} on {checkpoint.name}: stored result, nothing measured")
            results.append(found)
            continue
        if model is None:
            model = _load(checkpoint)
        say(f"{suite.id} on {checkpoint.name}: measuring")
        try:
            results.append(_measure(checkpoint, suite, model, settings, store))
        except DinobenchError as error:
            failures.append(Failure(suite.id, checkpoint, str(error)))
    return results, failures


def missing(checkpoints: Sequence[Path], suites: Sequence[Suite], settings: Evaluation) -> bool:
    """Whether any of these results is not stored yet."""
    return any(
        settings.store(path).find(suite.id, suite.fingerprint(), sha256(path), settings.data, settings.seed) is None
        for path in checkpoints
        for suite in suites
    )


def _load(checkpoint: Path) -> LoadedModel:
    from pretrain.models.checkpoint import load

    return load(checkpoint)


def _measure(checkpoint: Path, suite: Suite, model: LoadedModel, settings: Evaluation, store: ResultStore) -> Result:
    from pretrain.training.runtime import Runtime, RuntimeConfig
    from suites.features import FeatureCache
    from suites.measure import measure

    measured = measure(
        suite,
        model,
        data=settings.data,
        cache=FeatureCache(),
        device=str(Runtime.start(RuntimeConfig(device=settings.device)).device),
        seed=settings.seed,
    )
    provenance: dict[str, Any] = plain(model.provenance)
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
        checkpoint=str(checkpoint.absolute()),
        provenance=provenance,
        receipt={**plain(measured.receipt), "code": code_commit()},
        seconds=round(measured.seconds, 3),
        created=now(),
        from_cache=measured.from_cache,
        notes=measured.notes,
    )
    store.save(result, provenance["sha256"], settings.data, measured.samples, measured.tables)
    return result


def dataset_name(name: str | None) -> str:
    """A data set as a part of a metric name: imagenet:/data/in1k -> imagenet."""
    kind, _, path = (name or "data").partition(":")
    return Path(path).stem if kind == "folder" else kind
