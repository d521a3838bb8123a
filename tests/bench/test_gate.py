"""No gate, no number: a contestant that does another step is found out, whichever part of it differs."""

from __future__ import annotations

from functools import partial

import pytest
import torch

BATCH = 4


@pytest.fixture
def contestants(bench):
    """Makes ours at the smallest size, and a batch for it."""
    size, variant = bench("sizes").SIZES["tiny"], bench("variants").Variant()
    (batch, *_) = bench("sizes").random_batches(size.recipe(BATCH, "cpu", "fp32"), "cpu")

    def build(precision: str = "fp32"):
        return variant.build(size, BATCH, "cpu", precision, drop_path=0.0, compile=False)

    return build, batch


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_equals_itself_from_other_weights(bench, contestants, precision):
    build, batch = contestants
    expected = bench("gate").Expected.of(build(precision), batch)
    other = build(precision)
    for parameter in other.student.parameters():
        torch.nn.init.normal_(parameter)  # replaced by those of the first
    found = expected.check(other, precision)
    assert found["loss_difference"] == 0 and found["teacher_difference"] == 0
    assert found["gradient_cosine"] == pytest.approx(1)


def _wrong_loss(ours):
    loss = ours.method.loss
    ours.method.__dict__["loss"] = lambda *arguments: (loss(*arguments)[0] * 1.0001, {})


def _wrong_gradient(ours):
    ours.method.__dict__["before_update"] = lambda step: ours.student.backbone.cls_token.grad.normal_()


def _nan_gradient(ours):
    ours.method.__dict__["before_update"] = lambda step: ours.student.backbone.cls_token.grad.fill_(torch.nan)


def _missing_gradient(ours):
    ours.method.__dict__["before_update"] = lambda step: setattr(ours.student.backbone.cls_token, "grad", None)


def _wrong_teacher(ours):
    ours.method.__dict__["after_step"] = lambda step: ours.teacher.backbone.cls_token.data.add_(1e-5)


@pytest.mark.parametrize("fault", [_wrong_loss, _wrong_gradient, _nan_gradient, _missing_gradient, _wrong_teacher])
def test_another_step_gets_no_time(bench, contestants, fault):
    build, batch = contestants
    expected = bench("gate").Expected.of(build(), batch)
    other = build()
    fault(other)
    with pytest.raises(bench("gate").Unequal, match="nothing was timed"):
        expected.check(other, "fp32")


def test_weights_of_another_network_are_refused(bench, contestants):
    build, batch = contestants
    expected = bench("gate").Expected.of(build(), batch)
    expected.weights[0]["backbone.unknown"] = torch.zeros(1)
    with pytest.raises(bench("gate").Unequal, match="unknown"):
        expected.check(build(), "fp32")


@pytest.mark.slow
def test_every_variant_changes_what_it_says(bench):
    """One that no longer reaches the code it replaces would be timed as if it were the plain form."""
    variants, counts, size = bench("variants"), bench("counts"), bench("sizes").SIZES["tiny"]
    (batch, *_) = bench("sizes").random_batches(size.recipe(BATCH, "cpu", "fp32"), "cpu")

    def costs(name: str) -> tuple[int, int, float]:
        ours = variants.ABLATIONS[name].build(size, BATCH, "cpu", "fp32", drop_path=0.0, compile=False)
        ours.step(batch)
        once = partial(ours.step, batch)
        calls = counts.calls(once, "cpu")["operator_calls"]
        return calls, counts.host_syncs(once, "cpu"), bench("flops").counted(once)

    found = {name: costs(name) for name in variants.ABLATIONS}
    plain = found.pop("ours")
    assert plain[1] == 0
    assert all(other != plain for other in found.values()), found
    assert found["loss read every step"][1] == 1 and found["clipping tensor by tensor"][1] > 10
    assert found["last block whole"][2] > plain[2] and found["activations recomputed"][2] > plain[2]
