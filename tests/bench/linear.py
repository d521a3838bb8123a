"""The linear sweep of DINOv2, 52 heads: all of them at once, as the suite trains them, against one after the other."""

from __future__ import annotations

import torch

from ceilings import Ceilings
from gate import exact_products
from knn import features
from report import Report, Row
from session import Session
from suites.protocols.linear_sweep import Head, Input, Parameters, TrainedHeads, fit_heads
from suites.protocols.protocol import Context, Split
from timing import take_turns

NUM_BLOCKS = 4
TOLERANCE = 1e-4
"""Largest difference of logits, as a part of the largest; products of other shapes round otherwise."""


def run(session: Session) -> None:
    """A part of a sweep, of which every iteration costs the same."""
    large = {"num_train": 200_000, "dim": 384, "num_classes": 1000, "batch": 1024, "iterations": 100}
    small = {"num_train": 5000, "dim": 128, "num_classes": 1000, "batch": 256, "iterations": 10}
    least = {"num_train": 500, "dim": 16, "num_classes": 10, "batch": 64, "iterations": 4}
    measure(
        session.report,
        **(least if session.tiny else large if session.on_gpu else small),
        rounds=min(session.rounds, 3),
        ceilings=session.ceilings,
        device=session.device,
    )


def measure(
    report: Report,
    *,
    num_train: int,
    dim: int,
    num_classes: int,
    batch: int,
    iterations: int,
    rounds: int,
    ceilings: Ceilings,
    device: str,
) -> None:
    """One row: seconds of so many iterations on features [N, 5 dim]: four CLS tokens and a mean patch token."""
    split = _split(num_train, dim, num_classes, device)
    parameters = Parameters(epochs=1, epoch_length=iterations, batch_size=batch)
    context = Context(num_classes, device=device)
    rows = torch.arange(num_train)
    inputs = [
        Input(blocks, pooled, (NUM_BLOCKS - blocks) * dim, (NUM_BLOCKS + pooled) * dim)
        for blocks in parameters.num_blocks
        for pooled in parameters.avgpool
    ]
    heads = [Head(source, rate) for source in inputs for rate in parameters.learning_rates]

    def together() -> list[TrainedHeads]:
        return [fit_heads(split, rows, heads, parameters, context)]

    def alone() -> list[TrainedHeads]:
        return [fit_heads(split, rows, [head], parameters, context) for head in heads]

    with exact_products():
        gate = _gate(_logits(alone(), split, device), _logits(together(), split, device))
        times = take_turns({"one head at a time": alone, "all heads at once": together}, rounds=rounds, units=1)
    flops = 4 * batch * num_classes * iterations * sum(head.source.stop - head.source.start for head in heads)
    setting = {
        "heads": len(heads),
        "images": num_train,
        "dim": dim,
        "classes": num_classes,
        "batch": batch,
        "iterations": iterations,
        "floor_ms": round(1e3 * flops / ceilings.flops["fp32"], 2),
        "threads": torch.get_num_threads(),
        "device": device,
    }
    report.add(Row("linear_sweep", setting, "sweep", times, gate, {}))


def _split(num_train: int, dim: int, num_classes: int, device: str) -> Split:
    """Features of overlapping classes, in the device's memory."""
    points, labels, _, _ = features(num_train, 0, (NUM_BLOCKS + 1) * dim, num_classes)
    return Split(points.to(device), labels, torch.arange(num_train))


def _logits(trained: list[TrainedHeads], split: Split, device: str) -> torch.Tensor:
    """Of every head for the first images, [N, H, C]."""
    some = split.take(slice(256), device)
    return torch.cat([heads.logits(some) for heads in trained], dim=1)


def _gate(alone: torch.Tensor, together: torch.Tensor) -> dict[str, float]:
    """Heads do not depend on which others are trained beside them.

    Raises:
        SystemExit: they do; then no time is worth printing.
    """
    difference = ((alone - together).abs().amax((0, 2)) / alone.abs().amax((0, 2))).max().item()
    if not difference <= TOLERANCE:
        raise SystemExit(f"heads trained together differ from those trained alone, nothing was timed: {difference:.2g}")
    return {"largest_difference_of_logits": difference}
