"""`dinobench figure vmf|attention|prototypes|features|collapse`."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dinobench.figures.drawing import Drawing
    from dinobench.runs import RunFolder

app = typer.Typer(
    help="Draw figures of checkpoints and runs, each as PNG and as SVG.", no_args_is_help=True, rich_markup_mode=None
)


class Network(StrEnum):
    """Whose weights of a checkpoint."""

    teacher = "teacher"
    student = "student"


Checkpoint = Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint file.")]
IMAGES = "Image files, or images of a data set as DATASET:SPLIT[NUMBER], like 'digits:test[3]'."
Which = Annotated[Network, typer.Option(help="Whose weights are used.")]
Size = Annotated[
    int | None, typer.Option(min=1, metavar="PX", help="Short side of the images; default: the evaluation transform's.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Output = Annotated[
    Path | None, typer.Option(help="Folder of the files; default: figures/ of the run folder, else ./figures.")
]
Track = Annotated[bool, typer.Option("--track/--no-track", help="Log the files to MLflow, to the run they show.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document: files and the numbers they show.")]


@app.command("vmf")
def draw_vmf(
    temperature: Annotated[float, typer.Option(min=0.02, help="tau of the densities.")] = 0.1,
    output: Annotated[Path, typer.Option(help="Folder of the files.")] = Path("figures"),
    as_json: AsJson = False,
) -> None:
    """Draw vMF densities and the error of log C_p.

    Von Mises-Fisher densities on the circle of prototypes of norm 1 and 2, with and without the normaliser; absolute
    error of the paper's leading form and of ours at p = 64 and 256, against 40-digit arithmetic.
    """
    from dinobench.figures import vmf

    _write("vmf", [vmf.draw_densities(temperature), vmf.draw_errors()], output, [], False, as_json)


@app.command("attention")
def draw_attention(
    checkpoint: Checkpoint,
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help=IMAGES)],
    mass: Annotated[float, typer.Option(help="Share of the attention that the mask holds.")] = 0.6,
    network: Which = Network.teacher,
    size: Size = None,
    device: Device = "auto",
    output: Output = None,
    track: Track = True,
    as_json: AsJson = False,
) -> None:
    """Draw what CLS attends to, per head.

    One figure per image: the attention of the last block of a ViT, and below each map the fewest patches that hold
    the share --mass of it. Images go through the evaluation transform of the checkpoint's data and are cut to whole
    patches; --size 480 is what DINO's own figures use.
    """
    from dinobench.figures import attention
    from dinobench.figures.inputs import open_pictures, open_subject

    pictures = open_pictures(images)
    subject = open_subject(checkpoint, network=network.value, size=size, device=device)
    drawings = [attention.draw_attention(subject, picture, mass) for picture in pictures]
    _write_of_checkpoint("attention", drawings, checkpoint, output, track, as_json)


@app.command("features")
def draw_features(
    checkpoint: Checkpoint,
    images: Annotated[
        list[str] | None, typer.Argument(metavar="IMAGE", help=f"{IMAGES} Default: 8 of the training images.")
    ] = None,
    network: Which = Network.teacher,
    size: Size = None,
    device: Device = "auto",
    output: Output = None,
    track: Track = True,
    as_json: AsJson = False,
) -> None:
    """Draw patch tokens as colours.

    Red, green and blue are the first three principal components of the last block's patch tokens over all images.
    """
    from dinobench.figures import features
    from dinobench.figures.inputs import open_pictures, open_subject, training_pictures

    pictures = open_pictures(images or [])
    subject = open_subject(checkpoint, network=network.value, size=size, device=device)
    drawing = features.draw_features(subject, pictures or training_pictures(subject, 8))
    _write_of_checkpoint("features", [drawing], checkpoint, output, track, as_json)


@app.command("prototypes")
def draw_prototypes(
    checkpoint: Checkpoint,
    data: Annotated[str | None, typer.Option(help="Data set; default: what the checkpoint was trained on.")] = None,
    images: Annotated[int, typer.Option(min=1, help="Most images, evenly spaced over the set.")] = 10_000,
    network: Which = Network.teacher,
    device: Device = "auto",
    output: Output = None,
    track: Track = True,
    as_json: AsJson = False,
) -> None:
    """Draw the prototypes: norms, usage, images.

    One figure with norms, precisions kappa and usage, one with the nearest images of the most used prototypes.
    """
    from dinobench.figures import prototypes
    from dinobench.figures.inputs import open_subject

    subject = open_subject(checkpoint, network=network.value, device=device)
    prototypes.need_prototypes(subject)
    drawings = prototypes.draw_prototypes(subject, subject.data(data), images)
    _write_of_checkpoint("prototypes", drawings, checkpoint, output, track, as_json)


@app.command("collapse")
def draw_collapse(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="RUN", help="Run folders; default: those labelled collapse/...")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder where labelled runs are looked for.")] = Path("runs"),
    output: Output = None,
    track: Track = True,
    as_json: AsJson = False,
) -> None:
    """Draw teacher entropy and KL of runs.

    Against the step, one line per run: how centring and sharpening together avoid collapse. Without RUN: the runs of
    the ablation, `dinobench pretrain collapse/both` (centring_only, sharpening_only, neither).
    """
    from dinobench.figures import collapse
    from dinobench.runs import open_run

    chosen = [open_run(folder) for folder in folders] if folders else collapse.find_ablation(runs)
    folder = output or (chosen[0].figures if len(chosen) == 1 else Path("figures"))
    _write("collapse", [collapse.draw_collapse(chosen)], folder, chosen, track, as_json)


def _write_of_checkpoint(
    name: str, drawings: Sequence[Drawing], checkpoint: Path, output: Path | None, track: bool, as_json: bool
) -> None:
    from dinobench.runs import run_of_checkpoint

    run = run_of_checkpoint(checkpoint)
    folder = output or (run.figures if run else Path("figures"))
    _write(name, drawings, folder, [run] if run else [], track, as_json)


def _write(
    name: str, drawings: Sequence[Drawing], folder: Path, runs: Sequence[RunFolder], track: bool, as_json: bool
) -> None:
    """Write, print and log the files of a figure; `runs` are those it shows."""
    from dinobench.cli.output import print_json, print_text

    files = [(drawing, drawing.write(folder)) for drawing in drawings]
    paths = [path for _, written in files for path in written]
    if track:
        _track(runs, paths)
    if as_json:
        shown = [{"files": [str(path) for path in written], **drawing.numbers} for drawing, written in files]
        return print_json({"figure": name, "files": [str(path) for path in paths], "drawings": shown})
    for path in paths:
        print_text(str(path))


def _track(runs: Sequence[RunFolder], files: Sequence[Path]) -> None:
    """Log to MLflow where a run is tracked; MLflow takes seconds to import, so not at all when none is."""
    from dinobench.reporter import Reporter

    tracked = [run for run in runs if (run.recipe().get("tracking") or {}).get("enabled", True)]
    if not tracked:
        return
    from dinobench import mirror, tracking
    from dinobench.cli.links import say_links

    reporter = Reporter()
    for run in tracked:
        uri = tracking.tracking_uri(run.path.parent)
        try:
            pages = mirror.log_figures(run, uri, files)
        except tracking.TrackingUnavailable as error:
            reporter.warn(f"not logged to MLflow: {error}; the files are in {files[0].parent} all the same")
            return
        if pages:
            reporter.say(f"logged to {tracking.masked(uri)}")
            say_links(pages, uri, run.path.parent, reporter.say)
        else:
            reporter.warn(f"not logged: MLflow does not have {run.name}; `dinobench runs sync {run.path}` logs it")
