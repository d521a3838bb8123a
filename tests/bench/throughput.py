"""Images per second of the training step on views that lie in the device's memory: ours, the official code's, ours
with one thing each done in the plain way. The data path is measured in end_to_end.py.

Each contestant is first held against our plain step in fp32 (gate.py), and in the precision it is timed in; one that
is not the same, or does not fit in memory, gets no time and says why.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from ceilings import Ceilings
from cost import peak_mebibytes
from counts import calls, host_syncs, on_gpu
from flops import counted, per_image
from gate import Contestant, Expected, Unequal
from official import OfficialTraining, Reference
from pretrain.data.loader import Batch
from rates import Measured, RateRow
from report import Report
from session import Session
from sizes import Size, random_batches
from step import Setting
from timing import take_turns
from variants import ABLATIONS, Variant

GATE_BATCH = 4
"""Images of the step that is compared; the sums over a larger batch hide more."""
WARM_STEPS = 2
MEMORY_STEPS = 3

Builder = Callable[[int, str, float], Contestant]
"""(images per step, precision, drop path) -> a contestant."""


def ours(size: Size, device: str, variant: Variant, *, compile: bool) -> Builder:
    """A variant of our step."""
    return lambda batch, precision, drop_path: variant.build(
        size, batch, device, precision, drop_path=drop_path, compile=compile
    )


def official(size: Size, device: str, reference: Reference, *, low: str | None = None) -> Builder:
    """The official step; `low` is the precision it uses where another than fp32 is asked for."""

    def build(batch: int, precision: str, drop_path: float) -> Contestant:
        recipe = size.recipe(batch, device, "fp32")
        setting = Setting.of(recipe, precision if precision == "fp32" or low is None else low)
        return OfficialTraining(reference, setting, [], drop_path)

    return build


def run(session: Session) -> None:
    """Ours, eager and compiled, against the official step at every size."""
    for name, size, batch in session.sizes():
        _run(session, "throughput", name, size, batch, contestants(size, session))


def run_ablations(session: Session) -> None:
    """Our fastest step against itself with one thing done the plain way, at the first size."""
    name, size, batch = session.sizes()[0]
    compile = session.options.compile and session.on_gpu  # on a CPU compiling so many would take longer than measuring
    builders = {name: ours(size, session.device, variant, compile=compile) for name, variant in ABLATIONS.items()}
    _run(session, "ablations", name, size, batch, builders)


def contestants(size: Size, session: Session) -> dict[str, Builder]:
    """Who is compared, the opponent first."""
    device, reference = session.device, session.reference
    found: dict[str, Builder] = {}
    if reference:
        if on_gpu(device):
            found["official, fp16"] = official(size, device, reference, low="fp16")
        found["official"] = official(size, device, reference)
    found["ours"] = ours(size, device, Variant(), compile=False)
    if session.options.compile:
        found["ours, compiled"] = ours(size, device, Variant(), compile=True)
    return found


def _run(session: Session, bench: str, name: str, size: Size, batch: int, builders: Mapping[str, Builder]) -> None:
    for precision in session.precisions:
        measure(
            session.report,
            bench=bench,
            name=name,
            size=size,
            batch=batch,
            precision=precision,
            device=session.device,
            builders=builders,
            ceilings=session.ceilings,
            rounds=session.rounds,
            units=session.steps,
        )


def measure(
    report: Report,
    *,
    bench: str,
    name: str,
    size: Size,
    batch: int,
    precision: str,
    device: str,
    builders: Mapping[str, Builder],
    ceilings: Ceilings,
    rounds: int,
    units: int,
) -> None:
    """One row: all contestants at one size and batch."""
    recipe = size.recipe(batch, device, precision)
    found = {contestant: Measured(ceiling=ceilings.of(precision)) for contestant in builders}
    torch.compiler.reset()  # the sizes before have left compiled code, of which there may be only so much
    for contestant, judged in gates(size, device, precision, builders).items():
        found[contestant].gate, found[contestant].remark = judged
        if found[contestant].remark:
            report.failures.append(f"{bench}, {name}, {contestant}: {found[contestant].remark}")
    batches = random_batches(recipe, device)
    ready: dict[str, Contestant] = {}
    for contestant, build in builders.items():
        if not found[contestant].remark:
            try:
                ready[contestant] = _prepare(partial(build, batch, precision, 0.1), batches, device, found[contestant])
            except torch.OutOfMemoryError:
                found[contestant].remark = "out of memory"
            _free(device)
    _time(ready, batches, found, device, rounds, units)
    described: dict[str, Any] = {
        "size": name,
        "batch": batch,
        "crops": f"2x{recipe.views.global_size}+{recipe.views.local}x{recipe.views.local_size}",
        "K": recipe.head.num_prototypes,
        "precision": precision,
        "GFLOP": round(per_image(recipe) / 1e9, 4),
    }
    if "ours" in ready:
        described["GFLOP_done"] = round(_done(ready["ours"], batches[0]) / 1e9, 4)
    described |= {"threads": torch.get_num_threads(), "device": device}
    report.add(RateRow(bench, described, found))


def gates(
    size: Size, device: str, precision: str, builders: Mapping[str, Builder]
) -> dict[str, tuple[dict[str, dict[str, float]], str]]:
    """For each contestant how equal its step is to ours, and why it may not be timed, if so."""
    (batch, *_) = random_batches(size.recipe(GATE_BATCH, device, "fp32"), device)
    gates: dict[str, dict[str, dict[str, float]]] = {name: {} for name in builders}
    remarks = dict.fromkeys(builders, "")
    trusted = ours(size, device, Variant(), compile=False)
    for used in dict.fromkeys(("fp32", precision)):
        expected = Expected.of(trusted(GATE_BATCH, used, 0.0), batch)
        for name, build in builders.items():
            if remarks[name]:
                continue
            try:
                gates[name][used] = expected.check(build(GATE_BATCH, used, 0.0), used)
            except Unequal as error:
                remarks[name] = str(error)
        _free(device)
    return {name: (gates[name], remarks[name]) for name in builders}


def _prepare(build: Callable[[], Contestant], batches: list[Batch], device: str, found: Measured) -> Contestant:
    """Build a contestant and find out what it holds, calls and waits for."""
    built: list[Contestant] = []

    def first_steps() -> None:
        built.append(build())
        for batch in batches[:MEMORY_STEPS]:
            built[0].step(batch)

    if on_gpu(device):
        before = torch.cuda.memory_allocated()
        first_steps()
        torch.cuda.reset_peak_memory_stats()  # what compiling held is no part of a step
        built[0].step(batches[0])
        found.mebibytes = (torch.cuda.max_memory_allocated() - before) / 2**20
    else:
        found.mebibytes = peak_mebibytes(first_steps, device)
    step = partial(built[0].step, batches[0])
    found.calls = calls(step, device)
    found.syncs = host_syncs(step, device)
    return built[0]


def _done(contestant: Contestant, batch: Batch) -> float:
    """FLOPs of an image that are done in fact; counted on few images, for the memory."""
    images = slice(GATE_BATCH)
    some = Batch([view[images] for view in batch.views], batch.index[images], batch.epoch)
    return counted(partial(contestant.step, some)) / len(some.index)


def _time(
    ready: Mapping[str, Contestant],
    batches: list[Batch],
    found: Mapping[str, Measured],
    device: str,
    rounds: int,
    units: int,
) -> None:
    """Put the times of all that are ready into `found`; on a GPU those that do not fit beside the others drop out."""

    def steps(contestant: Contestant, count: int) -> None:
        for batch in itertools.islice(itertools.cycle(batches), count):
            contestant.step(batch)

    def warm(contestant: Contestant) -> None:
        if on_gpu(device):
            _free(device)  # so that the pieces of memory that one leaves do not hinder the next
        steps(contestant, WARM_STEPS if on_gpu(device) else 1)

    fitting = {}
    for name, contestant in ready.items():
        try:
            warm(contestant)
            fitting[name] = contestant
        except torch.OutOfMemoryError:
            found[name].remark = "out of memory beside the others"
    times = take_turns(
        {name: partial(steps, contestant, units) for name, contestant in fitting.items()},
        rounds=rounds,
        units=units,
        warm={name: partial(warm, contestant) for name, contestant in fitting.items()},
    )
    for name, taken in times.items():
        found[name].times = taken


def _free(device: str) -> None:
    gc.collect()
    if on_gpu(device):
        torch.cuda.empty_cache()
