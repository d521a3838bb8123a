from __future__ import annotations

import numpy as np
import torch
from scipy import stats

from pretrain.data.random_bits import device_bits, device_normals, image_streams, mix_words, uniforms


def test_the_generator_is_splitmix64() -> None:
    # First outputs of SplitMix64 seeded with 1234567 (Vigna's reference implementation).
    expected = np.array([6457827717110365317, 3203168211198807973, 9817491932198370423], np.uint64)
    streams = np.array([1234567], np.uint64)
    counters = torch.arange(3)
    found = device_bits(torch.from_numpy(streams.view(np.int64)), counters)[0].numpy().view(np.uint64)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(uniforms(streams, counters.numpy())[:, 0], (expected >> np.uint64(11)) * 2.0**-53)


def test_numbers_of_an_image_do_not_depend_on_its_batch() -> None:
    counters = np.arange(50)
    whole = uniforms(image_streams(3, 7, np.arange(20)), counters)
    alone = uniforms(image_streams(3, 7, np.array([13])), counters)
    np.testing.assert_array_equal(whole[:, 13], alone[:, 0])


def test_seed_epoch_and_image_each_change_the_numbers() -> None:
    counters = np.arange(4)
    draws = {
        (seed, epoch, image): tuple(uniforms(image_streams(seed, epoch, np.array([image])), counters)[:, 0])
        for seed in range(5)
        for epoch in range(5)
        for image in range(5)
    }
    assert len(set(draws.values())) == len(draws)


def test_uniform_numbers_are_uniform_and_unrelated_between_images_and_counters() -> None:
    numbers = uniforms(image_streams(0, 0, np.arange(300)), np.arange(300))
    assert stats.kstest(numbers.ravel(), "uniform").pvalue > 0.01
    for rows in (numbers, numbers.T):
        correlation = np.corrcoef(rows[:-1].ravel(), rows[1:].ravel())[0, 1]
        assert abs(correlation) < 4 / np.sqrt(numbers.size)


def test_normal_numbers_are_normal_and_differ_between_images() -> None:
    streams = torch.from_numpy(image_streams(0, 1, np.arange(100)).view(np.int64))
    numbers = device_normals(streams, torch.arange(200))
    assert numbers.shape == (100, 800)
    assert stats.kstest(numbers.flatten().numpy(), "norm").pvalue > 0.01
    assert abs(torch.corrcoef(numbers[:2])[0, 1]) < 0.15
    assert abs(torch.corrcoef(torch.stack([numbers[:, :-1].flatten(), numbers[:, 1:].flatten()]))[0, 1]) < 0.02


def test_mixed_words_depend_on_order() -> None:
    assert len({mix_words(*words) for words in [(1, 2), (2, 1), (1, 2, 0), (12,), (0, 1, 2)]}) == 5
