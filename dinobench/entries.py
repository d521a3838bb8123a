"""What a visitor of the tracking pages gets to read about a run and about a result: names, parameters, descriptions.

Only what varies between runs is a parameter (10 to 15 of them): the pages make axes of them. The whole recipe is an
artifact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dinobench.leaderboard import Entry
from dinobench.loading import loading_of
from dinobench.results import Result
from dinobench.runs import RunFolder

if TYPE_CHECKING:
    import pandas as pd

PARAMETERS = {
    "method": "method.name",
    "train_data": "data.name",
    "batch_size": "optim.batch_size",
    "epochs": "schedule.epochs",
    "lr": "optim.lr",
    "prototypes": "head.prototypes",
    "num_prototypes": "head.num_prototypes",
    "normaliser": "head.normaliser",
    "centring": "target.centring",
    "patch_weight": "patch.weight",
    "teacher": "teacher.kind",
    "seed": "seed",
}
BASELINES = {"raw_pixels": "raw pixels", "pca": "PCA", "random_init": "random init"}
"""Baselines in the order in which they are shown."""


def recipe_parameters(recipe: dict[str, Any]) -> dict[str, str]:
    """The parameters of a recipe that tell runs apart, as MLflow wants them: short strings."""
    values = {name: _dig(recipe, dotted) for name, dotted in PARAMETERS.items()}
    return {name: str(value) for name, value in values.items() if value not in (None, "")}


def row_label(recipe: dict[str, Any]) -> str:
    """`ablation/row` of a recipe that is one, else empty."""
    return _dig(recipe, "tracking.label") or ""


def run_name(method: str, seed: object, *rest: object) -> str:
    """What differs first, because tables cut names at 16 characters."""
    return "/".join(str(part) for part in (method, f"s{seed}", *rest) if part not in ("", None))


def run_description(run: RunFolder, results: Sequence[Result]) -> str:
    """Markdown: the results of the last checkpoint first, then where everything lies."""
    return f"{score_table(results)}\n\nRun folder: `{run.path.absolute()}`".strip()


def score_table(results: Sequence[Result]) -> str:
    """Markdown table of headline scores beside their baselines, for the latest step among the results."""
    if not results:
        return ""
    last = max(result.provenance.get("step") or 0 for result in results)
    shown = [result for result in results if (result.provenance.get("step") or 0) == last]
    rows = [f"| suite | score | step {last} | {' | '.join(BASELINES.values())} |", "|---|---|---|---|---|---|"]
    for result in shown:
        baselines = " | ".join(number(result.baseline(name)) for name in BASELINES)
        rows.append(f"| {result.suite} | {result.headline} | **{number(result.score)}** | {baselines} |")
    return "\n".join(rows)


def suite_description(result: Result) -> str:
    """Markdown: every score of a suite, how sure the headline is, and what a reader should know."""
    low_high = (
        f", 95 % interval {number(result.interval[0])} to {number(result.interval[1])}" if result.interval else ""
    )
    rows = [f"| {name} | {'-' if value is None else f'{value:.4g}'} |" for name, value in result.scores.items()]
    head = f"{result.suite}: {result.headline} **{number(result.score)}** on {result.n} images{low_high}"
    notes = [f"- {note}" for note in result.notes]
    return "\n".join([head, "", "| score | value |", "|---|---|", *rows, "", *notes, "Receipt: `result.json`"])


def number(value: float | None) -> str:
    """A score with one decimal, or three where one would show next to nothing of it; a dash where there is none."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.3f}" if 0 < abs(value) < 1 else f"{value:.1f}"


def as_its_own(result: Result) -> Result:
    """Another network of a file is another checkpoint to MLflow, which tells them by their hashes."""
    label = loading_of(result).label
    if not label:
        return result
    facts = result.provenance
    changed = {"sha256": f"{facts['sha256']}-{label}", "arch": f"{facts.get('arch')} {label}"}
    return result.model_copy(update={"provenance": {**facts, **changed}})


def result_entry(
    result: Result,
    siblings: Sequence[Result],
    recipe: dict[str, Any] | None,
    tables: Mapping[str, pd.DataFrame] | None = None,
) -> Entry:
    """A result as MLflow gets it.

    Args:
        siblings: the results of the same checkpoint, for its description.
        recipe: of the pretraining, where it is known.
        tables: the tables of the suite, by name.
    """
    files = {f"tables/{name}.csv": table.to_csv(index=False) for name, table in (tables or {}).items()}
    facts = result.provenance
    method = str(facts.get("method") or "model")
    arch = str(facts.get("arch") or facts.get("label") or "")
    params = recipe_parameters(recipe) if recipe else {"method": method}
    params |= {"arch": arch, "epoch": str(facts.get("epoch")), "step": str(facts.get("step"))}
    metrics = {result.metric(name): value for name, value in result.scores.items() if value is not None}
    return Entry(
        dataset=result.dataset,
        dataset_digest=str(_dig(result.receipt, "dataset.test.fingerprint") or "unknown"),
        version=result.version,
        suite=result.suite,
        checkpoint=str(facts["sha256"]),
        name=run_name(row_label(recipe or {}) or method, facts.get("seed"), f"ep{facts.get('epoch')}", arch),
        step=int(facts.get("step") or 0),
        metrics=metrics,
        headline=result.metric(result.headline),
        params=params,
        tags={
            "method": method,
            "row": row_label(recipe or {}),
            "backbone": arch,
            "checkpoint.path": result.checkpoint,
            "checkpoint.epoch": str(facts.get("epoch")),
            "data.train": str(params.get("train_data", "")),
        },
        description=f"{score_table(siblings)}\n\nCheckpoint: `{result.checkpoint}`",
        baselines={
            # random weights depend on the backbone, pixels and PCA only on the data
            (f"{label}/{arch}" if name == "random_init" else label): score
            for name, label in BASELINES.items()
            if (score := result.baseline(name)) is not None
        },
        summary=suite_description(result),
        files={"result.json": result.model_dump_json(indent=1), **files},
    )


def _dig(values: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values
