"""The figures that papers print: dinobench/published.csv, one figure per row, each with the source it was read in.

A table names a figure by the columns of its row. What a key leaves out is not compared; a key that fits no row, or
more than one, is refused, so that no figure is taken for another.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from pretrain.errors import DinobenchError, UsageError, unknown_name

FILE = Path(__file__).parent.parent / "published.csv"


@dataclass(frozen=True)
class Figure:
    """One row of the file; `value` is the number as printed there."""

    paper: str
    table: str
    method: str
    arch: str
    pretrain_data: str
    epochs: str
    suite: str
    metric: str
    value: str
    unit: str
    source: str

    @property
    def cited(self) -> str:
        """Paper and table, for a reader."""
        return f"{self.paper.partition(' (')[0]}, {self.table}"


class Key(BaseModel):
    """Which figure. None: not compared."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    paper: str | None = None
    table: str | None = None
    method: str | None = None
    arch: str | None = None
    pretrain_data: str | None = None
    epochs: int | None = None
    suite: str | None = None
    metric: str | None = None

    def fits(self, figure: Figure) -> bool:
        """Whether all that is named is the same."""
        return all(getattr(figure, name) == str(value) for name, value in self.named().items())

    def named(self) -> dict[str, str | int]:
        return self.model_dump(exclude_none=True)

    def __str__(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.named().items())


@cache
def figures() -> tuple[Figure, ...]:
    """Every figure, in the order of the file.

    Raises:
        DinobenchError: the file is missing or damaged.
    """
    try:
        with FILE.open(encoding="utf-8", newline="") as file:
            return tuple(Figure(**row) for row in csv.DictReader(file, strict=True))
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise DinobenchError(f"{FILE} was altered or damaged ({error}): install dinobench again") from error


def find_figure(key: Key) -> Figure:
    """The one figure that a key names.

    Raises:
        UsageError: it fits none (the first value that is nowhere is named), or several.
    """
    found = matching(key)
    if len(found) == 1:
        return found[0]
    if not found:
        raise UsageError(f"no figure in {FILE.name} has {key}{_stranger(key)}")
    values = " | ".join(f"{f.table}, {f.method}, {f.arch}, {f.epochs} epochs, {f.suite}, {f.metric}" for f in found[:4])
    raise UsageError(
        f"{len(found)} figures in {FILE.name} have {key}, expected one: {values}; name more of its columns"
    )


def matching(key: Key) -> list[Figure]:
    """All figures that a key fits."""
    return [figure for figure in figures() if key.fits(figure)]


def _stranger(key: Key) -> str:
    """What is wrong with a key, where one of its values is in no row of the paper."""
    rows = [figure for figure in figures() if key.paper in (None, figure.paper)]
    for name, value in key.named().items():
        known = {getattr(figure, name) for figure in rows}
        if str(value) not in known:
            return f": {unknown_name(name, str(value), known)}"
    return "; its values do not occur together"
