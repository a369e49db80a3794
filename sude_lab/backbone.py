"""Any diffusers text-to-image pipeline, opened for study: embedded, local folder or hub id.

A pipeline folder may carry a `sude_lab.json` beside its `model_index.json`, with what is known of
that model: the words it was trained on, and the settings that suit it for tuning and for drawing.
The embedded model has one; without it the settings of the methods' papers apply.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import AddedToken
from torch import Tensor

from sude_lab.diffusion import Schedule
from sude_lab.errors import UserError
from sude_lab.pictures import to_tensor
from sude_lab.prompts import PLACEHOLDER

EMBEDDED = "embedded"
FACTS_FILE = "sude_lab.json"


def data_folder() -> Path:
    """Return the folder `data/` of the checkout, or the one that SUDE_LAB_DATA names."""
    named = os.environ.get("SUDE_LAB_DATA")
    return Path(named) if named else Path(__file__).resolve().parent.parent / "data"


def resolve_source(source: str | Path) -> str:
    """Return the folder or hub id that `source` means; "embedded" is the model in `data/`.

    Raises:
        UserError: the embedded model is not where it should be.
    """
    if str(source) != EMBEDDED:
        return str(source)
    folder = data_folder() / "embedded"
    if not (folder / "model_index.json").exists():
        raise UserError(
            f"The embedded model is not in {folder}: run from a clone of the repository installed "
            "with `pip install -e .`, or set SUDE_LAB_DATA to its data folder."
        )
    return str(folder)


def pick_device(name: str = "auto") -> torch.device:
    """Return the device a name means; "auto" takes CUDA, then MPS, then the CPU.

    Raises:
        UserError: the device is not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(
            f"The device {name!r} is not available here: use cpu, or auto to take what is there."
        ) from error
    return device


@dataclass
class Backbone:
    """A Stable Diffusion pipeline with what tuning asks of it.

    Weights are kept in float32; `dtype` is the precision of the forward passes (autocast).
    """

    pipeline: Any
    source: str
    device: torch.device
    dtype: torch.dtype = torch.float32
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def unet(self) -> Any:
        """The denoiser eps_theta."""
        return self.pipeline.unet

    @property
    def text_encoder(self) -> Any:
        """The text encoder that turns a prompt into the condition c."""
        return self.pipeline.text_encoder

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the text encoder."""
        return self.pipeline.tokenizer

    @property
    def schedule(self) -> Schedule:
        """The noise schedule the model was trained with."""
        return Schedule.from_scheduler(self.pipeline.scheduler)

    @property
    def resolution(self) -> int:
        """The side of a picture in pixels."""
        return int(self.unet.config.sample_size * self.pipeline.vae_scale_factor)

    @property
    def known_words(self) -> tuple[str, ...]:
        """The words the model was trained on, where its folder lists them; else empty."""
        return tuple(self.facts.get("words", ()))

    def copy(self) -> Backbone:
        """Return a backbone with weights of its own, to be tuned while this one stays as it is."""
        return replace(self, pipeline=copy.deepcopy(self.pipeline))

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which forward passes run in `dtype`."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def unknown_words(self, text: str) -> list[str]:
        """Return the words of `text` that the model was not trained on, where that is known."""
        if not self.known_words:
            return []
        words = re.findall(r"[^\W\d_]+", text.replace(PLACEHOLDER, " ").lower())
        return [word for word in dict.fromkeys(words) if word not in self.known_words]

    def check_category(self, category: str) -> str:
        """Return the category in its plain form.

        Raises:
            UserError: it is empty, longer than the text encoder reads, or unknown to the model.
        """
        category = " ".join(category.split())
        if not category or not any(ch.isalnum() for ch in category):
            raise UserError('The category is empty: name one, for example --category "dog".')
        if PLACEHOLDER in category:
            raise UserError(f"The category names a class, without {PLACEHOLDER}: for example dog.")
        if len(self.tokenizer(category).input_ids) > self.tokenizer.model_max_length // 2:
            raise UserError(f"The category {category[:40]!r}... is too long: use one or two words.")
        unknown = self.unknown_words(category)
        if unknown:
            known = self.facts.get("categories") or self.known_words
            raise UserError(
                f"This model has never met the word {unknown[0]!r}: "
                f"choose a category among {', '.join(known)}, or another --backbone."
            )
        return category

    def add_token(self, token: str, initializer: str) -> int:
        """Add the word `token` for the subject, start its embedding at that of `initializer`.

        The embedding of an initializer of several tokens is their mean. Returns the new id.

        Raises:
            UserError: the token is empty, has a space, or already means something.
        """
        if not token or token != token.strip() or len(token.split()) != 1:
            raise UserError(f"The token {token!r} must be one word without spaces, like <sks>.")
        if token.lower() in self.tokenizer.get_vocab() or self._is_one_token(token):
            raise UserError(
                f"The token {token!r} is already in the vocabulary and means something: "
                "choose a new one, like <sks>."
            )
        start = self.tokenizer(initializer, add_special_tokens=False).input_ids
        # A single word: the letters of a token like "og" must not be cut out of "dog".
        self.tokenizer.add_tokens(AddedToken(token, single_word=True))
        index = int(self.tokenizer.convert_tokens_to_ids(token))
        with torch.random.fork_rng(devices=[]):  # the new row is drawn before it is written over
            self.text_encoder.resize_token_embeddings(len(self.tokenizer), mean_resizing=False)
        table = self.text_encoder.get_input_embeddings().weight
        with torch.no_grad():
            table[index] = table[start].mean(dim=0)
        return index

    def _is_one_token(self, word: str) -> bool:
        return len(self.tokenizer(word, add_special_tokens=False).input_ids) == 1

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Return token ids (B, L), padded to the text encoder's length, on the device."""
        ids = self.tokenizer(
            prompts,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return ids.to(self.device)

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Return the condition c of every prompt, (B, L, D); gradients flow where they are on."""
        with self.autocast():
            return self.text_encoder(self.tokenize(prompts))[0]

    @torch.no_grad()
    def encode_pictures(self, images: list[Image.Image]) -> tuple[Tensor, Tensor]:
        """Return mean and deviation of pictures' latents, (B, C, h, w), scaled for the UNet."""
        x = torch.cat([to_tensor(image) for image in images]).to(self.device)
        posterior = self.pipeline.vae.encode(x).latent_dist
        scale = self.pipeline.vae.config.scaling_factor
        return posterior.mean * scale, posterior.std * scale

    def predict(self, x_t: Tensor, t: Tensor, condition: Tensor, unet: Any = None) -> Tensor:
        """Return the model output (eps, x_0 or v, by the schedule) in float32, (B, C, h, w)."""
        with self.autocast():
            return (unet or self.unet)(x_t, t, encoder_hidden_states=condition).sample.float()


def open_backbone(
    source: str | Path = EMBEDDED, *, device: str = "auto", dtype: str = "auto"
) -> Backbone:
    """Open a Stable Diffusion pipeline: "embedded", a local folder, or a hub id.

    `dtype` auto computes in bfloat16 on a CUDA card that has it and in float32 elsewhere.

    Raises:
        UserError: there is no such pipeline, it is not a Stable Diffusion text-to-image pipeline,
            its weights are not safetensors, or the device is not there.
    """
    with _quiet():  # the first import hints at packages that are not needed
        from diffusers import StableDiffusionPipeline

    folder = resolve_source(source)
    where = pick_device(device)
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise UserError(f"There is no dtype {dtype!r}: use auto, float32, bfloat16 or float16.")
    _check_source(folder)
    facts = _read_facts(Path(folder) / FACTS_FILE)
    try:
        with _quiet():
            pipeline = StableDiffusionPipeline.from_pretrained(
                folder, use_safetensors=True, safety_checker=None, requires_safety_checker=False
            )
    except Exception as error:  # loaders, and the client of the hub, fail with errors of any class
        raise UserError(
            f"{source} could not be opened as a Stable Diffusion pipeline "
            f"({type(error).__name__}: {str(error)[:160]}): name a complete pipeline folder with "
            "safetensors weights, or a hub id that this machine can reach."
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        part.requires_grad_(False).eval()
    if dtype == "auto":
        bf16 = where.type == "cuda" and torch.cuda.is_bf16_supported()
        precision = torch.bfloat16 if bf16 else torch.float32
    else:
        precision = getattr(torch, dtype)
    pipeline.to(where)
    return Backbone(pipeline, str(source), where, precision, facts)


def _read_facts(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        kinds = {"words": list, "categories": list, "tuning": dict, "generation": dict}
        if all(isinstance(facts.get(key, kind()), kind) for key, kind in kinds.items()):
            return facts
    except (ValueError, AttributeError):
        pass
    raise UserError(f"{path} does not hold a model's facts: the file is damaged.")


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the loaders' progress bars and hints for a moment; a small model loads at once."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    kept = [(m, m.get_verbosity()) for m in (diffusers_logging, transformers_logging)]
    for module, _ in kept:
        module.set_verbosity_error()
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module, level in kept:
            module.set_verbosity(level)
            module.enable_progress_bar()


def _check_source(folder: str) -> None:
    path = Path(folder)
    if path.is_file():
        raise UserError(f"{folder} is a file: --backbone takes a pipeline folder or a hub id.")
    if path.is_dir():
        index = path / "model_index.json"
        if not index.is_file():
            raise UserError(
                f"{folder} has no model_index.json: name a folder that diffusers' save_pretrained "
                "wrote, or a hub id."
            )
        try:
            name = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
        except (ValueError, AttributeError) as error:
            raise UserError(f"{index} is not a pipeline's index: the folder is damaged.") from error
        if name != "StableDiffusionPipeline":
            raise UserError(
                f"{folder} holds a {name}: only StableDiffusionPipeline is supported so far."
            )
        # Looked for here, because transformers makes an empty tokenizer where there is none.
        for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
            if not (path / part).is_dir():
                raise UserError(f"{folder} lacks the folder {part}: the pipeline is not complete.")
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", folder):
        raise UserError(
            f"There is no pipeline folder {folder}: name a folder, a hub id such as "
            "stable-diffusion-v1-5/stable-diffusion-v1-5, or embedded."
        )
