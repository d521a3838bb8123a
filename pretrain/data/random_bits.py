"""Counter-based random numbers: a number is a pure function of (seed, epoch, image, view, slot).

No state is kept, so the numbers of an image depend neither on its batch, nor on the worker or rank that draws them, nor on
where a run was resumed. The generator is SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number
generators"): each image gets its own 64-bit starting point, each counter one step of the Weyl sequence from there.

Everything is int64 arithmetic with wrap-around, hence bit-equal on every device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WORD = (1 << 64) - 1
_WEYL = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def _signed(word: int) -> int:
    """The int64 that has the bits of an unsigned 64-bit word."""
    word &= _WORD
    return word - (1 << 64) if word >> 63 else word


_WEYL_SIGNED, _MIX_1_SIGNED, _MIX_2_SIGNED = _signed(_WEYL), _signed(_MIX_1), _signed(_MIX_2)


def mix_words(*words: int) -> int:
    """One unsigned 64-bit word out of several integers, on the host."""
    state = 0
    for word in words:
        state = (state + word + _WEYL) & _WORD
        state = ((state ^ (state >> 30)) * _MIX_1) & _WORD
        state = ((state ^ (state >> 27)) * _MIX_2) & _WORD
        state ^= state >> 31
    return state


def _mix(state: Tensor) -> Tensor:
    """SplitMix64's finaliser, in place; the masks make torch's arithmetic shifts logical ones."""
    state ^= (state >> 30) & ((1 << 34) - 1)
    state *= _MIX_1_SIGNED
    state ^= (state >> 27) & ((1 << 37) - 1)
    state *= _MIX_2_SIGNED
    state ^= (state >> 31) & ((1 << 33) - 1)
    return state


def image_streams(seed: int, epoch: int, index: Tensor) -> Tensor:
    """The starting point of each image's stream: index int64 [B] -> int64 [B]."""
    return _mix(index * _WEYL_SIGNED + _signed(mix_words(seed, epoch)))


def bits(streams: Tensor, counters: Tensor) -> Tensor:
    """64 random bits each: streams [B], counters [C] (int64) -> int64 [C, B]."""
    return _mix((counters + 1).mul_(_WEYL_SIGNED)[:, None] + streams)


def uniforms(streams: Tensor, counters: Tensor) -> Tensor:
    """U[0, 1) with 53 bits: streams [B], counters [C] -> float64 [C, B].

    Double precision, so that two devices whose logarithms differ in the last bit still round to the same crop box.
    """
    return ((bits(streams, counters) >> 11) & ((1 << 53) - 1)).to(torch.float64).mul_(2.0**-53)


def normals(streams: Tensor, first_counter: int, count: int) -> Tensor:
    """N(0, 1), four per 64 random bits (Box-Muller on 16-bit uniforms, |x| <= 4.9): streams [B] -> float32 [B, count]."""
    words = -(-count // 4)
    counters = torch.arange(first_counter, first_counter + words, device=streams.device)
    word = bits(streams, counters).t()  # [B, words]
    radius, angle = [], []
    for pair in range(2):
        radius.append((word >> (32 * pair)) & 0xFFFF)
        angle.append((word >> (32 * pair + 16)) & 0xFFFF)
    # + 0.5 keeps the logarithm away from 0.
    length = torch.stack(radius, 1).to(torch.float32).add_(0.5).mul_(2.0**-16).log_().mul_(-2.0).sqrt_()
    turn = torch.stack(angle, 1).to(torch.float32).mul_(2.0 * math.pi * 2.0**-16)
    return torch.cat([length * turn.cos(), length * turn.sin_()], 1).flatten(1)[:, :count]
