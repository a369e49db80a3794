"""Stable Diffusion 1, 2 and XL: a UNet, whose conventions are those of `Backbone` itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from sude_lab.adapters.family import Family, unequal
from sude_lab.backbone import Backbone
from sude_lab.diffusion import Schedule

CLIP = r"transformers CLIPTextModel(WithProjection)?"
CLIP_WORDS = r"transformers CLIPTokenizer(Fast)?"
SHARED = {"vae": r"diffusers AutoencoderKL", "scheduler": r"diffusers \w+Scheduler"}
CLASSES = SHARED | {
    "unet": r"diffusers UNet2DConditionModel",
    **dict.fromkeys(("text_encoder", "text_encoder_2"), CLIP),
    **dict.fromkeys(("tokenizer", "tokenizer_2"), CLIP_WORDS),
    "safety_checker": r"stable_diffusion StableDiffusionSafetyChecker",
    "feature_extractor": r"transformers CLIP(ImageProcessor|FeatureExtractor)",
    "image_encoder": r"transformers CLIPVisionModelWithProjection",
}
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


def misfits(pipeline: Any) -> Iterator[str]:
    """Yield which parts of a pipeline do not fit each other."""
    if Schedule.from_scheduler(pipeline.scheduler).sigmas is not None:
        yield f"its {type(pipeline.scheduler).__name__} is for transformers of flow matching"
    unet, channels = pipeline.unet.config, pipeline.vae.config.latent_channels
    if not isinstance(unet.sample_size, int) or unet.sample_size < 1:
        yield f"its UNet's sample_size is {unet.sample_size}, which must be a whole number"
    yield from misread(pipeline)
    encoders = (getattr(pipeline, f"text_encoder{end}", None) for end in ("", "_2"))
    width = sum(encoder.config.hidden_size for encoder in encoders if encoder is not None)
    across = unet.cross_attention_dim
    yield from unequal(
        "UNet",
        ("in_channels", unet.in_channels, channels),
        ("out_channels", unet.out_channels, channels),
        *(
            ("cross_attention_dim", one, width)
            for one in (across if isinstance(across, list | tuple) else [across])
        ),
    )


def misread(pipeline: Any) -> Iterator[str]:
    """Yield which CLIP does not read what its tokenizer writes."""
    for end in ("", "_2"):
        encoder = getattr(pipeline, f"text_encoder{end}", None)
        tokenizer = getattr(pipeline, f"tokenizer{end}", None)
        if encoder is None or tokenizer is None:
            continue
        length, most = tokenizer.model_max_length, encoder.config.max_position_embeddings
        if length > most:
            yield f"its tokenizer{end} has no model_max_length of at most {most}"
        rows = encoder.get_input_embeddings().num_embeddings
        if len(tokenizer) > rows:
            yield f"its tokenizer{end} knows {len(tokenizer)} words, its text_encoder{end} {rows}"


STABLE_DIFFUSION = Family("Stable Diffusion", "stable-diffusion", Backbone, CLASSES, PARTS, misfits)
STABLE_DIFFUSION_XL = replace(
    STABLE_DIFFUSION, tag="stable-diffusion-xl", parts=(*PARTS, "text_encoder_2", "tokenizer_2")
)
