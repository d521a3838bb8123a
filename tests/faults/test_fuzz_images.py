"""Images of every kind, broken and whole, in folders, archives and arrays, read as a training and an evaluation do.

Memory of one input: 1 GiB, see fuzzing.MEMORY. Time of `nox -s faults`: 40 s on one core for 2,300 inputs.
"""

from __future__ import annotations

import gzip
import io
import itertools
import os
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from PIL import Image

from fuzzing import fuzz, inputs, refused, spoilt_bytes
from pretrain.data.datasets import open_dataset
from pretrain.data.embedded import read_idx

Count = Callable[..., None]
Member = tuple[str, bytes]
NAMES = (
    "a.png", "b.jpg", "with space.png", "名前.png", "a\nb.png", "..png", ".hidden.png", "UPPER.JPEG", "no_suffix",
    "a.txt", "x" * 200 + ".png", "'quoted'.gif", "-rf.png", "%s.webp", "a.png.png", "tab\t.bmp", "é.tiff",
    "e\u0301.tiff",
)  # fmt: skip
FOLDERS = (
    "", "train/", "val/", "train/cat/", "train/dog/", "val/cat/", "test/", "a/b/c/d/", "train/train/", "cat/",
    "__MACOSX/",
)  # fmt: skip
UNSAFE = (
    "../a.png", "/etc/a.png", "a/../../b.png", "./a.png", "a//b.png", "train/../../c.png", "C:\\a.png", "a\\b.png",
    "",
)  # fmt: skip


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def declared_png(width: int, height: int, kind: int = 2, bits: int = 8) -> bytes:
    """A PNG that says it has this size and holds next to nothing."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    chunks = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def whole_images() -> list[bytes]:
    noise = np.random.default_rng(0).integers(0, 256, (9, 7, 4), dtype=np.uint8)
    rgba = Image.fromarray(noise)
    rgb, gray = rgba.convert("RGB"), rgba.convert("L")
    deep = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    palette, frames = rgb.convert("P"), [rgb, rgb.rotate(90), rgb.rotate(180)]
    return [
        encoded(rgb, "PNG"), encoded(rgba, "PNG"), encoded(gray, "PNG"), encoded(palette, "PNG"), encoded(deep, "PNG"),
        encoded(rgb.convert("1"), "PNG"), encoded(gray.convert("LA"), "PNG"), encoded(palette, "PNG", transparency=3),
        encoded(rgb, "JPEG"), encoded(rgb.convert("CMYK"), "JPEG"), encoded(gray, "JPEG"),
        encoded(rgb, "JPEG", progressive=True), encoded(rgb, "BMP"), encoded(rgb, "PPM"), encoded(gray, "PPM"),
        encoded(palette, "GIF", save_all=True, append_images=[frame.convert("P") for frame in frames]),
        encoded(rgb, "WEBP"), encoded(rgb, "WEBP", save_all=True, append_images=frames, lossless=True),
        encoded(deep, "TIFF"), encoded(rgb.convert("CMYK"), "TIFF"), encoded(gray.convert("F"), "TIFF"),
        encoded(gray.convert("I"), "TIFF"), encoded(rgb.convert("YCbCr"), "TIFF"), encoded(rgb.convert("LAB"), "TIFF"),
        encoded(rgb, "TIFF", compression="tiff_lzw"), encoded(rgb.resize((1, 1)), "PNG"),
        encoded(rgb.resize((1, 190)), "PNG"), encoded(rgb.resize((3000, 1)), "JPEG"),
        encoded(Image.new("1", (1, 65535)), "PNG"),
    ]  # fmt: skip


WHOLE = whole_images()
BOMBS = [
    declared_png(20_000, 20_000), declared_png(2**31 - 1, 2**31 - 1), declared_png(9_000, 9_900), declared_png(0, 0),
    declared_png(2**31 - 1, 1), declared_png(1, 2**31 - 1), declared_png(9_400, 9_500, kind=6),
    declared_png(9_000, 9_900, 0, 16), b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(20),
    b"P6 99999 99999 255\n", b"P5 9000 9900 65535\n", b"P6 -1 5 255\n", b"", b"\0" * 100, b"<svg/>", b"%PDF-1.4",
    b"BM" + bytes(16) + struct.pack("<ii", 2**31 - 1, -(2**31)) + bytes(40),
]  # fmt: skip


def contents() -> SearchStrategy[bytes]:
    spoilt = st.sampled_from(WHOLE).flatmap(spoilt_bytes)
    whole = st.sampled_from(WHOLE)
    return st.one_of(whole, whole, spoilt, spoilt, st.sampled_from(BOMBS), st.binary(max_size=50))


def members(names: SearchStrategy[str]) -> SearchStrategy[list[Member]]:
    return st.lists(st.tuples(names, contents()), min_size=1, max_size=5)


folder_names = st.builds(lambda folder, name: folder + name, st.sampled_from(FOLDERS), st.sampled_from(NAMES))
usual_names = st.sampled_from(["train/cat/a.png", "train/dog/b.jpg", "val/cat/c.png", "a.png", "b.png", "cat/d.gif"])
archive_names = usual_names | usual_names | folder_names | st.sampled_from(UNSAFE)


def use(name: str, split: str, share: float) -> None:
    """What happens to a data set: opened, every image decoded, at its own and at a small size."""
    images = open_dataset(name, split, max_bad_images=share)
    assert len(images) > 0
    assert len(images.fingerprint) == 64
    assert images.labels is None or int(images.labels.max()) < len(images.classes)
    for number in range(min(len(images), 5)):
        assert images.pixels(number).shape[0] == 3
        small = images.resized(8).pixels(number)
        assert small.dtype == torch.uint8
        assert min(small.shape[1:]) <= 8
    array = images.array
    assert array is None or len(array) == len(images)


options = st.tuples(st.sampled_from(["train", "val", "test", "train[:0.5]"]), st.sampled_from([0.0, 0.5, 1.0]))


@pytest.mark.promise(
    "images truncated, 1x1, 20k x 20k, CMYK, 16-bit, animated, with a wrong suffix, empty; in folders with odd names",
    "decoded to RGB or left out by name, or exit code 2 or 3, within 1 GiB",
)
@inputs(500)
def test_folders(tmp_path: Path, count: Count, examples: int) -> None:
    numbers = itertools.count()

    def check(made: tuple[list[Member], list[str], tuple[str, float]]) -> None:
        found, links, (split, share) = made
        root = tmp_path / f"set {next(numbers)} é"
        files = []
        for name, content in found:
            file = root / name
            file.parent.mkdir(parents=True, exist_ok=True)
            if not file.is_dir():
                file.write_bytes(content)
                files.append(file)
        for number, target in enumerate(links):
            (root / f"link{number}.png").symlink_to(target)
        refused(lambda: use(f"folder:{root}", split, share), *files)
        shutil.rmtree(root)

    links = st.lists(
        st.sampled_from([".", "..", "nowhere", "/dev/zero", "/etc/passwd", "link0.png", "a.png"]), max_size=2
    )
    tried = fuzz(st.tuples(members(folder_names), links, options), check, examples)
    count("images in folders", inputs_tried=tried, inputs_handled=tried)


TAR_KINDS = (tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)


def tar_of(found: list[Member], kinds: list[int], compression: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{compression}", format=tarfile.PAX_FORMAT) as archive:
        for number, (name, content) in enumerate(found):
            info = tarfile.TarInfo(name)
            kind = kinds[number % len(kinds)] if kinds else 0
            if kind:
                info.type = TAR_KINDS[kind]
                info.linkname = "../../../etc/passwd"
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def zip_of(found: list[Member], kinds: list[int], compression: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if compression else zipfile.ZIP_STORED) as archive:
        for number, (name, content) in enumerate(found):
            info = zipfile.ZipInfo(name or "x")
            if kinds and kinds[number % len(kinds)] == 1:  # a symbolic link, as Unix zips mark it
                info.external_attr = 0o120777 << 16
            archive.writestr(info, content)
    return buffer.getvalue()


@pytest.mark.promise(
    "archives of such images; members with absolute paths, `..`, links, devices, twice one name; spoilt archives",
    "read in place, nothing written outside or inside, or exit code 2 or 3, within 1 GiB",
)
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.xz", ".zip"])
@inputs(250)
def test_archives(tmp_path: Path, count: Count, suffix: str, examples: int) -> None:
    folder = tmp_path / "inner" / "set"
    folder.mkdir(parents=True)
    numbers = itertools.count()
    compression = {".tar.gz": "gz", ".tar.xz": "xz"}.get(suffix, "")
    pack = zip_of if suffix == ".zip" else tar_of
    built = st.builds(pack, members(archive_names), st.lists(st.integers(0, 5), max_size=3), st.just(compression))
    if suffix == ".zip":
        built |= st.builds(pack, members(archive_names), st.just([]), st.just("deflate"))

    def check(made: tuple[bytes, tuple[str, float]]) -> None:
        content, (split, share) = made
        file = folder / f"{next(numbers)}{suffix}"
        file.write_bytes(content)
        refused(lambda: use(f"folder:{file}", split, share), file)
        file.unlink()
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []

    spoilt = built.flatmap(spoilt_bytes)
    tried = fuzz(st.tuples(built, options), check, examples // 2)
    tried += fuzz(st.tuples(spoilt, options), check, examples // 2)
    count(f"images in {suffix}", inputs_tried=tried, inputs_handled=tried)


def npy(array: np.ndarray, header: str | None = None) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=True)
    content = buffer.getvalue()
    if header is None:
        return content
    start = header.encode("latin1", "replace").ljust(118) + b"\n"
    return content[:8] + struct.pack("<H", len(start)) + start + content[10 + struct.unpack("<H", content[8:10])[0] :]


class Harmful:
    def __reduce__(self) -> Any:
        return os._exit, (77,)


@pytest.mark.promise(
    "NumPy archives with objects, strings, dates, other shapes, labels of 2^60, headers that lie",
    "accepted, or exit code 2 or 3; no object is built; within 1 GiB",
)
@inputs(500)
def test_numpy_archives(tmp_path: Path, count: Count, examples: int) -> None:
    path = tmp_path / "a.npz"
    kinds = st.sampled_from(
        [np.uint8, np.int64, np.float32, np.bool_, "U3", "S2", "M8[s]", np.complex64, "V4", "u1,u1"]
    )
    usual = [(4, 8, 8), (4, 8, 8, 3), (4, 3, 8, 8), (0, 8, 8), (4,), (4, 1)]
    shapes = st.sampled_from([*usual, (4, 0, 0), (), (4, 2), (1, 1, 1, 1, 1), (4, 1, 900)])
    arrays = st.builds(lambda shape, kind: npy(np.zeros(shape, dtype=kind)), shapes, kinds)
    labels = st.sampled_from([0, 1, -1, 2**31, 2**60, 2**63 - 1]).map(lambda top: npy(np.array([0, 1, 0, top])))
    objects = st.sampled_from([npy(np.array([Harmful()], dtype=object)), npy(np.array([{}, None], dtype=object))])
    sizes = [
        "(1000000000000,)",
        "(4, 100000, 100000, 3)",
        "(-1,)",
        "()",
        "(2**99,)",
        "'x'",
        "(4, 8, 8",
        "(40000, 40000)",
    ]
    descr = ["'|u1'", "'|O'", "'<f8'", "'|V999999999'", "[('a', '|O')]", "'|S9999999999'", "__import__('os')", "'|V0'"]

    def lying(kind: str, shape: str) -> bytes:
        return npy(np.zeros(8, np.uint8), f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}}}")

    headers = st.builds(lying, st.sampled_from(descr), st.sampled_from(sizes))
    whole = [np.zeros((4, 8, 8), np.uint8), np.zeros((4, 8, 8, 3), np.uint8), np.arange(4)]
    good = st.sampled_from([npy(array) for array in whole])
    spoilt = good.flatmap(spoilt_bytes)
    content = st.one_of(good, good, arrays, labels, objects, headers, spoilt, st.binary(max_size=30))
    ours = ("images", "labels", "train_images", "train_labels", "test_images", "test_labels")
    keys = st.sampled_from([*ours, "labels", "x_images", "_images", "a"])

    def build(found: list[tuple[str, bytes]], compressed: bool) -> bytes:
        return zip_of([(f"{key}.npy", inner) for key, inner in found], [], "deflate" if compressed else "")

    images = st.sampled_from([npy(array) for array in whole[:2]])
    pairs = st.tuples(images | arrays, labels | labels | arrays | objects | headers)
    pairs = pairs.map(lambda two: [("images", two[0]), ("labels", two[1])])
    sound = st.builds(build, pairs, st.booleans())
    strange = st.builds(build, st.lists(st.tuples(keys, content), max_size=4), st.booleans())
    strange |= (sound | strange).flatmap(spoilt_bytes)

    def check(made: tuple[bytes, tuple[str, float]]) -> None:
        content, (split, share) = made
        path.write_bytes(content)
        refused(lambda: use(f"npz:{path}", split, share), path)

    train = st.tuples(st.sampled_from(["train", "train[:0.5]"]), st.just(0.0))
    tried = fuzz(st.tuples(sound, train), check, examples // 2)
    tried += fuzz(st.tuples(strange, options), check, examples // 2)
    count("NumPy archives", inputs_tried=tried, inputs_handled=tried)


@pytest.mark.promise("idx files (MNIST) with other shapes, types and sizes", "read, or exit code 3; within 1 GiB")
@pytest.mark.parametrize("suffix", ["", ".gz"])
@inputs(150)
def test_idx_files(tmp_path: Path, count: Count, suffix: str, examples: int) -> None:
    path = tmp_path / f"a{suffix}"
    lengths = st.lists(st.sampled_from([0, 1, 2, 5, 28, 2**16, 2**31, 2**32 - 1]), max_size=6)
    axes = st.integers(0, 255)

    def build(lengths: list[int], axes: int | None, rest: bytes) -> bytes:
        number = len(lengths) if axes is None else axes
        return bytes([0, 0, 8, number]) + b"".join(struct.pack(">I", length) for length in lengths) + rest

    made = st.builds(build, lengths, st.none() | axes, st.binary(max_size=60))

    def check(content: bytes) -> None:
        path.write_bytes(gzip.compress(content, 1) if suffix else content)
        refused(lambda: read_idx(path), path)

    tried = fuzz(made | made.flatmap(spoilt_bytes), check, examples)
    count("idx files", inputs_tried=tried, inputs_handled=tried)
