"""DINO-SK: DINO with Sinkhorn-Knopp targets instead of a centre.

Paper: Caron et al., ICCV 2021, arXiv 2104.14294 (Tables 7 and 15); the targets of SwAV (NeurIPS 2020) and DINOv2
Objective: as DINO; the teacher's assignments of a batch use every prototype equally

    q = softmax_k(t_rk / tau_t + a_k)      a: three iterations of Sinkhorn-Knopp on the rows r of all ranks
"""

from __future__ import annotations

from pretrain.methods.dino import Dino

METHOD = Dino
