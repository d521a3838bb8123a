from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from pretrain.data.images import ImageSet
from pretrain.models.checkpoint import LoadedModel
from suites.extractor import Extractor
from suites.protocols import alignment
from suites.protocols.alignment import Parameters, TestImages
from suites.protocols.protocol import Context
from suites.training_views import CropViews, RandomCrop

MakeImages = Callable[..., ImageSet]
PARAMETERS = Parameters(crop=RandomCrop(size=16, scale=(0.5, 1.0)))


def test_equals_the_formulas_on_views_cut_one_by_one(model: LoadedModel, make_images: MakeImages) -> None:
    images = make_images(30, split="test")
    outcome = alignment.run(TestImages(images), Extractor(model, batch_size=7), PARAMETERS, Context(0, seed=3))
    views = CropViews(PARAMETERS.crop, PARAMETERS.mean, PARAMETERS.std, seed=3)
    pixels = torch.stack([images.pixels(i) for i in range(30)])
    with torch.no_grad():
        first, second = (
            torch.cat([model.backbone(views.batch(pixels[i : i + 1], torch.tensor([i]), epoch)) for i in range(30)])
            for epoch in (0, 1)
        )
    first, second = (f / f.norm(dim=1, keepdim=True) for f in (first, second))
    distances = [(first[i] - second[i]).norm().item() ** 2 for i in range(30)]
    pairs = [math.exp(-2 * (first[i] - first[j]).norm().item() ** 2) for i in range(30) for j in range(i)]
    assert outcome.scores["alignment"] == pytest.approx(sum(distances) / 30, rel=1e-4)
    assert outcome.scores["uniformity"] == pytest.approx(math.log(sum(pairs) / len(pairs)), rel=1e-4)
    assert outcome.samples["distance"].tolist() == pytest.approx(distances, rel=1e-3, abs=1e-6)
    assert outcome.interval[0] < outcome.scores["alignment"] < outcome.interval[1]


def test_a_constant_network_is_aligned_and_not_uniform(model: LoadedModel, make_images: MakeImages) -> None:
    class Constant(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ones(len(x), 4)

    model.backbone = Constant()
    outcome = alignment.run(TestImages(make_images(10)), Extractor(model), PARAMETERS, Context(0))
    assert outcome.scores == {"alignment": 0.0, "uniformity": pytest.approx(0.0, abs=1e-6)}


def test_of_a_large_split_a_seeded_draw(model: LoadedModel, make_images: MakeImages) -> None:
    parameters = PARAMETERS.model_copy(update={"num_images": 8})
    data = TestImages(make_images(30, labelled=False))
    runs = [alignment.run(data, Extractor(model), parameters, Context(0, seed=s)) for s in (0, 0, 1)]
    assert runs[0].n == 8
    assert runs[0].scores == runs[1].scores
    assert runs[0].samples["index"].tolist() != runs[2].samples["index"].tolist()
