"""Two ranks do one pass together: the features are those of one process, and each rank saw its part only."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.data.datasets import open_dataset
from pretrain.data.images import ImageSet
from pretrain.data.transforms import EvalTransform
from pretrain.errors import DinobenchError
from pretrain.models.backbones import ModelConfig, create_backbone
from pretrain.models.checkpoint import LoadedModel, weights_sha256
from suites.cache import FeatureCache
from suites.features import extract
from suites.ranks import Part, led, share
from suites.suite import LastBlocks

RANKS = 2
NUMBER = 213
TRANSFORM = EvalTransform(resize=16, crop=16)
FEATURES = (LastBlocks(last=2, avgpool=True), "cls")


def tiny_model(broken: bool = False) -> LoadedModel:
    kwargs = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    torch.manual_seed(0)
    backbone = create_backbone(ModelConfig(name="vit_tiny_patch16_224", kwargs=kwargs)).eval()
    if broken:
        torch.nn.init.constant_(backbone.norm.weight, float("nan"))
    return LoadedModel(backbone, None, None, "none", None, {"path": "tiny", "weights_sha256": weights_sha256(backbone)})


def images_in(folder: Path) -> ImageSet:
    """Files of which two are unreadable, one for each rank; the set was opened before they were."""
    images = open_dataset(f"folder:{folder}/images")
    return ImageSet(images.name, "train", images.fingerprint, images.source)


def answer(job: str, part: Part, own: str = "") -> tuple[str, int, str]:
    if job == f"fail on {part.rank}":
        raise DinobenchError(f"rank {part.rank} cannot")
    if job == f"break on {part.rank}":
        raise KeyError("a bug")
    return job, part.rank, own


def one_rank(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=RANKS, init_method=f"file://{folder}/group")
    with led("cpu") as leads:
        if leads:
            lead(Path(folder))
    Path(f"{folder}/{rank}.left").write_text(str(leads))
    torch.distributed.destroy_process_group()


def lead(folder: Path) -> None:
    """What rank 0 does; the other only serves."""
    assert share(answer, "who", own="leader") == [("who", 0, "leader"), ("who", 1, "")]
    for rank in range(RANKS):
        with pytest.raises(DinobenchError, match=f"rank {rank} cannot"):
            share(answer, f"fail on {rank}")
    with pytest.raises(KeyError):
        share(answer, "break on 0")
    with pytest.raises(RuntimeError, match="rank 1: 'a bug'"):
        share(answer, "break on 1")
    cache, model = FeatureCache(folder / "cache"), tiny_model()
    calls: list[tuple[int, int]] = []
    for number, feature in enumerate(FEATURES):
        found = extract(
            model,
            images_in(folder),
            TRANSFORM,
            feature,
            cache=cache,
            batch_size=16,
            progress=lambda what, done, total: calls.append((done, total)),
        )
        np.savez(folder / f"{number}.npz", cls=found.cls.numpy(), index=found.index.numpy())
        assert found.from_cache == (number == 1)
        assert len(found.unreadable) == 2
    # Rank 0 has gone through its own part: 7 of 14 batches.
    assert len(calls) == 7
    assert calls[-1] == (NUMBER, NUMBER)
    with pytest.raises(DinobenchError, match="not finite for 211 of 213"):
        extract(tiny_model(broken=True), images_in(folder), TRANSFORM, cache=cache)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, start_ranks: Callable[..., None]) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "images").mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(NUMBER):
        pixels = torch.randint(0, 256, (20, 18, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / "images" / f"{number:03}.png")
    for number in (5, 200):
        path = folder / "images" / f"{number:03}.png"
        path.write_bytes(path.read_bytes()[:300])
    start_ranks(one_rank, str(folder), ranks=RANKS)
    return folder


@pytest.mark.parametrize("number", range(len(FEATURES)))
def test_features_of_two_ranks_are_those_of_one(folder: Path, number: int) -> None:
    alone = extract(tiny_model(), images_in(folder), TRANSFORM, FEATURES[number], batch_size=16)
    with np.load(folder / f"{number}.npz") as together:
        np.testing.assert_array_equal(together["index"], alone.index.numpy())
        np.testing.assert_array_equal(together["cls"], alone.cls.numpy())
    assert len(alone.index) == NUMBER - 2


def test_only_rank_0_runs_the_program(folder: Path) -> None:
    assert [(folder / f"{rank}.left").read_text() for rank in range(RANKS)] == ["True", "False"]


@pytest.mark.parametrize(("total", "block", "size"), [(213, 16, 2), (5, 4, 3), (1, 256, 4), (1000, 1, 7), (64, 16, 4)])
def test_parts_cover_all_rows_once_and_are_cut_between_batches(total: int, block: int, size: int) -> None:
    parts = [Part(rank, size).rows(total, block) for rank in range(size)]
    assert [row for part in parts for row in part] == list(range(total))
    assert all(part.start % block == 0 for part in parts if part)
    assert max(map(len, parts)) - min(map(len, parts)) <= 2 * block


def test_one_process_works_alone() -> None:
    with led("cpu") as leads:
        assert leads
        assert share(answer, "who", own="me") == [("who", 0, "me")]
