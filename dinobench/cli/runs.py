"""`dinobench runs ls|sync`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help="Look after run folders.", no_args_is_help=True, rich_markup_mode=None)


@app.command("ls")
def list_runs(
    output: Annotated[Path, typer.Option(help="Folder that holds the run folders.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """List runs: status, step and the headline scores of the last checkpoint."""
    from dinobench import runs
    from dinobench.cli.output import print_json, print_table, print_text

    entries = [describe(run) for run in runs.list_runs(output)]
    if as_json:
        return print_json(entries)
    if not entries:
        return print_text(f"no runs in {output}")
    rows = [[e["name"], e["status"], str(e["step"]), _scores(e["scores"])] for e in entries]
    print_table("", ["run", "status", "step", "scores"], rows)


@app.command("sync")
def sync_run(
    folder: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
) -> None:
    """Log to MLflow whatever of a run it lacks. Nothing is logged twice."""
    from dinobench import mirror, tracking
    from dinobench.cli.output import print_text
    from dinobench.runs import open_run

    for run in [open_run(path) for path in folder]:
        uri = tracking.tracking_uri(run.path.parent)
        mirror.sync(run, uri)
        print_text(f"{run.name}: MLflow at {tracking.masked(uri)} shows all of it")


def describe(run: Any) -> dict[str, Any]:
    """A run for the list. A damaged run is listed as such; it does not hide the others."""
    from dinobench.cli.report import last_results
    from dinobench.results import ResultStore
    from dinobench.runs import describe_status
    from pretrain.errors import DinobenchError

    try:
        results = last_results(ResultStore(run.path).all())
        state = run.state()
        scores = {f"{result.suite_name} {result.headline}": result.scores[result.headline] for result in results}
        return {"name": run.name, "status": describe_status(run), "step": state.step, "scores": scores}
    except DinobenchError as error:
        return {"name": run.name, "status": "damaged", "step": 0, "scores": {}, "note": str(error)}


def _scores(scores: dict[str, float | None]) -> str:
    from dinobench.entries import number

    return "  ".join(f"{name} {number(value)}" for name, value in scores.items())
