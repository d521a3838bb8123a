"""What `dinobench table --dry-run` prints: every cell of every table, and what it needs."""

from __future__ import annotations

from typing import Any

from dinobench.cli.output import print_json, print_table, print_text
from dinobench.tables.definition import Scale, Table
from dinobench.tables.plan import Plan, Step


def print_plan(plan: Plan, tables: list[Table], workers: int, as_json: bool) -> None:
    steps = {step.cell.key: step for step in plan.steps}
    scale = plan.cells.scale
    listed = [
        (table, row.label_at(scale), steps[key])
        for table in tables
        for row in table.rows
        for key in plan.cells.of_row[table.name, row.label]
    ]
    if as_json:
        return print_json([_document(table, row, step, scale) for table, row, step in listed])
    heads = ["row", "seed", "state", "needs", "time" if scale == "digits" else "GPU hours"]
    for table in tables:
        rows = [_plan_cells(table, row, step, scale) for owner, row, step in listed if owner is table]
        if rows:
            print_table(f"{table.name}: {table.title}", heads, rows)
    print_text(summary(plan, len(tables), workers))
    trainings = [step for step in plan.steps if not step.cell.released]
    if scale != "digits" and any(step.gpu_hours is None for step in trainings):
        print_text("GPU hours unknown: no GPU throughput measured yet for these recipes (dinobench/throughput.yaml)")


def _plan_cells(table: Table, row: str, step: Step, scale: Scale) -> list[str]:
    state = "done" if step.done else "to run" if step.ready else "waits"
    if step.record is not None and step.missing:
        state = f"{state} ({', '.join(step.missing)} missing)"
    needs = ", ".join(step.needs(table.suites(scale)))
    if step.cell.weights and not step.cell.released:
        needs += f"; or checkpoint {step.cell.weights} in checkpoints.yaml"
    return [row, "" if step.cell.released else str(step.cell.seed), state, needs, _time(step, scale != "digits")]


def _time(step: Step, on_gpus: bool) -> str:
    if step.done or step.cell.released:
        return ""
    value = step.gpu_hours if on_gpus else step.seconds
    if value is None:
        return "unknown"
    return f"{value:.0f} h" if on_gpus else f"{value / 60:.1f} min"


def _document(table: Table, row: str, step: Step, scale: Scale) -> dict[str, Any]:
    return {
        "table": table.name,
        "row": row,
        "seed": step.cell.seed,
        "key": step.cell.key,
        "command": step.cell.command,
        "suites": list(step.data),
        "done": step.done,
        "record": str(step.record.file) if step.record else None,
        "missing": list(step.missing),
        "needs": step.needs(table.suites(scale)),
        "weights": step.cell.weights,
        "absent": step.absent,
        "ready": step.ready,
        "seconds": step.seconds,
        "gpu_hours": step.gpu_hours,
    }


def summary(plan: Plan, num_tables: int, workers: int) -> str:
    minutes = plan.minutes(workers)
    time = "time unknown: nothing similar was measured" if minutes is None else f"about {minutes:.0f} minutes"
    parts = [f"{plan.num_done} done", f"{len(plan.to_run)} to run ({time}, {workers} at a time)" if plan.to_run else ""]
    parts.append(f"{len(plan.waiting)} wait for what is not here" if plan.waiting else "")
    said = ", ".join(part for part in parts if part)
    return f"{plan.cells.scale}: {num_tables} tables, {len(plan.steps)} cells: {said}"
