"""Checks of the exercises to lesson 00; equations are those of arXiv 2403.06775."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from sude_lab.diffusion import Schedule, add_noise
from sude_lab.exercises.judging import Answer, Draw, Trial, ask, check, named
from sude_lab.exercises.worlds import short_schedule, stable_diffusion_schedule


@check
def check_noised(draw: Draw) -> Trial:
    """Check noised(x_0, eps, abar), eq. 1; x_0, eps: (B, C, h, w), abar: abar_t, (B,)."""
    # B = w, so that an abar spread over the wrong axis raises no error and has to be noticed
    x_0, eps = draw.normal(4, 3, 4, 4), draw.normal(4, 3, 4, 4)
    abar = draw.uniform(0.05, 0.95, 4).sort(descending=True).values
    a, spread = abar.reshape(-1, 1, 1, 1), abar.sqrt() * x_0 + (1 - abar).sqrt() * eps
    slips = {
        "abar is one number a sample, you spread it over the last axis: (B, 1, 1, 1).": spread,
        "Eq. 1 weights with square roots: these are variances.": a * x_0 + (1 - a) * eps,
        "You gave picture and noise each other's weight.": (1 - a).sqrt() * x_0 + a.sqrt() * eps,
        "The noise has sqrt(1 - abar), not 1 - sqrt(abar).": a.sqrt() * x_0 + (1 - a.sqrt()) * eps,
    }
    return Trial((x_0, eps, abar), add_noise(x_0, eps, torch.arange(4), Schedule(abar)), slips)


@check
def check_even_time(draw: Draw) -> Trial:
    """Check even_time(alphas_cumprod): the first t with 1 - abar_t > abar_t, from eq. 1."""
    table = stable_diffusion_schedule().alphas_cumprod
    if draw.seed:
        table = draw.uniform(0.985, 1.0, 1000).cumprod(0)

    def first(below: float) -> Tensor:
        return (table < below).nonzero()[0, 0]

    slips = {
        "You compared weights: power is their square, abar and 1 - abar.": first(0.25),
        "One too late: timesteps count from 0, as the table's rows do.": first(0.5) + 1,
        "One too early: here the picture still has more power.": first(0.5) - 1,
        "You counted the timesteps after it: the first is asked for.": (table < 0.5).sum(),
    }
    return Trial((table,), first(0.5), slips)


@check
def check_open_share(draw: Draw) -> Trial:
    """Check open_share(rho): the share of samples whose gate, eq. 9, is open: rho < 1; (B,)."""
    below, above = draw.uniform(-0.5, 0.9, 3), draw.uniform(1.1, 2.0, 4)
    rho = torch.cat([below, above, torch.ones(2).double()])
    rho = rho[torch.randperm(9, generator=draw.generator)]
    slips = {
        "That is the share of shut gates: SuDe works where rho < 1.": (rho >= 1).double().mean(),
        "At rho = 1 the gate is shut: eq. 9 stops L_sude <= tau.": (rho <= 1).double().mean(),
        "Those are past their category: SuDe is open on the others.": (rho > 1).double().mean(),
        "You averaged rho first: every sample has a gate of its own.": rho.mean() < 1,
        "That is how many gates are open; the share is asked for.": (rho < 1).sum(),
    }
    return Trial((rho,), (rho < 1).double().mean(), slips)


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


STEP_SLIPS = {
    "still": "Nothing moved: after `loss.backward()` comes `optimizer.step()`.",
    "no zero": "Old gradients are still there: `optimizer.zero_grad()` before `loss.backward()`.",
    "eps first": "Draw t first and eps second, so that your numbers and ours are the same.",
    "x_0": "Your network learns x_0; it is to predict eps, the noise that was added.",
    "x_t": "Your network learns x_t, which it is given; it is to predict eps.",
    "one t": "Every sample needs a t of its own: draw B of them.",
    "sum": "You summed the squares: their mean is asked for (a sum moves as many times as far).",
    "ascent": "It climbs: minimise the loss, do not turn its sign.",
}
"""What is said of `step_of_training(slip)`, by the slip."""


@check
def check_training_step(draw: Draw) -> Trial:
    """Check training_step(model, optimizer, x_0, schedule, generator), eq. 3 in eps-space."""
    x_0 = torch.tensor([[0.9, -0.4, 0.1, -0.8]]).expand(8, 4)

    def after(step: Answer) -> Tensor:
        return weights_after(step, TinyDenoiser(seed=draw.seed), draw, (x_0, short_schedule()))

    slips = named(lambda slip: after(step_of_training(slip)), STEP_SLIPS)
    return Trial(after, after(step_of_training()), slips)


def weights_after(
    step: Answer, model: nn.Module, draw: Draw, between: Sequence[Any], asked: Sequence[Any] = ()
) -> Tensor:
    """Return weights, (P,), after three step(model, *asked, optimizer, *between, generator)."""
    optimizer, generator = torch.optim.SGD(model.parameters(), lr=0.1), draw.fresh()
    for _ in range(3):
        ask(step, model, *asked, optimizer, *between, generator)
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def step_of_training(
    slip: str = "", sude: Callable[[Tensor, Tensor, Tensor, float], Tensor] | None = None
) -> Answer:
    """Return a step on eq. 3, or a slip of it; sude(eps_sub, x_t, t, w_s) adds to its loss."""

    def step(model: Any, optimizer: Any, x_0: Tensor, schedule: Schedule, *rest: Any) -> Tensor:
        *weight, generator = rest
        early = torch.randn(x_0.shape, generator=generator) if slip == "eps first" else None
        count = (1,) if slip == "one t" else (len(x_0),)
        t = torch.randint(schedule.num_timesteps, count, generator=generator).expand(len(x_0))
        eps = torch.randn(x_0.shape, generator=generator) if early is None else early
        x_t = add_noise(x_0, eps, t, schedule)
        prediction = model(x_t, t)
        squares = (prediction - {"x_0": x_0, "x_t": x_t}.get(slip, eps)) ** 2
        loss = squares.sum() if slip == "sum" else squares.mean()
        loss = loss + sude(prediction, x_t, t, *weight) if sude else loss
        if slip != "no zero":
            optimizer.zero_grad()
        (-loss if slip == "ascent" else loss).backward()
        if slip != "still":
            optimizer.step()
        return loss.detach()

    return step


@check
def check_paired_gain(draw: Draw) -> Trial:
    """Check paired_gain(table): alignment that SuDe wins over plain, a Series by subject."""
    levels: Mapping[str, list[Any]] = {
        "subject": ["dog", "cat", "candle"],
        "seed": [0, 1],
        "variant": ["plain", "sude"],
        "attribute": [None, "a", "b", "c"],
        "image": [0, 1],
    }
    table = pd.MultiIndex.from_product(levels.values(), names=levels).to_frame(index=False)
    for measure in ("attribute_alignment", "subject_fidelity"):
        table[measure] = draw.rng.random(len(table))
    table = table.sample(frac=1.0, random_state=draw.seed, ignore_index=True)

    def gain(rows: pd.DataFrame, *keys: str, measure: str = "attribute_alignment") -> pd.Series:
        means = rows.groupby(["subject", *keys, "variant"])[measure].mean().unstack("variant")
        return means["sude"] - means["plain"]

    changed = table[table["attribute"].notna()]
    fidelity = gain(changed, measure="subject_fidelity")
    slips = {
        "Seeds of one subject are not subjects: one number a subject.": gain(changed, "seed"),
        "Plain minus SuDe: a gain is SuDe minus plain.": -gain(changed),
        "Rows without an attribute are pictures of the plain prompt: leave them out.": gain(table),
        "You gave the fidelity's gain: take attribute_alignment.": fidelity,
    }
    return Trial((table,), gain(changed), slips)
