"""Checks of the exercises to lesson 03: threshold, gate, rho, hinge, and a descent that stops."""

from __future__ import annotations

import torch
from torch import Tensor

from sude_lab.exercises.judging import Answer, Mistake, ask, choose, judge
from sude_lab.exercises.worlds import normal, uniform
from sude_lab.losses import (
    guidance_projection,
    hinge_loss,
    sude_loss,
    sude_threshold,
    truncate,
)


def check_threshold(answer: Answer, *, seed: int = 0) -> None:
    """Check threshold(mean_class, mean_uncond, variance): tau_t of arXiv 2403.06775, eq. 8.

    means: (B, C, h); variance: sigma_t^2, (B,). The result is (B,), nats.

    Raises:
        Mistake: the answer is wrong.
    """
    g = torch.Generator().manual_seed(seed)
    mean_class, mean_uncond = normal(g, 4, 3, 2), normal(g, 4, 3, 2)
    variance = uniform(g, 0.1, 0.8, 4)
    right = sude_threshold(mean_class, mean_uncond, variance)
    judge(
        ask(answer, mean_class, mean_uncond, variance),
        right,
        {
            "The sign is turned: the category is more its category than “no prompt” is, so the "
            "loss it has is negative.": -right,
            "The square is divided by 2 sigma^2: your 2 is missing.": 2 * right,
            "You divided by sigma; eq. 8 has its square, and `variance` is that square.": (
                right * variance.sqrt()
            ),
            "Eq. 8 has the squared length, not the length.": (
                -(mean_class - mean_uncond).flatten(1).norm(dim=1) / (2 * variance)
            ),
            "You averaged over the dimensions: the norm of eq. 8 is a sum.": right / 6,
        },
    )


def check_truncated(answer: Answer, *, seed: int = 0) -> None:
    """Check truncated(loss, tau): lambda_tau L_sude of arXiv 2403.06775, eq. 9; (B,), nats.

    Raises:
        Mistake: the answer is wrong.
    """
    g = torch.Generator().manual_seed(seed)
    tau = -uniform(g, 0.5, 2.0, 8)
    above = torch.tensor([1.0, -1.0, 0.0, 1.0, -1.0, 1.0, 0.0, -1.0]).double()
    loss = tau + above * uniform(g, 0.2, 3.0, 8)
    right = truncate(loss, tau)
    judge(
        ask(answer, loss, tau),
        right,
        {
            "You averaged over the batch before you compared: every sample has its own gate.": (
                loss * (loss.mean() > tau.mean())
            ),
            "You averaged the loss before you compared: every sample has its own gate.": (
                loss * (loss.mean() > tau)
            ),
            "The gate is the wrong way round: it shuts when the loss is at or below tau.": (
                torch.where(loss <= tau, loss, torch.zeros_like(loss))
            ),
            "A loss that equals tau is stopped, too: eq. 9 says <=.": (
                torch.where(loss >= tau, loss, torch.zeros_like(loss))
            ),
            "Behind a shut gate eq. 9 gives 0, not tau.": torch.maximum(loss, tau),
            "Eq. 9 multiplies the loss itself by the gate; you also subtracted tau, which makes "
            "the hinge of a later task.": (loss - tau) * (loss > tau),
            "That is the gate, lambda_tau: multiply the loss by it.": (loss > tau).double(),
        },
    )


def check_rho(answer: Answer, *, seed: int = 0) -> None:
    """Check rho(x_sub, mean_class, mean_uncond): <a, d> / ||d||^2 of each sample, (B,), no unit.

    a = x_sub - mean_uncond, d = mean_class - mean_uncond; derived from arXiv 2403.06775, eq. 7-8:
    eq. 9 shuts its gate where rho >= 1. x_sub and means: (B, C, h).

    Raises:
        Mistake: the answer is wrong.
    """
    g = torch.Generator().manual_seed(seed)
    x_sub, mean_class, mean_uncond = (normal(g, 4, 3, 2) for _ in range(3))
    a, d = (x_sub - mean_uncond).flatten(1), (mean_class - mean_uncond).flatten(1)
    inner, square = (a * d).sum(1), d.square().sum(1)
    raw = (x_sub.flatten(1) * mean_class.flatten(1)).sum(1)
    judge(
        ask(answer, x_sub, mean_class, mean_uncond),
        guidance_projection(x_sub, mean_class, mean_uncond),
        {
            "That is the angle's cosine, which forgets how long a is: divide by ||d||^2 alone.": (
                inner / (a.norm(dim=1) * d.norm(dim=1))
            ),
            "Divide by the square of d's length, not by its length: rho is 1 where a = d.": (
                inner / square.sqrt()
            ),
            "Subtract mean_uncond from both first: a and d start at “no prompt”.": (
                raw / mean_class.flatten(1).square().sum(1)
            ),
            "Subtract mean_uncond from x_sub, too: a starts at “no prompt”, as d does.": (
                (x_sub.flatten(1) * d).sum(1) / square
            ),
            "You summed over the whole batch: every sample has its own rho.": inner.sum()
            / square.sum(),
            "Divided by ||a||^2: the ruler is d.": inner / a.square().sum(1),
            "Not divided yet: rho counts in lengths of d.": inner,
        },
    )


def check_rho_depends(letter: str) -> None:
    """Check what rho, and so the gate of arXiv 2403.06775, eq. 9, depends on.

    Raises:
        Mistake: the letter is wrong.
    """
    choose(
        letter,
        "d",
        {
            "a": "L_sude and tau_t both have 1 / (2 sigma_t^2) in front: whether one is above the "
            "other does not change with it.",
            "b": "A weighting multiplies L_sude and tau_t alike: it says how hard an open gate "
            "pushes, not which gates are open.",
            "c": "At a fixed x_t the mean is an affine map of eps, of x_0 and of v: a and d are "
            "multiplied by the same number, which cancels in <a, d> / ||d||^2.",
        },
    )


def check_hinge(answer: Answer, *, seed: int = 0) -> None:
    """Check hinge(tau, rho): (||d||^2 / sigma_t^2) max(0, 1 - rho) = -2 tau max(0, 1 - rho).

    Derived from arXiv 2403.06775, eq. 7-9: where the gate is open it is L_sude - tau_t, and where
    it is shut 0. tau, rho: (B,). The result is (B,), nats.

    Raises:
        Mistake: the answer is wrong.
    """
    g = torch.Generator().manual_seed(seed)
    mean_class, mean_uncond = normal(g, 6, 3), normal(g, 6, 3)
    variance = uniform(g, 0.1, 0.8, 6)
    along = torch.tensor([-0.5, 0.2, 0.9, 1.3, 2.0, 0.0])[:, None].double()
    x_sub = mean_uncond + along * (mean_class - mean_uncond)
    tau = sude_threshold(mean_class, mean_uncond, variance)
    rho = guidance_projection(x_sub, mean_class, mean_uncond)
    loss = sude_loss(x_sub, mean_class, mean_uncond, variance)
    right = hinge_loss(x_sub, mean_class, mean_uncond, variance)
    judge(
        ask(answer, tau, rho),
        right,
        {
            "Half as steep: tau is minus ||d||^2 over *2* sigma^2, and the hinge has ||d||^2 over "
            "sigma^2.": right / 2,
            "Without max(0, ...) it goes on falling behind the gate: that is the loss without "
            "truncation.": loss - tau,
            "The wrong side is cut off: the hinge works below rho = 1.": (
                -2 * tau * (rho - 1).clamp(min=0)
            ),
            "The sign is turned: tau is negative, the hinge is not.": -right,
            "That is lambda L_sude of eq. 9, which jumps where the gate shuts: the hinge is "
            "lambda (L_sude - tau).": truncate(loss, tau),
            "That is L_sude itself: subtract tau, and cut off at 0.": loss,
        },
    )


def check_settle(answer: Answer, *, seed: int = 0) -> None:
    """Check settle(eps_target, eps_class, eps_uncond, weight_sude): where gradient descent ends.

    The minimum of ||s - eps_target||^2 + w_s lambda_tau L_sude over s, per sample, with L_sude =
    ||s - eps_class||^2 - ||s - eps_uncond||^2: arXiv 2403.06775, eq. 3 and 7-10 in eps-space with
    the `simple` weighting. It lies at eps_target + min(w_s, max(0, 1 - rho)) d, rho that of
    eps_target. All (B, D). Right within 0.1 of the length of d, because descent may tremble at the
    gate.

    Raises:
        Mistake: the answer is wrong.
    """
    g = torch.Generator().manual_seed(seed)
    uncond, d = normal(g, 6, 5), normal(g, 6, 5)
    across = normal(g, 6, 5)
    across = across - (across * d).sum(1, keepdim=True) / d.square().sum(1, keepdim=True) * d
    start = torch.tensor([-0.6, 0.1, 0.7, 1.4, 0.3, 2.0])[:, None].double()
    target, weight = uncond + start * d + across, 0.8

    def moved(by: Tensor) -> Tensor:
        return target + by * d

    room = (1 - start).clamp(min=0)
    slips = {
        "It never stops: look at the gate of eq. 9 again in every step, it shuts on the way.": (
            moved(torch.full_like(start, weight))
        ),
        "The gates were set before the first step and never looked at again: a sample that was "
        "open at the start runs past its category.": moved(weight * (start < 1)),
        "SuDe does nothing here: is w_s lost, or does a gate never open?": target,
        "The gate is the wrong way round: it shuts when the loss is at or below tau.": (
            moved(weight * (start >= 1))
        ),
        "Every sample went all the way to rho = 1: L_sub holds it back, w_s is finite.": moved(
            room
        ),
        "Samples that were past their category were pulled back: a shut gate does nothing.": (
            moved((1 - start).clamp(max=weight))
        ),
        "The push goes the wrong way: descend, s - learning rate x gradient.": (
            moved(-weight * (start < 1))
        ),
    }
    given = torch.as_tensor(ask(answer, target, uncond + d, uncond, weight)).detach().double()
    if given.shape != target.shape:
        raise Mistake(f"The end of every sample is asked for, {tuple(target.shape)}.")

    def near(end: Tensor) -> bool:
        return bool(((given - end).norm(dim=1) <= 0.1 * d.norm(dim=1)).all())

    if near(moved(room.clamp(max=weight))):
        return
    for says, end in slips.items():
        if near(end):
            raise Mistake(says)
    sideways = given - target
    sideways = sideways - (sideways * d).sum(1, keepdim=True) / d.square().sum(1, keepdim=True) * d
    if bool((sideways.norm(dim=1) > 0.1 * d.norm(dim=1)).any()):
        raise Mistake(
            "Some samples moved across d, where neither loss pushes: L_sub holds s at eps_target, "
            "L_sude pushes along d, and each sample has its own."
        )
    steps = ((given - target) * d).sum(1) / d.square().sum(1)
    right = room.clamp(max=weight)[:, 0]
    worst = int((steps - right).abs().argmax())
    raise Mistake(
        f"Sample {worst} starts at rho = {start[worst, 0]:.1f} and moved by {steps[worst]:.2f} d, "
        f"but the minimum lies {right[worst]:.2f} d away: more steps, or a smaller learning rate?"
    )
