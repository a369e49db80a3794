"""What a run is for other programs: a model card, a LoRA for the web UIs, a pipeline folder."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from sude_lab import __version__
from sude_lab.backbone import Backbone
from sude_lab.config import EMBEDDED
from sude_lab.errors import UserError
from sude_lab.generation import sampling_settings
from sude_lab.io.files import atomic_folder, atomic_write, save_tensors, sole_writer
from sude_lab.io.opening import FACTS_FILE, hub_id
from sude_lab.methods import get_method
from sude_lab.methods.base import EMBEDDINGS, shared_name
from sude_lab.methods.dreambooth import LORA_FILE
from sude_lab.prompts import fill, placeholder
from sude_lab.tuning import TuningConfig

if TYPE_CHECKING:
    from sude_lab.runs.folder import Run

CARD = "README.md"
Precision = Literal["float32", "bfloat16", "float16"]

_PARTS = ("unet", "text_encoder", "text_encoder_2")
_PAPERS = {
    "dreambooth": "DreamBooth (arXiv 2208.12242)",
    "custom_diffusion": "Custom Diffusion (arXiv 2212.04488)",
    "vico": "ViCo (arXiv 2306.00971)",
    "textual_inversion": "Textual Inversion (arXiv 2208.01618)",
}
_TOLD = (
    *("method", "train", "train_text_encoder", "lora_rank", "weight_sude", "prior", "weighting"),
    *(
        "truncate",
        "truncate_at",
        "prior_bank",
        "prior_loss_weight",
        "regularizer",
        "num_class_images",
        "max_train_steps",
    ),
    *("train_batch_size", "gradient_accumulation_steps", "learning_rate", "token_learning_rate"),
    *("lr_warmup_steps", "optimizer", "horizontal_flip", "resolution", "seed"),
)
"""The settings of a card's table; all of them are in config.json."""


def is_plain(weights: Path) -> bool:
    """Whether plain diffusers has a place for everything in a run's folder of weights."""
    known = {LORA_FILE, *(f"{part}.safetensors" for part in _PARTS)}
    return all(p.match(EMBEDDINGS) or p.name in known for p in weights.iterdir())


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
        token = json.dumps(subject.token)
        if is_xl:
            lines.append(f'vectors = load_file("weights/{name}")')
            for key, ending in (("clip_l", ""), ("clip_g", "_2")):
                lines += [
                    "pipeline.load_textual_inversion(",
                    f'    vectors["{key}"],',
                    f"    token={token},",
                    f"    text_encoder=pipeline.text_encoder{ending},",
                    f"    tokenizer=pipeline.tokenizer{ending},",
                    ")",
                ]
        else:
            lines.append(f'pipeline.load_textual_inversion("weights", weight_name="{name}")')
    for part in _PARTS:
        if (weights / f"{part}.safetensors").is_file():
            lines.append(f'weights = load_file("weights/{part}.safetensors")')
            if part != "unet":
                prefix = 'removeprefix("text_model.")'
                lines += [
                    "# transformers 4 has text_model. before its names, 5 has not.",
                    f"own = {{n.{prefix}: n for n in pipeline.{part}.state_dict()}}",
                    f"weights = {{own[n.{prefix}]: weight for n, weight in weights.items()}}",
                ]
            lines += [
                f"told = pipeline.{part}.load_state_dict(weights, strict=False)",
                "assert not told.unexpected_keys",
            ]
    if (weights / LORA_FILE).is_file():
        lines.append(f'pipeline.load_lora_weights("weights", weight_name="{LORA_FILE}")')
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
    told = hub_id(config.backbone)
    if told is None:
        return json.dumps(_base(config))
    name, revision = json.dumps(told[0]), backbone.commit or told[1]
    return f"{name}, revision={json.dumps(revision)}" if revision else name


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
    prompt = prompts[0]
    base = _base(config)
    hub = hub_id(config.backbone)
    lora = (weights / LORA_FILE).is_file()
    head = [
        "---",
        "library_name: diffusers",
        "pipeline_tag: text-to-image",
        *([f"base_model: {json.dumps(hub[0])}"] if hub else []),
        *(["license: apache-2.0"] if config.backbone == EMBEDDED else []),
        f"instance_prompt: {json.dumps(prompt, ensure_ascii=False)}",
        "tags:",
        *(f"- {tag}" for tag in ("text-to-image", "sude", config.method.replace("_", "-"))),
        *(["- lora"] if lora and not pipeline else []),
        "---",
    ]
    names = ", ".join(f"{_code(s.token)} (a {s.category})" for s in config.subjects)
    paper = _PAPERS.get(config.method, config.method)
    sude = (
        f"with SuDe (arXiv 2403.06775), w_s = {config.weight_sude:g}"
        if config.weight_sude
        else "without SuDe (w_s = 0)"
    )
    about = [
        f"# {', '.join(s.category for s in config.subjects)}: learned from one picture",
        "",
        f"{paper}, {sude}, tuned on one picture of each subject. In a prompt, say {names}.",
    ]
    if grid:
        rows = "; ".join(f"“{_code(p)}”" for p in prompts)
        about += ["", f"![the subject, drawn]({grid})", "", f"Rows: {rows}. Columns: seeds."]
    return "\n".join(
        [
            *head,
            "",
            *about,
            "",
            "## Draw with it",
            *_how_to_draw(config, backbone, weights, prompt, pipeline),
            "",
            "## How it was tuned",
            f"Base model: `{base}`. sude_lab {__version__}; every setting is in `config.json`."
            if not pipeline
            else f"Base model: `{base}`. sude_lab {__version__}.",
            "",
            "| setting | value |",
            "|---|---|",
            *(f"| {name} | {getattr(config, name)} |" for name in _TOLD),
            "",
            "## Licence",
            "Apache-2.0, as the embedded model."
            if config.backbone == EMBEDDED
            else f"What was tuned derives from `{base}`: the licence of that model applies.",
            "Whoever shares it needs the rights in the pictures it was tuned on.",
            "",
        ]
    )


def _how_to_draw(
    config: TuningConfig,
    backbone: Backbone,
    weights: Path,
    prompt: str,
    pipeline: bool,
) -> list[str]:
    draw = _drawing_lines(config, backbone, prompt)
    imports = ["import torch", "from diffusers import DDIMScheduler, DiffusionPipeline"]
    own = f'`sude-lab generate . "photo of a {placeholder(0)}" --out pictures` draws with it, too.'
    if pipeline:
        lines = [*imports, "", 'pipeline = DiffusionPipeline.from_pretrained(".")', *draw]
        return ["In plain diffusers, from this folder:", "```python", *lines, "```"]
    if not is_plain(weights):
        lines = [
            "import torch",
            "from diffusers import DDIMScheduler",
            "from sude_lab.runs.folder import Run",
            "",
            'pipeline = Run.open(".").load().pipeline',
            *draw,
        ]
        why = "Plain diffusers has no place for what this method adds to the UNet."
        return [why, "From this folder:", "```python", *lines, "```", "", own]
    lines = [
        *imports,
        "from safetensors.torch import load_file",
        "",
        f"pipeline = DiffusionPipeline.from_pretrained({_source(config, backbone)})",
        *loading_lines(config, weights, is_xl=backbone.is_xl),
        *draw,
    ]
    what = "In plain diffusers, from this folder; it draws the first picture of the grid:"
    if config.backbone == EMBEDDED:
        what = f"{what[:-1]} (`data/embedded` is in a clone of sude_lab):"
    return [what, "```python", *lines, "```", "", own]


# --- LoRA for the web UIs ------------------------------------------------------------------------


def kohya_weights(lora: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return LoRA weights of diffusers or peft under the names of kohya's scripts.

    `unet.` is put before every name first: without it diffusers' converter writes names that no
    program knows, and says nothing. `alpha` is the rank, as it was in tuning: a scale of 1.

    Raises:
        UserError: the weights are no LoRA.
    """
    from diffusers.utils import convert_all_state_dict_to_peft, convert_state_dict_to_kohya

    named = {
        name if name.startswith(("unet.", "text_encoder")) else f"unet.{name}": value
        for name, value in lora.items()
    }
    try:
        found = convert_state_dict_to_kohya(convert_all_state_dict_to_peft(named))
    except (ValueError, KeyError) as error:
        raise UserError("These weights are no LoRA: tune with --train lora.") from error
    return {name: value.to(dtype).contiguous() for name, value in found.items()}


def write_kohya(weights: Path, path: Path | str, dtype: Precision = "float16") -> Path:
    """Write the LoRA of a run's folder of weights as one file for the web UIs; return its path.

    The subject's token is not in it: it is `learned_embeds.safetensors`, which the web UIs read as
    an embedding, under its file's name.

    Raises:
        UserError: the run is no LoRA, or its text encoder was trained, which a LoRA cannot hold.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path} must end in .safetensors: a kohya LoRA is one such file.")
    if path.exists():
        raise UserError(f"{path} exists already: name a new file.")
    if not (weights / LORA_FILE).is_file():
        raise UserError("The run holds no LoRA: tune with --train lora, or export the pipeline.")
    if any((weights / f"{part}.safetensors").is_file() for part in _PARTS):
        raise UserError(
            "The run's text encoder was trained, too, which a LoRA file cannot hold: export the "
            "pipeline."
        )
    tensors = kohya_weights(load_file(weights / LORA_FILE), getattr(torch, dtype))
    ranks = {len(value) for name, value in tensors.items() if name.endswith("lora_down.weight")}
    about = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(max(ranks)),
        "ss_network_alpha": str(max(ranks)),
        "ss_output_name": path.stem,
    }
    with sole_writer(path), atomic_write(path) as unfinished:
        save_tensors(tensors, unfinished, metadata=about)
    return path


# --- a whole pipeline ----------------------------------------------------------------------------


def export_pipeline(
    run: Run, out: Path | str, dtype: Precision = "float32", *, trust_backbone: bool = False
) -> Path:
    """Write a run as a complete diffusers pipeline folder; return the folder.

    `DiffusionPipeline.from_pretrained(out)` needs nothing else: the tokens are in the tokenizers
    and in the tables of the text encoders, a LoRA is merged into the UNet. The folder can be tuned
    on in turn, as `--backbone`. A safety checker of the base model is left out.

    Raises:
        UserError: the run's method adds what plain diffusers has no place for, the weights do not
            fit, or `out` is a folder that is not empty.
    """
    weights = run.weights
    if not is_plain(weights):
        raise UserError(
            f"A pipeline folder has no place for what {run.config.method} adds to the UNet: draw "
            "with `sude-lab generate`."
        )
    with sole_writer(out), atomic_folder(out) as folder:
        backbone = run.load("cpu", trust_backbone=trust_backbone)
        pipeline = backbone.pipeline
        if (weights / LORA_FILE).is_file():
            pipeline.fuse_lora(components=["unet"])
            pipeline.unload_lora_weights()
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.to(getattr(torch, dtype))
        pipeline.save_pretrained(folder, safe_serialization=True)
        open_to_earlier_versions(folder)
        if backbone.facts:
            facts = json.dumps(backbone.facts, indent=1)
            (folder / FACTS_FILE).write_text(facts, encoding="utf-8")
        tokens = [s.token for s in run.config.subjects]
        template = run.config.prompt or get_method(run.config.method).template
        text = template.replace("{category}", run.config.category)
        card = model_card(
            run.config, backbone, weights, [fill(text, *tokens)], grid=None, pipeline=True
        )
        (folder / CARD).write_text(card, encoding="utf-8")
    return Path(out)


def open_to_earlier_versions(pipeline: Path) -> None:
    """Let transformers 4, too, open a pipeline folder that transformers 5 wrote.

    5 writes a tokenizer as `tokenizer.json` alone, and the tensors of a CLIPTextModel that was not
    read from such a file without "text_model." before their names.
    """
    for path in pipeline.glob("tokenizer*/tokenizer.json"):
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
        write_vocabulary(path.parent, model["vocab"], model["merges"])
    for path in pipeline.glob("text_encoder*/model.safetensors"):
        tensors = load_file(path)
        named = {shared_name("text_encoder", name): tensor for name, tensor in tensors.items()}
        if named.keys() != tensors.keys():
            # Clones, because what was loaded lies in the file that is written over.
            copies = {name: tensor.clone() for name, tensor in named.items()}
            save_tensors(copies, path, metadata={"format": "pt"})


def write_vocabulary(folder: Path, vocab: dict[str, int], merges: list[list[str]]) -> None:
    """Write `vocab.json` and `merges.txt`, the two files of a CLIP tokenizer of transformers 4."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
