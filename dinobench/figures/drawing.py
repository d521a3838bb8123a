"""A figure before it is written: its name, its picture and the numbers it shows."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinobench import plots
from dinobench.files import make_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")


@dataclass(frozen=True)
class Drawing:
    """One picture."""

    name: str
    """Stem of its files."""
    figure: Figure
    numbers: dict[str, Any] = field(default_factory=dict)
    """Plain values that the picture shows, for --json."""

    def write(self, folder: Path) -> list[Path]:
        """The picture as PNG and as SVG.

        Raises:
            DinobenchError: the folder cannot be written.
        """
        make_folder(folder)
        return [plots.save(self.figure, folder / f"{self.name}{suffix}") for suffix in SUFFIXES]
