"""Draw pictures with a pipeline, tuned or not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from numbers import Real
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from sude_lab.backbone import Backbone
from sude_lab.errors import UserError, check_whole
from sude_lab.prompts import by_itself

STABLE_DIFFUSION = {"num_inference_steps": 50, "guidance_scale": 7.5}
"""What draws well on Stable Diffusion; a backbone's own facts come first."""
MOST = 100_000
"""The most pictures of one prompt: more is a slip of the hand, and would fill the memory first."""


def sampling_settings(facts: Mapping[str, Any], **chosen: Any) -> dict[str, Any]:
    """Return the sampler's settings: those chosen (not None), a backbone's own facts, then SD's."""
    settings = STABLE_DIFFUSION | facts.get("generation", {})
    settings |= {key: value for key, value in chosen.items() if value is not None}
    steps, scale = settings["num_inference_steps"], settings["guidance_scale"]
    check_whole("The number of inference steps", steps, 1, 1000)
    if not isinstance(scale, Real) or not math.isfinite(scale):
        raise UserError(f"The guidance scale is {scale!r}: it must be a finite number.")
    return settings


def remarks(backbone: Backbone, prompts: Iterable[str], *tokens: str) -> Iterator[str]:
    """Yield what of some prompts the model does not read, and which of their words are new to it.

    The `tokens` are the subjects' own words.
    """
    words = ""
    for prompt in prompts:
        if rest := backbone.beyond_reach(prompt, *tokens):
            yield f"The prompt {prompt[:60]!r} is too long: the model leaves out {rest!r}."
        for token in tokens:
            prompt = by_itself(token).sub(" ", prompt)
        words += f" {prompt}"
    if unknown := backbone.unknown_words(words):
        names, vocabulary = ", ".join(map(repr, unknown[:8])), ", ".join(backbone.facts["words"])
        yield f"The model has never met {names}; it knows: {vocabulary}."


@torch.no_grad()
def generate(
    backbone: Backbone,
    prompt: str,
    *,
    num_images: int = 8,
    seed: int = 0,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    batch_size: int = 8,
    first: int = 0,
    progress: bool = False,
) -> list[Image.Image]:
    """Draw pictures `first` to `first + num_images - 1` of a prompt: DDIM (eta 0), Euler for flow.

    Picture k starts from noise of (seed, k) alone, whatever the batch size: two models drawn with
    one seed start from the same noise. The prompt must have its subject's token filled in.
    """
    chosen = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    settings = sampling_settings(backbone.facts, **chosen)
    steps = settings["num_inference_steps"]
    for text in (prompt, negative_prompt or ""):
        if not isinstance(text, str):
            raise UserError(f"The prompt is {text!r}: give one text.")
    check_whole("The number of images", num_images, 1, MOST)
    check_whole("The number of inference steps", steps, 1, backbone.schedule.num_timesteps)
    check_whole("The seed", seed, 0, 2**32 - 1)
    check_whole("The batch size", batch_size, 1)
    check_whole("The first picture's number", first, 0)
    pipeline = backbone.pipeline
    shape, last = backbone.latent_shape, first + num_images
    images: list[Image.Image] = []
    starts = range(first, last, batch_size)
    trained_with, pipeline.scheduler = pipeline.scheduler, backbone.sampler()
    vae, decode = pipeline.vae, pipeline.vae.decode  # SDXL's overflows in float16, and says so
    if backbone.is_xl and backbone.dtype == torch.float16 and vae.config.force_upcast:
        vae.decode = torch.autocast(backbone.device.type, enabled=False)(decode)
    try:
        for start in tqdm(starts, desc="drawing", unit="batch", disable=not progress):
            indices = range(start, min(start + batch_size, last))
            seeds = (torch.Generator().manual_seed(int(seed) * 100_003 + k) for k in indices)
            noise = [torch.randn(shape, generator=generator) for generator in seeds]
            with backbone.autocast():
                arguments = backbone.call_arguments(
                    prompt=[prompt] * len(indices),
                    latents=torch.stack(noise).to(backbone.device),
                    num_inference_steps=steps,
                    guidance_scale=settings["guidance_scale"],
                    # None and "" differ for SDXL: None is the null condition it was trained with.
                    negative_prompt=[negative_prompt] * len(indices) if negative_prompt else None,
                    output_type="np",
                )
                drawn = pipeline(**arguments).images
            if not np.isfinite(drawn).all():  # which would be a black picture without a word
                cure = "lower the guidance scale, or open a model of float16 in float32"
                raise UserError(f"The picture came out as numbers that are none: {cure}.")
            images += pipeline.image_processor.numpy_to_pil(drawn)
    finally:
        pipeline.scheduler = trained_with
        if vae.decode != decode:
            del vae.decode
    return images
