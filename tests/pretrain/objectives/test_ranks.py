"""Two ranks equal one: the mean of the ranks' losses and gradients is that of one process with all images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pretrain.objectives.contrastive import info_nce, nt_xent
from pretrain.objectives.ranks import gather_rows
from pretrain.objectives.regularizers import koleo, mean_entropy

RANKS = 2
LOSSES = {
    "koleo_global": lambda a, b: koleo(a, "global") + koleo(b, "global"),
    "mean_entropy": lambda a, b: mean_entropy(3 * torch.cat([a, b])),
    "info_nce": lambda a, b: info_nce(a, b, 0.2) + info_nce(b, a, 0.2),
    "nt_xent": lambda a, b: nt_xent(a, b, 0.2),
}


def _images_and_encoder():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 4 * RANKS, 6, generator=generator, dtype=torch.float64)
    return images, torch.randn(5, 6, generator=generator, dtype=torch.float64)


def _loss_and_gradient(name, images, encoder):
    encoder = encoder.clone().requires_grad_()
    loss = LOSSES[name](*(images @ encoder.T).tanh())
    return np.append(torch.autograd.grad(loss, encoder)[0].numpy(), loss.item())


def _one_rank(rank, folder):
    torch.distributed.init_process_group("gloo", rank=rank, world_size=RANKS, init_method=f"file://{folder}/group")
    images, encoder = _images_and_encoder()
    own = images.chunk(RANKS, dim=1)[rank]
    answers = {name: _loss_and_gradient(name, own, encoder) for name in LOSSES}
    answers["gathered"] = gather_rows(own[0]).numpy()
    answers["koleo_rank"] = koleo(own[0]).numpy()
    np.savez(f"{folder}/{rank}.npz", **answers)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def answers(tmp_path_factory, start_ranks):
    folder = tmp_path_factory.mktemp("ranks")
    start_ranks(_one_rank, str(folder), ranks=RANKS)
    return [dict(np.load(folder / f"{rank}.npz")) for rank in range(RANKS)]


@pytest.mark.parametrize("name", LOSSES)
def test_mean_loss_and_gradient_over_ranks_are_those_of_one_process(answers, name):
    mean = np.mean([answer[name] for answer in answers], axis=0)
    np.testing.assert_allclose(mean, _loss_and_gradient(name, *_images_and_encoder()), rtol=1e-9, atol=1e-12)


def test_rows_are_gathered_in_the_order_of_the_ranks(answers):
    for answer in answers:
        np.testing.assert_array_equal(answer["gathered"], _images_and_encoder()[0][0])


def test_koleo_of_a_rank_looks_at_its_own_images_only(answers):
    images = _images_and_encoder()[0][0]
    for answer, own in zip(answers, images.chunk(RANKS), strict=True):
        np.testing.assert_allclose(answer["koleo_rank"], koleo(own), rtol=1e-12)
