"""A bounded sample of the patch tokens of a set, always the same one for a seed.

Patch tokens of all images of a set are hundreds of times its CLS tokens; how prototypes are used shows on a few
thousand. Images are drawn, then tokens among all of theirs. Shapes: N patches of an image, D features, M tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.data.images import ImageSet
from pretrain.data.transforms import EvalTransform
from pretrain.errors import UsageError
from pretrain.models.backbones import has_patch_tokens, last_tokens
from pretrain.models.checkpoint import LoadedModel

BATCH = 64


@torch.inference_mode()
def sample_patch_tokens(
    model: LoadedModel,
    images: ImageSet,
    transform: EvalTransform,
    *,
    num_images: int,
    num_tokens: int,
    seed: int,
    device: str = "cpu",
) -> Tensor:
    """Patch tokens [M, D] of the last block after the final norm, M at most `num_tokens`, on the CPU.

    Args:
        num_images: drawn from the set, all of a smaller one.
        num_tokens: drawn from all patches of these.

    Raises:
        UsageError: the backbone has no patch tokens.
    """
    if not has_patch_tokens(model.backbone):
        raise UsageError(f"{type(model.backbone).__name__} has no patch tokens")
    generator = torch.Generator().manual_seed(seed)
    drawn = images.subset(torch.randperm(len(images), generator=generator)[:num_images].sort().values)
    read = drawn.image if drawn.source.pixels is None else drawn.pixels
    backbone = model.backbone.to(device).eval()
    parts = []
    for numbers in torch.arange(len(drawn)).split(BATCH):
        inputs = torch.stack([transform(read(int(number))) for number in numbers]).to(device)
        (_, patches), *_ = last_tokens(backbone, inputs)
        assert patches is not None
        parts.append(patches.float().flatten(0, 1).cpu())
    tokens = torch.cat(parts)
    return tokens[torch.randperm(len(tokens), generator=generator)[:num_tokens]].clone()
