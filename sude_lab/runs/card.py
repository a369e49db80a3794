"""The model card of a run: what it is, how plain diffusers loads it, how it was made."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from sude_lab import __version__
from sude_lab.backbone import Backbone
from sude_lab.config import EMBEDDED_MODELS, TuningConfig, fields_of
from sude_lab.generation import sampling_settings
from sude_lab.io.opening import hub_id
from sude_lab.io.weights import EMBEDDINGS, LORA_FILE

CARD = "README.md"
PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
"""The parts of a pipeline that a run may have trained."""
_NO_SETTINGS = (*fields_of("place"), "category", "token", "initializer", "prompt", "dtype")
"""What a card's table leaves out: it stands elsewhere in the card, or is of one machine."""
_CLONED = {name: f"data/{folder}" for name, folder in EMBEDDED_MODELS.items()}
"""Where the embedded models are in a clone; the whole path differs from machine to machine."""


def is_plain(weights: Path) -> bool:
    """Whether plain diffusers has a place for everything in a run's folder of weights."""
    plain = {LORA_FILE, *(f"{part}.safetensors" for part in PARTS)}
    return all(p.match(EMBEDDINGS) or p.name in plain for p in weights.iterdir())


def model_card(
    config: TuningConfig,
    backbone: Backbone,
    weights: Path,
    prompts: Sequence[str],
    *,
    grid: str | None = "samples.png",
    pipeline: bool = False,
) -> str:
    """Return the model card of a run, which depends on the settings alone.

    `prompts` are those of the `grid` beside the card, with the tokens filled in; None: there is no
    grid. `pipeline`: the card lies in a whole pipeline's folder, in place of the weights'.
    """
    from huggingface_hub import ModelCardData

    embedded = config.backbone in _CLONED
    hub = hub_id(config.backbone)
    lora = (weights / LORA_FILE).is_file() and not pipeline
    kind = "lora" if lora else config.method.replace("_", "-")
    tags = ["text-to-image", "diffusers", "diffusers-training", kind, "sude"]
    prompt = " ".join(prompts[0].split())  # a line of its own could end the head of the card
    about: dict[str, Any] = {"instance_prompt": prompt}
    if grid:
        about["widget"] = [{"text": prompt, "output": {"url": grid}}]
    data = ModelCardData(
        base_model=hub[0] if hub else None,
        library_name="diffusers",
        license="apache-2.0" if embedded else None,
        pipeline_tag="text-to-image",
        tags=[*dict.fromkeys([*tags, config.method.replace("_", "-"), backbone.tag])],
        **about,
    )
    card = _TEMPLATES.get_template("card.md.jinja").render(
        config=config,
        card_data=data.to_yaml(),
        prompts=prompts,
        grid=grid,
        fits=is_plain(weights),
        drawing=_drawing_code(config, backbone, weights, prompts[0], pipeline),
        base=_CLONED.get(config.backbone, config.backbone),
        version=__version__,
        pipeline=pipeline,
        no_settings=_NO_SETTINGS,
        embedded=embedded,
    )
    return f"{card.rstrip()}\n"


def _drawing_code(
    config: TuningConfig, backbone: Backbone, weights: Path, prompt: str, pipeline: bool
) -> str:
    """Return the lines that draw the upper left picture of samples.png, as `generate` does.

    They stand in the run's folder. In plain diffusers the tokens come first: a trained text encoder
    has a row for each of them.
    """
    from diffusers import DDIMScheduler

    plain = is_plain(weights)
    names = [EMBEDDINGS.replace("*", f"-{k + 1}" if k else "") for k in range(len(config.subjects))]
    words = zip(names, (json.dumps(s.token) for s in config.subjects), strict=True)
    return _TEMPLATES.get_template("draw.py.jinja").render(
        source='"."' if pipeline else _source(config, backbone) if plain else None,
        loads=plain and not pipeline,
        tokens=[(name, token) for name, token in words if (weights / name).is_file()],
        parts=[part for part in PARTS if (weights / f"{part}.safetensors").is_file()],
        lora=(weights / LORA_FILE).is_file() and LORA_FILE,
        backbone=backbone,
        by_hand=not hasattr(backbone.pipeline, "load_textual_inversion"),
        ddim=isinstance(backbone.sampler(), DDIMScheduler),
        prompt=json.dumps(prompt, ensure_ascii=False),
        sampling=backbone.call_arguments(**sampling_settings(backbone.facts)),
        seed=config.seed * 100_003,
    )


def _plain(text: str) -> str:
    """Return a text for Markdown, where none of its characters means anything."""
    return re.sub(r"([\\`*_{}\[\]<>()#|!&~])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """Return a text as code in Markdown: between more backticks than it has in a row."""
    text = " ".join(text.split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{text}{fence}" if len(fence) == 1 else f"{fence} {text} {fence}"


def _source(config: TuningConfig, backbone: Backbone) -> str:
    """The arguments that open the base model in plain diffusers, at the commit that was tuned."""
    hub = hub_id(config.backbone)
    if hub is None:
        return json.dumps(_CLONED.get(config.backbone, config.backbone))
    name, revision = json.dumps(hub[0]), backbone.commit or hub[1]
    return f"{name}, revision={json.dumps(revision)}" if revision else name


_TEMPLATES = Environment(loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True)
_TEMPLATES.filters |= {"plain": _plain, "code": _code}
