"""iBOT-vMF (kp): iBOT-vMF with prototypes that are pushed apart.

Paper: Govindarajan et al., BMVC 2024, arXiv 2410.14060
Objective: as iBOT-vMF, plus KoLeo on the prototypes, against partial prototype collapse

    L = L_iBOT-vMF + lambda L_KP      L_KP = -(1/K) sum_k log min_{j != k} ||mu_k - mu_j||      mu_k = w_k / ||w_k||

The published value of lambda is not known; `regularizer.koleo_proto` holds it.
"""

from __future__ import annotations

from pretrain.methods.ibot_vmf import IbotVMF

METHOD = IbotVMF
