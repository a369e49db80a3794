"""Checks of the exercises to lesson 06; equations are those of arXiv 2403.06775."""

import torch
from torch import Tensor

from sude_lab.exercises.judging import Call, Draw, check


@check(lambda draw: (draw.normal(4, 5), draw.normal(4, 5), draw.uniform(1.0, 20.0, 4)))
def loss_along(a: Tensor, d: Tensor, s: Tensor) -> Tensor:
    """Check loss_along(a, d, s): eq. 7 at a + s d, ||d||^2 - 2 <a, d> - 2 s ||d||^2; (B,)."""
    square = d.square().sum(1)
    return square - 2 * (a * d).sum(1) - 2 * s * square


@check(lambda draw: (-draw.uniform(0.5, 2.0, 4), draw.number(0.6, 0.9)))
def shifted(tau: Tensor, r: float) -> Tensor:
    """Check shifted(tau, r): (2 r - 1) tau_t, which shuts a gate at rho = r, from eq. 7-9; (B,)."""
    return (2 * r - 1) * tau


def _rest_call(draw: Draw) -> Call:
    weight = torch.tensor([0.5, 1.0, 2.0, 2.0, 4.0, 0.8]).double()
    share = torch.tensor([0.5, 0.3, 0.2, 0.8, 0.9, 0.0]).double()
    return draw.uniform(0.5, 2.0, 6), draw.uniform(0.5, 2.0, 6), weight, share


@check(_rest_call)
def rest(target: Tensor, class_0: Tensor, weight_sude: Tensor, share: Tensor) -> Tensor:
    """Check rest(target, class_0, weight_sude, share): where s rests, (B,).

    Descent on (s - target)^2 + w_s [(s - c_bar)^2 - s^2], eq. 10 untruncated, c = c_0 + share
    (s - c_0): (target + w_s (1 - share) c_0) / (1 - w_s share) if w_s share < 1, else inf.
    """
    pull = weight_sude * share
    end = (target + weight_sude * (1 - share) * class_0) / (1 - pull)
    return torch.where(pull < 1, end, torch.inf)


def _ends_call(draw: Draw) -> Call:
    rho = torch.tensor([-0.6, 0.1, 0.4, 0.9, 1.4]).double() + 0.05 * draw.uniform(0, 1, 5)
    return rho, draw.number(0.4, 0.6), draw.number(0.65, 0.75)


@check(_ends_call)
def end_rho(rho: Tensor, weight_sude: float, r: float) -> Tensor:
    """Check end_rho(rho, weight_sude, r): rho + min(w_s, max(0, r - rho)), from eq. 10; (B,)."""
    return rho + (r - rho).clamp(min=0, max=weight_sude)


def _descents(draw: Draw) -> list[Call]:
    class_0, weight = draw.normal(4, 2), draw.number(1.8, 2.2)
    across = torch.stack([-class_0[:, 1], class_0[:, 0]], dim=1)
    along = torch.tensor([-0.5, 0.3, 0.8, 1.5]).double()[:, None]
    settings = (along * class_0 + 0.7 * across, class_0, weight, draw.number(0.55, 0.65))
    kinds = [(prior, cut) for prior in ("pretrained", "current") for cut in (True, False)]
    return [(*settings, 20 - draw.seed, *kind) for kind in kinds]


@check(_descents)
def tuned(
    target: Tensor,
    class_0: Tensor,
    weight_sude: float,
    share: float,
    num_steps: int,
    prior: str,
    truncated: bool,
) -> Tensor:
    """Check tuned(target, class_0, weight_sude, share, num_steps, prior, truncated), eq. 7-10."""
    s = c = class_0
    for _ in range(num_steps):
        d = c if prior == "current" else class_0
        loss = (s - d).square().sum(1) - s.square().sum(1)
        gate = (loss > -d.square().sum(1)) | (not truncated)
        push = gate[:, None] * d
        move = -0.05 * (2 * (s - target) - 2 * weight_sude * push)
        s, c = s + move, c + share * move
    return s
