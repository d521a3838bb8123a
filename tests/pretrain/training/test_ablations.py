"""Ablations: every row resolves, differs from the others in what its name says, and is labelled."""

from __future__ import annotations

import pytest

from pretrain.errors import UsageError
from pretrain.training.ablations import ablation_names, find_row, row_names
from pretrain.training.recipe import resolve

PRESETS = ("digits", "imagenet_vits16", "imagenet22k_vitl14")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("ablation", ablation_names())
def test_every_row_is_a_recipe_of_its_own_with_a_label(ablation, preset):
    recipes = {row: resolve(f"{ablation}/{row}", preset=preset) for row in row_names(ablation, preset)}
    assert all(recipe.tracking.label == f"{ablation}/{row}" for row, recipe in recipes.items())
    # Two rows may be the same recipe where a preset already has what the row sets: then one run serves both.
    assert len({recipe.identity for recipe in recipes.values()}) >= len(recipes) / 2


def test_rows_say_where_their_values_came_from():
    recipe = resolve("dino_table7/no_momentum", preset="imagenet_vits16", overrides=["schedule.epochs=3"])
    assert recipe.method.name == "dino" and recipe.teacher.kind == "student_copy"
    assert recipe.origins["teacher.kind"] == "dino_table7/no_momentum"
    assert recipe.schedule.epochs == 3
    assert resolve("dino_table7/no_momentum", preset="imagenet_vits16").schedule.epochs == 300


def test_a_row_may_be_another_method_and_a_label_is_no_science():
    row = resolve("dino_table7/mse")
    assert row.method.name == "mean_teacher" and row.objective.loss == "mse"
    assert row.identity == resolve("mean_teacher").identity


def test_rows_of_a_cumulative_ablation_build_on_each_other():
    rows = [resolve(f"dinov2_table1/{row}", preset="imagenet22k_vitl14") for row in ("ibot", "koleo", "untied_heads")]
    assert [row.regularizer.koleo for row in rows] == [0.0, 0.1, 0.1]
    assert [row.patch.head for row in rows] == ["shared", "shared", "separate"]
    assert rows[2].target.centring == "sinkhorn" and rows[2].model.kwargs == {"init_values": 1e-5}


def test_a_preset_may_have_rows_of_its_own():
    assert "k262144" in row_names("dino_prototypes", "imagenet_vits16")
    assert "k262144" not in row_names("dino_prototypes", "digits")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dino_table7/no_momentun", "did you mean 'no_momentum'"),
        ("dino_table77/dino", "did you mean"),
        ("dino_table7", "row of dino_table7"),
    ],
)
def test_an_unknown_row_or_ablation_gets_the_nearest_name(name, message):
    with pytest.raises(UsageError, match=message):
        resolve(name)


def test_layers_of_a_row_do_not_share_state():
    first, second = (find_row("dino_crops/local0", "imagenet_vits16") for _ in range(2))
    assert first == second and first[0] == "dino"
