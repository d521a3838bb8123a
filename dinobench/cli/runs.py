"""`dinobench runs ls|show|sync|reap|delete-orphans`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dinobench.cli.show import show_run

if TYPE_CHECKING:
    from dinobench.tracking import Store

app = typer.Typer(help="Look after run folders.", no_args_is_help=True, rich_markup_mode=None)
Output = Annotated[Path, typer.Option(help="Folder that holds the run folders.")]
AnyHost = Annotated[
    bool, typer.Option("--any-host", help="Also runs started on machines of other names, by what is seen from here.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only list them.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@app.command("ls")
def list_runs(
    output: Output = Path("runs"),
    as_json: AsJson = False,
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


app.command("show")(show_run)


@app.command("sync")
def sync_runs(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="[RUN...]", help="Run folders; default: all below --output.")
    ] = None,
    output: Output = Path("runs"),
) -> None:
    """Log to MLflow whatever of runs and results it lacks. Nothing is logged twice.

    Without RUN also the results of checkpoints outside run folders. A run that is at work logs itself.
    """
    from dinobench import mirror, tracking
    from dinobench.cli.links import say_links
    from dinobench.cli.output import print_text
    from dinobench.runs import describe_status, list_runs, open_run

    pages: dict[str, str] = {}
    uri = tracking.tracking_uri(output)
    for run in [open_run(path) for path in folders] if folders else list_runs(output):
        if describe_status(run) == "running":
            print_text(f"{run.name}: at work, it logs itself")
            continue
        uri = tracking.tracking_uri(run.path.parent)
        found = mirror.sync(run, uri)
        pages |= {name: page for name, page in found.items() if name != "run page" or folders}
        print_text(f"{run.name}: MLflow at {tracking.masked(uri)} shows all of it")
    if not folders:
        count, found = mirror.sync_checkpoints(output, uri)
        pages |= found
        if count:
            print_text(f"{count} results of checkpoints outside run folders: MLflow shows all of them")
        if not pages:
            print_text(f"no runs and no results in {output}")
    say_links(pages, uri, output, print_text)


@app.command("reap")
def reap_runs(
    output: Output = Path("runs"),
    any_host: AnyHost = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Close the runs that MLflow shows as running though their process is gone.

    They become KILLED, or what their run folder says. A run is judged on the machine that it was started on.
    """
    from dinobench import housekeeping
    from dinobench.cli.output import print_json, print_table, print_text

    store, shown = _connect(output)
    findings = housekeeping.find_open(store, any_host=any_host)
    if not dry_run:
        housekeeping.reap(store, findings)
    if as_json:
        return print_json([asdict(finding) for finding in findings])
    if not findings:
        return print_text(f"no open runs in {shown}")
    rows = [[f.name, f.run_id, f.status or "left open", f.reason] for f in findings]
    print_table(shown, ["run", "id", "would become" if dry_run else "is now", "because"], rows)


@app.command("delete-orphans")
def delete_orphans(
    output: Output = Path("runs"),
    any_host: AnyHost = False,
    cells: Annotated[
        bool, typer.Option("--cells", help="Also cells of tables, whose folders may go once they are recorded.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Delete from MLflow the runs whose run folder is gone, with the results of their checkpoints.

    MLflow hides what is deleted; `mlflow gc` frees its space for good.
    """
    from dinobench import housekeeping
    from dinobench.cli.output import print_json, print_table, print_text
    from pretrain.errors import UsageError

    store, shown = _connect(output)
    orphans = housekeeping.find_orphans(store, any_host=any_host, cells=cells)
    if as_json:
        print_json([asdict(orphan) for orphan in orphans])
    elif orphans:
        rows = [[o.name, o.run_id, str(len(o.results)), o.folder, o.reason] for o in orphans]
        print_table(shown, ["run", "id", "runs of results", "run folder", "because"], rows)
    else:
        print_text(f"no orphans in {shown}")
    if dry_run or not orphans:
        return
    if not yes:
        if as_json or not sys.stdin.isatty():
            raise UsageError("nobody to ask: give --yes to delete these runs, or --dry-run to list them only")
        typer.confirm(f"delete {len(orphans)} runs and {sum(len(o.results) for o in orphans)} of results?", abort=True)
    housekeeping.delete(store, orphans)
    if not as_json:
        print_text(f"deleted {len(orphans)} runs with what was measured on their checkpoints")


def _connect(output: Path) -> tuple[Store, str]:
    """The store that is there, and its name; none is made here."""
    from dinobench import tracking
    from pretrain.errors import DinobenchError

    uri = tracking.tracking_uri(output)
    file = tracking.database_file(uri)
    if file is not None and not file.is_file():
        raise DinobenchError(f"no tracking store {file}: name the folder of the runs with --output")
    return tracking.connect(uri), tracking.masked(uri)


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
        status, step = describe_status(run), state.step
        last = run.journal.last()
        if last and status in ("running", "killed"):  # run.json gets its step when the training ends
            step = max(step, last.step)
        return {"name": run.name, "status": status, "step": step, "scores": scores}
    except DinobenchError as error:
        return {"name": run.name, "status": "damaged", "step": 0, "scores": {}, "note": str(error)}


def _scores(scores: dict[str, float | None]) -> str:
    from dinobench.entries import number

    return "  ".join(f"{name} {number(value)}" for name, value in scores.items())
