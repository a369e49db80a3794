"""A finished run drawn with its category's guidance: SuDe without training, or composition."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from sude_lab.backbone import Backbone
from sude_lab.config import TuningConfig
from sude_lab.guidance import has_adapters, sude_guidance
from sude_lab.io.opening import open_backbone
from sude_lab.prompts import by_itself, caption, placeholder
from sude_lab.runs.strength import Strength


def guidance_for(
    config: TuningConfig,
    backbone: Backbone,
    prompt: str,
    strength: Strength,
    *,
    open_base: Callable[[], Backbone] | None = None,
) -> AbstractContextManager[Any]:
    """Return `sude_guidance` for a tuned backbone, as a strength says; the prompt has {S*}.

    A backbone whose UNet carries a LoRA is its own frozen base; else the base is opened again
    beside it (by `open_base`), which takes its memory a second time.
    """
    share, hinge = strength.sude_guidance or strength.compose, not strength.compose
    if not share:
        return nullcontext()
    for number, subject in enumerate(config.subjects):
        prompt = by_itself(subject.token).sub(placeholder(number), prompt)
    words = caption(prompt, *(subject.category for subject in config.subjects))
    pipeline, own = backbone.pipeline, has_adapters(backbone.denoiser)
    if own and not config.train_text_encoder:
        if backbone.part == "unet":
            return sude_guidance(pipeline, None, words, share, hinge=hinge)
        frozen, asked = None, backbone
    else:
        where = {"device": str(backbone.device), "dtype": config.dtype}
        asked = open_base() if open_base else open_backbone(config.backbone, **where)
        frozen = asked.denoiser
    with torch.no_grad():
        classes, null = asked.encode_prompts([words]), asked.null_condition()
    return sude_guidance(pipeline, frozen, classes, share, null=null, hinge=hinge)
