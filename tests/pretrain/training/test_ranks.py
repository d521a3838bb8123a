"""Several ranks train like one: two and four end at the same weights, and each other's checkpoints go on on any number.

The conditions are those under which a method is the same at any number of ranks: the same views and masks, drop path 0,
no BatchNorm, KoLeo over all images.
"""

from __future__ import annotations

import pytest
import torch

from pretrain.errors import UsageError
from pretrain.methods.method import method_names
from pretrain.models import checkpoint
from pretrain.training.sharding import local_part, refuse_unshardable
from tests.pretrain.training.tiny import assert_equal, run_steps, tiny_recipe, tiny_trainer

METHODS = method_names()
FOUR_RANKS = ["dino", "dino_vmf", "ibot", "dinov2"]
EPOCH, STEPS = range(3), range(6)
CLOSE = {"rtol": 1e-6, "atol": 1e-8}
SHARDED = ["dino_vmf", "ibot", "dinov2"]  # clipping each tensor or each module, a mask token, Sinkhorn-Knopp
COMPRESSED = ("dino_vmf", "optim.clip=0")


def _join(rank, size, folder):
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size, init_method=f"file://{folder}/group{size}")


def _rank_of_two(rank, folder):
    _join(rank, 2, folder)
    for method in METHODS:
        torch.save(run_steps(tiny_trainer(tiny_recipe(method), rank, 2), EPOCH), f"{folder}/{method}.2.{rank}.pt")
    parts = tiny_trainer(tiny_recipe("dino_vmf", "runtime.accumulate=2"), rank, 2)
    torch.save(run_steps(parts, EPOCH), f"{folder}/parts.{rank}.pt")
    compressed = tiny_trainer(tiny_recipe(*COMPRESSED, "runtime.gradient_compression=bf16"), rank, 2)
    torch.save(_gradient(compressed), f"{folder}/bf16.{rank}.pt")
    for method in SHARDED:
        _train_sharded(method, rank, folder)
    torch.distributed.destroy_process_group()


def _train_sharded(method, rank, folder):
    """Train for an epoch, write a checkpoint, and let other trainers of it train for another."""
    recipe = tiny_recipe(method, "runtime.sharding=fsdp", "runtime.accumulate=2" if method == "ibot" else "seed=0")
    trainer = tiny_trainer(recipe, rank, 2)
    run_steps(trainer, EPOCH)
    _save(trainer, folder / f"{method}.sharded", len(EPOCH))
    resumed = tiny_trainer(recipe, rank, 2)
    first = resumed.restore(folder / f"{method}.sharded")
    run_steps(resumed, STEPS[first:])
    _save(resumed, folder / f"{method}.sharded.more", len(STEPS))
    backbone = list(trainer.method.student.backbone.parameters())
    share = sum(local_part(p).numel() for p in backbone) / sum(p.numel() for p in backbone)
    torch.save(torch.tensor(share), f"{folder}/{method}.share.{rank}.pt")


def _save(trainer, path, step):
    """As the loop does: rank 0 writes, the others give their parts."""
    if trainer.runtime.is_main:
        trainer.save(path, step)
    else:
        trainer.state(step)
    torch.distributed.barrier()


def _gradient(trainer):
    run_steps(trainer, range(1))
    return {name: p.grad.clone() for name, p in trainer.method.student.named_parameters()}


def _rank_of_four(rank, folder):
    """Four ranks train, write a checkpoint and train on; then two of them start from that checkpoint."""
    _join(rank, 4, folder)
    for method in FOUR_RANKS:
        trainer = tiny_trainer(tiny_recipe(method), rank, 4)
        torch.save(run_steps(trainer, EPOCH), f"{folder}/{method}.4.{rank}.pt")
        if rank == 0:
            trainer.save(folder / f"{method}.ckpt", len(EPOCH))
        torch.save(run_steps(trainer, STEPS[len(EPOCH) :]), f"{folder}/{method}.4.more.{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    if rank >= 2:
        return
    _join(rank, 2, folder)
    for method in FOUR_RANKS:
        trainer = tiny_trainer(tiny_recipe(method), rank, 2)
        first = trainer.restore(folder / f"{method}.ckpt")
        torch.save(run_steps(trainer, STEPS[first:]), f"{folder}/{method}.2.resumed.{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, start_ranks):
    """A folder with what the ranks wrote; the processes start once for all methods."""
    folder = tmp_path_factory.mktemp("ranks")
    start_ranks(_rank_of_two, folder)
    return folder


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory, start_ranks):
    folder = tmp_path_factory.mktemp("ranks")
    start_ranks(_rank_of_four, folder, ranks=4)
    return folder


def _weights(folder, name):
    return torch.load(folder / f"{name}.pt", weights_only=True)


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_of_b_equal_one_rank_of_2b(method, two_ranks):
    alone = run_steps(tiny_trainer(tiny_recipe(method)), EPOCH)
    for rank in range(2):
        assert_equal(alone, _weights(two_ranks, f"{method}.2.{rank}"), **CLOSE)


def test_micro_batches_on_two_ranks_equal_one_batch_on_one(two_ranks):
    alone = run_steps(tiny_trainer(tiny_recipe("dino_vmf")), EPOCH)
    for rank in range(2):
        assert_equal(alone, _weights(two_ranks, f"parts.{rank}"), **CLOSE)


def test_compressed_gradients_are_those_of_one_rank_up_to_the_rounding_of_bf16(two_ranks):
    exact = _gradient(tiny_trainer(tiny_recipe(*COMPRESSED)))
    first, second = (_weights(two_ranks, f"bf16.{rank}") for rank in range(2))
    assert_equal(first, second, rtol=0, atol=0)
    difference, size = (
        torch.cat([tensor.flatten() for tensor in tensors]).norm()
        for tensors in ([first[name] - exact[name] for name in exact], exact.values())
    )
    # three roundings of at most 2^-9 each: both ranks' gradients and their sum
    assert 2**-12 < difference / size < 2**-7


def _saved(path):
    payload = checkpoint.read(path)
    networks = {f"{net}.{name}": value for net in ("student", "teacher") for name, value in payload[net].items()}
    return {name: value for name, value in {**networks, **payload["target"]}.items() if "health" not in name}


@pytest.mark.parametrize("method", SHARDED)
def test_sharded_backbones_train_like_whole_ones_and_their_checkpoint_goes_on_without_sharding(method, two_ranks):
    alone = tiny_trainer(tiny_recipe(method))
    assert_equal(run_steps(alone, EPOCH), _saved(two_ranks / f"{method}.sharded"), **CLOSE)
    unsharded = tiny_trainer(tiny_recipe(method))
    assert unsharded.restore(two_ranks / f"{method}.sharded") == len(EPOCH)
    straight = run_steps(alone, STEPS[len(EPOCH) :])
    assert_equal(straight, run_steps(unsharded, STEPS[len(EPOCH) :]), **CLOSE)
    assert_equal(straight, _saved(two_ranks / f"{method}.sharded.more"), **CLOSE)


@pytest.mark.parametrize("method", SHARDED)
def test_a_rank_holds_its_share_of_a_sharded_backbone(method, two_ranks):
    shares = [float(_weights(two_ranks, f"{method}.share.{rank}")) for rank in range(2)]
    assert sum(shares) == pytest.approx(1) and max(shares) < 0.6


@pytest.mark.parametrize(
    ("method", "override", "message"),
    [
        ("dino", "optim.name=lars", "optim.name=lars.*use adamw"),
        ("dinov2", "regularizer.gram=1", "regularizer.gram"),
        ("dino", "runtime.gradient_compression=bf16", "set it to none"),
    ],
)
def test_what_cannot_be_sharded_is_told(method, override, message):
    with pytest.raises(UsageError, match=message):
        refuse_unshardable(tiny_recipe(method, "runtime.sharding=fsdp", override))


@pytest.mark.slow
@pytest.mark.parametrize("method", FOUR_RANKS)
def test_four_ranks_of_b_equal_one_rank_of_4b(method, four_ranks):
    alone = run_steps(tiny_trainer(tiny_recipe(method)), EPOCH)
    for rank in range(4):
        assert_equal(alone, _weights(four_ranks, f"{method}.4.{rank}"), **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("method", FOUR_RANKS)
def test_a_checkpoint_of_four_ranks_goes_on_on_one_and_on_two(method, four_ranks):
    straight = _weights(four_ranks, f"{method}.4.more.0")
    assert_equal(run_steps(tiny_trainer(tiny_recipe(method)), STEPS), straight, **CLOSE)
    trainer = tiny_trainer(tiny_recipe(method))
    assert trainer.restore(four_ranks / f"{method}.ckpt") == len(EPOCH)
    assert_equal(straight, run_steps(trainer, STEPS[len(EPOCH) :]), **CLOSE)
    for rank in range(2):
        assert_equal(straight, _weights(four_ranks, f"{method}.2.resumed.{rank}"), **CLOSE)
