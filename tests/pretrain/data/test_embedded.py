from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from pretrain.data.datasets import dataset_names, open_dataset
from pretrain.errors import DinobenchError

needs_packs = pytest.mark.skipif(not os.environ.get("DINOBENCH_DATA"), reason="DINOBENCH_DATA is not set")


def idx(values: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    return header + values.tobytes()


def cifar_batches(count: int) -> dict[str, bytes]:
    random = np.random.default_rng(0)
    names = [f"data_batch_{k}.bin" for k in range(1, 6)] + ["test_batch.bin"]
    records = {name: random.integers(0, 256, (count, 3073), dtype=np.uint8) for name in names}
    for record in records.values():
        record[:, 0] %= 10
    return {name: record.tobytes() for name, record in records.items()}


def test_digits_have_their_fixed_split_and_fingerprint() -> None:
    train, test = open_dataset("digits", "train"), open_dataset("digits", "test")
    assert (len(train), len(test)) == (1297, 500) and train.classes == tuple("0123456789")
    assert train.array.shape == (1297, 3, 8, 8) and train.array.max() == 255
    # Pinned: a change of the content or the split changes every score.
    assert train.fingerprint.startswith("c38053da") and test.fingerprint.startswith("422ffae3")
    together = np.concatenate([train.array[:, 0].flatten(1), test.array[:, 0].flatten(1)])
    expected = np.round(load_digits().data * 255 / 16)
    np.testing.assert_array_equal(np.sort(together.sum(1)), np.sort(expected.sum(1)))
    assert np.abs(np.bincount(test.labels) - 50).max() <= 2


@pytest.mark.parametrize("folder", ["fashion-mnist", "FashionMNIST/raw"])
@pytest.mark.parametrize("zipped", [True, False])
def test_fashion_mnist_is_read_from_idx_files(tmp_path: Path, folder: str, zipped: bool) -> None:
    images = np.random.default_rng(0).integers(0, 256, (7, 28, 28), dtype=np.uint8)
    (tmp_path / folder).mkdir(parents=True)
    for stem, values in {"train-images-idx3": images, "train-labels-idx1": np.arange(7, dtype=np.uint8)}.items():
        path = tmp_path / folder / f"{stem}-ubyte{'.gz' if zipped else ''}"
        path.write_bytes(gzip.compress(idx(values)) if zipped else idx(values))
    found = open_dataset("fashion_mnist", "train", root=tmp_path)
    np.testing.assert_array_equal(found.array[:, 2], images)
    assert found.labels.tolist() == list(range(7)) and found.classes[9] == "Ankle boot"
    with pytest.raises(DinobenchError, match="t10k-images-idx3-ubyte"):
        open_dataset("fashion_mnist", "test", root=tmp_path)


@pytest.mark.promise("damaged files of Fashion-MNIST or CIFAR-10", "named; exit 3")
@pytest.mark.parametrize("damage", [lambda b: b[:-5], lambda b: b[:30], lambda b: b"", lambda b: b"\x01" * 90])
def test_damaged_idx_files_are_named(tmp_path: Path, damage) -> None:
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    (folder / "train-images-idx3-ubyte").write_bytes(damage(idx(np.zeros((2, 28, 28), np.uint8))))
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(2, np.uint8)))
    with pytest.raises(DinobenchError, match="train-images-idx3-ubyte"):
        open_dataset("fashion_mnist", "train", root=tmp_path)


@pytest.mark.parametrize("packed", [True, False])
def test_cifar10_is_read_from_its_binary_version(tmp_path: Path, packed: bool) -> None:
    batches = cifar_batches(4)
    if packed:
        with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as archive:
            for name, content in batches.items():
                member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    else:
        (tmp_path / "cifar-10-batches-bin").mkdir()
        for name, content in batches.items():
            (tmp_path / "cifar-10-batches-bin" / name).write_bytes(content)
    train, test = open_dataset("cifar10", "train", root=tmp_path), open_dataset("cifar10", "test", root=tmp_path)
    assert (train.name, len(train), len(test)) == ("cifar10", 20, 4)
    record = np.frombuffer(batches["data_batch_2.bin"], np.uint8)[:3073]
    assert train.labels[4] == record[0]
    np.testing.assert_array_equal(train.array[4], record[1:].reshape(3, 32, 32))


def test_pickles_of_cifar10_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(DinobenchError, match=r"cifar-10-batches-bin.*holds pickles, which are not read"):
        open_dataset("cifar10", "train", root=tmp_path)


@pytest.mark.promise("damaged files of Fashion-MNIST or CIFAR-10", "named; exit 3")
def test_truncated_cifar10_is_named(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-bin").mkdir()
    (tmp_path / "cifar-10-batches-bin" / "test_batch.bin").write_bytes(bytes(3000))
    with pytest.raises(DinobenchError, match=r"test_batch.bin.*3000 bytes.*3073"):
        open_dataset("cifar10", "test", root=tmp_path)
    with pytest.raises(DinobenchError, match=r"data_batch_1.bin"):
        open_dataset("cifar10", "train", root=tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "fashion_mnist"])
def test_missing_data_says_what_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with pytest.raises(DinobenchError, match=rf"{name}: not found under DINOBENCH_DATA={tmp_path}. It needs the fo"):
        open_dataset(name, root=tmp_path)
    monkeypatch.delenv("DINOBENCH_DATA", raising=False)
    with pytest.raises(DinobenchError, match=rf"{name}: no data root: set DINOBENCH_DATA"):
        open_dataset(name)
    missing = {info.name: info for info in dataset_names()}[name]
    assert not missing.available and "DINOBENCH_DATA" in missing.where


@needs_packs
def test_fashion_mnist_pack_is_the_original() -> None:
    test = open_dataset("fashion_mnist", "test")
    assert len(test) == 10_000 and test.labels.bincount().tolist() == [1000] * 10
    assert test.labels[:5].tolist() == [9, 2, 1, 1, 6]


@needs_packs
@pytest.mark.slow
def test_jpeg_pack_of_cifar10_calls_itself_so() -> None:
    test = open_dataset("cifar10", "test[:0.01]")
    assert test.name == "cifar10-jpeg" and len(test) == 100 and test.pixels(0).shape == (3, 32, 32)
    assert test.labels.bincount().tolist() == [10] * 10 and test.classes[0] == "airplane"
