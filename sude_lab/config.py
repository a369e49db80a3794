"""The settings of a run, and their presets; torch is not needed here.

One flat dataclass, because its fields are the flags of `sude-lab tune`, the names in config.json
and in grid files, and (most of them) the flags of diffusers' training scripts. What belongs
together is said by the fields themselves (`fields_of`). A `TuningConfig` may leave fields at None;
`sude_lab.methods.configure` turns it into a `CompleteConfig`, once.
"""

# ruff: noqa: RUF009 (`_setting` makes a field, as `dataclasses.field` does)

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from sude_lab.errors import UserError, check_types, flag
from sude_lab.prompts import PLACEHOLDER, checked

EMBEDDED = "embedded"
"""The name of the Stable Diffusion in `data/`."""
EMBEDDED_MODELS = {EMBEDDED: "embedded", "embedded-flow": "embedded_flow"}
"""The folders in `data/` of the models that are there, by their names."""
Prior = Literal["current", "pretrained"]
Weighting = Literal["exact", "simple", "reference"]
Train = Literal["unet", "attention", "lora"]


def _setting(
    default: Any,
    *,
    usual: Any = None,
    between: tuple[float, float] | None = None,
    about: Literal["sude", "place", ""] = "",
) -> Any:
    """Return a field of `TuningConfig`; a default of None means the method's, or the model's own.

    `usual` is what None means where neither says, `between` the least and the most of a number.
    `about` sude changes the use of SuDe, and no draw; `about` place says where something lies.
    """
    return field(default=default, metadata={"usual": usual, "between": between, "about": about})


@dataclass(frozen=True)
class Subject:
    """One subject of a run: its picture, what it is, and its new word."""

    image: Path
    category: str
    token: str


@dataclass(frozen=True)
class TuningConfig:
    """What a run is; fields left at None take the method's, or the backbone's own, defaults."""

    image: Path = field(metadata={"about": "place"})
    """The one picture of the subject."""
    category: str
    """What the subject is, in words the model knows: dog, candle, stuffed animal."""
    backbone: str = _setting(EMBEDDED, about="place")
    """embedded, embedded-flow, a pipeline folder, or a hub id."""
    method: str = "dreambooth"
    """The baseline that SuDe regularises: dreambooth, custom_diffusion, vico, textual_inversion."""
    weight_sude: float | None = _setting(None, between=(0.0, 1e6), about="sude")
    """w_s of eq. 10; 0 is the plain baseline."""
    prior: Prior | None = _setting(None, usual="pretrained", about="sude")
    """Which model's opinion of the category counts: as it is now, or as it was before tuning."""
    weighting: Weighting | None = _setting(None, usual="reference", about="sude")
    """How eq. 7 is weighted over t; see `sude_lab.losses.sude_weight`."""
    truncate: bool = _setting(True, about="sude")
    """Whether eq. 9 stops a sample that is as sure of its category as the category itself."""
    truncate_at: float = _setting(1.0, between=(0.0, 1e6), about="sude")
    """The rho at which it stops: 1 is the paper's threshold, less stops earlier, more later."""
    sude_every: int = _setting(1, between=(1, 1000), about="sude")
    """Ask SuDe in every k-th step, with k times the weight: the same gradient on average, at less
    cost (guide: own loop)."""
    monitor_sude: bool = _setting(False, about="sude")
    """Compute L_sude, tau and rho also where w_s is 0 (costs two predictions a step)."""
    regularizer_file: Path | None = _setting(None, about="place")
    """A Python file whose `regularizer` stands in the place of SuDe in eq. 10 (guide: bench)."""
    max_train_steps: int | None = _setting(None, between=(1, 10_000_000))
    learning_rate: float | None = _setting(None, between=(0.0, 10.0))
    """Learning rate of the weights."""
    token_learning_rate: float | None = _setting(None, between=(0.0, 10.0))
    """Learning rate of the embedding of {S*}; 0 leaves it where it starts."""
    lr_warmup_steps: int = _setting(0, between=(0, 10_000_000))
    train_batch_size: int | None = _setting(None, between=(1, 4096))
    train: Train | None = _setting(None, usual="attention")
    """DreamBooth: what of the UNet is trained; unet is all of it, of a transformer, too."""
    lora_rank: int = _setting(8, between=(1, 4096))
    train_text_encoder: bool | None = _setting(None, usual=False)
    """DreamBooth: train the text encoder too."""
    token: str = "<sks>"
    """The new word for the subject; write {S*} in prompts."""
    more_subjects: tuple[str, ...] = _setting((), about="place")
    """More subjects of the same run, as "candle=<my-candle>=candle.png"; in prompts {S*2}, ..."""
    initializer: str | None = None
    """Words whose embedding the new word starts from."""
    num_vectors: int | None = _setting(None, usual=1, between=(1, 64))
    """Vectors that the new word stands for; more hold more of the look."""
    prompt: str | None = None
    """The tuning prompt, with {S*} and, if wished, {category}; None: the method's own."""
    prior_loss_weight: float | None = _setting(None, usual=0.0, between=(0.0, 1e6))
    """w_r of eq. 10, on pictures of the category that the model draws before tuning."""
    prior_preservation: Literal["images", "teacher"] = "images"
    """images: predict the noise of the class images (DreamBooth's code); teacher: predict what the
    model before tuning predicts of them (eq. 14 as it is written)."""
    num_class_images: int | None = _setting(None, usual=16, between=(1, 100_000))
    class_images: Path | None = _setting(None, about="place")
    """Folder of pictures of the category to use in place of drawn ones."""
    horizontal_flip: bool = False
    """Mirror the picture half of the time (a look that is not symmetric would be lost)."""
    resolution: int | None = _setting(None, between=(8, 4096))
    """Side of the picture in pixels; None: the model's own."""
    max_grad_norm: float = _setting(1.0, between=(0.0, math.inf))
    adam_weight_decay: float = _setting(1e-2, between=(0.0, 10.0))
    optimizer: Literal["adamw", "adamw_fused", "adamw8bit"] = "adamw_fused"
    """adamw_fused: torch's AdamW in one pass over the weights; adamw: as torch chooses, slower on a
    CPU and other in rounding; adamw8bit needs the package bitsandbytes and a CUDA card."""
    gradient_accumulation_steps: int = _setting(1, between=(1, 100_000))
    """Batches a step: the same step as one batch so many times as large, in less memory."""
    gradient_checkpointing: bool = False
    seed: int = _setting(0, between=(0, 2**31 - 1))
    device: str = _setting("auto", about="place")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"

    def __post_init__(self) -> None:
        check_types(self)
        for f in fields(TuningConfig):
            value, between = getattr(self, f.name), f.metadata.get("between")
            if between and value is not None and not between[0] <= value <= between[1]:
                reach = f"between {between[0]} and {between[1]}"
                raise UserError(f"--{flag(f.name)} is {value}: it must lie {reach}.")
        if self.prompt is not None and PLACEHOLDER not in checked(self.prompt):
            raise UserError(f"The tuning prompt {self.prompt!r} must contain {PLACEHOLDER}.")
        tokens = [subject.token for subject in self.subjects]
        if len(set(tokens)) < len(tokens):
            raise UserError(f"Every subject needs a token of its own: {', '.join(tokens)}.")

    @property
    def with_sude(self) -> bool:
        """Whether the run computes SuDe (w_s at None: it may)."""
        return self.weight_sude != 0 or self.monitor_sude

    @property
    def subjects(self) -> tuple[Subject, ...]:
        """All subjects of the run, the first one first."""
        subjects = [Subject(self.image, self.category, self.token)]
        for text in self.more_subjects:
            category, _, rest = text.partition("=")
            token, _, image = rest.partition("=")
            if not (category and token and image):
                raise UserError(f"--more-subjects {text!r} must read category=token=picture.")
            subjects.append(Subject(Path(image), category, token))
        return tuple(subjects)


@dataclass(frozen=True)
class CompleteConfig(TuningConfig):
    """A configuration with nothing left to fill in; `sude_lab.methods.configure` makes it.

    Five fields may be None for good: `prompt` and `initializer` are the method's own then,
    `resolution` is the model's own, `class_images` are drawn, SuDe is the regulariser.
    """

    weight_sude: float = field(kw_only=True)
    prior: Prior = field(kw_only=True)
    weighting: Weighting = field(kw_only=True)
    max_train_steps: int = field(kw_only=True)
    learning_rate: float = field(kw_only=True)
    token_learning_rate: float = field(kw_only=True)
    train_batch_size: int = field(kw_only=True)
    train: Train = field(kw_only=True)
    train_text_encoder: bool = field(kw_only=True)
    num_vectors: int = field(kw_only=True)
    prior_loss_weight: float = field(kw_only=True)
    num_class_images: int = field(kw_only=True)


def fields_of(about: str) -> tuple[str, ...]:
    """Return the names of the fields of `TuningConfig` that are about sude or place."""
    return tuple(f.name for f in fields(TuningConfig) if f.metadata.get("about") == about)


def read_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as a file holds them (JSON) with the types that `TuningConfig` takes."""
    names = {f.name for f in fields(TuningConfig)}
    settings: dict[str, Any] = {}
    for name, value in values.items():
        if name not in names:
            raise UserError(f"There is no setting {name!r}.")
        settings[name] = tuple(value) if isinstance(value, list) else value
    return settings


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"prior": "pretrained", "weighting": "simple"},
    "reference": {
        "prior": "current",
        "weighting": "reference",
        "train": "unet",
        "train_text_encoder": True,
        "learning_rate": 1e-6,
        "max_train_steps": 800,
        "train_batch_size": 1,
        "prior_loss_weight": 2.0,
        "num_class_images": 50,
        "weight_sude": 0.4,
    },
}
"""`reference`: what the authors' released code does. `paper`: what the text says, read by its own
eq. 11-12: L_sub and L_sude are two likelihoods of one step, so both carry k_t, and where L_sub
drops it (the usual noise-MSE), L_sude does, too: `simple`. Other readings: lesson 02."""
