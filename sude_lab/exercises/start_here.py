"""Checks of the exercises to lesson 00: noise, one training step, an open gate, a paired gain."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from sude_lab.diffusion import Schedule, add_noise
from sude_lab.exercises.judging import Answer, Trial, ask, check, judge, twice
from sude_lab.exercises.worlds import normal, short_schedule, stable_diffusion_schedule, uniform


@check
def check_noised(seed: int) -> Trial:
    """Check noised(x_0, eps, abar) against eq. 1 of arXiv 2403.06775.

    x_0, eps: (B, C, h, w); abar: abar_t of each sample, (B,). B = w, so that an abar spread over
    the wrong axis raises no error and has to be noticed.
    """
    g = torch.Generator().manual_seed(seed)
    x_0, eps = normal(g, 4, 3, 4, 4), normal(g, 4, 3, 4, 4)
    abar = uniform(g, 0.05, 0.95, 4).sort(descending=True).values
    a = abar.reshape(-1, 1, 1, 1)
    slips = {
        "abar holds one number a sample, and you spread it over the last axis: reshape it to (B, "
        "1, 1, 1).": abar.sqrt() * x_0 + (1 - abar).sqrt() * eps,
        "Eq. 1 weights with square roots: it is the variances, abar and 1 - abar, that add up to "
        "one.": a * x_0 + (1 - a) * eps,
        "You gave picture and noise each other's weight.": (1 - a).sqrt() * x_0 + a.sqrt() * eps,
        "The noise has sqrt(1 - abar), not 1 - sqrt(abar).": a.sqrt() * x_0 + (1 - a.sqrt()) * eps,
    }
    return Trial((x_0, eps, abar), add_noise(x_0, eps, torch.arange(4), Schedule(abar)), slips)


@check
def check_even_time(seed: int) -> Trial:
    """Check even_time(alphas_cumprod): the first t at which noise has more power than the picture.

    1 - abar_t > abar_t, from arXiv 2403.06775, eq. 1. Seed 0 asks about Stable Diffusion's table,
    any other about a random one.
    """
    table = stable_diffusion_schedule().alphas_cumprod
    if seed:
        g = torch.Generator().manual_seed(seed)
        table = uniform(g, 0.985, 1.0, 1000).cumprod(0)

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
def check_open_share(seed: int) -> Trial:
    """Check open_share(rho): the share of samples on which SuDe is still at work.

    A gate is open where rho < 1, see `sude_lab.losses.guidance_projection` (arXiv 2403.06775,
    eq. 9). rho: (B,), some exactly 1.
    """
    g = torch.Generator().manual_seed(seed)
    rho = torch.cat([uniform(g, -0.5, 0.9, 3), uniform(g, 1.1, 2.0, 4), torch.ones(2).double()])
    rho = rho[torch.randperm(9, generator=g)]
    slips = {
        "That is the share of shut gates: SuDe works where rho < 1.": (rho >= 1).double().mean(),
        "At rho = 1 the gate is shut: eq. 9 stops L_sude <= tau.": (rho <= 1).double().mean(),
        "Those are past their category: SuDe is open on the others.": (rho > 1).double().mean(),
        "You averaged rho first: every sample has a gate of its own.": (rho.mean() < 1).double(),
        "That is how many gates are open; the share is asked for.": (rho < 1).sum().double(),
    }
    return Trial((rho,), (rho < 1).double().mean(), slips)


class TinyDenoiser(nn.Module):
    """A noise network for pictures of a few pixels: eps_theta(x_t, t), (B, D) -> (B, D).

    The epsilon form of x_theta in arXiv 2403.06775, eq. 2. Two layers, float32, the same weights
    for the same seed.
    """

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


@twice
def check_training_step(answer: Answer, *, seed: int = 0) -> None:
    """Check training_step(model, optimizer, x_0, schedule, generator), one step of eq. 2 and 3.

    Draw t, then eps; minimise the mean of (eps_theta(x_t, t) - eps)^2: arXiv 2403.06775, eq. 3 in
    eps-space. Three steps are taken, and the weights after them compared.
    """

    def after(step: Answer) -> Tensor:
        x_0 = torch.tensor([[0.9, -0.4, 0.1, -0.8]]).expand(8, 4)
        return weights_after(step, TinyDenoiser(seed=seed), seed, (x_0, short_schedule()))

    judge(
        after(answer),
        after(step_of_training()),
        slips_of_a_step(after, step_of_training, STEP_SLIPS),
    )


STEP_SLIPS = {
    "no zero": "The gradients of earlier steps are still there: `optimizer.zero_grad()` before "
    "`loss.backward()`.",
    "eps first": "Draw t first and eps second, so that your numbers and ours are the same.",
    "x_0": "Your network learns x_0; it is to predict eps, the noise that was added.",
    "x_t": "Your network learns x_t, which it is given; it is to predict eps.",
    "one t": "Every sample needs a t of its own: draw B of them.",
    "sum": "You summed the squares: their mean is asked for (a sum moves as many times as far).",
    "ascent": "It climbs: minimise the loss, do not turn its sign.",
}
"""What is said of `step_of_training(slip)`, by the slip."""


def weights_after(step: Answer, model: nn.Module, seed: int, between: tuple[Any, ...]) -> Tensor:
    """Return a model's weights, (P,), after three calls of an answer's training step.

    It is called as step(model, optimizer, *between, generator), plain descent with the rate 0.1.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        ask(step, model, optimizer, *between, generator)
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def slips_of_a_step(
    after: Callable[[Answer], Tensor], step: Callable[[str], Answer], slips: Mapping[str, str]
) -> dict[str, Tensor]:
    """Return the weights after a step's slips, by what to say."""
    still = "Nothing moved: after `loss.backward()` comes `optimizer.step()`."
    return {still: after(lambda *_: 0)} | {says: after(step(slip)) for slip, says in slips.items()}


def step_of_training(
    slip: str = "", sude: Callable[[Tensor, Tensor, Tensor, float], Tensor] | None = None
) -> Answer:
    """Return a step on eq. 3, or a slip of it; sude(eps_sub, x_t, t, w_s) adds to its loss."""

    def step(
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        x_0: Tensor,
        schedule: Schedule,
        *rest: Any,
    ) -> Tensor:
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
        optimizer.step()
        return loss.detach()

    return step


@check
def check_paired_gain(seed: int) -> Trial:
    """Check paired_gain(table): how much alignment SuDe wins over plain tuning, a number a subject.

    A table as `sude_lab.world.subjects` writes it, a row a picture, with subject, seed, variant,
    attribute (missing for the plain prompt) and attribute_alignment; a Series by subject is asked
    for. No equation: the measure of arXiv 2403.06775, section 5, without unit.
    """
    table = _study(np.random.default_rng(seed))

    def gain(rows: pd.DataFrame, keys: list[str]) -> pd.Series:
        means = rows.groupby([*keys, "variant"])["attribute_alignment"].mean().unstack("variant")
        return means["sude"] - means["plain"]

    changed = table[table["attribute"].notna()]
    right = gain(changed, ["subject"])
    fidelity = changed.assign(attribute_alignment=changed["subject_fidelity"])
    slips = {
        "Seeds of one subject are not subjects: average them, one number a subject.": (
            gain(changed, ["subject", "seed"])
        ),
        "Plain minus SuDe: a gain is SuDe minus plain.": -right,
        "Rows without an attribute are pictures of the plain prompt, which asks for nothing that "
        "could be lost: leave them out.": gain(table, ["subject"]),
        "You gave the fidelity's gain: take attribute_alignment.": gain(fidelity, ["subject"]),
    }
    return Trial((table,), right, slips)


def _study(random: np.random.Generator) -> pd.DataFrame:
    """A study's table with numbers of no meaning: 3 subjects, 2 seeds, 2 variants, 8 pictures."""
    keys = pd.MultiIndex.from_product(
        [["dog", "cat", "candle"], [0, 1], ["plain", "sude"], [None, "a", "b", "c"], range(2)],
        names=["subject", "seed", "variant", "attribute", "image"],
    )
    table = keys.to_frame(index=False)
    table["attribute_alignment"] = random.random(len(table))
    table["subject_fidelity"] = random.random(len(table))
    return table.sample(frac=1.0, random_state=int(random.integers(2**31)), ignore_index=True)
