"""DINO-vMF: DINO as a von Mises-Fisher mixture.

Paper: Govindarajan et al., ICLR 2023, arXiv 2405.10939
Objective: as DINO, with log C_p(kappa) in every logit and the centre in probability space

Prototype w_k is a mixture component with mean direction w_k / ||w_k|| and precision kappa_k = ||w_k|| / tau. The logit
is the component's log-density, so its normaliser log C_p belongs in it; L2-normalised prototypes force one precision
on all components, here each keeps its own:

    l_k(x) = <w_k, y> / tau + log C_p(||w_k|| / tau)             student: tau_s, teacher: tau_t
    P_t(k|x) = softmax_k(l_t(x) - c)    c_k <- m c_k + (1 - m) log mean_b softmax_k(l_t(x_b))

log C_p is a function of the norm alone, so the norm of a prototype grows only while the images it wins have a mean
cosine above A_p(kappa_k), the vMF maximum-likelihood condition.
Against DINO the recipe changes three switches: head.prototypes=free, head.normaliser=vmf, target.centring=prob_*.
"""

from __future__ import annotations

from pretrain.errors import UsageError
from pretrain.methods.dino import Dino
from pretrain.training.recipe import Recipe
from pretrain.training.schedules import Plan


class DinoVMF(Dino):
    """DINO with unnormalised prototypes and the vMF normaliser in both logits."""

    def __init__(self, recipe: Recipe, plan: Plan):
        require_normaliser(recipe, "dino")
        super().__init__(recipe, plan)


def require_normaliser(recipe: Recipe, plain: str) -> None:
    """Refuse a vMF method whose logits lack log C_p; `plain` is the method that it would be."""
    if recipe.head.normaliser == "none":
        control = "; for free prototypes without log C_p use dino_free" if plain == "dino" else ""
        raise UsageError(
            f"{recipe.method.name} needs head.normaliser=vmf (or vmf_leading); without it use {plain}{control}"
        )


METHOD = DinoVMF
