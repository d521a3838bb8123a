"""The loss some rows at a time: equal to the loss of all rows at once, in memory that the rows do not raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from pretrain.data.loader import Batch
from pretrain.data.masks import Masks, MaskSampler
from pretrain.models.network import Outputs
from pretrain.objectives.chunks import num_rows, sum_over_chunks
from pretrain.training.recipe import resolve
from pretrain.training.runtime import Runtime
from pretrain.training.schedules import Plan
from pretrain.training.trainer import Trainer

PROTOTYPES = 12
BATCH = 7
"""No multiple of the images of a chunk: the last one is smaller."""
TINY = [
    "head.hidden=16",
    "head.bottleneck=16",
    "optim.batch_size=7",
    "optim.freeze_last_layer_epochs=0",
    "schedule.epochs=2",
    "schedule.warmup_epochs=0",
    "runtime.device=cpu",
    "model.kwargs={img_size: 16, patch_size: 4, embed_dim: 24, depth: 1, num_heads: 2}",
    "model.drop_path=0",
]


def _trainer(method, max_bytes, *overrides, precision="fp64"):
    limit = f"runtime.max_logits_bytes={'null' if max_bytes is None else max_bytes}"
    sizes = [*TINY, f"head.num_prototypes={PROTOTYPES}"]
    recipe = resolve(method, preset="digits", overrides=[*sizes, f"runtime.precision={precision}", limit, *overrides])
    return Trainer(recipe, Runtime.start(recipe.runtime), Plan(2, 3))


def _batch(trainer, step):
    recipe, generator = trainer.recipe, torch.Generator().manual_seed(step)
    views = [torch.randn(BATCH, 3, v.size, v.size, generator=generator) for v in recipe.views.views]
    index, masks = torch.arange(BATCH), None
    if recipe.masks.kind != "none":
        masks = MaskSampler(recipe.masks, (4, 4), seed=0)(index, 0, step=step, first=0, batch_size=BATCH)
    return Batch(views, index, 0, masks)


def _state(trainer, steps=2):
    """Losses, last gradients, and all that two steps leave behind: weights, centres, health."""
    found: dict[str, torch.Tensor] = {}
    for step in range(steps):
        trainer.step(_batch(trainer, step), step)
        found[f"loss {step}"] = trainer.method.health.sum_loss.clone()
    found |= {f"grad {n}": p.grad for n, p in trainer.method.student.named_parameters() if p.grad is not None}
    state = trainer.method.state_dict()
    found |= {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    found["features"] = trainer.method.health.features
    return found


def _assert_equal_steps(method, max_bytes, *overrides, monkeypatch, precision="fp64", **tolerance):
    calls = []
    for module in ("dino", "ibot"):
        monkeypatch.setattr(
            f"pretrain.methods.{module}.sum_over_chunks",
            lambda loss, z, vectors, rows: calls.append(rows) or sum_over_chunks(loss, z, vectors, rows),
        )
    plain = _state(_trainer(method, None, *overrides, precision=precision))
    assert not calls
    chunked = _state(_trainer(method, max_bytes, *overrides, precision=precision))
    assert calls
    assert plain.keys() == chunked.keys()
    for name, value in plain.items():
        torch.testing.assert_close(chunked[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)
    return calls


@pytest.mark.parametrize("centring", ["logit", "prob_logmean_ema", "prob_ema_log", "none"])
@pytest.mark.parametrize("normaliser", ["none", "vmf", "vmf_leading"])
@pytest.mark.parametrize("prototypes", ["cosine", "weight_norm", "free"])
def test_every_prototype_normaliser_and_centring_trains_the_same(prototypes, normaliser, centring, monkeypatch):
    settings = [f"head.prototypes={prototypes}", f"head.normaliser={normaliser}", f"target.centring={centring}"]
    calls = _assert_equal_steps("dino", 4000, *settings, monkeypatch=monkeypatch, rtol=1e-9, atol=1e-10)
    assert 1 < calls[0] < BATCH and BATCH % calls[0]


@pytest.mark.parametrize("centring", ["logit", "prob_logmean_ema", "none"])
@pytest.mark.parametrize("tokens", ["all", "masked"])
@pytest.mark.parametrize("head", ["shared", "separate"])
def test_the_patch_loss_trains_the_same(head, tokens, centring, monkeypatch):
    settings = [f"patch.head={head}", f"patch.center_tokens={tokens}", f"patch.centring={centring}"]
    calls = _assert_equal_steps("ibot_vmf", 1200, *settings, monkeypatch=monkeypatch, rtol=1e-9, atol=1e-10)
    assert calls[:2] == [1, 3]  # images, patches


@pytest.mark.parametrize(
    ("method", "setting"),
    [
        ("mean_teacher", "target.centring=logit"),
        ("msn", "target.centring=none"),
        ("swav", "target.centring=none"),
        ("dino", "teacher.kind=none"),
        ("dino", "objective.predictor=true"),
        ("dino_koleo_proto", "regularizer.mean_entropy=1.0"),
    ],
)
def test_every_loss_and_regulariser_trains_the_same(method, setting, monkeypatch):
    _assert_equal_steps(method, 1000, setting, monkeypatch=monkeypatch, rtol=1e-9, atol=1e-10)


def test_micro_batches_of_one_image_have_nothing_to_split():
    whole, parts = (_state(_trainer("dino", limit, "runtime.accumulate=7")) for limit in (None, 1))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def _keep_weights(monkeypatch):
    """Rates of 0: an update of AdamW would make a step of the rounding of a gradient that is 0."""
    monkeypatch.setattr("pretrain.training.optim.set_rates", lambda *arguments, **options: None)
    return "optim.name=sgd"


@pytest.mark.parametrize("method", ["dino", "dino_vmf", "ibot_vmf"])
def test_in_float32_the_difference_is_rounding(method, monkeypatch):
    setting = _keep_weights(monkeypatch)
    _assert_equal_steps(method, 2000, setting, monkeypatch=monkeypatch, precision="fp32", rtol=1e-5, atol=2e-6)


def test_under_bfloat16_autocast_the_difference_is_rounding(monkeypatch):
    setting = _keep_weights(monkeypatch)
    _assert_equal_steps("dino_vmf", 2000, setting, monkeypatch=monkeypatch, precision="bf16", rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("centring", ["sinkhorn", "softmax_batch"])
def test_targets_that_couple_the_images_are_made_at_once(centring, monkeypatch):
    monkeypatch.setattr("pretrain.methods.dino.sum_over_chunks", None)  # not called
    setting = f"target.centring={centring}"
    plain, limited = (_state(_trainer("dino", limit, setting)) for limit in (None, 1))
    assert all(torch.equal(value, limited[name]) for name, value in plain.items())


def test_a_limit_that_holds_the_batch_changes_no_bit():
    plain, limited = (_state(_trainer("ibot", limit)) for limit in (None, 1 << 30))
    assert all(torch.equal(value, limited[name]) for name, value in plain.items())


def test_without_any_row_the_sum_has_a_graph_and_zero_gradients():
    z, vectors = torch.zeros(0, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    total = sum_over_chunks(lambda z, w, rows: (z @ w.T).sum(), z, vectors, 2)
    gradients = torch.autograd.grad(total, (z, vectors))
    assert total == 0 and not any(gradient.any() for gradient in gradients)


def test_the_gradient_of_a_sum_over_chunks_passes_gradcheck():
    z = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    vectors = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    scale = torch.arange(1.0, 6.0, dtype=torch.float64)

    def loss(z, w, rows):
        return ((z @ w.T).logsumexp(-1) * scale[rows]).sum()

    assert torch.autograd.gradcheck(lambda z, w: 3 * sum_over_chunks(loss, z, w, 2), (z, vectors))


def test_a_row_that_does_not_fit_is_formed_alone():
    assert [num_rows(limit, 10) for limit in (1, 10, 25)] == [1, 1, 2]


def _peak_bytes(work: Callable[[], Any]) -> int:
    """The most memory that tensors made by `work` took at a time: every allocation and release of the CPU, counted."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    assert profiler.profiler is not None
    changes = []

    def collect(events):
        for event in events:
            if event.tag.name == "Allocation":
                changes.append((event.start_time_ns, event.extra_fields.alloc_size))
            collect(event.children)

    collect(profiler.profiler.kineto_results.experimental_event_tree())
    held = peak = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        held += size
        peak = max(peak, held)
    return peak


LARGE, DIM = 16384, 16
FOUR_ROWS = 4 * 4 * LARGE
"""Bytes of four rows of logits."""


def _loss_peak(images, max_bytes, *overrides, method="dino", views=8):
    """Peak memory of the loss, forward and backward, of `images` images at K = 16384, above the inputs."""
    limit = f"runtime.max_logits_bytes={'null' if max_bytes is None else max_bytes}"
    settings = [*TINY, f"head.num_prototypes={LARGE}", "runtime.precision=fp32", limit, *overrides]
    recipe = resolve(method, preset="digits", overrides=settings)
    trainer = Trainer(recipe, Runtime.start(recipe.runtime), Plan(2, 3))
    module, generator = trainer.method, torch.Generator().manual_seed(0)

    def rows(*shape):
        return torch.nn.functional.normalize(torch.randn(*shape, DIM, generator=generator), dim=-1)

    def work():
        student = Outputs(rows(views, images), rows(views, images).requires_grad_(), vectors)
        teacher = Outputs(rows(2, images), rows(2, images), vectors.detach())
        module.image_term(student, teacher, 0).backward()

    with torch.no_grad():
        vectors = module.student.head.last_layer.vectors().clone()
    vectors.requires_grad_()
    return _peak_bytes(work)


@pytest.mark.parametrize(("method", "views"), [("dino", 2), ("dino", 8), ("dino_vmf", 8), ("mean_teacher", 2)])
def test_peak_memory_follows_the_limit_and_not_batch_times_views_times_prototypes(method, views):
    fixed = _loss_peak(16, 1, method=method, views=views)  # one image, and gradients of the size of W
    for limit in (12 * FOUR_ROWS, 24 * FOUR_ROWS):
        small, large = (_loss_peak(images, limit, method=method, views=views) for images in (16, 32))
        assert abs(large - small) < FOUR_ROWS
        assert large <= fixed + limit
    plain = [_loss_peak(images, None, method=method, views=views) for images in (16, 32)]
    assert plain[1] > plain[0] + 2 * 16 * LARGE * 4  # at least the teacher's probabilities of 16 more images


@pytest.mark.parametrize("centring", ["logit", "prob_logmean_ema"])
def test_the_limit_is_used_and_not_only_kept(centring):
    peaks = [_loss_peak(48, limit * FOUR_ROWS, f"target.centring={centring}", views=2) for limit in (12, 24, 48)]
    assert peaks[1] - peaks[0] > 4 * FOUR_ROWS and peaks[2] - peaks[1] > 16 * FOUR_ROWS


def _patch_loss_peak(patches, max_bytes, *overrides):
    """As `_loss_peak`, of masked patches: a tenth of all, which move the centre too."""
    settings = [*TINY, f"head.num_prototypes={LARGE}", "runtime.precision=fp32", *overrides]
    limit = f"runtime.max_logits_bytes={'null' if max_bytes is None else max_bytes}"
    recipe = resolve("ibot", preset="digits", overrides=[*settings, limit])
    method = Trainer(recipe, Runtime.start(recipe.runtime), Plan(2, 3)).method
    mask = torch.zeros(2, 1, 5 * patches, dtype=torch.bool)
    mask[..., ::10] = True
    masks, generator = Masks.of(mask), torch.Generator().manual_seed(0)
    vectors = method.student.head.last_layer.vectors().detach().requires_grad_()

    def rows(number):
        return torch.nn.functional.normalize(torch.randn(number, DIM, generator=generator), dim=-1)

    def work():
        student = Outputs(rows(1), rows(1), None, None, rows(patches).requires_grad_(), vectors)
        teacher = Outputs(rows(1), rows(1), None, None, rows(10 * patches), vectors.detach())
        method.patch_term(student, teacher, masks, 0).backward()

    return _peak_bytes(work)


@pytest.mark.parametrize("centring", ["logit", "prob_logmean_ema"])
def test_peak_memory_of_the_patch_loss_follows_the_limit(centring):
    setting = f"patch.centring={centring}"
    fixed = _patch_loss_peak(30, 1, setting)
    for limit in (8 * FOUR_ROWS, 16 * FOUR_ROWS):
        small, large = (_patch_loss_peak(patches, limit, setting) for patches in (30, 60))
        assert abs(large - small) < FOUR_ROWS
        assert large <= fixed + limit
    plain = [_patch_loss_peak(patches, None, setting) for patches in (800, 1200)]
    assert plain[1] > plain[0] + 400 * LARGE * 4  # at least the teacher's probabilities
