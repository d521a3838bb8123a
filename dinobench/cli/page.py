"""`dinobench report [QUERY]`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dinobench.cli.compare import Align, Claim


def write_page(
    query: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[QUERY]",
            help="As for compare: run folders, checkpoints, results, records, or method=dino suite=digits_knn. "
            "Default: all runs.",
        ),
    ] = None,
    to: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
    output: Annotated[Path, typer.Option(help="Folder of the runs, for a query without paths.")] = Path("runs"),
    results: Annotated[
        Path | None,
        typer.Option(help="A results folder: its tables and figures are shown too, its records where there is no run."),
    ] = None,
    align: Annotated[
        Align, typer.Option(help="Compare at the last common step, common images seen, or at the end.")
    ] = Align.step,
    claim: Annotated[Claim, typer.Option(help="About methods (seeds) or checkpoints (images).")] = Claim.auto,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write one HTML page to send to others: scores, receipts, statistics, figures.

    It needs no network and no MLflow. Reads stored results only; of the same results it is the same file.
    """
    from dinobench.cli.output import print_json, print_text
    from dinobench.files import write_text
    from dinobench.page.contents import collect_page
    from dinobench.page.render import render
    from pretrain.errors import UsageError

    if to.is_dir():
        raise UsageError(f"--to {to} is a folder: name a file, like --to {to / 'report.html'}")
    page = collect_page(query or [], output, results=results, align=align.value, claim=claim.value)
    write_text(to, render(page))
    notes = [*page.notes, *([f"not compared: {page.refused}"] if page.refused else [])]
    suites = [section.suite for section in page.sections]
    if as_json:
        document = {"page": str(to), "bytes": to.stat().st_size, "candidates": page.num_candidates}
        return print_json({**document, "newest": page.newest, "suites": suites, "notes": notes})
    for note in notes:
        print_text(f"note: {note}")
    size = to.stat().st_size / 2**20
    print_text(f"{to}: candidates: {page.num_candidates}, suites: {len(suites)}, size: {size:.1f} MiB")
