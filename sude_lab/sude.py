"""SuDe as a plug: eq. 7-9 of one batch of predictions, for `tune()` and for anyone's loop.

sude = SudeRegularizer(unet, scheduler, embed("photo of a dog"), embed(""))   # before training
...
loss = loss + 0.4 * sude(noisy_latents, timesteps, model_pred).mean()         # in the loop
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sude_lab.backbone import Condition, FrozenUNet, concatenate
from sude_lab.diffusion import Schedule, to_eps
from sude_lab.losses import (
    gate,
    guidance_projection,
    sude_loss,
    sude_threshold,
    sude_weight,
    truncate,
)


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

    Computed in eps-space: at fixed x_t the mean is an affine map of eps, so the loss is the same
    and no digits are lost in differences of means (see `sude_lab.losses`). Every term is divided by
    the number of the latent's dimensions, as the usual MSE is.

    Args: outputs (B, ...) as the schedule's prediction type has them; only `output_subject`
    receives a gradient. t: LongTensor (B,). truncate_at: the rho that shuts the gate, 1 in the
    paper: since L_sude - tau_t = -2 tau_t (1 - rho), the gate shuts at (2 truncate_at - 1) tau_t.

    Raises:
        ValueError: shapes disagree, or the weighting is unknown.
    """
    eps_subject, eps_class, eps_uncond = (
        to_eps(output, x_t, t, schedule) for output in (output_subject, output_class, output_uncond)
    )
    dims = math.prod(x_t.shape[1:])
    # A weight of 0 (t = 0 with `exact`) becomes an infinite variance: no loss, shut gate.
    variance = 0.5 / sude_weight(t, schedule, weighting).to(x_t.dtype)
    loss = sude_loss(eps_subject, eps_class, eps_uncond, variance) / dims
    tau = sude_threshold(eps_class, eps_uncond, variance) / dims
    limit = (2 * truncate_at - 1) * tau
    return SudeTerms(
        loss,
        tau,
        truncate(loss, limit) if truncated else loss,
        gate(loss, limit),
        guidance_projection(eps_subject, eps_class, eps_uncond),
    )


class SudeRegularizer:
    """The SuDe loss for a training loop of one's own; no part of sude_lab's tuning is needed.

    Make it before training begins, call it with what the loop has anyway. The classifier's two
    predictions are made in one batched call without gradients.

    Args:
        unet: the model that is being tuned; plain, with peft adapters, or wrapped by Accelerate.
        scheduler: the diffusers scheduler of the loop, or a `Schedule`.
        class_embeds: the text encoder's output for "photo of a dog", (1, L, D), or a `Condition`
            (SDXL).
        uncond_embeds: the same for "".
        prior: `pretrained` asks the model as it is when this object is made (a copy of the weights
            that require gradients is kept; none for LoRA, whose adapters are switched off for the
            question); `current` asks it as it is by then.
        weighting: exact, simple or reference, see `sude_lab.losses.sude_weight`.
        truncated: whether eq. 9 stops a sample that is as sure of its category as the category.
        truncate_at: the rho at which it stops; the paper's threshold is 1.
    """

    def __init__(
        self,
        unet: Any,
        scheduler: Any,
        class_embeds: Tensor | Condition,
        uncond_embeds: Tensor | Condition,
        *,
        prior: Literal["pretrained", "current"] = "pretrained",
        weighting: Literal["exact", "simple", "reference"] = "reference",
        truncated: bool = True,
        truncate_at: float = 1.0,
    ) -> None:
        if prior not in ("pretrained", "current"):
            raise ValueError(f"prior must be 'pretrained' or 'current', got {prior!r}.")
        self.schedule = (
            scheduler if isinstance(scheduler, Schedule) else Schedule.from_scheduler(scheduler)
        )
        self.conditions = tuple(
            (c if isinstance(c, Condition) else Condition(c)).map(Tensor.detach)
            for c in (uncond_embeds, class_embeds)
        )
        self.weighting, self.truncated, self.truncate_at = weighting, truncated, truncate_at
        bare = getattr(unet, "module", unet)  # wrapped for several processes
        bare = getattr(bare, "_orig_mod", bare)  # compiled
        self._predict: Callable[..., Any] = FrozenUNet(bare) if prior == "pretrained" else unet

    def terms(self, x_t: Tensor, t: Tensor, model_output: Tensor) -> SudeTerms:
        """Return L_sude, tau_t, the gate and rho of a batch, for logging."""
        size = len(x_t)
        both = concatenate([c.expand(size) for c in self.conditions])
        with torch.no_grad():
            output = self._predict(torch.cat([x_t, x_t]), torch.cat([t, t]), **both.arguments)
            uncond, category = output.sample.float().chunk(2)
        return sude_terms(
            model_output.float(),
            category,
            uncond,
            x_t.float(),
            t,
            self.schedule,
            weighting=self.weighting,
            truncated=self.truncated,
            truncate_at=self.truncate_at,
        )

    def __call__(self, x_t: Tensor, t: Tensor, model_output: Tensor) -> Tensor:
        """Return the truncated SuDe loss of each sample, (B,); weight it by w_s and average it.

        Args: x_t: the noisy latents, (B, C, h, w). t: LongTensor (B,). model_output: the UNet's
        output for the subject's prompt, with its gradient.
        """
        return self.terms(x_t, t, model_output).gated
