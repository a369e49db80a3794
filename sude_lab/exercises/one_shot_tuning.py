"""Checks of the exercises to lesson 04; equations of arXiv 2403.06775 unless named."""

from collections.abc import Callable

import torch
from torch import Tensor

from sude_lab.diffusion import Schedule
from sude_lab.exercises.judging import Answer, Draw, Trial, check, choice, named
from sude_lab.exercises.start_here import STEP_SLIPS, TinyDenoiser, step_of_training, weights_after
from sude_lab.exercises.worlds import DOG, short_schedule, things
from sude_lab.losses import sude_loss, sude_threshold

Prior = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@check
def check_lora_count(draw: Draw) -> Trial:
    """Check lora_count(layers, rank): the sum of rank (out + in), arXiv 2106.09685, sec. 4."""
    sides = 8 * torch.randint(1, 6, (3, 2), generator=draw.generator) + torch.tensor([0, 48])
    layers, rank = [tuple(row) for row in sides.tolist()], 3 + draw.seed % 7
    out, into = sides.double().T
    slips = {
        "Those are the layers themselves; LoRA leaves them alone and trains B and A.": out @ into,
        "The sizes of A and B are added, not multiplied.": rank * out @ into,
        "B is missing: (out, rank).": (rank * into).sum(),
        "A is missing: (rank, in).": (rank * out).sum(),
        "Both matrices have `rank` as a side: rank (out + in).": (out + into).sum(),
        "That is the first layer alone: add them all up.": rank * (out + into)[0],
    }
    return Trial((layers, rank), (rank * (out + into)).sum(), slips)


check_must_keep = choice(
    "b",
    "what a checkpoint must hold so that a resumed run ends the same, to the bit.",
    a="AdamW divides by a running mean of squared gradients: forgotten, its next step differs.",
    c="What step k draws follows from (seed, k) alone, see `tuning.step_generator`.",
    d="Those steps are done: what they drew is in the weights already.",
)


@check
def check_latent_batch(draw: Draw) -> Trial:
    """Check latent_batch(mean, deviation, size, generator): mean + deviation z, x_0 of eq. 1."""
    mean = torch.randn(2, 3, 3, generator=draw.generator)
    deviation = 0.1 + torch.rand(2, 3, 3, generator=draw.generator)
    z = torch.randn(4, 2, 3, 3, generator=draw.fresh(1))
    one = mean + deviation * torch.randn(2, 3, 3, generator=draw.fresh(1))
    slips = {
        "All samples got the same noise: draw (size, C, h, w) of it.": one.expand(4, -1, -1, -1),
        "That is the mean, four times: nothing is drawn.": mean.expand(4, -1, -1, -1),
        "`deviation` is sigma, not sigma^2: no root.": mean + deviation.sqrt() * z,
        "`deviation` is sigma already: do not square it.": mean + deviation**2 * z,
        "The noise has deviation 1 here: multiply it with `deviation`.": mean + z,
        "The mean is missing: these lie around 0.": deviation * z,
    }
    return Trial((mean, deviation, 4, draw.fresh(1)), mean + deviation * z, slips)


@check
def check_smoothed(draw: Draw) -> Trial:
    """Check smoothed(losses, decay): m_k / (1 - decay^k), arXiv 1412.6980, sec. 3; (K,)."""
    losses, decay = 1 + draw.normal(7).abs(), 0.8

    def average(start: float, keep: float, corrected_by: float = 0.0) -> Tensor:
        mean, rows = torch.tensor(start).double(), []
        for k, loss in enumerate(losses, start=1):
            mean = keep * mean + (1 - keep) * loss
            rows.append(mean / (1 - corrected_by**k))
        return torch.stack(rows)

    right, first = average(0, decay, decay), float(losses[0])
    slips = {
        "It starts near 0, where m_0 is: divide by 1 - decay^k.": average(0, decay),
        "Start at 0, not at the first loss, and divide by 1 - decay^k.": average(first, decay),
        "The old mean keeps `decay`: you exchanged the shares.": average(0, 1 - decay, decay),
        "You exchanged `decay` and 1 - `decay` throughout.": average(0, 1 - decay, 1 - decay),
        "The shares are exchanged; and divide by 1 - decay^k.": average(0, 1 - decay),
        "That is the mean so far: early ones should fade.": losses.cumsum(0) / torch.arange(1, 8),
        "That is the last value; the whole curve is asked for.": right[-1],
    }
    return Trial((losses, decay), right, slips)


@check
def check_batch_loss(draw: Draw) -> Trial:
    """Check batch_loss(eps_sub, eps_class, eps_null, eps, weight_sude), eq. 10 in eps-space."""
    eps, eps_null, d, noise = (draw.normal(4, 3, 2) for _ in range(4))
    along = torch.tensor([-0.5, 0.4, 0.8, 1.6]).double().reshape(4, 1, 1)
    eps_class, eps_sub = eps_null + d, eps_null + along * d + 0.1 * noise
    half = torch.full((4,), 0.5).double()  # eq. 7 with the weight 1
    learn, weight = (eps_sub - eps).square().flatten(1).mean(1), 0.7
    loss = sude_loss(eps_sub, eps_class, eps_null, half) / 6
    swapped = sude_loss(eps_sub, eps_null, eps_class, half) / 6
    tau = sude_threshold(eps_class, eps_null, half) / 6
    gated = loss * (loss > tau)

    def total(sude: Tensor) -> Tensor:
        return learn + weight * sude

    right = total(gated).mean()
    slips = {
        "All gates stood open: compare each L_sude with its own tau, eq. 9.": total(loss).mean(),
        "The gate is the wrong way round: open is L_sude > tau.": total(loss - gated).mean(),
        "Class and null are exchanged.": total(swapped * (swapped > tau)).mean(),
        "w_s is lost.": (learn + gated).mean(),
        "That is L_sub alone, plain tuning.": learn.mean(),
        "L_sub is missing.": weight * gated.mean(),
        "You summed the squares: they are to be means over the dimensions.": 6 * right,
        "Eq. 10 ends with the mean over the batch.": total(gated),
    }
    call = (eps_sub, eps_class, eps_null, eps, weight)
    return Trial(call, right, slips, learns=("eps_sub",), fixed=("eps_class", "eps_null"))


def dog_prior(schedule: Schedule) -> Prior:
    """Return lesson 02's perfect frozen model, (x_t, t) -> (eps_class, eps_null), (B, 2)."""
    world, _ = things()

    def prior(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        wide = x_t.double()
        return world.eps(wide, t, schedule, DOG).to(x_t), world.eps(wide, t, schedule).to(x_t)

    return prior


@check
def check_sude_step(draw: Draw) -> Trial:
    """Check sude_step(model, prior, optimizer, x_0, schedule, weight_sude, generator), eq. 10."""
    schedule = short_schedule()

    def after(step: Answer) -> Tensor:
        model = TinyDenoiser(pixels=2, hidden=16, seed=draw.seed)
        x_0 = torch.tensor([[-1.2, 1.2]]).expand(8, 2)
        return weights_after(step, model, draw, (x_0, schedule, 2.0), [dog_prior(schedule)])

    def made(slip: str = "") -> Tensor:
        def sude(eps_sub: Tensor, x_t: Tensor, t: Tensor, weight_sude: float) -> Tensor:
            eps_class, eps_null = dog_prior(schedule)(x_t, t)[:: -1 if slip == "swapped" else 1]
            half = torch.full((len(x_t),), 0.5)
            loss = sude_loss(eps_sub, eps_class, eps_null, half)
            gated = loss * (loss > sude_threshold(eps_class, eps_null, half)) / x_t[0].numel()
            return {"plain": 0.0, "w_s": 1.0}.get(slip, weight_sude) * gated.mean()

        plain = step_of_training(slip, sude)
        return after(lambda model, prior, *between: plain(model, *between))

    slips = STEP_SLIPS | {
        "swapped": "The prior answers (eps_class, eps_null), in this order: you exchanged them.",
        "w_s": "w_s is not used: it weighs SuDe against the picture.",
        "plain": "SuDe does nothing here: w_s is lost, or the prior was asked about x_0, not x_t.",
    }
    return Trial(after, made(), named(made, slips))
