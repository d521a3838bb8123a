"""The FLOPs behind MFU: those of PERFORMANCE.md's table, and those torch counts in the real step."""

from __future__ import annotations

from unittest import mock

import pytest

TABLE = {
    ("vits16", 8): 113.8,
    ("vits16", 10): 123.8,
    ("vitb16", 8): 435.6,
    ("vitb16", 10): 474.1,
}
"""GFLOP of an image with two global and so many local crops."""


@pytest.mark.parametrize(("size", "num_local"), TABLE)
def test_an_image_has_the_flops_of_the_table(bench, size, num_local):
    recipe = bench("sizes").SIZES[size].recipe(64, "cpu", "fp32", [f"views.local={num_local}"])
    assert bench("flops").per_image(recipe) / 1e9 == pytest.approx(TABLE[size, num_local], rel=0.002)


@pytest.fixture
def no_computing():
    """Tensors without values, so that a step of a ViT-B takes seconds; what reads values at the start is left out."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # seconds to import

    with (
        mock.patch(
            "timm.models.vision_transformer.calculate_drop_path_rates", lambda rate, depth, *_, **__: [0.0] * depth
        ),
        mock.patch("torch.nn.init.trunc_normal_", lambda tensor, *_, **__: tensor),
        mock.patch("torch.nn.Module.to", lambda module, *_, **__: module),
        FakeTensorMode(),
    ):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("size", ["vits16", "vitb16"])
def test_torch_counts_the_same_in_a_step_that_saves_nothing(bench, no_computing, size):
    variants, sizes, flops = bench("variants"), bench("sizes").SIZES, bench("flops")
    recipe = sizes[size].recipe(2, "cpu", "fp32")
    (batch, *_) = bench("sizes").random_batches(recipe, "cpu")

    def counted(name: str) -> float:
        ours = variants.ABLATIONS[name].build(sizes[size], 2, "cpu", "fp32", drop_path=0.0, compile=False)
        return flops.counted(lambda: ours.step(batch)) / 2

    assert counted("last block whole") == pytest.approx(flops.per_image(recipe), rel=0.01)
    # The last block for its CLS token alone saves 10 of its 12 D^2 per token.
    assert counted("ours") == pytest.approx(flops.per_image(recipe) * (1 - 10 / 12 / 12), rel=0.015)


def test_mfu_is_the_useful_share_of_the_ceiling(bench):
    assert bench("flops").mfu(2650, 123.8e9, 790e12) == pytest.approx(0.415, abs=0.001)
