"""Stable Diffusion 1, 2 and XL: a UNet, whose conventions are those of `Backbone` itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from sude_lab.adapters.family import CLIP_WORDS, SHARED, Family

CLIP_TEXT = r"transformers CLIPTextModel(WithProjection)?"


class StableDiffusion(Family):
    """Stable Diffusion 1 or 2."""

    title: ClassVar[str] = "Stable Diffusion"
    classes: ClassVar[dict[str, str]] = SHARED | {
        "unet": r"diffusers UNet2DConditionModel",
        "text_encoder": CLIP_TEXT,
        "tokenizer": CLIP_WORDS,
        "safety_checker": r"stable_diffusion StableDiffusionSafetyChecker",
        "feature_extractor": r"transformers CLIP(ImageProcessor|FeatureExtractor)",
        "image_encoder": r"transformers CLIPVisionModelWithProjection",
    }

    def needed(self) -> dict[str, Any]:
        """Return what the UNet's configuration must say, by the other parts'."""
        channels = self.pipeline.vae.config.latent_channels
        width = sum(encoder.config.hidden_size for encoder in self.text_encoders.values())
        return {"in_channels": channels, "out_channels": channels, "cross_attention_dim": width}

    def misfits(self) -> Iterator[str]:
        """Yield which parts do not fit each other."""
        side = self.unet.config.sample_size
        if not isinstance(side, int) or side < 1:
            yield f"its UNet's sample_size is {side}, which must be a whole number"
        yield from super().misfits()


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL."""

    tag: ClassVar[str] = "stable-diffusion-xl"
    classes: ClassVar[dict[str, str]] = StableDiffusion.classes | {
        "text_encoder_2": CLIP_TEXT,
        "tokenizer_2": CLIP_WORDS,
    }
