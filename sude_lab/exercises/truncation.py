"""Checks of the exercises to lesson 03; equations of arXiv 2403.06775, losses in nats."""

import torch
from torch import Tensor

from sude_lab.exercises.judging import Answer, Call, Draw, Mistake, ask, check


@check(lambda draw: (draw.normal(4, 3, 2), draw.normal(4, 3, 2), draw.uniform(0.1, 0.8, 4)))
def threshold(mean_class: Tensor, mean_uncond: Tensor, variance: Tensor) -> Tensor:
    """Check threshold(mean_class, mean_uncond, variance): tau_t of eq. 8; (B, C, h) -> (B,)."""
    d = (mean_class - mean_uncond).flatten(1)
    return -d.square().sum(1) / (2 * variance)


def _gate_calls(draw: Draw) -> list[Call]:
    tau = -torch.tensor([1.5, 1.0, 0.6, 1.2, 0.8, 0.7, 1.8, 1.4]).double()
    tau = tau - 0.1 * draw.uniform(0, 1, 8)
    # open and negative, shut, equal, open below |tau|, ...: every wrong comparison changes a value
    room = torch.tensor([0.5, -1.0, 0.0, 1.5, -0.6, 2.5, 0.0, -0.3]).double()
    # ... and the gate of the batch's means is once open, once shut
    return [(tau - room * tau, tau), (tau - (room - 0.9 * (room > 1) - 0.3) * tau, tau)]


@check(_gate_calls, learns=("loss",), fixed=("tau",))
def truncated(loss: Tensor, tau: Tensor) -> Tensor:
    """Check truncated(loss, tau): lambda_tau L_sude, eq. 9, (B,); open gates pass a gradient."""
    return loss * (loss > tau)


@check(lambda draw: tuple(draw.normal(4, 3, 2) for _ in range(3)))
def rho(x_sub: Tensor, mean_class: Tensor, mean_uncond: Tensor) -> Tensor:
    """Check rho(x_sub, mean_class, mean_uncond): <a, d> / ||d||^2, from eq. 7-8; (B,)."""
    a = (x_sub - mean_uncond).flatten(1)
    d = (mean_class - mean_uncond).flatten(1)
    return (a * d).sum(1) / d.square().sum(1)


@check(
    lambda draw: (
        -draw.uniform(0.5, 3.0, 6),
        torch.tensor([-0.5, 0.2, 0.9, 1.3, 2.0, 0.0]).double() + 0.05 * draw.uniform(0, 1, 6),
    ),
)
def hinge(tau: Tensor, rho: Tensor) -> Tensor:
    """Check hinge(tau, rho): -2 tau max(0, 1 - rho), lambda (L_sude - tau_t) of eq. 7-9, (B,)."""
    return -2 * tau * (1 - rho).clamp(min=0)


def _targets(draw: Draw) -> list[Call]:
    uncond, d, across = draw.normal(6, 5), draw.normal(6, 5), draw.normal(6, 5)
    d = draw.uniform(1.8, 2.2, 6, 1) * d / d.norm(dim=1, keepdim=True)
    start = torch.tensor([-0.9, 0.1, 0.7, 1.4, 0.3, 2.0]).double()[:, None]
    of_look = (across * d).sum(1, keepdim=True) / d.square().sum(1, keepdim=True)
    target = uncond + across + (start - of_look) * d
    weights = draw.number(0.7, 0.9), draw.number(0.25, 0.35)
    return [(target, uncond + d, uncond, weight) for weight in weights]


def _moved_along_d(answer: Answer, call: Call) -> Tensor:
    """Return how far an answer moves every sample, in d, (B,)."""
    target, eps_class, eps_uncond, _ = call
    given = torch.as_tensor(ask(answer, call)).detach().double()
    if given.shape != target.shape:
        raise Mistake(f"The end of every sample is asked for, {tuple(target.shape)}.")
    if not bool((given.abs() <= 1e4).all()):
        raise Mistake("It runs away: descend, s - learning rate x gradient, in steps of 0.02.")
    d, moved = eps_class - eps_uncond, given - target
    along = (moved * d).sum(1) / d.square().sum(1)
    if bool(((moved - along[:, None] * d).norm(dim=1) > 0.1 * d.norm(dim=1)).any()):
        raise Mistake("Some samples moved across d: L_sude pushes along each sample's own d.")
    return along


@check(
    _targets,
    run=_moved_along_d,
    tolerance=0.1,
    hint="That is how far a sample moved, in d: more steps, or a smaller learning rate?",
)
def settle(eps_target: Tensor, eps_class: Tensor, eps_uncond: Tensor, weight_sude: float) -> Tensor:
    """Check settle(eps_target, eps_class, eps_uncond, weight_sude): where descent ends, (B, D).

    eps_target + min(w_s, max(0, 1 - rho)) d, from eq. 3 and 7-10 in eps-space with the weighting
    `simple`. Right within 0.1 ||d||: descent may tremble at the gate.
    """
    d = eps_class - eps_uncond
    square = d.square().sum(1)
    room = 1 - ((eps_target - eps_uncond) * d).sum(1) / square
    moved = room.clamp(min=0, max=weight_sude)
    return eps_target + moved[:, None] * d
