from __future__ import annotations

import os
import signal
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from suites import rows
from suites.cache import FeatureCache, content_key
from suites.rows import RowFile, checksum

KEY = content_key(test="rows")


def read(path: Path) -> tuple[torch.Tensor, torch.Tensor, dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("features").clone(), file.get_tensor("index").clone(), dict(file.metadata())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dropped", [[], [0], [49], [3, 4, 5, 17, 48], list(range(50))])
def test_rows_come_back_without_those_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, dropped: list[int]
) -> None:
    monkeypatch.setattr(rows, "COPY_BYTES", 7 * 6 * 4)  # several blocks are moved
    values = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    with RowFile.create(tmp_path / "rows", 50, 6, dtype) as file:
        for start in (30, 0, 20, 10, 40):
            file.write(start, values[start : start + 10])
        file.finish(dropped, {"device": "cpu"})
    found, index, metadata = read(tmp_path / "rows")
    kept = [row for row in range(50) if row not in dropped]
    assert index.tolist() == kept
    assert torch.equal(found, values.to(dtype)[kept])
    assert metadata == {"device": "cpu", "checksum": checksum({"features": found, "index": index})}


def test_several_writers_fill_one_file(tmp_path: Path) -> None:
    with RowFile.create(tmp_path / "rows", 4, 3, torch.float32) as first:
        with RowFile(tmp_path / "rows", 4, 3, torch.float32) as second:
            second.write(2, torch.full((2, 3), 2.0))
            first.write(0, torch.ones(2, 3))
        first.finish([], {})
    assert read(tmp_path / "rows")[0][:, 0].tolist() == [1, 1, 2, 2]


@pytest.mark.promise("a kill while a cache entry is written", "never read, removed later")
def test_an_unfinished_file_is_not_read_even_under_its_final_name(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    path = tmp_path / "features" / KEY[:2] / f"{KEY}.safetensors"
    path.parent.mkdir(parents=True)
    with RowFile.create(path, 4, 3, torch.float32) as file:
        file.write(0, torch.ones(4, 3))
    with pytest.warns(UserWarning, match="damaged cache entry"):
        assert cache.read(KEY) is None


def write_half_and_die(folder: str) -> None:
    def write(path: Path, known: dict[str, str]) -> None:
        file = RowFile.create(path, 1000, 8, torch.float32)
        file.write(0, torch.ones(500, 8))
        os.kill(os.getpid(), signal.SIGKILL)

    FeatureCache(Path(folder)).get_or_write(KEY, write)


@pytest.mark.promise("a kill while a cache entry is written", "never read, removed later")
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_process_killed_while_writing_leaves_nothing_that_is_read_and_what_it_left_is_removed(
    tmp_path: Path, processes: ForkServerContext
) -> None:
    process = processes.Process(target=write_half_and_die, args=(str(tmp_path),))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    (left,) = tmp_path.glob("features/*/.writing-*")
    cache = FeatureCache(tmp_path)
    assert cache.read(KEY) is None
    assert cache.size() == 0

    def write(path: Path, known: dict[str, str]) -> None:
        with RowFile.create(path, 2, 1, torch.float32) as file:
            file.finish([], {})

    assert cache.get_or_write(KEY, write) is not None
    assert left.exists()  # it may be that of a process that still writes
    os.utime(left, (0, 0))
    cache.get_or_write(content_key(test="another"), write)
    assert not left.exists()


def test_metadata_longer_than_its_room_is_a_bug_not_a_broken_file(tmp_path: Path) -> None:
    too_long = {"long": "x" * rows.HEADER_BYTES}
    with (
        RowFile.create(tmp_path / "rows", 1, 1, torch.float32) as file,
        pytest.raises(AssertionError, match="metadata of"),
    ):
        file.finish([], too_long)
