"""Ground truth, lists and label maps of benchmarks that somebody broke, read by the suites.

Time of `nox -s faults`: 20 s on one core for 1,700 inputs.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from PIL import Image

from fuzzing import changed, fuzz, inputs, json_values, refused, spoilt_bytes, texts
from suites.davis import open_davis
from suites.ground_truth import read_ground_truth
from suites.image_lists import list_digest, read_list
from suites.label_maps import MapLayout, open_label_maps

Count = Callable[..., None]
TRUTH = {
    "imlist": ["a", "b", "c", "d"],
    "qimlist": ["q0", "q1"],
    "gnd": [{"bbx": [0.0, 9.5], "easy": [0], "hard": [1], "junk": [2]}, {"easy": [], "hard": [3], "junk": []}],
}


@pytest.mark.promise("ground truth (JSON) altered or damaged", "read, or refused; exit code 3")
@inputs(300)
def test_ground_truth_as_json(tmp_path: Path, count: Count, examples: int) -> None:
    path = tmp_path / "gnd.json"
    whole = json.dumps(TRUTH).encode()
    made = changed(TRUTH) | json_values
    deep = st.sampled_from([b"[" * 100_000, b"9" * 5000, b"\xff", b""])
    content = made.map(lambda value: json.dumps(value).encode("utf-8", "surrogatepass")) | spoilt_bytes(whole) | deep

    def check(text: bytes) -> None:
        path.write_bytes(text)
        refused(lambda: read_ground_truth(path).fingerprint(), path)

    tried = fuzz(content, check, examples)
    count("ground truth, JSON", inputs_tried=tried, inputs_handled=tried)


@pytest.mark.promise("ground truth (pickle) damaged, with programs, or made to take memory", "read, or exit code 3")
@inputs(500)
def test_ground_truth_as_pickle(tmp_path: Path, count: Count, examples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "gnd.pkl"

    def never(*arguments: object) -> None:
        raise AssertionError("code of the file ran")

    monkeypatch.setattr(os, "system", never)
    word = st.sampled_from([b"imlist", b"qimlist", b"gnd", b"easy"])
    memo = st.integers(0, 4)
    instructions = st.lists(
        st.one_of(
            st.sampled_from([bytes([code]) for code in b"(](})etuasbRN\x85\x86\x87\x88\x89\x81.02tlpd"]),
            st.sampled_from([b"\x8f", b"\x90", b"\x91", b"\x93", b"\x94"]),
            st.sampled_from([b"cos\nsystem\n", b"c__builtin__\neval\n", b"cbuiltins\nbytearray\n", b"i__main__\nx\n"]),
            word.map(lambda text: b"X" + struct.pack("<I", len(text)) + text),
            st.integers(-(2**31), 2**31 - 1).map(lambda value: b"J" + struct.pack("<i", value)),
            memo.map(lambda place: b"q" + bytes([place])), memo.map(lambda place: b"h" + bytes([place])),
            # more memory than the file could mean
            st.sampled_from([b"r" + b"\xff" * 4, b"r\xff\xff\xff\x3f", b"p99999999999\n", b"X" + b"\xff" * 4]),
            st.sampled_from([b"\x96" + b"\xff" * 7 + b"\x7f", b"\x8e" + b"\xff" * 6 + b"\0\0", b"\x8b" + b"\xff" * 4]),
        ),
        max_size=30,
    ).map(lambda parts: b"\x80\x04" + b"".join(parts) + b".")  # fmt: skip
    spoilt = st.integers(0, pickle.HIGHEST_PROTOCOL).flatmap(lambda version: spoilt_bytes(pickle.dumps(TRUTH, version)))
    other = changed(TRUTH).map(lambda value: pickle.dumps(value, 2))

    def check(content: bytes) -> None:
        path.write_bytes(content)
        refused(lambda: read_ground_truth(path).fingerprint(), path, memory=256 << 20)

    tried = fuzz(instructions | spoilt | other, check, examples)
    count("ground truth, pickle", inputs_tried=tried, inputs_handled=tried)


@pytest.mark.promise("list of images with other lines, encodings, paths", "read, or exit code 2 or 3")
@inputs(200)
def test_lists_of_images(tmp_path: Path, count: Count, examples: int) -> None:
    path = tmp_path / "list.txt"
    names = ["cat/a.jpg", "cat/b.jpg", "dog/a.jpg"]
    labels = torch.tensor([0, 0, 1])
    line = st.sampled_from([*names, "a.jpg", "b.jpg", "/cat/a.jpg", "../cat/a.jpg", "", " "]) | texts
    content = st.lists(line, max_size=5).map(lambda lines: "\n".join(lines).encode("utf-8", "surrogatepass"))
    content |= spoilt_bytes("\n".join(names).encode())

    def use() -> None:
        list_digest(path)
        read_list(path, names.__getitem__, labels, ("cat", "dog"))

    def check(text: bytes) -> None:
        path.write_bytes(text)
        refused(use, path)

    tried = fuzz(content, check, examples)
    count("lists of images", inputs_tried=tried, inputs_handled=tried)


def png(array: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array, **options).save(buffer, "PNG")
    return buffer.getvalue()


MAP = np.array([[0, 1, 2, 255]] * 4, dtype=np.uint8)
PICTURE = png(np.zeros((4, 4, 3), np.uint8))
HUGE = PICTURE[:16] + struct.pack(">II", 60_000, 60_000) + PICTURE[24:]
MAPS = [png(MAP), png(MAP[:2]), PICTURE, png(MAP.astype(np.uint16) * 257), png(MAP > 0), png(MAP + 7), HUGE, b""]
maps = st.sampled_from(MAPS) | st.sampled_from(MAPS).flatmap(spoilt_bytes)


def files_below(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


def layouts(whole: dict[str, bytes]) -> st.SearchStrategy[dict[str, bytes]]:
    """The files of a benchmark with one to three of them replaced, gone or under another name."""
    names = st.sampled_from(list(whole))
    other = names | st.sampled_from(["x.png", "train/x.jpg", "trainannot/a b.png", "JPEGImages/480p/cow/00000.png"])
    edits = st.lists(
        st.tuples(names, other, st.none() | maps | texts.map(lambda t: t.encode("utf-8", "replace"))), max_size=3
    )

    def edit(changes: list[tuple[str, str, bytes | None]]) -> dict[str, bytes]:
        files = dict(whole)
        for old, new, content in changes:
            kept = files.pop(old, b"")
            if content is not None:
                files[new] = content
            elif new != old:
                files[new] = kept
        return files

    return edits.map(edit)


def write(root: Path, files: dict[str, bytes]) -> None:
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for name, content in files.items():
        file = root / name
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)


@pytest.mark.promise(
    "label maps of other sizes, modes, numbers, missing or damaged", "read, or refused by name; exit code 3"
)
@inputs(350)
def test_label_maps(tmp_path: Path, count: Count, examples: int) -> None:
    root = tmp_path / "CamVid"
    whole = {f"train/{name}.png": PICTURE for name in "ab"} | {f"trainannot/{name}.png": png(MAP) for name in "ab"}
    whole["train.txt"] = b"a\nb\n"
    listing = st.sampled_from([None, "{split}.txt", "../{split}.txt", "absent.txt"])

    def check(made: tuple[dict[str, bytes], str | None]) -> None:
        write(root, made[0])
        layout = MapLayout(classes=("x", "y", "z"), listing=made[1])

        def use() -> None:
            found = open_label_maps(root, "camvid", "train", layout)
            for number in range(len(found)):
                found.images.read(number)
                assert int(found.labels(number).max()) in (0, 1, 2, 255)

        refused(use, *files_below(root))

    tried = fuzz(st.tuples(layouts(whole), listing), check, examples)
    count("label maps", inputs_tried=tried, inputs_handled=tried)


@pytest.mark.promise(
    "videos of DAVIS with frames, masks, lists missing, of other kinds or damaged", "read, or exit code 3"
)
@pytest.mark.parametrize("year", [2016, 2017])
@inputs(175)
def test_davis(tmp_path: Path, count: Count, year: Any, examples: int) -> None:
    root = tmp_path / "DAVIS"
    whole = {f"JPEGImages/480p/cow/{number:05d}.jpg": PICTURE for number in range(4)}
    whole |= {f"Annotations/480p/cow/{number:05d}.png": png(MAP) for number in range(4)}
    whole[f"ImageSets/{year}/val.txt"] = b"cow\n"

    def use() -> None:
        found = open_davis(root, "davis", year, "val")
        for video in found.videos:
            for number in range(len(video.frames)):
                assert found.frame(video, number).mode == "RGB"
                assert found.mask(video, number).dtype == np.uint8

    def check(files: dict[str, bytes]) -> None:
        write(root, files)
        refused(use, *files_below(root))

    tried = fuzz(layouts(whole), check, examples)
    count("videos", inputs_tried=tried, inputs_handled=tried)
