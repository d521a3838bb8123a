"""Why DINO needs both centring and sharpening (DINO, Figure 7): entropy of the teacher, and KL from it to the student.

    H(P_t, P_s) = h(P_t) + KL(P_t || P_s)

KL = 0 says that the output is the same for every image, so the training has collapsed. The entropy says how: near ln K
every target is uniform (centring alone), near 0 one prototype takes every image (sharpening alone). Both are read from
metrics.jsonl of the runs: health/target_entropy and loss/kl, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dinobench import plots
from dinobench.figures.drawing import Drawing
from dinobench.runs import RunFolder, list_runs
from pretrain.errors import DinobenchError

PREFIX = "collapse/"
"""What `tracking.label` of the ablation's recipes starts with."""
ROWS = ("both", "centring_only", "sharpening_only", "neither")
ENTROPY, KL = "health/target_entropy", "loss/kl"
STYLES = ("-", "--", "-.", (0, (3, 1, 1, 1, 1, 1)), (0, (5, 1)), (0, (1, 1)))


def find_ablation(folder: Path) -> list[RunFolder]:
    """The runs below a folder that belong to the ablation, in the order of its rows.

    Raises:
        DinobenchError: there are none.
    """
    found = [run for run in list_runs(folder) if _label(run).startswith(PREFIX)]
    if not found:
        commands = ", ".join(f"`dinobench pretrain {PREFIX}{row}`" for row in ROWS)
        raise DinobenchError(
            f"no run below {folder} belongs to the ablation {PREFIX.rstrip('/')}: train its runs with {commands}, "
            "or name run folders"
        )
    rank = {f"{PREFIX}{row}": number for number, row in enumerate(ROWS)}
    return sorted(found, key=lambda run: (rank.get(_label(run), len(ROWS)), run.name))


def draw_collapse(runs: Sequence[RunFolder]) -> Drawing:
    """Entropy and KL against the step, one line per run.

    Raises:
        DinobenchError: a run has no such metrics.
    """
    figure = plots.new_figure(1, 2, (5.2, 3.8))
    numbers: dict[str, Any] = {}
    for number, (run, name) in enumerate(zip(runs, line_names(runs), strict=True)):
        colour, style = plots.COLOURS[number % len(plots.COLOURS)], STYLES[number % len(STYLES)]
        numbers[name] = {"run": str(run.path)}
        for axes, key in zip(figure.axes, (ENTROPY, KL), strict=True):
            steps, values = finite_curve(run, key)
            marker = "." if len(steps) < 30 else ""
            axes.plot(steps, values, linestyle=style, marker=marker, color=colour, linewidth=1.8, label=name)
            numbers[name][key] = {"first": values[0], "last": values[-1], "last_step": steps[-1]}
    entropy, divergence = figure.axes
    sizes = sorted({size for run in runs if (size := _num_prototypes(run))})
    for size in sizes:
        entropy.axhline(math.log(size), color="black", linestyle=":", linewidth=1.2, label=f"ln K, K = {size}")
    entropy.set(title="Entropy of the teacher's targets: near ln K they are uniform", ylabel="entropy (nats)")
    divergence.set(title="KL from teacher to student: at 0 nothing is learned", ylabel="KL divergence (nats)")
    for axes in figure.axes:
        axes.set_xlabel("step")
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        axes.title.set_fontsize("medium")
    entropy.legend(fontsize="small")
    return Drawing("collapse", figure, {"runs": numbers, "ln_K": [math.log(size) for size in sizes]})


def line_names(runs: Sequence[RunFolder]) -> list[str]:
    """The row of the ablation, else the folder's name; rows that occur more than once get their folder's name too."""
    names = [_label(run).removeprefix(PREFIX) or run.name for run in runs]
    return [
        f"{name} ({run.name})" if names.count(name) > 1 and name != run.name else name
        for run, name in zip(runs, names, strict=True)
    ]


def finite_curve(run: RunFolder, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric where it is finite.

    Raises:
        DinobenchError: it never is.
    """
    points = [(step, value) for step, value in zip(*run.journal.curve(key), strict=True) if math.isfinite(value)]
    if not points:
        raise DinobenchError(f"{run.path} has no {key} in its metrics.jsonl: let it train for a while, or leave it out")
    return [step for step, _ in points], [value for _, value in points]


def _section(run: RunFolder, name: str) -> dict[str, Any]:
    try:
        section = run.recipe().get(name)
    except DinobenchError:  # a damaged run does not hide the others
        return {}
    return section if isinstance(section, dict) else {}


def _label(run: RunFolder) -> str:
    return str(_section(run, "tracking").get("label") or "")


def _num_prototypes(run: RunFolder) -> int | None:
    return _section(run, "head").get("num_prototypes")
