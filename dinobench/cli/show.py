"""`dinobench show CKPT|RUN`, and `dinobench runs show RUN`, which is the same for a run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pretrain.models.checkpoint import LoadedModel

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def show(
    path: Annotated[Path, typer.Argument(metavar="CKPT|RUN", help="A checkpoint file or a run folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show what a checkpoint holds, or how a run stands and what to do about it.

    The precisions kappa of the prototypes are among it.
    """
    from dinobench.cli.output import print_json

    if path.is_dir():
        return show_run(path, as_json)
    document = describe_checkpoint(path)
    if as_json:
        return print_json(document)
    _print_section("", document)


def show_run(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Say how a run stands (running, killed, interrupted, finished, collapsed, failed), what it has, and what to do.

    Every checkpoint is read and compared with its checksums. `dinobench show RUN` is the same.
    """
    from dinobench.cli.output import print_json, print_text

    document = describe_run(path)
    if as_json:
        return print_json(document)
    print_text(f"{document.pop('name')}: {document.pop('says')}")
    for todo in document.pop("todo"):
        print_text(f"- {todo['reason']}{':' if todo['command'] else ''}")
        if todo["command"]:
            print_text(f"    {todo['command']}")
    whole = {c["name"]: c["damage"] or f"whole, {c['megabytes']} MB" for c in document.pop("checkpoints")}
    _print_section("", {"checkpoints": whole, **document})


def describe_run(path: Path) -> dict[str, Any]:
    """How a run stands and what to do; its state, latest value of each metric, scores and last checkpoint."""
    from dinobench.cli.runs import describe
    from dinobench.condition import diagnose
    from dinobench.runs import open_run
    from pretrain.errors import DinobenchError

    run = open_run(path)
    condition = diagnose(run)
    facts: dict[str, Any] = {**describe(run), **asdict(condition)}
    if condition.status != "damaged":
        facts |= run.state().model_dump(exclude={"key", "status", "step"})
    points = run.journal.read()
    latest = {key: value for point in points for key, value in point.finite().items()}
    facts["metrics"] = {"step": points[-1].step, **latest} if points else {}
    whole = [run.checkpoints / checkpoint.name for checkpoint in condition.checkpoints if not checkpoint.damage]
    if whole:
        try:
            facts["checkpoint"] = describe_checkpoint((sorted(set(whole) - {run.last_checkpoint}) or whole)[-1])
        except DinobenchError as error:  # of another version, or removed meanwhile
            facts["checkpoint"] = {"note": str(error)}
    return facts


def describe_checkpoint(path: Path) -> dict[str, Any]:
    """Where a checkpoint comes from, what is in it, and the spread of its prototypes."""
    from dinobench.results import plain
    from pretrain.models.checkpoint import load

    model = load(path)
    parameters = sum(parameter.numel() for parameter in model.backbone.parameters())
    return {
        **plain(model.provenance),
        "backbone_parameters": parameters,
        "normaliser": model.normaliser,
        "temperature": model.temperature,
        "prototypes": prototype_statistics(model),
    }


def prototype_statistics(model: LoadedModel) -> dict[str, Any]:
    """Number of prototypes, and quantiles of their norms and precisions kappa = norm / teacher temperature."""
    import torch

    if model.prototypes is None:
        return {}
    norms = model.prototypes.norms().detach().float().flatten()
    levels = norms.quantile(torch.tensor(QUANTILES)).tolist()
    names = [f"q{round(100 * level):02d}" for level in QUANTILES]
    statistics: dict[str, Any] = {"number": len(norms), "norm": dict(zip(names, levels, strict=True))}
    if model.temperature:
        statistics["kappa"] = {name: level / model.temperature for name, level in statistics["norm"].items()}
    return statistics


def _print_section(indent: str, values: dict[str, Any]) -> None:
    from dinobench.cli.output import print_text

    for key, value in values.items():
        if isinstance(value, dict):
            print_text(f"{indent}{key}:{'' if value else ' none'}")
            _print_section(f"{indent}  ", value)
        else:
            print_text(f"{indent}{key}: {f'{value:.4g}' if isinstance(value, float) else value}")
