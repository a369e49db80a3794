"""Checks of formulas, the exercises to lessons 01, 02, 03, 06, 09 and 11.

Equations are those of arXiv 2403.06775 unless named; losses and logarithms are in nats.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from sude_lab.diffusion import Schedule, add_noise, to_x_0
from sude_lab.exercises.judging import Answer, Call, Draw, Mistake, ask, check
from sude_lab.exercises.worlds import short_schedule, stable_diffusion_schedule, steps, things
from sude_lab.losses import sude_weight
from sude_lab.world.mixture import GaussianMixture


@check(lambda draw: (draw.normal(5, 3, 2), draw.normal(5, 3, 2), draw.uniform(0.1, 0.8, 5)))
def log_density(x_prev: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Check log_density(x_prev, mean, variance), eq. 6; (B, C, h), variance: sigma_t^2, (B,)."""
    squares = (x_prev - mean).flatten(1).square()
    dims = squares.shape[1]
    return -squares.sum(1) / (2 * variance) - dims / 2 * torch.log(2 * math.pi * variance)


@check(lambda draw: (*(draw.normal(4, 5) for _ in range(3)), draw.uniform(0.1, 0.8, 4)))
def log_ratio(x_prev: Tensor, mean_class: Tensor, mean_uncond: Tensor, variance: Tensor) -> Tensor:
    """Check log_ratio(x_prev, mean_class, mean_uncond, variance), eq. 5 with 6; (B, D) -> (B,)."""
    above = log_density.right(x_prev, mean_class, variance)
    below = log_density.right(x_prev, mean_uncond, variance)
    return above - below


def _posterior_call(draw: Draw) -> Call:
    prior = draw.uniform(0.1, 1.0, 4, 4)
    step = (draw.normal(4, 5), draw.normal(4, 4, 5), draw.uniform(0.5, 2.0, 4))
    return *step, prior / prior.sum(1, keepdim=True)


@check(_posterior_call)
def log_posterior(x_prev: Tensor, means: Tensor, variance: Tensor, prior: Tensor) -> Tensor:
    """Check log_posterior(x_prev, means, variance, prior), eq. 5; (B, D), (B, K, D) -> (B, K)."""
    squares = (x_prev[:, None] - means).square().sum(2)
    return (prior.log() - squares / (2 * variance[:, None])).log_softmax(1)


@check(lambda draw: (-draw.uniform(0.5, 2.0, 3), 0.5 + 0.3 * draw.normal(6, 3)))
def chain(last: Tensor, news: Tensor) -> Tensor:
    """Check chain(last, news): log p(c | x_{t-1}) by sums of eq. 5; (N,), (T, N) -> (T, N)."""
    return last + news.flip(0).cumsum(0).flip(0)


def _naming_call(draw: Draw) -> Call:
    world, t = things()[0], torch.full((5,), 40 + draw.seed)
    x_0 = world.sample(5, draw.generator)[0]
    return world, x_0, t, short_schedule(), torch.Generator().manual_seed(draw.seed + 1)


@check(_naming_call)
def noise_errors(
    world: GaussianMixture, x_0: Tensor, t: Tensor, schedule: Schedule, generator: torch.Generator
) -> Tensor:
    """Check noise_errors(world, x_0, t, schedule, generator): eq. 6 in eps-space; (N, C)."""
    eps = torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype)
    columns = []
    for c in range(world.num_classes):
        x_t = add_noise(x_0, eps, t, schedule)
        columns.append((eps - world.eps(x_t, t, schedule, c)).square().sum(1))
    return torch.stack(columns, dim=1)


@check(
    lambda draw: (*(draw.normal(4, 3, 2) for _ in range(3)), draw.uniform(0.1, 0.8, 4)),
    learns=("x_sub",),
    fixed=("mean_class", "mean_uncond"),
)
def sude(x_sub: Tensor, mean_class: Tensor, mean_uncond: Tensor, variance: Tensor) -> Tensor:
    """Check sude(x_sub, mean_class, mean_uncond, variance), eq. 7 and its bar; (B,)."""
    to_class = (x_sub - mean_class.detach()).flatten(1).square().sum(1)
    to_uncond = (x_sub - mean_uncond.detach()).flatten(1).square().sum(1)
    return (to_class - to_uncond) / (2 * variance)


@check(lambda draw: (*(draw.normal(4, 4) for _ in range(3)), draw.uniform(0.1, 0.8, 4)))
def push(x_sub: Tensor, mean_class: Tensor, mean_uncond: Tensor, variance: Tensor) -> Tensor:
    """Check push(x_sub, mean_class, mean_uncond, variance): minus the gradient of eq. 7, (B, D)."""
    return (mean_class - mean_uncond) / variance[:, None]


@check(lambda draw: (draw.normal(4, 4), 2 * draw.normal(4, 4)))
def along(a: Tensor, d: Tensor) -> Tensor:
    """Check along(a, d): <a, d> / ||d||^2 d, the part of a that eq. 7 sees, (B, D)."""
    number = (a * d).sum(1, keepdim=True) / d.square().sum(1, keepdim=True)
    return number * d


def _weight_call(draw: Draw) -> Call:
    t = torch.randperm(998, generator=draw.generator)[:5] + 1
    abar = stable_diffusion_schedule().alphas_cumprod
    return abar[t], abar[t - 1]


@check(_weight_call)
def eps_weight(abar: Tensor, abar_prev: Tensor) -> Tensor:
    """Check eps_weight(abar, abar_prev): beta_t / (2 alpha_t (1 - abar_{t-1})), of eq. 7, (B,)."""
    alpha = abar / abar_prev
    beta = 1 - alpha
    return beta / (2 * alpha * (1 - abar_prev))


def _pushes(draw: Draw) -> list[Call]:
    t, schedule = int(draw.number(1, 999)), stable_diffusion_schedule()
    weight, old, new = draw.number(0.2, 0.6), "reference", "exact"
    return [(weight, t, schedule, old, new), (2 * weight, t, schedule, new, old)]


@check(_pushes)
def same_push(weight_sude: float, t: int, schedule: Schedule, old: str, new: str) -> Tensor:
    """Check same_push(weight_sude, t, schedule, old, new): w_s' = w_s w_t / w_t', eq. 10."""
    before = sude_weight(torch.tensor([t]), schedule, old)[0]
    after = sude_weight(torch.tensor([t]), schedule, new)[0]
    return weight_sude * before / after


def _sides_call(draw: Draw) -> Call:
    (world, subject), schedule = things(), short_schedule()
    return world, subject, *steps(world, 6, 40 + draw.seed, schedule, draw.generator), schedule


@check(_sides_call, two="two tensors, the sides of eq. 12")
def both_sides(
    world: GaussianMixture,
    subject: Tensor,
    x_prev: Tensor,
    x_t: Tensor,
    t: Tensor,
    schedule: Schedule,
) -> tuple[Tensor, Tensor]:
    """Check both_sides(world, subject, x_prev, x_t, t, schedule): the sides of eq. 12, (B,)."""
    known = world.restrict(subject)
    step = -known.reverse_log_prob_exact(x_prev, x_t, t, schedule)
    judge = -known.class_log_posterior_prev(x_prev, t, schedule)[:, 0]
    joint = -known.reverse_log_prob_exact(x_prev, x_t, t, schedule, 0)
    S_t = -known.class_log_posterior(x_t, t, schedule)[:, 0]
    return step + judge, joint + S_t


@check(lambda draw: (draw.normal(4, 3, 2), draw.normal(4, 3, 2), draw.uniform(0.1, 0.8, 4)))
def threshold(mean_class: Tensor, mean_uncond: Tensor, variance: Tensor) -> Tensor:
    """Check threshold(mean_class, mean_uncond, variance): tau_t of eq. 8; (B, C, h) -> (B,)."""
    d = (mean_class - mean_uncond).flatten(1)
    return -d.square().sum(1) / (2 * variance)


def _gate_calls(draw: Draw) -> list[Call]:
    tau = draw.near([-1.5, -1.0, -0.6, -1.2, -0.8, -0.7, -1.8, -1.4], -0.1)
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


@check(lambda draw: (-draw.uniform(0.5, 3.0, 6), draw.near([-0.5, 0.2, 0.9, 1.3, 2.0, 0.0])))
def hinge(tau: Tensor, rho: Tensor) -> Tensor:
    """Check hinge(tau, rho): -2 tau max(0, 1 - rho), lambda (L_sude - tau_t) of eq. 7-9, (B,)."""
    return -2 * tau * (1 - rho).clamp(min=0)


def _directions(draw: Draw, rhos: Sequence[float] = (-0.5, 0.3, 1.4, 0.8)) -> tuple[Tensor, Tensor]:
    """Return a and d, (B, 4), of given rho."""
    a, d = draw.normal(len(rhos), 4), draw.normal(len(rhos), 4)
    # so long that rho, <a, d> and <a, d> / ||d|| are not all on the same side of 1
    d = draw.uniform(1.7, 2.3, len(rhos), 1) * d / d.norm(dim=1, keepdim=True)
    return a - along.right(a, d) + torch.tensor(rhos).double()[:, None] * d, d


def _targets(draw: Draw) -> list[Call]:
    uncond, (a, d) = draw.normal(6, 4), _directions(draw, [-0.9, 0.1, 0.7, 1.4, 0.3, 2.0])
    weights = draw.number(0.7, 0.9), draw.number(0.25, 0.35)
    return [(uncond + a, uncond + d, uncond, weight) for weight in weights]


def _moved_along_d(answer: Answer, call: Call) -> Tensor:
    """Return how far an answer moves every sample, in d, (B,)."""
    target, eps_class, eps_uncond, _ = call
    given = torch.as_tensor(ask(answer, call)).detach().double()
    if given.shape != target.shape:
        raise Mistake(f"The end of every sample is asked for, {tuple(target.shape)}.")
    if not bool((given.abs() <= 1e4).all()):
        raise Mistake("It runs away: descend, s - learning rate x gradient, in steps of 0.02.")
    d, moved = eps_class - eps_uncond, given - target
    if bool(((moved - along.right(moved, d)).norm(dim=1) > 0.1 * d.norm(dim=1)).any()):
        raise Mistake("Some samples moved across d: L_sude pushes along each sample's own d.")
    return (moved * d).sum(1) / d.square().sum(1)


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


_RHO = [-0.6, 0.1, 0.4, 0.9, 1.4]


@check(lambda draw: (draw.near(_RHO), draw.number(0.4, 0.6), draw.number(0.65, 0.75)))
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


Predict = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


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


@check(
    lambda draw: (draw.near([-0.6, 0.2, 0.7, 1.5], 0.1), draw.number(0.2, 0.4), 3 + draw.seed // 10)
)
def after_steps(rho: Tensor, strength: float, n: int) -> Tensor:
    """Check after_steps(rho, strength, n): 1 - (1 - g)^n (1 - rho) if rho < 1, else rho; (B,)."""
    left = (1 - strength) ** n * (1 - rho)
    return torch.where(rho < 1, 1 - left, rho)


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


@check(lambda draw: (draw.normal(4, 4), draw.uniform(0.1, 0.9, 4)))
def as_ddpm(x_s: Tensor, s: Tensor) -> Tensor:
    """Check as_ddpm(x_s, s): x_s / sqrt((1 - s)^2 + s^2), eq. 1's noisy picture; (B, D)."""
    length = ((1 - s) ** 2 + s**2).sqrt()
    return x_s / length[:, None]


@check(lambda draw: (draw.normal(4, 4), draw.normal(4, 4), draw.uniform(0.1, 0.9, 4)))
def velocity(eps: Tensor, x_s: Tensor, s: Tensor) -> Tensor:
    """Check velocity(eps, x_s, s): v = eps - x_0 = (eps - x_s) / (1 - s), (B, D)."""
    return (eps - x_s) / (1 - s)[:, None]


@check(lambda draw: (s := draw.uniform(0.3, 0.9, 4), s - draw.uniform(0.05, 0.2, 4)))
def flow_weight(s: Tensor, near: Tensor) -> Tensor:
    """Check flow_weight(s, near): s^2 / 2 (SNR(near) - SNR(s)), eq. 7's factor in v; (B,)."""
    here, there = ((1 - x) ** 2 / x**2 for x in (s, near))
    return s**2 / 2 * (there - here)


def _step_call(draw: Draw) -> Call:
    s = draw.number(0.5, 0.8)
    parts = (draw.normal(4, 4) for _ in range(3))
    return (*parts, s, s - draw.number(0.1, 0.2), draw.number(0.3, 0.9))


@check(_step_call)
def noisy_step(x_0: Tensor, eps: Tensor, z: Tensor, s: float, near: float, eta: float) -> Tensor:
    """Check noisy_step(x_0, eps, z, s, near, eta): from s to `near` with noise eta, (B, D)."""
    R = ((1 - s) / s) ** 2 / ((1 - near) / near) ** 2
    variance = eta**2 * near**2 * (1 - R)
    return (1 - near) * x_0 + (near**2 - variance) ** 0.5 * eps + variance**0.5 * z


@check(
    lambda draw: (
        lambda x, s: torch.sin(3 * x) + s * x,
        draw.normal(4, 4),
        sorted(draw.uniform(0, 1, 6).tolist(), reverse=True),
    )
)
def euler(field: Callable[[Tensor, float], Tensor], x: Tensor, times: list[float]) -> Tensor:
    """Check euler(field, x, times): steps along dx/ds = field(x, s), by falling s; (B, D)."""
    for s, near in pairwise(times):
        x = x + (near - s) * field(x, s)
    return x
