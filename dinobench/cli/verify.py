"""`dinobench verify RESULT.json...`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from dinobench.verify import Comparison, Verdict

HASH_SHOWN = 16


def run_verification(
    results: Annotated[
        list[Path],
        typer.Argument(metavar="RESULT.json...", help="Result files: <run>/evals/<suite>/<checkpoint>.json."),
    ],
    checkpoint: Annotated[Path | None, typer.Option(help="Where the checkpoint is now.")] = None,
    data: Annotated[str | None, typer.Option(help="Where the images are now, like folder:/path.")] = None,
    suite: Annotated[str | None, typer.Option(help="Definition of a suite that is not shipped.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Points by which a score may differ. Default: one image or 0.1, whichever is more, up to 1 % of it.",
        ),
    ] = None,
    from_cache: Annotated[
        bool, typer.Option("--from-cache", help="Take stored features: verifies the protocol only.")
    ] = False,
    baselines: Annotated[bool, typer.Option("--baselines/--no-baselines", help="Verify the baselines too.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Derive results again from checkpoint and images, without the feature cache, and compare.

    Exit code 0 when all hold, 4 when one does not, 3 when its checkpoint or images are not here.
    """
    from dinobench.cli.output import print_json
    from dinobench.reporter import Reporter
    from dinobench.verify import Options, verify
    from pretrain.errors import CheckFailed

    options = Options(checkpoint, data, suite, device, tolerance, from_cache, baselines)
    reporter = Reporter()
    verdicts = [verify(file, options, reporter.say) for file in results]
    if as_json:
        documents = [document(verdict) for verdict in verdicts]
        print_json(documents[0] if len(documents) == 1 else documents)
    else:
        for verdict in verdicts:
            _print(verdict)
    wrong = [f"{v.file} does not hold: {_explain(v)}" for v in verdicts if not v.holds]
    if wrong:
        raise CheckFailed("; ".join(wrong))


def document(verdict: Verdict) -> dict[str, Any]:
    """What --json prints of a verdict."""
    return {
        "result": str(verdict.file),
        "suite": verdict.result.suite,
        "verdict": "holds" if verdict.holds else "does not hold",
        "scope": verdict.scope,
        "measured": verdict.measured,
        "mismatches": [comparison.name for comparison in verdict.mismatches],
        "comparisons": [
            {"name": c.name, "stated": c.stated, "found": c.found, "allowed": c.allowed, "holds": c.holds}
            for c in verdict.comparisons
        ],
    }


def _print(verdict: Verdict) -> None:
    """What the result was made from, its headline, and whatever does not hold; the rest as a count."""
    from dinobench.cli.output import print_table, print_text

    result = verdict.result
    shown = [c for c in verdict.comparisons if not c.holds or c.allowed is None or c.name == result.headline]
    rows = [[c.name, _cell(c.stated), _cell(c.found), _allowed(c), "yes" if c.holds else "NO"] for c in shown]
    print_table(f"{result.suite} on {result.checkpoint}", ["", "stated", "found", "may differ by", "holds"], rows)
    rest = len(verdict.comparisons) - len(shown)
    if rest:
        print_text(f"{rest} more numbers agree with what was found")
    if verdict.holds:
        print_text(f"holds: {verdict.scope if verdict.from_cache else f'measured again from {verdict.scope}'}")


def _explain(verdict: Verdict) -> str:
    """The mismatches in words, and what they mean."""
    named = [f"{c.name} is {_cell(c.found)}, stated is {_cell(c.stated)}" for c in verdict.mismatches]
    few = ", ".join(named[:4]) + (f" and {len(named) - 4} more" if len(named) > 4 else "")
    if verdict.measured:
        return f"{few}; measure again with `dinobench eval`, or allow more with --tolerance if the machine differs"
    return f"{few}; nothing was measured, because it was made from something else"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "nothing" if value is None else str(value)[:HASH_SHOWN]


def _allowed(comparison: Comparison) -> str:
    return "" if comparison.allowed is None else _cell(comparison.allowed)
