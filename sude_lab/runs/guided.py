"""SuDe without training for a finished run: its own LoRA switched off, or its base beside it."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from sude_lab.backbone import Backbone
from sude_lab.config import TuningConfig
from sude_lab.guidance import has_adapters, sude_guidance
from sude_lab.io.opening import open_backbone
from sude_lab.prompts import article, by_itself, placeholder


def to_class_prompt(prompt: str, *categories: str) -> str:
    """Return the prompt with {S*}, {S*2}, ... as their categories, for the frozen model.

    "photo of a running {S*}" and "photo of a running {S*} dog" both become "photo of a running
    dog".
    """
    for number, category in enumerate(categories):
        mark, word = re.escape(placeholder(number)), re.escape(category)
        prompt = re.sub(
            rf"(?:\b(an?)\s+)?{mark}(?:\s+{word}\b)?",
            lambda m, c=category: f"{article(c)} {c}" if m[1] else c,  # type: ignore[misc]
            prompt,
            flags=re.IGNORECASE,
        )
    return prompt


def guidance_for(
    config: TuningConfig, backbone: Backbone, prompt: str, strength: float
) -> AbstractContextManager[list[Tensor]]:
    """Return `sude_guidance` for a tuned backbone and a prompt with {S*}, or with the token.

    A backbone whose UNet carries a LoRA is its own frozen base; else the base is opened again
    beside it, which takes its memory a second time.
    """
    for number, subject in enumerate(config.subjects):
        prompt = by_itself(subject.token).sub(placeholder(number), prompt)
    words = to_class_prompt(prompt, *(subject.category for subject in config.subjects))
    if has_adapters(backbone.unet) and not config.train_text_encoder:
        return sude_guidance(backbone.pipeline, None, words, strength)
    if not strength > 0:  # nothing to do, or refused: no base is needed for that
        return sude_guidance(backbone.pipeline, backbone.unet, words, strength)
    base = open_backbone(config.backbone, device=str(backbone.device), dtype=config.dtype)
    with torch.no_grad():
        classes, null = base.encode_prompts([words]), base.null_condition()
    return sude_guidance(backbone.pipeline, base.unet, classes, strength, null=null)
