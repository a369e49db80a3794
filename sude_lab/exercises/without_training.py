"""Checks of the exercises to lesson 09; equations of arXiv 2403.06775 unless named."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from sude_lab.diffusion import Schedule, add_noise, to_x_0
from sude_lab.exercises.judging import Call, Draw, check
from sude_lab.exercises.worlds import things

Predict = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def _directions(draw: Draw) -> tuple[Tensor, Tensor]:
    """a and d, (B, 4), with given rho."""
    a, d = draw.normal(4, 4), draw.normal(4, 4)
    # so long that rho, <a, d> and <a, d> / ||d|| are not all on the same side of 1
    d = draw.uniform(1.7, 2.3, 4, 1) * d / d.norm(dim=1, keepdim=True)
    rho = torch.tensor([-0.5, 0.3, 1.4, 0.8]).double()[:, None]
    return a + (rho - (a * d).sum(1, keepdim=True) / d.square().sum(1, keepdim=True)) * d, d


@check(lambda draw: (*_directions(draw), draw.uniform(0.1, 0.8, 4)))
def hinge_gradient(a: Tensor, d: Tensor, variance: Tensor) -> Tensor:
    """Check hinge_gradient(a, d, variance): -d / sigma_t^2 if rho < 1, else 0, eq. 7-9; (B, D)."""
    rho = (a * d).sum(1) / d.square().sum(1)
    return -d * (rho < 1)[:, None] / variance[:, None]


@check(lambda draw: (*_directions(draw), draw.number(0.6, 0.9)))
def corrected(a: Tensor, d: Tensor, strength: float) -> Tensor:
    """Check corrected(a, d, strength): a + g max(0, 1 - rho) d, see `sude_lab.guidance`; (B, D)."""
    rho = (a * d).sum(1, keepdim=True) / d.square().sum(1, keepdim=True)
    return a + strength * (1 - rho).clamp(min=0) * d


def _steps_call(draw: Draw) -> Call:
    rho = torch.tensor([-0.6, 0.2, 0.7, 1.5]).double() + 0.1 * draw.uniform(0, 1, 4)
    return rho, draw.number(0.2, 0.4), 3 + draw.seed // 10


@check(_steps_call)
def after_steps(rho: Tensor, strength: float, n: int) -> Tensor:
    """Check after_steps(rho, strength, n): 1 - (1 - g)^n (1 - rho) if rho < 1, else rho; (B,)."""
    left = (1 - strength) ** n * (1 - rho)
    return torch.where(rho < 1, 1 - left, rho)


def _line_call(draw: Draw) -> Call:
    fidelity = np.array([0.8, 0.6, 0.4, 0.28, 0.2]) + 0.02 * draw.rng.uniform(size=5)
    alignment = np.array([0.3, 0.55, 0.7, 0.95, 0.85]) + 0.02 * draw.rng.uniform(size=5)
    return alignment, fidelity, draw.number(0.46, 0.49) + 0.06 * (draw.seed < 10)


@check(_line_call)
def at_fidelity(alignment: np.ndarray, fidelity: np.ndarray, goal: float) -> float:
    """Check at_fidelity(alignment, fidelity, goal): alignment where a rule keeps `goal`."""
    return np.interp(goal, fidelity[::-1], alignment[::-1])


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


def _sampler_call(draw: Draw) -> Call:
    # Few steps and little noise: no slip may lead so far away that d is 0, where chance decides.
    schedule = Schedule(torch.linspace(0.95, 0.4, 4).double())
    return my_dog(schedule), draw.normal(5, 2), schedule, draw.number(0.4, 0.6)


@check(_sampler_call)
def drawn(predict: Predict, x: Tensor, schedule: Schedule, strength: float) -> Tensor:
    """Check drawn(predict, x, schedule, strength): DDIM, corrected in every step; (B, D) -> x_0.

    eps = eps_null + corrected(a, d, g) in arXiv 2010.02502, eq. 12, without new noise.
    """
    for k in reversed(range(schedule.num_timesteps)):
        t = torch.full((len(x),), k)
        eps_sub, eps_class, eps_null = predict(x, t)
        eps = eps_null + corrected.right(eps_sub - eps_null, eps_class - eps_null, strength)
        x_0 = to_x_0(eps, x, t, schedule)
        x = add_noise(x_0, eps, t - 1, schedule) if k else x_0
    return x
