"""DINO-KoLeo-proto: DINO with prototypes that are pushed apart.

Paper: Govindarajan et al., BMVC 2024, arXiv 2410.14060 (L_KP; the paper adds it to iBOT-vMF)
Objective: as DINO, plus KoLeo on the prototypes, against partial prototype collapse

    L = L_dino + lambda L_KP      L_KP = -(1/K) sum_k log min_{j != k} ||mu_k - mu_j||      mu_k = w_k / ||w_k||

The published value of lambda is not known; `regularizer.koleo_proto` holds it.
"""

from __future__ import annotations

from pretrain.methods.dino import Dino

METHOD = Dino
