"""What is on the page: a table per suite, the comparison with its statistics, tables, figures and receipts.

Where `dinobench compare` refuses, its reason stands in place of the comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from dinobench import plots
from dinobench.comparison.candidates import Candidate
from dinobench.comparison.claims import Claim, Comparison, compare
from dinobench.comparison.lineup import Align, Lineup, line_up
from dinobench.comparison.query import select, split_query
from dinobench.figures.comparison import draw_comparison
from dinobench.figures.drawing import Drawing
from dinobench.page.documents import Document, read_documents
from dinobench.page.pictures import Album, Picture
from dinobench.page.receipts import Receipt, Receipts
from dinobench.page.sections import Section, collect_sections, unaligned
from dinobench.runs import RunFolder, list_runs, run_of_checkpoint
from pretrain.errors import DinobenchError


@dataclass(frozen=True)
class Page:
    """Everything that is shown."""

    query: str
    newest: str
    """Time of the newest measurement; empty where none is known."""
    num_candidates: int
    sections: list[Section]
    comparison: Comparison | None
    refused: str
    """Why there is no comparison."""
    receipts: list[Receipt]
    curves: list[Picture]
    documents: list[Document]
    figures: list[Picture]
    runs: list[tuple[str, list[Picture]]]
    """Each run with its figures."""
    notes: list[str]


def collect_page(
    arguments: Sequence[str],
    output: Path,
    *,
    results: Path | None = None,
    align: Align = "step",
    claim: Claim = "auto",
    album: Album | None = None,
) -> Page:
    """Bring together what a query finds, everything in `output` if it is empty.

    Args:
        results: a results folder, whose tables and figures are shown too. Its records stand in where no path is named
            and `output` holds no run.

    Raises:
        UsageError: an unknown key of the query.
        DinobenchError: nothing is found, or a file is damaged.
    """
    album, receipts = album or Album(), Receipts(output)
    asked = _asked(arguments, output, results)
    selection = select(asked, output)
    candidates = selection.candidates
    sections, shared = collect_sections(candidates, receipts)
    lineup, comparison, refused = _compare(candidates, align, claim)
    curves = _pictures(draw_comparison(lineup), album)
    documents = read_documents(results, album, receipts.anchors()) if results else []
    folders = sorted({file.parent for file in results.glob("*/*.*")}) if results else []
    figures = [picture for folder in folders for picture in album.add_all(folder)]
    runs = [(run.name, album.add_all(run.figures)) for run in _runs(candidates)]
    return Page(
        query=" ".join(asked) or f"all runs in {output.name or output}",
        newest=max((receipt.created for receipt in receipts.all()), default=""),
        num_candidates=len(candidates),
        sections=sections,
        comparison=comparison,
        refused=refused,
        receipts=receipts.all(),
        curves=curves,
        documents=documents,
        figures=figures,
        runs=[(name, pictures) for name, pictures in runs if pictures],
        notes=[*selection.notes, *shared, *album.notes()],
    )


def _asked(arguments: Sequence[str], output: Path, results: Path | None) -> list[str]:
    """The query; with the records of the results folder where neither it nor `output` has anything to choose from."""
    if results is not None and not results.is_dir():
        raise DinobenchError(f"no folder {results}: --results takes one like results, with tables/<scale>/*.md in it")
    paths, _ = split_query(arguments)
    if results is None or paths or list_runs(output):
        return list(arguments)
    return [*(str(folder) for folder in sorted(results.glob("*/records"))), *arguments]


def _compare(candidates: list[Candidate], align: Align, claim: Claim) -> tuple[Lineup, Comparison | None, str]:
    """The candidates side by side, for their curves in any case, and what can be said of them."""
    lineup = unaligned(candidates)
    try:
        lineup = line_up(candidates, align)
        return lineup, compare(lineup, claim), ""
    except DinobenchError as error:
        return lineup, None, str(error)


def _pictures(drawings: Sequence[Drawing], album: Album) -> list[Picture]:
    found = []
    with TemporaryDirectory() as folder:
        for drawing in drawings:
            file = plots.save(drawing.figure, Path(folder) / f"{drawing.name}.svg")
            found.append(album.add(drawing.name, file))
    return [picture for picture in found if picture is not None]


def _runs(candidates: Sequence[Candidate]) -> list[RunFolder]:
    """The run of each candidate that has one, once."""
    found: dict[Path, RunFolder] = {}
    for candidate in candidates:
        run = RunFolder(candidate.source) if candidate.source.is_dir() else run_of_checkpoint(candidate.source)
        if run:
            found[run.path] = run
    return list(found.values())
