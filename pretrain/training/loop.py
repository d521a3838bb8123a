"""THE training loop, one for every method. It knows no method, no MLflow and no suite: what happens to a metric or a
checkpoint is passed in.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from pretrain.data.loader import Loader
from pretrain.faults import out_of_memory_told, workers_told
from pretrain.models.backbones import create_backbone, patch_grid
from pretrain.training.checkpoints import CheckpointFolder
from pretrain.training.distributed import lost_ranks_told
from pretrain.training.meter import Meter, Outcome, Progress
from pretrain.training.recipe import Recipe
from pretrain.training.runtime import Runtime
from pretrain.training.schedules import Plan
from pretrain.training.stop import StopSignal
from pretrain.training.trainer import Trainer, local_batch_size
from pretrain.training.waits import BatchWaits

MEMORY_ADVICE = (
    "runtime.accumulate=2 halves the memory of a step and changes no result, runtime.checkpoint_activations=true and "
    "runtime.max_logits_bytes save more"
)
WORKER_ADVICE = "lower runtime.workers, or give the job more memory; --resume goes on from the last checkpoint"


def train(
    recipe: Recipe,
    *,
    folder: Path,
    resume: bool = False,
    log: Callable[[dict[str, float], int], None] = lambda metrics, step: None,
    on_checkpoint: Callable[[Path, int], None] = lambda path, step: None,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> Outcome:
    """Train a recipe in `folder` (checkpoints go to folder/checkpoints); with `resume`, from last.pt if it is there, or
    the newest whole checkpoint.

    Raises:
        DinobenchError: bad data, a checkpoint that does not fit, a loss or weights that are not finite, no memory, a
            killed worker, or a lost rank.
        CheckFailed: the targets or features collapsed and runtime.stop_on_collapse is set.
    """
    runtime = Runtime.start(recipe.runtime)
    with out_of_memory_told(f"on {runtime.device}", MEMORY_ADVICE):
        return _train(recipe, runtime, folder, resume, log, on_checkpoint, progress)


def _train(
    recipe: Recipe,
    runtime: Runtime,
    folder: Path,
    resume: bool,
    log: Callable[[dict[str, float], int], None],
    on_checkpoint: Callable[[Path, int], None],
    progress: Callable[[Progress], None],
) -> Outcome:
    local_batch_size(recipe.optim.batch_size, runtime.world_size, recipe.runtime.accumulate)
    loader = create_loader(recipe, runtime)
    plan = Plan(recipe.schedule.epochs, recipe.schedule.steps_per_epoch or loader.steps_per_epoch)
    trainer = Trainer(recipe, runtime, plan, images=loader.images)
    files = CheckpointFolder(folder / "checkpoints", recipe.checkpoint.keep, writes=runtime.is_main)
    start = files.resume_from() if resume else None
    first = trainer.restore(start) if start else 0
    waits = BatchWaits(loader)
    meter = Meter(trainer, plan, recipe, waits, log, progress)
    stop = StopSignal(runtime, recipe.runtime.max_minutes)

    with stop, lost_ranks_told(runtime.rank, runtime.world_size), workers_told(WORKER_ADVICE):
        batches = loader.batches(first)
        for step in range(first, plan.total_steps):
            trainer.step(waits.next(batches), step)  # without a name for the batch: its memory is free after the step
            done = step + 1
            logging = done % recipe.runtime.log_every == 0 or done == plan.total_steps
            meter.tick(step)
            if logging:
                meter.log(step)
            interrupted = stop.requested(logging)
            kept = done == plan.total_steps or done % (recipe.checkpoint.every_epochs * plan.steps_per_epoch) == 0
            every = recipe.checkpoint.every_steps
            if kept or interrupted or (every and done % every == 0):
                meter.refuse_non_finite()
                if kept:
                    log(meter.unique_prototypes(), done)  # before the file: a kill in between repeats it, not loses it
                files.write(trainer, done, kept=kept)
            if kept:
                on_checkpoint(files.path(done), done)
            if interrupted:
                return meter.outcome("interrupted", done, files.kept(), stop.name)
    if stop.name:  # told while the last checkpoint was written: what follows a finished training may take hours
        return meter.outcome("interrupted", plan.total_steps, files.kept(), stop.name)
    return meter.outcome("finished", plan.total_steps, files.kept(), meter.note)


def create_loader(recipe: Recipe, runtime: Runtime) -> Loader:
    """Views, and masks where the recipe has them, for this rank.

    Raises:
        DinobenchError: the data cannot be opened.
        UsageError: fewer images than a batch, or masks for a backbone without patches.
    """
    return Loader(
        recipe.data.open(),
        recipe.views,
        batch_size=recipe.optim.batch_size,
        seed=recipe.seed,
        rank=runtime.rank,
        world_size=runtime.world_size,
        workers=recipe.runtime.workers,
        device=runtime.device,
        masks=recipe.masks,
        grid=_patch_grid(recipe),
        cache=recipe.data.cache,
    )


def _patch_grid(recipe: Recipe) -> tuple[int, int] | None:
    """Rows and columns of patches of a global view, where patches are masked."""
    if recipe.masks.kind == "none":
        return None
    with torch.device("meta"):  # shapes only: no memory, no random numbers
        return patch_grid(create_backbone(recipe.model), recipe.views.global_size)
