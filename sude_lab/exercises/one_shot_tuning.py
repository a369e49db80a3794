"""Checks of the exercises to lesson 04: what is trained, drawn, kept, averaged, and one step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sude_lab.diffusion import Schedule, add_noise
from sude_lab.exercises.judging import Answer, Mistake, ask, choose, judge
from sude_lab.exercises.start_here import TinyDenoiser
from sude_lab.exercises.worlds import DOG, normal, short_schedule, things
from sude_lab.losses import sude_loss, sude_threshold

Prior = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def check_lora_count(answer: Answer, *, seed: int = 0) -> None:
    """Check lora_count(layers, rank): how many numbers LoRA trains beside layers of (out, in).

    W + B A with B (out, rank) and A (rank, in): rank (out + in) a layer, arXiv 2106.09685, sec. 4.

    Raises:
        Mistake: the answer is wrong.
    """
    g = torch.Generator().manual_seed(seed)
    sides = 8 * torch.randint(1, 12, (3, 2), generator=g) + torch.tensor([0, 8])
    layers, rank = [tuple(row) for row in sides.tolist()], 3 + seed
    out, into = sides.double().T
    judge(
        ask(answer, layers, rank),
        (rank * (out + into)).sum(),
        {
            "Those are the layers themselves; LoRA leaves them alone and trains B (out, rank) and "
            "A (rank, in).": (out * into).sum(),
            "B is (out, rank) and A is (rank, in): their sizes are added, not multiplied.": (
                rank * (out * into).sum()
            ),
            "B is missing: (out, rank).": (rank * into).sum(),
            "A is missing: (rank, in).": (rank * out).sum(),
            "Both matrices have `rank` as a side: rank (out + in).": (out + into).sum(),
            "That is the first layer alone: add them all up.": rank * (out + into)[0],
        },
    )


def check_must_keep(letter: str) -> None:
    """Check what a checkpoint must hold so that a resumed run ends the same, to the bit.

    Raises:
        Mistake: the letter is wrong.
    """
    choose(
        letter,
        "b",
        {
            "a": "AdamW divides by a running mean of squared gradients. With that forgotten, its "
            "first step after the break would be another one.",
            "c": "What step k draws follows from (seed, k) alone, see `tuning.step_generator`: "
            "there is no state of a generator to keep.",
            "d": "Those steps are done: what they drew is in the weights already.",
        },
    )


def check_latent_batch(answer: Answer, *, seed: int = 0) -> None:
    """Check latent_batch(mean, deviation, size, generator): latents drawn anew from an encoder.

    mean + deviation z, z ~ N(0, I), the x_0 of arXiv 2403.06775, eq. 1. mean, deviation: (C, h, w),
    float32. The result is (size, C, h, w).

    Raises:
        Mistake: the answer is wrong.
    """
    g = torch.Generator().manual_seed(seed)
    mean = torch.randn(2, 3, 3, generator=g)
    deviation = 0.1 + torch.rand(2, 3, 3, generator=g)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1))

    z = noise(4, 2, 3, 3)
    judge(
        ask(answer, mean, deviation, 4, torch.Generator().manual_seed(seed + 1)),
        mean + deviation * z,
        {
            "All samples got the same noise: draw (size, C, h, w) of it.": (
                (mean + deviation * noise(2, 3, 3)).expand(4, -1, -1, -1)
            ),
            "That is the mean, four times: nothing is drawn.": mean.expand(4, -1, -1, -1),
            "`deviation` is sigma, not sigma^2: no root.": mean + deviation.sqrt() * z,
            "`deviation` is sigma already: do not square it.": mean + deviation**2 * z,
            "The noise has deviation 1 here: multiply it with `deviation`.": mean + z,
            "The mean is missing: these lie around 0.": deviation * z,
        },
    )


def check_smoothed(answer: Answer, *, seed: int = 0) -> None:
    """Check smoothed(losses, decay): an exponential moving average without a bias at its start.

    m_k = decay m_{k-1} + (1 - decay) loss_k, m_0 = 0, and then m_k / (1 - decay^k), k = 1, 2, ...;
    arXiv 1412.6980, section 3. losses: (K,). The result is (K,).

    Raises:
        Mistake: the answer is wrong.
    """
    losses = 1 + normal(torch.Generator().manual_seed(seed), 7).abs()
    decay = 0.8

    def average(start: Tensor, keep: float, corrected_by: float = 0.0) -> Tensor:
        mean, rows = start, []
        for k, loss in enumerate(losses, start=1):
            mean = keep * mean + (1 - keep) * loss
            rows.append(mean / (1 - corrected_by**k))
        return torch.stack(rows)

    zero = torch.zeros(()).double()
    right = average(zero, decay, decay)
    judge(
        ask(answer, losses, decay),
        right,
        {
            "It starts near 0, where m_0 is: divide by 1 - decay^k.": average(zero, decay),
            "The first loss fills the whole past: start at 0 and divide by 1 - decay^k.": (
                average(losses[0], decay)
            ),
            "The old mean keeps the share `decay`, the new loss adds the rest: exchanged.": (
                average(zero, 1 - decay, decay)
            ),
            "You exchanged `decay` and 1 - `decay` throughout: the old mean keeps `decay`.": (
                average(zero, 1 - decay, 1 - decay)
            ),
            "The shares are exchanged, the old mean keeps `decay`; and m_0 = 0 was no loss.": (
                average(zero, 1 - decay)
            ),
            "That is the mean of all steps so far: early ones should fade.": (
                losses.cumsum(0) / torch.arange(1, 8)
            ),
            "That is the last value; the whole curve is asked for.": right[-1],
        },
    )


def check_batch_loss(answer: Answer, *, seed: int = 0) -> None:
    """Check batch_loss(eps_sub, eps_class, eps_null, eps, weight_sude), eq. 10 of a batch.

    The mean over the batch of L_sub + w_s lambda_tau L_sude, arXiv 2403.06775, eq. 3 and 7-10 in
    eps-space with the `simple` weighting, every square a mean over dimensions. All (B, C, h). No
    gradient flows into the class and the null prediction.

    Raises:
        Mistake: the answer is wrong.
    """
    g = torch.Generator().manual_seed(seed)
    eps, eps_null, d, noise = (normal(g, 4, 3, 2) for _ in range(4))
    along = torch.tensor([-0.5, 0.4, 0.8, 1.6]).double().reshape(4, 1, 1)
    eps_class, eps_sub = eps_null + d, eps_null + along * d + 0.1 * noise
    half = torch.full((4,), 0.5).double()  # eq. 7 with the weight 1
    dims = 6

    def parts(one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
        return sude_loss(eps_sub, one, two, half) / dims, sude_threshold(one, two, half) / dims

    learn = (eps_sub - eps).square().flatten(1).mean(1)
    loss, tau = parts(eps_class, eps_null)
    swapped, _ = parts(eps_null, eps_class)
    right = (learn + 0.7 * loss * (loss > tau)).mean()
    judge(
        ask(answer, eps_sub, eps_class, eps_null, eps, 0.7),
        right,
        {
            "All gates stood open: compare every sample's L_sude with its own tau (eq. 9), not the "
            "batch's mean.": (learn + 0.7 * loss).mean(),
            "The gate is the wrong way round: it is open where L_sude > tau.": (
                (learn + 0.7 * loss * (loss <= tau)).mean()
            ),
            "Class and no prompt are exchanged in L_sude.": (
                (learn + 0.7 * swapped * (swapped > tau)).mean()
            ),
            "w_s is lost.": (learn + loss * (loss > tau)).mean(),
            "That is L_sub alone, plain tuning.": learn.mean(),
            "L_sub is missing.": (0.7 * loss * (loss > tau)).mean(),
            "You summed the squares: they are to be means over the dimensions.": dims * right,
            "One number a sample: eq. 10 ends with the mean over the batch.": (
                learn + 0.7 * loss * (loss > tau)
            ),
        },
    )
    leaves = [x.clone().requires_grad_() for x in (eps_sub, eps_class, eps_null)]
    value = ask(lambda: answer(*leaves, eps, 0.7))  # as they are: a copy would be no leaf
    slopes: tuple[Tensor | None, ...] = (None, None, None)
    if isinstance(value, Tensor) and value.requires_grad:
        slopes = torch.autograd.grad(value, leaves, allow_unused=True)
    if slopes[0] is None:
        raise Mistake("The value is right, but no gradient reaches eps_sub, which learns.")
    if any(slope is not None and bool(slope.any()) for slope in slopes[1:]):
        raise Mistake(
            "The value is right, but a gradient reaches eps_class or eps_null: the bar over theta "
            "in eq. 7 means `.detach()`."
        )


def dog_prior(schedule: Schedule) -> Prior:
    """Return a perfect frozen model of lesson 02's world: eps for "dog" and for no prompt.

    (x_t, t) -> (eps_class, eps_null), (B, 2) each, in the dtype of x_t: the two predictions with a
    bar in arXiv 2403.06775, eq. 7.
    """
    world, _ = things()

    def prior(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        wide = x_t.double()
        return world.eps(wide, t, schedule, DOG).to(x_t), world.eps(wide, t, schedule).to(x_t)

    return prior


def check_sude_step(answer: Answer, *, seed: int = 0) -> None:
    """Check sude_step(model, prior, optimizer, x_0, schedule, weight_sude, generator).

    One step on arXiv 2403.06775, eq. 10 (no regulariser): draw t, then eps; ask the model and the
    prior at the same (x_t, t). Three steps are taken, and the weights after them compared.

    Raises:
        Mistake: the answer is wrong.
    """
    schedule = short_schedule()

    def after(step: Answer) -> Tensor:
        model = TinyDenoiser(pixels=2, hidden=16, seed=seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        generator = torch.Generator().manual_seed(seed)
        x_0 = torch.tensor([[-1.2, 1.2]]).expand(8, 2)
        for _ in range(3):
            ask(step, model, dog_prior(schedule), optimizer, x_0, schedule, 2.0, generator)
        return nn.utils.parameters_to_vector(model.parameters()).detach()

    def untouched(*_: Any) -> int:
        return 0

    judge(
        after(answer),
        after(_sude_step()),
        {
            "Nothing moved: after `loss.backward()` comes `optimizer.step()`.": after(untouched),
            "The gradients of earlier steps are still there: `optimizer.zero_grad()`.": (
                after(_sude_step(zero_grad=False))
            ),
            "The prior answers (eps_class, eps_null), in this order: you exchanged them.": (
                after(_sude_step(swapped=True))
            ),
            "SuDe does nothing here: w_s is lost, or the prior was asked about x_0, not about x_t "
            "(of a clean dog it says “dog” at once, and every gate is shut).": (
                after(_sude_step(sude=False))
            ),
            "Draw t first and eps second, so that your numbers and ours are the same.": (
                after(_sude_step(eps_first=True))
            ),
        },
    )


def _sude_step(
    *,
    zero_grad: bool = True,
    swapped: bool = False,
    sude: bool = True,
    eps_first: bool = False,
) -> Answer:
    """The step, and by its switches the slips that are made of it."""

    def step(
        model: nn.Module,
        prior: Prior,
        optimizer: torch.optim.Optimizer,
        x_0: Tensor,
        schedule: Schedule,
        weight_sude: float,
        generator: torch.Generator,
    ) -> Tensor:
        if eps_first:
            eps = torch.randn(x_0.shape, generator=generator)
        t = torch.randint(schedule.num_timesteps, (len(x_0),), generator=generator)
        if not eps_first:
            eps = torch.randn(x_0.shape, generator=generator)
        x_t = add_noise(x_0, eps, t, schedule)
        eps_class, eps_null = prior(x_t, t)
        if swapped:
            eps_class, eps_null = eps_null, eps_class
        eps_sub = model(x_t, t)
        half = torch.full((len(x_0),), 0.5)
        loss = sude_loss(eps_sub, eps_class, eps_null, half)
        gated = loss * (loss > sude_threshold(eps_class, eps_null, half)) / x_0[0].numel()
        learn = (eps_sub - eps).square().mean()
        total = learn + (weight_sude if sude else 0.0) * gated.mean()
        if zero_grad:
            optimizer.zero_grad()
        total.backward()
        optimizer.step()
        return total.detach()

    return step
