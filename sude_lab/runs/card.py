"""The model card of a run: what it is, how plain diffusers loads it, how it was made."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sude_lab import __version__
from sude_lab.backbone import Backbone
from sude_lab.config import EMBEDDED
from sude_lab.generation import sampling_settings
from sude_lab.io.opening import hub_id
from sude_lab.io.weights import EMBEDDINGS, LORA_FILE
from sude_lab.tuning import TuningConfig

CARD = "README.md"
PARTS = ("unet", "text_encoder", "text_encoder_2")
"""The parts of a pipeline that a run may have trained."""
_PAPERS = {
    "dreambooth": "DreamBooth (arXiv 2208.12242)",
    "custom_diffusion": "Custom Diffusion (arXiv 2212.04488)",
    "vico": "ViCo (arXiv 2306.00971)",
    "textual_inversion": "Textual Inversion (arXiv 2208.01618)",
}
_NO_SETTINGS = (
    *("image", "category", "token", "more_subjects", "initializer", "prompt", "class_images"),
    *("backbone", "device", "dtype"),
)
"""What a card's table leaves out: it stands elsewhere in the card, or is of one machine."""


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
    """Return the model card of a run: what it is, how it is loaded, how it was made, its licence.

    It depends on the settings alone: two equal runs have equal cards.

    Args:
        config: The run's settings, resolved.
        backbone: The model it was tuned on.
        weights: The run's folder of weights.
        prompts: The prompts of the grid, with the tokens filled in.
        grid: The file of the sample grid, beside the card; None: there is none.
        pipeline: The card is for a whole pipeline in the card's folder, in place of the weights.
    """
    from huggingface_hub import ModelCard, ModelCardData

    embedded, base = config.backbone == EMBEDDED, _code(_base(config))
    hub = hub_id(config.backbone)
    lora = (weights / LORA_FILE).is_file() and not pipeline
    kind = "lora" if lora else config.method.replace("_", "-")
    tags = ["text-to-image", "diffusers", "diffusers-training", kind, "sude"]
    family = "stable-diffusion-xl" if backbone.is_xl else "stable-diffusion"
    prompt = " ".join(prompts[0].split())  # a line of its own could end the head of the card
    about: dict[str, Any] = {"instance_prompt": prompt}
    if grid:
        about["widget"] = [{"text": prompt, "output": {"url": grid}}]
    data = ModelCardData(
        base_model=hub[0] if hub else None,
        library_name="diffusers",
        license="apache-2.0" if embedded else None,
        pipeline_tag="text-to-image",
        tags=[*dict.fromkeys([*tags, config.method.replace("_", "-"), family])],
        **about,
    )
    sude = f"with SuDe (arXiv 2403.06775), w_s = {config.weight_sude:g}"
    licence = f"What was tuned derives from {base}: the licence of that model applies."
    before, code = _how_to_draw(config, backbone, weights, prompts[0], pipeline)
    template = (Path(__file__).parent / "card.md.jinja").read_text(encoding="utf-8")
    card = ModelCard.from_template(
        data,
        # Lines of the template's own language leave no empty lines behind.
        template_str=re.sub(r"^({%.*%})\n", r"\1", template, flags=re.M),
        title=", ".join(_plain(s.category) for s in config.subjects),
        paper=_PAPERS.get(config.method, config.method),
        sude=sude if config.weight_sude else "without SuDe (w_s = 0)",
        words=", ".join(f"{_code(s.token)} (a {_plain(s.category)})" for s in config.subjects),
        grid=grid,
        rows="; ".join(f"“{_code(p)}”" for p in prompts),
        before=before,
        code="\n".join(code),
        own=not pipeline,
        base=base,
        version=__version__,
        pipeline=pipeline,
        settings={name: value for name, value in vars(config).items() if name not in _NO_SETTINGS},
        licence="Apache-2.0, as the embedded model." if embedded else licence,
    )
    return f"{str(card).rstrip()}\n"


def _how_to_draw(
    config: TuningConfig, backbone: Backbone, weights: Path, prompt: str, pipeline: bool
) -> tuple[str, list[str]]:
    """Return a sentence, and the lines of Python that it is about."""
    draw = _drawing_lines(config, backbone, prompt)
    head = ["import torch", "from diffusers import DDIMScheduler, DiffusionPipeline"]
    if pipeline:
        opening = 'pipeline = DiffusionPipeline.from_pretrained(".")'
        return "In plain diffusers, from this folder:", [*head, "", opening, *draw]
    if not is_plain(weights):
        lines = [
            *("import torch", "from diffusers import DDIMScheduler"),
            *("from sude_lab.runs.folder import Run", ""),
            'pipeline = Run.open(".").load().pipeline',
        ]
        why = "Plain diffusers has no place for what this method adds to the UNet."
        return f"{why}\nFrom this folder:", [*lines, *draw]
    lines = [
        *(*head, "from safetensors.torch import load_file", ""),
        f"pipeline = DiffusionPipeline.from_pretrained({_source(config, backbone)})",
        *loading_lines(config, weights, is_xl=backbone.is_xl),
    ]
    where = " (`data/embedded` is in a clone of sude_lab)" if config.backbone == EMBEDDED else ""
    what = "In plain diffusers, from this folder; it draws the first picture of the grid"
    return f"{what}{where}:", [*lines, *draw]


def loading_lines(config: TuningConfig, weights: Path, *, is_xl: bool) -> list[str]:
    """Return the lines of Python that put a run's weights into `pipeline`, in plain diffusers.

    They stand in the run's folder. The tokens come first: a trained text encoder has a row for
    each of them.
    """
    lines = []
    if is_xl:
        lines += [
            "# The prompt as a whole is read at its end mark, not at a word that is added.",
            "for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):",
            "    for module in encoder.modules():",
            '        if hasattr(module, "eos_token_id"):',
            "            module.eos_token_id = pipeline.tokenizer.eos_token_id",
        ]
    for number, subject in enumerate(config.subjects):
        name = EMBEDDINGS.replace("*", f"-{number + 1}" if number else "")
        if not (weights / name).is_file():
            continue
        if not is_xl:
            lines.append(f'pipeline.load_textual_inversion("weights", weight_name="{name}")')
            continue
        lines.append(f'vectors = load_file("weights/{name}")')
        for key, ending in (("clip_l", ""), ("clip_g", "_2")):
            lines += [
                "pipeline.load_textual_inversion(",
                f'    vectors["{key}"],',
                f"    token={json.dumps(subject.token)},",
                f"    text_encoder=pipeline.text_encoder{ending},",
                f"    tokenizer=pipeline.tokenizer{ending},",
                ")",
            ]
    for part in PARTS:
        if not (weights / f"{part}.safetensors").is_file():
            continue
        lines.append(f'weights = load_file("weights/{part}.safetensors")')
        if part != "unet":
            prefix = 'removeprefix("text_model.")'
            lines += [
                "# transformers 4 has text_model. before its names, 5 has not.",
                f"own = {{n.{prefix}: n for n in pipeline.{part}.state_dict()}}",
                f"weights = {{own[n.{prefix}]: weight for n, weight in weights.items()}}",
            ]
        lines += [
            f"result = pipeline.{part}.load_state_dict(weights, strict=False)",
            "assert not result.unexpected_keys",
        ]
    if (weights / LORA_FILE).is_file():
        lines.append(f'pipeline.load_lora_weights(".", weight_name="{LORA_FILE}")')
    return lines


def _drawing_lines(config: TuningConfig, backbone: Backbone, prompt: str) -> list[str]:
    """The lines that draw the upper left picture of samples.png, as `generate` does."""
    sampling = sampling_settings(backbone)
    clip = bool(backbone.pipeline.scheduler.config.get("clip_sample", False))
    return [
        "pipeline.scheduler = DDIMScheduler.from_config(",
        f"    pipeline.scheduler.config, clip_sample={clip}",
        ")",
        "image = pipeline(",
        f"    {json.dumps(prompt, ensure_ascii=False)},",
        f"    num_inference_steps={sampling['num_inference_steps']},",
        f"    guidance_scale={sampling['guidance_scale']},",
        f"    generator=torch.Generator().manual_seed({config.seed * 100_003}),",
        ").images[0]",
    ]


def _plain(text: str) -> str:
    """Return a text for Markdown, where none of its characters means anything."""
    return re.sub(r"([\\`*_{}\[\]<>()#|!&~])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """Return a text as code in Markdown: between more backticks than it has in a row."""
    text = " ".join(text.split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{text}{fence}" if len(fence) == 1 else f"{fence} {text} {fence}"


def _base(config: TuningConfig) -> str:
    # The path of the embedded model differs from machine to machine: in a clone it is this one.
    return "data/embedded" if config.backbone == EMBEDDED else config.backbone


def _source(config: TuningConfig, backbone: Backbone) -> str:
    """The arguments that open the base model in plain diffusers, at the commit that was tuned."""
    hub = hub_id(config.backbone)
    if hub is None:
        return json.dumps(_base(config))
    name, revision = json.dumps(hub[0]), backbone.commit or hub[1]
    return f"{name}, revision={json.dumps(revision)}" if revision else name
