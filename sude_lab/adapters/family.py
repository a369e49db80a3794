"""What all families share: what is asked of a folder, and a transformer of flow matching."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from sude_lab.backbone import Backbone, Condition
from sude_lab.diffusion import Schedule
from sude_lab.errors import UserError

DISTILLED = (
    "is distilled: it draws without a prompt of no condition to compare with, so that eq. 5 has no "
    "denominator; take the base model that it was made from"
)
"""Why such models are refused."""


@dataclass(frozen=True)
class Family:
    """What is known of a kind of pipeline before it is opened, and checked when it is open."""

    name: str
    tag: str
    """Its name among the tags of models on the Hub."""
    backbone: type[Backbone]
    classes: dict[str, str]
    """The classes that its parts may have, patterns: a folder must not say which code is run."""
    parts: tuple[str, ...]
    """The folders that must be there."""
    misfits: Callable[[Any], Iterator[str]]
    """Yields which parts of an open pipeline do not fit each other."""
    refusal: Callable[[Path, dict[str, Any], Callable[[str], Any]], str | None] = lambda *_: None
    """Says why a folder cannot be used, before its weights are; `read` reads its JSON files."""


class FlowBackbone(Backbone):
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
    def is_xl(self) -> bool:
        """It is no SDXL, however many text encoders it has."""
        return False

    @property
    def length(self) -> int:
        """How many words are read."""
        return int(self.facts.get("text", {}).get("max_sequence_length", self.words))

    @cached_property
    def schedule(self) -> Schedule:
        """The schedule of the training, which drawing does not change."""
        return Schedule.from_scheduler(self.pipeline.scheduler)

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

    def as_pieces(self, prompts: Any, tokenizer: Any) -> Any:
        """Return the prompts as they are: no word has several vectors."""
        return prompts

    def null_condition(self, side: int | None = None) -> Condition:
        """Return the condition of no prompt, one row: that of ""."""
        return self.encode_prompts([""])

    def scaled(self, mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
        """Return (latents - shift) * scale."""
        config = self.pipeline.vae.config
        scale = config.scaling_factor
        return (mean - config.shift_factor) * scale, deviation * scale

    def unscaled(self, latents: Tensor) -> Tensor:
        """Return latents / scale + shift."""
        config = self.pipeline.vae.config
        return latents / config.scaling_factor + config.shift_factor

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition, model: Any = None) -> Tensor:
        """Return the model output noise - x_0 in float32, (B, C, h, w)."""
        with self.autocast():
            time = self.schedule.to_time(t)
            return self.ask(model or self.denoiser, x_t, time, condition).float()

    @staticmethod
    def ask(model: Any, x_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """Ask a transformer of this family at diffusers' times 1000 s, (B,)."""
        raise NotImplementedError


def refusal(folder: Path, index: dict[str, Any], read: Callable[[str], Any]) -> str | None:
    """Say why a folder cannot be used: its name says Turbo, or its VAE has no shift."""
    if "turbo" in folder.name.lower():
        return f"{folder} {DISTILLED}"
    if read("vae/config.json").get("shift_factor") is None:
        return (
            f"The VAE in {folder} has no shift_factor, without which its pipeline cannot draw: "
            'write "shift_factor": 0.0 into vae/config.json if it needs none'
        )
    return None


def unequal(model: str, *pairs: tuple[str, Any, Any]) -> Iterator[str]:
    """Yield in which of some numbers, (name, its own, its other parts'), a model does not fit."""
    for name, own, expected in pairs:
        if own != expected:
            yield f"its {model}'s {name} is {own}, and its other parts need {expected}"


def no_flow(pipeline: Any) -> Iterator[str]:
    """Yield what is wrong where a transformer's scheduler is not one of flow matching."""
    if Schedule.from_scheduler(pipeline.scheduler).sigmas is None:
        yield f"its {type(pipeline.scheduler).__name__} is no scheduler of flow matching"
