"""Open a pipeline: embedded, a local folder, or a hub id; check it before anything of it is used.

A pipeline folder may carry a `sude_lab.json` with the words that the model was trained on, and the
settings that suit it for tuning and for drawing, as the embedded model does.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from sude_lab.adapters import FAMILIES
from sude_lab.adapters.family import DISTILLED, OPTIONAL, Family
from sude_lab.backbone import Backbone
from sude_lab.config import EMBEDDED, EMBEDDED_MODELS
from sude_lab.errors import UserError, explained
from sude_lab.io.reading import digest, hash_of, is_dir, is_file, read_json

FACTS_FILE = "sude_lab.json"
_CODE = (".py", ".pyc", ".pyd", ".so")
_ATTENTION = (None, "eager", "sdpa")  # whose code is installed; others are fetched from the hub
_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?", re.ASCII)


def data_folder() -> Path:
    """Return the folder `data/`: SUDE_LAB_DATA's, the checkout's, or the installed package's."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "data"
    usual = installed if installed.is_dir() else package.parent / "data"
    return Path(os.environ.get("SUDE_LAB_DATA") or usual)


def resolve_source(source: str | Path) -> str:
    """Return the folder or hub id that `source` means; the embedded models are in `data/`."""
    if str(source) not in EMBEDDED_MODELS:
        return str(source)
    folder = data_folder() / EMBEDDED_MODELS[str(source)]
    if not (folder / "model_index.json").exists():
        cure = "install the package anew, or set SUDE_LAB_DATA to the folder data of a clone"
        raise UserError(f"The embedded model is not in {folder}: {cure}.")
    return str(folder)


def is_embedded(source: str | Path) -> bool:
    """Whether `source` means one of the embedded models, by name or by its folder."""
    known = [data_folder() / name for name in EMBEDDED_MODELS.values()]
    return str(source) in EMBEDDED_MODELS or resolve_source(source) in map(str, known)


def hub_id(source: str | Path) -> tuple[str, str | None] | None:
    """Return id and revision (None: the newest) of "owner/name@revision"; None: it is a folder."""
    parts = _HUB_ID.fullmatch(str(source))
    return None if parts is None or is_dir(source) else (parts["id"], parts["revision"])


def backbone_identity(source: str) -> str | None:
    """Return a hash of a pipeline folder's files, or a hub id with the commit that it stands for.

    None: neither the hub nor its cache knows the id.
    """
    return _identity(resolve_source(source))


@cache
def _identity(source: str) -> str | None:
    folder = Path(source)
    if folder.is_dir():
        kinds = (".json", ".txt", ".safetensors", ".model")
        files = [path for path in sorted(all_files(folder)) if path.suffix in kinds]
        return hash_of([(p.relative_to(folder).as_posix(), digest(p)) for p in files])
    name, revision = hub_id(source) or ("", None)
    if re.fullmatch("[0-9a-f]{40}", revision or ""):
        return source
    from huggingface_hub import HfApi, try_to_load_from_cache

    with suppress(Exception):  # no connection, no such model: errors of any class
        return f"{name}@{HfApi().model_info(name, revision=revision, timeout=10).sha}"
    with suppress(ValueError):  # no id of a repository at all
        cached = try_to_load_from_cache(name, "model_index.json", revision=revision)
        if isinstance(cached, str):
            return f"{name}@{Path(cached).parent.name}"
    return None


def pick_device(name: str = "auto") -> torch.device:
    """Return the device a name means; "auto" takes CUDA, then MPS, then the CPU."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()  # "meta" holds nothing that could be read back
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(f"The device {name!r} is not available here: use cpu, or auto.") from error
    return device


def open_backbone(
    source: str | Path = EMBEDDED, *, device: str = "auto", dtype: str = "auto"
) -> Backbone:
    """Open a pipeline of a known family: "embedded", "embedded-flow", a local folder, or a hub id.

    A hub id may name its revision, "owner/name@commit"; `Backbone.commit` says which was opened.
    Nothing that a folder holds is run. `dtype` auto is bfloat16 on a CUDA card that has it, and
    float32 elsewhere.
    """
    with quiet():  # the first import hints at packages that are not needed
        from diffusers import DiffusionPipeline

    folder = resolve_source(source)
    where = pick_device(device)
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise UserError(f"There is no dtype {dtype!r}: use auto, float32, bfloat16 or float16.")
    hub = hub_id(folder)
    apart: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}
    apart["use_safetensors"] = True
    cure = "name a complete pipeline folder with safetensors weights, or a hub id that this machine"
    with explained(f"{source} could not be opened as a pipeline", f"{cure} can reach"), quiet():
        if hub is not None:
            folder = str(DiffusionPipeline.download(hub[0], revision=hub[1], **apart))
        family = _check_source(folder)
        if "safety_checker" not in family.classes:
            apart = {"use_safetensors": True}
        facts = read_facts(folder)
        encoders = _text_encoders(Path(folder))
        pipeline = DiffusionPipeline.from_pretrained(folder, **apart, **encoders)
    if dtype == "auto":
        bf16 = where.type == "cuda" and torch.cuda.is_bf16_supported()
        dtype = "bfloat16" if bf16 else "float32"
    commit = Path(folder).name if hub else None  # the folder of a snapshot is named by its commit
    backbone = family(pipeline, str(source), where, getattr(torch, dtype), facts, commit)
    if wrong := next(_misfits(backbone), None):
        cure = "Name a complete one, as diffusers' save_pretrained wrote it."
        raise UserError(f"{source} is no {family.title} pipeline that works: {wrong}. {cure}")
    pool_at_the_end(backbone)
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    pipeline.to(where)
    return backbone


def _text_encoders(folder: Path) -> dict[str, Any]:
    """Open the text encoders: the pipeline would draw a tensor that a file lacks at random."""
    import transformers

    index = read_json(folder / "model_index.json")
    encoders: dict[str, Any] = {}
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        if not (folder / part).is_dir():
            continue
        kind = getattr(transformers, index[part][1])  # one that its family has
        encoders[part], report = kind.from_pretrained(
            folder / part, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        if report["missing_keys"]:
            raise ValueError(f"its {part} lacks the tensor {min(report['missing_keys'])}")
    return encoders


def pool_at_the_end(backbone: Backbone) -> None:
    """Let the CLIPs read a whole prompt at its first end mark, which is where they learned to.

    Published configurations say `eos_token_id` 2, for which transformers reads at the highest id:
    the end mark's, until a word is added.
    """
    for encoder, words in zip(backbone.text_encoders.values(), backbone.tokenizers, strict=True):
        for holder in (encoder.config, *encoder.modules()):  # one of them has its own copy
            if hasattr(holder, "eos_token_id"):
                holder.eos_token_id = words.eos_token_id


def _misfits(backbone: Family) -> Iterator[str]:
    """Yield which parts of a pipeline are not whole, or do not fit each other."""
    for name, part in backbone.pipeline.components.items():
        if not isinstance(part, nn.Module):
            continue
        tensors = dict(part.named_parameters())
        if lacking := [n for n, p in tensors.items() if p.is_meta]:
            yield f"its {name} lacks the tensor {lacking[0]}"
        # A sum is finite only where all that it adds is.
        if bad := [n for n, p in tensors.items() if not p.detach().float().sum().isfinite()]:
            yield f"its {name} holds values that are not finite, in {bad[0]}"
    try:
        yield from backbone.misfits()
    except ValueError as error:  # of a scheduler without a table
        yield str(error).rstrip(".")


def read_facts(source: str | Path) -> dict[str, Any]:
    """Return what a pipeline's folder says of its model, without opening the model."""
    path = Path(resolve_source(source)) / FACTS_FILE
    if not is_file(path):
        return {}
    with explained(f"{path} does not hold a model's facts", "the file is damaged"):
        facts = read_json(path)
        lists = [facts.get("words", []), facts.get("categories", [])]
        tuning, drawing = facts.get("tuning", {}), facts.get("generation", {})
        length = facts.get("text", {}).get("max_sequence_length", 0)
        checks = (
            all(isinstance(x, list) and all(isinstance(y, str) for y in x) for x in lists),
            all(isinstance(settings, dict) for settings in tuning.values()),
            set(drawing) <= {"num_inference_steps", "guidance_scale"},
            type(drawing.get("num_inference_steps", 1)) is int,
            type(drawing.get("guidance_scale", 1.0)) in (int, float),
            type(length) is int and 0 <= length <= 512,
        )
        if not all(checks):
            raise ValueError("a value of another kind")
        return facts


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the loaders' progress bars and hints for a moment; a small model loads at once."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    with ExitStack() as stack:
        for module in (diffusers_logging, transformers_logging):
            stack.callback(module.set_verbosity, module.get_verbosity())
            if module.is_progress_bar_enabled():
                stack.callback(module.enable_progress_bar)
            module.set_verbosity_error()
            module.disable_progress_bar()
        yield


def _check_source(folder: str) -> type[Family]:
    """Return the family of a pipeline folder that is complete and harmless; it is not opened."""
    path, index = Path(folder), Path(folder) / "model_index.json"
    if not folder.strip() or not is_file(index):
        what = f"There is no pipeline folder {folder[:200]!r} with a model_index.json"
        cure = "name one that diffusers' save_pretrained wrote, a hub id (owner/name), or embedded"
        raise UserError(f"{what}: {cure}.")
    with explained(f"{index} is not a pipeline's index", "the folder is damaged"):
        content = read_json(index)
        name = content.get("_class_name")
    if re.fullmatch(r"Flux2?Pipeline", str(name)):
        raise UserError(f"{folder} holds a {name}, which {DISTILLED}.")
    if str(name) not in FAMILIES:
        raise UserError(f"{folder} holds a {name!s:.80}: it must be one of {', '.join(FAMILIES)}.")
    family = FAMILIES[name]
    for part, value in content.items():
        if not isinstance(value, list) or value == [None, None]:
            continue
        allowed = family.classes.get(part, "$^")
        if not re.fullmatch(allowed, " ".join(map(str, value))):
            only = f"only the classes that a {family.title} has there are opened"
            raise UserError(f"{index} takes its {part} from {str(value)[:80]}: {only}.")
    check_harmless(path)
    if refusal := family.refusal(path, content, lambda file: read_json(path / file)):
        raise UserError(f"{refusal}.")
    parts = [part for part in family.classes if part not in OPTIONAL]
    if lost := [part for part in parts if not (path / part).is_dir()]:
        raise UserError(f"{folder} lacks the folder {lost[0]}: the pipeline is not complete.")
    for part in parts:
        _check_weights(path / part)
        # transformers makes an empty tokenizer where there is none.
        words = ("tokenizer.json", "vocab.json", "spiece.model")
        if part.startswith("tokenizer") and not any((path / part / w).is_file() for w in words):
            raise UserError(f"{folder}/{part} has no tokenizer.json or vocab.json: take it anew.")
    return family


def check_harmless(folder: Path) -> None:
    """Refuse what could make a loader run code, or open a model from elsewhere."""
    for file in all_files(folder):
        if file.suffix in _CODE:
            what = f"{folder} holds a program, {file.relative_to(folder)}, which a loader might run"
            raise UserError(f"{what}: if you trust it, open a copy of the folder without it.")
        nested = file.name == "model_index.json" and file.parent != folder
        if nested or file.name == "adapter_config.json":
            what = f"{folder} holds {file.relative_to(folder)}, with which a part would be opened"
            raise UserError(f"{what} as a model of its own: take it out.")
        if file.suffix == ".json" and "config" in file.name:
            for name, value in _entries(file):
                foreign = "attn_implementation" in name and value not in _ATTENTION
                if name == "auto_map" or foreign:
                    what = f"{file} says {name} {str(value)[:80]!r}, which would run code"
                    raise UserError(f"{what} from elsewhere: take the line out.")


def all_files(folder: Path) -> Iterator[Path]:
    """Yield every file below a folder, also behind links to other folders, each folder once."""
    visited: set[Path] = set()
    for root, below, names in os.walk(folder, followlinks=True):
        if (real := Path(root).resolve()) in visited:
            below.clear()
            continue
        visited.add(real)
        below.sort()
        yield from (Path(root, name) for name in sorted(names))


def _entries(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield every name and value of a JSON file, however deep."""
    with explained(f"{file} cannot be read as JSON", "the folder is damaged"):
        parts = [read_json(file)]
    for part in parts:  # which grows
        if isinstance(part, dict):
            yield from part.items()
            parts += part.values()
        elif isinstance(part, list):
            parts += part


def _check_weights(folder: Path) -> None:
    """Look at the headers of the weights: whole numbers would be taken for weights."""
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            kinds = {n: weights.get_slice(n).get_dtype() for n in weights.keys()}  # noqa: SIM118
        for name, kind in kinds.items():
            if name.endswith("weight") and not kind.startswith(("F", "BF")):
                raise UserError(f"{file} holds {name} as {kind}: no floating-point numbers.")
