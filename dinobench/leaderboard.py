"""Results as MLflow shows them: one experiment per data set and suite version, so that its numbers compare.

Per checkpoint one run and one LoggedModel with the headline metrics, below the run one nested run per suite with all
its scores and tables; baselines are runs beside the checkpoints. Logging can be killed anywhere: done again, it goes
on.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from dinobench.addresses import as_unavailable, run_page
from dinobench.journal import Point
from dinobench.tracking import DIGEST_DIGITS, PREFIX, SOURCE, Store

DECIMALS = 3
"""Of a score: the model table shows a number in full."""


@dataclass(frozen=True)
class Entry:
    """A result as MLflow gets it. `tags` and `params` say what was measured."""

    dataset: str
    dataset_digest: str
    version: int
    suite: str
    checkpoint: str
    """SHA-256 of the checkpoint."""
    name: str
    """<method>/ep<N>/s<seed>/<arch>: what differs first, the run table cuts names."""
    step: int
    metrics: dict[str, float]
    """All scores, under their MLflow names."""
    headline: str
    params: dict[str, str]
    tags: dict[str, str]
    description: str
    baselines: dict[str, float] = field(default_factory=dict)
    """Name of a baseline -> its headline score."""
    summary: str = ""
    """Description of the suite's own run."""
    files: dict[str, str] = field(default_factory=dict)
    """Path -> text of the artifacts of the suite."""
    recipe: str = ""
    """YAML of the pretraining's recipe, an artifact of the checkpoint."""

    @property
    def experiment(self) -> str:
        return f"{PREFIX}{self.dataset}-v{self.version}"

    @property
    def about(self) -> str:
        """Description of the experiment; its first line is all that a visitor sees."""
        return (
            f"{self.dataset}, suites of version {self.version}: one run per checkpoint, accuracies in percent.\n\n"
            "Models is the score table, Chart the bars; raw pixels, PCA and random init are baselines. "
            "Below each checkpoint: its suites, with all scores and tables."
        )


def log_result(store: Store, entry: Entry, pretraining: str | None) -> None:
    """One suite on one checkpoint: run and LoggedModel of it, nested run of the suite, point of the curve.

    Args:
        pretraining: id of the run that trained the checkpoint.

    Raises:
        TrackingUnavailable: the store cannot be reached.
    """
    with as_unavailable(store.uri), store.lock():
        experiment = store.experiment(entry.experiment, entry.about)
        _Board(store, experiment, entry, pretraining).log()


@dataclass(frozen=True)
class _Board:
    store: Store
    experiment: str
    entry: Entry
    pretraining: str | None

    def log(self) -> None:
        """Under the lock: the training and an evaluator may log the same at once."""
        store, entry = self.store, self.entry
        self._suite_run(self._checkpoint_run())
        for name, score in entry.baselines.items():
            self._baseline_run(name, score)
        if self.pretraining:
            point = Point(entry.step, time.time(), {entry.headline: round(entry.metrics[entry.headline], DECIMALS)})
            history = store.client.get_metric_history(self.pretraining, entry.headline)
            store.log_points(self.pretraining, [point], {(m.key, m.step) for m in history})

    def _checkpoint_run(self) -> str:
        entry = self.entry
        tags = {"dinobench.kind": "checkpoint", "checkpoint.sha256": entry.checkpoint}
        if found := self.store.find(self.experiment, tags):
            return found.info.run_id
        tags |= entry.tags | ({"pretrain_run_id": self.pretraining} if self.pretraining else {})
        return self._create(entry.name, entry.params, tags, self._description())

    def _suite_run(self, parent: str) -> None:
        entry, client = self.entry, self.store.client
        tags = {"mlflow.parentRunId": parent, "dinobench.suite": entry.suite}
        if found := self.store.find(self.experiment, tags):
            run_id = found.info.run_id
            if entry.headline in found.data.metrics:  # all is logged; a kill may have left the runs open
                return self._close(run_id, parent)
        else:
            name = f"{entry.suite} · {entry.name.partition('/')[0]}"
            run_id = self._create(name, {"suite": entry.suite}, {"dinobench.kind": "suite", **tags}, entry.summary)
        model = self._logged_model(parent)
        if entry.headline not in client.get_run(parent).data.metrics:  # a kill may have come after it
            client.log_batch(parent, metrics=[self._score(entry.headline, parent, model)])
        self.store.describe(parent, self._description())
        self.store.log_texts(run_id, entry.files)
        if entry.recipe:
            self.store.log_texts(parent, {"config/recipe.yaml": entry.recipe})
        client.log_batch(run_id, metrics=[self._score(key, run_id) for key in entry.metrics])
        self._close(run_id, parent)

    def _baseline_run(self, name: str, score: float) -> None:
        """A run of its own for each baseline: a bar beside those of the checkpoints."""
        tags = {"dinobench.kind": "baseline", "dinobench.baseline": name}
        found = self.store.find(self.experiment, tags)
        if found and self.entry.headline in found.data.metrics:
            return self._close(found.info.run_id)
        run_id = found.info.run_id if found else self._create(name, {"method": name}, tags, "")
        self.store.client.log_metric(run_id, self.entry.headline, round(score, DECIMALS), step=0)
        self._close(run_id)

    def _description(self) -> str:
        """That of the entry, with a link to the training."""
        if not self.pretraining:
            return self.entry.description
        training = self.store.client.get_run(self.pretraining).info
        page = run_page("", training.experiment_id, training.run_id).lstrip("/")
        return f"{self.entry.description}\n\nPretraining: [{training.run_name}]({page})"

    def _create(self, name: str, params: dict[str, str], tags: dict[str, str], text: str) -> str:
        run_id = self.store.create(self.experiment, name, params, tags, text)
        self.store.log_dataset(run_id, self.entry.dataset, self.entry.dataset_digest, "eval")
        return run_id

    def _close(self, *run_ids: str) -> None:
        for run_id in run_ids:
            self.store.finish(run_id, "FINISHED")

    def _score(self, key: str, run_id: str, model: str | None = None) -> Any:
        entry = self.entry
        dataset = (
            {"dataset_name": entry.dataset, "dataset_digest": entry.dataset_digest[:DIGEST_DIGITS]} if model else {}
        )
        now = int(time.time() * 1000)
        value = round(entry.metrics[key], DECIMALS)
        return self.store.entities.Metric(key, value, now, 0, model_id=model, run_id=run_id, **dataset)

    def _logged_model(self, parent: str) -> str:
        entry, store = self.entry, self.store
        query = f"tags.`checkpoint.sha256` = '{entry.checkpoint}'"
        found = store.client.search_logged_models([self.experiment], filter_string=query, max_results=1)
        model = (
            found[0]
            if found
            else store.mlflow.create_external_model(
                name=entry.name.replace("/", "-"),
                source_run_id=self.pretraining or parent,
                tags={"checkpoint.sha256": entry.checkpoint, "mlflow.source.name": SOURCE, **entry.tags},
                params=entry.params,
                model_type="ssl-backbone",
                experiment_id=self.experiment,
            )
        )
        if not store.client.get_run(parent).outputs.model_outputs:  # a kill may have come before it
            store.client.log_outputs(parent, [store.entities.LoggedModelOutput(model.model_id, step=entry.step)])
        return model.model_id
