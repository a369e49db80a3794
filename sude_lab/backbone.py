"""A pipeline with what tuning asks of it; `sude_lab.io.opening` opens one.

`Backbone` is a Stable Diffusion with a UNet; `sude_lab.adapters` has subclasses for other families.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from tokenizers import AddedToken
from torch import Tensor

from sude_lab.diffusion import Schedule
from sude_lab.errors import UserError, checked_picture
from sude_lab.prompts import by_itself


def send(x: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the CPU on a device; nobody waits for a GPU to take it."""
    return x.to(device, non_blocking=device.type == "cuda")


@dataclass(frozen=True)
class Condition:
    """What the model is told beside x_t and t; the first dimension of every tensor is the batch."""

    hidden: Tensor
    """The text encoder's hidden states, (B, L, D); SDXL's two encoders side by side in D."""
    pooled: Tensor | None = None
    """SDXL and SD3: the whole prompt as one vector, (B, P)."""
    sizes: Tensor | None = None
    """SDXL: original size, crop and target size in pixels, (B, 6); Z-Image: how many words, (B, 1),
    best on the CPU.
    """
    ids: Tensor | None = None
    """Stable Diffusion 1 and 2: the tokens that were encoded, (B, L), on the CPU."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Condition:
        """Apply a function to every tensor."""
        return Condition(**{k: function(x) for k, x in vars(self).items() if x is not None})

    def __getitem__(self, index: Any) -> Condition:
        """Return the conditions of some rows: an index tensor (on the CPU), a list or a slice."""
        on_cpu = isinstance(index, Tensor)
        return self.map(lambda x: x[send(index, x.device) if on_cpu else index])

    def __len__(self) -> int:
        return len(self.hidden)

    def expand(self, size: int) -> Condition:
        """Return one condition as a batch of `size` equal rows."""
        return self.map(lambda x: x.expand(size, *x.shape[1:]))

    @property
    def arguments(self) -> dict[str, Any]:
        """The UNet's keyword arguments for this condition."""
        arguments: dict[str, Any] = {"encoder_hidden_states": self.hidden}
        if self.pooled is not None:
            arguments["added_cond_kwargs"] = {"text_embeds": self.pooled, "time_ids": self.sizes}
        return arguments


def concatenate(conditions: list[Condition]) -> Condition:
    """Return the rows of several conditions one below the other, without `ids`."""
    parts = [
        [getattr(c, name) for c in conditions if getattr(c, name) is not None]
        for name in ("hidden", "pooled", "sizes")
    ]
    return Condition(*(torch.cat(p) if p else None for p in parts))  # type: ignore[arg-type]


@dataclass
class Backbone:
    """A Stable Diffusion pipeline with what tuning asks of it.

    Weights are kept in float32; `dtype` is the precision of the forward passes (autocast).
    """

    tag: ClassVar[str] = "stable-diffusion"
    """The family's name among the tags of models on the Hub."""
    part: ClassVar[str] = "unet"
    """The folder of the network that denoises and is tuned."""
    attention: ClassVar[tuple[str, ...]] = (".attn1.", ".attn2.")
    """What the names of its attention's weights hold."""
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    """The layers that get a LoRA."""
    encoders: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    """The folders of the text encoders that learn subjects' words; the second may be missing."""
    density: ClassVar[Literal["uniform", "logit_normal"]] = "uniform"
    """How training draws t, see `sude_lab.draws.place_of`."""

    pipeline: Any
    source: str
    device: torch.device
    dtype: torch.dtype = torch.float32
    facts: dict[str, Any] = field(default_factory=dict)
    commit: str | None = None
    """The commit that a hub id stood for; None for a folder."""
    used: str = ""
    """What has been done to it, in words; empty: nothing."""

    @property
    def denoiser(self) -> Any:
        """The network eps_theta that is tuned: a UNet or a transformer."""
        return getattr(self.pipeline, self.part)

    @property
    def unet(self) -> Any:
        """The denoiser of a model that has a UNet."""
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
        return self.part == "unet" and len(self.text_encoders) > 1

    @property
    def text_encoders(self) -> dict[str, Any]:
        """The text encoders by the names of their folders: one, or SDXL's two."""
        parts = ((name, getattr(self.pipeline, name, None)) for name in self.encoders)
        return {name: part for name, part in parts if part is not None}

    @property
    def tokenizers(self) -> list[Any]:
        """The tokenizer of every text encoder."""
        names = (name.replace("text_encoder", "tokenizer") for name in self.text_encoders)
        return [getattr(self.pipeline, name) for name in names]

    @property
    def schedule(self) -> Schedule:
        """The noise schedule the model was trained with."""
        return Schedule.from_scheduler(self.pipeline.scheduler)

    @property
    def resolution(self) -> int:
        """The side of a picture in pixels."""
        return int(self.denoiser.config.sample_size * self.pipeline.vae_scale_factor)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of a picture's latents, (C, h, w)."""
        config = self.denoiser.config
        return (config.in_channels, config.sample_size, config.sample_size)

    def copy(self) -> Backbone:
        """Return a backbone with weights of its own, to be tuned while this one stays as it is."""
        return replace(self, pipeline=copy.deepcopy(self.pipeline))

    def use(self, how: str = "") -> None:
        """Check that nothing has been done to this backbone yet, and remember what is done now."""
        if self.used:
            now = "and its weights and words are no longer the model's own"
            cure = "use backbone.copy() before such a use, or open it again"
            raise UserError(f"This backbone {self.used}, {now}: {cure}.")
        self.used = how

    def check_method(self, config: Any) -> None:
        """Raise a UserError where this family has no place for what a configuration asks for."""

    def loss_weight(self, t: Tensor) -> Tensor | float:
        """Return the weight of a sample's whole loss, (B,), as its family's training has it."""
        return 1.0

    def sampler(self) -> Any:
        """Return a scheduler to draw with: DDIM (eta 0)."""
        from diffusers import DDIMScheduler

        # Latents are not clipped; files as old as Stable Diffusion 1.4's do not say so, and DDIM's
        # own default would clip them.
        config = {"clip_sample": False} | dict(self.pipeline.scheduler.config)
        return DDIMScheduler.from_config(config)

    def call_arguments(self, **settings: Any) -> dict[str, Any]:
        """Return the pipeline's arguments; guidance_scale w is u_neg + w (u_cond - u_neg) here."""
        return settings

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which forward passes run in `dtype`."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def unknown_words(self, text: str) -> list[str]:
        """Return the words of `text` that the model was not trained on, where that is known."""
        if not (known := self.facts.get("words")):
            return []
        words = re.findall(r"[^\W\d_]+", re.sub(r"\{S\*\d*\}", " ", text).lower())
        return [word for word in dict.fromkeys(words) if word not in known]

    def check_category(self, category: str) -> str:
        """Return the category in its plain form."""
        category = " ".join(category.split())
        if not any(ch.isalnum() for ch in category):
            raise UserError('The category is empty: name one, for example --category "dog".')
        # It stands in prompts, and class images lie in a folder of its name.
        if bad := [ch for ch in category if ch in "{}/\\=" or not ch.isprintable()]:
            name = f"The category {category[:40]!r}"
            raise UserError(f"{name} has the character {bad[0]!r}: use plain words, such as dog.")
        if len(self.tokenizer(category).input_ids) > self.tokenizer.model_max_length // 2:
            raise UserError(f"The category {category[:40]!r}... is too long: use one or two words.")
        if unknown := self.unknown_words(category):
            known = ", ".join(self.facts.get("categories") or self.facts["words"])
            never = f"This model has never met the word {unknown[0]!r}"
            raise UserError(f"{never}: choose a category among {known}, or another --backbone.")
        return category

    def add_token(self, token: str, initializer: str) -> list[int]:
        """Add a subject's word, its embedding the mean of `initializer`'s; return its ids."""
        name = f"The token {token[:40]!r}"
        plain = 0 < len(token) <= 64 and token.isprintable() and not {*"{` "} & {*token}
        if not plain:
            raise UserError(f"{name} must be one word of at most 64 plain characters, like <sks>.")
        for tokenizer in self.tokenizers:
            pieces = tokenizer(token, add_special_tokens=False).input_ids
            if token.lower() in tokenizer.get_vocab() or len(pieces) == 1:
                known = "is already in the vocabulary and means something"
                raise UserError(f"{name} {known}: choose a new one, like <sks>.")
        if not initializer.strip():
            raise UserError(f"{name} must start from a word: --initializer is empty.")
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

    def tokenize(self, prompts: list[str], tokenizer: Any = None) -> Tensor:
        """Return token ids (B, L), padded to the text encoder's length, on the CPU."""
        tokenizer = tokenizer or self.tokenizer
        how = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        pieces, most = self.as_pieces(prompts, tokenizer), tokenizer.model_max_length
        return tokenizer(pieces, max_length=most, **how).input_ids

    def as_pieces(self, prompts: Any, tokenizer: Any) -> Any:
        """Return prompts in which a word of several vectors stands for all of them."""
        convert = getattr(self.pipeline, "maybe_convert_prompt", None)  # transformers' have none
        return convert(prompts, tokenizer) if convert else prompts

    def beyond_reach(self, prompt: str, *tokens: str) -> str:
        """Return the end of a prompt that is not read; a UserError where a token of it is not."""
        ids = self.tokenizer(self.as_pieces(prompt, self.tokenizer)).input_ids
        number = self.tokenizer.convert_tokens_to_ids
        for token in tokens:
            if by_itself(token).search(prompt) and number(token) not in ids:
                without = f"The model's tokenizer reads {prompt[:80]!r} without {token}"
                cure = "put spaces around it, or tune with a token of another make, like <sks>"
                raise UserError(f"{without}: {cure}.")
        most = self.tokenizer.model_max_length
        if len(ids) <= most:
            return ""
        # Read are a mark at the beginning, most - 2 pieces, and a mark at the end.
        read, rest = map(self.tokenizer.decode, (ids[1 : most - 1], ids[most - 1 : -1]))
        for token in tokens:
            if by_itself(token).search(rest) and not by_itself(token).search(read):
                reach = f"the {most - 2} pieces of words that the model reads"
                text = f"The prompt is longer than {reach}, and {token} stands behind them"
                raise UserError(f"{text}: make it shorter.")
        return rest

    def encode_prompts(self, prompts: list[str], side: int | None = None) -> Condition:
        """Return the condition c of prompts, of whole squares of `side` pixels, None: its own."""
        with self.autocast():
            if not self.is_xl:
                ids = self.tokenize(prompts)
                return Condition(self.text_encoder(send(ids, self.device))[0], ids=ids)
            pairs = zip(self.tokenizers, self.text_encoders.values(), strict=True)
            outputs = [
                encoder(send(self.tokenize(prompts, t), self.device), output_hidden_states=True)
                for t, encoder in pairs
            ]
            hidden = torch.cat([out.hidden_states[-2] for out in outputs], dim=-1)
            sizes = send(torch.tensor([1.0, 1, 0, 0, 1, 1]), self.device).expand(len(prompts), 6)
            return Condition(hidden, outputs[-1].text_embeds, sizes * (side or self.resolution))

    def null_condition(self, side: int | None = None) -> Condition:
        """Return the condition of no prompt, one row: "" encoded; SDXL was trained with zeros."""
        null = self.encode_prompts([""], side)
        if self.is_xl and self.pipeline.config.force_zeros_for_empty_prompt:
            assert null.pooled is not None
            zeros = torch.zeros_like
            return Condition(zeros(null.hidden), zeros(null.pooled), null.sizes)
        return null

    @torch.no_grad()
    def encode_pictures(self, images: list[Image.Image]) -> tuple[Tensor, Tensor]:
        """Return mean and deviation of plain pictures' latents, (B, C, h, w), as the UNet's."""
        from diffusers.image_processor import VaeImageProcessor

        processor = VaeImageProcessor(do_resize=False, do_convert_rgb=True)
        x = torch.cat([processor.preprocess(checked_picture(i)) for i in images]).to(self.device)
        posterior = self.pipeline.vae.encode(x).latent_dist
        return self.scaled(posterior.mean, posterior.std)

    def scaled(self, mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the encoder makes of a picture as the denoiser reads it."""
        scale = self.pipeline.vae.config.scaling_factor
        return mean * scale, deviation * scale

    def unscaled(self, latents: Tensor) -> Tensor:
        """Return latents as the decoder reads them: `scaled` the other way round."""
        return latents / self.pipeline.vae.config.scaling_factor

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition, model: Any = None) -> Tensor:
        """Return the output of the denoiser, or of `model` in its place, in float32, (B, C, h, w).

        eps, x_0, v or flow, by the schedule.
        """
        with self.autocast():
            return (model or self.denoiser)(x_t, t, **condition.arguments).sample.float()
