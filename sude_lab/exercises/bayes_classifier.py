"""Checks of the exercises to lesson 01; equations of arXiv 2403.06775, logarithms in nats."""

import math

import torch
from torch import Tensor

from sude_lab.diffusion import Schedule, add_noise
from sude_lab.exercises.judging import Call, Draw, check
from sude_lab.exercises.worlds import short_schedule, things
from sude_lab.world.mixture import GaussianMixture


@check(lambda draw: (draw.normal(5, 3, 2), draw.normal(5, 3, 2), draw.uniform(0.1, 0.8, 5)))
def log_density(x_prev: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Check log_density(x_prev, mean, variance), eq. 6; (B, C, h), variance: sigma_t^2, (B,)."""
    squares = (x_prev - mean).flatten(1).square()
    dims = squares.shape[1]
    return -squares.sum(1) / (2 * variance) - dims / 2 * torch.log(2 * math.pi * variance)


@check(lambda draw: (*(draw.normal(4, 5) for _ in range(3)), draw.uniform(0.1, 0.8, 4)))
def log_ratio(x_prev: Tensor, mean_class: Tensor, mean_uncond: Tensor, variance: Tensor) -> Tensor:
    """Check log_ratio(x_prev, mean_class, mean_uncond, variance), eq. 5 with 6; (B, D) -> (B,)."""
    above = log_density.right(x_prev, mean_class, variance)
    below = log_density.right(x_prev, mean_uncond, variance)
    return above - below


def _posterior_call(draw: Draw) -> Call:
    prior = draw.uniform(0.1, 1.0, 4, 4)
    step = (draw.normal(4, 5), draw.normal(4, 4, 5), draw.uniform(0.5, 2.0, 4))
    return *step, prior / prior.sum(1, keepdim=True)


@check(_posterior_call)
def log_posterior(x_prev: Tensor, means: Tensor, variance: Tensor, prior: Tensor) -> Tensor:
    """Check log_posterior(x_prev, means, variance, prior), eq. 5; (B, D), (B, K, D) -> (B, K)."""
    squares = (x_prev[:, None] - means).square().sum(2)
    return (prior.log() - squares / (2 * variance[:, None])).log_softmax(1)


@check(lambda draw: (-draw.uniform(0.5, 2.0, 3), 0.5 + 0.3 * draw.normal(6, 3)))
def chain(last: Tensor, news: Tensor) -> Tensor:
    """Check chain(last, news): log p(c | x_{t-1}) by sums of eq. 5; (N,), (T, N) -> (T, N)."""
    return last + news.flip(0).cumsum(0).flip(0)


def _naming_call(draw: Draw) -> Call:
    world, t = things()[0], torch.full((5,), 40 + draw.seed)
    x_0 = world.sample(5, draw.generator)[0]
    return world, x_0, t, short_schedule(), torch.Generator().manual_seed(draw.seed + 1)


@check(_naming_call)
def noise_errors(
    world: GaussianMixture, x_0: Tensor, t: Tensor, schedule: Schedule, generator: torch.Generator
) -> Tensor:
    """Check noise_errors(world, x_0, t, schedule, generator): eq. 6 in eps-space; (N, C)."""
    eps = torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype)
    columns = []
    for c in range(world.num_classes):
        x_t = add_noise(x_0, eps, t, schedule)
        columns.append((eps - world.eps(x_t, t, schedule, c)).square().sum(1))
    return torch.stack(columns, dim=1)
