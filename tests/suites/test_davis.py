from __future__ import annotations

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pretrain.errors import DinobenchError
from suites.davis import open_davis

PACK = Path(os.environ.get("DINOBENCH_DATA", "")) / "davis2016-val4" / "davis2016_val4_480p.tar"


def write(folder: Path, year: int, sequences: tuple[str, ...] = ("bear", "camel"), frames: int = 4) -> Path:
    """Sequences of small frames whose masks hold 0, the objects 1 and 2 (2016: 255), and 255 in 2017."""
    for sequence in sequences:
        images, masks = (folder / kind / "480p" / sequence for kind in ("JPEGImages", "Annotations"))
        images.mkdir(parents=True)
        masks.mkdir(parents=True)
        for number in range(frames):
            Image.new("RGB", (12, 8), (number * 20, 0, 0)).save(images / f"{number:05d}.jpg")
            labels = np.zeros((8, 12), dtype=np.uint8)
            labels[2:4, number : number + 3] = 255 if year == 2016 else 1
            labels[5:7, 5:9] = 255 if year == 2016 else 2
            if year == 2017:
                labels[0] = 255
            mask = Image.fromarray(labels)
            if year == 2017:
                mask = Image.frombytes("P", mask.size, mask.tobytes())
                mask.putpalette(list(range(256)) * 3)  # a short palette would be saved with fewer bits
            mask.save(masks / f"{number:05d}.png")
    listing = folder / "ImageSets" / str(year)
    listing.mkdir(parents=True)
    (listing / "val.txt").write_text("".join(f"{sequence}\n" for sequence in sequences))
    return folder


@pytest.mark.parametrize(("year", "objects"), [(2016, {0, 1}), (2017, {0, 1, 2})])
def test_masks_mean_what_the_year_says(tmp_path: Path, year: int, objects: set[int]) -> None:
    davis = open_davis(write(tmp_path / "DAVIS", year), "mine", year, "val")
    assert [video.name for video in davis.videos] == ["bear", "camel"]
    video = davis.videos[0]
    assert davis.frame(video, 2).size == (12, 8)
    mask = davis.mask(video, 1)
    assert mask.shape == (8, 12) and set(mask.flatten().tolist()) == objects
    assert mask[2, 1] == 1 and mask[2, 0] == 0 and not mask[0].any()
    assert davis.receipt()["videos"]["n"] == 8


def test_an_archive_reads_as_the_folder_and_the_content_tells_them_apart_from_others(tmp_path: Path) -> None:
    folder = write(tmp_path / "DAVIS", 2017)
    with tarfile.open(tmp_path / "pack.tar", "w") as archive:
        archive.add(folder, "somewhere/DAVIS")
    whole, packed = (open_davis(path, "mine", 2017, "val") for path in (folder, tmp_path / "pack.tar"))
    assert whole.fingerprint == packed.fingerprint
    np.testing.assert_array_equal(whole.mask(whole.videos[1], 3), packed.mask(packed.videos[1], 3))
    Image.new("L", (12, 8)).save(folder / "Annotations/480p/camel/00002.png")
    assert open_davis(folder, "mine", 2017, "val").fingerprint != whole.fingerprint


def test_the_list_of_2016_may_name_frames(tmp_path: Path) -> None:
    folder = write(tmp_path / "DAVIS", 2016)
    (folder / "ImageSets/2016/val.txt").unlink()
    (folder / "ImageSets/480p").mkdir()
    lines = [f"/JPEGImages/480p/camel/{n:05d}.jpg /Annotations/480p/camel/{n:05d}.png\n" for n in range(4)]
    (folder / "ImageSets/480p/val.txt").write_text("".join(lines))
    assert [video.name for video in open_davis(folder, "mine", 2016, "val").videos] == ["camel"]


def test_another_layout_or_missing_files_are_told(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DinobenchError, match="is not in the layout of DAVIS"):
        open_davis(tmp_path / "empty", "mine", 2017, "val")
    folder = write(tmp_path / "DAVIS", 2017)
    with pytest.raises(DinobenchError, match=r"no list of sequences: expected ImageSets/2017/test-dev\.txt"):
        open_davis(folder, "mine", 2017, "test-dev")
    (folder / "Annotations/480p/bear/00001.png").unlink()
    with pytest.raises(DinobenchError, match=r"sequence bear has no mask Annotations/480p/bear/00001\.png"):
        open_davis(folder, "mine", 2017, "val")
    with pytest.raises(DinobenchError, match="sequence cow has 2 frames, needs 3"):
        open_davis(write(tmp_path / "short", 2017, ("cow",), frames=2), "mine", 2017, "val")


def test_a_mask_in_colours_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "DAVIS", 2017)
    Image.new("RGB", (12, 8)).save(folder / "Annotations/480p/bear/00001.png")
    davis = open_davis(folder, "mine", 2017, "val")
    with pytest.raises(DinobenchError, match=r"bear/00001\.png cannot be read \(mode RGB, expected a palette"):
        davis.mask(davis.videos[0], 1)


@pytest.mark.skipif(not PACK.is_file(), reason="DINOBENCH_DATA has no pack davis2016-val4")
def test_the_pack_of_davis_2016_holds_four_sequences() -> None:
    davis = open_davis(PACK, "davis2016", 2016, "val")
    found = {video.name: len(video.frames) for video in davis.videos}
    assert found == {"blackswan": 50, "car-shadow": 40, "libby": 49, "motocross-jump": 40}
    mask = davis.mask(davis.videos[0], 0)
    assert mask.shape == (480, 854) and set(np.unique(mask)) == {0, 1}
