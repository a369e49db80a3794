"""Questions to a model that is not being tuned: which prompt fits, how sure it is, what it sees.

`prompt_errors` names a picture with the classifier inside the model, `thresholds` is tau_t of
arXiv 2403.06775, eq. 8, over t; `answers` and `decode` show what prompts make of a noised picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sude_lab.backbone import Backbone, Condition, concatenate
from sude_lab.classifier import squared_distance
from sude_lab.diffusion import Schedule, add_noise, to_eps
from sude_lab.errors import UserError, check_whole, listed
from sude_lab.losses import output_weight, sude_threshold
from sude_lab.prompts import photo_of


@dataclass(frozen=True)
class Answers:
    """What a model says of noised pictures, (R, C, h, w) each: a row a picture, t and prompt."""

    x_t: Tensor
    eps: Tensor
    """The noise in x_t."""
    t: Tensor
    """(R,)."""
    output: Tensor
    """The model's own output: eps, x_0, v or flow."""
    schedule: Schedule

    @property
    def noise(self) -> Tensor:
        """eps_theta, the noise that the model predicts in x_t."""
        return to_eps(self.output, self.x_t, self.t, self.schedule)


@torch.no_grad()
def answers(
    backbone: Backbone,
    pictures: Sequence[Image.Image],
    prompts: Sequence[str],
    timesteps: Sequence[int],
    *,
    seed: int = 0,
    batch_size: int = 64,
) -> Iterator[Answers]:
    """Yield what the model predicts of N noised pictures at M timesteps under K prompts.

    In batches, the rows of (N, M, K) in their order. All prompts of a picture share x_t and its
    noise, which follows from (seed, n) alone. Pictures must have the model's resolution.
    N x M x K evaluations of the denoiser.
    """
    check_whole("The batch size", batch_size, 1)
    prompts = listed(prompts)
    times = torch.tensor(list(timesteps), dtype=torch.long)
    if not len(pictures) or not len(prompts) or not len(times):
        raise UserError("Give at least one picture, one prompt and one timestep.")
    if not 0 <= int(times.min()) <= int(times.max()) < backbone.schedule.num_timesteps:
        last = backbone.schedule.num_timesteps - 1
        raise UserError(f"Timesteps must lie between 0 and {last}.")
    condition = encode_all(backbone, prompts)
    x_0 = latents_of(backbone, pictures, batch_size)
    shape = (len(times), *x_0.shape[1:])
    generators = [noise_generator(seed, n) for n in range(len(x_0))]
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    rows = torch.cartesian_prod(*map(torch.arange, (len(x_0), len(times), len(prompts))))
    about = (backbone, x_0, times.expand(len(x_0), -1), noise, condition)
    for part in rows.view(-1, 3).split(batch_size):
        yield predictions(*about, part)


@torch.no_grad()
def encode_all(backbone: Backbone, prompts: Sequence[str]) -> Condition:
    """Return the conditions of all prompts; "" is no prompt, which SDXL was trained with zeros."""
    return concatenate(
        [backbone.encode_prompts([p]) if p else backbone.null_condition() for p in prompts]
    )


def latents_of(backbone: Backbone, pictures: Sequence[Image.Image], batch_size: int = 64) -> Tensor:
    """Return x_0 of pictures, the mean of the autoencoder's posterior, (N, C, h, w)."""
    starts = range(0, len(pictures), batch_size)
    parts = [backbone.encode_pictures(list(pictures[i : i + batch_size]))[0] for i in starts]
    return torch.cat(parts)


def noise_generator(seed: int, n: int) -> torch.Generator:
    """Return what picture n's noise is drawn from: the same beside any other pictures."""
    return torch.Generator().manual_seed(seed * 1_000_003 + n)


@torch.no_grad()
def predictions(
    backbone: Backbone,
    x_0: Tensor,
    times: Tensor,
    noise: Tensor,
    condition: Condition,
    rows: Tensor,
) -> Answers:
    """Return what the model says of a batch of rows of (picture n, pair m, prompt k).

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, arXiv 2403.06775, eq. 1, with t = times[n, m] and
    eps = noise[n, m], the same for every prompt. One evaluation of the denoiser a row.

    Args: latents x_0 (N, C, h, w); times (N, M) long; noise (N, M, C, h, w); condition of K
    prompts; rows (R, 3) long.
    """
    schedule, device = backbone.schedule, backbone.device
    n, m, k = rows.unbind(1)
    t, eps = times[n, m].to(device), noise[n, m].to(device)
    x_t = add_noise(x_0[n.to(device)], eps, t, schedule)
    output = backbone.predict(x_t, t, condition[k.to(device)])
    return Answers(x_t, eps, t, output, schedule)


def prompt_errors(
    backbone: Backbone,
    pictures: Sequence[Image.Image],
    prompts: Sequence[str],
    timesteps: Sequence[int],
    **settings: Any,
) -> Tensor:
    """Return how badly each prompt predicts the noise of each picture, (N, M, K), per dimension.

    ||eps - eps_theta(x_t, c_k, t)||^2 / D for N pictures, M timesteps, K prompts; the picture is
    named by the prompt with the least. Times D and the weight k_t of `sude_lab.losses.sude_weight`
    this is ||x_{t-1} - x_theta(c_k)||^2 / (2 sigma_t^2) of arXiv 2403.06775, eq. 6.

    Settings and errors: those of `answers`.
    """
    parts = [
        squared_distance(batch.noise, batch.eps).cpu() / batch.eps[0].numel()
        for batch in answers(backbone, pictures, prompts, timesteps, **settings)
    ]
    return torch.cat(parts).reshape(len(pictures), len(timesteps), len(prompts))


def thresholds(
    backbone: Backbone,
    pictures: Sequence[Image.Image],
    category: str,
    timesteps: Sequence[int],
    *,
    weighting: str = "exact",
    **settings: Any,
) -> Tensor:
    """Return tau_t for noised pictures of a category, (N, M), nats.

    -w_t ||eps_theta(c_cate) - eps_theta(null)||^2, arXiv 2403.06775, eq. 8, computed in the model's
    own output: minus the size of the category's guidance direction. `weighting` as in
    `sude_lab.losses.output_weight`.

    Settings and errors: those of `answers`.
    """
    parts = []
    # Two prompts, an even batch: both answers of a picture lie in one batch, side by side.
    settings["batch_size"] = 2 * max(1, settings.get("batch_size", 64) // 2)
    prompts = ["", photo_of(category)]
    for batch in answers(backbone, pictures, prompts, timesteps, **settings):
        uncond, of_class = batch.output[0::2], batch.output[1::2]
        weight = output_weight(batch.t[0::2], batch.schedule, weighting).to(uncond.dtype)
        parts.append(sude_threshold(of_class, uncond, 0.5 / weight).cpu())
    return torch.cat(parts).reshape(len(pictures), len(timesteps))


@torch.no_grad()
def decode(backbone: Backbone, latents: Tensor) -> list[Image.Image]:
    """Return latents (B, C, h, w), scaled as the denoiser has them, as pictures."""
    pixels = backbone.pipeline.vae.decode(backbone.unscaled(latents.to(backbone.device))).sample
    return backbone.pipeline.image_processor.postprocess(pixels.float(), output_type="pil")
