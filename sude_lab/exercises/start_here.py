"""Checks of the exercises to lesson 00; equations are those of arXiv 2403.06775."""

from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from sude_lab.diffusion import Schedule, add_noise
from sude_lab.exercises.judging import Answer, Call, Draw, ask, check
from sude_lab.exercises.worlds import short_schedule, stable_diffusion_schedule


@check(
    # B = w, so that an abar spread over the wrong axis raises no error and has to be noticed
    lambda draw: (draw.normal(4, 3, 4, 4), draw.normal(4, 3, 4, 4), draw.uniform(0.05, 0.95, 4)),
)
def noised(x_0: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    """Check noised(x_0, eps, abar), eq. 1; x_0, eps: (B, C, h, w), abar: abar_t, (B,)."""
    a = abar.reshape(-1, 1, 1, 1)
    return a.sqrt() * x_0 + (1 - a).sqrt() * eps


def _table_call(draw: Draw) -> Call:
    table = draw.uniform(0.985, 1.0, 1000).cumprod(0)
    return (table if draw.seed else stable_diffusion_schedule().alphas_cumprod,)


@check(_table_call)
def even_time(alphas_cumprod: Tensor) -> Tensor:
    """Check even_time(alphas_cumprod): the first t with 1 - abar_t > abar_t, from eq. 1."""
    return (alphas_cumprod < 0.5).nonzero()[0, 0]


def _rho_call(draw: Draw) -> Call:
    below, above = draw.uniform(-0.5, 0.9, 5 + draw.seed % 7), draw.uniform(1.1, 2.0, 4)
    rho = torch.cat([below, above, torch.ones(2).double()])
    return (rho[torch.randperm(len(rho), generator=draw.generator)],)


@check(_rho_call)
def open_share(rho: Tensor) -> Tensor:
    """Check open_share(rho): the share of samples whose gate, eq. 9, is open: rho < 1; (B,)."""
    return (rho < 1).double().mean()


class TinyDenoiser(nn.Module):
    """A noise network for a few pixels, eps_theta(x_t, t) of eq. 2; (B, D) -> (B, D), float32."""

    def __init__(self, pixels: int = 4, hidden: int = 64, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Linear(pixels + 1, hidden), nn.SiLU(), nn.Linear(hidden, pixels)
            )

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the predicted noise; t: LongTensor (B,), of 1,000 or fewer."""
        return self.layers(torch.cat([x_t, t[:, None].to(x_t) / 1000], dim=1))


def three_steps(step: Answer, call: Call, *asked: Any) -> Tensor:
    """Return losses and weights of three step(model, *asked, optimizer, x_0, ..., generator)."""
    seed, x_0, *rest = call
    model = TinyDenoiser(x_0.shape[1], hidden=16, seed=seed)
    optimizer, generator = torch.optim.SGD(model.parameters(), lr=0.1), torch.Generator()
    taken = partial(step, model, *asked, optimizer, x_0, *rest, generator.manual_seed(seed))
    losses = [torch.as_tensor(ask(taken, ())).detach().reshape(1) for _ in range(3)]
    return torch.cat([nn.utils.parameters_to_vector(model.parameters()).detach(), *losses])


@check(
    lambda draw: (draw.seed, draw.normal(1, 4).float().expand(8, 4), short_schedule()),
    run=three_steps,
)
def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x_0: Tensor,
    schedule: Schedule,
    generator: torch.Generator,
) -> Tensor:
    """Check training_step(model, optimizer, x_0, schedule, generator), eq. 3 in eps-space."""
    t = torch.randint(schedule.num_timesteps, (len(x_0),), generator=generator)
    eps = torch.randn(x_0.shape, generator=generator)
    x_t = add_noise(x_0, eps, t, schedule)
    loss = (model(x_t, t) - eps).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def _study_call(draw: Draw) -> Call:
    levels: dict[str, list[Any]] = {
        "subject": ["dog", "cat", "candle"],
        "seed": [0, 1],
        "variant": ["plain", "sude"],
        "attribute": [None, "a", "b", "c"],
        "image": [0, 1],
    }
    table = pd.MultiIndex.from_product(levels.values(), names=levels).to_frame(index=False)
    for measure in ("attribute_alignment", "subject_fidelity"):
        table[measure] = draw.rng.random(len(table))
    return (table.sample(frac=1.0, random_state=draw.seed, ignore_index=True),)


@check(_study_call)
def paired_gain(table: pd.DataFrame) -> pd.Series:
    """Check paired_gain(table): alignment that SuDe wins over plain, a Series by subject."""
    changed = table[table["attribute"].notna()]
    pairs = changed.groupby(["subject", "variant"])["attribute_alignment"]
    means = pairs.mean().unstack("variant")
    return means["sude"] - means["plain"]
