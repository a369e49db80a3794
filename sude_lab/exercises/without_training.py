"""Checks of the exercises to lesson 09; equations of arXiv 2403.06775 unless named."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from sude_lab.diffusion import Schedule, add_noise, to_x_0
from sude_lab.exercises.judging import Draw, Trial, check, choice, named, of_variance
from sude_lab.exercises.worlds import things
from sude_lab.losses import guidance_projection, hinge_loss

Predict = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def _at(along: list[float], draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
    """a and d, (B, 4), with given rho, and rho (B, 1)."""
    a, d = draw.normal(len(along), 4), draw.normal(len(along), 4)
    rho = torch.tensor(along).double()[:, None]
    return a + (rho - (a * d).sum(1, keepdim=True) / d.square().sum(1, keepdim=True)) * d, d, rho


@check
def check_hinge_gradient(draw: Draw) -> Trial:
    """Check hinge_gradient(a, d, variance): -d / sigma_t^2 if rho < 1, else 0, eq. 7-9; (B, D)."""
    a, d, rho = _at([-0.5, 0.3, 1.4, 0.8], draw)
    variance = draw.uniform(0.1, 0.8, 4)
    leaf, is_open = a.clone().requires_grad_(), rho < 1
    pull, back = -d / variance[:, None], -a / variance[:, None]
    loss = hinge_loss(leaf, d, torch.zeros_like(d), variance).sum()
    (slope,) = torch.autograd.grad(loss, leaf)
    slips = of_variance(slope, variance, "the hinge") | {
        "That is where descent goes; the gradient points the other way.": -slope,
        "Behind the gate, rho >= 1, the hinge is flat: its gradient is 0 there.": pull,
        "It does not fade: the hinge is a straight line.": (1 - rho).clamp(min=0) * pull,
        "The gate is the wrong way round: the hinge works where rho < 1.": pull * ~is_open,
        "That pulls a to d from all sides; the hinge pushes along d.": is_open * (pull - back),
    }
    return Trial((a, d, variance), slope, slips)


@check
def check_corrected(draw: Draw) -> Trial:
    """Check corrected(a, d, strength): a + g max(0, 1 - rho) d, see `sude_lab.guidance`; (B, D)."""
    a, d, rho = _at([-0.5, 0.3, 1.4, 0.8], draw)
    strength, room = 0.8, (1 - rho).clamp(min=0)
    step = strength * room * d
    slips = {
        "That is plain composition: add only max(0, 1 - rho).": a + strength * d,
        "A sample behind the gate was pulled back: max(0, ...).": a + strength * (1 - rho) * d,
        "The strength is lost.": a + room * d,
        "rho counts in lengths of d: not with d / ||d||.": a + step / d.norm(dim=1, keepdim=True),
        "You walked towards the point d: go along d.": a + strength * (rho < 1) * (d - a),
        "That is the correction: add it to a.": step,
        "The sign is turned: towards the category, along + d.": a - step,
    }
    return Trial((a, d, strength), a + step, slips)


check_through_guidance = choice(
    "b",
    "what classifier-free guidance of scale w makes of a correction, u + w (u_sub - u).",
    a="Guidance multiplies the conditional prediction by w, and with it what was added.",
    c="u_neg + w (u_sub - u_neg) = (1 - w) u_neg + w u_sub: only u_sub is corrected.",
    d="u_neg is in the result, but the *change* of the result does not know it.",
)


@check
def check_after_steps(draw: Draw) -> Trial:
    """Check after_steps(rho, strength, n): 1 - (1 - g)^n (1 - rho) if rho < 1, else rho; (B,)."""
    rho = torch.tensor([-0.6, 0.2, 0.7, 1.5]).double() + 0.1 * draw.uniform(0, 1, 4)
    strength, n = 0.3, 3
    left = (1 - strength) ** n * (1 - rho)
    kept = torch.where(rho < 1, left, rho)

    def end(share: float) -> Tensor:
        return torch.where(rho < 1, 1 - share * (1 - rho), rho)

    slips = {
        "Each goes a share of what is *left*: multiply n times.": end(1 - n * strength),
        "What is left after a step is 1 - g of it, not g: (1 - g)^n.": end(strength**n),
        "That is one correction; n of them are asked for.": end(1 - strength),
        "A sample behind the gate is not corrected at all.": 1 - left,
        "That is what is left to the gate: rho itself is asked for.": kept,
    }
    return Trial((rho, strength, n), end((1 - strength) ** n), slips)


@check
def check_at_fidelity(draw: Draw) -> Trial:
    """Check at_fidelity(alignment, fidelity, goal): alignment where a rule keeps `goal`."""
    fidelity = np.array([0.8, 0.6, 0.4, 0.28, 0.2]) + 0.02 * draw.rng.uniform(size=5)
    alignment = np.array([0.3, 0.55, 0.7, 0.95, 0.85]) + 0.02 * draw.rng.uniform(size=5)
    goal, (_, x_1, x_2), (y_1, y_2) = 0.52, fidelity[:3], alignment[1:3]
    share, nearest = (x_1 - goal) / (x_1 - x_2), alignment[abs(fidelity - goal).argmin()]
    one_line = np.interp(goal, fidelity[[4, 0]], alignment[[4, 0]])
    slips = {
        "`np.interp` needs growing x: turn both round.": np.interp(goal, fidelity, alignment),
        "That is the nearest strength that was tried: read between two of them.": nearest,
        "That keeps less than `goal`: read between two strengths.": y_2,
        "You began at the wrong end: count from the higher fidelity.": y_2 + share * (y_1 - y_2),
        "You drew one line through first and last: read between the two neighbours.": one_line,
        "That is the best alignment, whatever it costs.": alignment.max(),
    }
    return Trial((alignment, fidelity, goal), y_1 + share * (y_2 - y_1), slips)


def my_dog(schedule: Schedule) -> Predict:
    """Return a model that was tuned plainly on one sitting dog, and the frozen one beside it.

    (x_t, t) -> (eps_sub, eps_class, eps_null), eq. 7, (B, 2) each, in lesson 02's world. The tuned
    model knows its one picture, at (-1.2, 1.2); the frozen one dogs and things, and the class
    prompt asks it for running dogs, around (-0.8, -0.9), as in `sude_lab.guidance`.
    """
    world, _ = things()
    only, running = torch.tensor([[True, False, False, False], [False, True, False, False]])
    picture = replace(world.restrict(only), variances=torch.full((4,), 0.02).double())

    def predict(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        models = (picture, world.restrict(running), world)
        eps_sub, eps_class, eps_null = (model.eps(x_t, t, schedule) for model in models)
        return eps_sub, eps_class, eps_null

    return predict


@check
def check_drawn(draw: Draw) -> Trial:
    """Check drawn(predict, x, schedule, strength): DDIM, corrected in every step; (B, D) -> x_0.

    eps = eps_null + corrected(a, d, g) in arXiv 2010.02502, eq. 12, without new noise.
    """
    # Few steps and little noise: no slip may lead so far away that d is 0, where chance decides.
    schedule = Schedule(torch.linspace(0.95, 0.4, 4).double())
    predict, start = my_dog(schedule), draw.normal(5, 2)

    def drawn(slip: str = "") -> Tensor:
        """The sampler, or a slip that is made of it."""
        x, strength = start, 0.0 if slip == "plain" else 0.5
        order = range(int(slip == "short"), schedule.num_timesteps)
        for k in order if slip == "forward" else reversed(order):
            t = torch.full((len(x),), k)
            eps_sub, eps_class, eps_null = predict(x, t)
            room = (1 - guidance_projection(eps_sub, eps_class, eps_null)).clamp(min=0)
            eps = eps_sub + strength * room[:, None] * (eps_class - eps_null)
            eps = eps - eps_null if slip == "origin" else eps
            x_0 = to_x_0(eps_sub if slip == "early" else eps, x, t, schedule)
            at = t if slip == "stay" else (t - 1).clamp(min=0)
            x = add_noise(x_0, eps_sub if slip == "late" else eps, at, schedule) if k else x_0
        return x

    slips = {
        "plain": "That is plain sampling: nothing is corrected.",
        "early": "x_0 is computed from the prediction before its correction.",
        "late": "The way back to x_{t-1} needs the corrected eps, too, not only x_0.",
        "origin": "a starts at “no prompt”: what is corrected has eps_null to be added again.",
        "forward": "The steps run from T - 1 down to 0, you began at 0.",
        "stay": "The noise stays: after a step the picture is at t - 1, not at t.",
        "short": "One step is missing: t = 0 gives the picture.",
    }
    return Trial((predict, start, schedule, 0.5), drawn(), named(drawn, slips))
