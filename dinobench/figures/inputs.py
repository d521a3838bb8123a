"""What the figures of a checkpoint start from: its network, its evaluation transform, its data, and images.

The evaluation transform is the one of the suites on the checkpoint's data set; for a data set without a suite of its
own (folder:, npz:) the central crop of the size and with the normalisation that the network was trained on, and for a
checkpoint that tells neither (official weights) Resize(256), CenterCrop(224). `size` replaces resize and crop by
another short side, with the sides cut to multiples of the patch.

Shapes: 3 channels, h and w pixels.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from pydantic import BaseModel, ValidationError
from torch import Tensor

from pretrain.data.datasets import DataConfig, ImageSet, open_dataset
from pretrain.data.images import decode
from pretrain.data.transforms import EvalTransform
from pretrain.data.views import ViewsConfig
from pretrain.errors import DinobenchError, UsageError
from pretrain.models import checkpoint
from pretrain.models.backbones import has_patch_tokens
from pretrain.models.checkpoint import LoadedModel, Network
from pretrain.training.runtime import Runtime, RuntimeConfig
from suites.suite import load_suite, suite_names

Config = TypeVar("Config", bound=BaseModel)
_ENTRY = re.compile(r"(?P<data>.+):(?P<split>\w+)\[(?P<number>\d+)\]")


@dataclass(frozen=True)
class Picture:
    """An image, and what it is called in titles and file names."""

    label: str
    image: Image.Image

    @property
    def name(self) -> str:
        return re.sub(r"\W+", "-", self.label).strip("-")


@dataclass(frozen=True)
class Subject:
    """A checkpoint's network with the way its images take."""

    model: LoadedModel
    transform: EvalTransform
    recipe: Mapping[str, Any]
    """Of the checkpoint; empty for files that hold none."""
    device: str

    @property
    def title(self) -> str:
        """Whose figure it is: `teacher of dino-vits16-digits, step 1600`."""
        facts = self.model.provenance
        step = "" if facts.get("step") is None else f", step {facts['step']}"
        return f"{facts['network']} of {facts.get('label') or Path(facts['path']).stem}{step}"

    def stem(self, *parts: str) -> str:
        """Stem of a figure's files: checkpoints of one run do not overwrite each other."""
        facts = self.model.provenance
        step = [] if facts.get("step") is None else [f"step{facts['step']}"]
        network = [] if facts["network"] == "teacher" else [facts["network"]]
        return "_".join([*parts, *step, *network])

    def pixels(self, image: Image.Image) -> Tensor:
        """The image as the network takes it, float32 [3, h, w] on the device, cut to whole patches.

        Raises:
            UsageError: the image is smaller than a patch.
        """
        x = self.transform(image)
        if has_patch_tokens(self.model.backbone):
            x = _whole_patches(x, self.model.backbone.patch_embed.patch_size)  # type: ignore[union-attr]
        return x.to(self.device)

    def shown(self, x: Tensor) -> Tensor:
        """Pixels [3, h, w] as `pixels` gave them -> values in [0, 1], [h, w, 3] on the CPU."""
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.transform.mean, self.transform.std))
        return (x.cpu() * std + mean).clamp(0, 1).permute(1, 2, 0)

    def data(self, name: str | None = None) -> ImageSet:
        """The images the checkpoint was trained on, or those of another data set's train split.

        Raises:
            UsageError: the checkpoint does not say what it was trained on.
        """
        if name is not None:
            return open_dataset(name)
        if not self.recipe.get("data"):
            path = self.model.provenance["path"]
            raise UsageError(f"{path} does not say which images it was trained on: name a data set with --data")
        data = _section(DataConfig, self.recipe, "data")
        return open_dataset(data.name, data.split, max_bad_images=data.max_bad_images)


def open_subject(path: Path, *, network: Network = "teacher", size: int | None = None, device: str = "auto") -> Subject:
    """Load a checkpoint for a figure.

    Args:
        path: a checkpoint file.
        network: `teacher` or `student`.
        size: short side of the images in pixels, in place of resize and crop of the evaluation transform.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        DinobenchError: see `pretrain.models.checkpoint.load`.
    """
    model = checkpoint.load(path, network=network)
    found = checkpoint.read(path, mmap=True).get("recipe")
    recipe = found if isinstance(found, Mapping) else {}
    transform = evaluation_transform(recipe)
    if size is not None:
        transform = transform.model_copy(update={"resize": size, "crop": None})
    resolved = str(Runtime.start(RuntimeConfig(device=device)).device)
    model.backbone.to(resolved)
    return Subject(model, transform, recipe, resolved)


def evaluation_transform(recipe: Mapping[str, Any]) -> EvalTransform:
    """The transform that goes with the data of a recipe, see the module.

    Raises:
        DinobenchError: the recipe cannot be read.
    """
    if not recipe.get("data"):
        return EvalTransform.model_validate({})
    data, views = _section(DataConfig, recipe, "data"), _section(ViewsConfig, recipe, "views")
    suite = f"{data.name.partition(':')[0]}_knn"
    if suite in suite_names():
        return load_suite(suite).transform
    # as in the official scripts: 256 to 224
    resize = data.resize or round(views.global_size * 256 / 224)
    return EvalTransform(resize=resize, crop=views.global_size, mean=views.mean, std=views.std)


def open_pictures(names: Iterable[str]) -> list[Picture]:
    """Images from files and from data sets (`digits:test[3]`: image 3 of the split test).

    Raises:
        DinobenchError: there is no such file, or it is no image.
        UsageError: unknown data set or split, or a number beyond its end.
    """
    sets: dict[tuple[str, str], ImageSet] = {}
    pictures: list[Picture] = []
    for name in names:
        entry = _ENTRY.fullmatch(name)
        if Path(name).exists() or entry is None:
            label, image = Path(name).name, _read(Path(name))
        else:
            label, image = name, _read_entry(name, entry, sets)
        same = sum(picture.label.partition(" #")[0] == label for picture in pictures)
        # files of one name in two folders: two figures
        pictures.append(Picture(f"{label} #{same + 1}" if same else label, image))
    return pictures


def training_pictures(subject: Subject, number: int) -> list[Picture]:
    """At most `number` of the images that a checkpoint was trained on, evenly spaced.

    Raises:
        UsageError: the checkpoint does not say what it was trained on.
    """
    images = subject.data()
    chosen = positions(len(images), number)
    return [Picture(f"{images.name}:{images.split}[{k}]", images.image(k)) for k in chosen]


def spread(images: ImageSet, number: int) -> ImageSet:
    """At most `number` images, evenly spaced over the set."""
    if len(images) <= number:
        return images
    return images.subset(positions(len(images), number))


def positions(total: int, number: int) -> list[int]:
    """At most `number` places below `total`, evenly spaced."""
    number = min(number, total)
    return [k * total // number for k in range(number)]


def need_patches(subject: Subject, what: str) -> None:
    """Refuse a backbone without patch tokens.

    Raises:
        UsageError: names what needs them.
    """
    backbone = subject.model.backbone
    if not has_patch_tokens(backbone):
        raise UsageError(f"{what} need the patch tokens of a ViT; {type(backbone).__name__} has none")


def _section(config: type[Config], recipe: Mapping[str, Any], name: str) -> Config:
    try:
        return config.model_validate(recipe.get(name) or {})
    except ValidationError as error:
        raise DinobenchError(f"the section {name!r} of the checkpoint's recipe cannot be read: {error}") from error


def _read_entry(name: str, entry: re.Match[str], sets: dict[tuple[str, str], ImageSet]) -> Image.Image:
    """An image of a data set; a set is opened once and kept in `sets`."""
    key, number = (entry["data"], entry["split"]), int(entry["number"])
    if key not in sets:
        sets[key] = open_dataset(*key)
    if number >= len(sets[key]):
        raise UsageError(f"{name}: the split {key[1]} of {key[0]} has the images 0 to {len(sets[key]) - 1}")
    return sets[key].image(number)


def _read(path: Path) -> Image.Image:
    try:
        return decode(path.read_bytes())
    except FileNotFoundError:
        raise DinobenchError(
            f"no image file {path}: give a file, or an image of a data set like 'digits:test[3]'"
        ) from None
    except Exception as error:  # decoders raise errors of every kind on damaged files
        raise DinobenchError(f"{path} cannot be read as an image: {error}") from error


def _whole_patches(x: Tensor, patch: tuple[int, int]) -> Tensor:
    """The centre of x [3, h, w] whose sides are multiples of the patch."""
    height, width = (side // p * p for side, p in zip(x.shape[1:], patch, strict=True))
    if not height or not width:
        raise UsageError(
            f"an image of {x.shape[2]} x {x.shape[1]} px has no whole patch of {patch[1]} x {patch[0]} px: "
            "give a larger --size"
        )
    top, left = (x.shape[1] - height) // 2, (x.shape[2] - width) // 2
    return x[:, top : top + height, left : left + width]
