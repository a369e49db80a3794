"""Checks of the exercises to lesson 09: the hinge's gradient, its one step, and a sampler."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sude_lab.diffusion import Schedule, add_noise, to_x_0
from sude_lab.exercises.judging import Trial, check, choice, of_variance
from sude_lab.exercises.worlds import normal, things, uniform
from sude_lab.losses import guidance_projection, hinge_loss
from sude_lab.world.mixture import GaussianMixture

Predict = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def _at(along: list[float], g: torch.Generator, dims: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """a and d, (B, D), with given rho, and rho (B, 1)."""
    a, d = normal(g, len(along), dims), normal(g, len(along), dims)
    rho = torch.tensor(along).double()[:, None]
    return a - (a * d).sum(1, keepdim=True) / d.square().sum(1, keepdim=True) * d + rho * d, d, rho


@check
def check_hinge_gradient(seed: int) -> Trial:
    """Check hinge_gradient(a, d, variance): the hinge's gradient with respect to a, (B, D).

    -d / sigma_t^2 where rho < 1, and 0 elsewhere: derived from arXiv 2403.06775, eq. 7-9. a, d:
    (B, D), measured from the null prediction; variance: sigma_t^2, (B,).
    """
    g = torch.Generator().manual_seed(seed)
    a, d, rho = _at([-0.5, 0.3, 1.4, 0.8], g)
    variance = uniform(g, 0.1, 0.8, 4)
    leaf, v = a.clone().requires_grad_(), variance[:, None]
    loss = hinge_loss(leaf, d, torch.zeros_like(d), variance).sum()
    (slope,) = torch.autograd.grad(loss, leaf)
    slips = of_variance(slope, variance, "the hinge") | {
        "That is where descent goes; the gradient points the other way.": -slope,
        "Behind the gate, rho >= 1, the hinge is flat: its gradient is 0 there.": -d / v,
        "It does not fade: the hinge is a straight line.": -(1 - rho).clamp(min=0) * d / v,
        "The gate is the wrong way round: the hinge works where rho < 1.": (
            torch.where(rho >= 1, -d / v, torch.zeros_like(d))
        ),
        "That pulls a to d from all sides; the hinge pushes along d alone.": (
            torch.where(rho < 1, (a - d) / v, torch.zeros_like(d))
        ),
    }
    return Trial((a, d, variance), slope, slips)


@check
def check_corrected(seed: int) -> Trial:
    """Check corrected(a, d, strength): a + g max(0, 1 - rho) d, (B, D).

    With g = 1 the projection onto the half-space rho >= 1, where the gate of arXiv 2403.06775,
    eq. 9, is shut; see `sude_lab.guidance`.
    """
    g = torch.Generator().manual_seed(seed)
    a, d, rho = _at([-0.5, 0.3, 1.4, 0.8], g)
    strength = 0.8
    room = (1 - rho).clamp(min=0)
    slips = {
        "That is plain composition: add only max(0, 1 - rho).": a + strength * d,
        "A sample behind the gate was pulled back: max(0, ...).": a + strength * (1 - rho) * d,
        "The strength is lost.": a + room * d,
        "rho counts in lengths of d: multiply with d itself, not with d / ||d||.": (
            a + strength * room * d / d.norm(dim=1, keepdim=True)
        ),
        "You walked towards the point d: the half-space rho >= 1 is nearer, along d.": (
            torch.where(rho < 1, a + strength * (d - a), a)
        ),
        "That is the correction: add it to a.": strength * room * d,
        "The sign is turned: towards the category, along + d.": a - strength * room * d,
    }
    return Trial((a, d, strength), a + strength * room * d, slips)


check_through_guidance = choice(
    "b",
    "what classifier-free guidance of scale w makes of a correction, u + w (u_sub - u).",
    {
        "a": "Guidance multiplies the conditional prediction by w, and with it what was added.",
        "c": "u_neg + w (u_sub - u_neg) = (1 - w) u_neg + w u_sub: only u_sub is corrected.",
        "d": "u_neg is in the result, but the *change* of the result does not know it.",
    },
)


@check
def check_after_steps(seed: int) -> Trial:
    """Check after_steps(rho, strength, n): rho after n corrections in a row, (B,).

    1 - (1 - g)^n (1 - rho) for rho < 1 and 0 < g <= 1, else rho: from `check_corrected`, which goes
    the share g of the way to the gate of arXiv 2403.06775, eq. 9.
    """
    g = torch.Generator().manual_seed(seed)
    rho = torch.tensor([-0.6, 0.2, 0.7, 1.5]).double() + 0.1 * uniform(g, 0, 1, 4)
    strength, n = 0.3, 3

    def left(share: float, everywhere: bool = False) -> Tensor:
        end = 1 - share * (1 - rho)
        return end if everywhere else torch.where(rho < 1, end, rho)

    slips = {
        "Each goes a share of what is *left*: multiply n times.": left(1 - n * strength),
        "What is left after a step is 1 - g of it, not g: (1 - g)^n.": left(strength**n),
        "That is one correction; n of them are asked for.": left(1 - strength),
        "A sample behind the gate is not corrected at all.": left((1 - strength) ** n, True),
        "That is what is left to the gate: rho itself is asked for.": (
            torch.where(rho < 1, (1 - strength) ** n * (1 - rho), rho)
        ),
    }
    return Trial((rho, strength, n), left((1 - strength) ** n), slips)


@check
def check_at_fidelity(seed: int) -> Trial:
    """Check at_fidelity(alignment, fidelity, goal): a rule's alignment where it keeps `goal`.

    Read linearly between neighbouring strengths. alignment, fidelity: numpy, (N,), by growing
    strength; fidelity falls all the way, and `goal` lies within. No equation.
    """
    rng = np.random.default_rng(seed)
    fidelity = np.array([0.8, 0.6, 0.4, 0.28, 0.2]) + 0.02 * rng.uniform(size=5)
    alignment = np.array([0.3, 0.55, 0.7, 0.95, 0.85]) + 0.02 * rng.uniform(size=5)
    goal = 0.52
    share = (fidelity[1] - goal) / (fidelity[1] - fidelity[2])
    slips = {
        "`np.interp` needs growing x, and says nothing if they fall: turn both arrays round.": (
            float(np.interp(goal, fidelity, alignment))
        ),
        "That is the nearest strength that was tried: read between two of them.": alignment[
            abs(fidelity - goal).argmin()
        ],
        "That keeps less than `goal`: read between two strengths.": alignment[2],
        "You began at the wrong end: the share is counted from the higher fidelity.": (
            alignment[2] + share * (alignment[1] - alignment[2])
        ),
        "You drew one line through first and last: read between the two neighbours.": float(
            np.interp(goal, fidelity[[4, 0]], alignment[[4, 0]])
        ),
        "That is the best alignment, whatever it costs.": alignment.max(),
    }
    return Trial(
        (alignment, fidelity, goal),
        torch.tensor(alignment[1] + share * (alignment[2] - alignment[1])),
        {says: torch.tensor(float(wrong)).double() for says, wrong in slips.items()},
    )


def my_dog(schedule: Schedule) -> Predict:
    """Return a model that was tuned plainly on one sitting dog, and the frozen one beside it.

    (x_t, t) -> (eps_sub, eps_class, eps_null), (B, 2) each, in lesson 02's world: the three
    predictions of arXiv 2403.06775, eq. 7, of perfect networks. The tuned model knows its one
    picture alone, at (-1.2, 1.2). The frozen one knows dogs and things, and the class prompt asks
    it for running dogs, as in `sude_lab.guidance`: those around (-0.8, -0.9).
    """
    world, _ = things()
    running = torch.tensor([False, True, False, False])
    picture = GaussianMixture(
        weights=torch.ones(1).double(),
        means=world.means[:1],
        variances=torch.tensor([0.02]).double(),
        labels=torch.zeros(1, dtype=torch.long),
    )

    def predict(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (
            picture.eps(x_t, t, schedule),
            world.restrict(running).eps(x_t, t, schedule),
            world.eps(x_t, t, schedule),
        )

    return predict


@check
def check_drawn(seed: int) -> Trial:
    """Check drawn(predict, x, schedule, strength): DDIM from x_T = x, corrected in every step.

    eps = eps_null + corrected(a, d, g), x_0 = (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t),
    x_{t-1} = sqrt(abar_{t-1}) x_0 + sqrt(1 - abar_{t-1}) eps, for t = T - 1, ..., 0: arXiv
    2010.02502, eq. 12, without new noise. x: (B, D). Returns the x_0 of the last step.
    """
    # Few steps and little noise: no slip may lead so far away that d is 0, where chance decides.
    schedule = Schedule(torch.linspace(0.95, 0.4, 4).double())
    predict = my_dog(schedule)
    x = normal(torch.Generator().manual_seed(seed), 5, 2)
    slips = {
        "plain": "That is plain sampling: nothing is corrected.",
        "early": "x_0 is computed from the prediction before its correction.",
        "late": "The way back to x_{t-1} needs the corrected eps, too, not only x_0.",
        "origin": "a starts at “no prompt”: what is corrected has eps_null to be added again.",
        "forward": "The steps run from T - 1 down to 0, you began at 0.",
        "stay": "The noise stays: after a step the picture is at t - 1, not at t.",
        "short": "One step is missing: t = 0 gives the picture.",
    }
    wrong = {says: _drawn(predict, x, schedule, slip) for slip, says in slips.items()}
    return Trial((predict, x, schedule, 0.5), _drawn(predict, x, schedule), wrong)


def _drawn(predict: Predict, x: Tensor, schedule: Schedule, slip: str = "") -> Tensor:
    """The sampler, or a slip that is made of it."""
    strength = 0.0 if slip == "plain" else 0.5
    order = list(range(int(slip == "short"), schedule.num_timesteps))
    for k in order if slip == "forward" else order[::-1]:
        t = torch.full((len(x),), k)
        eps_sub, eps_class, eps_null = predict(x, t)
        room = (1 - guidance_projection(eps_sub, eps_class, eps_null)).clamp(min=0)
        eps = eps_sub + strength * room[:, None] * (eps_class - eps_null)
        eps = eps - eps_null if slip == "origin" else eps
        x_0 = to_x_0(eps_sub if slip == "early" else eps, x, t, schedule)
        before = torch.zeros_like(t) if k == 0 else t - 1
        noise, at = eps_sub if slip == "late" else eps, t if slip == "stay" else before
        noisy = add_noise(x_0, noise, at, schedule)
        x = noisy if k else x_0
    return x
