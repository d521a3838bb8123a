"""Fixed lists of labelled images: text files with one image of train per line.

A line is a path, from any of its folders on (`n01440764/n01440764_10026.JPEG`), or the bare file name, as in MSN's
imagenet_subsets and SimCLR's 1percent.txt. The class of an image is that of its folder in the data set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pretrain.errors import DinobenchError, UsageError


def list_digest(file: Path) -> str:
    """12 hex digits of the images that a list names, in any order, so that a definition pins them and not a folder."""
    return hashlib.sha256("\n".join(sorted(_lines(file))).encode()).hexdigest()[:12]


def read_list(file: Path, paths: Callable[[int], str], labels: Tensor, classes: Sequence[str]) -> Tensor:
    """Numbers [n] of the images that a list names, ascending.

    Args:
        paths: Path of an image by its number, as `ImageSet.path`.
        labels: [N] of all images.
        classes: Names of the labels, for messages.

    Raises:
        UsageError: the file cannot be read or is empty.
        DinobenchError: a line names no image or several, or a class that has images has none in the list.
    """
    lines = _lines(file)
    wanted: dict[str, list[str]] = {}
    for line in lines:
        wanted.setdefault(line.rsplit("/", 1)[-1], []).append(line)
    found: dict[str, list[int]] = {line: [] for line in lines}
    for number in range(len(labels)):
        path = paths(number)
        for line in wanted.get(path.rsplit("/", 1)[-1], ()):
            if f"/{path}".endswith(f"/{line}"):
                found[line].append(number)
    for line, numbers in found.items():
        if len(numbers) != 1:
            missing = sum(not numbers for numbers in found.values())
            raise DinobenchError(
                f"{file}: {line!r} names {len(numbers)} images of train, expected one ({missing} of {len(found)} lines "
                "name none): give the data set that the list was made for, and lines with a folder where file names "
                "are not unique"
            )
    rows = torch.tensor(sorted(numbers[0] for numbers in found.values()))
    absent = sorted(set(labels.tolist()) - set(labels[rows].tolist()))
    if absent:
        name = classes[absent[0]] if absent[0] < len(classes) else str(absent[0])
        raise DinobenchError(f"{file} names no image of {len(absent)} classes, for example {name!r}")
    return rows


def _lines(file: Path) -> list[str]:
    """The different lines of a list that are not empty."""
    try:
        text = file.expanduser().read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the list of images {file}: {error}") from error
    lines = list(dict.fromkeys(line.strip().lstrip("/") for line in text.splitlines() if line.strip()))
    if not lines:
        raise UsageError(f"the list of images {file} is empty: expected one path per line")
    return lines
