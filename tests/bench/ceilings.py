"""What this machine can do at most, measured in the process that measures the rest: matrix products and copies.

Every training step is judged against the products: MFU = useful FLOPs per second / the products' FLOPs per second.
Operands are random: with zeros a GPU draws less power and clocks higher than in any training.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from report import Entry, Report
from timing import take_turns

SIDE = {"cuda": 8192, "cpu": 2048, "tiny": 256}
"""Of the square matrices."""
COPIED_BYTES = {"cuda": 4 * 2**30, "cpu": 2**28, "tiny": 2**24}
"""Read once and written once."""
ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Ceilings(Entry):
    """The two ceilings of a device."""

    HEAD: ClassVar = ("ceiling", "setting", "measured")

    bench: ClassVar = "ceilings"
    setting: dict[str, Any]
    flops: dict[str, float]
    """FLOP per second of a matrix product by precision: fp32, bf16, on a GPU also tf32."""
    bytes_per_second: float
    """Read and written by a copy within the device's memory."""

    def to_dict(self) -> dict[str, Any]:
        return {"bench": self.bench, **dataclasses.asdict(self)}

    def lines(self) -> list[list[str]]:
        setting = self.described()
        products = [[f"{name} product", setting, f"{flops / 1e12:.4g} TFLOP/s"] for name, flops in self.flops.items()]
        return [*products, ["copy", setting, f"{self.bytes_per_second / 1e9:.4g} GB/s"]]

    def of(self, precision: str) -> float:
        """FLOP per second in the precision of a training: our fp32 on a GPU is TF32, fp16 is as fast as bf16."""
        return self.flops["bf16" if precision in ("bf16", "fp16") else "tf32" if "tf32" in self.flops else "fp32"]


def measure(report: Report, *, device: str, tiny: bool = False) -> Ceilings:
    """Both ceilings, reported."""
    kind = torch.device(device).type
    side, copied = (sizes["tiny" if tiny else kind] for sizes in (SIDE, COPIED_BYTES))
    flops = {"fp32": _product(side, torch.float32, device), "bf16": _product(side, torch.bfloat16, device)}
    if kind == "cuda":
        flops["tf32"] = _product(side, torch.float32, device, tf32=True)
    source = torch.randint(256, (copied,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = _seconds(lambda: target.copy_(source))
    setting = {
        "side": side,
        "copied_MiB": copied // 2**20,
        "threads": torch.get_num_threads(),
        "device": device,
    }
    found = Ceilings(setting, flops, 2 * copied / seconds)
    report.add(found)
    return found


def _product(side: int, dtype: torch.dtype, device: str, *, tf32: bool = False) -> float:
    """FLOP per second of a product of two random square matrices."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        return 2 * side**3 / _seconds(lambda: torch.mm(a, b, out=out))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _seconds(work: Callable[[], object], calls: int = 3) -> float:
    """Median over rounds of the time of a call."""

    def run() -> None:
        for _ in range(calls):
            work()

    (times,) = take_turns({"": run}, rounds=ROUNDS, units=calls).values()
    return statistics.median(times.device or times.wall)
