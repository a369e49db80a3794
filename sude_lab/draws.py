"""Where the samples of a step come from: x_0, its noise eps, and t; and class images beside them.

Everything random is drawn on the CPU, for all processes alike: the same numbers on every device,
and one process with the whole batch takes the same step as many with their parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from PIL import Image, ImageOps
from torch import Tensor

from sude_lab.backbone import Backbone, send
from sude_lab.config import CompleteConfig
from sude_lab.errors import UserError, checked_picture

Latents = tuple[Tensor, Tensor]
"""Mean and deviation of a picture's latents, (K, C, h, w) each; K is 2 with its mirror image."""


@dataclass(frozen=True)
class Batch:
    """The samples of a step, B of them."""

    x_0: Tensor
    """Latents of the subjects' pictures, (B, C, h, w)."""
    eps: Tensor
    """Their noise, (B, C, h, w)."""
    t: Tensor
    """Timesteps, (B,)."""
    which: Tensor
    """Whose picture it is: the number of the subject, (B,), always on the CPU."""
    z_0: Tensor | None = None
    """Latents of class images, (B, C, h, w), for prior preservation."""
    noise: Tensor | None = None
    """Theirs."""

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(**{k: function(v) for k, v in vars(self).items() if v is not None})

    def rows(self, index: slice) -> Batch:
        """Return some of the samples."""
        return self._map(lambda x: x[index])

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device; nobody waits for a GPU to take it."""
        return replace(self._map(lambda x: send(x, device)), which=self.which)


class Draws(Protocol):
    """Anything that draws a batch; what it draws must follow from the generator alone."""

    def draw(self, size: int, generator: torch.Generator) -> Batch:
        """Return `size` samples, on the CPU."""


def step_generator(seed: int, step: int) -> torch.Generator:
    """Return the generator of one step: what step k draws depends on (seed, k) alone."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


Density = Literal["uniform", "logit_normal"]


def place_of(share: Tensor, density: Density) -> Tensor:
    """Return where in 0 ... 1, of all times, a share of the draws lies: the quantile function.

    uniform: the share itself; logit_normal: sigmoid(z) with z of that share of a standard normal,
    as diffusers' training of SD3 draws times (arXiv 2403.03206, eq. 19, mean 0, deviation 1).
    """
    return share if density == "uniform" else torch.special.ndtri(share).sigmoid()


@dataclass(frozen=True)
class FreshDraws:
    """Latents of the subjects' pictures, noise and t, all drawn anew in every step."""

    latents: Sequence[Latents]
    num_timesteps: int
    density: Density = "uniform"

    def draw(self, size: int, generator: torch.Generator) -> Batch:
        """Return `size` samples."""
        means = torch.stack([mean for mean, _ in self.latents])
        deviations = torch.stack([std for _, std in self.latents])
        which = torch.zeros(size, dtype=torch.long)
        if len(self.latents) > 1:  # of one subject nothing is drawn
            which = torch.randint(len(self.latents), (size,), generator=generator)
        pick = torch.randint(means.shape[1], (size,), generator=generator)
        shape = (size, *means.shape[2:])
        x_0 = means[which, pick] + deviations[which, pick] * torch.randn(shape, generator=generator)
        eps = torch.randn(shape, generator=generator)
        if self.density == "uniform":
            t = torch.randint(self.num_timesteps, (size,), generator=generator)
        else:
            share = torch.rand(size, generator=generator, dtype=torch.float64)
            t = (place_of(share, self.density) * self.num_timesteps).long()
            t = t.clamp(max=self.num_timesteps - 1)
        return Batch(x_0, eps, t, which)


def one_of_each(config: CompleteConfig, pictures: Any) -> list[Image.Image]:
    """Return the pictures of a run's subjects as a list."""
    pictures = list(pictures) if isinstance(pictures, list | tuple) else [pictures]
    if len(pictures) != (number := len(config.subjects)):
        raise UserError(f"There are {number} subjects and {len(pictures)} pictures: give one each.")
    return pictures


def side_of(config: CompleteConfig, backbone: Backbone) -> int:
    """Return the side of a run's pictures in pixels: its own, or the model's."""
    return config.resolution or backbone.resolution


def picture_latents(config: CompleteConfig, backbone: Backbone, picture: Image.Image) -> Latents:
    """Return mean and deviation of a picture's latents, on the CPU."""
    side, factor = side_of(config, backbone), backbone.pipeline.vae_scale_factor
    if side % factor:
        raise UserError(f"--resolution {side} must be a multiple of {factor}.")
    picture = checked_picture(picture, square=True)
    if picture.size != (side, side):
        picture = picture.resize((side, side), Image.Resampling.LANCZOS)
    pictures = [picture, ImageOps.mirror(picture)] if config.horizontal_flip else [picture]
    mean, std = backbone.encode_pictures(pictures)
    return mean.cpu(), std.cpu()
