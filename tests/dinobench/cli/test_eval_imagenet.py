"""`dinobench eval --suite imagenet_knn ckpt.pt --data imagenet:PATH` on a miniature of ImageNet's folders.

50 classes: from the data packs where they are (`DINOBENCH_DATA`), the 25 of tiny-imagenet-25 and 25 made of
imagenet-sample-160, which has one image of each class, so that the images of such a class are 8 crops of one picture;
else 50 drawn patterns. The network has random weights: what is tested is that every image finds its class whatever its
file is like, and that what cannot be read is told, not how good the features are.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinobench.cli import app
from pretrain.models import checkpoint_file
from pretrain.models.backbones import ModelConfig, create_backbone

pytestmark = pytest.mark.slow

CLASSES, TRAIN, VAL = 50, 6, 2
"""Images of a class: fewer than 500 in a split, so that all are looked at when the set is opened."""
PACKS = Path(os.environ.get("DINOBENCH_DATA", "")) if os.environ.get("DINOBENCH_DATA") else None
TINY, SAMPLE = "tiny-imagenet-25/tiny_imagenet25.tar.gz", "imagenet-sample-160/imagenet_sample160.tar"


def pictures_of_packs(root: Path) -> Iterator[tuple[str, list[Image.Image]]]:
    """Name of a class and TRAIN + VAL images of it."""
    found: dict[str, list[Image.Image]] = {}
    with tarfile.open(root / TINY) as archive:
        for member in archive:
            name = member.name.split("/")[1] if member.name.startswith("train/") else ""
            if name and member.isfile() and len(found.setdefault(name, [])) < TRAIN + VAL:
                found[name].append(Image.open(io.BytesIO(archive.extractfile(member).read())).convert("RGB"))  # type: ignore[union-attr]
    yield from found.items()
    with tarfile.open(root / SAMPLE) as archive:
        files = [member for member in archive.getmembers() if member.isfile() and member.name.lower().endswith(".jpg")]
        others = [member for member in files if Path(member.name).parent.name not in found]
        for member in others[:: len(others) // (CLASSES - len(found))][: CLASSES - len(found)]:
            picture = Image.open(io.BytesIO(archive.extractfile(member).read())).convert("RGB")  # type: ignore[union-attr]
            yield Path(member.name).parent.name, list(crops(picture))


def crops(picture: Image.Image) -> Iterator[Image.Image]:
    """TRAIN + VAL windows, at places drawn with the seed 0."""
    draw = np.random.default_rng(0)
    width, height = picture.size
    for _ in range(TRAIN + VAL):
        x, y = draw.integers(0, width // 3 + 1), draw.integers(0, height // 3 + 1)
        yield picture.crop((x, y, x + 2 * width // 3, y + 2 * height // 3))


def drawn_pictures() -> Iterator[tuple[str, list[Image.Image]]]:
    draw = np.random.default_rng(0)
    for number in range(CLASSES):
        pattern = draw.integers(0, 200, (6, 8, 3))
        noisy = [(pattern + draw.integers(0, 56, pattern.shape)).astype(np.uint8) for _ in range(TRAIN + VAL)]
        yield f"n{number:08d}", [Image.fromarray(pixels).resize((100, 75)) for pixels in noisy]


@pytest.fixture(scope="module")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/<class>/ and val/<class>/ with JPEG files; among those of val a gray one, a CMYK one and PNG bytes."""
    folder = tmp_path_factory.mktemp("imagenet")
    there = PACKS is not None and all((PACKS / name).is_file() for name in (TINY, SAMPLE))
    classes = list(pictures_of_packs(PACKS) if there and PACKS else drawn_pictures())
    assert len({name for name, _ in classes}) == CLASSES
    for name, pictures in classes:
        assert len(pictures) == TRAIN + VAL
        for number, picture in enumerate(pictures):
            path = folder / ("train" if number < TRAIN else "val") / name / f"{name}_{number}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path, "JPEG", quality=90)
    gray, cmyk, png = sorted((folder / "val").rglob("*.JPEG"))[:3]
    for path, mode, kind in ((gray, "L", "JPEG"), (cmyk, "CMYK", "JPEG"), (png, "RGB", "PNG")):
        with Image.open(path) as picture:
            changed = picture.convert(mode)
        changed.save(path, kind)  # ImageNet has a PNG file named .JPEG and 22 files in CMYK
    return folder


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of ours: ViT of 224 px and patches of 16 px, two narrow blocks."""
    kwargs = {"img_size": 224, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3}
    model = ModelConfig(name="vit_tiny_patch16_224", kwargs=kwargs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = torch.nn.ModuleDict({"backbone": create_backbone(model)}).state_dict()
    recipe = {"method": {"name": "dino"}, "data": {"name": "imagenet"}, "model": model.model_dump(mode="json")}
    payload: dict[str, Any] = {"format": checkpoint_file.FORMAT, "recipe": {**recipe, "head": None}, "step": 7}
    path = tmp_path_factory.mktemp("network") / "ckpt.pt"
    facts = {"images_seen": 448, "epoch": 1, "seed": 0}
    checkpoint_file.save(path, {**payload, **facts, "student": weights, "teacher": weights})
    return path


def measure(network: Path, images: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    arguments = ["--suite", "imagenet_knn", "--data", f"imagenet:{images}", "--output", str(output)]
    code = app.run(["eval", *arguments, "--device", "cpu", "--no-track", "--json", str(network)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_fifty_classes_with_gray_cmyk_and_misnamed_files(
    miniature: Path, network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = measure(network, miniature, tmp_path, capsys)
    assert code == 0, err
    document = json.loads(out)
    assert (document["suite"], document["n"]) == ("imagenet_knn@1", CLASSES * VAL)
    assert {role: part["n"] for role, part in document["receipt"]["dataset"].items()} == {
        "train": CLASSES * TRAIN,
        "test": CLASSES * VAL,
    }
    # chance is 2 %: also random weights find images of one picture or pattern together, if the labels are right
    assert document["scores"]["top5_k10"] > 3 * 100 * 5 / CLASSES
    assert document["notes"] == []
    (file,) = tmp_path.glob("evals/imagenet_knn@1/*.json")
    assert app.run(["verify", str(file), "--device", "cpu", "--no-baselines"]) == 0


def test_one_corrupt_jpeg_is_left_out_and_named(
    miniature: Path, network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = shutil.copytree(miniature, tmp_path / "images")
    corrupt = sorted((images / "val").rglob("*.JPEG"))[40]
    corrupt.write_bytes(corrupt.read_bytes()[:300])
    code, out, err = measure(network, images, tmp_path, capsys)
    assert code == 0, err
    document = json.loads(out)
    assert document["n"] == CLASSES * VAL - 1
    assert corrupt.name in json.dumps(document["notes"])


def test_too_many_corrupt_files_are_refused_by_name(
    miniature: Path, network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At most 1 % may be unreadable."""
    images = shutil.copytree(miniature, tmp_path / "images")
    corrupt = sorted((images / "val").rglob("*.JPEG"))[40:43]
    for path in corrupt:
        path.write_bytes(path.read_bytes()[:300])
    code, out, err = measure(network, images, tmp_path, capsys)
    assert (code, out) == (3, "")
    assert f"3 of {CLASSES * VAL} images" in err
    assert all(path.name in err for path in corrupt)
    assert "Traceback" not in err


def test_flat_val_is_refused_with_the_fix_and_measured_after_it(
    miniature: Path, network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = shutil.copytree(miniature, tmp_path / "images")
    places = {path.name: path for path in (images / "val").rglob("*.JPEG")}
    for name, path in places.items():
        path.rename(images / "val" / name)
    for folder in (images / "val").iterdir():
        if folder.is_dir():
            folder.rmdir()
    code, out, err = measure(network, images, tmp_path, capsys)
    assert (code, out) == (3, "")
    assert f"all {CLASSES * VAL} images of val/ lie in no class folder" in err
    assert "move each image into a folder named as its class in train/, like val/<class>/" in err
    assert "Traceback" not in err
    for name, path in places.items():
        path.parent.mkdir(exist_ok=True)
        (images / "val" / name).rename(path)
    code, out, _ = measure(network, images, tmp_path, capsys)
    assert (code, json.loads(out)["n"]) == (0, CLASSES * VAL)
