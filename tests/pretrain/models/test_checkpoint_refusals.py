"""What does not fit is refused with what to do; --allow-partial is the only way around, and it is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pretrain.errors import DinobenchError, UsageError
from pretrain.models.backbones import ModelConfig, create_backbone
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


@pytest.mark.promise("a checkpoint with NaN weights", "refused at the evaluation, tensor named")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, state: State, value: float) -> None:
    state["norm.weight"] = state["norm.weight"].index_fill(0, torch.tensor([3]), value)
    with pytest.raises(DinobenchError, match=r"not finite in 1 of its 30 .*\(norm\.weight\).*earlier checkpoint"):
        load(saved(tmp_path, state), num_heads=3)


def test_weights_that_are_no_floats_are_refused(tmp_path: Path, state: State) -> None:
    """Eight-bit weights would load as whole numbers without a scale."""
    state = {name: (100 * value).to(torch.int8) for name, value in state.items()}
    with pytest.raises(DinobenchError, match=r"is of type int8, expected floating point.*before it was quantised"):
        load(saved(tmp_path, state), num_heads=3)


@pytest.mark.parametrize("shape", [(), (0,), (1, 1, 1, 1, 1)])
def test_any_tensor_of_another_shape_is_refused(tmp_path: Path, state: State, shape: tuple[int, ...]) -> None:
    for name in state:
        with pytest.raises(DinobenchError, match="shape|as its project wrote it") as caught:
            load(saved(tmp_path, {**state, name: torch.zeros(shape)}), num_heads=3)
        assert caught.value.exit_code == 3


def test_entries_of_the_wrong_type_are_refused(tmp_path: Path, state: State) -> None:
    odd: list[dict[str, object]] = [
        {"classy_state_dict": {"base_model": {"model": {"trunk": [1]}}}},
        {"model": 3, "clustering_optimizer": {}},
        {"teacher": {"backbone.patch_embed.proj.weight": 3}},
        {"format": "dinobench-checkpoint-1", "recipe": 3, "teacher": {}, "step": 1},
        {"format": "dinobench-checkpoint-1", "recipe": {"model": {}}, "teacher": None, "step": 1},
        {"prototypes.": torch.zeros(1), "x": torch.ones(1)},
        {1: torch.zeros(2)},  # type: ignore[dict-item]
        {**state, f"blocks.{'9' * 5000}.norm1.weight": torch.zeros(48)},
        {**state, "storage_tokens": torch.zeros(()), "blocks.0.attn.qkv.bias": torch.zeros(())},
    ]
    for payload in odd:
        torch.save(payload, tmp_path / "a.pth")
        with pytest.raises(DinobenchError) as caught:
            load(tmp_path / "a.pth", num_heads=3)
        assert caught.value.exit_code == 3
        assert len(str(caught.value)) < 2000


def test_head_of_odd_shapes_does_not_keep_the_backbone_away(tmp_path: Path, state: State) -> None:
    heads: list[State] = [
        {"last_layer.weight": torch.zeros(1, 2), "mlp.weight": torch.zeros(2, 48), "mlp.bias": torch.zeros(2)},
        {"last_layer.weight": torch.zeros(4, 2), "mlp.0.weight": torch.zeros(0, 0)},
        {"last_layer.weight_g": torch.ones(3, 1), "last_layer.weight_v": torch.ones(4, 2)},
        {"last_layer.weight": torch.zeros(4, 2), "mlp.weight": torch.zeros(2)},
    ]
    backbone = {f"backbone.{name}": value for name, value in state.items()}
    for head in heads:
        torch.save({"teacher": backbone | {f"head.{n}": v for n, v in head.items()}}, tmp_path / "a.pth")
        model = load(tmp_path / "a.pth", num_heads=3)
        assert model.head is None and model.provenance["coverage"] == 100


@pytest.mark.parametrize("number", [0, -1])
def test_heads_are_at_least_one(tmp_path: Path, state: State, number: int) -> None:
    with pytest.raises(UsageError, match="at least one attention head"):
        load(saved(tmp_path, state), num_heads=number)


def test_number_of_heads_that_does_not_divide_the_width_is_refused(tmp_path: Path, state: State) -> None:
    with pytest.raises(UsageError, match="divisible by num_heads"):
        load(saved(tmp_path, state), num_heads=5)


def test_missing_last_blocks_of_a_published_vit_are_told(tmp_path: Path) -> None:
    """Shapes alone cannot tell them from a network of that depth."""
    config = ModelConfig(name="vit_tiny_patch16_224", kwargs={"depth": 10, "img_size": 32})
    torch.save(create_backbone(config).state_dict(), tmp_path / "a.pth")
    told = "10 blocks where the published ViTs of width 192 have 12: is the file whole?"
    assert told in load(tmp_path / "a.pth").report()


def test_several_state_dicts_under_unknown_keys_are_refused_by_name(tmp_path: Path, state: State) -> None:
    torch.save({"net_a": state, "net_b": state}, tmp_path / "a.pth")
    with pytest.raises(DinobenchError, match=r"several state dicts \(net_a, net_b\)"):
        load(tmp_path / "a.pth", num_heads=3)


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
