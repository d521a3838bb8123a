"""The index of the tables: every table of a scale with how much of it is measured and what came out.

<folder>/<scale>/<table>.md .csv .tex .png .svg
<folder>/<scale>/README.md                           the index of the scale
<folder>/README.md                                   the scales
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dinobench.files import write_text
from dinobench.tables.contents import Contents
from dinobench.tables.definition import SCALES

SCALE_WORDS = {
    "digits": "embedded data, on a laptop",
    "small": "CIFAR-10 and the data packs, on one GPU",
    "paper": "ImageNet and the published recipes, or released weights",
}


def index(every: Sequence[Contents]) -> str:
    """The page of a scale: every table, how much of it is measured, and what came out."""
    scale = every[0].scale if every else SCALES[0]
    shown = [contents for contents in every if contents.columns and contents.lines]
    rows = [
        "| table | regenerates | records | schedule | verdicts |",
        "|---|---|---:|---|---|",
        *(_index_row(contents) for contents in shown),
    ]
    absent = sorted(contents.table.name for contents in every if contents not in shown)
    rest = f"\nAt other scales only, for want of data here: {', '.join(absent)}.\n" if absent else ""
    return (
        f"# Tables at the scale {scale}\n\n"
        f"Written by `dinobench table --scale {scale}` from the records; each page links them. Records: seeds trained "
        "of seeds that the table asks for.\n\n" + "\n".join(rows) + "\n" + rest
    )


def write_index(every: Sequence[Contents], folder: Path) -> list[Path]:
    """Write the index of a scale, and the list of scales above it, where they changed."""
    if not every:
        return []
    files = {folder / every[0].scale / "README.md": index(every)}
    present = [scale for scale in SCALES if scale == every[0].scale or (folder / scale / "README.md").is_file()]
    listed = "\n".join(f"- [{scale}]({scale}/README.md): {SCALE_WORDS[scale]}" for scale in present)
    files[folder / "README.md"] = f"# The papers' tables\n\nWritten by `dinobench table`, never by hand.\n\n{listed}\n"
    changed = {file: text for file, text in files.items() if not file.is_file() or file.read_text("utf-8") != text}
    for file, text in changed.items():
        write_text(file, text)
    return list(changed)


def _index_row(contents: Contents) -> str:
    table = contents.table
    verdicts = Counter(entry.verdict for line in contents.lines for entry in line.entries)
    schedule = "short" if contents.short else "full"
    records = f"{contents.num_records} of {contents.num_wanted}"
    said = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items()))
    return f"| [{table.title}]({table.name}.md) | {table.regenerates} | {records} | {schedule} | {said} |"
