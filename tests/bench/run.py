"""The benchmark: our training step, data path, kNN and linear sweep against the official code and against plain forms.

    uv run nox -s bench -- --reference DIR           DIR: a checkout of facebookresearch/dino
    uv run nox -s bench -- --only profile            where the time of a step goes, and in which operators
    uv run nox -s bench -- --only methods patch_head time and memory of iBOT and DINOv2 beside DINO; needs no checkout
    uv run nox -s bench -- --device cpu --tiny       a minute; proves only that everything runs and is equal

On a GPU: ViT-S/16 and ViT-B/16 with 2 + 10 crops and 65536 prototypes, on a CPU a network that two cores carry. The
machine's ceilings are measured first. Each row is timed only after its equality check has passed; a contestant that is
not equal gets no time, and the exit code is 4. Results are written to results/bench/ after every row. Without
--reference the opponents are our own plain forms and nothing is compared with the official code.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is imported: no line per use of the profiler

import torch

import augmentation
import ceilings
import end_to_end
import knn
import linear
import methods
import patch_head
import stages
import step
import throughput
from official import Reference
from report import Report
from session import Session, parse

BENCHES = {
    "throughput": throughput.run,
    "ablations": throughput.run_ablations,
    "profile": stages.run,
    "end_to_end": end_to_end.run,
    "augmentation": augmentation.run,
    "knn": knn.run,
    "linear_sweep": linear.run,
    "step": step.run,
    "methods": methods.run,
    "patch_head": patch_head.run,
}
ON_GPU = [name for name in BENCHES if name not in ("step", "methods", "patch_head")]
"""The others train networks of a CPU's size."""


def main() -> int:
    """Run the benches asked for."""
    assert __doc__ is not None
    options = parse(__doc__, {"cpu": list(BENCHES), "cuda": ON_GPU})
    torch.manual_seed(0)
    reference = Reference(options.reference) if options.reference else None
    judged = reference is not None and not options.tiny
    report = Report(options.output, options.machine, judged=judged, note=options.note)
    for threads in options.threads:
        torch.set_num_threads(threads)
        measured = ceilings.measure(report, device=options.device, tiny=options.tiny)
        session = Session(options, report, reference, measured)
        for name in options.only:
            try:
                BENCHES[name](session)
            except torch.OutOfMemoryError as error:  # the other benches may fit
                report.failures.append(f"{name}: {error}")
    for failure in report.failures:
        print(failure, file=sys.stderr)
    return 4 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
