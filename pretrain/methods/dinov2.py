"""DINOv2: the iBOT objective with separate heads, Sinkhorn-Knopp targets and KoLeo.

Paper: Oquab et al., TMLR 2024, arXiv 2304.07193
Objective: DINO between views, patch loss on masked patches, KoLeo on the student's [CLS] features

    L = L_dino + L_ibot + 0.1 sum_{g <= 2} KoLeo(CLS features of global view g)

L_dino is the same mean over pairs of views as DINO's, L_ibot the same mean over crops as iBOT's (facts of
facebookresearch/dinov2@b8931f7: PROTOCOLS section 3). What differs from iBOT is in the recipe: masks that are drawn for
the batch as a whole, a patch centre over masked patches alone, one teacher temperature for both heads that rises per
step, the rate of the last layer held at 0 at first, layer-wise rates, clipping per module, blur and crop scales.
"""

from __future__ import annotations

from pretrain.methods.ibot import Ibot

METHOD = Ibot
