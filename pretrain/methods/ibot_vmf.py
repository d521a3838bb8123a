"""iBOT-vMF: iBOT with von Mises-Fisher prototypes for image and patch tokens.

Paper: Govindarajan et al., ICLR 2023, arXiv 2405.10939
Objective: as iBOT, with log C_p(kappa) in every logit and centres in probability space

As in dino_vmf a prototype is a mixture component whose precision is its norm; image and patch tokens share the
prototypes, so each token is assigned under the same mixture. Whether the paper centres the patch tokens in probability
space is not known: `patch.centring` selects it on its own (None: as `target.centring`).
"""

from __future__ import annotations

from pretrain.methods.dino_vmf import require_normaliser
from pretrain.methods.ibot import Ibot
from pretrain.training.recipe import Recipe
from pretrain.training.schedules import Plan


class IbotVMF(Ibot):
    """iBOT with unnormalised prototypes and the vMF normaliser in all logits."""

    def __init__(self, recipe: Recipe, plan: Plan):
        require_normaliser(recipe, "ibot")
        super().__init__(recipe, plan)


METHOD = IbotVMF
