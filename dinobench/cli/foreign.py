"""The options by which a verb is told how to read a checkpoint of any project."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

CheckpointKey = Annotated[Literal["teacher", "student"], typer.Option(help="Which network.")]
Arch = Annotated[
    str | None, typer.Option(help="timm model of a foreign file whose shapes do not tell, such as convnext_tiny.")
]
NumHeads = Annotated[int | None, typer.Option(min=1, help="Attention heads of a foreign ViT of an unusual width.")]
AllowPartial = Annotated[
    bool, typer.Option("--allow-partial", help="Also a backbone that the file does not fill; the rest is random.")
]
