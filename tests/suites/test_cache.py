from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.errors import UsageError
from suites.cache import Entry, FeatureCache, content_key, default_folder
from suites.rows import RowFile

KEY = content_key(test="cache")


def tensors(value: float = 1.0) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    return {"features": torch.full((50, 10), value)}, {"device": "cpu"}


def must_not_compute() -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    raise AssertionError("computed although it was in the cache")


def stored_file(cache: FeatureCache) -> Path:
    (path,) = cache.folder.glob("features/*/*.safetensors")
    return path


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    return FeatureCache(tmp_path / "cache")


def test_second_read_comes_from_the_cache_with_its_metadata(cache: FeatureCache) -> None:
    first, second = cache.get_or_compute(KEY, tensors), cache.get_or_compute(KEY, must_not_compute)
    assert (first.from_cache, second.from_cache) == (False, True)
    assert torch.equal(first.tensors["features"], second.tensors["features"])
    assert second.metadata == {"device": "cpu"}


@pytest.mark.promise("a cache entry cut short, emptied or with a flipped bit", "found by its checksum, computed again")
@pytest.mark.parametrize("damage", ["truncated", "flipped bit", "empty", "no checksum"])
def test_damaged_entry_is_computed_again_with_a_warning(cache: FeatureCache, damage: str) -> None:
    cache.get_or_compute(KEY, tensors)
    path = stored_file(cache)
    content = bytearray(path.read_bytes())
    if damage == "flipped bit":
        content[-1] ^= 1
    elif damage == "no checksum":
        content = content.replace(b"checksum", b"checkxum")
    path.write_bytes({"truncated": content[: len(content) // 2], "empty": b""}.get(damage, bytes(content)))
    with pytest.warns(UserWarning, match="damaged cache entry .* computed again"):
        again = cache.get_or_compute(KEY, tensors)
    assert not again.from_cache
    assert torch.equal(again.tensors["features"], torch.ones(50, 10))
    assert cache.get_or_compute(KEY, must_not_compute).from_cache


@pytest.mark.promise("a cache that grows", "bounded; what was read last stays")
def test_size_is_bounded_and_what_was_read_last_stays(tmp_path: Path) -> None:
    one = 50 * 10 * 4
    cache = FeatureCache(tmp_path, max_bytes=int(3.5 * one))
    keys = [content_key(number=i) for i in range(4)]
    for age, key in enumerate(keys[:3]):
        cache.get_or_compute(key, tensors)
        (path,) = tmp_path.glob(f"features/*/{key}.safetensors")
        os.utime(path, (age, age))
    assert cache.read(keys[0]) is not None  # now the one read last
    cache.get_or_compute(keys[3], tensors)
    assert [cache.read(key) is not None for key in keys] == [True, False, True, True] or cache.size() <= 3.5 * one
    assert cache.read(keys[0]) is not None
    assert cache.read(keys[1]) is None


def test_an_entry_larger_than_the_bound_is_still_returned(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, max_bytes=10)
    assert cache.get_or_compute(KEY, tensors).tensors["features"].sum() == 500


def compute_slowly(folder: Path, log: Path) -> None:
    def compute() -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.2)
        return tensors()

    assert FeatureCache(folder).get_or_compute(KEY, compute).tensors["features"].sum() == 500


def test_two_readers_at_once_compute_an_entry_once(tmp_path: Path) -> None:
    log = tmp_path / "computed"
    with ThreadPoolExecutor(2) as pool:  # two caches, so two locks on one file, as in two processes
        for done in [pool.submit(compute_slowly, tmp_path / "cache", log) for _ in range(2)]:
            done.result()
    assert len(log.read_text().split()) == 1


@pytest.mark.promise("two processes want the same features", "computed once")
@pytest.mark.slow
def test_two_processes_compute_an_entry_once(tmp_path: Path, processes: ForkServerContext) -> None:
    log = tmp_path / "computed"
    readers = [processes.Process(target=compute_slowly, args=(tmp_path / "cache", log)) for _ in range(2)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(60)
    assert [reader.exitcode for reader in readers] == [0, 0]
    assert len(log.read_text().split()) == 1


def test_no_temporary_file_stays_behind_when_computing_or_writing_fails(
    cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("suites.cache.save_file", full_disk)
    with pytest.warns(UserWarning, match=r"could not be written .*No space left.*DINOBENCH_CACHE"):
        entry = cache.get_or_compute(KEY, tensors)
    assert entry.tensors["features"].sum() == 500
    assert not [path for path in cache.folder.rglob("*") if path.is_file() and path.suffix != ".lock"]


@pytest.mark.promise("a damaged file of baseline scores", "computed again, said")
def test_scores_are_stored_and_damaged_ones_forgotten(cache: FeatureCache) -> None:
    assert cache.read_scores(KEY) is None
    cache.write_scores(KEY, {"top1": 97.8})
    assert cache.read_scores(KEY) == {"top1": 97.8}
    (path,) = cache.folder.glob("scores/*/*.json")
    path.write_text('{"top1": ')
    with pytest.warns(UserWarning, match="damaged cache entry"):
        assert cache.read_scores(KEY) is None


def test_key_depends_on_every_part_but_not_on_their_order() -> None:
    assert content_key(a=1, b=[2]) == content_key(b=[2], a=1)
    assert content_key(a=1, b=[2]) != content_key(a=1, b=[3])


def test_folder_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DINOBENCH_CACHE", str(tmp_path))
    assert default_folder() == FeatureCache().folder == tmp_path
    monkeypatch.delenv("DINOBENCH_CACHE")
    assert default_folder() == Path.home() / ".cache" / "dinobench"


def test_entry_of_tensors_is_on_the_cpu_and_contiguous(cache: FeatureCache) -> None:
    transposed = torch.arange(6.0).view(2, 3).T
    entry: Entry = cache.get_or_compute(KEY, lambda: ({"features": transposed}, {}))
    assert entry.tensors["features"].is_contiguous()
    found = cache.read(KEY)
    assert found is not None
    assert torch.equal(found.tensors["features"], transposed)


def writer(value: float, blocks: str) -> Callable[[Path, dict[str, str]], None]:
    def write(path: Path, known: dict[str, str]) -> None:
        with RowFile.create(path, 5, 2, torch.float32) as file:
            file.write(0, torch.full((5, 2), value))
            file.finish([], {"blocks": blocks, "before": known.get("blocks", "none")})

    return write


def must_not_write(path: Path, known: dict[str, str]) -> None:
    raise AssertionError("written although it was in the cache")


def test_a_written_entry_is_read_and_one_that_is_not_accepted_is_replaced(cache: FeatureCache) -> None:
    first, second = cache.get_or_write(KEY, writer(1, "a")), cache.get_or_write(KEY, must_not_write)
    assert first is not None and second is not None
    assert (first.from_cache, second.from_cache) == (False, True)
    assert first.metadata == second.metadata == {"blocks": "a", "before": "none"}
    third = cache.get_or_write(KEY, writer(2, "b"), accept=lambda known: known["blocks"] == "b")
    assert third is not None
    assert third.metadata == {"blocks": "b", "before": "a"}
    assert third.tensors["features"].sum() == 20
    assert second.tensors["features"].sum() == 10  # who reads the old one keeps it


@pytest.mark.promise("a cache entry cut short, emptied or with a flipped bit", "found by its checksum, computed again")
def test_a_flipped_bit_in_a_written_entry_is_found(cache: FeatureCache) -> None:
    cache.get_or_write(KEY, writer(1, "a"))
    path = stored_file(cache)
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="checksum does not match"):
        assert cache.get_or_write(KEY, writer(1, "a")) is not None


def test_a_cache_that_cannot_be_written_gives_nothing_and_warns(
    cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full_disk, raising=False)
    with pytest.warns(UserWarning, match=r"could not be written .*No space left.*DINOBENCH_CACHE"):
        assert cache.get_or_write(KEY, writer(1, "a")) is None
    assert not [path for path in cache.folder.rglob("*") if path.is_file() and path.suffix != ".lock"]


@pytest.mark.promise("a cache that grows", "it stays below DINOBENCH_CACHE_GB, whatever is evaluated")
def test_the_bound_comes_from_the_environment_and_holds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one = 50 * 10 * 4 + 200
    monkeypatch.setenv("DINOBENCH_CACHE_GB", str(3 * one / 2**30))
    cache = FeatureCache(tmp_path)
    for number in range(20):
        cache.get_or_compute(content_key(number=number), tensors)
        assert cache.size() <= 3 * one
    assert len(list(tmp_path.glob("features/*/*.safetensors"))) == 3


@pytest.mark.parametrize("text", ["plenty", "0", "-1", "nan", "inf"])
def test_a_bound_that_is_no_size_is_refused(text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DINOBENCH_CACHE_GB", text)
    with pytest.raises(UsageError, match=f"DINOBENCH_CACHE_GB='{text}': expected .* GiB"):
        FeatureCache(tmp_path)


@pytest.mark.promise("the cache removes an entry that is being read", "the reader keeps what it reads")
def test_who_reads_an_entry_keeps_it_when_it_is_removed(tmp_path: Path) -> None:
    small = FeatureCache(tmp_path, max_bytes=1)
    small.get_or_compute(KEY, tensors)
    read = small.read(KEY)
    small.get_or_compute(content_key(number=1), tensors)
    assert read is not None and small.read(KEY) is None
    assert read.tensors["features"].sum() == 500


@pytest.mark.promise("two write to a full cache at once", "what one has just written, the other does not remove")
def test_what_another_has_just_written_is_not_removed_before_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = FeatureCache(tmp_path, max_bytes=1), FeatureCache(tmp_path, max_bytes=1)
    evict = one._evict

    def evict_and_pause(keep: Path) -> None:
        evict(keep)  # and before the entry is opened, somebody else makes room
        other.get_or_compute(content_key(number=1), tensors)

    monkeypatch.setattr(one, "_evict", evict_and_pause)
    entry = one.get_or_write(KEY, writer(1, "a"))
    assert entry is not None and entry.tensors["features"].sum() == 10
    other.get_or_compute(content_key(number=2), tensors)  # nobody is at work on it now
    assert other.read(KEY) is None


@pytest.mark.promise("an entry is removed while it is being opened", "it is computed again; no error, no warning")
@pytest.mark.parametrize("kind", ["computed", "written"])
def test_an_entry_that_is_removed_while_it_is_opened_is_made_again(
    kind: str, cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get() -> Entry | None:
        return cache.get_or_compute(KEY, tensors) if kind == "computed" else cache.get_or_write(KEY, writer(1, "a"))

    get()
    opened = torch.UntypedStorage.from_file
    removed: list[str] = []

    def lose_and_open(name: str, **options: Any) -> Any:
        if not removed:  # safetensors has read the header, torch has not mapped the file yet
            removed.append(name)
            Path(name).unlink()
        return opened(name, **options)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", lose_and_open)
    entry = get()
    assert removed and entry is not None and not entry.from_cache
    assert cache.read(KEY) is not None
