"""Any diffusers text-to-image pipeline, opened for study: embedded, local folder or hub id.

A pipeline folder may carry a `sude_lab.json` beside its `model_index.json`, with what is known of
that model: the words it was trained on, and the settings that suit it for tuning and for drawing.
The embedded model has one; without it the settings of the methods' papers apply.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from tokenizers import AddedToken
from torch import Tensor, nn
from torch.func import functional_call

from sude_lab.config import EMBEDDED
from sude_lab.diffusion import Schedule
from sude_lab.errors import UserError
from sude_lab.io.pictures import to_tensor
from sude_lab.io.reading import is_dir, is_file, read_json
from sude_lab.prompts import PLACEHOLDER

FACTS_FILE = "sude_lab.json"
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
LIBRARIES = ("diffusers", "transformers", "stable_diffusion", None)
"""Whose classes a pipeline's index may name: a folder must not say which code is imported."""
_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?", re.ASCII)


def data_folder() -> Path:
    """Return the folder `data/`: SUDE_LAB_DATA's, the checkout's, or the installed package's."""
    named = os.environ.get("SUDE_LAB_DATA")
    if named:
        return Path(named)
    package = Path(__file__).resolve().parent
    installed = package / "data"
    return installed if installed.is_dir() else package.parent / "data"


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
            f"The embedded model is not in {folder}: install the package anew, or set "
            "SUDE_LAB_DATA to the data folder of a clone of the repository."
        )
    return str(folder)


def hub_id(source: str | Path) -> tuple[str, str | None] | None:
    """Return a hub id and its revision (None: the newest) of "owner/name@revision"; None: a folder.

    A revision is a commit, a tag or a branch; only a commit is the same for ever.
    """
    found = _HUB_ID.fullmatch(str(source))
    if found is None or is_dir(source):
        return None
    return found["id"], found["revision"]


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
        torch.empty(0, device=device).cpu()  # "meta" holds nothing that could be read back
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(
            f"The device {name!r} is not available here: use cpu, or auto to take what is there."
        ) from error
    return device


@dataclass(frozen=True)
class Condition:
    """What the UNet is told beside x_t and t; the first dimension of every tensor is the batch."""

    hidden: Tensor
    """The text encoder's hidden states, (B, L, D); SDXL's two encoders side by side in D."""
    pooled: Tensor | None = None
    """SDXL: the whole prompt as one vector, (B, P)."""
    sizes: Tensor | None = None
    """SDXL: original size, crop and target size in pixels, (B, 6)."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Condition:
        """Apply a function to every tensor that is there."""
        parts = (self.hidden, self.pooled, self.sizes)
        return Condition(*(None if x is None else function(x) for x in parts))  # type: ignore[arg-type]

    def __getitem__(self, index: Any) -> Condition:
        """Return the conditions of some rows: an index tensor, a list or a slice."""
        return self.map(lambda x: x[index])

    def __len__(self) -> int:
        return len(self.hidden)

    def expand(self, size: int) -> Condition:
        """Return one condition as a batch of `size` equal rows."""
        return self.map(lambda x: x.expand(size, *x.shape[1:]))

    @property
    def arguments(self) -> dict[str, Any]:
        """The UNet's keyword arguments for this condition."""
        found: dict[str, Any] = {"encoder_hidden_states": self.hidden}
        if self.pooled is not None:
            found["added_cond_kwargs"] = {"text_embeds": self.pooled, "time_ids": self.sizes}
        return found


def concatenate(conditions: list[Condition]) -> Condition:
    """Return the rows of several conditions one below the other."""
    parts = [
        [getattr(c, name) for c in conditions if getattr(c, name) is not None]
        for name in ("hidden", "pooled", "sizes")
    ]
    return Condition(*(torch.cat(p) if p else None for p in parts))  # type: ignore[arg-type]


@contextmanager
def without_adapters(unet: nn.Module) -> Iterator[None]:
    """Switch the LoRA adapters (peft) of a UNet off for a moment, where it has any."""
    layers: list[Any] = [
        m for m in unet.modules() if hasattr(m, "adapter_layer_names") and not m.disable_adapters
    ]
    # peft stops the gradients of what it switches off, and lets them all flow when it is back on.
    flags = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for p, needed in flags:
            p.requires_grad_(needed)


class FrozenUNet:
    """A UNet as it is now, whatever is done to its weights later; called like the UNet.

    Only the tensors that require gradients now are copied. LoRA adapters (peft) leave the original
    weights in place: they are switched off for the call, and nothing is copied for them.
    """

    def __init__(self, unet: nn.Module) -> None:
        self.unet = unet
        self._kept = {
            name: p.detach().clone()
            for name, p in unet.named_parameters()
            if p.requires_grad and ".lora_" not in name
        }

    @property
    def num_bytes(self) -> int:
        """How much memory the copy takes, in bytes."""
        return sum(p.numel() * p.element_size() for p in self._kept.values())

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the UNet returned before."""
        with without_adapters(self.unet):
            if self._kept:
                return functional_call(self.unet, self._kept, args, kwargs)
            return self.unet(*args, **kwargs)


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
    commit: str | None = None
    """The commit that a hub id stood for; None for a folder."""

    @property
    def unet(self) -> Any:
        """The denoiser eps_theta."""
        return self.pipeline.unet

    @property
    def text_encoder(self) -> Any:
        """The (first) text encoder, which turns a prompt into the condition c."""
        return self.pipeline.text_encoder

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the (first) text encoder."""
        return self.pipeline.tokenizer

    @property
    def is_xl(self) -> bool:
        """Whether this is an SDXL: two text encoders, and a condition with more than words."""
        return getattr(self.pipeline, "text_encoder_2", None) is not None

    @property
    def text_encoders(self) -> dict[str, Any]:
        """The text encoders by the names of their folders: one, or SDXL's two."""
        names = ("text_encoder", "text_encoder_2") if self.is_xl else ("text_encoder",)
        return {name: getattr(self.pipeline, name) for name in names}

    @property
    def tokenizers(self) -> list[Any]:
        """The tokenizer of every text encoder."""
        names = ("tokenizer", "tokenizer_2") if self.is_xl else ("tokenizer",)
        return [getattr(self.pipeline, name) for name in names]

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
        words = re.findall(r"[^\W\d_]+", re.sub(r"\{S\*\d*\}", " ", text).lower())
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
        # It stands in prompts, and class images lie in a folder of its name.
        if bad := [ch for ch in category if ch in "{}/\\=" or not ch.isprintable()]:
            raise UserError(
                f"The category {category[:40]!r} has the character {bad[0]!r}: use plain words, "
                "for example dog."
            )
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

    def add_token(self, token: str, initializer: str) -> list[int]:
        """Add the word `token` for a subject, start its embedding at that of `initializer`.

        The embedding of an initializer of several tokens is their mean. Returns the new id in every
        tokenizer.

        Raises:
            UserError: the token is empty, has a space, or already means something, or the
                initializer says nothing.
        """
        if not token or token != token.strip() or len(token.split()) != 1:
            raise UserError(f"The token {token!r} must be one word without spaces, like <sks>.")
        if len(token) > 64 or not token.isprintable() or "{" in token or "`" in token:
            raise UserError(
                f"The token {token[:40]!r} must be at most 64 plain characters, like <sks>."
            )
        if any(self._is_known(tokenizer, token) for tokenizer in self.tokenizers):
            raise UserError(
                f"The token {token!r} is already in the vocabulary and means something: "
                "choose a new one, like <sks>."
            )
        if not initializer.strip():
            raise UserError(f"The token {token!r} must start from a word: --initializer is empty.")
        ids = []
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders.values(), strict=True):
            start = tokenizer(initializer, add_special_tokens=False).input_ids
            # A single word: the letters of a token like "og" must not be cut out of "dog".
            tokenizer.add_tokens(AddedToken(token, single_word=True))
            index = int(tokenizer.convert_tokens_to_ids(token))
            with torch.random.fork_rng(devices=[]):  # the new row is drawn, then written over
                encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            table = encoder.get_input_embeddings().weight
            with torch.no_grad():
                table[index] = table[start].mean(dim=0)
            ids.append(index)
        return ids

    @staticmethod
    def _is_known(tokenizer: Any, word: str) -> bool:
        pieces = tokenizer(word, add_special_tokens=False).input_ids
        return word.lower() in tokenizer.get_vocab() or len(pieces) == 1

    def tokenize(self, prompts: list[str], tokenizer: Any = None) -> Tensor:
        """Return token ids (B, L), padded to the text encoder's length, on the device."""
        tokenizer = tokenizer or self.tokenizer
        # A word of several vectors stands for all of them, here as in the pipeline's own call.
        ids = tokenizer(
            self.pipeline.maybe_convert_prompt(prompts, tokenizer),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return ids.to(self.device)

    def beyond_reach(self, prompt: str, *tokens: str) -> str:
        """Return the end of a prompt, which the text encoder does not read; "": it reads all.

        Raises:
            UserError: one of the subjects' `tokens` stands there, or the tokenizer does not see it
                in the prompt, so that nobody asks for it.
        """
        ids = self.tokenizer(self.pipeline.maybe_convert_prompt(prompt, self.tokenizer)).input_ids
        for token in tokens:
            if token in prompt and self.tokenizer.convert_tokens_to_ids(token) not in ids:
                raise UserError(
                    f"The model's tokenizer reads {prompt[:80]!r} without {token}: put spaces "
                    "around it, or tune with a token of another make, like <sks>."
                )
        most = self.tokenizer.model_max_length
        if len(ids) <= most:
            return ""
        # Read are a mark at the beginning, most - 2 pieces, and a mark at the end.
        read, rest = (
            self.tokenizer.decode(part) for part in (ids[1 : most - 1], ids[most - 1 : -1])
        )
        for token in tokens:
            if token in rest and token not in read:
                raise UserError(
                    f"The prompt is longer than the {most - 2} pieces of words that the model "
                    f"reads, and {token} stands behind them: make it shorter."
                )
        return rest

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Return the condition c of the prompts; gradients flow where they are on."""
        with self.autocast():
            if not self.is_xl:
                return Condition(self.text_encoder(self.tokenize(prompts))[0])
            outputs = [
                encoder(self.tokenize(prompts, tokenizer), output_hidden_states=True)
                for tokenizer, encoder in zip(
                    self.tokenizers, self.text_encoders.values(), strict=True
                )
            ]
            hidden = torch.cat([out.hidden_states[-2] for out in outputs], dim=-1)
            side = float(self.resolution)
            sizes = torch.tensor([[side, side, 0.0, 0.0, side, side]], device=self.device)
            return Condition(hidden, outputs[-1].text_embeds, sizes.expand(len(prompts), 6))

    def null_condition(self) -> Condition:
        """Return the condition of no prompt, one row: "" encoded; SDXL was trained with zeros."""
        null = self.encode_prompts([""])
        if self.is_xl and self.pipeline.config.force_zeros_for_empty_prompt:
            assert null.pooled is not None
            zeros = torch.zeros_like
            return Condition(zeros(null.hidden), zeros(null.pooled), null.sizes)
        return null

    @torch.no_grad()
    def encode_pictures(self, images: list[Image.Image]) -> tuple[Tensor, Tensor]:
        """Return mean and deviation of pictures' latents, (B, C, h, w), scaled for the UNet."""
        x = torch.cat([to_tensor(image) for image in images]).to(self.device)
        posterior = self.pipeline.vae.encode(x).latent_dist
        scale = self.pipeline.vae.config.scaling_factor
        return posterior.mean * scale, posterior.std * scale

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition, unet: Any = None) -> Tensor:
        """Return the model output (eps, x_0 or v, by the schedule) in float32, (B, C, h, w)."""
        with self.autocast():
            return (unet or self.unet)(x_t, t, **condition.arguments).sample.float()


def open_backbone(
    source: str | Path = EMBEDDED, *, device: str = "auto", dtype: str = "auto"
) -> Backbone:
    """Open a Stable Diffusion pipeline: "embedded", a local folder, or a hub id.

    A hub id may name its revision, "owner/name@commit"; without one it is the newest, and
    `Backbone.commit` says which one that was. Nothing that a folder holds is run: weights are
    safetensors, and classes are those of diffusers and transformers.

    `dtype` auto computes in bfloat16 on a CUDA card that has it and in float32 elsewhere.

    Raises:
        UserError: there is no such pipeline, it is not a Stable Diffusion text-to-image pipeline,
            its weights are not safetensors or not whole, its parts do not fit each other, or the
            device is not there.
    """
    with quiet():  # the first import hints at packages that are not needed
        from diffusers import DiffusionPipeline

    folder = resolve_source(source)
    where = pick_device(device)
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise UserError(f"There is no dtype {dtype!r}: use auto, float32, bfloat16 or float16.")
    told = hub_id(folder)
    if told is None:
        _check_source(folder)
    apart: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}
    apart["use_safetensors"] = True
    try:
        with quiet():
            if told is not None:
                name, revision = told
                folder = str(DiffusionPipeline.download(name, revision=revision, **apart))
                _check_source(folder)
            facts = _read_facts(Path(folder) / FACTS_FILE)
            encoders = _text_encoders(Path(folder))
            pipeline = DiffusionPipeline.from_pretrained(folder, **apart, **encoders)
        if type(pipeline).__name__ not in PIPELINES:
            raise ValueError(f"it is a {type(pipeline).__name__}")
    except UserError:
        raise
    except Exception as error:  # loaders, and the client of the hub, fail with errors of any class
        raise UserError(
            f"{source} could not be opened as a Stable Diffusion pipeline "
            f"({type(error).__name__}: {str(error)[:160]}): name a complete pipeline folder with "
            "safetensors weights, or a hub id that this machine can reach."
        ) from error
    _check_parts(pipeline, str(source))
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    if dtype == "auto":
        bf16 = where.type == "cuda" and torch.cuda.is_bf16_supported()
        precision = torch.bfloat16 if bf16 else torch.float32
    else:
        precision = getattr(torch, dtype)
    pipeline.to(where)
    commit = Path(folder).name if told else None  # the folder of a snapshot is named by its commit
    return Backbone(pipeline, str(source), where, precision, facts, commit)


def _text_encoders(folder: Path) -> dict[str, Any]:
    """Open the text encoders of a pipeline folder, whole.

    Left to the pipeline, a tensor that the file lacks would be drawn at random, without a word.
    """
    import transformers

    index = read_json(folder / "model_index.json")
    found: dict[str, Any] = {}
    for part in ("text_encoder", "text_encoder_2"):
        if not (folder / part).is_dir():
            continue
        kind = index[part][1]
        if kind not in ("CLIPTextModel", "CLIPTextModelWithProjection"):
            raise ValueError(f"its {part} is a {kind}")
        found[part], report = getattr(transformers, kind).from_pretrained(
            folder / part, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        if report["missing_keys"]:
            raise ValueError(f"its {part} lacks the tensor {min(report['missing_keys'])}")
    return found


def _check_parts(pipeline: Any, source: str) -> None:
    """Check that the parts of a pipeline are whole and fit each other, before they are used."""
    wrong = next(_misfits(pipeline), None)
    if wrong:
        raise UserError(
            f"{source} is no Stable Diffusion pipeline that works: {wrong}. Name a complete one, "
            "as diffusers' save_pretrained wrote it."
        )


def _misfits(pipeline: Any) -> Iterator[str]:
    """Yield what is wrong with a pipeline, part by part."""
    for name, part in pipeline.components.items():
        if not isinstance(part, nn.Module):
            continue
        tensors = dict(part.named_parameters())
        if lacking := [n for n, p in tensors.items() if p.is_meta]:
            yield f"its {name} lacks the tensor {lacking[0]}"
        # A sum is finite only where all that it adds is.
        sums = torch.stack([p.detach().float().sum() for p in tensors.values()])
        if bad := [n for n, ok in zip(tensors, sums.isfinite().tolist(), strict=True) if not ok]:
            yield f"its {name} holds values that are not finite, in {bad[0]}"
    try:
        Schedule.from_scheduler(pipeline.scheduler)
    except ValueError as error:
        yield str(error).rstrip(".")
    unet, channels = pipeline.unet.config, pipeline.vae.config.latent_channels
    if not isinstance(unet.sample_size, int) or unet.sample_size < 1:
        yield f"its UNet's sample_size is {unet.sample_size}, which must be a whole number"
    if (unet.in_channels, unet.out_channels) != (channels, channels):
        yield (
            f"its UNet takes {unet.in_channels} channels and gives {unet.out_channels}, its VAE "
            f"has {channels}"
        )
    width = 0
    for end in ("", "_2"):
        encoder = getattr(pipeline, f"text_encoder{end}", None)
        tokenizer = getattr(pipeline, f"tokenizer{end}", None)
        if encoder is None or tokenizer is None:
            continue
        width += encoder.config.hidden_size
        length, most = tokenizer.model_max_length, encoder.config.max_position_embeddings
        if length > most:
            yield f"its tokenizer{end} has no model_max_length of at most {most}"
        rows = encoder.get_input_embeddings().num_embeddings
        if len(tokenizer) > rows:
            yield f"its tokenizer{end} knows {len(tokenizer)} words, its text_encoder{end} {rows}"
    across = unet.cross_attention_dim
    for one in across if isinstance(across, list | tuple) else [across]:
        if one != width:
            yield f"its UNet attends to words of width {one}, its text encoder makes {width}"


def read_facts(source: str | Path) -> dict[str, Any]:
    """Return what a pipeline's folder says of its model, without opening the model.

    Raises:
        UserError: the file is damaged, or the embedded model is not where it should be.
    """
    return _read_facts(Path(resolve_source(source)) / FACTS_FILE)


def _read_facts(path: Path) -> dict[str, Any]:
    if not is_file(path):
        return {}
    try:
        facts = read_json(path)
        lists = [facts.get("words", []), facts.get("categories", [])]
        tuning, drawing = facts.get("tuning", {}), facts.get("generation", {})
        if (
            all(isinstance(x, list) and all(isinstance(y, str) for y in x) for x in lists)
            and isinstance(tuning, dict)
            and all(isinstance(settings, dict) for settings in tuning.values())
            and set(drawing) <= {"num_inference_steps", "guidance_scale"}
            and type(drawing.get("num_inference_steps", 1)) is int
            and type(drawing.get("guidance_scale", 1.0)) in (int, float)
        ):
            return facts
    except (ValueError, AttributeError, TypeError):
        pass
    raise UserError(f"{path} does not hold a model's facts: the file is damaged.")


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the loaders' progress bars and hints for a moment; a small model loads at once."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    modules = (diffusers_logging, transformers_logging)
    kept = [(m, m.get_verbosity(), m.is_progress_bar_enabled()) for m in modules]
    for module in modules:
        module.set_verbosity_error()
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module, level, bars in kept:
            module.set_verbosity(level)
            if bars:
                module.enable_progress_bar()


def _check_source(folder: str) -> None:
    if not folder.strip():
        raise UserError("--backbone is empty: name a pipeline folder, a hub id, or embedded.")
    path = Path(folder)
    if is_file(path):
        raise UserError(f"{folder} is a file: --backbone takes a pipeline folder or a hub id.")
    if not is_dir(path):
        raise UserError(
            f"There is no pipeline folder {folder[:200]}: name a folder, a hub id such as "
            "stable-diffusion-v1-5/stable-diffusion-v1-5, or embedded."
        )
    index = path / "model_index.json"
    if not index.is_file():
        raise UserError(
            f"{folder} has no model_index.json: name a folder that diffusers' save_pretrained "
            "wrote, or a hub id."
        )
    try:
        content = read_json(index)
        name = content.get("_class_name")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{index} is not a pipeline's index: the folder is damaged.") from error
    if name not in PIPELINES:
        raise UserError(
            f"{folder} holds a {str(name)[:80]}: it must be one of {', '.join(PIPELINES)}."
        )
    for part, value in content.items():
        if isinstance(value, list) and not (len(value) == 2 and value[0] in LIBRARIES):
            raise UserError(
                f"{index} takes its {part} from {str(value)[:80]}: only classes of diffusers and "
                "transformers are opened."
            )
        # An AutoTokenizer, say, would read in the folder which code of its own it is to run.
        if isinstance(value, list) and re.match("Auto(?!encoder)", str(value[1])):
            raise UserError(
                f"{index} takes its {part} from {str(value[1])[:80]}: name the class itself, as "
                "diffusers' save_pretrained does."
            )
    # Looked for here, because transformers makes an empty tokenizer where there is none.
    parts = ["unet", "vae", "text_encoder", "tokenizer", "scheduler"]
    if name == "StableDiffusionXLPipeline":
        parts += ["text_encoder_2", "tokenizer_2"]
    for part in parts:
        if not (path / part).is_dir():
            raise UserError(f"{folder} lacks the folder {part}: the pipeline is not complete.")
        if part.startswith("tokenizer"):
            vocabularies = ("tokenizer.json", "vocab.json")
            if not any((path / part / name).is_file() for name in vocabularies):
                raise UserError(
                    f"{folder}/{part} has no {' or '.join(vocabularies)}: the pipeline is not "
                    "complete."
                )
        elif part != "scheduler":
            _check_weights(path / part)


def _check_weights(folder: Path) -> None:
    """Look at the headers of the weights: whole numbers would be taken for weights, without a word.

    Raises:
        UserError: there are no safetensors, or weights that are no floating-point numbers.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files or not (folder / "config.json").is_file():
        lacking = "config.json" if files else "safetensors, the only weights that are opened"
        raise UserError(f"{folder} has no {lacking}: the pipeline is not complete.")
    for file in files:
        try:
            with safe_open(file, "pt") as weights:
                kinds = {n: weights.get_slice(n).get_dtype() for n in weights.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{file} could not be opened as safetensors ({error}): take the file anew."
            ) from error
        for name, kind in kinds.items():
            if name.endswith("weight") and not kind.startswith(("F", "BF")):
                raise UserError(
                    f"{file} holds {name} as {kind}: its weights must be floating-point numbers."
                )
