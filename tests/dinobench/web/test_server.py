"""What a stranger finds on a real MLflow server, asked over REST without MLflow's client."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

LINE = 110
"""Characters of a description that the page of an experiment shows."""


def tags(each: dict[str, Any]) -> dict[str, str]:
    found = each.get("tags") or each["data"]["tags"]
    return {tag["key"]: tag["value"] for tag in found}


def params(run: dict[str, Any]) -> dict[str, str]:
    return {param["key"]: param["value"] for param in run["data"]["params"]}


def metrics(run: dict[str, Any]) -> dict[str, float]:
    return {metric["key"]: metric["value"] for metric in run["data"].get("metrics", [])}


def test_experiments_say_in_their_first_line_what_they_hold(benchmark: Any) -> None:
    described = {
        name: tags(each)["mlflow.note.content"] for name, each in benchmark.experiments().items() if "/" in name
    }
    assert set(described) == {"dinobench/pretrain", "dinobench/digits-v1", "dinobench/tables"}
    assert all(len(text.splitlines()[0]) <= LINE for text in described.values())
    assert "one run per checkpoint, accuracies in percent" in described["dinobench/digits-v1"]


def test_a_pretraining_has_its_name_curves_data_and_files(benchmark: Any) -> None:
    found = benchmark.runs_of("dinobench/pretrain")
    assert {name.rpartition("/vit-")[0] for name in found} == set(benchmark.runs)
    for run in found.values():
        assert run["info"]["status"] == "FINISHED"
        assert 10 <= len(params(run)) <= 15
        assert set(metrics(run)) == {"loss/total", "knn/digits_top1", "prototypes/digits_perplexity"}
        assert [each["dataset"]["name"] for each in run["inputs"]["dataset_inputs"]] == ["digits"]
        number = run["info"]["run_id"]
        curve = benchmark.ask("GET", f"metrics/get-history?run_id={number}&metric_key=loss/total")["metrics"]
        assert [point["step"] for point in curve] == [20, 40]
        files = [
            each["path"]
            for folder in ("config", "figures")
            for each in benchmark.ask("GET", f"artifacts/list?run_id={number}&path={folder}")["files"]
        ]
        assert "config/recipe.yaml" in files and any(file.startswith("figures/") for file in files)


def test_a_checkpoint_is_a_run_with_its_suites_below_it(benchmark: Any) -> None:
    trainings = {run["info"]["run_id"] for run in benchmark.runs_of("dinobench/pretrain").values()}
    kinds = "tags.`dinobench.kind` = "
    # both checkpoints of a run are in epoch 1, so their names are the same: they are told by their hashes
    last = benchmark.runs_of("dinobench/digits-v1", f"{kinds}'checkpoint' and params.step = '40'")
    assert sorted(last) == ["dino/s0/ep1/vit", "dino/s1/ep1/vit", "dino_vmf/s2/ep1/vit"]
    for name, score in (("dino/s0", 80.0), ("dino/s1", 82.0), ("dino_vmf/s2", 87.5)):
        run = last[f"{name}/ep1/vit"]
        number = run["info"]["run_id"]
        assert metrics(run)["knn/digits_top1"] == score
        assert 10 <= len(params(run)) <= 15
        assert tags(run)["pretrain_run_id"] in trainings
        assert f"**{score}**" in tags(run)["mlflow.note.content"]
        assert [each["dataset"]["name"] for each in run["inputs"]["dataset_inputs"]] == ["digits"]
        below = benchmark.runs_of("dinobench/digits-v1", f"tags.`mlflow.parentRunId` = '{number}'")
        method = name.partition("/")[0]
        assert sorted(below) == [f"digits_knn@1 · {method}", f"digits_prototypes@1 · {method}"]
        number = below[f"digits_prototypes@1 · {method}"]["info"]["run_id"]
        files = benchmark.ask("GET", f"artifacts/list?run_id={number}&path=tables")["files"]
        assert {"tables/prototypes.csv", "tables/unique.csv"} == {each["path"] for each in files}
    baselines = benchmark.runs_of("dinobench/digits-v1", f"{kinds}'baseline'")
    assert {name: metrics(run)["knn/digits_top1"] for name, run in baselines.items()} == {
        "raw pixels": 97.8,
        "PCA": 98.0,
        "random init/vit": 60.9,
    }


def test_the_model_table_has_each_checkpoint_with_its_scores_by_data_set(benchmark: Any) -> None:
    number = benchmark.experiments()["dinobench/digits-v1"]["experiment_id"]
    models = benchmark.ask("POST", "logged-models/search", experiment_ids=[number], max_results=50)["models"]
    scores = {
        (model["info"]["name"], metric["key"], metric["value"], metric["dataset_name"])
        for model in models
        for metric in model["data"]["metrics"]
        if metric["key"].startswith("knn/")
    }
    assert {(name, value) for name, _, value, _ in scores} == {
        *(("dino-s0-ep1-vit", score) for score in (60.0, 80.0)),
        *(("dino-s1-ep1-vit", score) for score in (62.0, 82.0)),
        *(("dino_vmf-s2-ep1-vit", score) for score in (67.5, 87.5)),
    }
    assert {(key, dataset) for _, key, _, dataset in scores} == {("knn/digits_top1", "digits")}
    assert {tags(model["info"])["mlflow.source.name"] for model in models} == {"dinobench"}


def test_a_table_links_the_runs_of_its_cells(benchmark: Any) -> None:
    (table,) = benchmark.runs_of("dinobench/tables").values()
    assert table["info"]["run_name"] == "tiny/digits"
    (cell,) = benchmark.runs_of("dinobench/pretrain", "tags.`dinobench.cell` LIKE '%'").values()
    link = f"#/experiments/{cell['info']['experiment_id']}/runs/{cell['info']['run_id']}?workflowType=machine_learning"
    assert f"| [s0]({link}) |" in tags(table)["mlflow.note.content"]
    files = benchmark.ask("GET", f"artifacts/list?run_id={table['info']['run_id']}")["files"]
    assert {"tiny.md", "tiny.csv", "tiny.tex"} <= {each["path"] for each in files}


def test_the_printed_links_are_pages_of_model_training_that_exist(benchmark: Any) -> None:
    numbers = {each["experiment_id"] for each in benchmark.experiments().values()}
    for printed in benchmark.printed:
        links = re.findall(r"http\S+/#/\S+", printed)
        assert len(links) == 4  # the run, its curves, and bars and table of its checkpoints
        for link in links:
            assert link.startswith(f"{benchmark.server}/#/experiments/")
            assert link.endswith("workflowType=machine_learning")
            assert re.search(r"/experiments/(\d+)/", link)[1] in numbers


def test_logging_once_more_changes_nothing(benchmark: Any, dinobench: Callable[..., tuple[int, str]]) -> None:
    def everything() -> dict[str, Any]:
        names = [each["experiment_id"] for name, each in benchmark.experiments().items() if "/" in name]
        found = benchmark.ask("POST", "runs/search", experiment_ids=names, max_results=1000)["runs"]
        return {
            run["info"]["run_id"]: [run["info"], tags(run), params(run), metrics(run), run["inputs"], run["outputs"]]
            for run in found
        }

    before = everything()
    code, printed = dinobench("runs", "sync", "--output", str(benchmark.output), MLFLOW_TRACKING_URI=benchmark.server)
    assert code == 0, printed
    after = everything()
    assert after.keys() == before.keys()
    for number, facts in before.items():
        for was, found in zip(facts, after[number], strict=True):
            assert was == found


def test_a_run_whose_folder_is_gone_is_deleted_with_its_results(
    benchmark: Any, measurer: Any, dinobench: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    run = measurer.run("dino", 7, 80.0, steps=(40,))
    for arguments in (["sync", str(run.path)], ["delete-orphans", "--yes", "--json"]):
        code, printed = dinobench("runs", *arguments, MLFLOW_TRACKING_URI=benchmark.server)
        assert code == 0, printed
        if arguments[0] == "sync":
            assert "dino/s7/ep1/vit" in benchmark.runs_of("dinobench/digits-v1", "params.seed = '7'")
            run.path.rename(tmp_path / "moved away")
    (orphan,) = json.loads(printed)
    assert (orphan["folder"], len(orphan["results"]), len(orphan["models"])) == (str(run.path), 3, 1)
    assert benchmark.runs_of("dinobench/digits-v1", "params.seed = '7'") == {}
    assert benchmark.runs_of("dinobench/pretrain", "params.seed = '7'") == {}
    number = benchmark.experiments()["dinobench/digits-v1"]["experiment_id"]
    models = benchmark.ask("POST", "logged-models/search", experiment_ids=[number], max_results=50)["models"]
    assert not any(model["info"]["name"].startswith("dino-s7") for model in models)
