"""What the exercises are given: schedules, and two small worlds in which everything is known.

Equations are those of arXiv 2403.06775.
"""

import torch
from torch import Tensor

from sude_lab.diffusion import Schedule, add_noise
from sude_lab.world.mixture import GaussianMixture

DOG, CAT = 0, 1
WORDS = (("dog", "running"), ("candle", "unlit"), ("cat", "open mouth"))
"""Categories, each with an attribute of its own."""


def stable_diffusion_schedule() -> Schedule:
    """Return Stable Diffusion's table abar_t = prod_{s <= t} (1 - beta_s), eq. 1; the model's, too.

    sqrt(beta) grows evenly from sqrt(0.00085) to sqrt(0.012) in 1,000 steps ("scaled linear").
    """
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return Schedule((1 - betas).cumprod(0))


def short_schedule(num_steps: int = 100) -> Schedule:
    """Return lesson 01's table: abar_t = exp(-4 ((t + 1) / T)^2), from nearly 1 to 0.02."""
    time = torch.arange(1, num_steps + 1, dtype=torch.float64) / num_steps
    return Schedule((-4 * time**2).exp())


def animals() -> GaussianMixture:
    """Return lesson 01's world of snouts, one number each: two kinds of dog (0), one of cat (1)."""
    return GaussianMixture(
        weights=torch.tensor([0.35, 0.25, 0.40]).double(),
        means=torch.tensor([[-2.0], [0.2], [1.8]]).double(),
        variances=torch.tensor([0.06, 0.09, 0.12]).double(),
        labels=torch.tensor([DOG, DOG, CAT]),
    )


def things() -> tuple[GaussianMixture, Tensor]:
    """Return lesson 02's world of two numbers, dogs (0) and other things (1), and who is my dog's.

    The bool tensor marks the components with my dog's colours, the subject c_sub.
    """
    world = GaussianMixture(
        weights=torch.tensor([0.1, 0.4, 0.1, 0.4]).double(),
        means=torch.tensor([[-1.2, 1.2], [-0.8, -0.9], [0.4, 1.4], [1.5, -0.6]]).double(),
        variances=torch.tensor([0.15, 0.3, 0.2, 0.3]).double(),
        labels=torch.tensor([0, 0, 1, 1]),
    )
    return world, torch.tensor([True, False, True, False])


def steps(
    mixture: GaussianMixture, n: int, k: int, schedule: Schedule, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x_{t-1}, x_t, (n, D), and t, (n,): eq. 1 to k - 1 >= 0, then one step more.

    x_t = sqrt(alpha_t) x_{t-1} + sqrt(1 - alpha_t) noise.
    """
    x_0, _ = mixture.sample(n, generator)
    t = torch.full((n,), k)
    first, second = (torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype) for _ in range(2))
    x_prev = add_noise(x_0, first, t - 1, schedule)
    alpha = schedule.alphas_cumprod[k] / schedule.alphas_cumprod[k - 1]
    return x_prev, alpha.sqrt() * x_prev + (1 - alpha).sqrt() * second, t
