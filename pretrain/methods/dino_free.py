"""DINO-free: DINO with free prototype norms and no log C_p, the control of the DINO-vMF claim.

Paper: Govindarajan et al., ICLR 2023, arXiv 2405.10939 (the ablation of Figure 1)
Objective: as DINO, with unnormalised prototypes

The logit is <w_k, y> / tau with unnormalised w_k, centred as in DINO. Against it, dino_vmf shows what the normaliser
adds beyond letting the norms move (Govindarajan et al., ICLR 2023, the ablation of Figure 1).
"""

from __future__ import annotations

from pretrain.methods.dino import Dino

METHOD = Dino
