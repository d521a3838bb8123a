"""Ablations: named rows of overrides on top of a recipe, one file per table of a paper.

    # first line: what the table is
    recipe: dino                                # the method whose recipe the rows change
    at: {<preset>: {...}}                       # for all rows at a preset; `rows` in it replaces the rows there
    cumulative: false                           # each row also holds what the rows above it change
    rows:
      <row>: {<section>: {...}, recipe: <another method>, at: {<preset>: {...}}}

`dinobench pretrain <ablation>/<row>` trains a row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pretrain.errors import unknown_name
from pretrain.mapping import read_mapping

ABLATIONS_FOLDER = Path(__file__).parent.parent / "recipes" / "ablations"


def ablation_names() -> list[str]:
    return sorted(path.stem for path in ABLATIONS_FOLDER.glob("*.yaml"))


def row_names(ablation: str, preset: str) -> list[str]:
    """The rows of an ablation at a preset, in the order of the table."""
    return list(_rows(_read(ablation), preset))


def find_row(name: str, preset: str) -> tuple[str, list[dict[str, Any]]]:
    """`<ablation>/<row>` -> the method, and the layers to merge over its recipe, the last one wins.

    Raises:
        UsageError: there is no such ablation or row (the nearest name is offered).
    """
    ablation, _, row = name.partition("/")
    content = _read(ablation)
    rows = _rows(content, preset)
    if row not in rows:
        raise unknown_name(f"row of {ablation}", row, list(rows))
    names = list(rows)
    chosen = names[: names.index(row) + 1] if content.get("cumulative") else [row]
    layers = [dict(content.get("at", {}).get(preset, {})), *(dict(rows[each] or {}) for each in chosen)]
    method = content["recipe"]
    flat = []
    for layer in layers:
        layer.pop("rows", None)
        method = layer.pop("recipe", method)
        here = layer.pop("at", {}).get(preset, {})
        flat += [layer, here]
    return method, [layer for layer in flat if layer]


def _read(ablation: str) -> dict[str, Any]:
    if ablation not in ablation_names():
        raise unknown_name("ablation", ablation, ablation_names())
    return read_mapping(ABLATIONS_FOLDER / f"{ablation}.yaml", kind="ablation", holds="recipe and rows")


def _rows(content: dict[str, Any], preset: str) -> dict[str, Any]:
    return content.get("at", {}).get(preset, {}).get("rows", content["rows"])
