"""`dinobench export CKPT`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dinobench.cli.foreign import AllowPartial, Arch, CheckpointKey, NumHeads

if TYPE_CHECKING:
    from torch import nn

    from pretrain.models.backbones import ModelConfig


def run_export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint file of any known layout.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; default: the checkpoint's name, .safetensors.")
    ] = None,
    checkpoint_key: CheckpointKey = "teacher",
    arch: Arch = None,
    num_heads: NumHeads = None,
    allow_partial: AllowPartial = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write the backbone of a checkpoint as safetensors under timm's names.

    Prints the Python line with which timm loads it; `dinobench eval` takes the file too.
    """
    from dinobench.cli.output import print_json, print_text
    from dinobench.reporter import Reporter
    from pretrain.errors import UsageError
    from pretrain.models.backbones import ModelConfig
    from pretrain.models.checkpoint import export, load

    target = output or checkpoint.with_suffix(".safetensors")
    if target.absolute() == checkpoint.absolute():
        raise UsageError(f"{target} is the checkpoint itself: name another file with --output")
    if arch and num_heads:
        raise UsageError("--arch brings its number of heads: give either --arch or --num-heads")
    loaded = load(
        checkpoint,
        network=checkpoint_key,
        allow_partial=allow_partial,
        num_heads=num_heads,
        model=ModelConfig(name=arch) if arch else None,
    )
    Reporter().say(loaded.report())
    export(loaded, target)
    config = ModelConfig.model_validate(loaded.provenance["model"])
    document = {
        "file": str(target.absolute()),
        "model": config.name,
        "timm": timm_call(config, target, loaded.backbone),
        "note": size_note(config),
        **{key: loaded.provenance[key] for key in ("network", "coverage", "missing", "unexpected", "weights_sha256")},
    }
    if as_json:
        return print_json(document)
    print_text(f"{target}\n{document['timm']}")
    if document["note"]:
        print_text(f"# {document['note']}")


def timm_call(config: ModelConfig, path: Path, backbone: nn.Module) -> str:
    """The Python expression that builds this backbone with timm and loads the file into it.

    Args:
        config: of the backbone.
        path: the exported file.
        backbone: the backbone, for the width of a gated MLP.
    """
    arguments: dict[str, Any] = dict(config.kwargs)
    text = {key: repr(value) for key, value in arguments.items()}
    if config.mlp == "swiglu":
        hidden, width = backbone.get_submodule("blocks.0.mlp.fc1").weight.shape  # type: ignore[misc]
        # half a channel more: timm rounds down
        gate = {"mlp_layer": "timm.layers.SwiGLUPacked", "act_layer": "'silu'"}
        text |= {**gate, "mlp_ratio": repr((hidden + 0.5) / width)}
    rest = "".join(f", {key}={value}" for key, value in text.items())
    file = f"pretrained_cfg_overlay=dict(file={str(path.absolute())!r})"
    return f"timm.create_model({config.name!r}, pretrained=True, num_classes=0{rest}, {file})"


def size_note(config: ModelConfig) -> str:
    """What differs in timm at other image sizes than the network's own."""
    if config.pos_interpolation == "timm":
        return ""
    return "equal features at the size of its position embedding; at other sizes timm interpolates by its own rule"
