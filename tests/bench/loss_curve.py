"""The loss curve of the optimised training beside that of the plain one: one seed, the same batches, 2,000 steps.

    DINOBENCH_DATA=DIR python tests/bench/loss_curve.py     trains what is missing, then compares (exit code 4: outside)
    python tests/bench/loss_curve.py --tiny --output DIR    digits, seconds; proves only that everything runs

    plain            fp32, eager, attention as the softmax of a matrix, DINO's equation 3 as a loop over pairs of views
    optimised_fp32   compiled blocks, fused attention, a loss without pairs in chunks of images, pixels on the device
    optimised_bf16   the same under bf16 autocast
    plain_seed1, 2   the plain training with other weights, images and views: what a difference is measured by

A stopped run goes on from its last checkpoint when the script is started again (run folders: --work).

The band within which the curves are to stay was set before any of these runs; it stands in loss_band.py.
kNN at the end is shown, not judged: it is one number a run.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from dinobench import plots
from dinobench.files import read_json, write_json
from dinobench.reporter import Reporter
from dinobench.runs import RunFolder
from dinobench.train import Request, pretrain
from loss_band import EXACT, FLOOR, POOL, WINDOW, half_width, judge, judge_first, smooth
from pretrain.errors import CheckFailed, DinobenchError
from pretrain.methods.dino import Dino
from pretrain.models.checkpoint import load, read
from pretrain.models.network import Outputs
from pretrain.training.recipe import Recipe, resolve
from report import environment, machine_name
from suites.measure import measure
from suites.suite import SuiteDataset, load_suite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parents[2] / "results" / "bench" / "loss_curve"
WORK = Path("runs") / "loss_curve"
METHODS = ("dino", "dino_vmf")

SETTINGS = (
    "optim.batch_size=32",
    "optim.lr=0.008",
    "model.kwargs={img_size: 32, patch_size: 8, embed_dim: 64, depth: 3, num_heads: 2}",
    "model.drop_path=0",  # a compiled block draws other random numbers than an eager one
    "model.init=xavier",
    "head.hidden=512",
    "head.bottleneck=64",
    "schedule.epochs=20",
    "schedule.warmup_epochs=2",
    "schedule.steps_per_epoch=100",
    "checkpoint.every_steps=100",
)
TINY = (
    "optim.batch_size=8",
    "model.kwargs={img_size: 16, patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2}",  # the last is not compiled
    "model.drop_path=0",
    "head.hidden=16",
    "head.bottleneck=16",
    "head.num_prototypes=32",
    "schedule.epochs=6",
    "schedule.warmup_epochs=1",
    "schedule.steps_per_epoch=5",
)
EVERY_RUN = ("runtime.device=cpu", "runtime.log_every=1", "tracking.enabled=false")
PLAIN = ("runtime.precision=fp32", "runtime.compile=false", "model.attention=math", "data.cache=none")
OPTIMISED = ("runtime.compile=true", "model.attention=fused", "data.cache=device")


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: its seed, its switches, and whether its loss is the loop over pairs."""

    seed: int
    switches: tuple[str, ...]
    plain_loss: bool


RUNS = {
    "plain": Run(0, PLAIN, True),
    "optimised_bf16": Run(0, (*OPTIMISED, "runtime.precision=bf16"), False),
    "optimised_fp32": Run(0, (*OPTIMISED, "runtime.precision=fp32"), False),
    "plain_seed1": Run(1, PLAIN, True),
    "plain_seed2": Run(2, PLAIN, True),
}
REFERENCE, CONTROLS = "plain", ("plain_seed1", "plain_seed2")
JUDGED = ("optimised_fp32", "optimised_bf16")
STYLES = {
    "plain": (plots.COLOURS[6], "-"),
    "plain_seed1": (plots.COLOURS[5], ":"),
    "plain_seed2": (plots.COLOURS[3], ":"),
    "optimised_fp32": (plots.COLOURS[0], "--"),
    "optimised_bf16": (plots.COLOURS[1], "-."),
}
"""Colour and line of a run in the figure."""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default=METHODS[0], help="what is trained (default %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="30 steps on digits; nothing is judged")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=RUNS, help="train these only; compares when all are")
    parser.add_argument("--work", type=Path, default=WORK, help=f"folder of the runs (default {WORK})")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the record (default: results/bench)")
    parser.add_argument("--machine", help="name for the files; default: the processor")
    return parser.parse_args()


def main() -> None:
    """Train, compare, write; says in one line each what holds.

    Raises:
        SystemExit: with code 4 when a curve leaves the band, with another when a run was stopped.
    """
    options = parse()
    work, machine = options.work / options.method, options.machine or machine_name()
    path = options.output / f"{datetime.date.today():%Y-%m-%d}-{machine}-{options.method}"
    try:
        for name in options.runs:
            train_run(name, recipe(options.method, name, tiny=options.tiny), work / name)
        folders = {name: find_folder(work / name) for name in RUNS}
        finished = {name: folder for name, folder in folders.items() if folder and folder.state().status == "finished"}
        if finished.keys() < RUNS.keys():
            print(f"not compared yet: {', '.join(RUNS.keys() - finished.keys())} to be trained")
            return
        record = compare(finished, tiny=options.tiny)
        write(record, curves(finished), path)
        for name, verdict in record["verdicts"].items():
            print(f"{name}: {'inside' if verdict['inside'] else 'OUTSIDE'} the band  {verdict}")
        if not options.tiny and not all(verdict["inside"] for verdict in record["verdicts"].values()):
            raise CheckFailed(f"a loss curve leaves the band: see {path.with_suffix('.json')}")
    except DinobenchError as error:
        print(f"error: {error}")
        raise SystemExit(error.exit_code) from error


def recipe(method: str, name: str, *, tiny: bool, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a run of a method; its seed decides weights, images and views."""
    run = RUNS[name]
    settings = TINY if tiny else SETTINGS
    found = resolve(
        method,
        preset="digits" if tiny else "fashion_mnist",
        seed=run.seed,
        overrides=[*settings, *EVERY_RUN, *run.switches, *overrides],
    )
    if run.plain_loss:
        return found
    # a quarter of the batch at a time
    num_views, size = len(found.views.views) + 2, found.optim.batch_size // 4
    limit = 2 * size * num_views * found.head.num_prototypes * 4
    return found.model_copy(update={"runtime": found.runtime.model_copy(update={"max_logits_bytes": limit})})


def train_run(name: str, of: Recipe, output: Path) -> None:
    """Train, or continue, or find finished.

    Raises:
        DinobenchError: the run was stopped before its end.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    loss = mock.patch.object(Dino, "image_loss", loop_over_pairs) if RUNS[name].plain_loss else contextlib.nullcontext()
    # a block that is compiled too often would silently run eagerly
    with loss, torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        summary = pretrain(of, Request(output, "loss_curve.py", resume=True, evaluate=False), Reporter(every=30))
    assert summary is not None
    if of.runtime.compile and summary.trained and not torch._dynamo.utils.counters["stats"]["unique_graphs"]:
        raise DinobenchError(f"{name}: no block was compiled")
    if summary.state.status != "finished":
        raise DinobenchError(f"{name} was stopped at step {summary.state.step}: start again to go on")


def loop_over_pairs(self: Dino, student: Outputs, target: Tensor) -> Tensor:
    """DINO's equation 3 as it stands, in place of `Dino.image_loss`: targets [G, B, K] -> scalar."""
    log_q = self.student_logits(student).log_softmax(-1)  # [V, B, K]
    pairs = [-(p * log_q[v]).sum(-1).mean() for g, p in enumerate(target) for v in range(len(log_q)) if v != g]
    return torch.stack(pairs).mean()


def find_folder(output: Path) -> RunFolder | None:
    """The run folder of a run, where it was started."""
    found = sorted(output.glob("*/run.json"))
    return RunFolder(found[0].parent) if found else None


def curves(folders: Mapping[str, RunFolder]) -> dict[str, np.ndarray]:
    """Run -> its loss at every step, [T].

    Raises:
        DinobenchError: steps are missing or were done twice.
    """
    losses = {}
    for name, folder in folders.items():
        steps, values = folder.journal.curve("loss/total")
        if steps != list(range(1, len(steps) + 1)):
            raise DinobenchError(f"{folder.journal.path} does not hold every step once: remove {folder.path}")
        losses[name] = np.array(values)
    return losses


def compare(folders: Mapping[str, RunFolder], *, tiny: bool) -> dict[str, Any]:
    """Everything the record holds beside the curves."""
    losses = curves(folders)
    smoothed = {name: smooth(values) for name, values in losses.items()}
    warmup = warmup_steps(folders[REFERENCE])
    reference, seeds = smoothed[REFERENCE], [smoothed[name] for name in CONTROLS]
    width = half_width(reference, seeds)
    verdicts: dict[str, Any] = {name: judge(smoothed[name], reference, width, warmup) for name in JUDGED}
    verdicts["optimised_fp32, first steps"] = judge_first(losses["optimised_fp32"], losses[REFERENCE])
    judged = width[warmup:]
    return {
        "environment": environment(),
        "band": {
            "window": WINDOW,
            "pool": POOL,
            "floor": FLOOR,
            "warmup_steps": warmup,
            "half_width": {"smallest": float(judged.min()), "largest": float(judged.max())},
            "steps_where_the_floor_decides": float((judged <= FLOOR * reference[warmup:]).mean()),
            "first_steps_tolerance": EXACT,
        },
        "verdicts": verdicts,
        "other_seeds": {name: judge(smoothed[name], reference, width, warmup) for name in CONTROLS},
        "recipe": folders[REFERENCE].recipe(),
        "runs": {
            name: describe(name, folder, folders[REFERENCE], smoothed[name], tiny=tiny)
            for name, folder in folders.items()
        },
    }


def warmup_steps(folder: RunFolder) -> int:
    """Steps of the learning rate's warm-up."""
    schedule = folder.recipe()["schedule"]
    return schedule["warmup_epochs"] * schedule["steps_per_epoch"]


def describe(name: str, folder: RunFolder, reference: RunFolder, smoothed: np.ndarray, *, tiny: bool) -> dict[str, Any]:
    """What a run was, and where it ended."""
    state, recipe, journal = folder.state(), folder.recipe(), folder.journal
    shown = ("health/target_entropy", "health/feature_std", "prototypes/used")
    starts = read_json(folder.path / "environment.json")["starts"]
    return {
        "seed": recipe["seed"],
        "runtime": recipe["runtime"],
        "attention": recipe["model"]["attention"],
        "cache": recipe["data"]["cache"],
        "loop_over_pairs": RUNS[name].plain_loss,
        "commits": sorted({start["code"].get("commit", "unknown") for start in starts}),
        "starts": len(starts),
        "steps": state.step,
        "seconds": round(state.seconds, 1),
        "smoothed_loss_at_end": float(smoothed[-1]),
        "last_step": {key: journal.curve(key)[1][-1] for key in shown},
        "weights_from_plain": weights_apart(folder, reference),
        "knn": neighbours(folder, baselines=name == REFERENCE, tiny=tiny),
    }


def weights_apart(folder: RunFolder, reference: RunFolder) -> float:
    """Median over the student's tensors of their distance from the reference's, relative to its norm.

    The median: biases before BatchNorm, to which the loss is indifferent, go their own way in every training.
    """
    ours, theirs = (read(run.last_checkpoint)["student"] for run in (folder, reference))
    pairs = [(ours[key].double(), theirs[key].double()) for key in ours if ours[key].is_floating_point()]
    return float(np.median([float((a - b).norm() / b.norm()) for a, b in pairs if b.any()]))


def neighbours(folder: RunFolder, *, baselines: bool, tiny: bool) -> dict[str, Any]:
    """kNN (k = 20) of the last checkpoint's teacher on a part of the data, in percent; measured once."""
    file = folder.path / "knn.json"
    if file.is_file():
        return read_json(file)
    suite = load_suite("digits_knn" if tiny else "fashion_mnist_knn")
    part = SuiteDataset(name=suite.dataset.name, train="train[:0.2]", test="test")
    suite = suite.model_copy(update={"dataset": part, "baselines": ("raw_pixels", "random_init")})
    found = measure(suite, load(folder.last_checkpoint), baselines=baselines)
    score = {"top1": found.scores[found.headline], "interval": list(found.interval), "n": found.n, "train": part.train}
    score["baselines"] = {of: scores[found.headline] for of, scores in found.baselines.items()}
    write_json(file, score)
    return score


def write(record: dict[str, Any], losses: Mapping[str, np.ndarray], path: Path) -> None:
    """`path`.csv: the loss of every step; .json: the record; .png: the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".csv").open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["step", *losses])
        table = np.stack(list(losses.values()), axis=1)
        rows.writerows([step, *(f"{loss:.9g}" for loss in row)] for step, row in enumerate(table, 1))
    write_json(path.with_suffix(".json"), record)
    figure = draw({name: smooth(values) for name, values in losses.items()}, record["band"]["warmup_steps"])
    plots.save(figure, path.with_suffix(".png"))


def draw(smoothed: Mapping[str, np.ndarray], warmup: int) -> Figure:
    """The smoothed curves, and their differences from the plain one inside the band."""
    figure = plots.new_figure(1, 2, (5.6, 4.0))
    whole, apart = figure.axes
    reference = smoothed[REFERENCE]
    steps = np.arange(1, len(reference) + 1)
    width = half_width(reference, [smoothed[name] for name in CONTROLS])[warmup:]
    apart.fill_between(steps[warmup:], -width, width, color="0.85", label="band")
    for name, (colour, style) in STYLES.items():
        whole.plot(steps, smoothed[name], color=colour, linestyle=style, linewidth=1.5, label=name)
        if name != REFERENCE:
            difference = smoothed[name] - reference
            apart.plot(steps[warmup:], difference[warmup:], color=colour, linestyle=style, linewidth=1.5, label=name)
    whole.set(title=f"Loss, mean of {WINDOW} steps", xlabel="step", ylabel="loss (nats)")
    apart.set(title="Difference from plain, after the warm-up", xlabel="step", ylabel="loss (nats)")
    for axes in figure.axes:
        axes.title.set_fontsize("medium")
        axes.legend(fontsize="small")
    return figure


if __name__ == "__main__":
    main()
