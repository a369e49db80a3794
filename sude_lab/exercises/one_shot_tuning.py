"""Checks of the exercises to lesson 04: what is trained, drawn, kept, averaged, and one step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sude_lab.diffusion import Schedule
from sude_lab.exercises.judging import (
    Answer,
    Trial,
    ask,
    check,
    choice,
    judge,
    judge_gradients,
    twice,
)
from sude_lab.exercises.start_here import (
    STEP_SLIPS,
    TinyDenoiser,
    slips_of_a_step,
    step_of_training,
    weights_after,
)
from sude_lab.exercises.worlds import DOG, normal, short_schedule, things
from sude_lab.losses import sude_loss, sude_threshold

Prior = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@check
def check_lora_count(seed: int) -> Trial:
    """Check lora_count(layers, rank): how many numbers LoRA trains beside layers of (out, in).

    W + B A with B (out, rank) and A (rank, in): rank (out + in) a layer, arXiv 2106.09685, sec. 4.
    """
    g = torch.Generator().manual_seed(seed)
    sides = 8 * torch.randint(1, 6, (3, 2), generator=g) + torch.tensor([0, 48])
    layers, rank = [tuple(row) for row in sides.tolist()], 3 + seed % 7
    out, into = sides.double().T
    slips = {
        "Those are the layers themselves; LoRA leaves them alone and trains B (out, rank) and A "
        "(rank, in).": (out * into).sum(),
        "The sizes of A and B are added, not multiplied.": rank * (out * into).sum(),
        "B is missing: (out, rank).": (rank * into).sum(),
        "A is missing: (rank, in).": (rank * out).sum(),
        "Both matrices have `rank` as a side: rank (out + in).": (out + into).sum(),
        "That is the first layer alone: add them all up.": rank * (out + into)[0],
    }
    return Trial((layers, rank), (rank * (out + into)).sum(), slips)


check_must_keep = choice(
    "b",
    "what a checkpoint must hold so that a resumed run ends the same, to the bit.",
    {
        "a": "AdamW divides by a running mean of squared gradients. With that forgotten, its "
        "first step after the break would be another one.",
        "c": "What step k draws follows from (seed, k) alone, see `tuning.step_generator`: "
        "there is no state of a generator to keep.",
        "d": "Those steps are done: what they drew is in the weights already.",
    },
)


@check
def check_latent_batch(seed: int) -> Trial:
    """Check latent_batch(mean, deviation, size, generator): latents drawn anew from an encoder.

    mean + deviation z, z ~ N(0, I), the x_0 of arXiv 2403.06775, eq. 1. mean, deviation: (C, h, w),
    float32. The result is (size, C, h, w).
    """
    g = torch.Generator().manual_seed(seed)
    mean = torch.randn(2, 3, 3, generator=g)
    deviation = 0.1 + torch.rand(2, 3, 3, generator=g)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1))

    z = noise(4, 2, 3, 3)
    slips = {
        "All samples got the same noise: draw (size, C, h, w) of it.": (
            (mean + deviation * noise(2, 3, 3)).expand(4, -1, -1, -1)
        ),
        "That is the mean, four times: nothing is drawn.": mean.expand(4, -1, -1, -1),
        "`deviation` is sigma, not sigma^2: no root.": mean + deviation.sqrt() * z,
        "`deviation` is sigma already: do not square it.": mean + deviation**2 * z,
        "The noise has deviation 1 here: multiply it with `deviation`.": mean + z,
        "The mean is missing: these lie around 0.": deviation * z,
    }
    return Trial(
        (mean, deviation, 4, torch.Generator().manual_seed(seed + 1)), mean + deviation * z, slips
    )


@check
def check_smoothed(seed: int) -> Trial:
    """Check smoothed(losses, decay): an exponential moving average without a bias at its start.

    m_k = decay m_{k-1} + (1 - decay) loss_k, m_0 = 0, and then m_k / (1 - decay^k), k = 1, 2, ...;
    arXiv 1412.6980, section 3. losses: (K,). The result is (K,).
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
    slips = {
        "It starts near 0, where m_0 is: divide by 1 - decay^k.": average(zero, decay),
        "Start at 0, not at the first loss, and divide by 1 - decay^k.": average(losses[0], decay),
        "The old mean keeps `decay`: you exchanged the shares.": average(zero, 1 - decay, decay),
        "You exchanged `decay` and 1 - `decay` throughout: the old mean keeps `decay`.": (
            average(zero, 1 - decay, 1 - decay)
        ),
        "The shares are exchanged; and divide by 1 - decay^k.": average(zero, 1 - decay),
        "That is the mean so far: early ones should fade.": losses.cumsum(0) / torch.arange(1, 8),
        "That is the last value; the whole curve is asked for.": right[-1],
    }
    return Trial((losses, decay), right, slips)


@twice
def check_batch_loss(answer: Answer, *, seed: int = 0) -> None:
    """Check batch_loss(eps_sub, eps_class, eps_null, eps, weight_sude), eq. 10 of a batch.

    The mean over the batch of L_sub + w_s lambda_tau L_sude, arXiv 2403.06775, eq. 3 and 7-10 in
    eps-space with the `simple` weighting, every square a mean over dimensions. All (B, C, h). No
    gradient flows into the class and the null prediction.
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
            "The gate is the wrong way round: open is L_sude > tau.": (
                (learn + 0.7 * loss * (loss <= tau)).mean()
            ),
            "Class and null are exchanged.": (learn + 0.7 * swapped * (swapped > tau)).mean(),
            "w_s is lost.": (learn + loss * (loss > tau)).mean(),
            "That is L_sub alone, plain tuning.": learn.mean(),
            "L_sub is missing.": (0.7 * loss * (loss > tau)).mean(),
            "You summed the squares: they are to be means over the dimensions.": dims * right,
            "Eq. 10 ends with the mean over the batch.": learn + 0.7 * loss * (loss > tau),
        },
    )
    learning, fixed = {"eps_sub": eps_sub}, {"eps_class": eps_class, "eps_null": eps_null}
    judge_gradients(answer, learning, fixed, eps, 0.7)


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


@twice
def check_sude_step(answer: Answer, *, seed: int = 0) -> None:
    """Check sude_step(model, prior, optimizer, x_0, schedule, weight_sude, generator).

    One step on arXiv 2403.06775, eq. 10 (no regulariser): draw t, then eps; ask the model and the
    prior at the same (x_t, t). Three steps are taken, and the weights after them compared.
    """
    schedule = short_schedule()

    def after(step: Answer) -> Tensor:
        def ordered(model: Any, optimizer: Any, *between: Any) -> Any:
            return step(model, dog_prior(schedule), optimizer, *between)

        model = TinyDenoiser(pixels=2, hidden=16, seed=seed)
        x_0 = torch.tensor([[-1.2, 1.2]]).expand(8, 2)
        return weights_after(ordered, model, seed, (x_0, schedule, 2.0))

    def step(slip: str = "") -> Answer:
        def sude(eps_sub: Tensor, x_t: Tensor, t: Tensor, weight_sude: float) -> Tensor:
            eps_class, eps_null = dog_prior(schedule)(x_t, t)
            if slip == "swapped":
                eps_class, eps_null = eps_null, eps_class
            half = torch.full((len(x_t),), 0.5)
            loss = sude_loss(eps_sub, eps_class, eps_null, half)
            gated = loss * (loss > sude_threshold(eps_class, eps_null, half)) / x_t[0].numel()
            return {"plain": 0.0, "w_s": 1.0}.get(slip, weight_sude) * gated.mean()

        plain = step_of_training(slip, sude)
        return lambda model, prior, *between: plain(model, *between)

    slips = STEP_SLIPS | {
        "swapped": "The prior answers (eps_class, eps_null), in this order: you exchanged them.",
        "w_s": "w_s is not used: it weighs SuDe against the picture.",
        "plain": "SuDe does nothing here: w_s is lost, or the prior was asked about x_0, not about "
        "x_t (of a clean dog it says “dog” at once, and every gate is shut).",
    }
    judge(after(answer), after(step()), slips_of_a_step(after, step, slips))
