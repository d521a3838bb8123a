from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pretrain.data.stores import open_store
from pretrain.errors import DinobenchError
from pretrain.models.checkpoint import LoadedModel
from suites.davis import Davis, Video, open_davis
from suites.descriptors import patch_tokens
from suites.extractor import Extractor
from suites.protocols import label_propagation
from suites.protocols.label_propagation import Parameters, enlarge, frame_size, near, propagate_labels, resize_frame
from suites.protocols.protocol import Context

Arrays = dict[str, np.ndarray]
PACK = Path(os.environ.get("DINOBENCH_DATA", "")) / "davis2016-val4" / "davis2016_val4_480p.tar"
SMALL = Parameters(short_side=32, multiple=16, neighbourhood=2)


@pytest.fixture(scope="module")
def reference(golden: Callable[[str], Arrays]) -> Arrays:
    return golden("davis_label_propagation")


@torch.no_grad()
def test_golden_davis_label_propagation(reference: Arrays, official_vit: Callable[[Arrays], nn.Module]) -> None:
    patches = patch_tokens(official_vit(reference), torch.from_numpy(reference["frames"]))
    sources = patches.tokens[:3]
    np.testing.assert_allclose(sources.transpose(1, 2), reference["source_feats"], rtol=1e-4, atol=1e-5)
    found = propagate_labels(
        patches.tokens[3],
        sources,
        torch.from_numpy(reference["segs"]),
        neighbourhood=int(reference["size_mask_neighborhood"]),
        top_k=int(reference["topk"]),
        temperature=0.1,
    )
    np.testing.assert_allclose(found, reference["seg_tar"][0], rtol=1e-4, atol=1e-5)
    large = enlarge(found, patches.size)
    np.testing.assert_allclose(large, reference["up_norm_mask"], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(large.argmax(0), reference["argmax"])


def test_golden_davis_label_propagation_neighbourhood(reference: Arrays) -> None:
    distance = int(reference["size_mask_neighborhood"])
    rows, columns = reference["segs"].shape[2:]
    np.testing.assert_array_equal(
        np.kron(near(rows, distance), near(columns, distance)), reference["neighborhood_mask"]
    )


def test_no_limit_reaches_every_patch() -> None:
    assert near(5, 0).all()
    target = torch.eye(12)
    source = torch.eye(12).flip(0)[None]
    labels = torch.arange(12.0).view(1, 1, 3, 4)
    found = propagate_labels(target, source, labels, neighbourhood=0, top_k=1, temperature=0.1)
    assert found.flatten().tolist() == list(range(11, -1, -1))


def test_soft_labels_stay_shares() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.rand(2, 3, 4, 5, generator=generator).softmax(1)
    tokens = torch.randn(3, 20, 8, generator=generator)
    found = propagate_labels(tokens[2], tokens[:2], labels, neighbourhood=1, top_k=4, temperature=0.1)
    torch.testing.assert_close(found.sum(0), torch.ones(4, 5))


def test_a_channel_without_any_label_stays_empty() -> None:
    soft = torch.zeros(2, 2, 2)
    soft[0] = 0.3
    assert torch.equal(enlarge(soft, (4, 4)), torch.zeros(2, 8, 8))


@pytest.mark.parametrize(
    ("size", "expected"),
    [((854, 480), (832, 480)), ((480, 854), (480, 832)), ((1280, 720), (832, 480)), ((9, 9), (448, 480))],
)
def test_frames_are_looked_at_in_multiples_of_64(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert frame_size(*size, Parameters()) == expected


def test_frames_are_resized_without_antialiasing_and_normalised_by_the_official_constants() -> None:
    pixels = np.zeros((64, 128, 3), dtype=np.uint8)
    pixels[:, ::4] = 200
    frame = resize_frame(Image.fromarray(pixels), Parameters(short_side=32))
    # Halving by bilinear samples between two columns: 200 and 0, then 0 and 0.
    red = (frame[0, 0, :4] * 0.228 + 0.485) * 255
    assert red.tolist() == pytest.approx([100, 0, 100, 0], abs=1e-3)
    assert frame.shape == (3, 32, 64)


def moving_squares(folder: Path, year: int, frames: int = 6) -> Davis:
    """A red and a blue square that move over noise; masks of both."""
    generator = np.random.default_rng(0)
    noise = generator.integers(90, 110, (32, 48, 3)).astype(np.uint8)
    names: dict[str, list[str]] = {"JPEGImages": [], "Annotations": []}
    for number in range(frames):
        pixels, labels = noise.copy(), np.zeros((32, 48), dtype=np.uint8)
        for one, (top, left, colour) in enumerate(
            [(4, 4 + 2 * number, (250, 0, 0)), (20, 30 - 2 * number, (0, 0, 250))]
        ):
            pixels[top : top + 8, left : left + 8] = colour
            labels[top : top + 8, left : left + 8] = 255 if year == 2016 else one + 1
        for kind, suffix, array in (("JPEGImages", "jpg", pixels), ("Annotations", "png", labels)):
            place = folder / kind / "480p" / "squares"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(
                place / f"{number:05d}.{suffix}", **({"quality": 95} if suffix == "jpg" else {})
            )
            names[kind].append(f"{kind}/480p/squares/{number:05d}.{suffix}")
    video = Video("squares", tuple(names["JPEGImages"]), tuple(names["Annotations"]))
    return Davis("mine", "val", year, open_store(folder), str(folder), (video,), "0" * 64)


@pytest.fixture
def colours(make_model: Callable[..., LoadedModel]) -> Extractor:
    """Patches of 4 px whose features are their colours: an extractor that knows the objects apart."""
    model = make_model(
        kind="free", kwargs={"img_size": 32, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
    )
    backbone: Any = model.backbone
    with torch.no_grad():
        backbone.pos_embed.zero_()
        weight = torch.zeros_like(backbone.patch_embed.proj.weight)
        for channel in range(3):
            weight[channel, channel] = 1
        backbone.patch_embed.proj.weight.copy_(weight)
        backbone.patch_embed.proj.bias.zero_()
        for block in backbone.blocks:
            block.attn.proj.weight.zero_()
            block.mlp.fc2.weight.zero_()
    return Extractor(replace(model, backbone=backbone.eval()))


@pytest.mark.parametrize(("year", "objects"), [(2016, 1), (2017, 2)])
def test_moving_objects_are_followed(tmp_path: Path, colours: Extractor, year: int, objects: int) -> None:
    data = moving_squares(tmp_path, year)
    parameters = SMALL.model_copy(update={"year": year, "neighbourhood": 3})
    found = label_propagation.run(data, colours, parameters, Context(0))
    assert found.n == objects == len(found.samples)
    assert found.scores["j_mean"] > 50
    assert found.scores["jf"] == pytest.approx((found.scores["j_mean"] + found.scores["f_mean"]) / 2)
    # Neither the first frame nor the last is judged.
    frames = found.tables["frames"]
    assert sorted(set(frames["frame"])) == [1, 2, 3, 4]
    means = frames.groupby("object")[["j", "f"]].mean().to_numpy()
    np.testing.assert_allclose(found.samples[["j_mean", "f_mean"]].to_numpy(), means)
    assert any("DAVIS" in note and "not comparable" in note for note in found.notes)


def test_features_that_say_nothing_lose_the_objects(tmp_path: Path, colours: Extractor) -> None:
    data = moving_squares(tmp_path, 2017)
    followed = label_propagation.run(data, colours, SMALL, Context(0)).scores["j_mean"]
    norm: Any = colours.model.backbone.norm
    with torch.no_grad():
        norm.weight.zero_()
        norm.bias.fill_(1)
    assert label_propagation.run(data, colours, SMALL, Context(0)).scores["j_mean"] < followed - 20


def test_a_first_mask_without_object_is_refused(tmp_path: Path, colours: Extractor) -> None:
    data = moving_squares(tmp_path, 2017)
    Image.new("L", (48, 32)).save(tmp_path / data.videos[0].masks[0])
    with pytest.raises(DinobenchError, match="the first mask of squares shows no object"):
        label_propagation.run(data, colours, SMALL, Context(0))


def test_interval_draws_sequences_and_not_objects() -> None:
    alone = label_propagation._interval([[10.0, 20.0]], seed=0)
    assert alone == (15, 15)
    low, high = label_propagation._interval([[10.0, 20.0], [90.0]], seed=0)
    assert low == 15 and high == 90


@pytest.mark.skipif(not PACK.is_file(), reason="DINOBENCH_DATA has no pack davis2016-val4")
def test_a_few_frames_of_the_pack_are_followed(colours: Extractor) -> None:
    data = open_davis(PACK, "davis2016", 2016, "val")
    swan = data.videos[0]
    short = Video(swan.name, swan.frames[:5], swan.masks[:5])
    parameters = Parameters(year=2016, short_side=128, multiple=16, neighbourhood=4)
    found = label_propagation.run(replace(data, videos=(short,)), colours, parameters, Context(0))
    # Frames 1 to 3, a slow swan, coarse patches.
    assert found.scores["j_mean"] > 50
    assert len(found.tables["frames"]) == 3
