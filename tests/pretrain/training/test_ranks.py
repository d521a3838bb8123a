"""Several ranks train like one: two and four end at the same weights, and each other's checkpoints go on on any number.

The conditions are those under which a method is the same at any number of ranks: the same views and masks, drop path 0,
no BatchNorm, KoLeo over all images.
"""

from __future__ import annotations

import pytest
import torch

from pretrain.methods.method import method_names
from tests.pretrain.training.tiny import assert_equal, run_steps, tiny_recipe, tiny_trainer

METHODS = method_names()
FOUR_RANKS = ["dino", "dino_vmf", "ibot", "dinov2"]
EPOCH, STEPS = range(3), range(6)
CLOSE = {"rtol": 1e-6, "atol": 1e-8}


def _join(rank, size, folder):
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size, init_method=f"file://{folder}/group{size}")


def _rank_of_two(rank, folder):
    _join(rank, 2, folder)
    for method in METHODS:
        torch.save(run_steps(tiny_trainer(tiny_recipe(method), rank, 2), EPOCH), f"{folder}/{method}.2.{rank}.pt")
    torch.distributed.destroy_process_group()


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


def _start(function, ranks, tmp_path_factory):
    """A folder with what the ranks wrote; the processes start once for all methods."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(function, (folder,), nprocs=ranks)
    return folder


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return _start(_rank_of_two, 2, tmp_path_factory)


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory):
    return _start(_rank_of_four, 4, tmp_path_factory)


def _weights(folder, name):
    return torch.load(folder / f"{name}.pt", weights_only=True)


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_of_b_equal_one_rank_of_2b(method, two_ranks):
    alone = run_steps(tiny_trainer(tiny_recipe(method)), EPOCH)
    for rank in range(2):
        assert_equal(alone, _weights(two_ranks, f"{method}.2.{rank}"), **CLOSE)


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
