"""Checks of the exercises to lesson 02; equations of arXiv 2403.06775, losses in nats."""

import torch

from sude_lab.classifier import squared_distance
from sude_lab.exercises.judging import Draw, Trial, check, of_variance
from sude_lab.exercises.worlds import short_schedule, stable_diffusion_schedule, steps, things
from sude_lab.losses import sude_loss, sude_weight

CATEGORY = 0


@check
def check_sude(draw: Draw) -> Trial:
    """Check sude(x_sub, mean_class, mean_uncond, variance), eq. 7 and its bar; (B,)."""
    x_sub, mean_class, mean_uncond = (draw.normal(4, 3, 2) for _ in range(3))
    variance = draw.uniform(0.1, 0.8, 4)
    right = sude_loss(x_sub, mean_class, mean_uncond, variance)
    means = (mean_class, mean_uncond)
    to_class, to_null = (squared_distance(x_sub, mean) / (2 * variance) for mean in means)
    slips = of_variance(right, variance, "eq. 7") | {
        "The sign is turned: near the class's mean the loss is to be small.": -right,
        "The squares are divided by 2 sigma^2: your 2 is missing.": 2 * right,
        "This pulls towards the class alone: subtract the null's square.": to_class,
        "This is the second square alone: eq. 7 also pulls towards the class.": to_null,
        "Eq. 7 subtracts the second square.": to_class + to_null,
        "You averaged over the dimensions: the norm of eq. 7 is a sum.": right / 6,
    }
    bars, call = ("mean_class", "mean_uncond"), (x_sub, mean_class, mean_uncond, variance)
    return Trial(call, right, slips, learns=("x_sub",), fixed=bars)


@check
def check_push(draw: Draw) -> Trial:
    """Check push(x_sub, mean_class, mean_uncond, variance): minus the gradient of eq. 7, (B, D)."""
    x_sub, mean_class, mean_uncond = (draw.normal(4, 4) for _ in range(3))
    variance = draw.uniform(0.1, 0.8, 4)
    leaf = x_sub.clone().requires_grad_()
    (slope,) = torch.autograd.grad(sude_loss(leaf, mean_class, mean_uncond, variance).sum(), leaf)
    towards = (mean_class - x_sub) / variance[:, None]
    slips = of_variance(-slope, variance, "eq. 7") | {
        "That is the gradient; descent moves against it: turn the sign.": slope,
        "x_sub is not in the gradient: both x_sub^2 cancel.": towards,
        "The 2 of 2 sigma^2 cancels against the 2 of the squares' derivative.": -slope / 2,
        "Twice too long: the 2 of the squares' derivative cancels against 2 sigma^2.": -2 * slope,
    }
    return Trial((x_sub, mean_class, mean_uncond, variance), -slope, slips)


@check
def check_along(draw: Draw) -> Trial:
    """Check along(a, d): <a, d> / ||d||^2 d, the part of a that eq. 7 sees, (B, D)."""
    a, d = draw.normal(4, 4), 2 * draw.normal(4, 4)
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
def check_eps_weight(draw: Draw) -> Trial:
    """Check eps_weight(abar, abar_prev): beta_t / (2 alpha_t (1 - abar_{t-1})), of eq. 7, (B,)."""
    t = torch.randperm(998, generator=draw.generator)[:5] + 1
    schedule = stable_diffusion_schedule()
    abar, abar_prev = schedule.alphas_cumprod[t], schedule.alphas_cumprod[t - 1]
    alpha = abar / abar_prev
    beta, right = 1 - alpha, sude_weight(t, schedule, "exact")
    once = right * (1 - abar).sqrt() * alpha.sqrt() / beta
    slips = {
        "That is for sigma_t^2 = beta_t: take 1 - abar_{t-1}.": beta / (2 * alpha * (1 - abar)),
        "alpha_t belongs to one step: not abar_t.": (1 - abar) / (2 * abar * (1 - abar_prev)),
        "The 2 of 2 sigma_t^2 is missing.": 2 * right,
        "The mean moves c times as far, its *square* c^2 times: you took c once.": once,
        "That is c_t^2 alone: divide it by 2 sigma_t^2.": beta**2 / (alpha * (1 - abar)),
        "Upside down: k_t is c_t^2 over 2 sigma_t^2.": 1 / right,
    }
    return Trial((abar, abar_prev), right, slips)


@check
def check_same_push(draw: Draw) -> list[Trial]:
    """Check same_push(weight_sude, t, schedule, old, new): w_s' = w_s w_t / w_t', eq. 10."""
    t = torch.randperm(998, generator=draw.generator)[:1] + 1
    schedule, trials = stable_diffusion_schedule(), []
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


@check
def check_both_sides(draw: Draw) -> Trial:
    """Check both_sides(world, subject, x_prev, x_t, t, schedule): the sides of eq. 12, (B,)."""
    (world, subject), schedule = things(), short_schedule()
    x_prev, x_t, t = steps(world, 6, 40, schedule, draw.generator)
    step = (x_prev, x_t, t, schedule)
    who = (world.restrict(subject), world)
    learn, blind = (-one.reverse_log_prob_exact(*step) for one in who)
    joint, of_class = (-one.reverse_log_prob_exact(*step, CATEGORY) for one in who)
    judged, by_world = (
        -one.class_log_posterior_prev(x_prev, t, schedule)[:, CATEGORY] for one in who
    )
    s_t, s_world = (-one.class_log_posterior(x_t, t, schedule)[:, CATEGORY] for one in who)
    left = {
        "Left: the judge of eq. 12 knows the subject: `world.restrict(subject)`.": learn + by_world,
        "Left: you asked the judge about x_t; eq. 12 asks about x_{t-1}.": learn + s_t,
        "Left: both terms of eq. 12 are minus logarithms.": -(learn + judged),
        "Left: the judge's term is missing.": learn,
        "Left: the step's -log p(x_{t-1} | x_t, sub) is missing.": judged,
        "Left: the step must know the subject: -log p(x_{t-1} | x_t, sub).": blind + judged,
    }
    right = {
        "Right: S_t is minus a logarithm, and eq. 12 adds it.": joint - s_t,
        "Right: S_t is missing.": joint,
        "Right: the step must know both, subject *and* category (label).": of_class + s_t,
        "Right: S_t = -log p(cate | x_t, sub): with subject.": joint + s_world,
        "Right: S_t is asked at x_t, before the step.": joint + judged,
        "Right: minus the logarithm, please.": -joint + s_t,
    }
    sides, asked_for = (learn + judged, joint + s_t), "two tensors, the sides of eq. 12"
    return Trial((world, subject, *step), sides, (left, right), two=asked_for)
