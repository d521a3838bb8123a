"""Mean-teacher DINO: DINO with the squared error between the softmaxes of teacher and student.

Paper: Tarvainen and Valpola, NeurIPS 2017 (the consistency cost); Caron et al., ICCV 2021 (Table 7, row MSE)
Objective: mean squared error of the teacher's and the student's prototype probabilities across views

    L = mean over pairs (teacher view g, student view v != g) of  sum_k (p_gk - q_vk)^2

Everything else is DINO's: sharpened and centred targets, EMA teacher, multi-crop.
"""

from __future__ import annotations

from pretrain.methods.dino import Dino

METHOD = Dino
