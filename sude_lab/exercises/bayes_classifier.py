"""Checks of the exercises to lesson 01; equations of arXiv 2403.06775, logarithms in nats."""

import math

import torch
from torch import Tensor

from sude_lab.classifier import (
    class_log_posterior,
    class_log_ratio,
    reverse_log_prob,
    squared_distance,
)
from sude_lab.diffusion import add_noise
from sude_lab.exercises.judging import Draw, Trial, check, choice, named, of_variance
from sude_lab.exercises.worlds import short_schedule, things


@check
def check_log_density(draw: Draw) -> Trial:
    """Check log_density(x_prev, mean, variance), eq. 6; (B, C, h), variance: sigma_t^2, (B,)."""
    x_prev, mean = draw.normal(5, 3, 2), draw.normal(5, 3, 2)
    variance = draw.uniform(0.1, 0.8, 5)
    right = reverse_log_prob(x_prev, mean, variance)
    distance, dims = squared_distance(x_prev, mean), 6

    def log_p(divisor: Tensor, count: float, of: Tensor = variance) -> Tensor:
        return -distance / divisor - count / 2 * (2 * math.pi * of).log()

    squared = "`variance` is sigma^2 already: you squared it once more"
    slips = {
        "You divided by sigma: `variance` is its square.": log_p(2 * variance.sqrt(), dims),
        f"{squared}.": log_p(2 * variance**2, dims),
        f"{squared}, in both places.": log_p(2 * variance**2, dims, variance**2),
        "The distance is divided by 2 sigma^2: your 2 is missing.": log_p(variance, dims),
        "Eq. 6 squares it: not the distance.": log_p(2 * variance * distance.sqrt(), dims),
        "The distance makes a step less likely: its sign is turned.": log_p(-2 * variance, dims),
        "The normaliser makes a wide density lower: turn its sign.": log_p(2 * variance, -dims),
        "The normaliser is missing: this is the distance term alone.": log_p(2 * variance, 0),
        "The normaliser's factor is -D/2, not -D.": log_p(2 * variance, 2 * dims),
        "You averaged over the dimensions: the norm of eq. 6 is a sum.": right / dims,
        "You averaged the squares: eq. 6 has their sum.": log_p(2 * variance * dims, dims),
    }
    for count, name in ((1, "once"), (3, "once for each of the C channels"), (5, "B times")):
        says = f"The normaliser counts once for each of the D = C h dimensions; you took it {name}."
        slips[says] = log_p(2 * variance, count)
    return Trial((x_prev, mean, variance), right, slips)


@check
def check_log_ratio(draw: Draw) -> Trial:
    """Check log_ratio(x_prev, mean_class, mean_uncond, variance), eq. 5 with 6; (B, D) -> (B,)."""
    x_prev, mean_class, mean_uncond = (draw.normal(4, 5) for _ in range(3))
    variance = draw.uniform(0.1, 0.8, 4)
    right = class_log_ratio(x_prev, mean_class, mean_uncond, variance)
    above, below = (reverse_log_prob(x_prev, mean, variance) for mean in (mean_class, mean_uncond))
    to_class = squared_distance(x_prev, mean_class) / (2 * variance)
    slips = of_variance(right, variance, "eq. 6") | {
        "The sign is turned: a step near the class's mean speaks for the class.": -right,
        "The distances are divided by 2 sigma^2: your 2 is missing.": 2 * right,
        "This is the numerator alone: subtract log p(x_{t-1} | x_t).": above,
        "This is the denominator alone: eq. 5 has a numerator, too.": below,
        "You divided the logarithms: log(a / b) is a difference.": above / below,
        "You added the logarithms: log(a / b) is a difference.": above + below,
        "You averaged over the dimensions: the norm of eq. 6 is a sum.": right / 5,
        "This is the numerator's distance alone: eq. 5 has a denominator, too.": -to_class,
        "Take the logarithm: this is the ratio itself.": right.exp(),
    }
    return Trial((x_prev, mean_class, mean_uncond, variance), right, slips)


check_normaliser = choice(
    "c",
    "when the normaliser of eq. 6 does not cancel in eq. 5.",
    a="The number of dimensions is the same above and below the line: it cancels.",
    b="That changes sigma_t from t to t, and t is the same above and below: it cancels.",
    d="The empty prompt changes the mean, which the normaliser does not know: it cancels.",
)


@check
def check_log_posterior(draw: Draw) -> Trial:
    """Check log_posterior(x_prev, means, variance, prior), eq. 5; (B, D), (B, K, D) -> (B, K)."""
    x_prev, means = draw.normal(4, 5), draw.normal(4, 4, 5)
    variance, prior = draw.uniform(0.5, 2.0, 4), draw.uniform(0.1, 1.0, 4, 4)
    prior = prior / prior.sum(1, keepdim=True)
    known, right = prior.log(), class_log_posterior(x_prev, means, variance, prior.log())
    fit = -(x_prev[:, None] - means).square().sum(2) / (2 * variance[:, None])
    spread = fit * variance[:, None] / variance
    slips = {
        "You normalised over the batch: use dim=1.": (fit + known).log_softmax(0),
        "You added the prior to a logarithm: add its logarithm.": (fit + prior).log_softmax(1),
        "The prior C_t is missing: a rare class needs better evidence.": fit.log_softmax(1),
        "The sign is turned: the nearest mean fits best.": (-fit + known).log_softmax(1),
        "These are probabilities: their logarithms are asked for.": right.exp(),
        "These do not sum to one yet: use `torch.log_softmax`.": fit + known,
        "`variance` is one number a sample: make it (B, 1).": (spread + known).log_softmax(1),
    }
    return Trial((x_prev, means, variance, prior), right, slips)


@check
def check_chain(draw: Draw) -> Trial:
    """Check chain(last, news): log p(c | x_{t-1}) by sums of eq. 5; (N,), (T, N) -> (T, N)."""
    last, news = -draw.uniform(0.5, 2.0, 3), 0.5 + 0.3 * draw.normal(6, 3)
    right = last + torch.stack([news[k:].sum(0) for k in range(6)])
    slips = {
        "You added up from the other end: x_T is known, begin there.": last + news.cumsum(0),
        "This is the news alone: add what was known of x_T, `last`.": right - last,
        "You left a step's own news out: log p(c | x_{t-1}) includes that of step t.": right - news,
        "The rows are in the wrong order: flip the sum back.": right.flip(0),
        "The news is turned: it is added on the way back from x_T.": last - (right - last),
        "You cut at 0: these estimates may lie above it.": right.clamp(max=0),
        "That is the end of the chain, x_0; the whole way is asked for: `cumsum`.": right[0],
        "These are probabilities: their logarithms are asked for.": right.exp(),
    }
    return Trial((last, news), right, slips)


@check
def check_noise_errors(draw: Draw) -> Trial:
    """Check noise_errors(world, x_0, t, schedule, generator): eq. 6 in eps-space; (N, C)."""
    world, schedule = things()[0], short_schedule()
    x_0, _ = world.sample(5, draw.generator)
    t = torch.full((5,), 40)

    def errors(slip: str = "") -> Tensor:
        """The answer, or a slip that is made of it."""
        again, columns = Draw(draw.seed + 1), []
        eps = again.normal(*x_0.shape)
        for c in range(world.num_classes):
            if c and slip == "own":
                eps = again.normal(*x_0.shape)
            x_t = add_noise(x_0, eps, t, schedule)
            label, late = None if slip == "label" else c, {"t + 1": 1, "t - 1": -1}.get(slip, 0)
            aim = {"x_0": x_0, "x_t": x_t}.get(slip, eps)
            squares = (world.eps(x_t, t + late, schedule, label) - aim).square()
            columns.append(squares.mean(1) if slip == "mean" else squares.sum(1))
        return torch.stack(columns, dim=1)

    slips = {
        "own": "Every class got a noise of its own: draw eps once, or luck decides between them.",
        "x_0": "You compared with x_0; `world.eps` predicts the noise.",
        "x_t": "You compared with x_t; `world.eps` predicts the noise.",
        "t + 1": "Give `world.eps` the same t as `add_noise`: yours is one too late.",
        "t - 1": "Give `world.eps` the same t as `add_noise`: yours is one too early.",
        "label": "The model gets no class: hand the label c to `world.eps(x_t, t, schedule, c)`.",
        "mean": "You averaged over the dimensions: the norm is a sum.",
    }
    wrong = named(errors, slips) | {
        "Eq. 6 has the squared length, not the length.": errors().sqrt(),
        "The classes stand in the rows: samples first, (N, C).": errors().T,
    }
    return Trial((world, x_0, t, schedule, draw.fresh(1)), errors(), wrong)
