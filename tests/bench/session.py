"""What every bench is given, and the command line it comes from."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch

import ceilings
from official import Reference
from pretrain.data.datasets import open_dataset
from pretrain.data.images import ImageSet
from report import Report
from sizes import SIZES, Size

RESULTS = Path(__file__).parents[2] / "results" / "bench"


@dataclasses.dataclass(frozen=True)
class Session:
    """One run of the benchmark at one number of threads."""

    options: argparse.Namespace
    report: Report
    reference: Reference | None
    ceilings: ceilings.Ceilings

    @property
    def device(self) -> str:
        return self.options.device

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def tiny(self) -> bool:
        return self.options.tiny

    @property
    def rounds(self) -> int:
        return self.options.rounds

    @property
    def steps(self) -> int:
        return self.options.steps

    @property
    def precisions(self) -> list[str]:
        return self.options.precision

    @cached_property
    def images(self) -> ImageSet:
        """Real images for the benches of small networks: digits at 32 pixels."""
        return open_dataset("digits", "train").resized(32)

    def sizes(self) -> list[tuple[str, Size, int]]:
        """(name, size, images per step) to train at, the most telling first."""
        return [(name, SIZES[name], batch) for name in self.options.size for batch in self.batches(name)]

    def batches(self, size: str) -> Sequence[int]:
        """Images per step to train a size with."""
        return self.options.batch or SIZES[size].batches


def parse(description: str, benches: dict[str, list[str]]) -> argparse.Namespace:
    """The command line; `benches` are the names by kind of device, in their order."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="a checkout of facebookresearch/dino")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes; nothing is written without --output")
    every = list(dict.fromkeys(name for names in benches.values() for name in names))
    parser.add_argument("--only", nargs="+", choices=every, help=f"default on a CPU: {' '.join(benches['cpu'])}")
    parser.add_argument("--size", nargs="+", choices=SIZES, help="networks (default: small, on a GPU vits16 vitb16)")
    parser.add_argument("--batch", nargs="+", type=int, help="images per step (default: those of each size)")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), help="default: fp32, on a GPU bf16")
    parser.add_argument("--prototypes", nargs="+", type=int, help="K of step, methods and patch_head")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="compiled blocks (but in --tiny)")
    parser.add_argument("--threads", nargs="+", type=int, help="torch threads, a set of rows each (on a CPU: 1 2)")
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1), help="processes that decode")
    parser.add_argument("--queries", type=int, help="of kNN")
    parser.add_argument("--rounds", type=int, help="turns of each contestant")
    parser.add_argument("--steps", type=int, help="training steps per turn")
    parser.add_argument("--seconds", type=float, help="of a turn from JPEG files")
    parser.add_argument("--output", type=Path, help="folder of the record (default results/bench)")
    parser.add_argument("--machine", help="name for the file; default: the processor")
    parser.add_argument("--note", default="", help="what a reader should know of the machine; goes into the record")
    options = parser.parse_args()
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    _fill(options, benches[options.device])
    return options


def _fill(options: argparse.Namespace, benches: list[str]) -> None:
    """What was not given, by device; --tiny overrules what was."""
    on_gpu = options.device == "cuda"
    defaults = {
        "only": benches,
        "size": ["vits16", "vitb16"] if on_gpu else ["small"],
        "precision": ["bf16"] if on_gpu else ["fp32"],
        "threads": [torch.get_num_threads()] if on_gpu else [1, 2],
        "compile": not options.tiny,
        "queries": 50_000 if on_gpu else 10_000,
        "rounds": 3 if on_gpu else 5,
        "steps": 20 if on_gpu else 3,
        "seconds": 45.0 if on_gpu else 20.0,
        "output": RESULTS,
    }
    tiny = {
        "size": ["tiny"],
        "batch": None,
        "prototypes": [64],
        "threads": [1],
        "workers": 1,
        "queries": 200,
        "rounds": 1,
        "steps": 1,
        "seconds": 0.0,
    }
    for name, value in defaults.items():
        if getattr(options, name) is None and not (options.tiny and name == "output"):
            setattr(options, name, value)
    for name, value in tiny.items() if options.tiny else ():
        setattr(options, name, value)
