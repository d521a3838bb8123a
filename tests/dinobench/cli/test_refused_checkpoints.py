"""`dinobench eval` of files that are no fitting checkpoint: exit code 3, a sentence on what to do, nothing measured."""

from __future__ import annotations

import os
import sys
import time
import zipfile
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dinobench.cli import app

State = dict[str, Tensor]
SECONDS = 20.0
"""For all of it, measured on a busy machine; loading takes a fraction of it."""


def save(path: Path, state: State) -> None:
    torch.save({"teacher": {f"backbone.{name}": value for name, value in state.items()}}, path)


def wrong_architecture(path: Path, state: State) -> None:
    save(path, state)


def truncated(path: Path, state: State) -> None:
    save(path, state)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def html_page(path: Path, state: State) -> None:
    path.write_text("<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head></html>")


class Harmful:
    """Unpickling it would make the file `ran`."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


def pickle_bomb(path: Path, state: State) -> None:
    torch.save({"teacher": state, "args": Harmful(path.with_name("ran"))}, path)


def zip_bomb(path: Path, state: State) -> None:
    save(path, state)
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, bytes(300_000_000) if name.endswith("/data/0") else content)
    assert path.stat().st_size < 10_000_000


def renamed_keys(path: Path, state: State) -> None:
    save(path, {name.replace("blocks.", "transformer.layers."): value for name, value in state.items()})


def one_renamed_key(path: Path, state: State) -> None:
    save(path, {name.replace("blocks.1.norm1.", "blocks.1.norm_1."): value for name, value in state.items()})


REFUSED: dict[str, tuple[Callable[[Path, State], None], list[str], list[str]]] = {
    "wrong architecture": (
        wrong_architecture,
        ["--arch", "vit_small_patch16_224"],
        [
            "does not fit vit_small_patch16_224",
            "expected (1, 197, 384)",
            "give the architecture it was trained with",
        ],
    ),
    "truncated": (truncated, [], ["truncated or damaged"]),
    "HTML page": (html_page, [], ["is a web page", "curl -L"]),
    "pickle bomb": (pickle_bomb, [], ["asks to unpickle", "exec", "save its state dicts"]),
    "zip bomb": (zip_bomb, [], ["unpacks to", "can fill the memory"]),
    "renamed keys": (renamed_keys, ["--num-heads", "3"], ["no backbone that is known here", "rename the tensors"]),
    "one renamed key": (
        one_renamed_key,
        ["--num-heads", "3"],
        ["missing blocks.1.norm1.bias", "unexpected blocks.1.norm_1.bias", "rename", "--allow-partial"],
    ),
}


@pytest.fixture
def state(golden: Callable[[str], dict[str, np.ndarray]]) -> State:
    """A ViT of two blocks, width 48, patch 4."""
    arrays = golden("dino_vit")
    return {key.removeprefix("sd."): torch.from_numpy(a) for key, a in arrays.items() if key.startswith("sd.")}


@pytest.mark.parametrize("kind", REFUSED)
def test_it_is_refused_with_exit_code_3_and_what_to_do(
    kind: str, state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, options, told = REFUSED[kind]
    path = tmp_path / "dino_deitsmall16_pretrain.pth"
    make(path, state)
    output = tmp_path / "runs"
    started = time.monotonic()
    code = app.run(["eval", "--suite", "digits_knn", "--output", str(output), "--json", *options, str(path)])
    assert time.monotonic() - started < SECONDS
    captured = capsys.readouterr()
    assert (code, captured.out) == (3, "")
    assert captured.err.count("error: ") == 1
    assert "Traceback" not in captured.err
    assert str(path) in captured.err
    for words in told:
        assert words in captured.err
    assert not list(output.glob("evals/*/*.json"))
    assert not (tmp_path / "ran").exists()


def main(folder: Path, *arguments: str) -> None:
    """The entry point of the console script; its output goes to files."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(folder)
    sys.argv[1:] = arguments
    app.main()


def test_the_console_script_ends_with_that_code(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    truncated(tmp_path / "a.pth", state)
    monkeypatch.setattr(sys, "argv", ["dinobench", "eval", "--suite", "digits_knn", str(tmp_path / "a.pth")])
    with pytest.raises(SystemExit) as left:
        app.main()
    assert left.value.code == 3
    assert "truncated or damaged" in capsys.readouterr().err


@pytest.mark.slow
def test_the_process_ends_with_that_code(state: State, tmp_path: Path, processes: ForkServerContext) -> None:
    truncated(tmp_path / "a.pth", state)
    process = processes.Process(target=main, args=(tmp_path, "eval", "--suite", "digits_knn", "a.pth"))
    process.start()
    process.join(120)
    assert (process.exitcode, (tmp_path / "stdout").read_text()) == (3, "")
    told = (tmp_path / "stderr").read_text()
    assert "truncated or damaged" in told
    assert "Traceback" not in told
