from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pretrain.data.images import ImageSet
from pretrain.data.transforms import EvalTransform
from pretrain.errors import DinobenchError
from pretrain.models.backbones import last_tokens
from pretrain.models.checkpoint import LoadedModel
from suites.cache import FeatureCache
from suites.extractor import Extractor
from suites.features import extract
from suites.labelled import LabelledData
from suites.measure import measure
from suites.protocols import linear_augmented
from suites.protocols.linear import held_out_split
from suites.protocols.linear_augmented import FeatureBatch, Parameters, Trainer
from suites.protocols.protocol import Context, Outcome
from suites.suite import LastBlocks, Suite
from suites.training_views import CropViews, Order, RandomCrop

MakeImages = Callable[..., ImageSet]
TRANSFORM = EvalTransform(resize=16, crop=None, interpolation="bilinear")
SHORT = Parameters(
    transform=TRANSFORM,
    crop=RandomCrop(size=16, scale=(0.5, 1.0)),
    feature="cls",
    learning_rates=(0.01, 0.3, 2.0),
    epochs=4,
    batch_size=16,
    held_out=0.2,
)


@pytest.fixture
def data(make_images: MakeImages) -> LabelledData:
    return LabelledData(make_images(50), make_images(40, split="test", seed=1))


def run(data: LabelledData, model: LoadedModel, parameters: Parameters = SHORT, seed: int = 0) -> Outcome:
    return linear_augmented.run(data, Extractor(model), parameters, Context(0, seed=seed, model=model))


def sgd(batches: list[tuple[int, Tensor, Tensor]], rate: float, num_classes: int, seed: int) -> nn.Linear:
    """One rate alone by torch.optim.SGD and CosineAnnealingLR per epoch, on batches (epoch, features, labels)."""
    width = batches[0][1].shape[1]
    classifier = nn.Linear(width, num_classes)
    with torch.no_grad():
        classifier.weight.copy_(0.01 * torch.randn(num_classes, width, generator=torch.Generator().manual_seed(seed)))
        classifier.bias.zero_()
    optimiser = torch.optim.SGD(classifier.parameters(), lr=rate * SHORT.batch_size / 256, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, SHORT.epochs)
    for step, (epoch, features, labels) in enumerate(batches):
        optimiser.zero_grad()
        nn.functional.cross_entropy(classifier(features), labels).backward()
        optimiser.step()
        if step + 1 < len(batches) and batches[step + 1][0] > epoch:
            schedule.step()
    return classifier


def test_every_rate_equals_its_own_sgd_training_with_and_without_the_held_out_part() -> None:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(60) % 3
    fit, _ = held_out_split(labels, 0.2, seed=5)
    trainer = Trainer(labels, fit, 8, SHORT, Context(3, seed=5))
    everything: list[tuple[int, Tensor, Tensor]] = []
    without: list[tuple[int, Tensor, Tensor]] = []
    for keys in Order(60, 16, SHORT.epochs, seed=5).batches():
        number = torch.tensor([key[1] for key in keys])
        features = labels[number, None] + torch.randn(len(keys), 8, generator=generator)
        trainer.step(FeatureBatch(keys[0][0], number, features))
        everything.append((keys[0][0], features, labels[number]))
        kept = torch.isin(number, fit)
        without.append((keys[0][0], features[kept], labels[number[kept]]))
    x = torch.randn(20, 8, generator=generator)
    assert trainer.trial is not None
    for heads, batches in ((trainer.final, everything), (trainer.trial, without)):
        logits = heads.classifiers.logits(x)
        for number, rate in enumerate(SHORT.learning_rates):
            expected = sgd(batches, rate, 3, seed=5)(x)
            torch.testing.assert_close(logits[:, number], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("selection", ["held_out", "test"])
def test_scores_are_those_of_a_plain_loop_over_the_frozen_network(
    data: LabelledData, model: LoadedModel, selection: str
) -> None:
    rate = 0.3
    parameters = SHORT.model_copy(update={"selection": selection, "learning_rates": (rate,)})
    outcome = run(data, model, parameters, seed=4)
    views = CropViews(SHORT.crop, TRANSFORM.mean, TRANSFORM.std, seed=4)
    labels, array = data.train.labels, data.train.array
    batches = []
    for keys in Order(50, 16, SHORT.epochs, seed=4).batches():
        number = torch.tensor([key[1] for key in keys])
        with torch.no_grad():
            features = model.backbone(views.batch(array[number], number, keys[0][0]))
        batches.append((keys[0][0], features, labels[number]))
    with torch.no_grad():
        test = model.backbone(TRANSFORM.batch(data.test.array))
    ends = [4] if selection == "held_out" else [1, 2, 3, 4]
    hits = []
    for epochs in ends:
        score = sgd([batch for batch in batches if batch[0] < epochs], rate, 3, seed=4)(test)
        hits.append(100 * (score.argmax(1) == data.test.labels).double().mean().item())
    assert outcome.scores["top1"] == pytest.approx(max(hits))
    if selection == "test":
        assert outcome.scores["epoch"] == 1 + hits.index(max(hits))
        assert outcome.tables["learning_rates"]["test_top1"].tolist() == pytest.approx(hits)


def test_separable_patterns_are_classified_and_described(data: LabelledData, model: LoadedModel) -> None:
    outcome = run(data, model)
    assert outcome.scores["top1"] > 80
    assert outcome.interval[0] <= outcome.scores["top1"] <= outcome.interval[1]
    assert 100 * outcome.samples["correct"].mean() == pytest.approx(outcome.scores["top1"])
    assert outcome.n == 40 and len(outcome.tables["learning_rates"]) == 3
    assert "chosen among 3 on 9 images of train, trained on all of train, last epoch" in outcome.notes[0]
    assert outcome.notes[1] == "feature: pooled"


def test_held_out_selection_never_reads_the_test_part(
    data: LabelledData, model: LoadedModel, make_images: MakeImages
) -> None:
    shuffled = make_images(40, split="test", seed=1)
    shuffled.labels = shuffled.labels.roll(1)
    found = [run(part, model) for part in (data, LabelledData(data.train, shuffled))]
    assert found[0].tables["learning_rates"].equals(found[1].tables["learning_rates"])
    assert found[0].scores["held_out_top1"] == found[1].scores["held_out_top1"]
    assert found[0].scores["top1"] > found[1].scores["top1"]


def test_official_selection_takes_the_best_of_rates_and_epochs_on_test_and_says_so(
    data: LabelledData, model: LoadedModel
) -> None:
    outcome = run(data, model, SHORT.model_copy(update={"selection": "test", "epochs": 6}))
    table = outcome.tables["learning_rates"]
    assert len(table) == 3 * 6
    best = table.loc[table["test_top1"].idxmax()]
    assert outcome.scores["top1"] == pytest.approx(best["test_top1"])
    assert (outcome.scores["epoch"], outcome.scores["learning_rate"]) == (best["epoch"], best["learning_rate"])
    assert "the best of 3 x 6 on the 40 test images themselves, as in the official script" in outcome.notes[0]
    assert "held_out_top1" not in outcome.scores


def test_same_seed_gives_the_same_scores_and_samples(data: LabelledData, model: LoadedModel) -> None:
    first, second, other = (run(data, model, seed=seed) for seed in (1, 1, 2))
    assert first.scores == second.scores and first.samples.equals(second.samples)
    assert first.tables["learning_rates"].equals(second.tables["learning_rates"])
    assert not first.tables["learning_rates"].equals(other.tables["learning_rates"])


def test_network_sees_other_crops_in_every_epoch(data: LabelledData, model: LoadedModel) -> None:
    found: dict[int, list[Tensor]] = {}
    for batch in linear_augmented.feature_batches(data, Extractor(model), SHORT, seed=0):
        for number, features in zip(batch.number.tolist(), batch.features, strict=True):
            found.setdefault(number, []).append(features)
    assert sorted(found) == list(range(50))
    for epochs in found.values():
        assert len(epochs) == 4
        assert all(not torch.allclose(epochs[0], other) for other in epochs[1:])


@pytest.mark.parametrize("feature", ["dino", "cls", "cls+avg", LastBlocks(last=2, avgpool=True)])
def test_training_features_have_the_columns_of_the_extracted_ones(
    feature: str | LastBlocks, data: LabelledData, model: LoadedModel
) -> None:
    still = RandomCrop(size=16, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)
    parameters = SHORT.model_copy(update={"feature": feature, "crop": still, "epochs": 1})
    (first, *_) = linear_augmented.feature_batches(data, Extractor(model, batch_size=5), parameters, seed=0)
    expected = extract(model, data.train, TRANSFORM, feature).cls[first.number]
    torch.testing.assert_close(first.features, expected, rtol=1e-4, atol=1e-5)
    if feature == "dino":  # a network of 2 blocks narrower than 768: CLS of as many as it has
        with torch.no_grad():
            layers = last_tokens(model.backbone, TRANSFORM.batch(data.train.array[first.number]), 4)
        torch.testing.assert_close(first.features, torch.cat([cls for cls, _ in layers], 1), rtol=1e-4, atol=1e-5)


def test_rates_that_all_diverge_say_what_to_do(data: LabelledData, model: LoadedModel) -> None:
    for selection in ("held_out", "test"):
        parameters = SHORT.model_copy(update={"learning_rates": (1e38,), "selection": selection})
        with pytest.raises(DinobenchError, match="smaller learning_rates"):
            run(data, model, parameters)


def test_progress_tells_the_epoch(data: LabelledData, model: LoadedModel) -> None:
    seen: list[tuple[str, int, int]] = []
    extractor = Extractor(model, progress=lambda *told: seen.append(told))
    linear_augmented.run(data, extractor, SHORT, Context(0, model=model))
    assert ("linear classifiers on patterns, epoch 2 of 4", 32, 50) in seen
    assert seen[-1] == ("linear classifiers on patterns, epoch 4 of 4", 50, 50)


def test_imagenet_folders_of_mixed_sizes_are_measured_with_receipt_and_baseline(
    tmp_path: Path, model: LoadedModel
) -> None:
    generator = torch.Generator().manual_seed(0)
    for split, number in (("train", 24), ("val", 8)):
        for i in range(number):
            folder = tmp_path / split / ("dark" if i % 2 else "light")
            folder.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(0, 100, (20 + i % 3, 18 + i % 5, 3), generator=generator) + (0 if i % 2 else 150)
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{i}.png")
    parameters = {
        "transform": {"resize": 18, "crop": 16},
        "crop": {"size": 16},
        "learning_rates": [0.3, 1.0],
        "epochs": 6,
        "batch_size": 8,
    }
    definition = {"name": "mine", "version": 1, "protocol": "linear_augmented", "headline": "top1"}
    dataset = {"name": "imagenet:", "train": "train", "test": "val"}
    suite = Suite.model_validate(
        {**definition, "dataset": dataset, "parameters": parameters, "baseline_seeds": 2, "baselines": ["random_init"]}
    )
    cache = FeatureCache(tmp_path / "cache")
    first, second = (measure(suite, model, data=f"imagenet:{tmp_path}", cache=cache) for _ in range(2))
    assert first.scores == second.scores and first.scores["top1"] == 100.0
    assert set(first.baselines) == {"random_init"} and "top1_seed_sd" in first.baselines["random_init"]
    assert not first.from_cache and not second.from_cache  # only the images that are scored are cached
    assert [part["from_cache"] for part in second.receipt["features"]] == [True, True, False]
    assert {role: part["n"] for role, part in first.receipt["dataset"].items()} == {"train": 24, "test": 8}
    assert first.receipt["parameters"]["crop"]["scale"] == [0.08, 1.0]


@pytest.mark.gpu
def test_gpu_and_bf16_give_the_scores_of_the_cpu(data: LabelledData, model: LoadedModel) -> None:
    expected = run(data, model).scores["top1"]
    for precision in ("fp32", "bf16"):
        extractor = Extractor(model, device="cuda", precision=precision)
        outcome = linear_augmented.run(data, extractor, SHORT, Context(0, device="cuda", model=model))
        assert outcome.scores["top1"] == pytest.approx(expected, abs=10)
    model.backbone.cpu()
