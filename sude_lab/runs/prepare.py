"""What is made before a run starts, and handed to its `Tuning`: what it draws from.

Pictures of the category, for prior preservation, are drawn once and reused, or the user's own.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sude_lab.backbone import Backbone
from sude_lab.config import CompleteConfig, TuningConfig
from sude_lab.draws import Batch, Draws, FreshDraws, one_of_each, picture_latents, side_of
from sude_lab.errors import UserError, explained
from sude_lab.generation import generate, sampling_settings
from sude_lab.io.files import atomic_folder
from sude_lab.io.pictures import load_picture
from sude_lab.io.reading import hash_of
from sude_lab.methods import configure
from sude_lab.prompts import photo_of
from sude_lab.runs.regularizer import load_regularizer
from sude_lab.tuning import Regularizer, Tuning

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def prepared_tuning(
    config: TuningConfig,
    backbone: Backbone,
    pictures: Image.Image | Sequence[Image.Image],
    *,
    regularizer: Regularizer | None = None,
    state: dict[str, Any] | None = None,
    accelerator: Any = None,
) -> Tuning:
    """Return a run with all that is made before it; arguments and errors are `Tuning`'s.

    Pictures get the care of files: upright, RGB, cut to squares. Where `prior_loss_weight` is above
    0, class images are drawn, or found in the cache; of an accelerator's processes the first one
    draws. Without a `regularizer` the settings' own file is run, where they name one.
    """
    backbone.use()
    regularizer = regularizer or load_regularizer(config.regularizer_file)
    config = configure(config, backbone)
    side = side_of(config, backbone)
    squares = [load_picture(p, resolution=side).image for p in one_of_each(config, pictures)]
    draws: Draws | None = None
    if config.prior_loss_weight:
        with accelerator.main_process_first() if accelerator else nullcontext():
            class_images = [class_latents(config, backbone, s.category) for s in config.subjects]
        latents = [picture_latents(config, backbone, square) for square in squares]
        fresh = FreshDraws(latents, backbone.schedule.num_timesteps, backbone.density)
        draws = WithClassImages(fresh, class_images)
    made: dict[str, Any] = {"draws": draws, "regularizer": regularizer}
    return Tuning(config, backbone, squares, **made, state=state, accelerator=accelerator)


# --- class images --------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Return the folder of what is computed once: SUDE_LAB_CACHE, or ~/.cache/sude_lab."""
    named = os.environ.get("SUDE_LAB_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "sude_lab"


def fingerprint(backbone: Backbone) -> str:
    """Return a short name of the model's weights: the same weights, the same name."""
    digest = hashlib.sha256()
    for module in (backbone.denoiser, *backbone.text_encoders.values(), backbone.pipeline.vae):
        for name, tensor in module.state_dict().items():
            # The sum of the bits, read as integers, and a few of them: a gigabyte of weights is
            # named in a second, and the sum is exact on every device, in whatever order.
            bits = tensor.detach().flatten().view(_BITS[tensor.element_size()])
            few = bits[:: max(1, bits.numel() // 8)][:8].tolist()
            total = bits.sum(dtype=torch.int64).item()
            digest.update(f"{name} {tuple(tensor.shape)} {total} {few}".encode())
    return digest.hexdigest()[:16]


def drawn_class_images(
    backbone: Backbone, category: str, *, number: int, seed: int
) -> list[Image.Image]:
    """Return `number` pictures of the category that this model draws; kept in the cache."""
    about: dict[str, Any] = {
        "weights": fingerprint(backbone),
        "prompt": photo_of(category),
        "seed": seed,
        "number": number,
        "sampling": sampling_settings(backbone.facts),
    }
    folder = cache_folder() / "class_images" / hash_of(about)[:16]
    if not folder.is_dir():
        try:
            with atomic_folder(folder) as unfinished:
                settings: dict[str, Any] = {"num_images": number, "seed": seed, "progress": True}
                for k, image in enumerate(generate(backbone, about["prompt"], **settings)):
                    image.save(unfinished / f"{k:04d}.png")
                text = json.dumps(about, indent=1)
                (unfinished / "about.json").write_text(text, encoding="utf-8")
        except UserError:
            if not folder.is_dir():  # else another run drew the same pictures at the same time
                raise
    cure = "delete the folder, and they are drawn again"
    with explained(f"The class images in {folder} are damaged", cure):
        return [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"))]


@torch.no_grad()
def class_latents(config: CompleteConfig, backbone: Backbone, category: str) -> Tensor:
    """Return the latents of the category's pictures, (N, C, h, w), on the CPU.

    They are all of the folder `config.class_images` (with several categories: of its subfolder of
    that name), or else `config.num_class_images` drawn ones.
    """
    side = side_of(config, backbone)
    if config.class_images is not None:
        folder = config.class_images
        several = len({subject.category for subject in config.subjects}) > 1
        if several or (folder / category).is_dir():
            folder = folder / category
        paths = sorted(p for p in folder.glob("*") if p.is_file() and p.name[0] != ".")
        if not paths:
            raise UserError(f"There are no class images in {folder}: put pictures there.")
        images = [load_picture(path, resolution=side).image for path in paths]
    else:
        number, seed = config.num_class_images, config.seed + 10_000
        images = drawn_class_images(backbone, category, number=number, seed=seed)
    # Drawn at the model's own size; the subject's picture may be tuned at another.
    images = [image.resize((side, side), Image.Resampling.LANCZOS) for image in images]
    return torch.cat([backbone.encode_pictures([image])[0].cpu() for image in images])


@dataclass(frozen=True)
class WithClassImages:
    """Other draws, with a class image of every sample's category and noise of its own beside."""

    draws: Draws
    class_latents: Sequence[Tensor]
    """Of every subject's category, (N, C, h, w)."""

    def draw(self, size: int, generator: torch.Generator) -> Batch:
        """Return `size` samples."""
        batch = self.draws.draw(size, generator)
        number = min(len(z) for z in self.class_latents)
        pick = torch.randint(number, batch.t.shape, generator=generator)
        noise = torch.randn(batch.x_0.shape, generator=generator)
        rows = zip(batch.which.tolist(), pick.tolist(), strict=True)
        z_0 = torch.stack([self.class_latents[who][k] for who, k in rows])
        return replace(batch, z_0=z_0, noise=noise)
