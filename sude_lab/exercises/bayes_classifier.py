"""Checks of the exercises to lesson 01: a density, a ratio, a posterior, and a sum over steps."""

from __future__ import annotations

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
from sude_lab.exercises.judging import Trial, check, choice, of_variance
from sude_lab.exercises.worlds import normal, short_schedule, things, uniform


@check
def check_log_density(seed: int) -> Trial:
    """Check log_density(x_prev, mean, variance) against eq. 6 of arXiv 2403.06775, in nats.

    x_prev, mean: (B, C, h); variance: sigma_t^2, (B,). The result is (B,).
    """
    g = torch.Generator().manual_seed(seed)
    x_prev, mean = normal(g, 5, 3, 2), normal(g, 5, 3, 2)
    variance = uniform(g, 0.1, 0.8, 5)
    right = reverse_log_prob(x_prev, mean, variance)
    distance, dims = squared_distance(x_prev, mean), 6

    def log_p(divisor: Tensor, count: float, of: Tensor = variance) -> Tensor:
        return -distance / divisor - count / 2 * (2 * math.pi * of).log()

    slips = {
        "You divided by sigma: `variance` is its square.": log_p(2 * variance.sqrt(), dims),
        "`variance` is sigma^2 already: you squared it once more.": log_p(2 * variance**2, dims),
        "`variance` is sigma^2 already: you squared it once more, in both places.": (
            log_p(2 * variance**2, dims, variance**2)
        ),
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
def check_log_ratio(seed: int) -> Trial:
    """Check log_ratio(x_prev, mean_class, mean_uncond, variance) against eq. 5 and 6, in nats.

    log p(c | x_{t-1}) - log C_t, arXiv 2403.06775; x_prev and means: (B, D), variance: (B,).
    """
    g = torch.Generator().manual_seed(seed)
    x_prev, mean_class, mean_uncond = (normal(g, 4, 5) for _ in range(3))
    variance = uniform(g, 0.1, 0.8, 4)
    right = class_log_ratio(x_prev, mean_class, mean_uncond, variance)
    under_class, under_none = (
        reverse_log_prob(x_prev, x, variance) for x in (mean_class, mean_uncond)
    )
    slips = of_variance(right, variance, "eq. 6") | {
        "The sign is turned: a step near the class's mean makes the class more likely.": -right,
        "The distances are divided by 2 sigma^2: your 2 is missing.": 2 * right,
        "This is the numerator alone: subtract log p(x_{t-1} | x_t).": under_class,
        "This is the denominator alone: eq. 5 has a numerator, too.": under_none,
        "You divided the logarithms: log(a / b) is a difference.": under_class / under_none,
        "You added the logarithms: log(a / b) is a difference.": under_class + under_none,
        "You averaged over the dimensions: the norm of eq. 6 is a sum.": right / 5,
        "This is the numerator's distance alone: eq. 5 has a denominator, too.": (
            -squared_distance(x_prev, mean_class) / (2 * variance)
        ),
        "Take the logarithm: this is the ratio itself.": right.exp(),
    }
    return Trial((x_prev, mean_class, mean_uncond, variance), right, slips)


check_normaliser = choice(
    "c",
    "when the normaliser of eq. 6 does not cancel in eq. 5 of arXiv 2403.06775.",
    {
        "a": "The number of dimensions is large there, and the same above and below the line: "
        "it cancels.",
        "b": "That changes sigma_t from t to t; above and below the line t is the same: it "
        "cancels.",
        "d": "The empty prompt changes the mean, and the normaliser does not know the mean: it "
        "cancels.",
    },
)


@check
def check_log_posterior(seed: int) -> Trial:
    """Check log_posterior(x_prev, means, variance, prior): log p(c_k | x_{t-1}) among K classes.

    arXiv 2403.06775, eq. 5 with eq. 6. x_prev: (B, D), means: (B, K, D), variance: (B,), prior:
    C_t = p(c_k | x_t), (B, K). The result is (B, K), nats; B = K, to tell the axes apart.
    """
    g = torch.Generator().manual_seed(seed)
    x_prev, means = normal(g, 4, 5), normal(g, 4, 4, 5)
    variance = uniform(g, 0.5, 2.0, 4)
    prior = uniform(g, 0.1, 1.0, 4, 4)
    prior = prior / prior.sum(1, keepdim=True)
    right = class_log_posterior(x_prev, means, variance, prior.log())
    fit = -(x_prev[:, None] - means).square().sum(2) / (2 * variance[:, None])
    slips = {
        "You normalised over the batch: the K classes of one sample sum to one, dim=1.": (
            (fit + prior.log()).log_softmax(0)
        ),
        "You added the prior to a logarithm: add its logarithm.": (fit + prior).log_softmax(1),
        "The prior C_t is missing: a rare class needs better evidence.": fit.log_softmax(1),
        "The sign is turned: the nearest mean fits best.": (-fit + prior.log()).log_softmax(1),
        "These are probabilities: their logarithms are asked for.": right.exp(),
        "These do not sum to one yet: use `torch.log_softmax`.": fit + prior.log(),
        "`variance` is one number a sample, not one a class: make it (B, 1).": (
            (fit * variance[:, None] / variance + prior.log()).log_softmax(1)
        ),
    }
    return Trial((x_prev, means, variance, prior), right, slips)


@check
def check_chain(seed: int) -> Trial:
    """Check chain(last, news): log p(c | x_t) for every t from the news of the steps, in nats.

    last: log p(c | x_T), (N,); news: log p(c | x_{t-1}) - log p(c | x_t) for t = 1 ... T, (T, N),
    by arXiv 2403.06775, eq. 5. The result is log p(c | x_{t-1}), (T, N), in the order of `news`.
    """
    g = torch.Generator().manual_seed(seed)
    last, news = -uniform(g, 0.5, 2.0, 3), 0.5 + 0.3 * normal(g, 6, 3)
    rows, value = [], last
    for row in news.flip(0):  # from x_T, where we start, back to x_0
        value = value + row
        rows.append(value)
    right = torch.stack(rows[::-1])
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
def check_noise_errors(seed: int) -> Trial:
    """Check noise_errors(world, x_0, t, schedule, generator): how badly each class predicts noise.

    ||eps - eps_theta(x_t, c, t)||^2, the distance of arXiv 2403.06775, eq. 6, in eps-space, with
    one eps for all classes. x_0: (N, D), t: (N,). The result is (N, C).
    """
    world, schedule = things()[0], short_schedule()
    x_0, _ = world.sample(5, torch.Generator().manual_seed(seed))
    t = torch.full((5,), 40)

    def errors(slip: str = "") -> Tensor:
        """The answer, or a slip that is made of it."""
        g = torch.Generator().manual_seed(seed + 1)
        eps, columns = normal(g, *x_0.shape), []
        for c in range(world.num_classes):
            if c and slip == "own":
                eps = normal(g, *x_0.shape)
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
    wrong = {says: errors(slip) for slip, says in slips.items()} | {
        "Eq. 6 has the squared length, not the length.": errors().sqrt(),
        "The classes stand in the rows: samples first, (N, C).": errors().T,
    }
    arguments = (world, x_0, t, schedule, torch.Generator().manual_seed(seed + 1))
    return Trial(arguments, errors(), wrong)
