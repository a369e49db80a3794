"""The page's noise: what its JavaScript draws, drawn here, too.

Stream n of a seed s is mulberry32, a generator of 32 bits, started at 100003 s + n (mod 2^32);
two uniform numbers make two normal ones (Box and Muller).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def uniform(seed: int, stream: int, number: int) -> np.ndarray:
    """Return numbers in (0, 1): (k + 1/2) / 2^32 for the generator's whole numbers k."""
    start = np.uint32((seed * 100_003 + stream) % 2**32)
    s = start + np.arange(1, number + 1, dtype=np.uint32) * np.uint32(0x6D2B79F5)
    t = (s ^ (s >> 15)) * (s | 1)
    t = (t + (t ^ (t >> 7)) * (t | 61)) ^ t
    return ((t ^ (t >> 14)).astype(np.float64) + 0.5) / 2**32


def normal(seed: int, stream: int = 0, shape: tuple[int, ...] = (8, 16, 16)) -> Tensor:
    """Return standard normal noise, sqrt(-2 ln u) (cos, sin)(2 pi v) of pairs (u, v), float32."""
    u, v = uniform(seed, stream, int(np.prod(shape))).reshape(-1, 2).T
    far, angle = np.sqrt(-2 * np.log(u)), 2 * np.pi * v
    pairs = np.stack([far * np.cos(angle), far * np.sin(angle)], 1)
    return torch.tensor(pairs.reshape(shape), dtype=torch.float32)
