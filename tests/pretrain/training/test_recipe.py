"""Recipes: merging, strictness, identity; a dump is a recipe again."""

from __future__ import annotations

import pytest
import yaml

from pretrain.errors import UsageError
from pretrain.methods.method import method_names
from pretrain.training.recipe import Recipe, preset_names, recipe_hash, resolve


@pytest.mark.parametrize("preset", preset_names())
@pytest.mark.parametrize("method", method_names())
def test_every_method_resolves_at_every_preset_and_its_dump_is_the_same_recipe(method, preset, tmp_path):
    recipe = resolve(method, preset=preset)
    dump = tmp_path / "recipe.yaml"
    dump.write_text(recipe.to_yaml())
    again = resolve(str(dump))
    assert again.model_dump() == recipe.model_dump()
    assert again.identity == recipe.identity


def test_later_layers_win_and_say_where_a_value_came_from():
    recipe = resolve("dino", preset="imagenet_vits16", overrides=["optim.lr=1e-4"], seed=3)
    assert recipe.optim.lr == 1e-4
    assert recipe.origins["optim.lr"] == "command line"
    assert recipe.head.train_magnitude is True
    assert recipe.origins["head.train_magnitude"] == "dino.yaml at imagenet_vits16"
    assert recipe.origins["schedule.epochs"] == "presets/imagenet_vits16.yaml"
    assert recipe.origins["head.prototypes"] == "dino.yaml"
    assert "optim.clip" not in recipe.origins
    assert recipe.seed == 3


def test_plumbing_does_not_change_the_identity_but_science_and_seed_do():
    base = resolve("dino")
    assert resolve("dino", overrides=["runtime.threads=3", "checkpoint.keep=9"]).identity == base.identity
    assert resolve("dino", overrides=["data.cache=device"]).identity == base.identity
    others = [resolve("dino", overrides=["optim.lr=0.1"]), resolve("dino", seed=1), resolve("dino_vmf")]
    assert len({base.identity, *(other.identity for other in others)}) == 4


def test_identity_is_the_start_of_the_hash_of_the_dump():
    recipe = resolve("dino")
    dump = yaml.safe_load(recipe.to_yaml())
    assert recipe_hash(dump).startswith(recipe.identity)
    del dump["data"]["cache"]  # as it was written before there was this setting
    assert recipe_hash(dump).startswith(recipe.identity)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "dno"}, "did you mean 'dino'"),
        ({"method": "dino", "preset": "digit"}, "did you mean 'digits'"),
        ({"method": "dino", "overrides": ["optim.lrr=1"]}, "did you mean 'optim.lr'"),
        ({"method": "dino", "overrides": ["optm.lr=1"]}, "did you mean 'optim'"),
        ({"method": "dino", "overrides": ["optim.lr=fast"]}, "optim.lr='fast' .from command line.: input should be"),
        ({"method": "dino", "overrides": ["optim.lr"]}, "not of the form section.key=value"),
        ({"method": "dino", "overrides": ["optim=3"]}, "optim is a section"),
        ({"method": "dino", "overrides": ["method.parameters.alpha=3"]}, "alpha"),
        ({"method": "dino", "overrides": ["head.num_prototypes=1"]}, "leaves nothing to choose"),
        ({"method": "nowhere/dino.py"}, "no method file"),
        ({"method": "nowhere.yaml"}, "cannot read the recipe"),
    ],
)
def test_a_mistake_is_named_with_what_to_do(arguments, message):
    with pytest.raises(UsageError, match=message):
        resolve(**arguments)


def test_data_picks_the_preset_made_for_it():
    assert resolve("dino", data="cifar10").preset == "cifar10"
    assert resolve("dino").preset == "digits"
    folder = resolve("dino", data="folder:/some/images")
    assert folder.preset == "imagenet_vits16"
    assert folder.data.name == "folder:/some/images"


def test_label_tells_method_architecture_and_data():
    assert resolve("dino_vmf", preset="imagenet_vits16", data="imagenet:/data/in1k").label == "dino_vmf-vits16-imagenet"


def test_a_recipe_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        resolve("dino").optim.lr = 1.0  # type: ignore[misc]


def test_every_section_field_has_a_default_so_that_a_short_recipe_is_enough():
    assert Recipe.model_validate({"method": {"name": "dino"}}).optim.batch_size == 1024


def test_one_argument_of_the_network_leaves_the_others() -> None:
    one = resolve("dino", preset="digits", overrides=["model.kwargs.depth=2", "model.kwargs.num_heads=4"])
    assert one.model.kwargs == {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 4}
    whole = resolve("dino", preset="digits", overrides=["model.kwargs={depth: 2}", "model.kwargs.num_heads=4"])
    assert whole.model.kwargs == {"depth": 2, "num_heads": 4}
