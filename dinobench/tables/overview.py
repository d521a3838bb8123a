"""Tables as MLflow shows them: in the experiment dinobench/tables one run per table and scale, whose description is the
table with links to the runs of its cells, and whose artifacts are its files. Written again, it is brought up to date.
"""

from __future__ import annotations

import json
import socket
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dinobench.addresses import VIEW, as_unavailable, run_page
from dinobench.mirror import CELL_TAG
from dinobench.tables.cells import Cells
from dinobench.tables.contents import Contents, Line
from dinobench.tables.drawing import SUFFIXES as PICTURES
from dinobench.tables.writing import NOT_HERE, measured
from dinobench.tables.writing import SUFFIXES as TEXTS
from dinobench.tracking import LONGEST_TEXT, PRETRAIN_EXPERIMENT, TABLE_EXPERIMENT, Store

ABOUT = (
    "The papers' tables: one run per table and scale, which links the runs of its cells.\n\n"
    "The description of a run is the table, its artifacts are the files (Markdown, CSV, LaTeX, pictures). Accuracies "
    "in percent."
)
COMPARED = 20
"""Most runs that one page can compare and a reader can tell apart."""


def log_tables(store: Store, tables: Sequence[Contents], cells: Cells, folder: Path) -> dict[str, str]:
    """Log written tables.

    Args:
        folder: where the files of this scale lie.

    Returns:
        The pages that show them, without the address of the server.

    Raises:
        TrackingUnavailable: the store cannot be reached.
    """
    with as_unavailable(store.uri), store.lock():
        known = _cell_runs(store, cells)
        experiment = store.experiment(TABLE_EXPERIMENT, ABOUT)
        own = {contents.table.name: _log(store, experiment, contents, cells, known, folder) for contents in tables}
    shown = {f"table {name}": store.run_page("", run_id) for name, run_id in own.items()} if len(own) == 1 else {}
    return shown | store.links("")


def describe(contents: Contents, cells: Cells, known: Mapping[str, Any]) -> str:
    """Markdown: the table with links to its cells, as much of it as MLflow keeps.

    Args:
        known: key of a cell -> its run in MLflow, where there is one.
    """
    table = contents.table
    heads = ["row", *(column.label for column in contents.columns), "runs"]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * len(contents.columns) + "---|"]
    origin = f" Regenerates {table.regenerates}." if table.regenerates else ""
    records = f"{contents.num_records} of {contents.num_wanted} records"
    end = [f"{table.title}, at the scale {contents.scale}.{origin}", ""]
    end += [f"{records}. With published figures and verdicts: `{table.name}.md` in the artifacts."]
    compare = _compare(contents, cells, known)
    left = LONGEST_TEXT - len("\n".join([*lines, *end, compare])) - 100
    for line in contents.lines:
        text = _row(line, contents, cells, known)
        left -= len(text) + 1
        if left < 0:
            lines.append(f"| ... {len(contents.lines) - len(lines) + 2} more rows |" + " |" * (len(heads) - 1))
            break
        lines.append(text)
    return "\n".join([*lines, "", *end, *([compare] if compare else [])])


def _cell_runs(store: Store, cells: Cells) -> dict[str, Any]:
    """Key of a cell -> the run of its training, or of its released checkpoint; the newest where there are several."""
    experiments = store.experiments()
    found = {
        run.data.tags[CELL_TAG]: run
        for run in store.search([experiments.pop(PRETRAIN_EXPERIMENT)], {}, f"tags.`{CELL_TAG}` LIKE '%'")
    }
    released = {cell.science: cell.key for cell in cells.all if cell.released and cell.checkpoint}
    if released:
        for run in store.search(list(experiments.values()), {"dinobench.kind": "checkpoint"}):
            if key := released.get(run.data.tags["checkpoint.sha256"]):
                found[key] = run
    return found


def _log(
    store: Store, experiment: str, contents: Contents, cells: Cells, known: Mapping[str, Any], folder: Path
) -> str:
    table = contents.table
    tags = {
        "dinobench.kind": "table",
        "dinobench.table": table.name,
        "dinobench.scale": contents.scale,
        "table.folder": f"{socket.gethostname()}:{folder.absolute()}",
    }
    text = describe(contents, cells, known)
    if found := store.find(experiment, tags):
        run_id = found.info.run_id
    else:
        setting = table.setting(contents.scale)
        params = {"table": table.name, "scale": contents.scale, "preset": setting.preset}
        params |= {"regenerates": table.regenerates} if table.regenerates else {}
        run_id = store.create(experiment, f"{table.name}/{contents.scale}", params, tags, text)
    store.describe(run_id, text)
    store.client.set_tag(run_id, "records", f"{contents.num_records} of {contents.num_wanted}")
    files = [folder / f"{table.name}{suffix}" for suffix in (*TEXTS, *PICTURES)]
    store.log_files(run_id, [file for file in files if file.is_file()], "")
    store.finish(run_id, "FINISHED")
    return run_id


def _row(line: Line, contents: Contents, cells: Cells, known: Mapping[str, Any]) -> str:
    shown = [
        f"**{measured(entry, column)}**" if entry.bold else measured(entry, column)
        for entry, column in zip(line.entries, contents.columns, strict=True)
    ]
    links = " ".join(
        f"[s{cell.seed}]({run_page('', run.info.experiment_id, run.info.run_id).lstrip('/')})"
        for cell in cells.of(contents.table.name, line.row.label)
        if (run := known.get(cell.key))
    )
    return f"| {' | '.join([line.label, *shown, links or NOT_HERE])} |"


def _compare(contents: Contents, cells: Cells, known: Mapping[str, Any]) -> str:
    """A link that lays the runs of the cells side by side."""
    keys = [cell.key for line in contents.lines for cell in cells.of(contents.table.name, line.row.label)]
    runs = [known[key] for key in dict.fromkeys(keys) if key in known]
    if not 2 <= len(runs) <= COMPARED:
        return ""
    experiments = sorted({run.info.experiment_id for run in runs})
    query = {"runs": [run.info.run_id for run in runs], "experiments": experiments}
    text = "&".join(f"{name}={urllib.parse.quote(json.dumps(value))}" for name, value in query.items())
    return f"\n[Compare the {len(runs)} runs](#/compare-runs?{text}&{VIEW})"
