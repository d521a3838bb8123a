"""A table as Markdown, CSV and LaTeX.

The same records give the same bytes: nothing is dated, rows keep the order of the definition, numbers have a fixed
number of decimals. A picture is drawn anew only when the CSV has changed: its bytes depend on the version of
matplotlib, its data do not.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from dinobench.files import write_text
from dinobench.tables.contents import Contents, Entry, Line, receipt_paths
from dinobench.tables.definition import Column

SUFFIXES = (".md", ".csv", ".tex")
CSV_DECIMALS = 3
NOT_HERE = "-"
SPECIAL = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
    }
)
CSV_COLUMNS = (
    *("table", "scale", "row", "column", "suite", "score", "published", "published_in", "published_source", "seeds"),
    *("n", "mean", "sd", "low", "high", "difference", "tolerance", "verdict", "bold", "short_schedule", "receipts"),
)


def texts(contents: Contents, folder: Path) -> dict[str, str]:
    """Suffix -> text, for the folder in which they will lie."""
    return dict(
        zip(SUFFIXES, (markdown(contents, folder), comma_separated(contents, folder), latex(contents)), strict=True)
    )


def write_table(contents: Contents, folder: Path) -> list[Path]:
    """Write what is not there yet; gives the files that were written."""
    from dinobench.tables.drawing import SUFFIXES as PICTURES
    from dinobench.tables.drawing import draw

    stem = folder / contents.table.name
    written = []
    for suffix, text in texts(contents, folder).items():
        file = stem.with_name(stem.name + suffix)
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            write_text(file, text)
            written.append(file)
    pictures = [stem.with_name(stem.name + suffix) for suffix in PICTURES]
    changed = stem.with_name(stem.name + ".csv") in written
    if contents.num_records and (changed or not all(picture.is_file() for picture in pictures)):
        written += draw(contents).write(folder)
    return written


def markdown(contents: Contents, folder: Path) -> str:
    """A page: what the table is, the table, and where its published figures were read."""
    table, scale = contents.table, contents.scale
    comparable = scale == "paper"
    heads, aligned = ["", "seeds"], ["---", "---:"]
    for column in contents.columns:
        parts = ["published"] if column.published else []
        parts += ["measured", *(["difference"] if column.published and comparable else [])]
        heads += [f"{column.label} {part}" if len(parts) > 1 else column.label for part in parts]
        aligned += ["---:"] * len(parts)
    heads, aligned = [*heads, "verdict", "receipts"], [*aligned, "---", "---"]
    body = [_baseline_cells(name, scores, contents) for name, scores in contents.baselines.items()]
    body += [_line_cells(line, contents, folder) for line in contents.lines]
    rows = [heads, aligned, *body]
    lines = [f"# {table.title}", "", *_about(contents), ""]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    if contents.num_records:
        lines += ["", f"![{table.title}]({table.name}.png)"]
    lines += ["", *_sources(contents)]
    return "\n".join(lines).rstrip() + "\n"


def comma_separated(contents: Contents, folder: Path) -> str:
    """One line per row and column, numbers with three decimals."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for line in contents.lines:
        receipts = " ".join(path for _, path in receipt_paths(line, folder))
        for column, entry in zip(contents.columns, line.entries, strict=True):
            measure = column.at[contents.scale]
            low, high = entry.interval or (None, None)
            numbers = [entry.mean, entry.spread, low, high, entry.difference]
            writer.writerow(
                [
                    contents.table.name,
                    contents.scale,
                    line.label,
                    column.label,
                    measure.suite,
                    measure.score,
                    " ".join(figure.value for figure in entry.published),
                    "; ".join(figure.cited for figure in entry.published),
                    "; ".join(dict.fromkeys(figure.source for figure in entry.published)),
                    " ".join(map(str, entry.scores)),
                    entry.n,
                    *("" if number is None else f"{number:.{CSV_DECIMALS}f}" for number in numbers),
                    contents.table.tolerance,
                    entry.verdict,
                    "yes" if entry.bold else "",
                    " ".join(contents.short),
                    receipts,
                ]
            )
    return out.getvalue()


def latex(contents: Contents) -> str:
    """A table environment with booktabs rules: published and measured per column."""
    table = contents.table
    pairs = [bool(column.published) for column in contents.columns]
    first = ["", ""] + [
        rf"\multicolumn{{2}}{{c}}{{{escape(column.label)}}}" if pair else escape(column.label)
        for column, pair in zip(contents.columns, pairs, strict=True)
    ]
    second = ["", "seeds"] + [part for pair in pairs for part in (("published", "measured") if pair else ("measured",))]
    rows = [[escape(line.label), str(len(line.records)), *_latex_numbers(line, contents)] for line in contents.lines]
    caption = escape(f"{table.title}. {_origin(contents)}")
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{caption}}}",
            rf"\label{{tab:{table.name}-{contents.scale}}}",
            rf"\begin{{tabular}}{{lr{''.join('rr' if pair else 'r' for pair in pairs)}}}",
            r"\toprule",
            " & ".join(first) + r" \\",
            " & ".join(second) + r" \\",
            r"\midrule",
            *(" & ".join(row) + r" \\" for row in rows),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def number(value: float | None, decimals: int = 1) -> str:
    return NOT_HERE if value is None else f"{value:.{decimals}f}"


def escape(text: str) -> str:
    """Plain text for LaTeX."""
    return text.translate(SPECIAL).replace("±", r"$\pm$")


def measured(entry: Entry, column: Column) -> str:
    """Mean with spread, or the one value with its interval over images."""
    if entry.mean is None:
        return NOT_HERE
    text = number(entry.mean, column.decimals)
    if entry.spread is not None:
        return f"{text} ± {number(entry.spread, column.decimals)}"
    if entry.interval is not None:
        return f"{text} [{', '.join(number(end, column.decimals) for end in entry.interval)}]"
    return text


def _line_cells(line: Line, contents: Contents, folder: Path) -> list[str]:
    cells = [line.label, str(len(line.records)) if line.records else NOT_HERE]
    for column, entry in zip(contents.columns, line.entries, strict=True):
        text = measured(entry, column)
        if column.published:
            cells.append(_published(entry))
        cells.append(f"**{text}**" if entry.bold else text)
        if column.published and contents.scale == "paper":
            cells.append(NOT_HERE if entry.difference is None else f"{entry.difference:+.{column.decimals}f}")
    receipts = " ".join(f"[s{seed}]({path})" for seed, path in receipt_paths(line, folder))
    return [*cells, _verdicts(line, contents.columns), receipts]


def _baseline_cells(name: str, scores: Sequence[float | None], contents: Contents) -> list[str]:
    cells = [name, ""]
    for column, score in zip(contents.columns, scores, strict=True):
        cells += [""] if column.published else []
        cells.append(number(score, column.decimals))
        cells += [""] if column.published and contents.scale == "paper" else []
    return [*cells, "baseline", ""]


def _published(entry: Entry) -> str:
    """As printed; where papers differ on a checkpoint, each with its source."""
    if len({figure.value for figure in entry.published}) > 1:
        return " / ".join(f"{figure.value} ({figure.cited})" for figure in entry.published)
    return entry.published[0].value if entry.published else ""


def _verdicts(line: Line, columns: Sequence[Column]) -> str:
    """One word where the columns agree, else each with its columns."""
    by_verdict: dict[str, list[str]] = {}
    for column, entry in zip(columns, line.entries, strict=True):
        by_verdict.setdefault(entry.verdict, []).append(column.label)
    if len(by_verdict) == 1:
        return next(iter(by_verdict))
    return "; ".join(f"{verdict} ({', '.join(labels)})" for verdict, labels in by_verdict.items())


def _latex_numbers(line: Line, contents: Contents) -> list[str]:
    cells = []
    for column, entry in zip(contents.columns, line.entries, strict=True):
        text = escape(measured(entry, column))
        cells += [escape(" / ".join(figure.value for figure in entry.published))] if column.published else []
        cells.append(rf"\textbf{{{text}}}" if entry.bold else text)
    return cells


def _origin(contents: Contents) -> str:
    setting = contents.table.setting(contents.scale)
    source = f"Regenerates {contents.table.regenerates}. " if contents.table.regenerates else ""
    short = f" Short schedule ({' '.join(contents.short)})." if contents.short else ""
    return f"{source}Scale {contents.scale}, preset {setting.preset}.{short}"


def _about(contents: Contents) -> list[str]:
    """What a reader has to know before the numbers."""
    table = contents.table
    setting = table.setting(contents.scale)
    what = [f"Regenerates {table.regenerates}."] if table.regenerates else []
    seeds = max((line.wanted for line in contents.lines), default=0)
    what.append(f"Scale `{contents.scale}`, preset `{setting.preset}`, {seeds} seed{'' if seeds == 1 else 's'}.")
    if contents.short:
        what.append(f"**Short schedule**: `{' '.join(contents.short)}`.")
    how = (
        "Measured: last checkpoint, mean ± sample standard deviation over seeds; a single seed has the 95 % bootstrap "
        "interval over images where its suite gives one. "
    )
    if contents.scale == "paper":
        how += f"Within tolerance: at most {table.tolerance} points from the published figure."
    elif any(column.published for column in contents.columns):
        how += "Published figures are of another scale and stand beside for reference only"
        how += f"; at the scale paper the tolerance is {table.tolerance} points."
    bold = "Bold: better than every other row by the paired t test over at least 5 seeds, Holm over the table."
    some_bold = any(entry.bold for line in contents.lines for entry in line.entries)
    left = [f"{contents.left_out} more rows are trained at other scales."] if contents.left_out else []
    paragraphs = [" ".join(what), how.strip(), *([bold] if some_bold else []), table.notes.strip(), *left]
    command = (
        f"`dinobench table --scale {contents.scale} --only {table.name}` trains what is missing and writes this page."
    )
    return "\n\n".join([*(paragraph for paragraph in paragraphs if paragraph), command]).split("\n")


def _sources(contents: Contents) -> list[str]:
    found = {
        f"- {figure.paper}, {figure.table}: {figure.source}"
        for line in contents.lines
        for entry in line.entries
        for figure in entry.published
    }
    return ["Published figures were read in:", "", *sorted(found)] if found else []
