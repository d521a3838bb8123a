"""`dinobench pretrain METHOD`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dinobench.train import Summary
    from pretrain.training.recipe import Recipe


def run_pretraining(
    method: Annotated[
        str, typer.Argument(metavar="METHOD", help="A method (`dinobench ls methods`), a .py file, or a recipe.yaml.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values of the recipe, like optim.lr=0.001.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Data, backbone and schedule (`dinobench ls presets`).")] = None,
    data: Annotated[str | None, typer.Option(help="Data set, like cifar10 or folder:/path.")] = None,
    output: Annotated[Path, typer.Option(help="Folder that holds the run folders and mlflow.db.")] = Path("runs"),
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of weights, views and order.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the unfinished run of this recipe.")] = False,
    new: Annotated[bool, typer.Option("--new", help="Start another run of a recipe that has one.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the recipe and where each value is from.")] = False,
    slurm: Annotated[
        str | None,
        typer.Option(metavar="NAME=VALUE,...", help="Run as a SLURM job, like partition=gpu,nodes=2,gpus_per_node=8."),
    ] = None,
    evaluate: Annotated[bool, typer.Option("--eval/--no-eval", help="Evaluate the checkpoints at the end.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Pretrain a method, evaluate its checkpoints, print the numbers.

    The same command finds its run again: a finished one prints its result, an unfinished one goes on with --resume.
    With --slurm it is submitted, once per GPU; NAME is an option of sbatch, or nodes, gpus_per_node, cpus_per_task,
    mem_gb and timeout_min (24 hours unless given). Before that time ends it writes a checkpoint and queues itself
    again.
    """
    from dinobench.condition import refuse_unfinished
    from dinobench.reporter import Reporter
    from dinobench.runs import locate_run
    from pretrain.errors import UsageError
    from pretrain.training.recipe import preset_names, resolve
    from pretrain.training.runtime import is_main_process

    if resume and new:
        raise UsageError("--resume continues a run and --new starts another: give one of them")
    recipe = resolve(method, preset=preset, data=data, seed=seed, overrides=overrides or ())
    if dry_run:
        return _print_recipe(recipe, as_json)
    if slurm is not None:
        given = {"--preset": preset, "--data": data, "--output": output, "--seed": seed}
        flags = {"--resume": resume, "--new": new, "--no-eval": not evaluate}
        if not (resume or new):  # told now, not when the job starts
            refuse_unfinished(locate_run(recipe, output))
        arguments = ["pretrain", method, *(overrides or ())]
        arguments += [text for name, value in given.items() if value is not None for text in (name, str(value))]
        return _submit(recipe, slurm, [*arguments, *(name for name, on in flags.items() if on)], output, as_json)
    from dinobench.train import Request, pretrain

    reporter = Reporter(silent=not is_main_process())
    if recipe.runtime.sharding != "none":
        reporter.warn("runtime.sharding is experimental: it was tested on CPUs only")
    if recipe.preset:
        reporter.say(f"{method} at preset {recipe.preset} (--preset takes {', '.join(preset_names())})")
    command = shlex.join(["dinobench", *sys.argv[1:]])
    summary = pretrain(recipe, Request(output, command, resume, new, evaluate), reporter)
    if summary is not None:
        _finish(summary, output, as_json)


def _submit(recipe: Recipe, text: str, arguments: list[str], output: Path, as_json: bool) -> None:
    """Submit the command; what can be told to be wrong is told now, not when the job starts."""
    from dinobench import slurm
    from dinobench.cli.output import print_json, print_text
    from pretrain.training.trainer import local_batch_size
    from suites.suite import load_suite

    options = {"cpus_per_task": recipe.runtime.workers + 1, **slurm.parse_options(text)}
    local_batch_size(recipe.optim.batch_size, slurm.num_ranks(options), recipe.runtime.accumulate)
    for name in recipe.evaluation.suites:
        load_suite(name)
    job = slurm.submit(arguments, options, output / "slurm")
    document = {"job": job.job_id, "log": str(job.paths.stdout), "errors": str(job.paths.stderr)}
    if as_json:
        return print_json(document)
    print_text(f"submitted job {document['job']}; it writes to {document['log']} and {document['errors']}")


def _print_recipe(recipe: Recipe, as_json: bool) -> None:
    from dinobench.cli.output import print_json, print_text

    if as_json:
        return print_json({"recipe": recipe.model_dump(mode="json"), "origins": recipe.origins, "id": recipe.identity})
    print_text(f"# {recipe.label}-s{recipe.seed}-{recipe.identity}; a recipe: `dinobench pretrain FILE.yaml` runs it")
    print_text("\n".join(annotated(recipe.model_dump(mode="json"), recipe.origins)))


def annotated(values: dict, origins: dict[str, str], prefix: str = "") -> list[str]:
    """YAML lines with the origin of each value behind it."""
    import yaml

    lines = []
    indent = "  " * prefix.count(".")
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict) and value and dotted not in origins:
            lines += [f"{indent}{key}:", *annotated(value, origins, f"{dotted}.")]
            continue
        # dumped in a list, because YAML ends a bare scalar with a document mark
        text = yaml.safe_dump([value], default_flow_style=True, width=10_000).strip()[1:-1]
        lines.append(f"{f'{indent}{key}: {text}':<56}  # {origins.get(dotted, 'default')}")
    return lines


def _finish(summary: Summary, output: Path, as_json: bool) -> None:
    """Print how it ended; the exit code says whether it was interrupted or a suite failed."""
    from dinobench.cli import report
    from dinobench.cli.output import print_json

    if as_json:
        print_json(report.summary_document(summary, output))
    else:
        report.print_summary(summary, output)
    if summary.state.status == "interrupted":
        raise typer.Exit(130 if summary.state.note == "SIGINT" else 143)
    if summary.failures:
        raise typer.Exit(3)
