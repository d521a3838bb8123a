"""The benchmark: our training step, kNN and augmentation against the official code, and our methods against DINO.

    uv run nox -s bench -- --reference DIR           DIR: a checkout of facebookresearch/dino
    uv run nox -s bench -- --only methods patch_head time and memory of iBOT and DINOv2 beside DINO; needs no checkout
    uv run nox -s bench -- --device cpu --tiny       seconds instead of minutes; proves only that everything runs

Each row is timed only after its equality check has passed. Results are written to results/bench/ after every row.
Without --reference the opponents are our own plain forms and nothing is compared with the official code.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

import augmentation
import knn
import methods
import patch_head
import step
from official import Reference
from pretrain.data.datasets import ImageSet, open_dataset
from pretrain.data.views import ViewsConfig
from report import Report
from suites.neighbours import Backend

RESULTS = Path(__file__).parents[2] / "results" / "bench"
BENCHES = ("augmentation", "knn", "step", "methods", "patch_head")
STEP_PROTOTYPES = (1024, 4096, 65536)
METHOD_PROTOTYPES = (1024, 8192)
"""8192: K of iBOT's recipes."""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="a checkout of facebookresearch/dino")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes; nothing is written without --output")
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=BENCHES)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="torch threads, one set of rows each")
    parser.add_argument(
        "--prototypes",
        nargs="+",
        type=int,
        help=f"numbers of prototypes (default {STEP_PROTOTYPES}; methods and patch_head {METHOD_PROTOTYPES})",
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[32], help="images per step")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32"])
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="training steps per round")
    parser.add_argument("--output", type=Path, help="folder of the record (default results/bench)")
    parser.add_argument("--machine", help="name for the file; default: the processor")
    parser.add_argument("--note", default="", help="what a reader should know of the machine; goes into the record")
    options = parser.parse_args()
    if options.tiny:
        options.threads, options.prototypes, options.batch = [1], [64], [8]
        options.queries, options.rounds, options.steps = 200, 1, 1
    elif options.output is None:
        options.output = RESULTS
    return options


def main() -> None:
    """Run the benches asked for."""
    options = parse()
    torch.manual_seed(0)
    reference = Reference(options.reference) if options.reference else None
    report = Report(
        options.output, options.machine, judged=reference is not None and not options.tiny, note=options.note
    )
    images = open_dataset("digits", "train").resized(32)
    for threads in options.threads:
        torch.set_num_threads(threads)
        if "augmentation" in options.only:
            run_augmentation(options, report, reference, images)
        if "knn" in options.only:
            run_knn(options, report, reference, threads)
        if "step" in options.only:
            run_step(options, report, reference, images)
        if "methods" in options.only:
            run_methods(options, report, images)
        if "patch_head" in options.only:
            run_patch_head(options, report, images)


def run_augmentation(
    options: argparse.Namespace, report: Report, reference: Reference | None, images: ImageSet
) -> None:
    """DINO's views of 32-pixel images."""
    pixels = torch.stack([images.pixels(i) for i in range(options.batch[0] if options.tiny else 64)])
    config = ViewsConfig(global_size=32, local=6, local_size=16)
    augmentation.measure(
        report, reference=reference, pixels=pixels, config=config, rounds=options.rounds, device=options.device
    )


def run_knn(options: argparse.Namespace, report: Report, reference: Reference | None, threads: int) -> None:
    """10 classes, and 1000 classes with a tenth of the queries, where the one-hot votes dominate."""
    backends: list[Backend] = ["torch"]
    try:
        import faiss

        faiss.omp_set_num_threads(threads)
        backends.append("faiss")
    except ImportError:
        print("FAISS is not installed: its row is left out")
    num_train = 1000 if options.tiny else 50_000
    for num_classes, num_test in ((10, options.queries), (1000, max(options.queries // 10, 100))):
        knn.measure(
            report,
            reference=reference,
            num_train=num_train,
            num_test=num_test,
            num_classes=num_classes,
            dim=384,
            rounds=min(options.rounds, 3),
            backends=backends,
            device=options.device,
        )


def settings(options: argparse.Namespace, prototypes: Sequence[int]) -> Iterator[step.Setting]:
    """Every combination of batch, number of prototypes and precision."""
    for batch, num, precision in itertools.product(options.batch, options.prototypes or prototypes, options.precision):
        yield step.Setting(prototypes=num, batch=batch, precision=precision, device=options.device)


def run_step(options: argparse.Namespace, report: Report, reference: Reference | None, images: ImageSet) -> None:
    """Our training step against the official one."""
    for setting in settings(options, STEP_PROTOTYPES):
        step.measure(
            report, reference=reference, images=images, setting=setting, rounds=options.rounds, units=options.steps
        )


def run_methods(options: argparse.Namespace, report: Report, images: ImageSet) -> None:
    """iBOT, iBOT-vMF and DINOv2 against DINO."""
    for setting in settings(options, METHOD_PROTOTYPES):
        methods.measure(report, images=images, setting=setting, rounds=options.rounds, units=options.steps)


def run_patch_head(options: argparse.Namespace, report: Report, images: ImageSet) -> None:
    """iBOT with masked patches only against every patch."""
    for setting in settings(options, METHOD_PROTOTYPES):
        patch_head.measure(report, images=images, setting=setting, rounds=options.rounds, units=options.steps)


if __name__ == "__main__":
    main()
