"""`torchrun --no-python dinobench pretrain` when a rank is lost: the others say so and end, they do not wait on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dinobench.files import read_json
from pretrain.models import checkpoint

pytestmark = pytest.mark.slow
RANKS = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "--no-python")
LOSE = """
import os, pathlib, signal, time
from pretrain.training.trainer import Trainer
def lose_rank(self, batch, step, train=Trainer.step):
    if step == 3 and self.runtime.rank == {rank}:
        pathlib.Path({folder!r}, "lost").touch()
        {how}
    train(self, batch, step)
Trainer.step = lose_rank
from dinobench.cli.app import main
main()
"""
ARGUMENTS = (
    *("pretrain", "dino", "--no-eval", "schedule.epochs=2", "schedule.warmup_epochs=0", "head.num_prototypes=32"),
    *("tracking.enabled=false", "runtime.device=cpu", "checkpoint.every_steps=1", "optim.batch_size=16"),
    *(
        "model.kwargs={img_size: 16, patch_size: 8, embed_dim: 24, depth: 1, num_heads: 2}",
        "schedule.steps_per_epoch=5",
    ),
)


@pytest.mark.promise("a rank killed or hanging under torchrun", "the others stop with a message; resumable")
@pytest.mark.parametrize(
    ("rank", "how", "options"),
    [
        (1, "os.kill(os.getpid(), signal.SIGKILL)", []),
        (0, "os.kill(os.getpid(), signal.SIGKILL)", []),
        (1, "time.sleep(1000)", ["runtime.rank_timeout_seconds=10"]),
    ],
    ids=["rank 1 dies", "rank 0 dies", "rank 1 hangs"],
)
def test_a_lost_rank_ends_the_others_with_a_message(rank: int, how: str, options: list[str], tmp_path: Path) -> None:
    code = LOSE.format(rank=rank, folder=str(tmp_path), how=how)
    command = [*RANKS, sys.executable, "-c", code, *ARGUMENTS, *options, "--output", str(tmp_path / "runs")]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=400)
    # torchrun gives a process that does not end by itself 30 seconds
    assert time.time() - (tmp_path / "lost").stat().st_mtime < 90
    assert done.returncode != 0
    assert f"rank {1 - rank} of 2 lost another rank" in done.stderr, done.stderr
    (run,) = (tmp_path / "runs").glob("*/recipe.yaml")
    assert checkpoint.read(run.parent / "checkpoints" / "last.pt")["step"] == 3
    if rank == 1:
        assert "lost another rank" in read_json(run.parent / "run.json")["note"]
