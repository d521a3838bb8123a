"""The last words of a pretraining: numbers beside their baselines, what they mean, where everything is."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinobench import tracking
from dinobench.cli.links import full_links
from dinobench.cli.output import print_table, print_text
from dinobench.entries import BASELINES, number
from dinobench.reporter import duration

if TYPE_CHECKING:
    from dinobench.results import Result
    from dinobench.train import Summary

FURTHER_SCORES = {
    "fewshot": ("shot1", "shot5"),
    "prototypes": ("num_prototypes", "used", "unique", "purity", "kappa_q50"),
}
"""Scores shown below the headline; all of them are in the result file and in MLflow."""


def print_summary(summary: Summary, output: Path) -> None:
    """Everything a reader of the terminal needs next, in at most a screen."""
    state = summary.state
    if state.status != "finished":
        print_text(f"{state.status} ({state.note}) after step {state.step}; run the same command with --resume")
        return
    rate = f", {state.images_per_second:.0f} img/s" if state.images_per_second else ""
    print_text(f"{summary.run.name}: finished, {state.step} steps in {duration(state.seconds)}{rate}")
    last = last_results(summary.results)
    if last:
        print_results(last, f"step {state.step}, scores in percent")
        print_text(against_pixels(last))
    for failure in summary.failures:
        print_text(f"not measured: {failure.suite} on {failure.checkpoint.name}: {failure.reason}")
    for name, text in pointers(summary, output).items():
        print_text(f"{name:<18}{text}")


def print_results(results: Sequence[Result], title: str) -> None:
    """One row per score: the headline of each suite first, with its interval and its baselines."""
    columns = ["suite", "score", "checkpoint", "95 % interval", *BASELINES.values(), "n"]
    print_table(title, columns, [row for result in results for row in _rows(result)])


def _rows(result: Result) -> list[list[str]]:
    further = [name for name in FURTHER_SCORES.get(result.protocol, ()) if name in result.scores]
    names = dict.fromkeys([result.headline, *further])
    rows = []
    for name in names:
        headline = name == result.headline
        interval = "-".join(map(number, result.interval)) if result.interval and headline else ""
        baselines = [number(result.baselines.get(key, {}).get(name)) for key in BASELINES]
        first = result.suite if headline else ""
        rows.append([first, name, number(result.scores.get(name)), interval, *baselines, str(result.n)])
    return rows


def last_results(results: Sequence[Result]) -> list[Result]:
    """The results of the latest training step."""
    step = max((result.provenance.get("step") or 0 for result in results), default=0)
    return [result for result in results if (result.provenance.get("step") or 0) == step]


def against_pixels(results: Sequence[Result]) -> str:
    """Where the features are above raw pixels and where they are not, said from the numbers."""
    above, below = [], []
    for result in results:
        pixels = result.baseline("raw_pixels")
        if pixels is not None:
            text = f"{result.suite_name} {number(result.score)} against {number(pixels)}"
            (above if result.score > pixels else below).append(text)
    parts = [f"Above raw pixels: {', '.join(above)}." if above else "", _below(below, above), _untrained(results)]
    return " ".join(part for part in parts if part)


def _below(below: list[str], above: list[str]) -> str:
    if not below:
        return ""
    text = f"Not above raw pixels: {', '.join(below)}."
    if any(entry.startswith("digits_knn") for entry in below):
        text += " Aligned 8x8 digits are nearly solved by the nearest neighbour of their pixels"
        shown = " and ".join(entry.partition(" ")[0] for entry in above if "fewshot" in entry or "clusters" in entry)
        text += f"; what pretraining adds shows in {shown}." if shown else "."
    return text


def _untrained(results: Sequence[Result]) -> str:
    """A word of warning where random weights do as well; prototype counts are no better for being higher."""
    worse = []
    for result in results:
        floor = result.baseline("random_init")
        if result.protocol != "prototypes" and floor is not None and result.score <= floor:
            worse.append(f"{result.suite_name} {number(result.score)} against {number(floor)}")
    return f"Not above random init, so the training has not helped yet: {', '.join(worse)}." if worse else ""


def pointers(summary: Summary, output: Path) -> dict[str, str]:
    """Where the run, the checkpoint and the pages are, and the command that measures again."""
    checkpoint = (summary.run.kept_checkpoints() or [summary.run.last_checkpoint])[-1]
    suites = list(dict.fromkeys(result.suite_name for result in summary.results))
    again = ["dinobench", "eval", "--suite", ",".join(suites), str(checkpoint)]
    uri = tracking.tracking_uri(output)
    shown = {"run": str(summary.run.path), "checkpoint": str(checkpoint)}
    if suites:
        shown["evaluate"] = shlex.join(again)
    shown["mlflow"] = tracking.masked(uri)
    return shown | full_links(summary.links, uri, output)


def summary_document(summary: Summary, output: Path) -> dict[str, Any]:
    """The JSON document of `pretrain --json`."""
    return {
        "run": str(summary.run.path.absolute()),
        "trained": summary.trained,
        **summary.state.model_dump(),
        "results": [result.document() for result in summary.results],
        "failures": [{"suite": f.suite, "checkpoint": str(f.checkpoint), "reason": f.reason} for f in summary.failures],
        "pointers": pointers(summary, output),
    }
