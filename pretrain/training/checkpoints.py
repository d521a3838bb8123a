"""The checkpoint folder of a run: `last.pt`, from which it resumes, and the kept checkpoints, which are evaluated.

A checkpoint is removed only after a later one was written and read back whole, so there always is a good one.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from pretrain.errors import DinobenchError
from pretrain.models import checkpoint_file as checkpoint
from pretrain.models.file_checks import check_records
from pretrain.training.trainer import Trainer

LAST = "last.pt"


class CheckpointFolder:
    """`last.pt`, from which a run resumes, and the kept `step=XXXXXXXX.pt`, which are evaluated."""

    def __init__(self, folder: Path, keep: int = 1, *, writes: bool = True):
        self.folder, self.keep, self.writes = folder, keep, writes
        if writes:
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def last(self) -> Path:
        return self.folder / LAST

    def path(self, step: int) -> Path:
        return self.folder / f"step={step:08d}.pt"

    def kept(self) -> list[Path]:
        """The kept checkpoints, by step; a file of another name is not ours."""
        found = [path for path in self.folder.glob("step=*.pt") if re.fullmatch(r"step=\d+", path.stem)]
        return sorted(found, key=_step)

    def resume_from(self) -> Path | None:
        """last.pt, or the newest kept checkpoint where it is damaged or gone; None where there is no checkpoint.

        Raises:
            DinobenchError: there are checkpoints, and all of them are damaged.
        """
        damages = []
        for path in (self.last, *reversed(self.kept())):
            if path.is_file():
                if not (damage := damage_of(path)):
                    return path
                damages.append(damage)
        if not damages:
            return None
        raise DinobenchError(
            f"no checkpoint in {self.folder} can be resumed from: {'; '.join(damages)}. Put a copy back, or start "
            "another run with --new"
        )

    def write(self, trainer: Trainer, step: int, *, kept: bool) -> None:
        """Write last.pt; a kept checkpoint is the same file under a second name. Only rank 0 writes."""
        if not self.writes:
            trainer.state(step)  # what is sharded is put together by all ranks
            return
        if not kept:
            trainer.save(self.last, step)
            return
        trainer.save(self.path(step), step)
        check_records(self.path(step))  # before anything older goes
        try:
            self._also_last(self.path(step))
            # Later ones are of a start that had come further; a damaged one among them must not displace a good one.
            for old in [path for path in self.kept() if _step(path) <= step][: -self.keep]:
                old.unlink(missing_ok=True)  # someone may tidy up too
        except OSError as error:
            raise checkpoint.not_writable(self.last, error) from error

    def _also_last(self, kept: Path) -> None:
        """Give a kept checkpoint the second name last.pt."""
        spare = self.folder / f".{LAST}.spare"
        # what a killed process left is a second name of an older checkpoint: to copy into it would overwrite that one
        spare.unlink(missing_ok=True)
        try:
            os.link(kept, spare)
        except OSError:  # a file system without hard links
            try:
                shutil.copyfile(kept, spare)
            except OSError:
                spare.unlink(missing_ok=True)
                raise
        spare.replace(self.last)


def damage_of(path: Path) -> str:
    """What is wrong with a checkpoint of ours; empty for a whole one. Nothing of it is loaded."""
    try:
        check_records(path)
    except DinobenchError as error:
        return str(error)
    return ""


def _step(kept: Path) -> int:
    return int(kept.stem.partition("=")[2])
