"""SwAV: swapped prediction with codes from Sinkhorn-Knopp, and the queue on resume and two ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pretrain.data.loader import Batch
from pretrain.errors import UsageError
from pretrain.training.recipe import resolve
from pretrain.training.runtime import Runtime
from pretrain.training.schedules import Plan
from pretrain.training.trainer import Trainer

TINY = [
    "head.batch_norm=false",
    "head.hidden=16",
    "head.bottleneck=8",
    "head.num_prototypes=12",
    "target.temperature=0.05",
    "optim.batch_size=8",
    "optim.freeze_last_layer_epochs=0",
    "schedule.epochs=2",
    "schedule.warmup_epochs=0",
    "runtime.precision=fp64",
    "runtime.device=cpu",
    "model.kwargs={img_size: 16, patch_size: 4, embed_dim: 24, depth: 1, num_heads: 2}",
]
QUEUE = ["method.parameters.queue_length=16", "method.parameters.queue_start_epoch=1"]
TAU, EPSILON = 0.1, 0.05


def _trainer(*overrides, runtime=None):
    recipe = resolve("swav", preset="digits", overrides=[*TINY, *overrides])
    return Trainer(recipe, runtime or Runtime.start(recipe.runtime), Plan(4, 2))


def _batch(step=0, rows=slice(None)):
    generator = torch.Generator().manual_seed(step)
    views = [torch.randn(8, 3, s, s, generator=generator, dtype=torch.float64)[rows] for s in (16, 16, 8, 8)]
    return Batch(views, torch.arange(8)[rows], 0)


def _outputs(method, batch):
    with torch.no_grad():
        outputs = method.student(batch.views)
    return outputs.z.numpy(), outputs.vectors.numpy()


def _codes(rows, prototypes):
    """Sinkhorn-Knopp of the paper's appendix: Q [K, R] with marginals 1/K and 1/R, three times."""
    scores = np.exp(rows @ prototypes.T / EPSILON).T
    q = scores / scores.sum()
    for _ in range(3):
        q = q / q.sum(1, keepdims=True) / len(prototypes)
        q = q / q.sum(0, keepdims=True) / len(rows)
    return (q * len(rows)).T


def _swapped_prediction(z, prototypes, past=((), ())):
    """Codes of each global view, balanced with its past rows, against the predictions of every other view."""
    terms = []
    for g in range(2):
        rows = np.concatenate([z[g], *past[g]])
        codes = _codes(rows, prototypes)[: len(z[g])]
        for v in range(len(z)):
            if v != g:
                scores = np.exp(z[v] @ prototypes.T / TAU)
                prediction = scores / scores.sum(1, keepdims=True)
                terms += [-np.sum(code * np.log(q)) for code, q in zip(codes, prediction, strict=True)]
    return np.mean(terms)


def test_loss_is_the_swapped_prediction_of_all_pairs():
    method, batch = _trainer().method, _batch()
    loss, _ = method.loss(batch, 0)
    np.testing.assert_allclose(loss.item(), _swapped_prediction(*_outputs(method, batch)), rtol=1e-10)


def test_codes_carry_no_gradient():
    method, batch = _trainer().method, _batch()
    with torch.no_grad():
        codes = method.image_targets(method.student(batch.views[:2]), 0)
    loss, _ = method.loss(batch, 0)
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in method.student.named_parameters()}
    method.student.zero_grad()
    outputs = method.student(batch.views)
    predictions = (outputs.z @ outputs.vectors.T / TAU).log_softmax(-1)
    pairs = [-(codes[g] * predictions[v]).sum(1).mean() for g in range(2) for v in range(4) if v != g]
    torch.stack(pairs).mean().backward()
    assert method.teacher is method.student
    for name, parameter in method.student.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-8, atol=1e-12)


def test_the_queue_fills_from_its_epoch_on_and_then_joins_the_rows():
    trainer = _trainer(*QUEUE)  # two steps an epoch: rows enter at steps 2 and 3, the queue is full at step 4
    past = []
    for step in range(6):
        z, prototypes = _outputs(trainer.method, _batch(step))
        used = past[:2] if step >= 4 else []
        expected = _swapped_prediction(z, prototypes, [[rows[g] for rows in used] for g in range(2)])
        trainer.step(_batch(step), step)
        loss = float(trainer.method.health.sum_loss)
        trainer.method.health.sum_loss.zero_()
        np.testing.assert_allclose(loss, expected, rtol=1e-10, err_msg=f"step {step}")
        if step >= 2:
            past = [z[:2], *past]
    np.testing.assert_allclose(trainer.method.queue.numpy(), np.concatenate(past[:2], axis=1), rtol=1e-12)


def _queue_after_an_epoch(*overrides):
    trainer = _trainer(*QUEUE, *overrides)
    for step in range(2, 4):
        trainer.step(_batch(step), step)
    return trainer.method.queue


def test_micro_batches_put_the_same_rows_into_the_queue():
    # Each micro-batch is balanced by itself: with any learning rate the weights, and with them the rows, would differ.
    frozen = ("optim.lr=0", "optim.min_lr=0")
    whole, parts = _queue_after_an_epoch(*frozen), _queue_after_an_epoch(*frozen, "runtime.accumulate=2")
    torch.testing.assert_close(whole, parts)
    assert whole.norm() > 0


def test_resuming_keeps_the_queue(tmp_path):
    straight, first, second = (_trainer(*QUEUE) for _ in range(3))
    for step in range(7):
        straight.step(_batch(step), step)
    for step in range(5):
        first.step(_batch(step), step)
    first.save(tmp_path / "last.pt", 5)
    for step in range(second.restore(tmp_path / "last.pt"), 7):
        second.step(_batch(step), step)
    torch.testing.assert_close(second.method.state_dict(), straight.method.state_dict(), rtol=0, atol=0)


def _state(trainer, rows=slice(None)):
    for step in range(6):
        trainer.step(_batch(step, rows), step)
    return {name: value.clone() for name, value in trainer.method.state_dict().items() if "health" not in name}


def _rank_of_two(rank, folder):
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/group")
    trainer = _trainer(*QUEUE, runtime=Runtime(torch.device("cpu"), "fp64", rank, 2))
    torch.save(_state(trainer, slice(4 * rank, 4 * rank + 4)), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_share_one_queue(tmp_path, start_ranks):
    start_ranks(_rank_of_two, str(tmp_path))
    alone = _state(_trainer(*QUEUE))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found, alone, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("overrides", "advice"),
    [
        (["method.parameters.queue_length=12"], "for example 16"),
        ([*QUEUE, "target.centring=logit"], r"target\.centring=logit: set it to sinkhorn"),
        (["head.num_prototypes=0"], r"head\.num_prototypes"),
    ],
)
def test_what_it_cannot_use_is_refused_with_advice(overrides, advice):
    with pytest.raises(UsageError, match=advice):
        _trainer(*overrides)
