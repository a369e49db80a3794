"""Checks of the exercises to lesson 02: the loss, its push, its weight, and eq. 12."""

from __future__ import annotations

import torch
from torch import Tensor

from sude_lab.exercises.judging import (
    Answer,
    Trial,
    ask,
    check,
    judge,
    judge_gradients,
    of_variance,
    twice,
    two_of,
)
from sude_lab.exercises.worlds import (
    normal,
    short_schedule,
    stable_diffusion_schedule,
    steps,
    things,
    uniform,
)
from sude_lab.losses import sude_loss, sude_weight

CATEGORY = 0


@twice
def check_sude(answer: Answer, *, seed: int = 0) -> None:
    """Check sude(x_sub, mean_class, mean_uncond, variance) against eq. 7 of arXiv 2403.06775.

    Values in nats, (B,), and where the gradient goes: into x_sub alone, as the bar over theta says.
    x_sub and means: (B, C, h); variance: sigma_t^2, (B,).
    """
    g = torch.Generator().manual_seed(seed)
    x_sub, mean_class, mean_uncond = (normal(g, 4, 3, 2) for _ in range(3))
    variance = uniform(g, 0.1, 0.8, 4)
    right = sude_loss(x_sub, mean_class, mean_uncond, variance)

    def squares(other: Tensor) -> Tensor:
        return (x_sub - other).square().flatten(1).sum(1) / (2 * variance)

    slips = of_variance(right, variance, "eq. 7") | {
        "The sign is turned: near the class's mean the loss is to be small.": -right,
        "The squares are divided by 2 sigma^2: your 2 is missing.": 2 * right,
        "This pulls towards the class alone: subtract the null's square.": squares(mean_class),
        "This is the second square alone: eq. 7 also pulls towards the class.": squares(
            mean_uncond
        ),
        "Eq. 7 subtracts the second square.": squares(mean_class) + squares(mean_uncond),
        "You averaged over the dimensions: the norm of eq. 7 is a sum.": right / 6,
    }
    judge(ask(answer, x_sub, mean_class, mean_uncond, variance), right, slips)
    fixed = {"mean_class": mean_class, "mean_uncond": mean_uncond}
    judge_gradients(answer, {"x_sub": x_sub}, fixed, variance)


@check
def check_push(seed: int) -> Trial:
    """Check push(x_sub, mean_class, mean_uncond, variance): where one unit of descent moves x_sub.

    Minus the gradient of arXiv 2403.06775, eq. 7: (mean_class - mean_uncond) / sigma_t^2, (B, D).
    """
    g = torch.Generator().manual_seed(seed)
    x_sub, mean_class, mean_uncond = (normal(g, 4, 4) for _ in range(3))
    variance = uniform(g, 0.1, 0.8, 4)
    leaf = x_sub.clone().requires_grad_()
    (slope,) = torch.autograd.grad(sude_loss(leaf, mean_class, mean_uncond, variance).sum(), leaf)
    v = variance[:, None]
    slips = of_variance(-slope, variance, "eq. 7") | {
        "That is the gradient; descent moves against it: turn the sign.": slope,
        "x_sub is not in the gradient: both x_sub^2 cancel.": (mean_class - x_sub) / v,
        "The 2 of 2 sigma^2 cancels against the 2 of the squares' derivative.": -slope / 2,
        "Twice too long: the 2 of the squares' derivative cancels against 2 sigma^2.": -2 * slope,
    }
    return Trial((x_sub, mean_class, mean_uncond, variance), -slope, slips)


@check
def check_along(seed: int) -> Trial:
    """Check along(a, d): the part of a that lies along d, the only one that L_sude sees, (B, D).

    <a, d> / ||d||^2 d per sample; L_sude = (||d||^2 - 2 <a, d>) / (2 sigma_t^2), derived from
    arXiv 2403.06775, eq. 7, with a = x_sub - mean_uncond and d = mean_class - mean_uncond.
    """
    g = torch.Generator().manual_seed(seed)
    a, d = normal(g, 4, 4), 2 * normal(g, 4, 4)
    inner = (a * d).sum(1, keepdim=True)
    square, length_a = d.square().sum(1, keepdim=True), a.norm(dim=1, keepdim=True)
    right = inner / square * d
    slips = {
        "Divide by the square of d's length: d stands there twice.": inner / square.sqrt() * d,
        "Not by the length of a: the ruler is d.": inner / (square.sqrt() * length_a) * d,
        "Not divided by anything yet: <a, d> d grows like length^3.": inner * d,
        "You summed over the whole batch, not each sample.": (a * d).sum() / (d * d).sum() * d,
        "That is the part of d along a: the roles are exchanged.": inner / length_a**2 * a,
        "That is what remains of a: the part along d was taken off.": a - right,
        "That is the number rho; times d it is the part of a.": (inner / square)[:, 0],
    }
    return Trial((a, d), right, slips)


@check
def check_eps_weight(seed: int) -> Trial:
    """Check eps_weight(abar, abar_prev): k_t, the factor of eq. 7 in eps-space, (B,), no unit.

    beta_t / (2 alpha_t (1 - abar_{t-1})) for sigma_t^2 = the posterior variance (`fixed_small`),
    derived from arXiv 2403.06775, eq. 7; see `sude_lab.losses.sude_weight`.
    """
    g = torch.Generator().manual_seed(seed)
    t = torch.randperm(998, generator=g)[:5] + 1
    schedule = stable_diffusion_schedule()
    abar, abar_prev = schedule.alphas_cumprod[t], schedule.alphas_cumprod[t - 1]
    alpha = abar / abar_prev
    beta, right = 1 - alpha, sude_weight(t, schedule, "exact")
    slips = {
        "That is for sigma_t^2 = beta_t: take 1 - abar_{t-1}.": beta / (2 * alpha * (1 - abar)),
        "alpha_t belongs to one step: not abar_t.": (1 - abar) / (2 * abar * (1 - abar_prev)),
        "The 2 of 2 sigma_t^2 is missing.": 2 * right,
        "The mean moves c times as far as eps, so its *square* c^2 times: you took c once.": (
            right * (1 - abar).sqrt() * alpha.sqrt() / beta
        ),
        "That is c_t^2 alone: divide it by 2 sigma_t^2.": beta**2 / (alpha * (1 - abar)),
        "Upside down: k_t is c_t^2 over 2 sigma_t^2.": 1 / right,
    }
    return Trial((abar, abar_prev), right, slips)


@check
def check_same_push(seed: int) -> list[Trial]:
    """Check same_push(weight_sude, t, schedule, old, new): w_s that pushes as hard at one t.

    w_s w_t = w_s' w_t' with w_t of `sude_lab.losses.sude_weight`, arXiv 2403.06775, eq. 7 and 10.
    """
    g = torch.Generator().manual_seed(seed)
    t, schedule = torch.randperm(998, generator=g)[:1] + 1, stable_diffusion_schedule()
    trials = []
    for old, new in (("reference", "exact"), ("exact", "reference")):
        before, after = (sude_weight(t, schedule, name)[0] for name in (old, new))
        slips = {
            "Upside down: a larger weighting needs a smaller w_s.": 0.4 * after / before,
            "The same w_s pushes differently: it is multiplied with another w_t now.": 0.4,
            "That is the push, w_s w_t; divide it by the new weighting.": 0.4 * before,
            "That is the ratio of the weightings: multiply it with the old w_s.": before / after,
        }
        trials.append(Trial((0.4, int(t), schedule, old, new), 0.4 * before / after, slips))
    return trials


@twice
def check_both_sides(answer: Answer, *, seed: int = 0) -> None:
    """Check both_sides(world, subject, x_prev, x_t, t, schedule): eq. 12 of arXiv 2403.06775.

    Left: -log p(x_{t-1} | x_t, sub) - log p(cate | x_{t-1}, sub); right: -log p(x_{t-1} | x_t, sub,
    cate) + S_t. Two tensors (B,), nats; `subject`: bool, a component each; the category is 0.
    """
    (world, subject), schedule = things(), short_schedule()
    x_prev, x_t, t = steps(world, 6, 40, schedule, torch.Generator().manual_seed(seed))
    restricted = world.restrict(subject)
    learn = -restricted.reverse_log_prob_exact(x_prev, x_t, t, schedule)

    def judged(by_subject: bool, at_prev: bool) -> Tensor:
        who = restricted if by_subject else world
        if at_prev:
            return -who.class_log_posterior_prev(x_prev, t, schedule)[:, CATEGORY]
        return -who.class_log_posterior(x_t, t, schedule)[:, CATEGORY]

    joint = -restricted.reverse_log_prob_exact(x_prev, x_t, t, schedule, CATEGORY)
    of_class = -world.reverse_log_prob_exact(x_prev, x_t, t, schedule, CATEGORY)
    s_t = judged(True, False)
    left, right = learn + judged(True, True), joint + s_t
    given = two_of(
        ask(answer, world, subject, x_prev, x_t, t, schedule),
        "two tensors, the left side and the right side of eq. 12",
    )
    judge(
        given[0],
        left,
        {
            "Left: the judge of eq. 12 knows the subject, p(cate | x_{t-1}, sub): ask "
            "`world.restrict(subject)`.": learn + judged(False, True),
            "Left: you asked the judge about x_t; eq. 12 asks about x_{t-1}: "
            "`class_log_posterior_prev`.": learn + judged(True, False),
            "Left: both terms of eq. 12 are minus logarithms.": -left,
            "Left: the judge's term is missing.": learn,
            "Left: the step's -log p(x_{t-1} | x_t, sub) is missing.": judged(True, True),
            "Left: the step must know the subject: -log p(x_{t-1} | x_t, sub).": (
                -world.reverse_log_prob_exact(x_prev, x_t, t, schedule) + judged(True, True)
            ),
        },
    )
    judge(
        given[1],
        right,
        {
            "Right: S_t is minus a logarithm, and eq. 12 adds it.": joint - s_t,
            "Right: S_t is missing.": joint,
            "Right: the step must know both, subject *and* category: restrict to the subject and "
            "give the label.": of_class + s_t,
            "Right: S_t = -log p(cate | x_t, sub): with subject.": joint + judged(False, False),
            "Right: S_t is asked at x_t, before the step.": joint + judged(True, True),
            "Right: minus the logarithm, please.": -joint + s_t,
        },
    )
