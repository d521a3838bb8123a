"""Counter-based random numbers: a number is a pure function of (seed, epoch, image, view, slot).

No state is kept, so the numbers of an image depend neither on its batch, nor on the worker or rank that draws them,
nor on where a run was resumed. The generator is SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom
number generators"): each image gets its own 64-bit starting point, each counter one step of the Weyl sequence from
there.

Numbers that there are few of (where to crop) are drawn with numpy on the host, those for every pixel (noise) with
torch on the device: both are 64-bit integer arithmetic with wrap-around and give the same bits everywhere.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

_WORD = (1 << 64) - 1
_WEYL = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB

Words = np.ndarray
"""uint64 array."""


def mix_words(*words: int) -> int:
    """One unsigned 64-bit word out of several integers."""
    state = 0
    for word in words:
        state = (state + word + _WEYL) & _WORD
        state = ((state ^ (state >> 30)) * _MIX_1) & _WORD
        state = ((state ^ (state >> 27)) * _MIX_2) & _WORD
        state ^= state >> 31
    return state


def _mix(state: Words) -> Words:
    """SplitMix64's finaliser, in place."""
    state ^= state >> np.uint64(30)
    state *= np.uint64(_MIX_1)
    state ^= state >> np.uint64(27)
    state *= np.uint64(_MIX_2)
    state ^= state >> np.uint64(31)
    return state


def image_streams(seed: int, epoch: int, index: np.ndarray) -> Words:
    """The starting point of each image's stream: index [B] -> uint64 [B]."""
    return _mix(index.astype(np.uint64) * np.uint64(_WEYL) + np.uint64(mix_words(seed, epoch)))


def uniforms(streams: Words, counters: np.ndarray) -> np.ndarray:
    """U[0, 1) with 53 bits: streams [B], counters [C] -> float64 [C, B]."""
    steps = (counters.astype(np.uint64) + np.uint64(1)) * np.uint64(_WEYL)
    return (_mix(steps[:, None] + streams) >> np.uint64(11)) * 2.0**-53


def _signed(word: int) -> int:
    """The int64 that has the bits of an unsigned 64-bit word."""
    return word - (1 << 64) if word >> 63 else word


def device_bits(streams: Tensor, counters: Tensor) -> Tensor:
    """64 random bits each, on the device: streams int64 [B], counters int64 [C] -> int64 [B, C]."""
    state = (counters + 1) * _signed(_WEYL) + streams[:, None]
    # The masks make torch's arithmetic shifts logical ones.
    state ^= (state >> 30).bitwise_and_((1 << 34) - 1)
    state *= _signed(_MIX_1)
    state ^= (state >> 27).bitwise_and_((1 << 37) - 1)
    state *= _signed(_MIX_2)
    state ^= (state >> 31).bitwise_and_((1 << 33) - 1)
    return state


@functools.cache
def _normal_quantiles(device: torch.device) -> Tensor:
    """The normal quantiles in the middle of 2^16 equal parts: [65536]."""
    levels = (torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16)
    return torch.special.ndtri(levels).float().to(device)


def device_normals(streams: Tensor, counters: Tensor) -> Tensor:
    """N(0, 1) in 2^16 steps (|x| < 4.4), four per counter.

    Streams int64 [B], counters int64 [C] -> float32 [B, 4 C].
    """
    picked = device_bits(streams, counters).view(torch.int16).int().bitwise_and_(0xFFFF)
    return _normal_quantiles(streams.device).index_select(0, picked.flatten()).view(picked.shape)
