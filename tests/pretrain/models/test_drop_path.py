"""Stochastic depth with one rate, and on a part of the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.layers import DropPath

from pretrain.errors import UsageError
from pretrain.models.backbones import ModelConfig, create_backbone
from pretrain.models.drop_path import SharedDropPath, SubsetBlock, add_to_subset, share_rates
from pretrain.training.recipe import resolve
from pretrain.training.runtime import Runtime
from pretrain.training.schedules import Plan
from pretrain.training.trainer import Trainer

TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3}


def tiny(rate: float, **settings: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return create_backbone(ModelConfig(name="vit_tiny_patch16_224", kwargs=TINY, **settings), drop_path=rate)


def test_uniform_rate_is_the_same_in_all_blocks() -> None:
    rates = [m.drop_prob for m in tiny(0.3, drop_path_uniform=True).modules() if isinstance(m, DropPath)]
    assert rates == [0.3] * 6


@pytest.mark.parametrize(("batch", "rate", "num"), [(8, 0.3, 5), (3, 0.5, 1), (2, 0.9, 1)])
def test_only_a_part_of_the_batch_goes_through_the_branch(batch: int, rate: float, num: int) -> None:
    x, seen = torch.randn(batch, 2, dtype=torch.float64), []

    def branch(part: torch.Tensor) -> torch.Tensor:
        seen.append(len(part))
        return 3 * part

    y = add_to_subset(x, branch, rate)
    changed = (y != x).any(1)
    assert seen == [num] and int(changed.sum()) == num
    torch.testing.assert_close(y[changed], x[changed] * (1 + 3 * batch / num))


def test_mean_over_the_draws_is_the_whole_residual() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 3, dtype=torch.float64)
    draws = torch.stack([add_to_subset(x, lambda part: part.square() - 1, 0.4) for _ in range(5000)])
    # One draw adds 2 f or nothing, each half of the time: the mean of 5000 is within 4 |f| / sqrt(5000).
    branch = x.square() - 1
    assert bool(((draws.mean(0) - x - branch).abs() < 4 * branch.abs() / 5000**0.5 + 1e-12).all())


def test_blocks_above_the_threshold_skip_samples_in_training_only() -> None:
    rising: Any = tiny(0.3, drop_path_subset=True).get_submodule("blocks")
    assert [type(block) is SubsetBlock for block in rising] == [False, True, True]  # rates 0, .15, .3
    backbone = tiny(0.3, drop_path_subset=True, drop_path_uniform=True)
    blocks: Any = backbone.get_submodule("blocks")
    sizes: list[int] = []
    blocks[2].mlp.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    x = torch.randn(10, 3, 16, 16)
    backbone.train()(x).sum().backward()
    backbone.eval()(x)
    assert sizes == [7, 10]
    plain = tiny(0.0).eval()
    plain.load_state_dict(backbone.state_dict())
    torch.testing.assert_close(backbone(x), plain(x))


def test_teacher_has_plain_blocks() -> None:
    backbone = tiny(0.0, drop_path_subset=True, drop_path_uniform=True)
    assert not any(isinstance(module, DropPath | SubsetBlock) for module in backbone.modules())


def test_other_backbones_are_refused() -> None:
    with pytest.raises(UsageError, match="need a plain ViT, found resnet18"):
        create_backbone(ModelConfig(name="resnet18", drop_path_uniform=True), drop_path=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rate_in_a_tensor_drops_and_scales_as_timms(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shared, x = SharedDropPath(0.25, torch.zeros(())), torch.ones(20_000, 2, 3, dtype=dtype)
    y = shared.train()(x)
    assert y.dtype == dtype and bool((y == y[:, :1, :1]).all())  # whole samples
    assert sorted(y.unique().tolist()) == pytest.approx([0, 4 / 3], rel=4e-3)
    assert (y[:, 0, 0] != 0).double().mean().item() == pytest.approx(0.75, abs=4 * (0.75 * 0.25 / 20_000) ** 0.5)
    assert shared.eval()(x) is x
    assert bool((SharedDropPath(0.0, torch.zeros(())).train()(x) == x).all())


def test_compiled_students_share_their_rates_and_others_are_as_they_were() -> None:
    def backbones(*overrides: str) -> tuple[torch.nn.Module, torch.nn.Module]:
        sizes = "model.kwargs={img_size: 16, patch_size: 4, embed_dim: 24, depth: 3, num_heads: 3}"
        recipe = resolve("dino", preset="digits", overrides=[sizes, "runtime.device=cpu", *overrides])
        method = Trainer(recipe, Runtime.start(recipe.runtime), Plan(70, 20)).method
        return method.student.backbone, method.teacher.backbone

    def rates(backbone: torch.nn.Module) -> list[float]:
        return [m.drop_prob for m in backbone.modules() if isinstance(m, SharedDropPath)]

    student, teacher = backbones("runtime.compile=true", "model.drop_path=0.2")
    assert rates(student) == pytest.approx([0, 0, 0.1, 0.1, 0.2, 0.2]) and rates(teacher) == []
    eager, _ = backbones("model.drop_path=0.2")
    assert rates(eager) == [] and eager.state_dict().keys() == student.state_dict().keys()
    assert rates(backbones("runtime.compile=true", "model.drop_path=0")[0]) == []


@pytest.mark.slow
def test_code_compiled_for_one_block_serves_blocks_of_every_rate() -> None:
    blocks: Any = create_backbone(
        ModelConfig(name="vit_tiny_patch16_224", kwargs={**TINY, "depth": 12}), drop_path=0.1
    ).get_submodule("blocks")
    share_rates(blocks)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    x = torch.randn(2, 17, 24)
    for block in blocks:
        block.compile(dynamic=False, backend="eager")
        x = block(x).detach()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
