"""`dinobench ls methods|ablations|presets|suites|datasets`."""

from __future__ import annotations

import ast
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pretrain.training.recipe import Recipe


class Catalogue(StrEnum):
    """What can be listed."""

    methods = "methods"
    ablations = "ablations"
    presets = "presets"
    suites = "suites"
    datasets = "datasets"


def list_catalogue(
    what: Annotated[Catalogue, typer.Argument(help="methods, ablations, presets, suites or datasets.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """List what there is to choose from."""
    from dinobench.cli.output import print_json, print_table

    entries = {
        Catalogue.methods: methods,
        Catalogue.ablations: ablations,
        Catalogue.presets: presets,
        Catalogue.suites: suites,
        Catalogue.datasets: datasets,
    }[what]()
    if as_json:
        return print_json(entries)
    columns = list(entries[0]) if entries else ["name"]
    print_table("", columns, [[str(entry[column]) for column in columns] for entry in entries])


def methods() -> list[dict[str, str]]:
    """Methods with what their files say of themselves, and the parts their recipes are made of."""
    from pretrain.methods.method import find_method, method_names
    from pretrain.training.recipe import resolve

    entries = []
    for name in method_names():
        source, _ = find_method(name)
        about = {"name": name, "description": first_line(source), "paper": "", "objective": ""}
        about |= {key: value for key, value in docstring_fields(source).items() if key in about}
        entries.append({**about, "parts": parts(resolve(name, preset="imagenet_vits16"))})
    return entries


def parts(recipe: Recipe) -> str:
    """What a recipe is made of, in the words of its switches."""
    head, regularizer = recipe.head, recipe.regularizer
    found = []
    if head.num_prototypes:
        normaliser = {"none": "", "vmf": " + log C_p", "vmf_leading": " + leading log C_p"}[head.normaliser]
        magnitude = " (trained norms)" if head.train_magnitude else ""
        found += [f"{head.prototypes} prototypes{magnitude}{normaliser}", f"{recipe.target.centring} targets"]
    if recipe.patch.weight:
        found.append(f"patch loss ({recipe.patch.head} head)")
    terms = {"koleo": "KoLeo", "koleo_proto": "KoLeo on prototypes", "mean_entropy": "me-max", "gram": "Gram"}
    found += [text for key, text in terms.items() if getattr(regularizer, key)]
    found += ["squared error"] if recipe.objective.loss == "mse" else []
    found += ["predictor"] if recipe.objective.predictor else []
    found.append("no teacher" if recipe.teacher.kind == "none" else f"{recipe.teacher.kind} teacher")
    return ", ".join(found)


def ablations() -> list[dict[str, str]]:
    """Ablations and their rows; `dinobench pretrain ABLATION/ROW` trains one."""
    from pretrain.training.ablations import ABLATIONS_FOLDER, ablation_names, row_names

    return [
        {
            "name": name,
            "rows": ", ".join(row_names(name, "imagenet_vits16")),
            "description": first_comment(ABLATIONS_FOLDER / f"{name}.yaml"),
        }
        for name in ablation_names()
    ]


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


def docstring_fields(source: Path) -> dict[str, str]:
    """The lines `Paper: ...` and `Objective: ...` of a Python file's docstring, without running the file."""
    lines = (ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or "").splitlines()
    split = (line.partition(": ") for line in lines)
    return {key.lower(): value for key, colon, value in split if colon and key in ("Paper", "Objective")}


def first_comment(source: Path) -> str:
    """The first comment line of a YAML file."""
    lines = source.read_text(encoding="utf-8").splitlines()
    return next((line.lstrip("# ").strip() for line in lines if line.startswith("#")), "")
