"""`dinobench eval --suite S CKPT...`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dinobench.reporter import Reporter
    from dinobench.results import Result


def run_evaluation(
    checkpoints: Annotated[list[Path], typer.Argument(metavar="CKPT...", help="Checkpoint files.")],
    suite: Annotated[list[str], typer.Option(help="Suite name or file; repeat it, or separate with commas.")],
    data: Annotated[str | None, typer.Option(help="Data set in place of the suite's own.")] = None,
    output: Annotated[Path, typer.Option(help="Where results of a checkpoint outside a run folder go.")] = Path("runs"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Seed of draws and bootstrap.")] = 0,
    track: Annotated[bool, typer.Option("--track/--no-track", help="Log new results to MLflow.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Measure suites on checkpoints. What was measured before is read from the stored results.

    --json prints the result, or a list of results when several suites or checkpoints are given.
    """
    from dinobench.evaluate import Evaluation, evaluate
    from dinobench.reporter import Reporter
    from suites.suite import load_suite

    reporter = Reporter()
    suites = [load_suite(name) for name in split_names(suite)]
    settings = Evaluation(output=output, data=data, device=device, seed=seed)
    results, failures = [], []
    for checkpoint in checkpoints:
        done, failed = evaluate(checkpoint, suites, settings, reporter.say)
        results += done
        failures += failed
        if track:
            _track(checkpoint, done, output, reporter)
    _print(results, as_json, single=len(checkpoints) * len(suites) == 1)
    for failure in failures:
        reporter.warn(f"not measured: {failure.suite} on {failure.checkpoint}: {failure.reason}")
    if failures:
        raise typer.Exit(3)


def split_names(values: list[str]) -> list[str]:
    """`--suite a,b --suite c` -> a, b, c; each once, in order."""
    from pretrain.errors import UsageError

    names = list(dict.fromkeys(name.strip() for value in values for name in value.split(",") if name.strip()))
    if not names:
        raise UsageError("--suite needs a name; `dinobench ls suites` lists them")
    return names


def _print(results: list[Result], as_json: bool, *, single: bool) -> None:
    from dinobench.cli import report
    from dinobench.cli.output import print_json, print_text

    documents = [result.document() for result in results]
    if as_json:
        if documents or not single:
            print_json(documents[0] if single else documents)
        return
    for checkpoint in dict.fromkeys(result.checkpoint for result in results):
        own = [result for result in results if result.checkpoint == checkpoint]
        report.print_results(own, f"{checkpoint}, scores in percent")
        stored = [result.suite for result in own if result.from_cache]
        if stored:
            print_text(f"from the cache: {', '.join(stored)}")


def _track(checkpoint: Path, results: list[Result], output: Path, reporter: Reporter) -> None:
    """Log results that are new; MLflow takes seconds to import, so not at all when there are none."""
    from dinobench import mirror, tracking
    from dinobench.runs import run_of_checkpoint

    new = [result for result in results if not result.from_cache]
    if not new:
        return
    run = run_of_checkpoint(checkpoint)
    uri = tracking.tracking_uri(run.path.parent if run else output)
    try:
        store = tracking.connect(uri)
        pretraining = store.find_pretraining(run.state().key) if run else None
        for result in new:
            mirror.log_result(store, run, result, pretraining)
        reporter.say(f"logged to {tracking.masked(uri)}")
    except tracking.TrackingUnavailable as error:
        reporter.warn(f"not logged to MLflow: {error}; the result is in its file all the same")
