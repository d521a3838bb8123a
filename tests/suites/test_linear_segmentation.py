from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from suites import linear_segmentation
from suites.label_maps import IGNORED
from suites.linear_segmentation import (
    LabelledMaps,
    LinearHeads,
    Schedule,
    add_gradients,
    count_overlaps,
    enlarge,
    fit_heads,
    interpolation,
)
from suites.overlap import count_pixels
from suites.patch_maps import PatchMaps, Ragged

DIM, CLASSES, PATCH = 6, 4, 8
GRIDS = [(3, 4), (3, 4), (2, 5)]
SCHEDULE = Schedule(iterations=6, warmup_iterations=2, batch_size=3, weight_decay=0.1, stride=1)


def made_up(grids: list[tuple[int, int]] = GRIDS, *, signal: float = 0.0, scale: int = 1) -> LabelledMaps:
    """Random features; labels per pixel of which a tenth is not judged, told by the features where `signal` > 0.

    `scale` is the size of the label map against that of the input.
    """
    generator = np.random.default_rng(0)
    features, labels = [], []
    for rows, columns in grids:
        values = generator.standard_normal((rows, columns, DIM))
        blocks = generator.integers(0, CLASSES, (rows, columns))
        values[..., :CLASSES] += signal * np.eye(CLASSES)[blocks]
        pixels = blocks.repeat(PATCH * scale, 0).repeat(PATCH * scale, 1).astype(np.uint8)
        pixels[generator.random(pixels.shape) < 0.1] = IGNORED
        features.append(values.reshape(-1, DIM).astype(np.float16))
        labels.append(pixels)
    maps = PatchMaps(Ragged(features), np.array(grids), np.array(grids, dtype=np.float64))
    return LabelledMaps(maps, Ragged(labels))


def heads_of(rates: int = 2) -> LinearHeads:
    """Heads whose parameters all differ."""
    heads = LinearHeads(rates, DIM, CLASSES, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part in heads.parameters():
            part.add_(0.5 * torch.randn(part.shape, generator=generator))
    return heads


def plain(heads: LinearHeads, number: int) -> nn.Sequential:
    """The head of one rate as the official code has it: BatchNorm and a 1 x 1 convolution."""
    norm, convolution = nn.BatchNorm2d(DIM), nn.Conv2d(DIM, CLASSES, 1)
    weight, bias, scale, shift = heads.of_rate(number)
    with torch.no_grad():
        convolution.weight.copy_(weight[..., None, None])
        for target, source in ((convolution.bias, bias), (norm.weight, scale), (norm.bias, shift)):
            assert target is not None
            target.copy_(source)
    return nn.Sequential(norm, convolution)


def as_images(data: LabelledMaps, numbers: list[int]) -> tuple[Tensor, Tensor]:
    """Features [B, D, h, w] and labels [B, H, W] of images of one shape."""
    grid = tuple(data.maps.grids[numbers[0]])
    features = torch.stack([data.maps.batch([i], "cpu").T.unflatten(1, grid) for i in numbers])
    return features, torch.from_numpy(np.stack([data.labels[i] for i in numbers])).long()


@pytest.mark.parametrize("size", [(24, 40), (48, 80), (17, 33), (2, 3)])
def test_enlarging_equals_interpolate_without_aligned_corners(size: tuple[int, int]) -> None:
    logits = torch.randn(2, 4, 3, 5)
    rows, columns = (interpolation(torch.arange(s), s, n, n) for s, n in zip(size, (3, 5), strict=True))
    expected = F.interpolate(logits, size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(enlarge(logits, rows, columns), expected, rtol=1e-5, atol=1e-6)


def test_of_a_filled_input_only_the_image_is_enlarged() -> None:
    logits = torch.randn(1, 2, 3, 5)
    # 20 x 33 px in patches of 8: 2.5 x 4.125 of 3 x 5 patches.
    rows, columns = interpolation(torch.arange(20), 20, 20 / 8, 3), interpolation(torch.arange(33), 33, 33 / 8, 5)
    expected = F.interpolate(logits, (24, 40), mode="bilinear", align_corners=False)[..., :20, :33]
    torch.testing.assert_close(enlarge(logits, rows, columns), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("most", [2**26, 800])
def test_gradients_equal_those_of_the_plain_head(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(linear_segmentation, "MAX_LOGITS", most)
    data, heads = made_up([(3, 4)] * 3), heads_of()
    loss = add_gradients(heads, data, [0, 1, 2], 1, (0, 0), "cpu")
    expected = 0.0
    for number in range(2):
        head = plain(heads, number)
        features, labels = as_images(data, [0, 1, 2])
        logits = F.interpolate(head(features), labels.shape[1:], mode="bilinear", align_corners=False)
        one = F.cross_entropy(logits, labels, ignore_index=IGNORED)
        one.backward()
        expected += one.item()
        found = [part.grad for part in heads.of_rate(number)]
        norm, convolution = head
        wanted = [convolution.weight.grad.flatten(1), convolution.bias.grad, norm.weight.grad, norm.bias.grad]
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(heads.norm.running_var, norm.running_var)
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("most", [2**26, 300])
def test_images_of_several_shapes_share_statistics_and_mean(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(linear_segmentation, "MAX_LOGITS", most)
    data, heads = made_up(), heads_of(1)
    loss = add_gradients(heads, data, [2, 0, 1], 1, (0, 0), "cpu")
    weight = heads.weight[0].grad
    assert weight is not None
    found = weight.clone()
    heads.zero_grad()
    logits = heads(data.maps.batch([0, 1, 2], "cpu"))
    total, judged = torch.zeros(()), 0
    for number, part in enumerate(logits.split([12, 12, 10])):
        labels = torch.from_numpy(data.labels[number].copy()).long()
        small = part.T.unflatten(1, GRIDS[number])[None]
        large = F.interpolate(small, tuple(labels.shape), mode="bilinear", align_corners=False)
        total = total + F.cross_entropy(large, labels[None], ignore_index=IGNORED, reduction="sum")
        judged += int((labels != IGNORED).sum())
    (total / judged).backward()
    assert loss == pytest.approx(total.item() / judged, rel=1e-5)
    torch.testing.assert_close(found, heads.weight[0].grad, rtol=1e-4, atol=1e-6)


def test_places_of_a_stride_together_are_all_pixels() -> None:
    data, stride = made_up(), 3
    sums, pixels = torch.zeros(CLASSES, DIM), 0
    for start in itertools.product(range(stride), repeat=2):
        heads = heads_of(1)
        add_gradients(heads, data, [0, 1, 2], stride, start, "cpu")
        parts = [data.labels[i][start[0] :: stride, start[1] :: stride] for i in range(3)]
        judged = sum(int((part != IGNORED).sum()) for part in parts)
        assert heads.weight[0].grad is not None
        sums, pixels = sums + judged * heads.weight[0].grad, pixels + judged
    whole = heads_of(1)
    add_gradients(whole, data, [0, 1, 2], 1, (0, 0), "cpu")
    torch.testing.assert_close(sums / pixels, whole.weight[0].grad, rtol=1e-4, atol=1e-6)


def test_a_batch_without_judged_pixels_changes_nothing() -> None:
    data = made_up([(3, 4)])
    empty = LabelledMaps(data.maps, Ragged([np.full((24, 32), IGNORED, dtype=np.uint8)]))
    heads = heads_of(1)
    assert add_gradients(heads, empty, [0], 1, (0, 0), "cpu") == 0
    assert all(bool((part.grad == 0).all()) for part in heads.of_rate(0) if part.grad is not None)


def test_training_equals_the_plain_loop() -> None:
    data, rates = made_up([(3, 4)] * 3, signal=1), [0.01, 0.1]
    heads = fit_heads(data, [0, 1, 2], rates, CLASSES, SCHEDULE)
    features, labels = as_images(data, [0, 1, 2])
    initial = LinearHeads(1, DIM, CLASSES, torch.Generator().manual_seed(0))
    for number, rate in enumerate(rates):
        head = plain(initial, 0)
        optimizer = torch.optim.AdamW(head.parameters(), lr=rate, betas=(0.9, 0.999), weight_decay=0.1)
        for iteration in range(6):
            optimizer.param_groups[0]["lr"] = rate * SCHEDULE.factor(iteration)
            optimizer.zero_grad()
            logits = F.interpolate(head(features), labels.shape[1:], mode="bilinear", align_corners=False)
            F.cross_entropy(logits, labels, ignore_index=IGNORED).backward()
            optimizer.step()
        head.eval()
        found = heads.only(number)(features.permute(0, 2, 3, 1).reshape(-1, DIM))
        expected = head(features).permute(0, 2, 3, 1).reshape(-1, CLASSES)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_rate_does_not_depend_on_those_beside_it() -> None:
    data = made_up(signal=1)
    schedule = Schedule(iterations=5, warmup_iterations=0, batch_size=2, weight_decay=1e-4, stride=2)
    both, alone = (fit_heads(data, [0, 1, 2], rates, CLASSES, schedule) for rates in ([1.0, 0.01], [0.01]))
    for ours, theirs in zip(both.only(1).parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_rate_warms_up_and_falls_to_zero() -> None:
    schedule = Schedule(iterations=40_000, warmup_iterations=1500, batch_size=16, weight_decay=0, stride=1)
    factors = [schedule.factor(iteration) for iteration in range(40_000)]
    assert 0 < factors[0] < 1e-3 and factors[-1] == pytest.approx(1 / 40_000)
    assert max(factors) == factors[1500] == pytest.approx(1 - 1500 / 40_000)
    assert factors[20_000] == pytest.approx(0.5)


@pytest.mark.parametrize("scale", [1, 2])
def test_predictions_are_judged_at_the_size_of_the_label_map(monkeypatch: pytest.MonkeyPatch, scale: int) -> None:
    data, heads = made_up(scale=scale), heads_of().eval()
    counts = count_overlaps(heads, data, [2, 0], CLASSES)
    assert counts.shape == (2, 2, 3, CLASSES)
    for rate, (place, number) in itertools.product(range(2), enumerate([2, 0])):
        logits = heads.only(rate)(data.maps.batch([number], "cpu")).T.unflatten(1, GRIDS[number])[None]
        labels = torch.from_numpy(data.labels[number].copy())
        found = F.interpolate(logits, tuple(labels.shape), mode="bilinear", align_corners=False)[0].argmax(0)
        assert torch.equal(counts[rate, place], count_pixels(labels, found, CLASSES))
    # Strips of one row see the same.
    monkeypatch.setattr(linear_segmentation, "MAX_LOGITS", 1)
    assert torch.equal(count_overlaps(heads, data, [2, 0], CLASSES), counts)


def test_a_head_that_diverged_is_known() -> None:
    heads = heads_of(3)
    with torch.no_grad():
        heads.bias[1][0] = float("nan")
    assert heads.finite() == [True, False, True]
