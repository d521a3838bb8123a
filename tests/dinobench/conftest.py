"""Things the tests of the roof share: a recipe of a few steps, results without measuring, a loop without training."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import suites.measure
from dinobench import tracking
from dinobench.evaluate import Evaluation, evaluate
from dinobench.files import read_json, sha256, write_json
from dinobench.results import Result, ResultStore
from dinobench.runs import RunFolder, find_run
from pretrain.errors import DinobenchError
from pretrain.models import checkpoint, checkpoint_file
from pretrain.models.backbones import ModelConfig, create_backbone
from pretrain.models.checkpoint import LoadedModel
from pretrain.training import loop
from pretrain.training.recipe import Recipe, resolve
from suites.measure import Measurement
from suites.suite import load_suite

QUICK = ("schedule.epochs=2", "schedule.warmup_epochs=1", "head.num_prototypes=32", "evaluation.suites=[]")


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its tables and nothing else, to be copied: making one takes seconds."""
    file = tmp_path_factory.mktemp("database") / "mlflow.db"
    tracking.connect(f"sqlite:///{file}")
    return file


@pytest.fixture
def recipe() -> Recipe:
    return resolve("dino", overrides=(*QUICK, "tracking.enabled=false"))


@pytest.fixture
def run(recipe: Recipe, tmp_path: Path) -> RunFolder:
    """A run folder just made."""
    folder = find_run(recipe, tmp_path / "runs")
    folder.create(recipe)
    return folder


@pytest.fixture(scope="session")
def make_result() -> Callable[..., Result]:
    def make(score: float = 90.0, **changes: Any) -> Result:
        values: dict[str, Any] = {
            "suite": "digits_knn@1",
            "suite_fingerprint": "f00",
            "protocol": "knn",
            "dataset": "digits",
            "headline": "top1",
            "scores": {"top1": score, "top5": 99.0},
            "n": 500,
            "interval": (score - 2, score + 2),
            "baselines": {"raw_pixels": {"top1": 97.8}, "pca": {"top1": 98.0}, "random_init": {"top1": 60.9}},
            "seed": 0,
            "checkpoint": "/runs/a/checkpoints/step=00000040.pt",
            "provenance": {
                "sha256": "a" * 64,
                "method": "dino",
                "arch": "vits16",
                "step": 40,
                "epoch": 2,
                "seed": 0,
            },
            "receipt": {"dataset": {"test": {"fingerprint": "d" * 40}}},
            "seconds": 1.0,
            "created": "2026-01-01T00:00:00Z",
        }
        return Result(**{**values, **changes})

    return make


class FakeLoop:
    """Stands for `pretrain.training.loop.train`: logs a point per step, writes last.pt, and does what it is told."""

    def __init__(self) -> None:
        self.calls: list[bool] = []
        self.steps, self.stop_at = 4, None
        self.error: BaseException | None = None

    def __call__(self, recipe: Recipe, *, folder: Path, resume: bool, log: Any, on_checkpoint: Any, progress: Any):
        self.calls.append(resume)
        last = folder / "checkpoints" / "last.pt"
        first = int(checkpoint_file.read(last)["step"]) if resume and last.is_file() else 0
        for step in range(first + 1, self.steps + 1):
            log({"loss/total": 1.0 / step}, step)
            payload = {"format": checkpoint_file.FORMAT, "step": step, "student": {"w": torch.zeros(1)}}
            checkpoint_file.save(last, payload)
            if step == self.stop_at:
                if self.error:
                    log({"loss/total": 0.0}, step + 1)  # a point that the checkpoint does not have
                    raise self.error
                return loop.Outcome("interrupted", step, 1.0, 10.0, [], "SIGTERM")
        on_checkpoint(last, self.steps)
        return loop.Outcome("finished", self.steps, 1.0, 10.0, [last])


@pytest.fixture
def fake_loop(monkeypatch: pytest.MonkeyPatch) -> FakeLoop:
    fake = FakeLoop()
    monkeypatch.setattr(loop, "train", fake)
    # its checkpoints hold no network
    monkeypatch.setattr("dinobench.train.draw_figures", lambda run: None)
    return fake


class Measured:
    """Stands for loading and measuring; counts both."""

    def __init__(self) -> None:
        self.loads, self.suites, self.fail = 0, [], ""

    def load(self, path: Path, **options: Any) -> LoadedModel:
        self.loads += 1
        step = int(path.stem.removeprefix("step=")) if path.stem.startswith("step=") else 7
        facts = {"sha256": sha256(path), "method": "dino", "arch": "vits16", "step": step, "images_seen": 64 * step}
        facts |= {"epoch": 1, "seed": 0, "network": "teacher", "label": "dino-vits16-digits"}
        facts |= {
            "format": checkpoint_file.FORMAT,
            "matched": 1,
            "missing": [],
            "unexpected": [],
            "coverage": 100.0,
            "dropped": [],
            "notes": [],
        }
        return LoadedModel(torch.nn.Identity(), None, None, "none", None, facts)

    def measure(self, suite: Any, model: LoadedModel, **options: Any) -> Measurement:
        if suite.name == self.fail:
            raise DinobenchError("data set absent")
        self.suites.append(suite.name)
        return Measurement(
            suite=suite.id,
            protocol=suite.protocol,
            dataset="digits",
            headline=suite.headline,
            scores={suite.headline: torch.tensor(91.5).item(), "spread": float("nan")},
            n=500,
            interval=(90.0, 93.0),
            baselines={},
            samples=pd.DataFrame({"correct": [True]}),
            tables={},
            receipt={"seed": options["seed"]},
            from_cache=False,
            seconds=0.1,
        )


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measured:
    measured = Measured()
    monkeypatch.setattr(checkpoint, "load", measured.load)
    monkeypatch.setattr(suites.measure, "measure", measured.measure)
    return measured


@dataclass
class TrueResult:
    """A result of digits_knn on a tiny ViT with random weights and on a part of the digits, and how to spoil it."""

    file: Path
    checkpoint: Path
    images: Path

    def alter(self, *keys: str, value: Any) -> None:
        """Change one value in the result file."""
        document = read_json(self.file)
        inner = document
        for key in keys[:-1]:
            inner = inner[key]
        assert inner[keys[-1]] != value
        inner[keys[-1]] = value
        write_json(self.file, document)

    def alter_image(self, key: str) -> None:
        """Change one pixel or one label."""
        with np.load(self.images) as stored:
            arrays = {name: stored[name].copy() for name in stored.files}
        arrays[key].flat[0] += 1
        np.savez(self.images, **arrays)

    def alter_weight(self) -> None:
        """Change one weight of the teacher."""
        payload = checkpoint_file.read(self.checkpoint)
        payload["teacher"]["backbone.norm.weight"][0] += 1e-3
        checkpoint_file.save(self.checkpoint, payload)


@pytest.fixture(scope="session")
def measured_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, images and the result of one on the other."""
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("measured")
    digits = load_digits()
    pixels, labels = (digits.images * 15).astype(np.uint8), digits.target
    images = folder / "digits.npz"
    parts = {"train": slice(0, 220), "test": slice(220, 300)}
    arrays = {f"{name}_images": pixels[part] for name, part in parts.items()}
    np.savez(images, **arrays, **{f"{name}_labels": labels[part] for name, part in parts.items()})

    kwargs = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    model = ModelConfig(name="vit_tiny_patch16_224", kwargs=kwargs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = torch.nn.ModuleDict({"backbone": create_backbone(model)}).state_dict()
    recipe = {"method": {"name": "dino"}, "data": {"name": "digits"}, "model": model.model_dump(mode="json")}
    payload = {"format": checkpoint_file.FORMAT, "recipe": {**recipe, "head": None}, "step": 7, "images_seen": 448}
    path = folder / "tiny.pt"
    checkpoint_file.save(path, {**payload, "epoch": 1, "seed": 0, "student": weights, "teacher": weights})

    settings = Evaluation(output=folder / "runs", data=f"npz:{images}", device="cpu")
    results, failures = evaluate(path, [load_suite("digits_knn")], settings, lambda text: None)
    assert (len(results), failures) == (1, [])
    return folder


@pytest.fixture
def true_result(measured_once: Path, tmp_path: Path) -> TrueResult:
    """A copy of that, to be spoilt."""
    folder = shutil.copytree(measured_once, tmp_path / "measured")
    (file,) = folder.glob("runs/evals/digits_knn@1/*.json")
    file.write_text(file.read_text().replace(str(measured_once), str(folder)))
    return TrueResult(file, folder / "tiny.pt", folder / "digits.npz")


class Measurer:
    """Makes run folders with results, per-image values and prototype tables, as an evaluation leaves them."""

    images = 200
    prototypes = 16

    def __init__(self, output: Path, make_result: Callable[..., Result]):
        self.output, self._make_result = output, make_result

    def run(
        self, method: str, seed: int, accuracy: float, *, steps: tuple[int, ...] = (20, 40), overrides: Any = ()
    ) -> RunFolder:
        """A finished run, `accuracy` percent right at its last step and 20 points less before."""
        recipe = resolve(method, seed=seed, overrides=(*QUICK, "tracking.enabled=false", *overrides))
        run = find_run(recipe, self.output)
        run.create(recipe)
        for step in steps:
            run.journal.append({"loss/total": 4.0 / step + seed / 100}, step)
            self.measure(run, seed, accuracy - 20 * (step != steps[-1]), step)
        run.update(status="finished", step=max(steps, default=0))
        return run

    def measure(self, run: RunFolder, seed: int, accuracy: float, step: int, **changes: Any) -> Path:
        """Results of digits_knn and digits_prototypes at a step; gives the file of the first."""
        generator = np.random.default_rng([seed, step, len(run.name)])
        correct = np.arange(self.images) < round(accuracy * self.images / 100)
        generator.shuffle(correct)
        index = np.arange(self.images)
        samples = pd.DataFrame({"index": index, "label": index % 10, "prediction": index % 10, "correct": correct})
        recipe = run.recipe()
        facts = {"sha256": f"{seed:02d}{step:04d}".ljust(64, "a"), "method": recipe["method"]["name"], "step": step}
        facts |= {"images_seen": step * recipe["optim"]["batch_size"], "seed": seed, "arch": "vit", "epoch": 1}
        score = 100 * float(correct.mean())
        result = self._make_result(score, **{"provenance": facts, "n": self.images, **changes})
        store = ResultStore(run.path)
        file = store.save(result, facts["sha256"], None, samples, {})
        counts = generator.multinomial(self.images, generator.dirichlet(np.full(self.prototypes, 0.3)))
        kappa = generator.uniform(5, 50, self.prototypes)
        tables = {
            "prototypes": pd.DataFrame({"prototype": np.arange(self.prototypes), "images": counts, "kappa": kappa}),
            "unique": pd.DataFrame({"cosine_distance": [0.025, 0.2], "unique": [self.prototypes, 9]}),
        }
        values = {"suite": "digits_prototypes@1", "protocol": "prototypes", "headline": "perplexity"}
        scores = {"perplexity": 7.0 + seed, "used": float((counts > 0).sum()), "top1": score}
        usage = self._make_result(**{**values, "scores": scores, "provenance": facts, "n": self.images})
        store.save(usage, facts["sha256"], None, samples, tables)
        return file


@pytest.fixture(scope="session")
def measurer_in(make_result: Callable[..., Result]) -> Callable[[Path], Measurer]:
    """For the fixtures of a module: below a folder of their own."""
    return lambda output: Measurer(output, make_result)


@pytest.fixture
def measurer(tmp_path: Path, measurer_in: Callable[[Path], Measurer]) -> Measurer:
    return measurer_in(tmp_path / "runs")
