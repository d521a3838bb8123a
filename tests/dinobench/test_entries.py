from __future__ import annotations

from collections.abc import Callable

import pytest

from dinobench import entries
from dinobench.results import Result
from pretrain.training.recipe import Recipe, resolve


def test_a_recipe_gives_ten_to_fifteen_short_parameters(recipe: Recipe) -> None:
    parameters = entries.recipe_parameters(recipe.model_dump(mode="json"))
    assert set(parameters) == set(entries.PARAMETERS)
    assert 10 <= len(parameters) <= 15
    assert all(len(value) < 40 for value in parameters.values())


def test_names_begin_with_what_differs(make_result: Callable[..., Result]) -> None:
    assert entries.result_entry(make_result(), [], None).name == "dino/s0/ep2/vits16"


def test_a_row_of_an_ablation_is_named_by_it(make_result: Callable[..., Result]) -> None:
    recipe = resolve("dino_table7/mse").model_dump(mode="json")
    entry = entries.result_entry(make_result(), [], recipe)
    assert entry.name.startswith("dino_table7/mse/s0") and entry.tags["row"] == "dino_table7/mse"


def test_a_checkpoint_of_unknown_origin_still_has_a_name(make_result: Callable[..., Result]) -> None:
    entry = entries.result_entry(make_result(provenance={"sha256": "b" * 64, "arch": "rn50"}), [], None)
    assert entry.name.startswith("model/")
    assert entry.name.endswith("rn50")
    assert entry.step == 0


def test_a_description_begins_with_the_table_of_the_last_step(make_result: Callable[..., Result]) -> None:
    early = make_result(50.0, provenance={"sha256": "b" * 64, "step": 20})
    text = entries.score_table([early, make_result()])
    assert text.splitlines()[0] == "| suite | score | step 40 | raw pixels | PCA | random init |"
    assert "50.0" not in text


@pytest.mark.parametrize(
    ("value", "text"), [(97.84, "97.8"), (0.0, "0.0"), (-0.0371, "-0.037"), (None, "-"), (float("nan"), "-")]
)
def test_scores_are_shown_with_a_decimal_or_three(value: float | None, text: str) -> None:
    assert entries.number(value) == text
