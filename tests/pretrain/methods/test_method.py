"""The catalogue of methods, and that one file and one recipe add a method."""

from __future__ import annotations

import textwrap

import pytest
import torch

from pretrain.errors import UsageError
from pretrain.methods.method import find_method, load_method, method_names
from pretrain.training.loop import train
from pretrain.training.recipe import resolve

TOY = '''
"""A toy: the student learns to give two views the same feature."""

from pydantic import BaseModel, ConfigDict
from torch import nn

from pretrain.methods.method import Method
from pretrain.models.network import Network
from pretrain.training.health import Health


class Parameters(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    weight: float = 1.0


class Toy(Method):
    Parameters = Parameters

    def __init__(self, recipe, plan):
        super().__init__(recipe, plan)
        self.student = Network(recipe.model, recipe.head)
        self.teacher = self.student
        self.health = Health(recipe.head.num_prototypes)
        self.weight = Parameters(**recipe.method.parameters).weight

    def loss(self, batch, step):
        output = self.forward_student(batch.views)
        logits = output.z[0] @ output.vectors.T
        self.health.observe(logits.softmax(-1), logits, output.features[0])
        return self.weight * (output.features[0] - output.features[1]).square().mean(), {}


METHOD = Toy
'''


@pytest.fixture
def toy(tmp_path):
    (tmp_path / "toy.py").write_text(textwrap.dedent(TOY))
    (tmp_path / "toy.yaml").write_text("method: {parameters: {weight: 0.5}}\nat: {digits: {schedule: {epochs: 7}}}\n")
    return tmp_path


SHORT = ["schedule.epochs=1", "schedule.warmup_epochs=0", "runtime.log_every=10", "head.hidden=16"]


@pytest.mark.parametrize("by", ["path", "folder"])
def test_one_file_and_one_recipe_add_a_method(toy, by, monkeypatch, tmp_path):
    name = str(toy / "toy.py")
    if by == "folder":
        monkeypatch.setenv("DINOBENCH_METHODS", str(toy))
        name = "toy"
        assert "toy" in method_names()
    recipe = resolve(name, preset="digits", overrides=SHORT)
    assert recipe.method.name == "toy" and recipe.method.parameters == {"weight": 0.5}
    logged = []
    outcome = train(recipe, folder=tmp_path / "run", log=lambda metrics, step: logged.append(metrics))
    assert outcome.status == "finished"
    assert all(torch.isfinite(torch.tensor(m["loss/total"])) for m in logged if "loss/total" in m)


def test_a_toy_parameter_is_checked_by_the_toy(toy):
    with pytest.raises(UsageError, match="weight"):
        resolve(str(toy / "toy.py"), overrides=["method.parameters.weight=heavy"])


def test_every_method_in_the_package_has_file_recipe_and_class():
    assert {"dino", "dino_vmf", "dino_free"} <= set(method_names())
    for name in method_names():
        source, recipe = find_method(name)
        assert source.stem == recipe.stem == name
        assert load_method(name).__doc__


def test_an_unknown_method_gets_the_nearest_name():
    with pytest.raises(UsageError, match="did you mean 'dino_vmf'"):
        find_method("dino_vmff")


def test_a_method_file_without_recipe_says_what_to_write(tmp_path):
    (tmp_path / "lonely.py").write_text("METHOD = None\n")
    with pytest.raises(UsageError, match=r"write .*lonely\.yaml"):
        find_method(str(tmp_path / "lonely.py"))


def test_a_file_without_method_class_is_named(tmp_path):
    (tmp_path / "empty.py").write_text("METHOD = None\n")
    (tmp_path / "empty.yaml").write_text("seed: 0\n")
    with pytest.raises(UsageError, match="must end with"):
        load_method("empty", str(tmp_path / "empty.py"))
