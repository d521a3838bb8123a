from __future__ import annotations

import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dinobench import mirror, tracking
from dinobench.journal import Point
from dinobench.mirror import Mirror
from dinobench.results import Result, ResultStore
from dinobench.runs import RunFolder, find_run
from dinobench.tracking import PRETRAIN_EXPERIMENT, TrackingUnavailable
from pretrain.training.recipe import Recipe

# mlflow and what it imports announce their own deprecations
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory, database: Path) -> str:
    """One database for all tests of the file."""
    return f"sqlite:///{shutil.copy(database, tmp_path_factory.mktemp('store'))}"


@pytest.fixture
def client(uri: str) -> Iterator[Any]:
    tracking.connect(uri)
    from mlflow import MlflowClient

    yield MlflowClient(uri)


@pytest.fixture
def filled(run: RunFolder, make_result: Callable[..., Result]) -> RunFolder:
    """A finished run with three points and two results."""
    for step in (10, 20, 40):
        run.journal.append({"loss/total": 1 / step, "loss/kl": float("nan")}, step)
    store = ResultStore(run.path)
    import pandas as pd

    store.save(make_result(88.123456), "a" * 64, None, pd.DataFrame(), {})
    linear = make_result(95.0, suite="digits_linear@1", protocol="linear")
    store.save(linear, "a" * 64, None, pd.DataFrame(), {})
    run.update(status="finished", step=40)
    return run


def runs_of(client: Any, experiment: str, query: str = "") -> list[Any]:
    found = client.get_experiment_by_name(experiment)
    return list(client.search_runs([found.experiment_id], query)) if found else []


def of(client: Any, run: RunFolder) -> Any:
    (found,) = runs_of(client, PRETRAIN_EXPERIMENT, f"tags.`dinobench.run` = '{run.state().key}'")
    return found


def test_a_run_is_logged_with_readable_names_and_few_parameters(filled: RunFolder, uri: str, client: Any) -> None:
    mirror.sync(filled, uri)
    logged = of(client, filled)
    assert logged.info.run_name.startswith("dino/s0/vit-")
    assert logged.info.status == "FINISHED"
    assert 10 <= len(logged.data.params) <= 15
    history = client.get_metric_history(logged.info.run_id, "loss/total")
    assert [(metric.step, metric.value) for metric in history] == [(10, 0.1), (20, 0.05), (40, 0.025)]
    assert "loss/kl" not in logged.data.metrics
    assert all(key.count("/") == 1 for key in logged.data.metrics)
    assert {file.path for file in client.list_artifacts(logged.info.run_id)} >= {"config"}
    assert logged.inputs.dataset_inputs[0].dataset.name == "digits"


def test_a_headline_is_a_point_of_the_curve_and_a_bar_of_the_checkpoint(
    filled: RunFolder, uri: str, client: Any
) -> None:
    mirror.sync(filled, uri)
    curve = client.get_metric_history(of(client, filled).info.run_id, "knn/digits_top1")
    assert [(point.step, point.value) for point in curve] == [(40, 88.123)]
    (parent,) = runs_of(client, "dinobench/digits-v1", "tags.`dinobench.kind` = 'checkpoint'")
    assert parent.info.run_name == "dino/s0/ep2/vits16"
    assert parent.data.metrics == {"knn/digits_top1": 88.123, "linear/digits_top1": 95.0}
    assert "| digits_knn@1 | top1 | **88.1** | 97.8 | 98.0 | 60.9 |" in parent.data.tags["mlflow.note.content"]
    nested = runs_of(client, "dinobench/digits-v1", "tags.`dinobench.kind` = 'suite'")
    assert sorted(run.info.run_name for run in nested) == ["digits_knn@1 · dino", "digits_linear@1 · dino"]
    assert {run.data.tags["mlflow.parentRunId"] for run in nested} == {parent.info.run_id}
    assert {"knn/digits_top5", "linear/digits_top5"} <= {key for run in nested for key in run.data.metrics}


def test_the_model_table_has_the_checkpoint_with_its_scores_and_data_set(
    filled: RunFolder, uri: str, client: Any
) -> None:
    mirror.sync(filled, uri)
    experiment = client.get_experiment_by_name("dinobench/digits-v1").experiment_id
    (model,) = client.search_logged_models([experiment])
    assert model.name == "dino-s0-ep2-vits16"
    scores = {(metric.key, metric.value, metric.dataset_name) for metric in model.metrics}
    assert scores == {("knn/digits_top1", 88.123, "digits"), ("linear/digits_top1", 95.0, "digits")}


def test_baselines_are_bars_beside_the_checkpoints(filled: RunFolder, uri: str, client: Any) -> None:
    mirror.sync(filled, uri)
    bars = runs_of(client, "dinobench/digits-v1", "tags.`dinobench.kind` = 'baseline'")
    scores = {run.info.run_name: run.data.metrics["knn/digits_top1"] for run in bars}
    assert scores == {"raw pixels": 97.8, "PCA": 98.0, "random init/vits16": 60.9}


def test_syncing_again_changes_nothing(filled: RunFolder, uri: str, client: Any) -> None:
    mirror.sync(filled, uri)
    before = len(runs_of(client, "dinobench/digits-v1")), of(client, filled).info.run_id
    mirror.sync(filled, uri)
    assert (len(runs_of(client, "dinobench/digits-v1")), of(client, filled).info.run_id) == before
    for key in ("loss/total", "knn/digits_top1"):
        steps = [point.step for point in client.get_metric_history(before[1], key)]
        assert len(steps) == len(set(steps))


def test_the_mirror_logs_in_the_background_and_continues_a_run(
    recipe: Recipe, uri: str, client: Any, tmp_path: Path
) -> None:
    run = find_run(recipe, tmp_path)
    run.create(recipe)
    warnings: list[str] = []
    for first, status in ((1, "interrupted"), (3, "finished")):
        follower = Mirror(run, uri, warnings.append)
        for step in (first, first + 1):
            follower.log(run.journal.append({"loss/total": float(step)}, step))
        follower.finish(status)
        assert follower.close()
    assert warnings == []
    logged = of(client, run)
    assert logged.info.status == "FINISHED"
    assert [m.step for m in client.get_metric_history(logged.info.run_id, "loss/total")] == [1, 2, 3, 4]


def test_an_interrupted_run_is_killed_and_a_failed_one_failed(run: RunFolder, uri: str, client: Any) -> None:
    for status, shown in (("interrupted", "KILLED"), ("failed", "FAILED"), ("collapsed", "FAILED")):
        follower = Mirror(run, uri, pytest.fail)
        follower.finish(status)
        assert follower.close()
        assert of(client, run).info.status == shown


@pytest.mark.promise("MLflow server refused", "said once and at the end, without the password; the journal has all")
def test_a_dead_server_neither_stops_nor_stalls_and_is_said_once(run: RunFolder) -> None:
    warnings: list[str] = []
    follower = Mirror(run, f"http://user:hunter2@127.0.0.1:{free_port()}", warnings.append)
    with pytest.raises(TrackingUnavailable, match="does not answer"):
        follower.require()
    for step in range(100):
        follower.log(run.journal.append({"loss/total": 1.0}, step))
    assert not follower.close(timeout=10)
    assert len(warnings) == 2  # when it was lost, and at the end
    assert all("runs sync" in text for text in warnings)
    assert "hunter2" not in "".join(warnings)
    assert len(run.journal.read()) == 100


@pytest.mark.promise("MLflow slower than the training", "the queue is bounded; what it drops comes from the journal")
def test_a_full_queue_is_filled_up_from_the_journal(
    run: RunFolder, uri: str, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "CAPACITY", 3)
    ready = threading.Event()
    connect = tracking.connect
    monkeypatch.setattr(tracking, "connect", lambda uri: (ready.wait(10), connect(uri))[1])
    follower = Mirror(run, uri, pytest.fail)
    for step in range(1, 11):
        follower.log(run.journal.append({"loss/total": 1.0}, step))
    ready.set()
    assert follower.close()
    steps = [m.step for m in client.get_metric_history(of(client, run).info.run_id, "loss/total")]
    assert sorted(steps) == list(range(1, 11))


@pytest.mark.promise("a long run is mirrored", "what the mirror remembers and what waits for it are bounded")
def test_what_the_mirror_remembers_does_not_grow_with_the_run(
    run: RunFolder, uri: str, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "FLUSH_POINTS", 5)
    remembered: list[int] = []
    log_points = tracking.Store.log_points

    def counted(store: Any, run_id: str, points: Any, known: set) -> None:
        log_points(store, run_id, points, known)
        remembered.append(len(known))

    monkeypatch.setattr(tracking.Store, "log_points", counted)
    follower = Mirror(run, uri, pytest.fail)
    follower._connected.wait()
    for step in range(1, 101):
        follower.log(run.journal.append({"loss/total": 1.0, "optim/lr": 0.1}, step))
        follower.log(run.journal.append({"loss/total": 1.0, "prototypes/unique": 3.0}, step))  # twice at one step
    assert follower.close()
    assert max(remembered) <= 3 * (5 + 1)
    run_id = of(client, run).info.run_id
    for name in ("loss/total", "prototypes/unique"):
        assert [m.step for m in client.get_metric_history(run_id, name)] == list(range(1, 101))


def test_what_waited_for_a_store_that_failed_is_let_go(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = threading.Event()
    monkeypatch.setattr(tracking, "connect", lambda uri: (ready.wait(10), 1 / 0))
    follower = Mirror(run, "sqlite:///absent.db", lambda text: None)
    for step in range(100):
        follower.log(run.journal.append({"loss/total": 1.0}, step))
    assert follower._queue.qsize() == 100
    ready.set()
    follower._connected.wait()
    assert follower._queue.qsize() == 0


@pytest.mark.promise("MLflow server black-holed: accepts, never answers", "given up after seconds")
def test_a_silent_server_is_given_up_after_seconds() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(TrackingUnavailable, match="does not answer"):
            tracking.probe(f"http://127.0.0.1:{port}", timeout=0.3)


@pytest.mark.promise("MLflow not installed", "told with the command; the journal remains")
def test_without_mlflow_the_journal_remains(run: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(tracking.importlib, "import_module", absent)
    with pytest.raises(TrackingUnavailable, match="pip install mlflow"):
        tracking.connect(f"sqlite:///{tmp_path / 'mlflow.db'}")


def test_the_old_file_store_is_refused_with_mlflows_reason(tmp_path: Path) -> None:
    with pytest.raises(TrackingUnavailable, match="MLflow store"):
        tracking.connect(str(tmp_path / "mlruns"))


def test_the_default_store_is_absolute_and_the_environment_rules(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking.tracking_uri(Path("runs")) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert tracking.tracking_uri(Path("runs")) == "http://server:5000"


def test_passwords_are_masked() -> None:
    assert tracking.masked("https://me:s3cret@host/x and http://h:5000") == "https://me:***@host/x and http://h:5000"


def test_links_open_the_page_of_model_training(uri: str, client: Any) -> None:
    links = tracking.connect(uri).links("http://127.0.0.1:5000", everything=True)
    assert re.fullmatch(
        r"http://127\.0\.0\.1:5000/#/experiments/\d+/runs\?compareRunsMode=CHART&workflowType=machine_learning",
        links["pretrain charts"],
    )


def test_points_that_are_known_are_left_out(uri: str, client: Any, run: RunFolder) -> None:
    store = tracking.connect(uri)
    run_id = mirror.open_pretraining(store, run)
    store.log_points(run_id, [Point(1, 1.0, {"loss/total": 1.0})], {("loss/total", 1)})
    assert store.logged(run_id) == set()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.promise("a kill while MLflow's tables are made", "the database appears whole or not at all")
def test_a_database_appears_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill while MLflow makes its tables must not leave a database that no later run can use."""
    file = tmp_path / "mlflow.db"

    def killed(path: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        tracking.connect(f"sqlite:///{file}")
    monkeypatch.undo()
    assert not file.exists()


@pytest.mark.promise("half a database left by a kill", "made anew")
def test_what_a_kill_left_of_an_unfinished_database_is_made_anew(tmp_path: Path) -> None:
    file, unfinished = tmp_path / "mlflow.db", tmp_path / "mlflow.db.new"
    unfinished.write_bytes(b"SQLite format 3\0 torn")
    store = tracking.connect(f"sqlite:///{file}")
    assert store.find_pretraining("none") is None
    assert file.exists() and not unfinished.exists()


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


class Mortal:
    """An MLflow client that dies before its n-th change."""

    changes = (
        *("create_run", "log_batch", "log_inputs", "log_metric", "log_outputs", "log_text", "set_tag"),
        "set_terminated",
    )

    def __init__(self, client: Any, number: int):
        self._client, self.left = client, number

    def __getattr__(self, name: str) -> Any:
        if name in self.changes:
            self.left -= 1
            if self.left < 0:
                raise Killed
        return getattr(self._client, name)


@pytest.mark.promise("a kill at any call of the logging of a result", "completed by the next, nothing twice")
@pytest.mark.slow
def test_a_result_whose_logging_was_killed_anywhere_is_completed_and_not_doubled(
    run: RunFolder, make_result: Callable[..., Result], uri: str, client: Any
) -> None:
    number, whole = 0, False
    while not whole:
        name = f"cut{number}"
        facts = {**make_result().provenance, "sha256": f"{number:064}"}
        result = make_result(dataset=name, provenance=facts)
        store = tracking.connect(uri)
        pretraining = mirror.open_pretraining(store, run)
        store.client = Mortal(store.client, number)
        try:
            mirror.log_result(store, run.path, result, run)
            whole = True
        except Killed:
            mirror.log_result(tracking.connect(uri), run.path, result, run)
        logged = runs_of(client, f"dinobench/{name}-v1")
        assert sorted(each.data.tags["dinobench.kind"] for each in logged) == 3 * ["baseline"] + ["checkpoint", "suite"]
        assert {each.info.status for each in logged} == {"FINISHED"}, number
        for each in [*logged, client.get_run(pretraining)]:
            for key in each.data.metrics:
                steps = [point.step for point in client.get_metric_history(each.info.run_id, key)]
                assert len(steps) == len(set(steps)), (number, key)
        assert client.get_metric_history(pretraining, f"knn/{name}_top1")
        number += 1
    assert number > 15
