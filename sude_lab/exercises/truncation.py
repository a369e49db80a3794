"""Checks of the exercises to lesson 03; equations of arXiv 2403.06775, losses in nats."""

import torch
from torch import Tensor

from sude_lab.exercises.judging import Answer, Draw, Mistake, Trial, ask, check, choice, of_variance
from sude_lab.losses import guidance_projection, hinge_loss, sude_loss, sude_threshold, truncate


@check
def check_threshold(draw: Draw) -> Trial:
    """Check threshold(mean_class, mean_uncond, variance): tau_t of eq. 8; (B, C, h) -> (B,)."""
    mean_class, mean_uncond = draw.normal(4, 3, 2), draw.normal(4, 3, 2)
    variance = draw.uniform(0.1, 0.8, 4)
    right = sude_threshold(mean_class, mean_uncond, variance)
    d = (mean_class - mean_uncond).flatten(1)
    unit = right / d.square().sum(1)
    slips = of_variance(right, variance, "eq. 8") | {
        "The sign is turned: the category's own loss is negative.": -right,
        "The square is divided by 2 sigma^2: your 2 is missing.": 2 * right,
        "Eq. 8 has the squared length, not the length.": unit * d.norm(dim=1),
        "The norm of eq. 8 is a sum: you averaged over the dimensions.": right / 6,
        "You added before you squared: squares first.": unit * d.sum(1).square(),
        "Those are absolute values: it has squares.": unit * d.abs().sum(1),
    }
    return Trial((mean_class, mean_uncond, variance), right, slips)


@check
def check_truncated(draw: Draw) -> list[Trial]:
    """Check truncated(loss, tau): lambda_tau L_sude, eq. 9, (B,); open gates pass a gradient."""
    tau = -torch.tensor([1.5, 1.0, 0.6, 1.2, 0.8, 0.7, 1.8, 1.4]).double()
    tau = tau - 0.1 * draw.uniform(0, 1, 8)
    # open and negative, shut, equal, open below |tau|, ...: every wrong comparison changes a value
    loss = tau - torch.tensor([0.5, -1.0, 0.0, 1.5, -0.6, 2.5, 0.0, -0.3]).double() * tau
    is_open, own, before = loss > tau, "every sample has its own", "before you compared"
    slips = {
        f"You averaged over the batch {before}: {own} gate.": loss * (loss.mean() > tau.mean()),
        f"You averaged the loss: {own} gate.": loss * (loss.mean() > tau),
        f"You averaged tau {before}: {own}.": loss * (loss > tau.mean()),
        "The gate is the wrong way round: it shuts at loss <= tau.": loss * ~is_open,
        "A loss that equals tau is stopped, too: eq. 9 says <=.": loss * (loss >= tau),
        "Compare with tau, not with 0: a negative loss may still be open.": loss * (loss > 0),
        "tau is negative already: you turned its sign.": loss * (loss > -tau),
        "Behind a shut gate eq. 9 gives 0, not tau.": torch.maximum(loss, tau),
        "Eq. 9 has the loss times the gate; you also subtracted tau.": (loss - tau) * is_open,
        "That is the gate, lambda_tau: multiply the loss by it.": is_open,
    }
    lower = -draw.uniform(0.5, 2.0, 8)
    above = lower + draw.uniform(0.2, 3.0, 8)
    gradient = Trial((above, lower), above, {}, learns=("loss",), fixed=("tau",))
    return [Trial((loss, tau), truncate(loss, tau), slips), gradient]


@check
def check_rho(draw: Draw) -> Trial:
    """Check rho(x_sub, mean_class, mean_uncond): <a, d> / ||d||^2, from eq. 7-8; (B,)."""
    x_sub, mean_class, mean_uncond = (draw.normal(4, 3, 2) for _ in range(3))
    a, d = (x_sub - mean_uncond).flatten(1), (mean_class - mean_uncond).flatten(1)
    inner, square, flat = (a * d).sum(1), d.square().sum(1), x_sub.flatten(1)
    cosine = inner / (a.norm(dim=1) * square.sqrt())
    raw = (flat * mean_class.flatten(1)).sum(1) / mean_class.flatten(1).square().sum(1)
    slips = {
        "That is the angle's cosine: divide by ||d||^2 alone.": cosine,
        "Divide by ||d||^2, not by its length: rho is 1 at a = d.": inner / square.sqrt(),
        "Subtract mean_uncond from both first.": raw,
        "Subtract mean_uncond from x_sub, too, as from d.": (flat * d).sum(1) / square,
        "You summed over the whole batch: each has its rho.": inner.sum() / square.sum(),
        "Divided by ||a||^2: the ruler is d.": inner / a.square().sum(1),
        "Not divided yet: rho counts in lengths of d.": inner,
        "a starts at mean_uncond: you measured it from the class.": inner / square - 1,
        "One of your differences is reversed: both start at “no prompt”.": -inner / square,
        "The roles of subject and category are exchanged: the ruler is d.": square / inner,
    }
    right = guidance_projection(x_sub, mean_class, mean_uncond)
    return Trial((x_sub, mean_class, mean_uncond), right, slips)


check_rho_depends = choice(
    "d",
    "what rho, and so the gate of eq. 9, depends on.",
    a="L_sude and tau_t both have 1 / (2 sigma_t^2) : it cannot put one above the other.",
    b="A weighting multiplies L_sude and tau_t alike: how hard a gate pushes, not if it is open.",
    c="The mean is an affine map of eps, x_0 or v: a and d get one factor, which cancels.",
)


@check
def check_hinge(draw: Draw) -> Trial:
    """Check hinge(tau, rho): -2 tau max(0, 1 - rho), lambda (L_sude - tau_t) of eq. 7-9, (B,)."""
    mean_class, mean_uncond = draw.normal(6, 3), draw.normal(6, 3)
    variance = draw.uniform(0.1, 0.8, 6)
    along = torch.tensor([-0.5, 0.2, 0.9, 1.3, 2.0, 0.0])[:, None].double()
    means = (mean_uncond + along * (mean_class - mean_uncond), mean_class, mean_uncond)
    tau, rho = sude_threshold(mean_class, mean_uncond, variance), guidance_projection(*means)
    loss, right = sude_loss(*means, variance), hinge_loss(*means, variance)
    room = (1 - rho).clamp(min=0)
    slips = {
        "Half as steep: tau has *2* sigma^2 below, the hinge has sigma^2.": right / 2,
        "Without max(0, ...) it goes on falling behind the gate: not truncated.": loss - tau,
        "You cut off the wrong side: it works below 1.": -2 * tau * (rho - 1).clamp(min=0),
        "The sign is turned: tau is negative, the hinge is not.": -right,
        "You squared it: the hinge is straight.": -2 * tau * room**2,
        "The gate alone is not enough: (1 - rho) says how far it is.": -2 * tau * (rho < 1),
        "tau is lost: it says how steep the hinge is.": room,
        "That is lambda L_sude of eq. 9; the hinge is lambda (L_sude - tau).": truncate(loss, tau),
        "That is L_sude itself: subtract tau, and cut off at 0.": loss,
    }
    return Trial((tau, rho), right, slips)


@check
def check_settle(draw: Draw) -> list[Trial]:
    """Check settle(eps_target, eps_class, eps_uncond, weight_sude): where descent ends, (B, D).

    eps_target + min(w_s, max(0, 1 - rho)) d, from eq. 3 and 7-10 in eps-space with the weighting
    `simple`. Right within 0.1 ||d||: descent may tremble at the gate.
    """
    return [_settled(weight, Draw(draw.seed)) for weight in (0.8, 0.3)]


def _settled(weight: float, draw: Draw) -> Trial:
    uncond, d = draw.normal(6, 5), draw.normal(6, 5)
    d = draw.uniform(1.8, 2.2, 6, 1) * d / d.norm(dim=1, keepdim=True)
    square = d.square().sum(1)

    across, start = draw.normal(6, 5), torch.tensor([-0.9, 0.1, 0.7, 1.4, 0.3, 2.0]).double()

    def along(moved: Tensor) -> Tensor:
        return (moved * d).sum(1) / square

    target = uncond + across + (start - along(across))[:, None] * d
    room, mean_rho = (1 - start).clamp(min=0), (start * square).sum() / square.sum()
    always, together = torch.full_like(start, weight), (1 - mean_rho).clamp(0, weight) + 0 * start

    def end(furthest: float) -> Tensor:
        return room.clamp(max=furthest)

    slips = {
        "It never stops: look at the gate of eq. 9 in every step, it shuts.": always,
        "The gates were set before the first step and never looked at again.": weight * (start < 1),
        "You averaged over the batch before you compared: each sample has its gate.": together,
        "SuDe does nothing here: is w_s lost, or does a gate never open?": 0 * start,
        "For w_s = 0.8 alone: your number stands where w_s should.": end(0.8),
        "w_s is not used: it weighs SuDe's push against the picture's.": end(1.0),
        "w_s counts twice: is there a 2 too many, or one missing at L_sub?": end(2 * weight),
        "w_s counts half: is there a 2 too many at L_sub, or one missing?": end(weight / 2),
        "The gate is the wrong way round: it shuts at loss <= tau.": weight * (start >= 1),
        "Every sample went all the way to rho = 1: L_sub holds it back, w_s is finite.": room,
        "Samples past their category were pulled back.": (1 - start).clamp(max=weight),
        "The push goes the wrong way: descend.": -weight * (start < 1),
    }

    def moved_along_d(answer: Answer) -> Tensor:
        given = torch.as_tensor(ask(answer, target, uncond + d, uncond, weight)).detach().double()
        if given.shape != target.shape:
            raise Mistake(f"The end of every sample is asked for, {tuple(target.shape)}.")
        if not bool((given.abs() <= 1e4).all()):
            raise Mistake("It runs away: descend, s - learning rate x gradient, in steps of 0.02.")
        moved = given - target
        sideways = moved - along(moved)[:, None] * d
        if bool((sideways.norm(dim=1) > 0.1 * d.norm(dim=1)).any()):
            raise Mistake("Some samples moved across d: L_sude pushes along each sample's own d.")
        return along(moved)

    hint = "That is how far a sample moved, in d: more steps, or a smaller learning rate?"
    return Trial(moved_along_d, end(weight), slips, tolerance=0.1, hint=hint)
