"""Figures drawn on request by `dinobench figure`: one file per figure, and what they share.

drawing.py      a figure with its name and the numbers behind it
inputs.py       checkpoint, evaluation transform and images that a figure starts from
vmf.py          von Mises-Fisher densities, and the error of log C_p
attention.py    what CLS attends to, per head
features.py     patch tokens as colours
prototypes.py   norms, usage and nearest images of the prototypes
collapse.py     teacher entropy and KL of runs (DINO, Figure 7)
"""
