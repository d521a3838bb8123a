"""`dinobench ls methods|presets|suites|datasets`."""

from __future__ import annotations

import ast
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Catalogue(StrEnum):
    """What can be listed."""

    methods = "methods"
    presets = "presets"
    suites = "suites"
    datasets = "datasets"


def list_catalogue(
    what: Annotated[Catalogue, typer.Argument(help="methods, presets, suites or datasets.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """List what there is to choose from."""
    from dinobench.cli.output import print_json, print_table

    entries = {
        Catalogue.methods: methods,
        Catalogue.presets: presets,
        Catalogue.suites: suites,
        Catalogue.datasets: datasets,
    }[what]()
    if as_json:
        return print_json(entries)
    columns = list(entries[0]) if entries else ["name"]
    print_table("", columns, [[str(entry[column]) for column in columns] for entry in entries])


def methods() -> list[dict[str, str]]:
    """Methods with the first sentence of their file."""
    from pretrain.methods.method import find_method, method_names

    return [{"name": name, "description": first_line(find_method(name)[0])} for name in method_names()]


def presets() -> list[dict[str, str]]:
    """Presets with the first comment of their file."""
    from pretrain.training.recipe import PRESETS_FOLDER, preset_names

    return [{"name": name, "description": first_comment(PRESETS_FOLDER / f"{name}.yaml")} for name in preset_names()]


def suites() -> list[dict[str, str]]:
    """Suites with what they measure."""
    from suites.suite import load_suite, suite_names

    loaded = [load_suite(name) for name in suite_names()]
    return [
        {"name": suite.id, "protocol": suite.protocol, "headline": suite.headline, "description": suite.description}
        for suite in loaded
    ]


def datasets() -> list[dict[str, str]]:
    """Data sets, whether they are there, and where."""
    from pretrain.data.datasets import dataset_names

    return [
        {
            "name": info.name,
            "splits": ", ".join(info.splits),
            "available": "yes" if info.available else "no",
            "where": str(info.where),
            "description": info.description,
        }
        for info in dataset_names()
    ]


def first_line(source: Path) -> str:
    """The first line of a Python file's docstring, read without running the file."""
    return (ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def first_comment(source: Path) -> str:
    """The first comment line of a YAML file."""
    lines = source.read_text(encoding="utf-8").splitlines()
    return next((line.lstrip("# ").strip() for line in lines if line.startswith("#")), "")
