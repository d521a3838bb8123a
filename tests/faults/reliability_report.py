"""Write results/reliability.md from what the plugin `reliability` recorded.

    python tests/faults/reliability_report.py RECORD.json [MORE.json ...] --output results/reliability.md

Several records are parts of one run.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

PAIRS = {"kills": ("kills_survived", "kills_tried"), "bad inputs": ("inputs_handled", "inputs_tried")}
"""What is reported as a fraction: name -> (numerator, denominator) among the counts."""
RESULTS = {"passed": "holds", "failed": "**broken**", "skipped": "not run here"}


def merge(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Parts of one run as one record: the head of the first, the rest together."""
    merged = {**records[0], "figures": {}, "counts": {}, "promises": []}
    for record in records:
        merged["promises"] += record["promises"]
        for name, value in record["figures"].items():
            merged["figures"][name] = max(value, merged["figures"].get(name, value))
        for name, labels in record["counts"].items():
            sums = merged["counts"].setdefault(name, {})
            for label, number in labels.items():
                sums[label] = sums.get(label, 0) + number
    return merged


def report(record: dict[str, Any]) -> str:
    promises, machine = record["promises"], record["machine"]
    held = sum(row["outcome"] == "passed" for row in promises)
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        "# Reliability",
        "",
        "What was broken on purpose, what is promised, and the test that holds it. Written by `nox -s faults`.",
        "",
        f"- Date: {record['date']}",
        f"- Machine: {machine['processor']}, {machine['cpu_count']} cores, {machine['memory_gib']} GiB, "
        f"{machine['platform']}",
        f"- Versions: {versions}",
        f"- Kinds of fault: {len({row['fault'] for row in promises})}",
        f"- Promises: {held} of {len(promises)} hold",
        *_figures(record["counts"], record["figures"]),
        "",
    ]
    for title, (good, all_) in PAIRS.items():
        lines += _fractions(title, record["counts"].get(good, {}), record["counts"].get(all_, {}))
    rows = [
        (row["fault"], row["promise"], f"`{_short(row['test'])}`", RESULTS[row["outcome"]])
        for row in sorted(promises, key=lambda row: (row["fault"], row["promise"], row["test"]))
    ]
    return "\n".join(lines + _table(("fault", "promise", "test", "result"), rows))


def _figures(counts: dict[str, dict[str, float]], figures: dict[str, float]) -> list[str]:
    sums = {name: sum(labels.values()) for name, labels in counts.items()}
    lines = [
        f"- {title.capitalize()} {good.split('_')[1]} / tried: {sums.pop(good, 0):g} / {sums.pop(all_):g}"
        for title, (good, all_) in PAIRS.items()
        if sums.get(all_)
    ]
    named = [*sums.items(), *figures.items()]
    return lines + [f"- {_title(name)}: {round(value, 3):.10g}" for name, value in named]


def _title(name: str) -> str:
    """A figure's name in words."""
    return name.replace("_", " ").capitalize().replace("Mlflow", "MLflow").replace(" mb", " in MB", 1)


def _fractions(title: str, good: dict[str, float], tried: dict[str, float]) -> list[str]:
    """Table of a fraction by its labels."""
    if not tried:
        return []
    rows = [(label or "all", f"{good.get(label, 0):g} / {number:g}") for label, number in sorted(tried.items())]
    word = "survived" if title == "kills" else "handled"
    return [f"## {title.capitalize()}", "", *_table(("kind", f"{word} / tried"), rows)]


def _short(test: str) -> str:
    """The test without its parameters: one promise, many cases."""
    return test.split("[")[0]


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    lines = [head, tuple("---" for _ in head), *dict.fromkeys(rows)]
    return [*("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines), ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="the .md file; the record is written beside it")
    options = parser.parse_args()
    record = merge([json.loads(file.read_text()) for file in options.records])
    options.output.write_text(report(record))
    options.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    broken = [row["test"] for row in record["promises"] if row["outcome"] == "failed"]
    if broken:
        sys.exit("broken promises:\n" + "\n".join(broken))


if __name__ == "__main__":
    main()
