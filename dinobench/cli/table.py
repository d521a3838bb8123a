"""`dinobench table`: train and measure what the papers' tables need, and write them."""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from dinobench.reporter import Reporter
    from dinobench.tables.cells import Cells
    from dinobench.tables.contents import Contents
    from dinobench.tables.definition import Table
    from dinobench.tables.plan import Plan
    from dinobench.tables.records import RecordStore
    from dinobench.tables.runner import Outcome
    from dinobench.tables.worker import Workplace


CHECKPOINTS = Path("checkpoints.yaml")


class Scale(StrEnum):
    """At what size the rows are trained."""

    digits = "digits"
    small = "small"
    paper = "paper"


class Executor(StrEnum):
    """What runs the cells."""

    local = "local"
    slurm = "slurm"


def run_tables(
    scale: Annotated[
        Scale,
        typer.Option(help="digits: embedded data, a laptop. small: CIFAR-10, a GPU. paper: ImageNet, or weights."),
    ] = Scale.digits,
    only: Annotated[list[str] | None, typer.Option(help="A table; repeat it, or separate with commas.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds in place of each table's own, like 0,1,2.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List every cell and what it needs; run nothing.")] = False,
    run: Annotated[
        bool, typer.Option("--run/--no-run", help="Only write the tables from the records there are.")
    ] = True,
    workers: Annotated[int | None, typer.Option(min=1, help="Cells at a time; default: one per core.")] = None,
    executor: Annotated[Executor, typer.Option(help="local processes, or jobs of a slurm array.")] = Executor.local,
    slurm: Annotated[
        list[str] | None, typer.Option("--slurm", metavar="KEY=VALUE", help="For submitit, like slurm_partition=gpu.")
    ] = None,
    records: Annotated[
        Path, typer.Option(help="Folder with <scale>/records and, written by this, tables/<scale>.")
    ] = Path("results"),
    output: Annotated[Path, typer.Option(help="Folder of the run folders; may go when all is recorded.")] = Path(
        "runs/tables"
    ),
    data: Annotated[list[str] | None, typer.Option(help="Data by URI, like imagenet:/path; repeatable.")] = None,
    checkpoints: Annotated[
        Path | None,
        typer.Option(help="YAML file of released weights, `name: path`; default: checkpoints.yaml, if any."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    track: Annotated[bool, typer.Option("--track/--no-track", help="Log runs and tables to MLflow.")] = False,
    definitions: Annotated[Path | None, typer.Option(help="Folder of tables in place of those shipped.")] = None,
    retrain: Annotated[
        str | None,
        typer.Option(metavar="COMMIT", help="Train the recorded cell that this hash picks once more, and compare."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Regenerate the papers' tables: train and measure what is missing, write what is there.

    Killed and started again, it goes on. Exit code 3: something could not be run here; 4: a table is out of tolerance,
    or a retrained cell differs.
    """
    from dinobench.cli import table_plan
    from dinobench.reporter import Reporter
    from dinobench.tables.cells import Inputs, collect, data_of, read_checkpoints
    from dinobench.tables.definition import FOLDER, load_table, table_names
    from dinobench.tables.plan import make_plan
    from dinobench.tables.records import RecordStore
    from dinobench.tables.runner import Outcome
    from dinobench.tables.worker import Workplace

    reporter = Reporter()
    folder = definitions or FOLDER
    every = [load_table(name, folder) for name in table_names(folder)]
    names = dict.fromkeys(name.strip() for names in only or () for name in names.split(","))
    chosen = [load_table(name, folder) for name in names] or every
    checkpoints = checkpoints or (CHECKPOINTS if CHECKPOINTS.is_file() else None)
    inputs = Inputs(_seeds(seeds), data_of(data or ()), read_checkpoints(checkpoints))
    # all tables, whichever are chosen: a cell that several share is measured for all of them, and the index lists all
    cells = collect(every, scale.value, inputs)
    store = RecordStore(records)
    place = Workplace(output, records, track, device)
    if retrain is not None:
        return _retrain(retrain, cells, store, place, reporter)
    plan = make_plan(_part(cells, chosen), store)
    workers = workers or _workers(device)
    if dry_run:
        return table_plan.print_plan(plan, chosen, workers, as_json)
    reporter.say(table_plan.summary(plan, len(chosen), workers))
    outcome = _run(plan, place, workers, executor, slurm or [], reporter) if run else Outcome()
    if outcome is None:
        return
    _write(every, chosen, cells, RecordStore(records), place, reporter, as_json)
    if run:
        _conclude(plan, outcome, reporter)


def _part(cells: Cells, tables: list[Table]) -> Cells:
    """The cells of some of the tables."""
    from dinobench.tables.cells import Cells

    names = {table.name for table in tables}
    of_row = {place: keys for place, keys in cells.of_row.items() if place[0] in names}
    wanted = {key for keys in of_row.values() for key in keys}
    return Cells(cells.scale, tuple(cell for cell in cells.all if cell.key in wanted), of_row)


def _run(
    plan: Plan, place: Workplace, workers: int, executor: Executor, slurm: list[str], reporter: Reporter
) -> Outcome | None:
    """Run what is missing; None when it was submitted and runs elsewhere."""
    from dinobench.tables.runner import Outcome, run_local, submit

    todo = [step.cell for step in plan.to_run]
    if not todo:
        return Outcome()
    if executor is Executor.local:
        return run_local(todo, place, workers, reporter.say)
    jobs = submit(todo, place, workers, _options(slurm), "slurm")
    reporter.say(
        f"submitted {len(jobs)} jobs ({jobs[0].job_id} ...), logs in {place.output / 'slurm'}; when they have "
        "ended, the same command with --no-run writes the tables"
    )
    return None


def _write(
    every: list[Table],
    chosen: list[Table],
    cells: Cells,
    store: RecordStore,
    place: Workplace,
    reporter: Reporter,
    as_json: bool,
) -> None:
    """Write the chosen tables and the index of all."""
    from dinobench.cli.output import print_json, print_table
    from dinobench.tables.contents import fill
    from dinobench.tables.listing import write_index
    from dinobench.tables.writing import write_table
    from pretrain.errors import CheckFailed

    folder = place.records / "tables"
    names = {table.name for table in chosen}
    filled = [fill(table, cells, store) for table in every]
    shown = [contents for contents in filled if contents.table.name in names and contents.lines]
    written = [path for contents in shown for path in write_table(contents, folder / cells.scale)]
    written += write_index(filled, folder)
    if as_json:
        print_json({"written": [str(path) for path in written], "tables": [contents.table.name for contents in shown]})
    else:
        rows = [[c.table.name, f"{c.num_records} of {c.num_wanted}", _outside(c.outside)] for c in shown]
        print_table(str(folder / cells.scale), ["table", "records", "out of tolerance"], rows)
    reporter.say(f"{len(written)} files written, the others are as they were")
    if place.track:
        _show(shown, cells, place, folder / cells.scale, reporter)
    if outside := [f"{c.table.name}: {where}" for c in shown for where in c.outside]:
        raise CheckFailed(f"out of tolerance: {'; '.join(outside)}")


def _show(tables: list[Contents], cells: Cells, place: Workplace, folder: Path, reporter: Reporter) -> None:
    """Log the tables to MLflow and say where; that it cannot be reached takes nothing from them."""
    from dinobench import tracking
    from dinobench.cli.links import say_links
    from dinobench.tables.overview import log_tables

    uri = tracking.tracking_uri(place.output)
    try:
        pages = log_tables(tracking.connect(uri), tables, cells, folder)
    except tracking.TrackingUnavailable as error:
        return reporter.warn(f"not logged to MLflow: {error}; the tables are in {folder} all the same")
    say_links(pages, uri, place.output, reporter.say)


def _conclude(plan: Plan, outcome: Outcome, reporter: Reporter) -> None:
    """Say what is still missing; exit code 3 when something is."""
    for cell, reason in outcome.failed.items():
        reporter.warn(f"not run: {cell.command}: {reason}")
    if outcome.held:
        reporter.warn(f"{len(outcome.held)} cells are worked on by another process: run this again when it has ended")
    for need, count in Counter(need for step in plan.waiting for need in step.absent).items():
        reporter.warn(f"{count} cells wait for {need}")
    if outcome.failed or outcome.held or plan.waiting:
        raise typer.Exit(3)


def _retrain(commit: str, cells: Cells, store: RecordStore, place: Workplace, reporter: Reporter) -> None:
    """Train one recorded cell in a folder of its own."""
    import tempfile
    from dataclasses import replace

    from dinobench.cli.output import print_table
    from dinobench.tables.retrain import choose, retrain
    from pretrain.errors import CheckFailed

    cell = choose(cells, store, commit)
    reporter.say(f"{commit[:12]} picks `{cell.command}`")
    with tempfile.TemporaryDirectory() as folder:
        apart = replace(place, output=Path(folder) / "runs", records=Path(folder) / "records")
        compared = retrain(cell, cells, store, apart, reporter.say)
    rows = [
        [c.suite, f"{c.recorded:.2f}", f"{c.found:.2f}", f"{c.allowed:.2f}", "yes" if c.holds else "NO"]
        for c in compared
    ]
    print_table(cell.command, ["", "recorded", "found", "may differ by", "holds"], rows)
    if differ := [c.suite for c in compared if not c.holds]:
        raise CheckFailed(f"{cell.command} differs from its record in {', '.join(differ)}: the record is stale")


def _outside(places: list[str]) -> str:
    return "; ".join(places) or "none"


def _seeds(text: str | None) -> tuple[int, ...] | None:
    from pretrain.errors import UsageError

    if text is None:
        return None
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as error:
        raise UsageError(f"--seeds {text!r}: expected numbers separated by commas, like 0,1,2") from error


def _options(pairs: list[str]) -> dict[str, Any]:
    from pretrain.errors import UsageError
    from pretrain.mapping import parse_yaml

    for pair in pairs:
        if not all(pair.partition("=")):
            raise UsageError(f"--slurm {pair!r}: expected KEY=VALUE, like slurm_partition=gpu")
    return {pair.partition("=")[0]: parse_yaml(pair.partition("=")[2], f"--slurm {pair!r}") for pair in pairs}


def _workers(device: str) -> int:
    """One per core this process may use; on a GPU one at a time."""
    import os

    import torch

    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
