from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from pretrain.data.stores import open_store
from pretrain.errors import DinobenchError, UsageError
from suites.places import find_benchmark, image_files, images_below


def test_a_benchmark_is_found_under_the_data_root_or_where_the_user_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, other = tmp_path / "root", tmp_path / "other"
    for folder in (root / "copydays", other / "copydays", tmp_path / "plain"):
        folder.mkdir(parents=True)
    monkeypatch.setenv("DINOBENCH_DATA", str(root))
    assert find_benchmark("copydays", None, "images") == ("copydays", root / "copydays")
    assert find_benchmark("copydays", f"folder:{other}", "images") == ("copydays", other / "copydays")
    assert find_benchmark("copydays", f"folder:{tmp_path / 'plain'}", "images") == ("copydays", tmp_path / "plain")
    assert find_benchmark(f"folder:{tmp_path / 'plain'}", None, "images") == ("plain", tmp_path / "plain")


def test_what_is_missing_is_said_with_the_way_to_mend_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINOBENCH_DATA", str(tmp_path))
    with pytest.raises(
        DinobenchError, match=r"roxford5k: not found under .*put the images there, or add --data folder"
    ):
        find_benchmark("roxford5k", None, "the images")
    monkeypatch.delenv("DINOBENCH_DATA")
    with pytest.raises(DinobenchError, match="DINOBENCH_DATA is not set"):
        find_benchmark("roxford5k", None, "the images")
    with pytest.raises(DinobenchError, match="no such folder or archive"):
        find_benchmark("roxford5k", f"folder:{tmp_path}/nowhere", "the images")
    for wrong in ("imagenet:/data", "/data"):
        with pytest.raises(UsageError, match="folder:/path"):
            find_benchmark("roxford5k", wrong, "the images")


def test_an_unreadable_image_is_an_error_and_not_replaced(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("<html>not found</html>")
    (tmp_path / "notes.txt").write_text("no image")
    store = open_store(tmp_path)
    names = images_below(store, "")
    assert names == ["a.png", "b.png"]
    images = image_files(store, names, tmp_path, "mine", "queries")
    assert images.read(0).size == (4, 4)
    assert images.receipt() == {"name": "mine", "split": "queries", "n": 2, "fingerprint": images.fingerprint}
    with pytest.raises(DinobenchError, match=r"mine: unreadable image .*b\.png.*replace the file"):
        images.read(1)
