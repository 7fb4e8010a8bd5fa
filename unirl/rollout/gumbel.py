"""Seeded draws of tokens by Gumbel's trick, with the noise that vLLM's CPU sampler uses.

The noise of a token depends on a seed and the token's index in the joint vocabulary, so equal logits and seeds give
equal tokens here and there. CUDA engines draw other noise of the same distribution.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def _int64(bits: int) -> int:
    return bits - 2**64 if bits >= 2**63 else bits


# Constants of SplitMix64 (Steele, Lea and Flood, 2014), as the int64 that torch computes with.
_GOLDEN, _FIRST, _SECOND = (_int64(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def step_seeds(generators: Sequence[torch.Generator]) -> Tensor:
    """The next seed int64 [B] of each sequence's own generator."""
    draws = [torch.randint(0, 2**31, (1,), generator=generator) for generator in generators]
    return torch.cat(draws)


def gumbel_argmax(logits: Tensor, seeds: Tensor, offset: int = 0) -> Tensor:
    """One draw int64 [B] from softmax(logits) of each row.

    Args:
        logits: float [B, V]; -inf is never drawn.
        seeds: int64 [B] on the logits' device.
        offset: index of the first column in the joint vocabulary.
    """
    return (logits.double() + gumbel_noise(seeds, logits.shape[1], offset)).argmax(dim=1)


def gumbel_noise(seeds: Tensor, num_values: int, offset: int = 0) -> Tensor:
    """Standard Gumbel noise float64 [B, V], each value from its row's seed and its index in the joint vocabulary."""
    tokens = torch.arange(offset + 1, offset + 1 + num_values, device=seeds.device)
    bits = _shift(_mix(_mix(seeds)[:, None] + tokens * _GOLDEN), 11)
    uniform = (bits.double() + 0.5) * 2.0**-53
    return -torch.log(-torch.log(uniform))


def mixed_seeds(seed: int, step: int, places: Tensor) -> Tensor:
    """Seeds int64 [N] of places int64 [N] in a step of a sequence."""
    return _mix(_mix(seed + torch.tensor(step + 1) * _GOLDEN) + (places + 1) * _GOLDEN)


def _mix(bits: Tensor) -> Tensor:
    bits = (bits ^ _shift(bits, 30)) * _FIRST
    bits = (bits ^ _shift(bits, 27)) * _SECOND
    return bits ^ _shift(bits, 31)


def _shift(bits: Tensor, count: int) -> Tensor:
    """Right shift that fills with zeros, which torch has only for the signed kind."""
    return (bits >> count) & (2 ** (64 - count) - 1)
