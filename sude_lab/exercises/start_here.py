"""Checks of the exercises to lesson 00: noise, one training step, an open gate, a paired gain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from sude_lab.diffusion import Schedule, add_noise
from sude_lab.exercises.judging import Answer, Mistake, ask, judge
from sude_lab.exercises.worlds import (
    normal,
    short_schedule,
    stable_diffusion_schedule,
    uniform,
)


def check_noised(answer: Answer, *, seed: int = 0) -> None:
    """Check noised(x_0, eps, abar) against eq. 1 of arXiv 2403.06775.

    x_0, eps: (B, C, h, w); abar: abar_t of each sample, (B,). B = w, so that an abar spread over
    the wrong axis raises no error and has to be noticed.

    Raises:
        Mistake: the answer is wrong.
    """
    g = torch.Generator().manual_seed(seed)
    x_0, eps = normal(g, 4, 3, 4, 4), normal(g, 4, 3, 4, 4)
    abar = uniform(g, 0.05, 0.95, 4).sort(descending=True).values
    a = abar.reshape(-1, 1, 1, 1)
    judge(
        ask(answer, x_0, eps, abar),
        add_noise(x_0, eps, torch.arange(4), Schedule(abar)),
        {
            "abar holds one number a sample, and you spread it over the last axis: reshape it to "
            "(B, 1, 1, 1).": abar.sqrt() * x_0 + (1 - abar).sqrt() * eps,
            "Eq. 1 weights with square roots: it is the variances, abar and 1 - abar, that add up "
            "to one.": a * x_0 + (1 - a) * eps,
            "You gave the picture the noise's weight, and the noise the picture's.": (
                (1 - a).sqrt() * x_0 + a.sqrt() * eps
            ),
            "The weight of the noise is sqrt(1 - abar), not 1 - sqrt(abar).": (
                a.sqrt() * x_0 + (1 - a.sqrt()) * eps
            ),
        },
    )


def check_even_time(answer: Answer, *, seed: int = 0) -> None:
    """Check even_time(alphas_cumprod): the first t at which noise has more power than the picture.

    1 - abar_t > abar_t, from arXiv 2403.06775, eq. 1. Seed 0 asks about Stable Diffusion's table,
    any other about a random one.

    Raises:
        Mistake: the answer is wrong.
    """
    table = stable_diffusion_schedule().alphas_cumprod
    if seed:
        g = torch.Generator().manual_seed(seed)
        table = uniform(g, 0.985, 1.0, 1000).cumprod(0)

    def first(below: float) -> Tensor:
        return (table < below).nonzero()[0, 0]

    judge(
        ask(answer, table),
        first(0.5),
        {
            "You compared the weights of eq. 1; power is their square, abar against 1 - abar.": (
                first(0.25)
            ),
            "One too late: timesteps count from 0, as the table's rows do.": first(0.5) + 1,
            "One too early: this is the last t at which the picture still has more power.": (
                first(0.5) - 1
            ),
            "You counted the timesteps after it: the first t below one half is asked for.": (
                (table < 0.5).sum()
            ),
        },
    )


def check_open_share(answer: Answer, *, seed: int = 0) -> None:
    """Check open_share(rho): the share of samples on which SuDe is still at work.

    A gate is open where rho < 1, see `sude_lab.losses.guidance_projection` (arXiv 2403.06775,
    eq. 9). rho: (B,), some exactly 1.

    Raises:
        Mistake: the answer is wrong.
    """
    g = torch.Generator().manual_seed(seed)
    rho = torch.cat([uniform(g, -0.5, 0.9, 3), uniform(g, 1.1, 2.0, 4), torch.ones(2).double()])
    rho = rho[torch.randperm(9, generator=g)]
    judge(
        ask(answer, rho),
        (rho < 1).double().mean(),
        {
            "That is the share of shut gates: SuDe works on a sample as long as rho < 1.": (
                (rho >= 1).double().mean()
            ),
            "At rho = 1 the gate is shut: eq. 9 stops a loss that is not above its threshold.": (
                (rho <= 1).double().mean()
            ),
            "Those with rho > 1 are past their category: SuDe is open on the others.": (
                (rho > 1).double().mean()
            ),
            "You averaged rho first: every sample has a gate of its own.": (
                (rho.mean() < 1).double()
            ),
            "That is how many gates are open; the share is asked for.": (rho < 1).sum().double(),
        },
    )


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


def check_training_step(answer: Answer, *, seed: int = 0) -> None:
    """Check training_step(model, optimizer, x_0, schedule, generator), one step of eq. 2 and 3.

    Draw t, then eps; minimise the mean of (eps_theta(x_t, t) - eps)^2: arXiv 2403.06775, eq. 3 in
    eps-space. Three steps are taken, and the weights after them compared.

    Raises:
        Mistake: the answer is wrong.
    """

    def after(step: Answer) -> Tensor:
        model = TinyDenoiser(seed=seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        generator = torch.Generator().manual_seed(seed)
        x_0 = torch.tensor([[0.9, -0.4, 0.1, -0.8]]).expand(8, 4)
        for _ in range(3):
            ask(step, model, optimizer, x_0, short_schedule(), generator)
        return nn.utils.parameters_to_vector(model.parameters()).detach()

    def untouched(*_: Any) -> int:
        return 0

    judge(
        after(answer),
        after(_training_step()),
        {
            "Nothing moved: after `loss.backward()` comes `optimizer.step()`.": after(untouched),
            "The gradients of earlier steps are still there: `optimizer.zero_grad()` before "
            "`loss.backward()`.": after(_training_step(zero_grad=False)),
            "Your network learns x_0; it is to predict eps, the noise that was added.": after(
                _training_step(target=lambda x_0, eps, x_t: x_0)
            ),
            "Your network learns x_t, which it is given; it is to predict eps.": after(
                _training_step(target=lambda x_0, eps, x_t: x_t)
            ),
            "Every sample needs a t of its own: draw B of them.": after(_training_step(one_t=True)),
            "Draw t first and eps second, so that your numbers and ours are the same.": after(
                _training_step(eps_first=True)
            ),
            "You summed the squares: their mean is asked for (a sum moves as many times as far).": (
                after(_training_step(mean=False))
            ),
        },
    )


def _training_step(
    *,
    target: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda x_0, eps, x_t: eps,
    zero_grad: bool = True,
    one_t: bool = False,
    eps_first: bool = False,
    mean: bool = True,
) -> Answer:
    """The step, and by its switches the slips that are made of it."""

    def step(
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        x_0: Tensor,
        schedule: Schedule,
        generator: torch.Generator,
    ) -> Tensor:
        if eps_first:
            eps = torch.randn(x_0.shape, generator=generator)
        count = (1,) if one_t else (len(x_0),)
        t = torch.randint(schedule.num_timesteps, count, generator=generator).expand(len(x_0))
        if not eps_first:
            eps = torch.randn(x_0.shape, generator=generator)
        x_t = add_noise(x_0, eps, t, schedule)
        squares = (model(x_t, t) - target(x_0, eps, x_t)) ** 2
        loss = squares.mean() if mean else squares.sum()
        if zero_grad:
            optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def check_paired_gain(answer: Answer, *, seed: int = 0) -> None:
    """Check paired_gain(table): how much alignment SuDe wins over plain tuning, a number a subject.

    A table as `sude_lab.world.subjects` writes it, a row a picture, with subject, seed, variant,
    attribute (missing for the plain prompt) and attribute_alignment; a Series by subject is asked
    for. No equation: the measure of arXiv 2403.06775, section 5, without unit.

    Raises:
        Mistake: the answer is wrong.
    """
    table = _study(np.random.default_rng(seed))

    def gain(rows: pd.DataFrame, keys: list[str]) -> pd.Series:
        means = rows.groupby([*keys, "variant"])["attribute_alignment"].mean().unstack("variant")
        return means["sude"] - means["plain"]

    asked = table[table["attribute"].notna()]
    right = gain(asked, ["subject"])
    given = ask(answer, table.copy())
    if not isinstance(given, pd.Series):
        raise Mistake(f"A pandas Series by subject is expected, not a {type(given).__name__}.")
    if given.index.nlevels == 1 and set(given.index) == set(right.index):
        given = given[right.index]

    def values(series: pd.Series) -> Tensor:
        return torch.as_tensor(series.to_numpy(dtype=float, copy=True))

    judge(
        values(given),
        values(right),
        {
            "Seeds of one subject are not subjects: average them, one number a subject.": values(
                gain(asked, ["subject", "seed"])
            ),
            "Plain minus SuDe: a gain is SuDe minus plain.": -values(right),
            "Rows without an attribute are pictures of the plain prompt, which asks for nothing "
            "that could be lost: leave them out.": values(gain(table, ["subject"])),
            "You gave the fidelity's gain: the column is attribute_alignment.": values(
                gain(
                    asked.assign(attribute_alignment=asked["subject_fidelity"]),
                    ["subject"],
                )
            ),
        },
    )


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
