from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dinobench import mirror
from dinobench.cli import app
from dinobench.runs import RunFolder, find_run
from dinobench.tracking import TrackingUnavailable
from pretrain.models import checkpoint_file
from pretrain.models.backbones import create_backbone, feature_dim
from pretrain.models.heads import ProjectionHead
from pretrain.training.recipe import Recipe, resolve

TINY = (
    "model.kwargs={img_size: 16, patch_size: 4, embed_dim: 24, depth: 1, num_heads: 2}",
    "head.hidden=16",
    "head.bottleneck=16",
    "head.num_prototypes=12",
)
NAMES = ("vmf", "attention", "features", "prototypes", "collapse")
QUICKEST, IMAGE = ("figure", "features"), "digits:test[4]"
"""For tests of what becomes of the files, whatever they show."""


@pytest.fixture
def recipe() -> Recipe:
    """With tracking on."""
    return resolve("dino", overrides=TINY)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """What MLflow is asked to log; the store knows every run."""
    asked: list[tuple[str, list[str]]] = []

    def log_figures(run: RunFolder, uri: str, files: Any) -> dict[str, str]:
        asked.append((run.name, [file.name for file in files]))
        return {"run page": f"/#/experiments/1/runs/{run.name}"}

    monkeypatch.setattr(mirror, "log_figures", log_figures)
    return asked


@pytest.fixture
def checkpoint(run: RunFolder, recipe: Recipe) -> Path:
    """last.pt of a run, with fresh weights."""
    torch.manual_seed(0)
    backbone = create_backbone(recipe.model)
    network = torch.nn.ModuleDict({"backbone": backbone, "head": ProjectionHead(feature_dim(backbone), recipe.head)})
    payload = {
        "format": checkpoint_file.FORMAT,
        "recipe": recipe.model_dump(mode="json"),
        "step": 20,
        "images_seen": 1280,
        "epoch": 1,
        "seed": 0,
        "teacher_temperature": 0.04,
        "student": network.state_dict(),
        "teacher": network.state_dict(),
    }
    checkpoint_file.save(run.last_checkpoint, payload)
    return run.last_checkpoint


@pytest.mark.parametrize("name", [(), *((name,) for name in NAMES)])
def test_every_figure_has_help(name: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["figure", *name, "--help"]) == 0
    text = capsys.readouterr().out
    assert all(part in text for part in (NAMES if not name else ("--output", "--json")))


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from dinobench.cli import app; app.run(['figure', 'attention', '-h']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "digits:test[3]" in done.stdout
    assert not {"torch", "numpy", "matplotlib", "mlflow", "PIL"} & set(done.stdout.split())


def test_files_of_a_figure_without_a_run_go_to_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert app.run(["figure", "vmf"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [f"{stem}.{suffix}" for stem in ("vmf_density", "vmf_error") for suffix in ("png", "svg")]
    assert lines == [str(Path("figures") / name) for name in names]
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == names


def test_attention_goes_to_the_run_folder_and_to_its_mlflow_run(
    checkpoint: Path, run: RunFolder, calls: list, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["digits:test[0]", "digits:test[1]", "--mass", "0.5", "--size", "32", "--network", "student", "--json"]
    assert app.run(["figure", "attention", str(checkpoint), *arguments]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    stems = [f"attention_digits-test-{number}_step20_student" for number in (0, 1)]
    files = [f"{stem}.{suffix}" for stem in stems for suffix in ("png", "svg")]
    assert document["figure"] == "attention"
    assert document["files"] == [str(run.figures / name) for name in files]
    assert all(Path(name).stat().st_size > 5000 for name in document["files"])
    for drawing, number in zip(document["drawings"], (0, 1), strict=True):
        assert drawing["image"] == f"digits:test[{number}]"
        assert (drawing["grid"], drawing["mass"], len(drawing["heads"])) == ([8, 8], 0.5, 2)
        assert all(head["mass"] >= 0.5 for head in drawing["heads"])
    assert calls == [(run.name, files)]
    assert "logged to sqlite:" in captured.err


@pytest.mark.parametrize(
    ("arguments", "stems"),
    [
        (["features"], ["features_step20"]),
        (["features", "digits:test[4]"], ["features_digits-test-4_step20"]),
        (["prototypes", "--images", "40"], ["prototypes_usage_step20", "prototypes_nearest_step20"]),
        (["prototypes", "--data", "digits", "--images", "9"], ["prototypes_usage_step20", "prototypes_nearest_step20"]),
    ],
    ids=" ".join,
)
def test_figures_of_a_checkpoint_outside_a_run_folder(
    arguments: list[str],
    stems: list[str],
    checkpoint: Path,
    tmp_path: Path,
    calls: list,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    alone = tmp_path / "alone.pt"
    shutil.copy(checkpoint, alone)
    monkeypatch.chdir(tmp_path)
    name, *rest = arguments
    assert app.run(["figure", name, str(alone), *rest]) == 0
    expected = [str(Path("figures") / f"{stem}.{suffix}") for stem in stems for suffix in ("png", "svg")]
    assert capsys.readouterr().out.splitlines() == expected
    assert all(Path(file).is_file() for file in expected)
    assert calls == []


def test_the_output_folder_can_be_named(checkpoint: Path, tmp_path: Path, calls: list) -> None:
    target = tmp_path / "here"
    assert app.run([*QUICKEST, str(checkpoint), IMAGE, "--output", str(target)]) == 0
    assert sorted(path.suffix for path in target.iterdir()) == [".png", ".svg"]
    assert len(calls) == 1  # still a figure of the run
    (tmp_path / "file").touch()
    assert app.run([*QUICKEST, str(checkpoint), IMAGE, "--output", str(tmp_path / "file")]) == 3


def test_nothing_is_logged_when_not_asked_or_not_tracked(
    checkpoint: Path, tmp_path: Path, calls: list, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run([*QUICKEST, str(checkpoint), IMAGE, "--no-track"]) == 0
    untracked = find_run(resolve("dino", overrides=(*TINY, "tracking.enabled=false")), tmp_path / "other")
    untracked.create(resolve("dino", overrides=(*TINY, "tracking.enabled=false")))
    shutil.copy(checkpoint, untracked.last_checkpoint)
    assert app.run([*QUICKEST, str(untracked.last_checkpoint), IMAGE]) == 0
    assert calls == []
    assert "logged" not in capsys.readouterr().err


def test_a_dead_server_costs_a_warning(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(run: RunFolder, uri: str, files: Any) -> dict[str, str]:
        raise TrackingUnavailable("the MLflow server http://127.0.0.1:1 does not answer")

    monkeypatch.setattr(mirror, "log_figures", fail)
    assert app.run([*QUICKEST, str(checkpoint), IMAGE]) == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 2
    assert "warning: not logged to MLflow: the MLflow server http://127.0.0.1:1 does not answer" in captured.err


@pytest.mark.filterwarnings("ignore")  # mlflow and what it imports announce their own deprecations
def test_the_files_are_artifacts_of_the_run(
    checkpoint: Path,
    run: RunFolder,
    database: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    uri = f"sqlite:///{shutil.copy(database, run.path.parent)}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert app.run([*QUICKEST, str(checkpoint), IMAGE]) == 0
    assert f"not logged: MLflow does not have {run.name}; `dinobench runs sync" in capsys.readouterr().err
    mirror.sync(run, uri)
    assert app.run([*QUICKEST, str(checkpoint), IMAGE]) == 0
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    (logged,) = client.search_runs([client.get_experiment_by_name("dinobench/pretrain").experiment_id])
    names = {file.path for file in client.list_artifacts(logged.info.run_id, "figures")}
    assert names == {f"figures/features_digits-test-4_step20.{suffix}" for suffix in ("png", "svg")}


def test_collapse_finds_labelled_runs_and_logs_to_each(
    tmp_path: Path, calls: list, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = []
    for row, temperature in {"neither": 0.1, "both": 0.04}.items():
        settings = (*TINY, f"target.temperature={temperature}", f"tracking.label=collapse/{row}")
        recipe = resolve("dino", overrides=settings)
        run = find_run(recipe, Path("runs"))
        run.create(recipe)
        run.journal.append({"health/target_entropy": 2.0, "loss/kl": temperature}, 10)
        names.append(run.name)
    assert app.run(["figure", "collapse", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert list(document["drawings"][0]["runs"]) == ["both", "neither"]
    assert document["drawings"][0]["runs"]["neither"]["loss/kl"]["last"] == 0.1
    files = ["collapse.png", "collapse.svg"]
    assert document["files"] == [str(Path("figures") / name) for name in files]
    assert calls == [(name, files) for name in reversed(names)]

    assert app.run(["figure", "collapse", f"runs/{names[0]}"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(Path("runs") / names[0] / "figures" / name) for name in files]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["vfm"], 2, "vmf"),
        (["attention", "CKPT"], 2, "IMAGE"),
        (["attention", "CKPT", "digits:test[0]", "--mass", "60"], 2, "between 0 and 1"),
        (["attention", "CKPT", "digits:test[9999]"], 2, "images 0 to 499"),
        (["attention", "CKPT", "nothing.png"], 3, "no image file nothing.png"),
        (["attention", "missing.pt", "digits:test[0]"], 3, "no checkpoint at missing.pt"),
        (["features", "CKPT", "--network", "teecher"], 2, "--network"),
        (["prototypes", "CKPT", "--data", "digit"], 2, "did you mean 'digits'"),
        (["collapse", "--runs", "nowhere"], 3, "`dinobench pretrain collapse/both`"),
        (["collapse", "nowhere"], 3, "nowhere is not a run folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_an_error_is_one_line(
    arguments: list[str], code: int, said: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run(["figure", *(str(checkpoint) if part == "CKPT" else part for part in arguments)]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert said in captured.err
    assert captured.err.count("\n") == 1


def test_prototypes_of_a_backbone_alone_are_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    payload = checkpoint_file.read(checkpoint)
    payload["recipe"]["head"] = None
    checkpoint_file.save(tmp_path / "bare.pt", payload)
    assert app.run(["figure", "prototypes", str(tmp_path / "bare.pt")]) == 3
    assert "holds a backbone without prototypes" in capsys.readouterr().err
