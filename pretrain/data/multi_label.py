"""Images that show objects of several classes, as Pascal VOC describes them."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree

import torch
from torch import Tensor
from torchvision.datasets import VOCDetection

from pretrain.data.images import ImageSet

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


class MultiLabelSet(ImageSet):
    """Images that show objects of several classes; `labels` is None."""

    presence: Tensor
    """int64 [N, C]: 1 = an object of the class is there, 0 = none, -1 = only objects that are marked difficult."""

    @classmethod
    def of(cls, images: ImageSet, presence: Tensor) -> MultiLabelSet:
        """The images with presence [N, C]."""
        made = cls(
            images.name,
            images.split,
            images.fingerprint,
            images.source,
            classes=images.classes,
            rows=images._rows,
            skipped=images.skipped,
        )
        made.presence = presence
        return made

    def subset(self, indices: Tensor | Sequence[int], split: str | None = None) -> MultiLabelSet:
        indices = torch.as_tensor(indices, dtype=torch.int64)
        return MultiLabelSet.of(super().subset(indices, split), self.presence[indices])

    def resized(self, short_side: int) -> MultiLabelSet:
        return MultiLabelSet.of(super().resized(short_side), self.presence)


def read_presence(annotation: str) -> list[int]:
    """Per class of VOC: 1, 0 or -1 as in `MultiLabelSet`; what the lists ImageSets/Main/<class>_<split>.txt say too."""
    parsed = VOCDetection.parse_voc_xml(ElementTree.parse(annotation).getroot())
    presence = dict.fromkeys(VOC_CLASSES, 0)
    for item in parsed["annotation"]["object"]:
        # A difficult object never hides one that is not.
        if presence[item["name"]] != 1:
            presence[item["name"]] = -1 if int(item.get("difficult", 0)) else 1
    return list(presence.values())
