"""Parameters into a module, with an account of what fitted: nothing is left random without being named."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn


@dataclass(frozen=True)
class Match:
    """What became of the parameters of a module and of those in the file."""

    matched: list[str]
    missing: list[str]
    """Of the module, not in the file."""
    unexpected: list[str]
    """In the file, without a place in the module."""
    dropped: list[str]
    """Of these, left out because nothing depends on them."""
    misshapen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    """Name -> shape in the file, shape in the module. They count as missing."""
    not_floats: dict[str, str]
    """Name -> type in the file, where the module has floating point numbers. They count as missing."""
    not_finite: list[str]
    """Matched, with a NaN or infinite value."""

    @property
    def complete(self) -> bool:
        return not (self.missing or self.unexpected)

    @property
    def coverage(self) -> float:
        """Percent of the module's tensors that come from the file."""
        return 100 * len(self.matched) / max(len(self.matched) + len(self.missing), 1)

    def refusal(self, part: str, path: Path, architecture: str) -> str:
        """Why the file is refused, and what to do."""
        shapes = "".join(
            f"; {part}.{name} has shape {found}, expected {wanted}"
            for name, (found, wanted) in list(self.misshapen.items())[:2]
        )
        shapes += "".join(
            f"; {part}.{name} is of type {found}, expected floating point numbers"
            for name, found in list(self.not_floats.items())[:2]
        )
        if self.not_floats:
            remedy = "give the file from before it was quantised"
        elif self.misshapen or self.coverage < 50:
            remedy = "give the architecture it was trained with"
        elif self.missing and self.unexpected:
            remedy = "rename the unexpected tensors to the missing names if they are the same"
        else:
            remedy = "give the file as its project wrote it"
        consequence = "What is missing would stay random" if self.missing else "What has no place would be left out"
        way_around = ", or measure it all the same with --allow-partial" if part == "backbone" and self.matched else ""
        return (
            f"the {part} in {path} does not fit {architecture}: {len(self.matched)} tensors match "
            f"({self.coverage:.1f} %), missing {listed(self.missing)}, unexpected {listed(self.unexpected)}{shapes}. "
            f"{consequence}: {remedy}{way_around}"
        )

    def broken(self, path: Path) -> str:
        """Why a file whose tensors all fit is refused for their values."""
        return (
            f"{path} holds values that are not finite in {len(self.not_finite)} of its {len(self.matched)} backbone "
            f"tensors ({listed(self.not_finite)}): its training diverged; take an earlier checkpoint"
        )


def fill(
    module: nn.Module, state: Mapping[str, Tensor], prefix: str, droppable: re.Pattern[str] | None = None
) -> Match:
    """Load what lies below `prefix` and fits; the rest of the module keeps its values.

    The number of batches that a BatchNorm has seen matters in training only: old files do not have it.

    Args:
        module: to be filled, in place.
        state: parameters of a file.
        prefix: of the module's names in it.
        droppable: names that are not unexpected when they have no place.
    """
    own = module.state_dict()
    given = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    misshapen = {
        name: (tuple(given[name].shape), tuple(value.shape))
        for name, value in own.items()
        if name in given and given[name].shape != value.shape
    }
    not_floats = {
        name: str(given[name].dtype).removeprefix("torch.")
        for name, value in own.items()
        if name in given and value.is_floating_point() and not given[name].is_floating_point()
    }
    missing = {name for name in own.keys() - given.keys() if not name.endswith("num_batches_tracked")}
    matched = sorted((own.keys() & given.keys()) - misshapen.keys() - not_floats.keys())
    module.load_state_dict({name: given[name] for name in matched}, strict=False)
    homeless = sorted(given.keys() - own.keys())
    dropped = [name for name in homeless if droppable is not None and droppable.search(name)]
    unexpected = [name for name in homeless if name not in dropped]
    filled = module.state_dict()
    not_finite = [name for name in matched if not bool(filled[name].isfinite().all())]
    absent = sorted(missing | misshapen.keys() | not_floats.keys())
    return Match(matched, absent, unexpected, dropped, misshapen, not_floats, not_finite)


def listed(names: list[str]) -> str:
    """The first names and how many more."""
    if not names:
        return "none"
    shown = ", ".join(name if len(name) <= 100 else f"{name[:100]}..." for name in names[:4])
    return shown + (f" and {len(names) - 4} more" if len(names) > 4 else "")
