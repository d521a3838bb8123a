from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from pretrain.data.images import ImageSet
from pretrain.data.transforms import EvalTransform
from pretrain.errors import DinobenchError, UsageError
from pretrain.models.checkpoint import LoadedModel, weights_sha256
from suites.extractor import Extractor
from suites.labelled import LabelledData
from suites.measure import measure
from suites.protocols import finetune
from suites.protocols.finetune import Parameters
from suites.protocols.protocol import Context, Outcome
from suites.suite import Suite, load_suite
from suites.trainable import Classifier, copy_backbone
from suites.training_views import Order, RecipeViews, TrainingAugmentation

MakeImages = Callable[..., ImageSet]
PLAIN = TrainingAugmentation(
    size=16, scale=(1, 1), ratio=(1, 1), flip=0, auto_augment=None, color_jitter=0, erase=0, mean=(0.5,) * 3
)
SHORT = Parameters(
    augmentation=PLAIN.model_copy(update={"scale": (0.6, 1.0), "erase": 0.1}),
    mixup=0.2,
    cutmix=0.5,
    transform=EvalTransform(resize=16, crop=None, mean=(0.5,) * 3),
    epochs=12,
    warmup_epochs=2,
    batch_size=16,
    micro_batch_size=8,
    learning_rate=0.005,
)
EXACT = SHORT.model_copy(
    update={"augmentation": PLAIN, "mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0, "epochs": 2, "warmup_epochs": 1}
)


@pytest.fixture
def data(make_images: MakeImages) -> LabelledData:
    return LabelledData(make_images(60), make_images(45, split="test", seed=1))


def run(data: LabelledData, model: LoadedModel, parameters: Parameters = SHORT, seed: int = 0) -> Outcome:
    return finetune.run(data, Extractor(model), parameters, Context(0, seed=seed, model=model))


def trained(data: LabelledData, model: LoadedModel, parameters: Parameters) -> Classifier:
    torch.manual_seed(0)
    classifier = Classifier(copy_backbone(model, parameters.drop_path), 3, parameters.head_init_scale)
    finetune.train(classifier, data, Extractor(model), parameters, Context(3, seed=2))
    return classifier


def assert_same_weights(found: nn.Module, expected: nn.Module, atol: float) -> None:
    for (name, one), other in zip(found.named_parameters(), expected.parameters(), strict=True):
        # The gradient of the keys' bias is zero up to rounding, which AdamW turns into whole steps.
        if name.endswith("qkv.bias"):
            one, other = (torch.cat([bias[:16], bias[32:]]) for bias in (one, other))
        torch.testing.assert_close(one, other, rtol=0, atol=atol, msg=name)


def test_patterns_are_learnt_and_the_checkpoint_stays_as_it_is(data: LabelledData, model: LoadedModel) -> None:
    before, mode = weights_sha256(model.backbone), model.backbone.training
    outcome = run(data, model)
    assert outcome.scores["top1"] > 80
    assert outcome.interval[0] <= outcome.scores["top1"] <= outcome.interval[1]
    assert 100 * outcome.samples["correct"].mean() == pytest.approx(outcome.scores["top1"])
    assert outcome.n == len(outcome.samples) == 45
    assert weights_sha256(model.backbone) == before and model.backbone.training == mode
    epochs = outcome.tables["epochs"]
    assert epochs["epoch"].tolist() == list(range(1, 13))
    assert epochs["loss"].iloc[-1] < epochs["loss"].iloc[0] < 1.1 * math.log(3)
    assert outcome.scores["train_loss"] == epochs["loss"].iloc[-1]


def test_same_seed_gives_the_same_scores_whatever_was_drawn_before(data: LabelledData, model: LoadedModel) -> None:
    parameters = SHORT.model_copy(update={"epochs": 2})
    first = run(data, model, parameters, seed=3)
    torch.rand(5)
    state = torch.get_rng_state()
    second = run(data, model, parameters, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.scores == second.scores and first.samples.equals(second.samples)
    assert first.tables["epochs"].equals(second.tables["epochs"])
    other = run(data, model, parameters, seed=4)
    assert not first.tables["epochs"].equals(other.tables["epochs"])


def test_training_equals_a_plain_loop_with_adamw(data: LabelledData, model: LoadedModel) -> None:
    found = trained(data, model, EXACT)
    torch.manual_seed(0)
    expected = Classifier(copy_backbone(model, 0.0), 3, EXACT.head_init_scale)
    groups = []
    for name, parameter in expected.named_parameters():
        block = name.split(".")[2] if ".blocks." in name else None
        embedding = any(part in name for part in ("cls_token", "pos_embed", "patch_embed"))
        layer = 0 if embedding else 3 if block is None else int(block) + 1
        decay = 0.0 if parameter.ndim == 1 or "cls_token" in name or "pos_embed" in name else EXACT.weight_decay
        groups.append({"params": [parameter], "weight_decay": decay, "scale": 0.75 ** (3 - layer)})
    optimiser = torch.optim.AdamW(groups)
    views = RecipeViews(PLAIN, seed=2)
    # 60 / 16 = 3 whole batches an epoch: 3 steps of warm-up from 0, then 3 of the cosine
    warmup = [0, 0.5, 1.0]
    cosine = [0.5 * (1 + math.cos(math.pi * step / 3)) for step in range(3)]
    smallest = EXACT.min_learning_rate / EXACT.learning_rate
    rates = [EXACT.learning_rate * r for r in (*warmup, *(smallest + (1 - smallest) * c for c in cosine))]
    batches = Order(60, 16, 2, seed=2, drop_last=True).batches()
    expected.train()
    for rate, keys in zip(rates, batches, strict=True):
        for group in optimiser.param_groups:
            group["lr"] = rate * group["scale"]
        x = torch.stack([views.one(data.train.image(key[1]), key) for key in keys])
        y = data.train.labels[torch.tensor([key[1] for key in keys])]
        optimiser.zero_grad()
        nn.functional.cross_entropy(expected(x), y, label_smoothing=EXACT.label_smoothing).backward()
        optimiser.step()
    assert_same_weights(found, expected, atol=2e-5)


def test_parts_of_a_batch_sum_up_to_the_batch(data: LabelledData, model: LoadedModel) -> None:
    whole, parts = (trained(data, model, EXACT.model_copy(update={"micro_batch_size": size})) for size in (16, 4))
    assert_same_weights(parts, whole, atol=2e-5)


def test_repeats_of_an_image_go_to_different_parts(
    data: LabelledData, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    decode = finetune.decoded_batches

    def watched(*args: object) -> object:
        for batch in decode(*args):
            seen.append(batch.number.tolist())
            yield batch

    monkeypatch.setattr(finetune, "decoded_batches", watched)
    parameters = EXACT.model_copy(update={"repeats": 3, "batch_size": 12, "micro_batch_size": 4, "epochs": 1})
    trained(data, model, parameters)
    assert len(seen) == 15 and all(len(set(part)) == 4 for part in seen)
    assert len({number for part in seen[:3] for number in part}) == 4


def test_mixed_batches_have_mixed_targets(model: LoadedModel) -> None:
    mix = finetune._Mixing(SHORT.model_copy(update={"cutmix": 0.0, "mixup": 5.0}), Context(3, seed=1))
    images, labels = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    mixed, target = mix(images.clone(), labels, 0)
    share = mixed[0, 0, 0, 0].item() / 3  # of image 3 in image 0
    assert 0 < share < 1
    torch.testing.assert_close(mixed[1], (1 - share) * images[1] + share * images[2])
    hot = nn.functional.one_hot(labels, 3) * 0.9 + 0.1 / 3
    torch.testing.assert_close(target, (1 - share) * hot + share * hot.flip(0))
    again, other = (mix(images.clone(), labels, draw)[0] for draw in (0, 1))
    assert torch.equal(again, mixed) and not torch.equal(other, mixed)


def test_without_mixing_targets_are_smoothed_labels(data: LabelledData) -> None:
    mix = finetune._Mixing(EXACT, Context(3))
    images, labels, logits = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0]), torch.randn(4, 3)
    same, target = mix(images, labels, 0)
    assert same is images
    loss = nn.functional.cross_entropy
    torch.testing.assert_close(loss(logits, target), loss(logits, labels, label_smoothing=0.1))


@pytest.mark.parametrize("rate", [1e30, 100.0])
def test_a_training_that_diverges_says_what_to_do(rate: float, data: LabelledData, model: LoadedModel) -> None:
    parameters = SHORT.model_copy(update={"learning_rate": rate, "warmup_epochs": 0})
    with pytest.raises(DinobenchError, match="diverged: the training loss of epoch .* use a learning_rate below"):
        run(data, model, parameters)


def test_fewer_images_than_a_batch_are_refused(data: LabelledData, model: LoadedModel) -> None:
    with pytest.raises(DinobenchError, match="60 images, fewer than the batch of 64: lower batch_size"):
        run(data, model, SHORT.model_copy(update={"batch_size": 64}))


def test_sizes_that_the_network_does_not_take_are_refused(data: LabelledData, model: LoadedModel) -> None:
    large = SHORT.augmentation.model_copy(update={"size": 20})
    with pytest.raises(UsageError, match="images of 20 px do not divide into patches of 8 px"):
        run(data, model, SHORT.model_copy(update={"augmentation": large}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batch_size": 6}, "no multiple of micro_batch_size=6"),
        ({"batch_size": 15, "micro_batch_size": 5}, "pair images: micro_batch_size=5 must be even"),
        ({"warmup_epochs": 13}, "warmup_epochs=13 are more than epochs=12"),
    ],
)
def test_impossible_recipes_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Parameters.model_validate({**SHORT.model_dump(), **changes})


def test_progress_tells_the_epoch(data: LabelledData, model: LoadedModel) -> None:
    seen: list[tuple[str, int, int]] = []
    extractor = Extractor(model, progress=lambda *told: seen.append(told))
    finetune.run(data, extractor, SHORT.model_copy(update={"epochs": 3}), Context(0, model=model))
    assert seen[3] == ("fine-tuning on patterns, epoch 2 of 3", 16, 48)
    assert seen[-1][1:] == (45, 45)


def test_a_cnn_with_batch_norm_is_fine_tuned(data: LabelledData, make_model: Callable[..., LoadedModel]) -> None:
    model = make_model(name="resnet10t", kwargs={}, init="timm")
    before = weights_sha256(model.backbone)  # holds the running statistics too
    outcome = run(data, model, SHORT.model_copy(update={"epochs": 3, "warmup_epochs": 1, "drop_path": 0.0}))
    assert len(outcome.samples) == 45 and math.isfinite(outcome.scores["train_loss"])
    assert weights_sha256(model.backbone) == before


def test_test_labels_are_not_read_in_training(data: LabelledData, model: LoadedModel, make_images: MakeImages) -> None:
    shuffled = make_images(45, split="test", seed=1)
    shuffled.labels = shuffled.labels.roll(1)
    parameters = SHORT.model_copy(update={"epochs": 3})
    found = [run(part, model, parameters) for part in (data, LabelledData(data.train, shuffled))]
    assert found[0].tables["epochs"].equals(found[1].tables["epochs"])
    assert found[0].samples["prediction"].tolist() == found[1].samples["prediction"].tolist()


def test_shipped_suite_on_digits_runs_with_its_baseline(make_model: Callable[..., LoadedModel]) -> None:
    suite = load_suite("digits_finetune")
    parameters = {**suite.parameters, "epochs": 3, "warmup_epochs": 1}
    dataset = suite.dataset.model_copy(update={"train": "train[:0.4]", "test": "test[:0.2]"})
    short = Suite.model_validate({**suite.model_dump(), "parameters": parameters, "dataset": dataset})
    result = measure(short, make_model(kwargs={**make_model().provenance["model"]["kwargs"], "patch_size": 4}))
    assert result.n == 100 and not result.from_cache
    assert set(result.baselines) == {"random_init"}
    assert result.scores["top1"] > 20  # of ten classes
    assert result.receipt["parameters"]["layer_decay"] == 0.75
    assert result.receipt["features"][0]["from_cache"] is False


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fine_tuning_on_the_gpu_learns_too(precision: str, data: LabelledData, model: LoadedModel) -> None:
    extractor = Extractor(model, device="cuda", precision=precision)
    outcome = finetune.run(data, extractor, SHORT, Context(0, device="cuda", model=model))
    assert outcome.scores["top1"] > 80
    assert next(model.backbone.parameters()).device.type == "cpu"


def test_bf16_learns_too(data: LabelledData, model: LoadedModel) -> None:
    extractor = dataclasses.replace(Extractor(model), precision="bf16")
    outcome = finetune.run(data, extractor, SHORT, Context(0, model=model))
    assert outcome.scores["top1"] > 80
