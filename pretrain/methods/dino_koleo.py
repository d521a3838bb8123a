"""DINO-KoLeo: DINO with the KoLeo regulariser of DINOv2 on the student's features.

Paper: Sablayrolles et al., ICLR 2019 (KoLeo); Oquab et al., TMLR 2024, arXiv 2304.07193 (its use)
Objective: as DINO, plus KoLeo on the [CLS] features of each global view

    L = L_dino + 0.1 sum_{g <= 2} -(1/B) sum_i log ||x_gi - x_g,nn(i)||       x: L2-normalised features
"""

from __future__ import annotations

from pretrain.methods.dino import Dino

METHOD = Dino
