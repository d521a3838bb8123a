"""Writing and reading checkpoint files: whole or not at all, tensors and plain values only, clear refusals."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import errno
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.errors import DinobenchError
from pretrain.models import checkpoint_file
from pretrain.models.checkpoint_file import read, save, save_safetensors


def test_payload_comes_back_as_it_was(tmp_path: Path) -> None:
    payload = {
        "step": 3,
        "rate": 0.5,
        "name": "x",
        "flag": True,
        "nothing": None,
        "list": [1, (2, 3)],
        "state": OrderedDict(a=torch.arange(3), b=torch.nn.Parameter(torch.ones(2))),
        7: "integer keys, as in an optimiser",
    }
    save(tmp_path / "new" / "last.pt", payload)
    found = read(tmp_path / "new" / "last.pt")
    assert torch.equal(found["state"].pop("a"), torch.arange(3))
    assert torch.equal(found["state"].pop("b"), torch.ones(2))
    assert found == {**{k: v for k, v in payload.items() if k != "state"}, "state": {}}


def test_optimiser_state_survives(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    save(tmp_path / "a.pt", {"optimizer": optimizer.state_dict()})
    other = torch.optim.AdamW(layer.parameters(), fused=True)
    other.load_state_dict(read(tmp_path / "a.pt")["optimizer"])
    assert torch.equal(other.state[layer.weight]["exp_avg"], optimizer.state[layer.weight]["exp_avg"])


@pytest.mark.parametrize("value", [np.float64(1), np.zeros(2), Path("x"), {1, 2}, argparse.Namespace()])
def test_value_that_needs_unpickling_is_refused_when_saved(tmp_path: Path, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"payload\['a'\]\[0\] is a {type(value).__name__}"):
        save(tmp_path / "a.pt", {"a": [value]})
    assert not list(tmp_path.iterdir())


@pytest.mark.promise("a checkpoint's write fails", "the old file stays whole")
def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pt"
    save(path, {"step": 1})

    def full_disk(payload: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_file.torch, "save", full_disk)
    with pytest.raises(DinobenchError, match=r"cannot write .*No space left on device.*check the free space"):
        save(path, {"step": 2})
    assert read(path) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.promise("a kill while a checkpoint is written", "its leftover is overwritten, last.pt whole")
def test_leftover_of_a_killed_process_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    (tmp_path / ".last.pt.tmp").write_bytes(b"half")
    save(path, {"step": 2})
    assert read(path) == {"step": 2}
    assert list(tmp_path.iterdir()) == [path]


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DinobenchError, match=r"cannot write .*file/last\.pt"):
        save(tmp_path / "file" / "last.pt", {"step": 1})


def test_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    save(tmp_path / "step=5.pt", {})
    with pytest.raises(DinobenchError, match=r"no checkpoint at .*last\.pt.*beside it: step=5\.pt"):
        read(tmp_path / "last.pt")


def test_folder_is_refused_with_the_checkpoints_in_it(tmp_path: Path) -> None:
    save(tmp_path / "checkpoints" / "last.pt", {})
    with pytest.raises(DinobenchError, match=r"is a folder.*give one of checkpoints.last\.pt"):
        read(tmp_path)


@pytest.mark.promise("a checkpoint cut short", "named as such; exit 3")
@pytest.mark.parametrize("part", [0.3, 0.99])
def test_truncated_file_is_named_as_such(tmp_path: Path, part: float) -> None:
    path = tmp_path / "a.pt"
    save(path, {"weights": torch.randn(1000)})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    for mmap in (False, True):
        with pytest.raises(DinobenchError, match="truncated or damaged"):
            read(path, mmap=mmap)


@pytest.mark.parametrize("content", [b"", b"hello, this is text", b"\x80\x04nonsense"])
def test_file_that_is_no_checkpoint_is_named_as_such(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    with pytest.raises(DinobenchError, match=rf"is not a checkpoint \({len(content)} bytes"):
        read(path)


@pytest.mark.promise("a checkpoint with damaged bytes", "a sentence, no traceback")
def test_damaged_files_never_show_a_traceback(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save(path, {"weights": torch.arange(8), "step": 3})
    whole = path.read_bytes()
    for position in range(0, len(whole), 41):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        with contextlib.suppress(DinobenchError):
            read(path)


def test_bare_tensor_is_refused(tmp_path: Path) -> None:
    torch.save(torch.ones(2), tmp_path / "a.pt")
    with pytest.raises(DinobenchError, match="holds a Tensor; expected a dict"):
        read(tmp_path / "a.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_namespace_of_dino_is_read_and_nothing_else(tmp_path: Path, zipped: bool) -> None:
    arguments = argparse.Namespace(arch="vit_small", teacher_temp=0.04, local_crops_scale=(0.05, 0.4))
    torch.save({"args": arguments}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    assert read(tmp_path / "a.pt")["args"] == arguments
    more = {"args": arguments, "home": Path("x"), "loss": np.zeros(1), "when": datetime.date(2020, 1, 1)}
    torch.save(more, tmp_path / "b.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(DinobenchError, match=r"asks to unpickle .*datetime\.date.*numpy.*pathlib.*state dicts alone"):
        read(tmp_path / "b.pt")


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    for name, zipped in (("new.pt", True), ("old.pt", False)):
        torch.save({"student": Harmful()}, tmp_path / name, _use_new_zipfile_serialization=zipped)
        with pytest.raises(DinobenchError, match=r"unpickle|not a checkpoint"):
            read(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_file_that_is_a_plain_pickle_is_refused_with_what_it_asks_for(tmp_path: Path) -> None:
    """Protocol 4 keeps the names on its stack."""
    (tmp_path / "a.pth").write_bytes(pickle.dumps({"weights": np.zeros(2)}, protocol=4))
    with pytest.raises(DinobenchError, match=r"asks to unpickle numpy"):
        read(tmp_path / "a.pth")


def test_safetensors_come_back_with_their_header(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "a.safetensors", {"w": torch.arange(6.0).view(2, 3).T}, {"note": "x"})
    found = read(tmp_path / "a.safetensors")
    assert torch.equal(found["state_dict"]["w"], torch.arange(6.0).view(2, 3).T)
    assert found["metadata"] == {"note": "x"}
    (tmp_path / "a.safetensors").rename(tmp_path / "blob")  # a hub's cache names files by their hash
    assert read(tmp_path / "blob")["format"] == "safetensors"
