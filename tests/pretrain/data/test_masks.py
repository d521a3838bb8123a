from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pretrain.data.masks import (
    MaskConfig,
    Masks,
    MaskSampler,
    dinov2_mask,
    ibot_mask,
    pick_ratio,
    random_mask,
    spread_targets,
)

Golden = Callable[[str], dict[str, np.ndarray]]
ASPECT = MaskConfig().aspect
KINDS = {
    "block": MaskConfig(kind="block"),
    "random": MaskConfig(kind="random"),
    "dinov2": MaskConfig(kind="dinov2", ratio=(0.1, 0.5)),
    "fixed": MaskConfig(kind="fixed", ratio=(0.15,)),
}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("fixed0.3", MaskConfig(kind="block", ratio=(0.3,), variance=(0.0,))),
        ("paper", MaskConfig(kind="block")),
        ("single_list", MaskConfig(kind="block", ratio=(0.5,), variance=(0.1,))),
        ("rand", MaskConfig(kind="random", ratio=(0.65,), variance=(0.05,))),
    ],
)
def test_golden_ibot_masks_are_the_official_ones_bit_by_bit(golden: Golden, name: str, config: MaskConfig) -> None:
    values = golden("ibot_masks")
    side = int(values["img_size"]) // int(values["patch_size"])
    random.seed(int(values["seed"]))
    np.random.seed(int(values["seed"]))
    masks = []
    for _ in values[f"{name}.counts_3000"]:
        wanted = pick_ratio(config.ratio, config.variance, random) * side * side
        if config.kind == "block":
            masks.append(ibot_mask((side, side), wanted, random, config.aspect))
        else:
            masks.append(random_mask(side * side, int(wanted), np.random))
    found = np.stack(masks).reshape(-1, side, side)
    expected = values[f"{name}.first64_masks"]
    np.testing.assert_array_equal(found[: len(expected)], expected)
    np.testing.assert_array_equal(found.sum((1, 2)), values[f"{name}.counts_3000"])
    np.testing.assert_allclose(found.mean(0), values[f"{name}.position_freq"], atol=1e-12)


@pytest.mark.parametrize("side", [14, 16])
def test_golden_dinov2_masks_are_the_official_ones_bit_by_bit(golden: Golden, side: int) -> None:
    values = golden("dinov2_masks")
    random.seed(int(values["seed"]))
    for target in (10, 30, 60, 90):
        counts, first = values[f"n{side}.target{target}.counts"], values[f"n{side}.target{target}.first16"]
        found = np.stack([dinov2_mask((side, side), target, random, ASPECT) for _ in counts])
        np.testing.assert_array_equal(found[: len(first)].reshape(first.shape), first)
        np.testing.assert_array_equal(found.sum(1), counts)


@pytest.mark.parametrize("side", [14, 16])
def test_golden_dinov2_masks_of_a_batch_are_those_of_the_official_collation(golden: Golden, side: int) -> None:
    values = golden("dinov2_masks")
    num_crops, config = 2 * int(values["batch"]), KINDS["dinov2"]
    random.seed(int(values["seed"]))
    targets = spread_targets(num_crops, side * side, config.probability, config.ratio, random)
    crops = [dinov2_mask((side, side), target, random, config.aspect) for target in targets]
    random.shuffle(crops)
    masks = Masks.of(torch.from_numpy(np.stack(crops)).view(2, -1, side * side))
    collated = {name: values[f"n{side}.collate.{name}"] for name in ("collated_masks", "mask_indices_list")}
    np.testing.assert_array_equal(masks.mask.flatten(0, 1), collated["collated_masks"])
    np.testing.assert_array_equal(masks.index, collated["mask_indices_list"])
    np.testing.assert_array_equal(masks.weight, values[f"n{side}.collate.masks_weight"])
    assert masks.counts.sum() == values[f"n{side}.collate.n_masked_patches"]


def draw(kind: str, images: range = range(64), *, grid: tuple[int, int] = (14, 14), **changes: object) -> Masks:
    """The masks of images that are one rank's whole batch."""
    call = {"epoch": 0, "step": 0, "first": 0, "batch_size": len(images)}
    call |= {key: changes.pop(key) for key in tuple(changes) if key in call}
    seed = changes.pop("seed", 0)
    config = KINDS[kind].model_copy(update=changes)
    return MaskSampler(config, grid, seed)(torch.tensor(images), **call)


def shares(masks: Masks) -> torch.Tensor:
    return masks.mask.double().mean(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_index_weight_and_counts_describe_the_mask(kind: str) -> None:
    masks = draw(kind, grid=(6, 5))
    assert masks.mask.shape == (2, 64, 30) and masks.mask.dtype == torch.bool
    assert masks.index.dtype == torch.int64 and masks.weight.dtype == torch.float32
    scattered = torch.zeros(2 * 64 * 30, dtype=torch.bool)
    scattered[masks.index] = True
    assert torch.equal(scattered.view_as(masks.mask), masks.mask) and (masks.index.diff() > 0).all()
    assert torch.equal(masks.counts, masks.mask.sum(-1))
    sums = torch.zeros(2 * 64).index_add_(0, masks.index // 30, masks.weight).view(2, 64)
    torch.testing.assert_close(sums, (masks.counts > 0).float())


@pytest.mark.parametrize("kind", KINDS)
def test_parts_hold_the_masks_of_their_images(kind: str) -> None:
    masks = draw(kind, range(12))
    for part, rows in zip(masks.split(3), torch.arange(12).split(4), strict=True):
        expected = Masks.of(masks.mask[:, rows])
        for name in ("mask", "index", "weight", "counts"):
            assert torch.equal(getattr(part, name), getattr(expected, name)), name


@pytest.mark.parametrize("kind", KINDS)
def test_one_view_holds_the_masks_of_its_crops(kind: str) -> None:
    masks = draw(kind, range(6))
    for view in (0, 1):
        found, expected = masks.of_view(view), Masks.of(masks.mask[view : view + 1])
        for name in ("mask", "index", "weight", "counts"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_kept_patches_are_those_without_a_mask_in_order() -> None:
    masks = draw("fixed", range(6))
    for crop, kept in zip(masks.mask.flatten(0, 1), masks.kept(), strict=True):
        assert torch.equal(kept, (~crop).nonzero().flatten())


@pytest.mark.parametrize("kind", KINDS)
def test_masks_depend_on_seed_epoch_image_and_view(kind: str) -> None:
    masks = draw(kind)
    assert torch.equal(masks.mask, draw(kind).mask)
    others = draw(kind, seed=1).mask, draw(kind, epoch=1, step=9).mask, draw(kind, range(64, 128)).mask
    for other in (*others, masks.mask.flip(0)):
        assert not torch.equal(masks.mask, other)


@pytest.mark.parametrize("kind", ["block", "random", "fixed"])
def test_an_image_keeps_its_masks_in_any_batch(kind: str) -> None:
    whole, part = draw(kind), draw(kind, range(40, 50), step=3, batch_size=20, first=10)
    assert torch.equal(whole.mask[:, 40:50], part.mask)


def test_ranks_draw_the_rows_of_one_dinov2_batch() -> None:
    whole = draw("dinov2", step=5)
    ranks = [draw("dinov2", range(k, k + 16), step=5, first=k, batch_size=64).mask for k in range(0, 64, 16)]
    assert torch.equal(whole.mask, torch.cat(ranks, 1))
    assert not torch.equal(whole.counts, draw("dinov2", step=6).counts)


@pytest.mark.parametrize("kind", ["block", "random"])
def test_half_of_the_crops_have_no_mask_and_the_others_a_tenth_to_a_half(kind: str) -> None:
    found = shares(draw(kind, range(1000))).flatten()
    masked = found[found > 0]
    assert abs(len(masked) / 2000 - 0.5) < 5 * 0.5 / 2000**0.5
    assert masked.max() <= 0.5 and masked.min() > 0.05 and abs(masked.mean() - 0.3) < 0.02


def test_dinov2_masks_half_of_the_batch_with_evenly_spread_ratios() -> None:
    found = shares(draw("dinov2", range(512))).flatten()
    masked = found[found > 0].sort().values
    assert len(masked) == 512
    assert (masked - torch.linspace(0.1, 0.5, 512)).abs().max() < 0.03
    assert abs((shares(draw("dinov2", range(512)))[0] > 0).double().mean() - 0.5) < 0.1  # shuffled over the views
    everything = draw("dinov2", probability=1.0)
    assert (everything.counts > 0).all() and not draw("dinov2", probability=0.0).mask.any()


def test_fixed_masks_the_same_number_of_patches_in_every_crop_but_not_the_same_ones() -> None:
    masks = draw("fixed", views=(1,))
    assert not masks.mask[0].any() and (masks.counts[1] == 196 - int(0.85 * 196)).all()
    assert len(masks.mask[1].unique(dim=0)) == 64


def test_random_patches_lie_anywhere_and_boxes_lie_together() -> None:
    frequency = draw("fixed", range(1000)).mask.double().mean((0, 1))
    assert (frequency - 30 / 196).abs().max() < 5 * (0.148 * 0.852 / 2000) ** 0.5

    def neighbours(kind: str) -> float:
        """Share of masked patches whose right neighbour is masked too."""
        grids = draw(kind, range(300)).mask.view(-1, 14, 14)
        return (grids[..., :-1] & grids[..., 1:]).sum().item() / grids[..., :-1].sum().item()

    assert neighbours("block") > 0.8 and neighbours("dinov2") > 0.7 and neighbours("random") < 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_masked_before_the_start_epoch(kind: str) -> None:
    early, late = (draw(kind, range(8), start_epoch=2, epoch=epoch) for epoch in (1, 2))
    assert not early.mask.any() and len(early.index) == len(early.weight) == 0 and late.mask.any()
    for part in early.split(2):
        assert part.mask.shape == (2, 4, 196) and len(part.index) == len(part.weight) == 0


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (3, 7), (4, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_small_grids_work(kind: str, grid: tuple[int, int]) -> None:
    assert (shares(draw(kind, grid=grid)) <= 0.5).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "blocks"}, "kind"),
        ({"views": (0, 2)}, "global views 0 and 1 in order"),
        ({"views": (1, 0)}, "global views 0 and 1 in order"),
        ({"views": ()}, "global views 0 and 1 in order"),
        ({"aspect": (2.0, 1.0)}, "0 < low <= high"),
        ({"kind": "block", "ratio": (0.3,)}, "same number of values"),
        ({"kind": "random", "ratio": (0.3,), "variance": (0.4,)}, r"must lie in \[0, 1\], found 0.3 \+- 0.4"),
        ({"kind": "block", "ratio": (0.9,), "variance": (0.2,)}, r"must lie in \[0, 1\]"),
        ({"kind": "dinov2"}, r"as in \(0.1, 0.5\), found \(0.0, 0.3\)"),
        ({"kind": "fixed"}, r"one share between 0 and 1, as in \(0.15,\), found"),
        ({"probability": 1.5}, "probability"),
        ({"start_epoch": -1}, "start_epoch"),
        ({"ratios": (0.3,)}, "ratios"),
    ],
)
def test_impossible_values_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MaskConfig(**wrong)


def test_a_dump_loads_to_an_equal_config() -> None:
    for config in KINDS.values():
        assert MaskConfig.model_validate(config.model_dump(mode="json")) == config
