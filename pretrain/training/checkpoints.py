"""The checkpoint folder of a run: `last.pt`, from which it resumes, and the kept checkpoints, which are evaluated."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pretrain.training.trainer import Trainer

LAST = "last.pt"


class CheckpointFolder:
    """`last.pt`, from which a run resumes, and the kept `step=XXXXXXXX.pt`, which are evaluated."""

    def __init__(self, folder: Path, keep: int, *, writes: bool = True):
        self.folder, self.keep, self.writes = folder, keep, writes
        if writes:
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def last(self) -> Path:
        return self.folder / LAST

    def path(self, step: int) -> Path:
        return self.folder / f"step={step:08d}.pt"

    def kept(self) -> list[Path]:
        return sorted(self.folder.glob("step=*.pt"))

    def write(self, trainer: Trainer, step: int, *, kept: bool) -> None:
        """Write last.pt; a kept checkpoint is the same file under a second name. Only rank 0 writes."""
        if not self.writes:
            trainer.state(step)  # what is sharded is put together by all ranks
            return
        if not kept:
            trainer.save(self.last, step)
            return
        trainer.save(self.path(step), step)
        spare = self.folder / f".{LAST}.{os.getpid()}"
        try:
            os.link(self.path(step), spare)
        except OSError:  # a file system without hard links
            shutil.copyfile(self.path(step), spare)
        spare.replace(self.last)
        for old in self.kept()[: -self.keep]:
            old.unlink()
