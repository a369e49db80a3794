"""What a run is for others: its card, a LoRA for the web UIs, a pipeline, a folder to share."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import torch
from jinja2 import Environment, FileSystemLoader
from safetensors.torch import load, load_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Tensor

from sude_lab import __version__
from sude_lab.backbone import Backbone
from sude_lab.config import EMBEDDED_MODELS, TuningConfig, fields_of
from sude_lab.errors import UserError, explained
from sude_lab.generation import sampling_settings
from sude_lab.io.files import atomic_folder, atomic_write, save_tensors, sole_writer
from sude_lab.io.opening import FACTS_FILE, hub_id
from sude_lab.io.weights import EMBEDDINGS, LORA_FILE, VICO_FILE, shared_name
from sude_lab.methods import get_method

if TYPE_CHECKING:
    from sude_lab.runs.folder import Run

Precision = Literal["float32", "bfloat16", "float16"]

# --- the model card: what a run is, how plain diffusers loads it, how it was made -----------------

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


# --- LoRA for the web UIs ------------------------------------------------------------------------

_ARCHITECTURES = {
    "sd_v1": "stable-diffusion-v1",
    "sd_v2": "stable-diffusion-v2-512",
    "sd_v2_v": "stable-diffusion-v2-768-v",
    "sdxl_base_v1-0": "stable-diffusion-xl-v1-base",
}
"""sd-scripts' names of base models, and those of the model specification."""
XL = "sdxl_base_v1-0"


def base_version(backbone: Backbone) -> str:
    """Return sd-scripts' name of the kind of model that a backbone is."""
    if backbone.part != "unet":
        return backbone.tag
    if backbone.is_xl:
        return XL
    predicts_v = backbone.pipeline.scheduler.config.get("prediction_type") == "v_prediction"
    width = backbone.text_encoder.config.hidden_size
    return f"sd_v{2 if width == 1024 else 1}{'_v' if predicts_v and width == 1024 else ''}"


def kohya_weights(
    lora: dict[str, Tensor], dtype: torch.dtype, version: str = "sd_v1"
) -> dict[str, Tensor]:
    """Return LoRA weights of diffusers or peft under the names of kohya's scripts.

    `alpha` is the rank, as it was in tuning: a scale of 1. The scripts name the blocks of SDXL's
    UNet as its authors did, those of the others as diffusers does.
    """
    from diffusers.utils import convert_all_state_dict_to_peft, convert_state_dict_to_kohya

    # Without unet. before a name diffusers' converter writes one that no program knows.
    named = {
        name if name.startswith(("unet.", "text_encoder")) else f"unet.{name}": value
        for name, value in lora.items()
    }
    tensors = convert_state_dict_to_kohya(convert_all_state_dict_to_peft(named))
    if version == XL:
        # diffusers counts layers block by block, the authors all the layers on one way through;
        # each block below the last ends in a layer that halves the side.
        ups = [int(m[1]) for n in tensors if (m := re.match(r".*up_blocks_\d_attentions_(\d)", n))]
        layers = max(ups, default=2) + 1

        def renamed(match: re.Match[str]) -> str:
            number = int(match["block"] or 0) * layers + int(match["layer"])
            blocks = {"down": f"input_blocks_{number + 1}", "up": f"output_blocks_{number}"}
            return f"lora_unet_{blocks.get(match['way'], 'middle_block')}_1_"

        place = r"(?P<way>down|mid|up)_blocks?_((?P<block>\d+)_)?attentions_(?P<layer>\d+)_"
        tensors = {re.sub(f"lora_unet_{place}", renamed, n): v for n, v in tensors.items()}
    return {name: value.to(dtype).contiguous() for name, value in tensors.items()}


def write_kohya(run: Run, path: Path | str, dtype: Precision = "float16") -> Path:
    """Write the LoRA of a run as one file for the web UIs; return its path.

    The subject's token is not in it: the web UIs read `learned_embeds.safetensors` as an embedding.
    """
    path, weights = Path(path), run.weights
    if path.suffix != ".safetensors":
        raise UserError(f"{path} must end in .safetensors: a kohya LoRA is one such file.")
    if path.exists():
        raise UserError(f"{path} exists already: name a new file.")
    if not (weights / LORA_FILE).is_file():
        raise UserError("The run holds no LoRA: tune with --train lora, or export the pipeline.")
    if any((weights / f"{part}.safetensors").is_file() for part in PARTS):
        raise UserError("The run's text encoder was trained, too: export the pipeline.")
    version = str(run.environment.get("base_version"))
    if version not in _ARCHITECTURES:
        raise UserError(f"A LoRA's names are not known here for {version}: load it with diffusers.")
    tensors = kohya_weights(load_file(weights / LORA_FILE), getattr(torch, dtype), version)
    ranks = {len(value) for name, value in tensors.items() if name.endswith("lora_down.weight")}
    about = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(max(ranks)),
        "ss_network_alpha": str(max(ranks)),
        "ss_output_name": path.stem,
        # By these the web UIs file a LoRA, and offer it for models of its kind alone.
        "ss_base_model_version": version,
        "ss_v2": str(version.startswith("sd_v2")),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{_ARCHITECTURES[version]}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": path.stem,
        **({"modelspec.prediction_type": "v"} if version.endswith("_v") else {}),
    }
    with sole_writer(path), atomic_write(path) as unfinished:
        save_tensors(tensors, unfinished, metadata=about)
    return path


# --- a folder to share ---------------------------------------------------------------------------


def share(run: Run, out: Path | str) -> Path:
    """Write what of a run is for others: card, weights and samples, no photo; return the folder.

    What names this machine's folders is left out.
    """
    source, weights = run.config.backbone, run.weights
    if (weights / VICO_FILE).is_file():
        raise UserError("ViCo's weights hold the photo itself: share the run's folder, if you may.")
    config = asdict(replace(run.config, image=Path(run.config.image.name), class_images=None))
    if run.config.regularizer_file:
        config["regularizer_file"] = run.config.regularizer_file.name
    config["more_subjects"] = [
        f"{s.category}={s.token}={s.image.name}" for s in run.config.subjects[1:]
    ]
    with sole_writer(out), atomic_folder(out) as folder:
        shutil.copytree(weights, folder / weights.name)
        for name in (LORA_FILE, "samples.png", "environment.json", CARD):
            if (run.folder / name).is_file():
                shutil.copy(run.folder / name, folder)
        if Path(source).is_absolute():
            config["backbone"] = Path(source).name
            card = (run.folder / CARD).read_text(encoding="utf-8")
            for text in (json.dumps(source)[1:-1], source):
                card = card.replace(text, Path(source).name)
            (folder / CARD).write_text(card, encoding="utf-8")
        text = json.dumps(config, indent=2, default=str)
        (folder / "config.json").write_text(text, encoding="utf-8")
    return Path(out)


def push(run: Run, repository: str | None = None) -> str:
    """Upload what `share` writes to the Hub, into a private repository where it is new.

    `repository` is "name" or "owner/name"; None: the name of the run's folder.
    """
    from huggingface_hub import HfApi

    name = repository or re.sub(r"[^\w.-]+", "-", run.folder.resolve().name)
    with TemporaryDirectory() as room:
        folder = share(run, Path(room) / "share")
        again = f"`sude-lab export {run.folder} --push-to-hub`"
        with explained(f"{name} could not be uploaded", f"`hf auth login`, then {again}"):
            api: Any = HfApi()
            name = api.create_repo(name, exist_ok=True, private=True).repo_id
            api.upload_folder(repo_id=name, folder_path=folder, commit_message="A run of sude_lab")
    return str(name)


# --- a whole pipeline ----------------------------------------------------------------------------


def export_pipeline(
    run: Run, out: Path | str, dtype: Precision = "float32", *, trust_backbone: bool = False
) -> Path:
    """Write a run as a complete diffusers pipeline folder; return the folder.

    `DiffusionPipeline.from_pretrained(out)` needs nothing else: the tokens are in the tokenizers
    and text encoders, a LoRA is merged into the UNet. A safety checker is left out.
    """
    weights = run.weights
    if not is_plain(weights):
        raise UserError(
            f"A pipeline has no place for what {run.config.method} adds: use `generate`."
        )
    with sole_writer(out), atomic_folder(out) as folder:
        backbone = run.load("cpu", trust_backbone=trust_backbone)
        pipeline = backbone.pipeline
        if (weights / LORA_FILE).is_file():
            pipeline.fuse_lora(components=[backbone.part])
            pipeline.unload_lora_weights()
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.to(getattr(torch, dtype))
        pipeline.save_pretrained(folder, safe_serialization=True)
        open_to_earlier_versions(folder)
        if backbone.facts:
            facts = json.dumps(backbone.facts, indent=1)
            (folder / FACTS_FILE).write_text(facts, encoding="utf-8")
        prompts = [run.prompt(get_method(run.config.method).prompts(run.config)[0])]
        card = model_card(run.config, backbone, weights, prompts, grid=None, pipeline=True)
        (folder / CARD).write_text(card, encoding="utf-8")
    return Path(out)


def open_to_earlier_versions(pipeline: Path) -> None:
    """Let transformers 4, too, open a pipeline folder that transformers 5 wrote.

    5 writes a tokenizer as `tokenizer.json` alone, and the tensors of a CLIPTextModel that was not
    read from such a file without "text_model." before their names.
    """
    for path in pipeline.glob("tokenizer*/tokenizer.json"):
        words = Tokenizer.from_file(str(path)).model
        if isinstance(words, BPE):  # CLIP's; T5's is read from this file by both
            words.save(str(path.parent))  # vocab.json and merges.txt
    for name in ("model_index.json", "tokenizer_3/tokenizer_config.json"):
        if (path := pipeline / name).is_file():  # 5's own name of a tokenizer is not in 4
            text = path.read_text(encoding="utf-8")
            text = text.replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"')
            path.write_text(text, encoding="utf-8")
    for path in pipeline.glob("text_encoder*/model.safetensors"):
        if "CLIP" not in (path.parent / "config.json").read_text(encoding="utf-8"):
            continue
        tensors = load(path.read_bytes())  # into memory: the file is written over
        named = {shared_name("text_encoder", name): tensor for name, tensor in tensors.items()}
        if named.keys() != tensors.keys():
            save_tensors(named, path, metadata={"format": "pt"})
