"""Checks of the exercises to lesson 11: flow matching and diffusion are one process (derived)."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from sude_lab.exercises.judging import Call, Draw, check


def _noisy_call(draw: Draw) -> Call:
    return draw.normal(4, 4), draw.uniform(0.1, 0.9, 4)


@check(_noisy_call)
def as_ddpm(x_s: Tensor, s: Tensor) -> Tensor:
    """Check as_ddpm(x_s, s): x_s / sqrt((1 - s)^2 + s^2), eq. 1's noisy picture; (B, D)."""
    length = ((1 - s) ** 2 + s**2).sqrt()
    return x_s / length[:, None]


@check(lambda draw: (draw.normal(4, 4), *_noisy_call(draw)))
def velocity(eps: Tensor, x_s: Tensor, s: Tensor) -> Tensor:
    """Check velocity(eps, x_s, s): v = eps - x_0 = (eps - x_s) / (1 - s), (B, D)."""
    return (eps - x_s) / (1 - s)[:, None]


@check(lambda draw: (s := draw.uniform(0.3, 0.9, 4), s - draw.uniform(0.05, 0.2, 4)))
def flow_weight(s: Tensor, near: Tensor) -> Tensor:
    """Check flow_weight(s, near): s^2 / 2 (SNR(near) - SNR(s)), eq. 7's factor in v; (B,)."""
    here, there = ((1 - x) ** 2 / x**2 for x in (s, near))
    return s**2 / 2 * (there - here)


def _step_call(draw: Draw) -> Call:
    s = draw.number(0.5, 0.8)
    parts = (draw.normal(4, 4) for _ in range(3))
    return (*parts, s, s - draw.number(0.1, 0.2), draw.number(0.3, 0.9))


@check(_step_call)
def noisy_step(x_0: Tensor, eps: Tensor, z: Tensor, s: float, near: float, eta: float) -> Tensor:
    """Check noisy_step(x_0, eps, z, s, near, eta): from s to `near` with noise eta, (B, D)."""
    R = ((1 - s) / s) ** 2 / ((1 - near) / near) ** 2
    variance = eta**2 * near**2 * (1 - R)
    return (1 - near) * x_0 + (near**2 - variance) ** 0.5 * eps + variance**0.5 * z


def _curved(x: Tensor, s: float) -> Tensor:
    return torch.sin(3 * x) + s * x


@check(lambda draw: (_curved, draw.normal(4, 4), sorted(draw.uniform(0, 1, 6).tolist())[::-1]))
def euler(field: Callable[[Tensor, float], Tensor], x: Tensor, times: list[float]) -> Tensor:
    """Check euler(field, x, times): steps along dx/ds = field(x, s), by falling s; (B, D)."""
    for s, near in pairwise(times):
        x = x + (near - s) * field(x, s)
    return x
