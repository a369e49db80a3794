"""What a tuning run is: its settings, checked, and the presets that fill them.

Nothing heavy is imported here, so that `sude-lab --help` need not wait for torch; what a run does
with its settings is in `sude_lab.tuning`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sude_lab.errors import UserError
from sude_lab.io.reading import check_types
from sude_lab.prompts import PLACEHOLDER, checked

EMBEDDED = "embedded"
"""The name of the model in `data/`."""


@dataclass(frozen=True)
class Subject:
    """One subject of a run: its picture, what it is, and its new word."""

    image: Path
    category: str
    token: str


@dataclass(frozen=True)
class TuningConfig:
    """What a run is; fields left at None take the method's, or the backbone's own, defaults."""

    image: Path
    """The one picture of the subject."""
    category: str
    """What the subject is, in words the model knows: dog, candle, stuffed animal."""
    backbone: str = EMBEDDED
    """embedded, a pipeline folder, or a hub id."""
    method: str = "dreambooth"
    """The baseline that SuDe regularises: dreambooth, custom_diffusion, vico, textual_inversion."""
    weight_sude: float | None = None
    """w_s of eq. 10; 0 is the plain baseline."""
    prior: Literal["current", "pretrained"] | None = None
    """Which model's opinion of the category counts: as it is now, or as it was before tuning."""
    prior_bank: int = 0
    """Draw from so many pairs (t, noise), for which SuDe asks the model before tuning once, for all
    runs of a seed on this picture (without SuDe: the same pairs, nothing asked); 0 draws and asks
    anew in every step."""
    prior_bank_dtype: Literal["float16", "float32", "live"] = "float16"
    """How the bank is kept; live keeps nothing and asks every step, at the same pairs."""
    weighting: Literal["exact", "simple", "reference"] | None = None
    """How eq. 7 is weighted over t; see `sude_lab.losses.sude_weight`."""
    truncate: bool = True
    """Whether eq. 9 stops a sample that is as sure of its category as the category itself."""
    truncate_at: float = 1.0
    """The rho at which it stops: 1 is the paper's threshold, less stops earlier, more later."""
    monitor_sude: bool = False
    """Compute L_sude, tau and rho also where w_s is 0 (costs two predictions a step)."""
    max_train_steps: int | None = None
    learning_rate: float | None = None
    """Learning rate of the weights."""
    token_learning_rate: float | None = None
    """Learning rate of the embedding of {S*}; 0 leaves it where it starts."""
    lr_warmup_steps: int = 0
    train_batch_size: int | None = None
    train: Literal["unet", "attention", "lora"] | None = None
    """DreamBooth: what of the UNet is trained."""
    lora_rank: int = 8
    train_text_encoder: bool | None = None
    """DreamBooth: train the text encoder too."""
    token: str = "<sks>"
    """The new word for the subject; write {S*} in prompts."""
    more_subjects: tuple[str, ...] = ()
    """More subjects of the same run, as "candle=<my-candle>=candle.png"; in prompts {S*2}, ..."""
    initializer: str | None = None
    """Words whose embedding the new word starts from."""
    num_vectors: int | None = None
    """Vectors that the new word stands for; more hold more of the look."""
    prompt: str | None = None
    """The tuning prompt, with {S*} and, if wished, {category}; None: the method's own."""
    prior_loss_weight: float | None = None
    """w_r of eq. 10, on pictures of the category that the model draws before tuning."""
    regularizer: Literal["images", "teacher"] = "images"
    """images: predict the noise of the class images (DreamBooth's code); teacher: predict what the
    model before tuning predicts of them (eq. 14 as it is written)."""
    num_class_images: int | None = None
    class_images: Path | None = None
    """Folder of pictures of the category to use in place of drawn ones."""
    horizontal_flip: bool = False
    """Mirror the picture half of the time (a look that is not symmetric would be lost)."""
    resolution: int | None = None
    """Side of the picture in pixels; None: the model's own."""
    max_grad_norm: float = 1.0
    adam_weight_decay: float = 1e-2
    optimizer: Literal["adamw", "adamw_fused", "adamw8bit"] = "adamw_fused"
    """adamw_fused: torch's AdamW in one pass over the weights; adamw: as torch chooses, slower on a
    CPU and other in rounding; adamw8bit needs the package bitsandbytes and a CUDA card."""
    gradient_accumulation_steps: int = 1
    """Batches a step: the same step as one batch so many times as large, in less memory."""
    gradient_checkpointing: bool = False
    seed: int = 0
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"

    def __post_init__(self) -> None:
        check_types(self)
        checks = {
            "max_train_steps": (1, 10_000_000),
            "train_batch_size": (1, 4096),
            "weight_sude": (0.0, 1e6),
            "truncate_at": (0.0, 1e6),
            "prior_loss_weight": (0.0, 1e6),
            "learning_rate": (0.0, 10.0),
            "token_learning_rate": (0.0, 10.0),
            "num_class_images": (1, 100_000),
            "gradient_accumulation_steps": (1, 100_000),
            "lora_rank": (1, 4096),
            "num_vectors": (1, 64),
            "prior_bank": (0, 10_000_000),
            "lr_warmup_steps": (0, 10_000_000),
            "max_grad_norm": (0.0, math.inf),
            "adam_weight_decay": (0.0, 10.0),
            "resolution": (8, 4096),
            "seed": (0, 2**31 - 1),
        }
        for name, (low, high) in checks.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} is {value}: it must lie between {low} and {high}.")
        if self.prompt is not None and PLACEHOLDER not in checked(self.prompt):
            raise UserError(f"The tuning prompt {self.prompt!r} must contain {PLACEHOLDER}.")
        tokens = [subject.token for subject in self.subjects]
        if len(set(tokens)) < len(tokens):
            raise UserError(f"Every subject needs a token of its own: {', '.join(tokens)}.")

    @property
    def asks_pretrained(self) -> bool:
        """Whether the run asks the model as it was before tuning (fields at None: it may)."""
        kept = self.prior_bank and self.prior_bank_dtype != "live"
        sude = self.with_sude and self.prior != "current" and not kept
        teacher = self.prior_loss_weight != 0 and self.regularizer == "teacher"
        return bool(sude or teacher)

    @property
    def with_sude(self) -> bool:
        """Whether the run computes SuDe (w_s at None: it may)."""
        return self.weight_sude != 0 or self.monitor_sude

    @property
    def subjects(self) -> tuple[Subject, ...]:
        """All subjects of the run, the first one first.

        Raises:
            UserError: one of `more_subjects` is not of the form category=token=picture.
        """
        found = [Subject(self.image, self.category, self.token)]
        for text in self.more_subjects:
            category, _, rest = text.partition("=")
            token, _, image = rest.partition("=")
            if not (category and token and image):
                raise UserError(
                    f"--more-subjects {text!r} must read category=token=picture, "
                    'for example "candle=<my-candle>=candle.png".'
                )
            found.append(Subject(Path(image), category, token))
        return tuple(found)


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"prior": "pretrained", "weighting": "exact"},
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
"""`paper`: what the text says; `reference`: what the authors' released code does."""


def with_preset(config: TuningConfig, preset: str) -> TuningConfig:
    """Fill fields that are None from a preset: "paper", "reference", or "default" for none.

    Raises:
        UserError: there is no such preset.
    """
    if preset == "default":
        return config
    if preset not in PRESETS:
        raise UserError(f"There is no preset {preset!r}: choose default, paper or reference.")
    missing = {k: v for k, v in PRESETS[preset].items() if getattr(config, k) is None}
    return replace(config, **missing)
