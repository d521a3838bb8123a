from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pretrain.data.images import ImageSet
from pretrain.errors import DinobenchError, UsageError
from pretrain.models.backbones import last_tokens
from pretrain.models.checkpoint import LoadedModel
from suites.features import extract
from suites.measure import measure
from suites.protocols import linear_sweep
from suites.protocols.linear_sweep import Head, Input, Parameters, fit_heads
from suites.protocols.protocol import Context, Split
from suites.suite import LastBlocks, load_suite

MakeSplit = Callable[..., Split]
DIM = 16
"""Of the tiny network, which has 2 blocks: a feature of 2 CLS tokens and the mean patch has 3 * 16 columns."""
SHORT = Parameters(num_blocks=(1, 2), learning_rates=(0.01, 0.3, 2.0), epochs=4, epoch_length=None, batch_size=32)


def wide(num: int = 100, seed: int = 0, dtype: torch.dtype = torch.float64) -> Split:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % 3
    means = torch.randn(3, 3 * DIM, generator=torch.Generator().manual_seed(9))
    features = (means[labels] + torch.randn(num, 3 * DIM, generator=generator)).to(dtype)
    return Split(features, labels, torch.arange(num))


def all_heads(model: LoadedModel, parameters: Parameters = SHORT) -> list[Head]:
    inputs = linear_sweep.find_inputs(3 * DIM, parameters, Context(3, model=model))
    return [Head(source, rate) for source in inputs for rate in parameters.learning_rates]


def autograd_training(split: Split, head: Head, parameters: Parameters, batches: list[Tensor], initial: Tensor):
    """The same head alone, by torch.optim.SGD, CosineAnnealingLR per iteration and autograd."""
    x = split.features[:, head.source.start : head.source.stop]
    classifier = nn.Linear(x.shape[1], 3).to(x.dtype)
    with torch.no_grad():
        classifier.weight.copy_(initial[:, head.source.start : head.source.stop])
        classifier.bias.zero_()
    scaled = head.learning_rate * parameters.batch_size / 256
    optimiser = torch.optim.SGD(classifier.parameters(), lr=scaled, momentum=0.9, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, len(batches), eta_min=0)
    for chosen in batches:
        optimiser.zero_grad()
        nn.functional.cross_entropy(classifier(x[chosen]), split.labels[chosen]).backward()
        optimiser.step()
        schedule.step()
    return classifier(x)


def test_each_head_equals_its_own_sgd_training(model: LoadedModel) -> None:
    split, heads = wide(), all_heads(model)
    together = fit_heads(split, torch.arange(100), heads, SHORT, Context(3, seed=5, model=model))
    generator = torch.Generator().manual_seed(5)
    initial = 0.01 * torch.randn(3, 3 * DIM, generator=generator)
    # 4 epochs of 100 / 32 -> 3 iterations: 12 batches of 32 out of permutations laid end to end
    order = torch.cat([torch.randperm(100, generator=generator) for _ in range(4)])
    batches = list(order[: 12 * 32].split(32))
    logits = together.logits(split.features)
    assert logits.shape == (100, 12, 3)
    for number, head in enumerate(heads):
        expected = autograd_training(split, head, SHORT, batches, initial)
        torch.testing.assert_close(logits[:, number], expected, rtol=0, atol=1e-6)


def test_a_head_trained_alone_equals_the_one_in_the_batch(model: LoadedModel) -> None:
    context = Context(3, seed=2, model=model)
    heads = all_heads(model)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        split = wide(dtype=dtype)
        together = fit_heads(split, torch.arange(90), heads, SHORT, context).logits(split.features)
        for number in (0, 4, 11):
            alone = fit_heads(split, torch.arange(90), [heads[number]], SHORT, context).logits(split.features)
            torch.testing.assert_close(alone[:, 0], together[:, number], rtol=0, atol=tolerance)


def test_official_grid_has_52_heads_that_do_not_merge(model: LoadedModel) -> None:
    heads = all_heads(model, Parameters(num_blocks=(1, 2)))
    assert len(heads) == len(set(heads)) == 52
    # Official names hold the scaled rate with five decimals; on one GPU (batch 128) two of them are the same.
    names = {(head.source, f"{head.learning_rate * 128 / 256:.5f}") for head in heads}
    assert len(names) < 52


def test_every_input_of_the_grid_is_a_run_of_columns_of_one_extraction(
    model: LoadedModel, make_images: Callable[..., ImageSet]
) -> None:
    suite = load_suite("digits_linear_sweep")
    images = make_images(8)
    features = extract(model, images, suite.transform, LastBlocks(last=2, avgpool=True)).cls
    context = Context(3, model=model)
    x = suite.transform.batch(images.array)
    with torch.no_grad():
        (first, _), (last, patches) = last_tokens(model.backbone, x, 2)
    expected = {
        (1, False): last,
        (1, True): torch.cat([last, patches.mean(1)], 1),
        (2, False): torch.cat([first, last], 1),
        (2, True): torch.cat([first, last, patches.mean(1)], 1),
    }
    inputs = linear_sweep.find_inputs(features.shape[1], Parameters(num_blocks=(1, 2)), context)
    assert [(source.num_blocks, source.avgpool) for source in inputs] == list(expected)
    for source in inputs:
        torch.testing.assert_close(source.of(features), expected[source.num_blocks, source.avgpool])


@pytest.mark.parametrize("name", ["dinov2_vit_mlp_reg0", "dinov2_vit_swiglu_reg4_aa"])
def test_golden_linear_inputs_are_columns_of_the_widest(name: str, golden, make_model) -> None:
    arrays = {key.partition(".linear_input_")[2]: values for key, values in golden(name).items()}
    widest = torch.from_numpy(arrays["n2_avgTrue"])
    shape = {"img_size": 16, "patch_size": 8, "embed_dim": arrays["n1_avgFalse"].shape[1], "depth": 2, "num_heads": 2}
    context = Context(3, model=make_model(kwargs=shape))
    inputs = linear_sweep.find_inputs(widest.shape[1], Parameters(num_blocks=(1, 2)), context)
    assert len(inputs) == 4
    for source in inputs:
        official = torch.from_numpy(arrays[f"n{source.num_blocks}_avg{source.avgpool}"])
        torch.testing.assert_close(source.of(widest), official)


def test_a_backbone_with_fewer_blocks_gives_all_it_has(model: LoadedModel) -> None:
    context = Context(3, model=model)
    inputs = linear_sweep.find_inputs(3 * DIM, Parameters(), context)
    assert [(source.num_blocks, source.avgpool) for source in inputs] == [(1, False), (1, True), (2, False), (2, True)]
    outcome = linear_sweep.run(wide(), wide(seed=1), SHORT.model_copy(update={"num_blocks": (1, 4)}), context)
    assert any("have 2 block(s), the grid asks for [1, 4]" in note for note in outcome.notes)


def test_a_sweep_of_52_heads_sees_every_image_once(model: LoadedModel) -> None:
    suite = load_suite("digits_linear_sweep")
    suite = suite.model_copy(update={"parameters": {**suite.parameters, "epochs": 1}})
    seen: list[int] = []
    hook = model.backbone.get_submodule("patch_embed").register_forward_hook(lambda *call: seen.append(len(call[2])))
    found = measure(suite, model, baselines=False)
    hook.remove()
    assert len(found.tables["heads"]) == 52
    assert sum(seen) == sum(part["n"] for part in found.receipt["dataset"].values())


def test_another_feature_is_refused_with_the_right_one(model: LoadedModel) -> None:
    for width in (DIM, 3 * DIM + 1, 6 * DIM):
        with pytest.raises(UsageError, match=r"needs the suite's feature \{last: 4, avgpool: true\}"):
            linear_sweep.find_inputs(width, Parameters(), Context(3, model=model))


def test_pixels_are_one_input(make_split: MakeSplit) -> None:
    outcome = linear_sweep.run(make_split(), make_split(seed=1), SHORT, Context(3))
    assert len(outcome.tables["heads"]) == len(SHORT.learning_rates)
    assert linear_sweep.find_inputs(8, SHORT, Context(3)) == [Input(1, False, 0, 8)]


def test_held_out_selection_never_reads_the_test_part(model: LoadedModel) -> None:
    test = wide(60, seed=1)
    shuffled = Split(test.features, test.labels.roll(1), test.index)
    found = [linear_sweep.run(wide(), part, SHORT, Context(3, model=model)) for part in (test, shuffled)]
    assert found[0].tables["heads"].equals(found[1].tables["heads"])
    assert all("chosen among 12 on 9 images of train" in outcome.notes[0] for outcome in found)
    assert found[0].scores["top1"] > found[1].scores["top1"]


def test_official_selection_takes_the_best_on_test_and_says_so(model: LoadedModel) -> None:
    train, test = wide(60), wide(80, seed=1)
    context = Context(3, seed=3, model=model)
    outcome = linear_sweep.run(train, test, SHORT.model_copy(update={"selection": "test"}), context)
    trained = fit_heads(train, torch.arange(60), all_heads(model), SHORT, context)
    accuracy = (trained.logits(test.features).argmax(2) == test.labels[:, None]).double().mean(0)
    assert outcome.scores["top1"] == pytest.approx(100 * accuracy.max().item())
    best = int((accuracy == accuracy.max()).nonzero()[0])  # the first of several, as `>` in the official loop
    assert outcome.scores["learning_rate"] == all_heads(model)[best].learning_rate
    assert outcome.scores["num_blocks"] == all_heads(model)[best].source.num_blocks
    assert "best of 12 on the 80 test images themselves" in outcome.notes[0]
    assert "held_out_top1" not in outcome.scores
    assert outcome.tables["heads"]["test_top1"].max() == pytest.approx(outcome.scores["top1"])


def test_chosen_head_is_trained_again_on_all_of_train(model: LoadedModel) -> None:
    train, test, context = wide(), wide(60, seed=1), Context(3, model=model)
    outcome = linear_sweep.run(train, test, SHORT, context)
    scores = outcome.scores
    sources = linear_sweep.find_inputs(3 * DIM, SHORT, context)
    source = next(s for s in sources if (s.num_blocks, s.avgpool) == (scores["num_blocks"], bool(scores["avgpool"])))
    again = fit_heads(train, torch.arange(100), [Head(source, scores["learning_rate"])], SHORT, context)
    assert outcome.samples["prediction"].tolist() == again.logits(test.features)[:, 0].argmax(1).tolist()


def test_batches_are_whole_permutations_cut_without_gaps() -> None:
    batches = linear_sweep._stream(torch.arange(10, 17), 5, torch.Generator().manual_seed(0))
    order = torch.cat([next(batches) for _ in range(7)])
    assert all(sorted(part.tolist()) == list(range(10, 17)) for part in order.split(7))


def test_a_sweep_that_diverges_everywhere_says_what_to_do(model: LoadedModel) -> None:
    parameters = SHORT.model_copy(update={"learning_rates": (1e38,)})
    splits = wide(dtype=torch.float32), wide(seed=1, dtype=torch.float32)
    for selection in ("held_out", "test"):
        with pytest.raises(DinobenchError, match="smaller learning_rates"):
            changed = parameters.model_copy(update={"selection": selection})
            linear_sweep.run(*splits, changed, Context(3, model=model))
