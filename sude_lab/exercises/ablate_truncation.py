"""Checks of the exercises to lesson 06; equations are those of arXiv 2403.06775."""

import math
from typing import Any

import torch
from torch import Tensor

from sude_lab.exercises.judging import Answer, Draw, Trial, ask, check, choice, named
from sude_lab.losses import sude_loss

LEARNING_RATE = 0.05


@check
def check_loss_along(draw: Draw) -> Trial:
    """Check loss_along(a, d, s): eq. 7 at a + s d, ||d||^2 - 2 <a, d> - 2 s ||d||^2; (B,)."""
    a, d, s = draw.normal(4, 5), draw.normal(4, 5), draw.uniform(1.0, 20.0, 4)
    half, square = torch.full((4,), 0.5).double(), d.square().sum(1)
    start = square - 2 * (a * d).sum(1)
    right = sude_loss(a + s[:, None] * d, d, torch.zeros_like(d), half)
    slips = {
        "The slope is -2 ||d||^2: your 2 is missing.": start - s * square,
        "It falls as s grows: the sign of the slope is turned.": start + 2 * s * square,
        "The slope has the squared length of d, not its length.": start - 2 * s * square.sqrt(),
        "At s = 0 it is ||d||^2 - 2 <a, d>; your ||d||^2 is missing.": right - square,
        "The two squares of s cancel: it is a line.": right + s**2 * square,
        "That is the value at s = 0.": start,
    }
    return Trial((a, d, s), right, slips)


@check
def check_shifted(draw: Draw) -> Trial:
    """Check shifted(tau, r): (2 r - 1) tau_t, which shuts a gate at rho = r, from eq. 7-9; (B,)."""
    tau, r = -draw.uniform(0.5, 2.0, 4), float(draw.uniform(0.6, 0.9))
    slips = {
        "Not r tau: at rho = 0 the loss is -tau, not 0. Where is L_sude at rho = r?": r * tau,
        "The sign is turned: at r = 1 it must be tau.": (1 - 2 * r) * tau,
        "At r = 1 it must be tau, and this is 2 tau.": 2 * r * tau,
        "Rho enters once, not squared: L_sude is a straight line in it.": r**2 * tau,
        "That is L_sude - tau at r; add tau.": -2 * tau * (1 - r),
        "It must move with r: this is the paper's threshold, r = 1.": tau,
    }
    return Trial((tau, r), (2 * r - 1) * tau, slips)


check_at_half = choice(
    "c",
    "what a gate that shuts at rho = 1/2 asks of the subject, eq. 5-9.",
    a="That is r = 1: there the subject's step speaks for the category as much as the "
    "category's own step does.",
    b="A probability of one half plays no part: eq. 5 compares with what was known "
    "before, C_t = p(c | x_t), whatever that is.",
    d="That is r = 0: there the prediction says as little of a dog as the one without "
    "a prompt, along d.",
)


@check
def check_rest(draw: Draw) -> Trial:
    """Check rest(target, class_0, weight_sude, share): where s rests, (B,).

    Descent on (s - target)^2 + w_s [(s - c_bar)^2 - s^2], eq. 10 untruncated, c = c_0 + share
    (s - c_0): (target + w_s (1 - share) c_0) / (1 - w_s share) if w_s share < 1, else inf.
    """
    target, class_0 = draw.uniform(0.5, 2.0, 6), draw.uniform(0.5, 2.0, 6)
    weight = torch.tensor([0.5, 1.0, 2.0, 2.0, 4.0, 0.8]).double()
    share = torch.tensor([0.5, 0.3, 0.2, 0.8, 0.9, 0.0]).double()
    stays, pull, still = 1 - share, weight * share, target + weight * class_0
    top = target + weight * stays * class_0
    end = top / (1 - pull)
    through = (target + weight * stays**2 * class_0) / (1 + weight * stays**2 - weight)

    def unless_never(value: Tensor) -> Tensor:
        return torch.where(pull < 1, value, torch.full_like(value, math.inf))

    still_0 = "The pretrained prior stays at c_0: here c moves with s."
    bar = "The bar over theta: c follows s, but the gradient treats it as a constant."
    slips = {
        "Where w_s kappa >= 1 each step makes the next one longer: never. Return inf.": end,
        still_0: still,
        f"{still_0} (Your inf are in place.)": unless_never(still),
        bar: through,
        f"{bar} (Your inf are in place.)": unless_never(through),
        "Of c_0 itself the share 1 - kappa stays.": unless_never(still / (1 - pull)),
        "Check the sign in 1 - w_s kappa: s runs further.": unless_never(top / (1 + pull)),
    }
    return Trial((target, class_0, weight, share), unless_never(end), slips)


@check
def check_end_rho(draw: Draw) -> Trial:
    """Check end_rho(rho, weight_sude, r): rho + min(w_s, max(0, r - rho)), from eq. 10; (B,)."""
    rho = torch.tensor([-0.6, 0.1, 0.4, 0.9, 1.4]).double() + 0.05 * draw.uniform(0, 1, 5)
    weight, r = 0.5, 0.7

    def end(stop: float) -> Tensor:
        return rho + (stop - rho).clamp(min=0, max=weight)

    slips = {
        "You stopped at rho = 1: here the gate shuts at r.": end(1.0),
        "A sample that is past r is not pulled back.": rho + (r - rho).clamp(max=weight),
        "SuDe moves it by w_s at most: L_sub pulls.": rho.clamp(min=r),
        "That is without truncation.": rho + weight,
        "That is how far it moves: add where it started.": end(r) - rho,
    }
    return Trial((rho, weight, r), end(r), slips)


@check
def check_tuned(draw: Draw) -> Trial:
    """Check tuned(target, class_0, weight_sude, share, num_steps, prior, truncated), eq. 7-10."""
    class_0 = draw.normal(4, 2)
    across = torch.stack([-class_0[:, 1], class_0[:, 0]], dim=1)
    along = torch.tensor([-0.5, 0.3, 0.8, 1.5]).double()[:, None]
    settings = (along * class_0 + 0.7 * across, class_0, 2.0, 0.6, 40)

    def all_four(how: Answer) -> Tensor:
        kinds = [(prior, cut) for prior in ("pretrained", "current") for cut in (True, False)]
        return torch.stack([torch.as_tensor(ask(how, *settings, *kind)) for kind in kinds])

    slips = {
        "turned": "`prior` is the wrong way round: current asks the moving c, pretrained class_0.",
        "still": "c stays where it was: whenever s moves, its own c moves by `share` of it.",
        "whole": "c moves as far as s: it is to move by `share` of that.",
        "open": "The gates stand open although `truncated` is True.",
        "once": "The gates were set before the first step and never looked at again.",
        "old tau": "tau is that of class_0 throughout: with prior `current` it moves, like L_sude.",
        "towards": "The push goes along s - c: s^2 cancels if written out, and d = c is left.",
    }
    wrong = named(lambda slip: all_four(_tuned(slip)), slips)
    return Trial(all_four, all_four(_tuned()), wrong)


def _tuned(slip: str = "") -> Answer:
    """The descent, or a slip that is made of it."""

    def tuned(*settings: Any) -> Tensor:
        target, class_0, weight_sude, share, num_steps, prior, truncated = settings
        s = c = class_0
        first: Tensor | None = None
        for _ in range(num_steps):
            d = c if (prior == "current") != (slip == "turned") else class_0
            loss = (s - d).square().sum(1) - s.square().sum(1)
            tau = -(class_0 if slip == "old tau" else d).square().sum(1)
            gate = (loss > tau) | (not truncated or slip == "open")
            first = gate if first is None else first
            gate = (first if slip == "once" else gate)[:, None]
            push = gate * (d - s if slip == "towards" else d)
            move = -LEARNING_RATE * (2 * (s - target) - 2 * weight_sude * push)
            s = s + move
            c = c + {"still": 0.0, "whole": 1.0}.get(slip, share) * move
        return s

    return tuned
