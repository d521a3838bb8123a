"""`dinobench compare A B...`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dinobench.comparison.claims import Comparison, Pair, Row
    from dinobench.comparison.lineup import Lineup

MAX_SENTENCES = 6
"""Most pairs that get a sentence each; of more, only the differences that are shown."""


class Align(StrEnum):
    """Where in the training runs are compared."""

    step = "step"
    images = "images"
    last = "last"


class Claim(StrEnum):
    """What is claimed."""

    auto = "auto"
    methods = "methods"
    checkpoints = "checkpoints"


def run_comparison(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="A B...",
            help="Run folders, checkpoints, records, folders of them; or a query like method=dino,dino_vmf.",
        ),
    ],
    suite: Annotated[list[str] | None, typer.Option(help="Suite name; repeat it, or separate with commas.")] = None,
    align: Annotated[
        Align, typer.Option(help="Compare at the last common step, common images seen, or at the end.")
    ] = (Align.step),
    claim: Annotated[Claim, typer.Option(help="About methods (seeds) or checkpoints (images).")] = Claim.auto,
    output: Annotated[Path, typer.Option(help="Folder of the runs, for a query without paths.")] = Path("runs"),
    figures: Annotated[Path | None, typer.Option(metavar="DIR", help="Draw curves, classes and prototypes.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Compare methods or checkpoints with statistics.

    Reads stored results only. Two claims, never mixed: between checkpoints (McNemar and paired bootstrap over images),
    and between methods (paired t over seeds, from 5 seeds on); p-values are adjusted with Holm over all pairs.
    """
    from dinobench.cli.eval import split_names
    from dinobench.cli.output import print_json, print_text
    from dinobench.comparison.claims import compare
    from dinobench.comparison.lineup import line_up
    from dinobench.comparison.query import select

    selection = select(what, output, split_names(suite) if suite else ())
    lineup = line_up(selection.candidates, align.value)
    comparison = compare(lineup, claim.value)
    files, drawings = _draw(lineup, figures) if figures else ([], [])
    notes = [*selection.notes, *comparison.notes]
    if as_json:
        document = {**comparison.document(), "notes": notes}
        return print_json({**document, "figures": [str(file) for file in files], "drawings": drawings})
    _print(comparison, notes)
    for file in files:
        print_text(str(file))


def _draw(lineup: Lineup, folder: Path) -> tuple[list[Path], list[dict]]:
    from dinobench.figures.comparison import draw_comparison
    from dinobench.results import plain

    drawings = draw_comparison(lineup)
    written = [(drawing, drawing.write(folder)) for drawing in drawings]
    shown = [{"files": [str(file) for file in files], **plain(drawing.numbers)} for drawing, files in written]
    return [file for _, files in written for file in files], shown


def _print(comparison: Comparison, notes: list[str]) -> None:
    from dinobench.cli.output import print_table, print_text

    methods = comparison.claim == "methods"
    columns = ["suite", "score", *(["method", "mean", "sd", "seeds"] if methods else ["checkpoint", "value"])]
    where = "seeds, on these test images" if methods else "test images, of these networks"
    rows = [_row_cells(row, methods) for row in comparison.rows]
    print_table(f"Scores; intervals over {where}", [*columns, "95 % interval", "n", "step"], rows)
    columns = ["suite", "first", "second", "difference", "95 % interval", "p", "Holm p", "test"]
    print_table("Differences, first minus second", columns, [_pair_cells(pair) for pair in comparison.pairs])
    for sentence in _sentences(comparison.pairs):
        print_text(sentence)
    for suite, method in comparison.best.items():
        print_text(f"{suite}: {method} is better than every other method here.")
    for note in notes:
        print_text(f"note: {note}")


def _row_cells(row: Row, methods: bool) -> list[str]:
    spread = ["-" if row.spread is None else f"{row.spread:.1f}", str(len(row.seeds))] if methods else []
    steps = ", ".join(map(str, row.steps))
    return [row.suite, row.headline, row.name, f"{row.score:.1f}", *spread, _interval(row.interval), str(row.n), steps]


def _pair_cells(pair: Pair) -> list[str]:
    effect = pair.effect
    test = "-" if effect.p is None else effect.test
    difference = [f"{effect.difference:+.1f}", _interval(effect.interval, sign=True)]
    return [pair.suite, pair.first, pair.second, *difference, _p(effect.p), _p(pair.adjusted_p), test]


def _sentences(pairs: list[Pair]) -> list[str]:
    if len(pairs) <= MAX_SENTENCES:
        return [pair.sentence for pair in pairs]
    shown = [pair for pair in pairs if pair.shown]
    tested = sum(pair.adjusted_p is not None for pair in pairs)
    return [
        *(pair.sentence for pair in shown),
        f"{tested} of {len(pairs)} pairs were tested; {len(shown)} of them differ by more than chance, after Holm.",
    ]


def _interval(bounds: tuple[float, float] | None, *, sign: bool = False) -> str:
    if bounds is None:
        return "-"
    return "{:+.1f} to {:+.1f}".format(*bounds) if sign else "{:.1f} to {:.1f}".format(*bounds)


def _p(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"
