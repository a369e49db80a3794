"""What families share: what is asked of a folder, flow matching, a chat in place of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sude_lab.backbone import Backbone, Condition
from sude_lab.diffusion import Schedule
from sude_lab.errors import UserError

DISTILLED = (
    "is distilled: it draws without a prompt of no condition to compare with, so that eq. 5 has no "
    "denominator; take the base model that it was made from"
)
"""Why such models are refused."""
OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")
"""The parts that a folder may do without."""
SHARED = {"vae": r"diffusers AutoencoderKL", "scheduler": r"diffusers \w+Scheduler"}
CLIP_WORDS = r"transformers CLIPTokenizer(Fast)?"
CHAT_WORDS = r"transformers Qwen2Tokenizer(Fast)?"


class Family(Backbone):
    """A kind of pipeline: what is known before one is opened, and checked when it is open."""

    title: ClassVar[str]
    classes: ClassVar[dict[str, str]]
    """The classes that its parts may have, patterns: a folder must not say which code is run. All
    must be there but the `OPTIONAL`."""

    @classmethod
    def refusal(cls, folder: Path, index: dict[str, Any], read: Callable[[str], Any]) -> str | None:
        """Say why a folder cannot be used, before its weights are; `read` reads its JSON files."""
        return None

    def needed(self) -> dict[str, Any]:
        """Return what the denoiser's configuration must say, by the other parts'."""
        raise NotImplementedError

    def misfits(self) -> Iterator[str]:
        """Yield which parts do not fit each other."""
        flow, kind = isinstance(self, FlowBackbone), type(self.pipeline.scheduler).__name__
        if (self.schedule.sigmas is not None) != flow:
            yield f"its {kind} is {'no scheduler' if flow else 'for transformers'} of flow matching"
        for (name, encoder), words in zip(self.text_encoders.items(), self.tokenizers, strict=True):
            tokenizer = name.replace("text_encoder", "tokenizer")
            if words is None:
                yield f"its model_index.json names no {tokenizer}"
            elif words.model_max_length > (most := encoder.config.max_position_embeddings):
                yield f"its {tokenizer} has no model_max_length of at most {most}"
            elif len(words) > (rows := encoder.get_input_embeddings().num_embeddings):
                yield f"its {tokenizer} knows {len(words)} words, its {name} {rows}"
        for key, number in self.needed().items():
            own = getattr(self.denoiser.config, key)
            if any(one != number for one in (own if isinstance(own, list | tuple) else [own])):
                yield f"its {self.part}'s {key} is {own}, and its other parts need {number}"


class FlowBackbone(Family):
    """A transformer of flow matching with true guidance; no condition is the prompt "".

    Its facts may say `text: max_sequence_length`, how many words it is told.
    """

    part: ClassVar[str] = "transformer"
    attention: ClassVar[tuple[str, ...]] = (".attn.",)
    density: ClassVar[Literal["uniform", "logit_normal"]] = "logit_normal"
    unavailable: ClassVar[tuple[str, ...]] = ("custom_diffusion", "vico")
    """Methods that there are for other families."""
    words: ClassVar[int]
    """How many words the pipeline reads unless told."""

    @property
    def length(self) -> int:
        """How many words are read."""
        return int(self.facts.get("text", {}).get("max_sequence_length", self.words))

    @cached_property
    def schedule(self) -> Schedule:
        """The schedule of the training, which drawing does not change."""
        return Schedule.from_scheduler(self.pipeline.scheduler)

    @cached_property
    def times(self) -> Tensor:
        """What the network is told at every t, (T,), on its device."""
        schedule = self.schedule
        return schedule.to_time(torch.arange(schedule.num_timesteps)).to(self.device)

    def check_method(self, config: Any) -> None:
        """Refuse, with a UserError, what is made for UNets, and words of several vectors."""
        kind = type(self.pipeline).__name__
        if config.method in self.unavailable:
            raise UserError(f"--method {config.method} is not made for a {kind}: use dreambooth.")
        if config.num_vectors > 1:
            raise UserError(f"A {kind} has no words of several vectors: leave --num-vectors at 1.")

    def sampler(self) -> Any:
        """Return the pipeline's own scheduler, as it was before anything was drawn: Euler."""
        scheduler = self.pipeline.scheduler
        return type(scheduler).from_config(scheduler.config)

    def call_arguments(self, **settings: Any) -> dict[str, Any]:
        """Return the pipeline's arguments, with the number of words."""
        return settings | {"max_sequence_length": self.length}

    def scaled(self, mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
        """Return (latents - shift) * scale."""
        return super().scaled(mean - self.pipeline.vae.config.shift_factor, deviation)

    def unscaled(self, latents: Tensor) -> Tensor:
        """Return latents / scale + shift."""
        return super().unscaled(latents) + self.pipeline.vae.config.shift_factor

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition, model: Any = None) -> Tensor:
        """Return the model output noise - x_0 in float32, (B, C, h, w)."""
        with self.autocast():
            return self.ask(model or self.denoiser, x_t, self.times[t], condition).float()

    @staticmethod
    def ask(model: Any, x_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """Ask a transformer of this family at diffusers' times 1000 s, (B,)."""
        raise NotImplementedError

    @classmethod
    def refusal(cls, folder: Path, index: dict[str, Any], read: Callable[[str], Any]) -> str | None:
        """Say why a folder cannot be used: its name says Turbo, or its VAE has no shift."""
        if "turbo" in folder.name.lower():
            return f"{folder} {DISTILLED}"
        if read("vae/config.json").get("shift_factor") is None:
            return (
                f"The VAE in {folder} has no shift_factor, without which its pipeline cannot draw: "
                'write "shift_factor": 0.0 into vae/config.json if it needs none'
            )
        return None


class ChatBackbone(FlowBackbone):
    """What FLUX.2 klein base and Z-Image base share: they read a chat with Qwen3.

    Both have true guidance, and no condition is the prompt "" within the chat's marks, as the
    pipelines themselves write it. A subject's word is read by its letters: nothing of the language
    model is trained, and there is no file of words to load. Training is that of diffusers' scripts
    by default: s even over the training's table, the error of the output as it is, and the
    encoder's mean. The facts may say `resolution`, too.
    """

    encoders: ClassVar[tuple[str, ...]] = ()
    density: ClassVar[Literal["uniform", "logit_normal"]] = "uniform"
    unavailable: ClassVar[tuple[str, ...]] = ("custom_diffusion", "vico", "textual_inversion")
    words: ClassVar[int] = 512  # the chat's marks among them
    patch: ClassVar[int] = 1
    """How many numbers of the VAE's, each way, are one of the transformer's."""

    @property
    def resolution(self) -> int:
        """The side of a picture in pixels."""
        return int(self.facts.get("resolution", 1024))

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of a picture's latents, (C, h, w)."""
        side = self.resolution // (self.patch * self.pipeline.vae_scale_factor)
        return (self.denoiser.config.in_channels, side, side)

    def check_method(self, config: Any) -> None:
        """Refuse, with a UserError, what is made for UNets, and what trains words."""
        super().check_method(config)
        if config.train_text_encoder or config.token_learning_rate:
            kind = type(self.pipeline).__name__
            flags = "--train-text-encoder, --token-learning-rate"
            raise UserError(f"The language model of a {kind} is not trained: leave out {flags}.")

    def beyond_reach(self, prompt: str, *tokens: str) -> str:
        """Return the end of a prompt, which is not read; "": all is."""
        return self.tokenizer.decode(self.tokenizer(prompt).input_ids[self.length :])

    def call_arguments(self, **settings: Any) -> dict[str, Any]:
        """Return the pipeline's arguments, with sides and number of words."""
        side = self.resolution
        return super().call_arguments(**settings, height=side, width=side)
