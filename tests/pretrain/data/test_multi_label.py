"""Pascal VOC 2007 in its own layout on disk, made small."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pretrain.data import torchvision_sets
from pretrain.data.datasets import open_dataset
from pretrain.data.multi_label import VOC_CLASSES, MultiLabelSet, read_presence
from pretrain.data.torchvision_sets import open_set
from pretrain.errors import DinobenchError

Write = Callable[..., Path]


def lines(path: Path, text: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(text) + "\n")


def annotate(root: Path, name: str, objects: list[tuple[str, int]]) -> None:
    items = "".join(
        f"<object><name>{thing}</name><pose>Left</pose><truncated>0</truncated><difficult>{difficult}</difficult>"
        "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>5</ymax></bndbox>"
        f"{'<part><name>head</name></part>' if thing == 'person' else ''}</object>"
        for thing, difficult in objects
    )
    header = f"<folder>VOC2007</folder><filename>{name}.jpg</filename><size><width>10</width></size>"
    lines(root / f"VOCdevkit/VOC2007/Annotations/{name}.xml", [f"<annotation>{header}{items}</annotation>"])


@pytest.fixture
def voc(tmp_path: Path, write_images: Write) -> Path:
    root = tmp_path / "root"
    objects = {
        "000001": [("dog", 0), ("person", 1)],
        "000002": [("car", 1), ("car", 0), ("car", 1)],
        "000003": [("person", 0)],
        "000004": [],
        "000005": [("tvmonitor", 1), ("aeroplane", 0)],
    }
    write_images("root/VOCdevkit/VOC2007/JPEGImages", [f"{name}.jpg" for name in objects])
    for name, things in objects.items():
        annotate(root, name, things)
    parts = {"train": ["000002", "000001"], "val": ["000003"], "test": ["000004", "000005"]}
    for split, names in (parts | {"trainval": ["000001", "000002", "000003"]}).items():
        lines(root / f"VOCdevkit/VOC2007/ImageSets/Main/{split}.txt", names)
    return root


def test_presence_in_voc_is_one_none_or_difficult_only(voc: Path) -> None:
    train = open_dataset("voc2007", "train", root=voc)
    assert isinstance(train, MultiLabelSet) and train.labels is None and train.classes == VOC_CLASSES
    expected = torch.zeros(2, 20, dtype=torch.int64)
    expected[0, VOC_CLASSES.index("car")] = 1
    expected[1, VOC_CLASSES.index("dog")], expected[1, VOC_CLASSES.index("person")] = 1, -1
    assert torch.equal(train.presence, expected)
    assert [train.path(k)[-10:] for k in range(2)] == ["000002.jpg", "000001.jpg"]
    sizes = {split: len(open_dataset("voc2007", split, root=voc)) for split in ("train", "val", "trainval", "test")}
    assert sizes == {"train": 2, "val": 1, "trainval": 3, "test": 2}
    test = open_dataset("voc2007", "test", root=voc)
    assert not test.presence[0].any() and test.presence[1, 0] == 1 and test.presence[1, 19] == -1


def test_presence_follows_parts_and_sizes_of_the_set(voc: Path) -> None:
    images = open_dataset("voc2007", "trainval", root=voc)
    part = images.subset([2, 0])
    assert torch.equal(part.presence, images.presence[[2, 0]]) and part.path(0).endswith("000003.jpg")
    assert torch.equal(images.resized(6).presence, images.presence) and images.resized(6).pixels(0).shape[2] == 6
    assert len({images.fingerprint, part.fingerprint, images.resized(6).fingerprint}) == 3


def test_presence_stays_with_its_image_where_one_is_unreadable(voc: Path) -> None:
    (voc / "VOCdevkit/VOC2007/JPEGImages/000001.jpg").write_bytes(b"damaged")
    kept = open_dataset("voc2007", "trainval", root=voc, max_bad_images=0.5)
    assert isinstance(kept, MultiLabelSet) and len(kept) == 2 and len(kept.skipped) == 1
    assert torch.equal(kept.presence, open_set("voc2007", "trainval", voc).presence[1:])


def test_the_fingerprint_of_voc_follows_difficult(voc: Path) -> None:
    before = open_dataset("voc2007", "train", root=voc).fingerprint
    annotate(voc, "000001", [("dog", 0), ("person", 0)])
    assert open_dataset("voc2007", "train", root=voc).fingerprint != before


def test_unknown_objects_of_voc_are_refused(voc: Path) -> None:
    annotate(voc, "000001", [("unicorn", 0)])
    with pytest.raises(DinobenchError, match="voc2007: torchvision cannot read train .*unicorn"):
        open_dataset("voc2007", "train", root=voc)


def test_an_easy_object_counts_in_any_order(tmp_path: Path) -> None:
    for number, order in enumerate(([0, 1], [1, 0])):
        annotate(tmp_path, str(number), [("sheep", difficult) for difficult in order])
        presence = read_presence(str(tmp_path / f"VOCdevkit/VOC2007/Annotations/{number}.xml"))
        assert presence[VOC_CLASSES.index("sheep")] == 1 and sum(presence) == 1


def test_find_needs_everything(voc: Path) -> None:
    assert torchvision_sets.find("voc2007", voc) == voc / "VOCdevkit/VOC2007/JPEGImages"
    (voc / "VOCdevkit/VOC2007/ImageSets/Main/test.txt").unlink()
    assert torchvision_sets.find("voc2007", voc) is None and torchvision_sets.find("voc2007", None) is None
