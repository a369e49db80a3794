"""How strongly a run is drawn, after it was tuned once: a line in place of a point.

RUN@25                     with the weights after step 25 (`sude-lab tune --keep-at 25`)
RUN@scale=0.5              half of the way from the untuned weights to the tuned ones
RUN@compose=0.3            the category's guidance direction added, whatever the subject has
RUN@sude_guidance=1        SuDe without training (`sude_lab.guidance`)
RUN@guidance_scale=2       another scale of classifier-free guidance
RUN@25,scale=0.5           several of them
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from sude_lab.backbone import Backbone
from sude_lab.config import TuningConfig
from sude_lab.errors import UserError
from sude_lab.guidance import has_adapters, sude_guidance
from sude_lab.io.opening import open_backbone
from sude_lab.prompts import by_itself, caption, placeholder


@dataclass(frozen=True)
class Strength:
    """What of a run is drawn; with nothing said, the run as it ended."""

    step: int | None = None
    """The step after which the weights were kept; None: the last one."""
    scale: float = 1.0
    """lambda of W_0 + lambda (W - W_0): weights and words between untuned (0) and tuned (1), of a
    LoRA its scale; above 1 it goes on in the same direction."""
    compose: float = 0.0
    """c of the composition of two prompts: c d is added to the subject's prediction, d the frozen
    model's guidance direction of the category (`sude_lab.guidance`, without the hinge)."""
    sude_guidance: float = 0.0
    """g of SuDe without training (`sude_lab.guidance`)."""
    guidance_scale: float | None = None
    """w of classifier-free guidance; None: what the drawing says."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None and not (f.name == "step") <= value < math.inf:
                least = int(f.name == "step")
                raise UserError(f"The strength {f.name} is {value}: it must be at least {least}.")
        if self.compose and self.sude_guidance:
            raise UserError("A run is drawn with compose or with sude_guidance: choose one.")

    def __str__(self) -> str:
        """Return it as it is written behind @; "" for the run as it ended."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        own = {f.name: values[f.name] for f in fields(self) if values[f.name] != f.default}
        return ",".join(str(v) if n == "step" else f"{n}={v:g}" for n, v in own.items())

    @classmethod
    def read(cls, text: str) -> Strength:
        """Return the strength that is written as `text`: "25", "scale=0.5", "25,scale=0.5"."""
        values: dict[str, float] = {}
        for part in filter(None, text.split(",")):
            name, _, number = part.strip().rpartition("=")
            name = name or "step"
            try:
                if name in values or name not in {f.name for f in fields(cls)}:
                    raise ValueError(name)
                values[name] = int(number) if name == "step" else float(number)
            except ValueError as error:
                names = ", ".join(f"{f.name}=..." for f in fields(cls)[1:])
                raise UserError(
                    f"{part!r} behind @ is no strength: write a kept step (@25), or {names}."
                ) from error
        return cls(**values)  # type: ignore[arg-type]


def split(run: Path | str) -> tuple[Path, Strength]:
    """Return a run's folder and the strength written behind it: RUN@25 and RUN.

    A folder whose own name has an @ is that folder.
    """
    folder, _, text = str(run).rpartition("@")
    if Path(run).exists() or not folder:
        return Path(run), Strength()
    return Path(folder), Strength.read(text)


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
    if has_adapters(backbone.denoiser) and not config.train_text_encoder:
        frozen, asked = None, backbone
    else:
        where = {"device": str(backbone.device), "dtype": config.dtype}
        asked = open_base() if open_base else open_backbone(config.backbone, **where)
        frozen = asked.denoiser
    with torch.no_grad():
        classes, null = asked.encode_prompts([words]), asked.null_condition()
    return sude_guidance(backbone.pipeline, frozen, classes, share, null=null, hinge=hinge)
