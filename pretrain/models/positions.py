"""Position embeddings of a ViT for images of any size, by timm's rule or by the rule of the official DINO code.

A bicubic resampling is a fixed linear map of the grid, so it is formed once per size as a matrix R [N_new, N] and
applied as R @ pos_embed: equal to `F.interpolate` to rounding, with a matrix product as its backward.

The two rules differ in the values (PROTOCOLS: official vision_transformer.py, `interpolate_pos_encoding`):

    timm   the new grid is sampled at its exact size with antialiasing; image sides must be multiples of the patch
    dino   no antialiasing; the sampling step is N_old / (N_new + 0.1), where the official code adds 0.1 against
           rounding; left out only if the number of patches is the stored one *and* the image is square in pixels;
           rows and columns of pixels that fill no patch are dropped
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
from timm.models import checkpoint_seq
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.errors import UsageError
from pretrain.models.last_block import cls_of, reads_cls_only

Rule = Literal["timm", "dino"]


class PositionalViT(VisionTransformer):
    """timm's VisionTransformer with either rule for its positions, and patches masked or dropped. Same parameters."""

    pos_interpolation: Rule
    cls_of: Callable[[nn.Module, Tensor], Tensor] = staticmethod(cls_of)
    """The last block where only CLS is read; replaced by its compiled form where blocks are compiled."""

    def embed(
        self, images: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None, keep: Tensor | None = None
    ) -> Tensor:
        """Images [B, 3, H, W] -> tokens [B, prefix + N, D] with their positions, before the first block.

        Args:
            images: of one size.
            mask: bool [B, N], patches replaced by `mask_token` before positions are added (iBOT, DINOv2).
            mask_token: [1, D].
            keep: int64 [B, n], the patches that are left, with their positions: tokens [B, prefix + n, D] (MSN).
        """
        height, width = images.shape[-2:]
        rows, columns = self.grid(height, width)
        patch_height, patch_width = self.patch_embed.patch_size
        patches = self.patch_embed(images[..., : rows * patch_height, : columns * patch_width])
        if mask is not None:
            assert mask_token is not None, "a mask needs the token that replaces the masked patches"
            patches = torch.where(mask.view(-1, rows, columns, 1), mask_token.to(patches.dtype), patches)
        tokens = self._pos_embed(patches, square=height == width)
        if keep is not None:
            prefix, patches = tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]
            index = keep.unsqueeze(-1).expand(-1, -1, patches.shape[-1])
            tokens = torch.cat([prefix, patches.gather(1, index)], dim=1)
        return self.norm_pre(self.patch_drop(tokens))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Images [B, 3, H, W] -> pooled features [B, D]; further arguments go to the blocks."""
        if args or kwargs:
            return super().forward(x, *args, **kwargs)
        return self._pooled(self.embed(x))

    def forward_kept(self, x: Tensor, keep: Tensor) -> Tensor:
        """Images [B, 3, H, W], patches to keep int64 [B, n] -> pooled features [B, D] of these patches."""
        return self._pooled(self.embed(x, keep=keep))

    def forward_tokens(self, x: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """Images [B, 3, H, W], mask bool [B, N], mask token [1, D] -> normalised tokens [B, prefix + N, D]."""
        return self.norm(self._through(self.blocks, self.embed(x, mask, mask_token)))

    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Images [B, 3, H, W] -> normalised tokens [B, prefix + N, D]; further arguments go to the blocks."""
        if not (args or kwargs):
            return self.forward_tokens(x)
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, *args, **kwargs)
        return self.norm(x)

    def _pooled(self, tokens: Tensor) -> Tensor:
        """Tokens before the first block -> pooled features [B, D]."""
        if not reads_cls_only(self):
            return self.forward_head(self.norm(self._through(self.blocks, tokens)))
        *before, last = self.blocks
        return self.forward_head(self.norm(self._through([*before, partial(self.cls_of, last)], tokens)))

    def _through(self, blocks: Iterable[Callable[[Tensor], Tensor]], tokens: Tensor) -> Tensor:
        if self.grad_checkpointing and self.training:
            return checkpoint_seq(tuple(blocks), tokens)
        for block in blocks:
            tokens = block(tokens)
        return tokens

    def positions(self, rows: int, columns: int, square: bool) -> Tensor:
        """The position embedding [1, prefix + rows * columns, D] of a grid of patches of an image, square or not."""
        stored = self.pos_embed
        assert stored is not None
        old_rows, old_columns = self.patch_embed.grid_size
        if self.pos_interpolation == "dino":
            keep = rows * columns == old_rows * old_columns and square
        else:
            keep = (rows, columns) == (old_rows, old_columns)
        if keep:
            return stored
        num_prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        resampling = self._resampling(rows, columns, stored)
        with torch.autocast(stored.device.type, enabled=False):  # the official code interpolates in full precision
            grid = (resampling @ stored[0, num_prefix:]).unsqueeze(0)
        return torch.cat([stored[:, :num_prefix], grid], dim=1)

    def _pos_embed(self, x: Tensor, square: bool | None = None) -> Tensor:
        """Patches [B, h, w, D] -> tokens [B, prefix + h * w, D]; replaces timm's method of this name."""
        batch, rows, columns, _ = x.shape
        prefix = [token.expand(batch, -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        positions = self.positions(rows, columns, rows == columns if square is None else square)
        x = x.flatten(1, 2)
        x = torch.cat([*prefix, x + positions], 1) if self.no_embed_class else torch.cat([*prefix, x], 1) + positions
        return self.pos_drop(x)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image, sides in pixels."""
        check_image_size(self, height)
        check_image_size(self, width)
        patch_height, patch_width = self.patch_embed.patch_size
        return height // patch_height, width // patch_width

    def _resampling(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """R [rows * columns, N], made once per size, precision and device."""
        cache: dict[tuple[object, ...], Tensor] = self.__dict__.setdefault("_resampling_cache", {})
        stored_grid = self.patch_embed.grid_size
        key = (stored_grid, rows, columns, self.pos_interpolation, like.dtype, like.device)
        if key not in cache:
            with torch.inference_mode(False):  # made while evaluating, it must serve a later training step too
                matrix = resampling_matrix(stored_grid, (rows, columns), self.pos_interpolation)
                cache[key] = matrix.to(like.device, like.dtype)
        return cache[key]


def resampling_matrix(old: tuple[int, int], new: tuple[int, int], rule: Rule) -> Tensor:
    """R [h' * w', h * w] in float64 such that R @ grid is the bicubic resampling of a grid h x w to h' x w'."""
    num_old = old[0] * old[1]
    basis = torch.eye(num_old, dtype=torch.float64).reshape(num_old, 1, *old)
    if rule == "dino":
        # The factors, not the sizes, set the sampling points: the 0.1 moves them.
        scale = ((new[0] + 0.1) / old[0], (new[1] + 0.1) / old[1])
        responses = F.interpolate(basis, scale_factor=scale, mode="bicubic")
    else:
        responses = F.interpolate(basis, size=new, mode="bicubic", antialias=True)
    assert responses.shape[-2:] == new
    return responses.flatten(1).T.contiguous()


def check_image_size(backbone: PositionalViT, side: int) -> None:
    """Refuse an image whose side in pixels does not go with the patch size."""
    patch = max(backbone.patch_embed.patch_size)
    if side < patch:
        raise UsageError(f"an image of {side} px has no whole patch of {patch} px: use at least {patch} px")
    if side % patch and backbone.pos_interpolation == "timm":
        near = f"{side - side % patch} or {side - side % patch + patch}"
        raise UsageError(
            f"images of {side} px do not divide into patches of {patch} px: use {near} px, "
            "or model.pos_interpolation=dino, which drops the remaining pixels as the official code does"
        )
