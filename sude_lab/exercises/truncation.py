"""Checks of the exercises to lesson 03: threshold, gate, rho, hinge, and a descent that stops."""

from __future__ import annotations

import torch
from torch import Tensor

from sude_lab.exercises.judging import (
    Answer,
    Mistake,
    Trial,
    ask,
    check,
    choice,
    judge_gradients,
    of_norm,
    of_variance,
    twice,
)
from sude_lab.exercises.worlds import normal, uniform
from sude_lab.losses import guidance_projection, hinge_loss, sude_loss, sude_threshold, truncate


@check
def check_threshold(seed: int) -> Trial:
    """Check threshold(mean_class, mean_uncond, variance): tau_t of arXiv 2403.06775, eq. 8.

    means: (B, C, h); variance: sigma_t^2, (B,). The result is (B,), nats.
    """
    g = torch.Generator().manual_seed(seed)
    mean_class, mean_uncond = normal(g, 4, 3, 2), normal(g, 4, 3, 2)
    variance = uniform(g, 0.1, 0.8, 4)
    right = sude_threshold(mean_class, mean_uncond, variance)
    difference = mean_class - mean_uncond
    slips = of_variance(right, variance, "eq. 8") | of_norm(right, difference, "eq. 8")
    slips |= {
        "The sign is turned: the category is more its category than “no prompt” is, so the loss it "
        "has is negative.": -right,
        "The square is divided by 2 sigma^2: your 2 is missing.": 2 * right,
    }
    return Trial((mean_class, mean_uncond, variance), right, slips)


def check_truncated(answer: Answer, *, seed: int = 0) -> None:
    """Check truncated(loss, tau): lambda_tau L_sude of arXiv 2403.06775, eq. 9; (B,), nats.

    Values, and that an open gate lets the gradient of the loss through.
    """
    _check_truncated(answer, seed=seed)
    g = torch.Generator().manual_seed(seed)
    tau = -uniform(g, 0.5, 2.0, 8)
    judge_gradients(answer, {"loss": tau + uniform(g, 0.2, 3.0, 8)}, {"tau": tau})


@check
def _check_truncated(seed: int) -> Trial:
    g = torch.Generator().manual_seed(seed)
    tau = -torch.tensor([1.5, 1.0, 0.6, 1.2, 0.8, 0.7, 1.8, 1.4]).double()
    tau = tau - 0.1 * uniform(g, 0, 1, 8)
    # open and negative, shut, equal, open below |tau|, ...: every wrong comparison changes a value
    loss = tau - torch.tensor([0.5, -1.0, 0.0, 1.5, -0.6, 2.5, 0.0, -0.3]).double() * tau
    is_open = loss > tau
    slips = {
        "You averaged over the batch before you compared: every sample has its own gate.": (
            loss * (loss.mean() > tau.mean())
        ),
        "You averaged the loss: every sample has its own gate.": loss * (loss.mean() > tau),
        "You averaged tau before you compared: every sample has its own.": loss
        * (loss > tau.mean()),
        "The gate is the wrong way round: it shuts at loss <= tau.": loss * ~is_open,
        "A loss that equals tau is stopped, too: eq. 9 says <=.": loss * (loss >= tau),
        "Compare with tau, not with 0: a negative loss may still be open.": loss * (loss > 0),
        "tau is negative already: you turned its sign.": loss * (loss > -tau),
        "Behind a shut gate eq. 9 gives 0, not tau.": torch.maximum(loss, tau),
        "Eq. 9 multiplies the loss itself by the gate; you also subtracted tau, which makes the "
        "hinge of a later task.": (loss - tau) * is_open,
        "That is the gate, lambda_tau: multiply the loss by it.": is_open.double(),
    }
    return Trial((loss, tau), truncate(loss, tau), slips)


@check
def check_rho(seed: int) -> Trial:
    """Check rho(x_sub, mean_class, mean_uncond): <a, d> / ||d||^2 of each sample, (B,), no unit.

    a = x_sub - mean_uncond, d = mean_class - mean_uncond; derived from arXiv 2403.06775, eq. 7-8:
    eq. 9 shuts its gate where rho >= 1. x_sub and means: (B, C, h).
    """
    g = torch.Generator().manual_seed(seed)
    x_sub, mean_class, mean_uncond = (normal(g, 4, 3, 2) for _ in range(3))
    a, d = (x_sub - mean_uncond).flatten(1), (mean_class - mean_uncond).flatten(1)
    inner, square = (a * d).sum(1), d.square().sum(1)
    raw = (x_sub.flatten(1) * mean_class.flatten(1)).sum(1)
    slips = {
        "That is the angle's cosine, which forgets how long a is: divide by ||d||^2 alone.": (
            inner / (a.norm(dim=1) * d.norm(dim=1))
        ),
        "Divide by ||d||^2, not by its length: rho is 1 at a = d.": inner / square.sqrt(),
        "Subtract mean_uncond from both first.": raw / mean_class.flatten(1).square().sum(1),
        "Subtract mean_uncond from x_sub, too, as from d.": (x_sub.flatten(1) * d).sum(1) / square,
        "You summed over the whole batch: each has its rho.": inner.sum() / square.sum(),
        "Divided by ||a||^2: the ruler is d.": inner / a.square().sum(1),
        "Not divided yet: rho counts in lengths of d.": inner,
        "a starts at mean_uncond: you measured it from the class.": inner / square - 1,
        "One of your differences is reversed: both start at “no prompt”.": -inner / square,
        "The roles of subject and category are exchanged: the ruler is d.": square / inner,
    }
    return Trial(
        (x_sub, mean_class, mean_uncond), guidance_projection(x_sub, mean_class, mean_uncond), slips
    )


check_rho_depends = choice(
    "d",
    "what rho, and so the gate of arXiv 2403.06775, eq. 9, depends on.",
    {
        "a": "L_sude and tau_t both have 1 / (2 sigma_t^2) in front: whether one is above the "
        "other does not change with it.",
        "b": "A weighting multiplies L_sude and tau_t alike: it says how hard an open gate "
        "pushes, not which gates are open.",
        "c": "At a fixed x_t the mean is an affine map of eps, of x_0 and of v: a and d are "
        "multiplied by the same number, which cancels in <a, d> / ||d||^2.",
    },
)


@check
def check_hinge(seed: int) -> Trial:
    """Check hinge(tau, rho): (||d||^2 / sigma_t^2) max(0, 1 - rho) = -2 tau max(0, 1 - rho).

    Derived from arXiv 2403.06775, eq. 7-9: where the gate is open it is L_sude - tau_t, and where
    it is shut 0. tau, rho: (B,). The result is (B,), nats.
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
    slips = {
        "Half as steep: tau is minus ||d||^2 over *2* sigma^2, and the hinge has ||d||^2 over "
        "sigma^2.": right / 2,
        "Without max(0, ...) it goes on falling behind the gate: that is the loss without "
        "truncation.": loss - tau,
        "You cut off the wrong side: it works below 1.": -2 * tau * (rho - 1).clamp(min=0),
        "The sign is turned: tau is negative, the hinge is not.": -right,
        "You squared it: the hinge is straight.": -2 * tau * (1 - rho).clamp(min=0) ** 2,
        "The gate alone is not enough: (1 - rho) says how far it is.": -2 * tau * (rho < 1),
        "tau is lost: it says how steep the hinge is.": (1 - rho).clamp(min=0),
        "That is lambda L_sude of eq. 9, which jumps where the gate shuts: the hinge is lambda "
        "(L_sude - tau).": truncate(loss, tau),
        "That is L_sude itself: subtract tau, and cut off at 0.": loss,
    }
    return Trial((tau, rho), right, slips)


@twice
def check_settle(answer: Answer, *, seed: int = 0) -> None:
    """Check settle(eps_target, eps_class, eps_uncond, weight_sude): where gradient descent ends.

    The minimum of ||s - eps_target||^2 + w_s lambda_tau L_sude over s, per sample, with L_sude =
    ||s - eps_class||^2 - ||s - eps_uncond||^2: arXiv 2403.06775, eq. 3 and 7-10 in eps-space with
    the `simple` weighting. It lies at eps_target + min(w_s, max(0, 1 - rho)) d, rho that of
    eps_target. All (B, D). Right within 0.1 of the length of d, because descent may tremble at the
    gate.
    """
    for weight in (0.8, 0.3):
        _check_settle(answer, weight, seed)


def _check_settle(answer: Answer, weight: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    uncond, d = normal(g, 6, 5), normal(g, 6, 5)
    d = uniform(g, 1.8, 2.2, 6, 1) * d / d.norm(dim=1, keepdim=True)
    across = normal(g, 6, 5)
    across = across - (across * d).sum(1, keepdim=True) / d.square().sum(1, keepdim=True) * d
    start = torch.tensor([-0.9, 0.1, 0.7, 1.4, 0.3, 2.0])[:, None].double()
    target, room = uncond + start * d + across, (1 - start).clamp(min=0)
    mean_rho = (start[:, 0] * d.square().sum(1)).sum() / d.square().sum()
    slips = {
        "It never stops: look at the gate of eq. 9 again in every step, it shuts on the way.": (
            torch.full_like(start, weight)
        ),
        "The gates were set before the first step and never looked at again: a sample that was "
        "open at the start runs past its category.": weight * (start < 1),
        "You averaged over the batch before you compared: every sample has its own gate.": (
            (1 - mean_rho).clamp(min=0, max=weight) + 0 * start
        ),
        "SuDe does nothing here: is w_s lost, or does a gate never open?": 0 * start,
        "For w_s = 0.8 alone: your number stands where w_s should.": room.clamp(max=0.8),
        "w_s is not used: it weighs SuDe's push against the picture's.": room.clamp(max=1.0),
        "w_s counts twice: is there a 2 too many, or one missing at L_sub?": room.clamp(
            max=2 * weight
        ),
        "w_s counts half: is there a 2 too many at L_sub, or one missing?": room.clamp(
            max=weight / 2
        ),
        "The gate is the wrong way round: it shuts at loss <= tau.": weight * (start >= 1),
        "Every sample went all the way to rho = 1: L_sub holds it back, w_s is finite.": room,
        "Samples past their category were pulled back.": (1 - start).clamp(max=weight),
        "The push goes the wrong way: descend, s - learning rate x gradient.": -weight
        * (start < 1),
    }
    given = torch.as_tensor(ask(answer, target, uncond + d, uncond, weight)).detach().double()
    if given.shape != target.shape:
        raise Mistake(f"The end of every sample is asked for, {tuple(target.shape)}.")

    if not bool(given.isfinite().all()) or bool((given.abs() > 1e4).any()):
        raise Mistake("It runs away: descend, s - learning rate x gradient, in steps of 0.02.")

    def near(by: Tensor) -> bool:
        return bool(((given - target - by * d).norm(dim=1) <= 0.1 * d.norm(dim=1)).all())

    if near(room.clamp(max=weight)):
        return
    for says, by in slips.items():
        if near(by):
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
