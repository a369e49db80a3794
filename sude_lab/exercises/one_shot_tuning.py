"""Checks of the exercises to lesson 04; equations of arXiv 2403.06775 unless named."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sude_lab.diffusion import Schedule, add_noise
from sude_lab.exercises.judging import Answer, Call, Draw, check
from sude_lab.exercises.start_here import three_steps
from sude_lab.exercises.worlds import DOG, short_schedule, things

Prior = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _layers_call(draw: Draw) -> Call:
    sides = 8 * torch.randint(1, 6, (3, 2), generator=draw.generator) + torch.tensor([0, 48])
    return [tuple(row) for row in sides.tolist()], 3 + draw.seed % 7


@check(_layers_call)
def lora_count(layers: Sequence[tuple[int, int]], rank: int) -> int:
    """Check lora_count(layers, rank): the sum of rank (out + in), arXiv 2106.09685, sec. 4."""
    return sum(rank * (out + into) for out, into in layers)


def _latent_call(draw: Draw) -> Call:
    mean, deviation = draw.normal(2, 3, 3).float(), draw.uniform(0.1, 0.9, 2, 3, 3).float()
    return mean, deviation, 4 + draw.seed // 10, torch.Generator().manual_seed(draw.seed + 1)


@check(_latent_call)
def latent_batch(mean: Tensor, deviation: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Check latent_batch(mean, deviation, size, generator): mean + deviation z, x_0 of eq. 1."""
    noise = torch.randn(size, *mean.shape, generator=generator)
    return mean + deviation * noise


@check(lambda draw: (1 + draw.normal(7).abs(), draw.number(0.7, 0.9)))
def smoothed(losses: Tensor, decay: float) -> Tensor:
    """Check smoothed(losses, decay): m_k / (1 - decay^k), arXiv 1412.6980, sec. 3; (K,)."""
    mean, curve = torch.zeros(()), []
    for k, loss in enumerate(losses, start=1):
        mean = decay * mean + (1 - decay) * loss
        curve.append(mean / (1 - decay**k))
    return torch.stack(curve)


def _parts_calls(draw: Draw) -> list[Call]:
    eps, eps_null, d, noise = (draw.normal(4, 3, 2) for _ in range(4))
    calls: list[Call] = []
    for rho in ([-0.5, 0.4, 0.8, 1.6], [0.5, 0.9, 2.2, 2.5]):  # the mean's gate: open, shut
        eps_sub = eps_null + torch.tensor(rho).double().reshape(4, 1, 1) * d + 0.1 * noise
        calls.append((eps_sub, eps_null + d, eps_null, eps, draw.number(0.5, 0.9)))
    return calls


@check(_parts_calls, learns=("eps_sub",), fixed=("eps_class", "eps_null"))
def batch_loss(
    eps_sub: Tensor, eps_class: Tensor, eps_null: Tensor, eps: Tensor, weight_sude: float
) -> Tensor:
    """Check batch_loss(eps_sub, eps_class, eps_null, eps, weight_sude), eq. 10 in eps-space."""
    learn = (eps_sub - eps).square().flatten(1).mean(1)
    to_class = (eps_sub - eps_class.detach()).square().flatten(1).mean(1)
    to_null = (eps_sub - eps_null.detach()).square().flatten(1).mean(1)
    tau = -(eps_class - eps_null).detach().square().flatten(1).mean(1)
    sude = to_class - to_null
    return (learn + weight_sude * (sude > tau) * sude).mean()


def dog_prior(schedule: Schedule) -> Prior:
    """Return lesson 02's perfect frozen model, (x_t, t) -> (eps_class, eps_null), (B, 2)."""
    world, _ = things()

    def prior(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        wide = x_t.double()
        return world.eps(wide, t, schedule, DOG).to(x_t), world.eps(wide, t, schedule).to(x_t)

    return prior


def _three_steps(step: Answer, call: Call) -> Tensor:
    return three_steps(step, call, dog_prior(call[2]))


def _dog_call(draw: Draw) -> Call:
    x_0 = torch.tensor([[-1.2, 1.2]]).expand(8, 2)
    return draw.seed, x_0, short_schedule(), draw.number(1.0, 3.0)


@check(_dog_call, run=_three_steps)
def sude_step(
    model: nn.Module,
    prior: Prior,
    optimizer: torch.optim.Optimizer,
    x_0: Tensor,
    schedule: Schedule,
    weight_sude: float,
    generator: torch.Generator,
) -> Tensor:
    """Check sude_step(model, prior, optimizer, x_0, schedule, weight_sude, generator), eq. 10."""
    t = torch.randint(schedule.num_timesteps, (len(x_0),), generator=generator)
    eps = torch.randn(x_0.shape, generator=generator)
    x_t = add_noise(x_0, eps, t, schedule)
    eps_class, eps_null = prior(x_t, t)
    loss = batch_loss.right(model(x_t, t), eps_class, eps_null, eps, weight_sude)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()
