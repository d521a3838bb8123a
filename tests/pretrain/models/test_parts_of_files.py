"""Large networks in several safetensors files, by the index that lists them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pretrain.errors import DinobenchError
from pretrain.models.checkpoint import load

INDEX = "model.safetensors.index.json"
PARTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def folder(golden: Callable[[str], dict[str, np.ndarray]], tmp_path: Path) -> Path:
    arrays = golden("dino_vit")
    state = {key.removeprefix("sd."): torch.from_numpy(a) for key, a in arrays.items() if key.startswith("sd.")}
    places = {name: PARTS[number % 2] for number, name in enumerate(state)}
    for part in PARTS:
        save_file({name: value for name, value in state.items() if places[name] == part}, tmp_path / part)
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return tmp_path


@torch.no_grad()
def test_golden_dino_vit_from_two_files(golden: Callable[[str], dict[str, np.ndarray]], folder: Path) -> None:
    g = golden("dino_vit")
    model = load(folder / INDEX, num_heads=3)
    assert (model.provenance["matched"], model.provenance["coverage"]) == (30, 100)
    found = model.backbone(torch.from_numpy(g["32x32.x"]))
    torch.testing.assert_close(found, torch.from_numpy(g["32x32.forward"]), rtol=1e-5, atol=1e-5)
    content = b"".join((folder / part).read_bytes() for part in PARTS)
    assert model.provenance["sha256"] == hashlib.sha256(content).hexdigest()


def test_one_part_is_refused_with_the_index(folder: Path) -> None:
    with pytest.raises(DinobenchError, match=rf"is part 2 of 2 of a network.*give .*{INDEX}"):
        load(folder / PARTS[1])
    with pytest.raises(DinobenchError, match=rf"is a folder.*give one of {INDEX}"):
        load(folder)


def test_part_that_is_missing_or_elsewhere_is_refused_by_name(folder: Path) -> None:
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    (folder / INDEX).write_text(json.dumps({"weight_map": {**places, "x": "../outside.safetensors"}}))
    (folder.parent / "outside.safetensors").write_bytes((folder / PARTS[0]).read_bytes())
    with pytest.raises(DinobenchError, match=r"names the part '\.\./outside\.safetensors', which is not beside it"):
        load(folder / INDEX)
    (folder / INDEX).write_text(json.dumps({"weight_map": {**places, "x": PARTS[0]}}))
    with pytest.raises(DinobenchError, match="lack 1 of its tensors, for example x"):
        load(folder / INDEX)
    (folder / PARTS[0]).unlink()
    with pytest.raises(DinobenchError, match=f"names the part '{PARTS[0]}'"):
        load(folder / INDEX)


def test_truncated_part_is_told_by_its_name(folder: Path) -> None:
    (folder / PARTS[1]).write_bytes((folder / PARTS[1]).read_bytes()[:500])
    with pytest.raises(DinobenchError, match=rf"{PARTS[1]} is truncated or damaged"):
        load(folder / INDEX)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": 3}', "not json"])
def test_index_without_a_map_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(DinobenchError, match=r"no weight_map|is not a checkpoint"):
        load(tmp_path / INDEX)
