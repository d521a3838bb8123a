from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pretrain.data.datasets import open_dataset
from pretrain.data.images import ArraySource, ImageSet
from pretrain.models.checkpoint import LoadedModel
from suites import baselines
from suites.baselines import Setting, measure_baselines, principal_components, random_models, raw_pixels
from suites.cache import FeatureCache
from suites.measure import open_splits
from suites.protocols.protocol import Context
from suites.suite import Suite, load_suite

MakeImages = Callable[..., ImageSet]


@pytest.fixture
def make_setting(model: LoadedModel, make_images: MakeImages, tmp_path: Path) -> Callable[..., Setting]:
    def make(name: str = "digits_knn", **changes: object) -> Setting:
        definition = load_suite(name).model_dump()
        if name == "digits_knn":
            definition["parameters"] = {"k": [5, 20]}
        suite = Suite.model_validate({**definition, **changes})
        images = make_images(60), make_images(30, split="test", seed=1)
        context = Context(3, images[0].classes, model=model)
        return Setting(suite, model, *images, context, FeatureCache(tmp_path / "cache"))

    return make


def test_all_three_are_measured_with_the_scores_of_the_suite(make_setting: Callable[..., Setting]) -> None:
    found = measure_baselines(make_setting())
    assert list(found) == ["raw_pixels", "pca", "random_init"]
    assert set(found["raw_pixels"]) == {"top1", "top5", "top1_k5", "top5_k5", "top1_k20", "top5_k20"}
    assert found["raw_pixels"]["top1"] == 100
    assert "top1_seed_sd" in found["random_init"]


def test_second_time_comes_from_the_cache(
    make_setting: Callable[..., Setting], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = measure_baselines(make_setting())
    monkeypatch.setattr(baselines, "_run", lambda *args: pytest.fail("measured again"))
    assert measure_baselines(make_setting()) == first


def test_random_init_is_the_mean_over_its_seeds_and_leaves_the_random_state(
    make_setting: Callable[..., Setting],
) -> None:
    state = torch.get_rng_state()
    setting = make_setting(baseline_seeds=2)
    models = list(random_models(setting))
    assert torch.equal(torch.get_rng_state(), state)
    weights = [model.backbone.state_dict() for model in (*models, setting.model)]
    assert all(w.keys() == weights[0].keys() for w in weights)
    name = "blocks.0.attn.qkv.weight"
    assert not torch.equal(weights[0][name], weights[1][name])
    again = next(iter(random_models(setting)))
    assert torch.equal(again.backbone.state_dict()[name], weights[0][name])
    scores = [baselines._measure_random(model, setting)["top1"] for model in models]
    assert measure_baselines(setting)["random_init"]["top1"] == pytest.approx(sum(scores) / 2)


def test_drop_path_does_not_make_another_random_network(make_setting: Callable[..., Setting]) -> None:
    setting = make_setting()
    key = baselines._key("random_init", setting)
    setting.model.provenance["model"] = {**setting.model.provenance["model"], "drop_path": 0.3}
    assert baselines._key("random_init", setting) == key
    setting.model.provenance["model"] = {**setting.model.provenance["model"], "init": "dino"}
    assert baselines._key("random_init", setting) != key


def test_prototype_suites_have_a_random_head_and_no_pixels(make_setting: Callable[..., Setting]) -> None:
    found = measure_baselines(make_setting("digits_prototypes", baseline_seeds=1))
    assert list(found) == ["random_init"]
    assert found["random_init"]["num_prototypes"] == 24


def test_gray_pixels_are_taken_once_and_colour_whole(make_images: MakeImages) -> None:
    train, test = make_images(10), make_images(5, split="test")
    pixels = raw_pixels(train, test)
    assert pixels is not None
    assert pixels[0].shape == (10, 256)
    assert 0 <= pixels[0].min() <= pixels[0].max() <= 1
    colour = ImageSet("c", "train", "f", ArraySource(torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)))
    pixels = raw_pixels(colour, colour)
    assert pixels is not None
    assert pixels[0].shape == (4, 192)


def test_large_or_uneven_images_have_no_pixel_baselines(
    make_setting: Callable[..., Setting], make_images: MakeImages
) -> None:
    setting = make_setting(baselines=["raw_pixels", "pca"])
    object.__setattr__(setting, "train", make_images(60).resized(65))
    assert measure_baselines(setting) == {}
    object.__setattr__(setting, "train", make_images(60).resized(20))
    assert measure_baselines(setting) == {}


def test_components_are_fitted_on_train_and_ordered(make_images: MakeImages) -> None:
    pixels = raw_pixels(make_images(60), make_images(30, seed=1))
    assert pixels is not None
    train, test = principal_components(*pixels)
    assert train.shape == (60, 60)  # no more components than images
    assert test.shape == (30, 60)
    assert (train.var(0).diff() <= 1e-4).all()
    torch.testing.assert_close(train.mean(0), torch.zeros(60), atol=1e-4, rtol=0)


def test_digits_baselines_are_the_known_ones(model: LoadedModel) -> None:
    suite = load_suite("digits_knn").model_copy(update={"baselines": ("raw_pixels", "pca")})
    train, test = open_splits(suite)
    found = measure_baselines(Setting(suite, model, train, test, Context(10, model=model), cache=None))
    assert found["raw_pixels"]["top1"] == pytest.approx(97.8)
    assert found["pca"]["top1"] == pytest.approx(98.0)
    assert len(open_dataset("digits", "test")) == 500
