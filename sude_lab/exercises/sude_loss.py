"""Checks of the exercises to lesson 02; equations of arXiv 2403.06775, losses in nats."""

import torch
from torch import Tensor

from sude_lab.diffusion import Schedule
from sude_lab.exercises.judging import Call, Draw, check
from sude_lab.exercises.worlds import short_schedule, stable_diffusion_schedule, steps, things
from sude_lab.losses import sude_weight
from sude_lab.world.mixture import GaussianMixture


@check(
    lambda draw: (*(draw.normal(4, 3, 2) for _ in range(3)), draw.uniform(0.1, 0.8, 4)),
    learns=("x_sub",),
    fixed=("mean_class", "mean_uncond"),
)
def sude(x_sub: Tensor, mean_class: Tensor, mean_uncond: Tensor, variance: Tensor) -> Tensor:
    """Check sude(x_sub, mean_class, mean_uncond, variance), eq. 7 and its bar; (B,)."""
    to_class = (x_sub - mean_class.detach()).flatten(1).square().sum(1)
    to_uncond = (x_sub - mean_uncond.detach()).flatten(1).square().sum(1)
    return (to_class - to_uncond) / (2 * variance)


@check(lambda draw: (*(draw.normal(4, 4) for _ in range(3)), draw.uniform(0.1, 0.8, 4)))
def push(x_sub: Tensor, mean_class: Tensor, mean_uncond: Tensor, variance: Tensor) -> Tensor:
    """Check push(x_sub, mean_class, mean_uncond, variance): minus the gradient of eq. 7, (B, D)."""
    return (mean_class - mean_uncond) / variance[:, None]


@check(lambda draw: (draw.normal(4, 4), 2 * draw.normal(4, 4)))
def along(a: Tensor, d: Tensor) -> Tensor:
    """Check along(a, d): <a, d> / ||d||^2 d, the part of a that eq. 7 sees, (B, D)."""
    number = (a * d).sum(1, keepdim=True) / d.square().sum(1, keepdim=True)
    return number * d


def _weight_call(draw: Draw) -> Call:
    t = torch.randperm(998, generator=draw.generator)[:5] + 1
    abar = stable_diffusion_schedule().alphas_cumprod
    return abar[t], abar[t - 1]


@check(_weight_call)
def eps_weight(abar: Tensor, abar_prev: Tensor) -> Tensor:
    """Check eps_weight(abar, abar_prev): beta_t / (2 alpha_t (1 - abar_{t-1})), of eq. 7, (B,)."""
    alpha = abar / abar_prev
    beta = 1 - alpha
    return beta / (2 * alpha * (1 - abar_prev))


def _pushes(draw: Draw) -> list[Call]:
    t, schedule = int(draw.number(1, 999)), stable_diffusion_schedule()
    weight, old, new = draw.number(0.2, 0.6), "reference", "exact"
    return [(weight, t, schedule, old, new), (2 * weight, t, schedule, new, old)]


@check(_pushes)
def same_push(weight_sude: float, t: int, schedule: Schedule, old: str, new: str) -> Tensor:
    """Check same_push(weight_sude, t, schedule, old, new): w_s' = w_s w_t / w_t', eq. 10."""
    before = sude_weight(torch.tensor([t]), schedule, old)[0]
    after = sude_weight(torch.tensor([t]), schedule, new)[0]
    return weight_sude * before / after


def _sides_call(draw: Draw) -> Call:
    (world, subject), schedule = things(), short_schedule()
    return world, subject, *steps(world, 6, 40 + draw.seed, schedule, draw.generator), schedule


@check(_sides_call, two="two tensors, the sides of eq. 12")
def both_sides(
    world: GaussianMixture,
    subject: Tensor,
    x_prev: Tensor,
    x_t: Tensor,
    t: Tensor,
    schedule: Schedule,
) -> tuple[Tensor, Tensor]:
    """Check both_sides(world, subject, x_prev, x_t, t, schedule): the sides of eq. 12, (B,)."""
    known = world.restrict(subject)
    step = -known.reverse_log_prob_exact(x_prev, x_t, t, schedule)
    judge = -known.class_log_posterior_prev(x_prev, t, schedule)[:, 0]
    joint = -known.reverse_log_prob_exact(x_prev, x_t, t, schedule, 0)
    S_t = -known.class_log_posterior(x_t, t, schedule)[:, 0]
    return step + judge, joint + S_t
