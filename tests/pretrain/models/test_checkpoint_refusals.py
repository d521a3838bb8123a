"""What does not fit is refused with what to do; --allow-partial is the only way around, and it is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pretrain.errors import DinobenchError
from pretrain.models.backbones import ModelConfig
from pretrain.models.checkpoint import load

State = dict[str, Tensor]


@pytest.fixture
def state(golden: Callable[[str], dict[str, np.ndarray]]) -> State:
    arrays = golden("dino_vit")
    return {key.removeprefix("sd."): torch.from_numpy(a) for key, a in arrays.items() if key.startswith("sd.")}


def saved(folder: Path, state: State) -> Path:
    path = folder / "checkpoint.pth"
    torch.save({"teacher": {f"backbone.{name}": value for name, value in state.items()}}, path)
    return path


def test_renamed_tensor_is_refused_by_both_names(tmp_path: Path, state: State) -> None:
    state["blocks.1.norm_1.weight"] = state.pop("blocks.1.norm1.weight")
    told = (
        r"29 tensors match \(96\.7 %\), missing blocks\.1\.norm1\.weight, unexpected blocks\.1\.norm_1\.weight.*rename"
    )
    with pytest.raises(DinobenchError, match=told) as caught:
        load(saved(tmp_path, state), num_heads=3)
    assert caught.value.exit_code == 3
    assert "--allow-partial" in str(caught.value)


@pytest.mark.parametrize(("old", "new"), [("blocks.", "transformer.layers."), ("patch_embed.proj.", "stem.")])
def test_state_dict_with_other_names_is_refused_with_the_expected_ones(
    tmp_path: Path, state: State, old: str, new: str
) -> None:
    renamed = {name.replace(old, new): value for name, value in state.items()}
    with pytest.raises(DinobenchError, match=r"no backbone that is known here.*expected a ViT.*rename the tensors"):
        load(saved(tmp_path, renamed), num_heads=3)


def test_prefixes_are_prefixes(tmp_path: Path, state: State) -> None:
    """The official code removes `backbone.` and `module.` anywhere in a name."""
    state["blocks.0.module.norm1.weight"] = state.pop("blocks.0.norm1.weight")
    with pytest.raises(DinobenchError, match=r"unexpected blocks\.0\.module\.norm1\.weight"):
        load(saved(tmp_path, state), num_heads=3)


def test_tensors_without_a_place_are_refused_too(tmp_path: Path, state: State) -> None:
    """A network with more in it than the one here (normed queries) computes something else."""
    state["blocks.0.attn.q_norm.weight"] = torch.ones(16)
    with pytest.raises(DinobenchError, match=r"100\.0 %\), missing none, unexpected blocks\.0\.attn\.q_norm\.weight"):
        load(saved(tmp_path, state), num_heads=3)


def test_wrong_architecture_is_refused_with_both_shapes(tmp_path: Path, state: State) -> None:
    wrong = ModelConfig(
        name="vit_tiny_patch16_224",
        kwargs={"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3},
    )
    told = r"patch_embed\.proj\.weight has shape \(48, 3, 4, 4\), expected \(48, 3, 8, 8\).*architecture it was trained"
    with pytest.raises(DinobenchError, match=told):
        load(saved(tmp_path, state), model=wrong)
    with pytest.raises(DinobenchError, match=r"0 tensors match.*unexpected blocks.*architecture it was trained"):
        load(saved(tmp_path, state), model=ModelConfig(name="resnet18"), allow_partial=True)


def test_two_networks_without_a_teacher_are_refused_by_name(tmp_path: Path, state: State) -> None:
    both = {f"{network}.{name}": value for network in ("net_a", "net_b") for name, value in state.items()}
    torch.save({"model": both}, tmp_path / "a.pth")
    with pytest.raises(DinobenchError, match=r"several networks \(net_a\., net_b\.\)"):
        load(tmp_path / "a.pth", num_heads=3)


@torch.no_grad()
def test_partial_backbone_loads_only_when_told_and_says_so(tmp_path: Path, state: State) -> None:
    gone = state.pop("blocks.1.attn.proj.weight")
    path = saved(tmp_path, state)
    with pytest.raises(DinobenchError, match="missing blocks.1.attn.proj.weight"):
        load(path, num_heads=3)
    torch.manual_seed(1)
    model = load(path, num_heads=3, allow_partial=True)
    assert model.provenance["missing"] == ["blocks.1.attn.proj.weight"]
    assert model.provenance["coverage"] == pytest.approx(100 * 29 / 30)
    assert "29 backbone tensors matched, 1 missing, 0 unexpected, coverage 96.67 %" in model.report()
    torch.manual_seed(2)
    again = load(path, num_heads=3, allow_partial=True)
    assert model.provenance["weights_sha256"] == again.provenance["weights_sha256"]
    assert not torch.equal(model.backbone.state_dict()["blocks.1.attn.proj.weight"], gone)


def test_folder_of_a_distributed_checkpoint_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(DinobenchError, match=r"distributed checkpoint.*dcp_to_torch"):
        load(tmp_path)


def test_code_hidden_in_an_official_looking_file_is_not_run(tmp_path: Path, state: State) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[object, ...]:
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    torch.save({"teacher": {f"backbone.{name}": v for name, v in state.items()}, "args": Harmful()}, tmp_path / "a.pth")
    with pytest.raises(DinobenchError, match=r"asks to unpickle .*exec.*expected tensors.*save its state dicts"):
        load(tmp_path / "a.pth", num_heads=3)
    assert not (tmp_path / "ran").exists()
