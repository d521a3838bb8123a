"""Which network is measured: the teacher of a checkpoint file or another choice, or the pixels without any file.

What differs from the default is part of a result's identity: the results of the student lie in a folder `student` of
their own, so that they mix neither with those of the teacher nor into the curves of the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinobench.files import sha256, slug
from pretrain.errors import UsageError

if TYPE_CHECKING:
    from dinobench.results import Result
    from pretrain.models.checkpoint import LoadedModel
    from pretrain.models.parts import Network


@dataclass(frozen=True)
class Loading:
    """How a network is taken out of a checkpoint file; see pretrain.models.checkpoint.load."""

    network: Network = "teacher"
    arch: str | None = None
    """timm model of a foreign file whose shapes do not tell."""
    num_heads: int | None = None
    """Attention heads of a foreign ViT whose width does not tell."""
    allow_partial: bool = False
    """Also a backbone that the file does not fill; the rest is random."""

    def __post_init__(self) -> None:
        if self.arch and self.num_heads:
            raise UsageError("--arch brings its number of heads: give either --arch or --num-heads")

    @property
    def label(self) -> str:
        """What makes another network of the same file, fit for a folder; empty for the default.

        `allow_partial` makes none: a file either fills the backbone or is refused without it.
        """
        arch = f"arch-{self.arch}" if self.arch else ""
        heads = f"heads-{self.num_heads}" if self.num_heads else ""
        network = self.network if self.network != "teacher" else ""
        return slug("-".join(part for part in (network, arch, heads) if part))

    def load(self, checkpoint: Path) -> LoadedModel:
        """The network, ready to be measured.

        Raises:
            DinobenchError: see pretrain.models.checkpoint.load.
        """
        from pretrain.models import checkpoint as files
        from pretrain.models.backbones import ModelConfig
        from pretrain.models.pixels import is_pixels, load_pixels

        if is_pixels(checkpoint):
            if self.label:
                raise UsageError(f"{checkpoint} has no networks to choose from: leave out what chooses one")
            return load_pixels(checkpoint)
        return files.load(
            checkpoint,
            network=self.network,
            allow_partial=self.allow_partial,
            num_heads=self.num_heads,
            model=ModelConfig(name=self.arch) if self.arch else None,
        )

    def receipt(self) -> dict[str, Any]:
        """Plain values, from which `loading_of` makes the same again."""
        return asdict(self)


def loading_of(result: Result) -> Loading:
    """How the network of a result was loaded.

    Results of before there was a choice say only which network it was, and what did not fit.
    """
    facts = result.provenance
    network: Network = "student" if facts.get("network") == "student" else "teacher"
    stated: dict[str, Any] = {"network": network, **(result.receipt.get("loading") or {})}
    return Loading(stated["network"], stated.get("arch"), stated.get("num_heads"), is_partial(facts))


def is_partial(facts: dict[str, Any]) -> bool:
    """Whether some of the backbone had no place in the file or the reverse, by a network's provenance."""
    return bool(facts.get("missing") or facts.get("unexpected"))


def checkpoint_digest(checkpoint: Path) -> str:
    """SHA-256 of a checkpoint file; for pixels, what stands for it.

    Raises:
        DinobenchError: there is no such file.
    """
    from pretrain.models.pixels import is_pixels, pixels_sha256

    return pixels_sha256(checkpoint) if is_pixels(checkpoint) else sha256(checkpoint)


def load_report(model: LoadedModel) -> Iterator[str]:
    """What was loaded, in one line; names of what did not fit, where the backbone is partial."""
    from pretrain.models.filling import listed

    if model.provenance["format"] == "pixels":
        yield f"{model.provenance['label']}: {model.provenance['notes'][0]}"
        return
    yield model.report()
    for what in ("missing", "unexpected"):
        if model.provenance[what]:
            yield f"{what} backbone tensors: {listed(model.provenance[what])}"
