"""SuDe itself: the two questions of eq. 5, what follows from the answers (eq. 7-9), and a plug.

    uncond, category = ask(predict, x_t, t, null, dog)              # eq. 5, in one call
    terms = sude_terms(output, category, uncond, x_t, t, schedule)  # eq. 7-9

`ask` is the only asker of this library. The plug, `SudeRegularizer`, is for anyone's loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from sude_lab.backbone import Condition, concatenate
from sude_lab.diffusion import Schedule
from sude_lab.errors import UserError
from sude_lab.frozen import FrozenUNet, require_silent
from sude_lab.losses import (
    gate,
    guidance_projection,
    output_weight,
    sude_loss,
    sude_threshold,
    truncate,
)

Predict = Callable[[Tensor, Tensor, Condition], Tensor]
"""What a model outputs for x_t, t and a condition, rows beside rows."""


@torch.no_grad()
def ask(
    predict: Predict, x_t: Tensor, t: Tensor, uncond: Condition, category: Condition
) -> tuple[Tensor, Tensor]:
    """Ask a model eq. 5's two questions in one batched call: no condition, and the category.

    p(c_cate | x_{t-1}) ~ p(x_{t-1} | x_t, c_cate) / p(x_{t-1} | x_t), arXiv 2403.06775, eq. 5:
    numerator and denominator are the same network's, asked twice.

    Args: x_t: (B, ...); t: (B,); uncond, category: one row each, or B. Returns the model outputs
    for no condition and for the category, (B, ...) each, without gradients.
    """
    both = concatenate([uncond.expand(len(x_t)), category.expand(len(x_t))])
    null_output, class_output = predict(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
    return null_output, class_output


@dataclass(frozen=True)
class SudeTerms:
    """What SuDe says of a batch, (B,) each; losses are means over the latent's dimensions."""

    loss: Tensor
    """L_sude, eq. 7."""
    threshold: Tensor
    """tau_t, eq. 8."""
    gated: Tensor
    """lambda_tau L_sude, eq. 9; L_sude itself where truncation is off."""
    gate: Tensor
    """lambda_tau, eq. 9, bool."""
    rho: Tensor
    """How far the subject follows its category's direction; eq. 9 stops it at 1."""


def sude_terms(
    output_subject: Tensor,
    output_class: Tensor,
    output_uncond: Tensor,
    x_t: Tensor,
    t: Tensor,
    schedule: Schedule,
    *,
    weighting: str = "reference",
    truncated: bool = True,
    truncate_at: float = 1.0,
) -> SudeTerms:
    """Return eq. 7-9 of arXiv 2403.06775 for three model outputs at the same (x_t, t).

    Computed in the network's own output space (eps, x_0 or v): at fixed x_t the mean is an affine
    map of the output, so the loss is the same, no digits are lost (see `sude_lab.losses`), and v
    has a value at zero terminal SNR. Every term is divided by the number of the output's
    dimensions, as the usual MSE is.

    Args: outputs (B, ...) as the schedule's prediction type has them; only `output_subject`
    receives a gradient. t: LongTensor (B,). truncate_at: the rho that shuts the gate, 1 in the
    paper: since L_sude - tau_t = -2 tau_t (1 - rho), the gate shuts at (2 truncate_at - 1) tau_t.

    Raises:
        ValueError: shapes disagree, or the weighting is unknown or has no value at t.
    """
    if len(x_t) != len(output_subject):
        raise ValueError(f"x_t has {len(x_t)} rows, the model's output {len(output_subject)}.")
    dims = math.prod(output_subject.shape[1:])
    # A weight of 0 (t = 0 with `exact`) becomes an infinite variance: no loss, shut gate.
    variance = 0.5 / output_weight(t, schedule, weighting).to(output_subject.dtype)
    loss = sude_loss(output_subject, output_class, output_uncond, variance) / dims
    tau = sude_threshold(output_class, output_uncond, variance) / dims
    limit = (2 * truncate_at - 1) * tau
    return SudeTerms(
        loss,
        tau,
        truncate(loss, limit) if truncated else loss,
        gate(loss, limit),
        guidance_projection(output_subject, output_class, output_uncond),
    )


class SudeRegularizer:
    """The SuDe loss for a training loop of one's own; no part of sude_lab's tuning is needed.

    Make it when everything that is trained is in place (parts frozen and opened, adapters added,
    `accelerator.prepare` called) and before any checkpoint is loaded; call it with what the loop
    has anyway.

    Args:
        unet: the model that is being tuned; plain, with peft adapters, or wrapped by Accelerate.
        scheduler: the diffusers scheduler of the loop, asked anew at every call, or a `Schedule`;
            of flow matching it is the training's table that counts, whatever was drawn since.
        class_embeds: the text encoder's output for "photo of a dog", (1, L, D), or a `Condition`
            (SDXL).
        uncond_embeds: the same for "".
        prior: `pretrained` asks the model as it is when this object is made (a copy of the weights
            that require gradients is kept; none for LoRA, whose adapters are switched off for the
            question); `current` asks it as it is by then; a callable is asked in its place.
        weighting: exact, simple or reference, see `sude_lab.losses.sude_weight`.
        truncated: whether eq. 9 stops a sample that is as sure of its category as the category.
        truncate_at: the rho at which it stops; the paper's threshold is 1.
        every: ask in every k-th call alone, beginning with the first, and return k times the loss;
            the other calls return zeros. `calls` counts them.
        call: asks a model that is not called as a UNet is: called with the model, x_t, the loop's
            timesteps and a `Condition`; `sude_lab.adapters` has one for each family.

    Raises:
        UserError: the UNet cannot be kept as it is (see `FrozenUNet`), or at a call: it has been
            changed since.
    """

    def __init__(
        self,
        unet: Any,
        scheduler: Any,
        class_embeds: Tensor | Condition,
        uncond_embeds: Tensor | Condition,
        *,
        prior: Literal["pretrained", "current"] | Callable[..., Any] = "pretrained",
        weighting: Literal["exact", "simple", "reference"] = "reference",
        truncated: bool = True,
        truncate_at: float = 1.0,
        every: int = 1,
        call: Callable[[Any, Tensor, Tensor, Condition], Any] | None = None,
    ) -> None:
        if prior not in ("pretrained", "current") and not callable(prior):
            raise ValueError(f"prior must be 'pretrained', 'current' or a callable, got {prior!r}.")
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}.")
        self.scheduler, self.call = scheduler, call
        self.weighting, self.truncated, self.truncate_at = weighting, truncated, truncate_at
        self.every, self.calls = every, 0
        self._read: tuple[Any, ...] | None = None
        bare = getattr(unet, "module", unet)  # wrapped for several processes
        bare = getattr(bare, "_orig_mod", bare)  # compiled
        is_xl = getattr(getattr(bare, "config", None), "addition_embed_type", None) == "text_time"
        self.uncond = _condition(uncond_embeds, is_xl)
        self.category = _condition(class_embeds, is_xl)
        self.model: Callable[..., Any] = prior if callable(prior) else unet
        if prior == "pretrained":
            self.model = FrozenUNet(bare)
            require_silent(bare)

    def schedule(self, device: torch.device) -> Schedule:
        """Return the schedule as the loop's scheduler has it now; a changed one is read anew."""
        scheduler = self.scheduler
        table = getattr(scheduler, "alphas_cumprod", None)
        now = (id(table), getattr(table, "_version", 0), getattr(scheduler, "config", None), device)
        if self._read is None or self._read[0] != now:
            if not isinstance(scheduler, Schedule):
                scheduler = Schedule.from_scheduler(scheduler)
            self._read = now, scheduler.to(device), table  # kept, so that its id is no other's
        schedule: Schedule = self._read[1]
        return schedule

    def _predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        if self.call is None:
            output = self.model(x_t, t, **condition.arguments)
        else:
            output = self.call(self.model, x_t, t, condition)
        output = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
        return output.float()

    def terms(
        self,
        x_t: Tensor,
        t: Tensor,
        model_output: Tensor,
        class_embeds: Tensor | Condition | None = None,
    ) -> SudeTerms:
        """Return L_sude, tau_t, the gate and rho of a batch, for logging."""
        if isinstance(self.model, FrozenUNet):
            self.model.check()
        category = self.category if class_embeds is None else _condition(class_embeds)
        n, classes = len(model_output), len(category)
        if (len(x_t), tuple(t.shape)) != (n, (n,)) or classes not in (1, n):
            rows = f"x_t has {len(x_t)} rows, t the shape {tuple(t.shape)}, the class {classes}"
            half = "with prior preservation hand over the subject's half of each, x_t[:n] and t[:n]"
            raise UserError(f"{rows} and the model's output {n}: {half}.")
        schedule = self.schedule(x_t.device)
        if t.is_floating_point() and schedule.sigmas is None:
            edm = "a loop in EDM's style; leave --do_edm_style_training out"
            raise UserError(f"t holds no numbers of steps, and eq. 7 has no value there: {edm}.")
        # Made before the loop moved its models, or in the precision of a text encoder.
        uncond, category = (c.map(partial(_beside, x_t)) for c in (self.uncond, category))
        uncond_output, class_output = ask(self._predict, x_t, t, uncond, category)
        return sude_terms(
            *(model_output.float(), class_output, uncond_output, x_t.float()),
            *(schedule.from_time(t), schedule),
            weighting=self.weighting,
            truncated=self.truncated,
            truncate_at=self.truncate_at,
        )

    def __call__(
        self,
        x_t: Tensor,
        t: Tensor,
        model_output: Tensor,
        class_embeds: Tensor | Condition | None = None,
    ) -> Tensor:
        """Return the truncated SuDe loss of each sample, (B,); weight it by w_s and average it.

        Args: x_t: what the model was given, (B, C, h, w). t: LongTensor (B,), or the times 1000 s
        of flow matching. model_output: the model's output for the subject's prompt, with its
        gradient. class_embeds: the categories' own, a row a sample, where the batch has several;
        None: those given at the beginning.
        """
        self.calls += 1
        if (self.calls - 1) % self.every:
            return torch.zeros(len(x_t), device=x_t.device)
        return self.every * self.terms(x_t, t, model_output, class_embeds).gated


def _beside(x_t: Tensor, part: Tensor) -> Tensor:
    """Return a part of a condition on the device of x_t and in its precision; counts stay."""
    return part.to(x_t) if part.is_floating_point() else part


def _condition(embeds: Tensor | Condition, is_xl: bool = False) -> Condition:
    condition = Condition(embeds) if isinstance(embeds, Tensor) else embeds
    right = isinstance(condition, Condition) and condition.hidden.ndim > 2
    if not right or (is_xl and (condition.pooled is None or condition.sizes is None)):
        parts = "prompt, pooled prompt and time_ids, of which the first two are zeros for no prompt"
        kinds = "a Tensor (1, L, D), and for SDXL a sude_lab.backbone.Condition"
        raise UserError(f"A prompt is {kinds} of {parts}.")
    return condition.map(Tensor.detach)
