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
from sude_lab.exercises.judging import Answer, ask, choose, judge
from sude_lab.exercises.worlds import normal, short_schedule, things, uniform


def check_log_density(answer: Answer, *, seed: int = 0) -> None:
    """Check log_density(x_prev, mean, variance) against eq. 6 of arXiv 2403.06775, in nats.

    x_prev, mean: (B, C, h); variance: sigma_t^2, (B,). The result is (B,).

    Raises:
        Mistake: the answer is wrong.
    """
    g = torch.Generator().manual_seed(seed)
    x_prev, mean = normal(g, 4, 3, 2), normal(g, 4, 3, 2)
    variance = uniform(g, 0.1, 0.8, 4)
    distance, dims = squared_distance(x_prev, mean), 6

    def log_p(divisor: Tensor, count: float, of: Tensor = variance) -> Tensor:
        return -distance / divisor - count / 2 * (2 * math.pi * of).log()

    judge(
        ask(answer, x_prev, mean, variance),
        reverse_log_prob(x_prev, mean, variance),
        {
            "You divided by sigma; eq. 6 has its square, and `variance` is that square.": (
                log_p(2 * variance.sqrt(), dims)
            ),
            "`variance` is sigma^2 already: you squared it once more.": (
                log_p(2 * variance**2, dims)
            ),
            "`variance` is sigma^2 already: you squared it once more, in both places.": (
                log_p(2 * variance**2, dims, variance**2)
            ),
            "The distance is divided by 2 sigma^2: your 2 is missing.": log_p(variance, dims),
            "The normaliser counts once for each of the D dimensions, and you took it once.": (
                log_p(2 * variance, 1)
            ),
            "The normaliser is missing: this is the distance term alone.": (log_p(2 * variance, 0)),
            "In the normaliser stands log(2 pi sigma^2) with its half: -D/2, not -D.": (
                log_p(2 * variance, 2 * dims)
            ),
            "You averaged over the dimensions: the norm of eq. 6 is a sum.": (
                reverse_log_prob(x_prev, mean, variance) / dims
            ),
            "You averaged the squares: the norm of eq. 6 is a sum over the dimensions.": (
                log_p(2 * variance * dims, dims)
            ),
        },
    )


def check_log_ratio(answer: Answer, *, seed: int = 0) -> None:
    """Check log_ratio(x_prev, mean_class, mean_uncond, variance) against eq. 5 and 6, in nats.

    log p(c | x_{t-1}) - log C_t, arXiv 2403.06775; x_prev and means: (B, D), variance: (B,).

    Raises:
        Mistake: the answer is wrong.
    """
    g = torch.Generator().manual_seed(seed)
    x_prev, mean_class, mean_uncond = (normal(g, 4, 5) for _ in range(3))
    variance = uniform(g, 0.1, 0.8, 4)
    right = class_log_ratio(x_prev, mean_class, mean_uncond, variance)
    judge(
        ask(answer, x_prev, mean_class, mean_uncond, variance),
        right,
        {
            "The sign is turned: a step near the class's mean makes the class more likely.": -right,
            "You divided by sigma; eq. 6 has its square, and `variance` is that square.": (
                right * variance.sqrt()
            ),
            "The distances are divided by 2 sigma^2: your 2 is missing.": 2 * right,
            "This is the numerator alone: eq. 5 divides by p(x_{t-1} | x_t): subtract its log.": (
                reverse_log_prob(x_prev, mean_class, variance)
            ),
            "This is the numerator's distance alone: eq. 5 has a denominator, too.": (
                -squared_distance(x_prev, mean_class) / (2 * variance)
            ),
            "Take the logarithm: this is the ratio itself.": right.exp(),
        },
    )


def check_normaliser(letter: str) -> None:
    """Check when the normaliser of eq. 6 does not cancel in eq. 5 of arXiv 2403.06775.

    Raises:
        Mistake: the letter is wrong.
    """
    choose(
        letter,
        "c",
        {
            "a": "The number of dimensions is large there, and the same above and below the line: "
            "it cancels.",
            "b": "That changes sigma_t from t to t; above and below the line t is the same: it "
            "cancels.",
            "d": "The empty prompt changes the mean, and the normaliser does not know the mean: it "
            "cancels.",
        },
    )


def check_log_posterior(answer: Answer, *, seed: int = 0) -> None:
    """Check log_posterior(x_prev, means, variance, prior): log p(c_k | x_{t-1}) among K classes.

    arXiv 2403.06775, eq. 5 with eq. 6. x_prev: (B, D), means: (B, K, D), variance: (B,), prior:
    C_t = p(c_k | x_t), (B, K). The result is (B, K), nats; B = K, to tell the axes apart.

    Raises:
        Mistake: the answer is wrong.
    """
    g = torch.Generator().manual_seed(seed)
    x_prev, means = normal(g, 4, 5), normal(g, 4, 4, 5)
    variance = uniform(g, 0.5, 2.0, 4)
    prior = uniform(g, 0.1, 1.0, 4, 4)
    prior = prior / prior.sum(1, keepdim=True)
    right = class_log_posterior(x_prev, means, variance, prior.log())
    fit = -(x_prev[:, None] - means).square().sum(2) / (2 * variance[:, None])
    judge(
        ask(answer, x_prev, means, variance, prior),
        right,
        {
            "You normalised over the batch: the K classes of one sample sum to one, dim=1.": (
                (fit + prior.log()).log_softmax(0)
            ),
            "You added the prior to a logarithm: add its logarithm.": (fit + prior).log_softmax(1),
            "The prior C_t is missing: a rare class needs better evidence.": fit.log_softmax(1),
            "The sign is turned: the class with the nearest mean fits best.": (
                (-fit + prior.log()).log_softmax(1)
            ),
            "These are probabilities: their logarithms are asked for.": right.exp(),
            "These do not sum to one yet: `torch.log_softmax` divides by the classes' sum.": (
                fit + prior.log()
            ),
            "`variance` is one number a sample, not one a class: make it (B, 1).": (
                (-(x_prev[:, None] - means).square().sum(2) / (2 * variance) + prior.log())
                .log_softmax(1)
            ),
        },
    )  # fmt: skip


def check_chain(answer: Answer, *, seed: int = 0) -> None:
    """Check chain(last, news): log p(c | x_t) for every t from the news of the steps, in nats.

    last: log p(c | x_T), (N,); news: log p(c | x_{t-1}) - log p(c | x_t) for t = 1 ... T, (T, N),
    by arXiv 2403.06775, eq. 5. The result is log p(c | x_{t-1}), (T, N), in the order of `news`.

    Raises:
        Mistake: the answer is wrong.
    """
    g = torch.Generator().manual_seed(seed)
    last, news = -uniform(g, 0.5, 2.0, 3), 0.3 * normal(g, 6, 3)
    rows, value = [], last
    for row in news.flip(0):  # from x_T, where we start, back to x_0
        value = value + row
        rows.append(value)
    right = torch.stack(rows[::-1])
    judge(
        ask(answer, last, news),
        right,
        {
            "You added up from the other end: we know x_T, so the sum begins with the last row.": (
                last + news.cumsum(0)
            ),
            "This is the news alone: add what was known of x_T, `last`.": right - last,
            "You left a step's own news out: log p(c | x_{t-1}) includes that of step t.": (
                right - news
            ),
            "The rows are in the wrong order: flip the sum back, row t belongs to step t.": (
                right.flip(0)
            ),
            "That is the end of the chain, x_0; the whole way is asked for: `cumsum`.": right[0],
            "These are probabilities: their logarithms are asked for.": right.exp(),
        },
    )


def check_noise_errors(answer: Answer, *, seed: int = 0) -> None:
    """Check noise_errors(world, x_0, t, schedule, generator): how badly each class predicts noise.

    ||eps - eps_theta(x_t, c, t)||^2, the distance of arXiv 2403.06775, eq. 6, in eps-space, with
    one eps for all classes. x_0: (N, D), t: (N,). The result is (N, C).

    Raises:
        Mistake: the answer is wrong.
    """
    world, schedule = things()[0], short_schedule()
    x_0, _ = world.sample(5, torch.Generator().manual_seed(seed))
    t = torch.full((5,), 40)

    def errors(
        *,
        shared: bool = True,
        told: bool = True,
        of_noise: bool = True,
        summed: bool = True,
    ) -> Tensor:
        """The answer, and by its switches the slips that are made of it."""
        g = torch.Generator().manual_seed(seed + 1)
        eps = normal(g, *x_0.shape)
        columns = []
        for c in range(world.num_classes):
            if c and not shared:
                eps = normal(g, *x_0.shape)
            guess = world.eps(add_noise(x_0, eps, t, schedule), t, schedule, c if told else None)
            squares = (guess - (eps if of_noise else x_0)).square()
            columns.append(squares.sum(1) if summed else squares.mean(1))
        return torch.stack(columns, dim=1)

    right = errors()
    given = ask(answer, world, x_0, t, schedule, torch.Generator().manual_seed(seed + 1))
    judge(
        given,
        right,
        {
            "Every class got a noise of its own: draw eps once, or luck decides between them.": (
                errors(shared=False)
            ),
            "You compared with x_0; `world.eps` predicts the noise.": errors(of_noise=False),
            "The classes are not told: hand the label c to `world.eps(x_t, t, schedule, c)`.": (
                errors(told=False)
            ),
            "You averaged over the dimensions: the norm is a sum.": errors(summed=False),
            "The classes stand in the rows: samples first, (N, C).": right.T,
        },
    )
