"""Tune a text-to-image model on one picture, with SuDe (arXiv 2403.06775, eq. 10).

`tune` is a generator of steps: whoever iterates decides what to log, show and keep.

    backbone = open_backbone("embedded")
    config = resolve(TuningConfig(image=Path("dog.png"), category="dog"), backbone)
    for step in tune(config, backbone, picture):
        print(step.number, step.loss_sude.mean())
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, ImageOps
from torch import Tensor

from sude_lab.backbone import EMBEDDED, Backbone
from sude_lab.diffusion import add_noise, to_eps, training_target
from sude_lab.errors import UserError
from sude_lab.losses import (
    gate,
    guidance_projection,
    subject_loss,
    sude_loss,
    sude_threshold,
    sude_weight,
    total_loss,
    truncate,
)
from sude_lab.methods import Method, get_method
from sude_lab.prompts import PLACEHOLDER, photo_of


@dataclass(frozen=True)
class TuningConfig:
    """What a run is; fields left at None take the method's, or the backbone's own, defaults."""

    image: Path
    """The one picture of the subject."""
    category: str
    """What the subject is, in words the model knows: dog, candle, stuffed animal."""
    backbone: str = EMBEDDED
    """embedded, a pipeline folder, or a hub id."""
    method: Literal["dreambooth", "textual_inversion"] = "dreambooth"
    """The baseline that SuDe regularises."""
    weight_sude: float | None = None
    """w_s of eq. 10; 0 is the plain baseline."""
    prior: Literal["current", "pretrained"] | None = None
    """Which model's opinion of the category counts: as it is now, or as it was before tuning."""
    weighting: Literal["exact", "simple", "reference"] | None = None
    """How eq. 7 is weighted over t; see `sude_lab.losses.sude_weight`."""
    truncate: bool = True
    """Whether eq. 9 stops a sample that is as sure of its category as the category itself."""
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
    initializer: str | None = None
    """Words whose embedding the new word starts from."""
    prompt: str | None = None
    """The tuning prompt, with {S*} and, if wished, {category}; None: the method's own."""
    prior_loss_weight: float | None = None
    """w_r of eq. 10, on pictures of the category that the model draws before tuning."""
    num_class_images: int | None = None
    horizontal_flip: bool = False
    """Mirror the picture half of the time (a look that is not symmetric would be lost)."""
    resolution: int | None = None
    """Side of the picture in pixels; None: the model's own."""
    max_grad_norm: float = 1.0
    adam_weight_decay: float = 1e-2
    gradient_checkpointing: bool = False
    seed: int = 0
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"

    def __post_init__(self) -> None:
        checks = {
            "max_train_steps": (1, 10_000_000),
            "train_batch_size": (1, 4096),
            "weight_sude": (0.0, 1e6),
            "prior_loss_weight": (0.0, 1e6),
            "learning_rate": (0.0, 10.0),
            "token_learning_rate": (0.0, 10.0),
            "num_class_images": (1, 100_000),
            "lora_rank": (1, 4096),
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
        if self.prompt is not None and PLACEHOLDER not in self.prompt:
            raise UserError(f"The tuning prompt {self.prompt!r} must contain {PLACEHOLDER}.")


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


GENERAL_DEFAULTS: dict[str, Any] = {
    "prior": "pretrained",
    "weighting": "reference",
    "train": "attention",
    "train_text_encoder": False,
    "prior_loss_weight": 0.0,
    "num_class_images": 16,
}


def resolve(config: TuningConfig, backbone: Backbone) -> TuningConfig:
    """Fill every field that is None: from the backbone's own defaults, then from the method's.

    `initializer` and `prompt` may stay None: the method then builds them.

    Raises:
        UserError: the category is one the model cannot know.
    """
    method = get_method(config.method)
    known: dict[str, Any] = dict(GENERAL_DEFAULTS)
    known |= method.defaults
    known |= backbone.facts.get("tuning", {}).get(config.method, {})
    known["resolution"] = backbone.resolution
    missing = {
        f.name: known[f.name]
        for f in fields(config)
        if getattr(config, f.name) is None and f.name in known
    }
    return replace(config, category=backbone.check_category(config.category), **missing)


@dataclass(frozen=True)
class Step:
    """One step of tuning; tensors are (B,), detached, on the CPU, NaN where nothing was computed.

    `loss_subject`, `loss_sude` and `tau` are means over the latent's dimensions, before w_s.
    """

    number: int
    t: Tensor
    loss_subject: Tensor
    loss_sude: Tensor
    tau: Tensor
    gate: Tensor
    rho: Tensor
    loss_regularizer: float
    learning_rate: float
    method: Method
    state_dict: Callable[[], dict[str, Any]]
    """Everything `tune` needs to continue after this step."""

    def row(self) -> dict[str, float]:
        """Return the step as one row of numbers: means over the batch."""
        return {
            "step": self.number,
            "t": self.t.float().mean().item(),
            "loss_subject": self.loss_subject.mean().item(),
            "loss_sude": self.loss_sude.mean().item(),
            "tau": self.tau.mean().item(),
            "open_gates": self.gate.float().mean().item(),
            "rho": self.rho.mean().item(),
            "loss_regularizer": self.loss_regularizer,
            "learning_rate": self.learning_rate,
        }


def step_generator(seed: int, step: int) -> torch.Generator:
    """Return the generator of one step: what step k draws depends on (seed, k) alone."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


def tune(
    config: TuningConfig,
    backbone: Backbone,
    picture: Image.Image,
    *,
    state: dict[str, Any] | None = None,
) -> Iterator[Step]:
    """Tune `backbone` in place on one picture and yield every step.

    The loss is the batch mean of L_sub + w_s lambda_tau L_sude + w_r L_reg (arXiv 2403.06775,
    eq. 10), every term a mean over the latent's dimensions, L_sub the loss the model was trained
    with. Eq. 7-9 are computed in eps-space: at fixed x_t the mean is an affine map of eps, so the
    loss is the same and no digits are lost in differences of means.

    `state` continues a run from `Step.state_dict()`. Use the backbone for one run only.

    Raises:
        UserError: the settings do not fit the model, the loss became NaN, or memory ran out.
    """
    config = resolve(config, backbone)
    try:
        yield from _tune(config, backbone, picture, state)
    except torch.OutOfMemoryError as error:
        raise UserError(
            "The device ran out of memory: use --train lora, --gradient-checkpointing, a smaller "
            "--train-batch-size or --resolution."
        ) from error


def _tune(
    config: TuningConfig, backbone: Backbone, picture: Image.Image, state: dict[str, Any] | None
) -> Iterator[Step]:
    assert config.max_train_steps is not None and config.train_batch_size is not None
    assert config.weight_sude is not None and config.weighting is not None
    assert config.prior_loss_weight is not None
    schedule, device, size = backbone.schedule, backbone.device, config.train_batch_size
    latents_mean, latents_std = _picture_latents(config, backbone, picture)
    with torch.no_grad():
        uncond_0, class_0 = _conditions(backbone, config, size)
    class_latents = None
    if config.prior_loss_weight:
        class_latents = _class_latents(config, backbone)

    method = get_method(config.method)(backbone, config)
    prompt = [method.subject_prompt()]
    groups = method.groups()
    if not any(group["lr"] for group in groups):
        raise UserError(
            "Nothing would be trained: give --learning-rate or --token-learning-rate a value above "
            "0."
        )
    optimizer = torch.optim.AdamW(groups, weight_decay=config.adam_weight_decay)
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = list(method.parameters.values())
    first = 0
    if state is not None:
        method.load_state_dict(state["trained"])
        optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        first = state["step"]
    if not method.changes_subject_text:
        with torch.no_grad():
            fixed_subject = backbone.encode_prompts(prompt)
    with_sude = config.weight_sude > 0 or config.monitor_sude
    nothing = torch.full((size,), math.nan)

    for number in range(first + 1, config.max_train_steps + 1):
        generator = step_generator(config.seed, number)
        warm = min(1.0, number / max(1, config.lr_warmup_steps))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * warm
        # Everything random is drawn on the CPU: the same numbers on every device.
        x_0, eps, t = _draw(latents_mean, latents_std, size, schedule.num_timesteps, generator)
        x_0, eps, t = x_0.to(device), eps.to(device), t.to(device)
        x_t = add_noise(x_0, eps, t, schedule)

        c_subject = (
            backbone.encode_prompts(prompt) if method.changes_subject_text else fixed_subject
        )
        output = backbone.predict(x_t, t, c_subject.expand(size, -1, -1))
        dims = x_0[0].numel()
        loss_subject = subject_loss(output, training_target(x_0, eps, t, schedule)) / dims

        loss_sude = tau = rho = nothing.to(device)
        opened = torch.zeros(size, dtype=torch.bool, device=device)
        gated = torch.zeros_like(loss_subject)
        if with_sude:
            uncond, category = uncond_0, class_0
            with torch.no_grad():
                if config.prior == "current" and method.changes_text:
                    uncond, category = _conditions(backbone, config, size)
                predict = (
                    backbone.predict if config.prior == "current" else method.predict_pretrained
                )
                both = predict(
                    torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([uncond, category])
                )
                eps_uncond, eps_class = (to_eps(o, x_t, t, schedule) for o in both.chunk(2))
            eps_subject = to_eps(output, x_t, t, schedule)
            # A weight of 0 (t = 0 with `exact`) becomes an infinite variance: no loss, shut gate.
            variance = 0.5 / sude_weight(t, schedule, config.weighting).to(x_t.dtype)
            loss_sude = sude_loss(eps_subject, eps_class, eps_uncond, variance) / dims
            tau = sude_threshold(eps_class, eps_uncond, variance) / dims
            rho = guidance_projection(eps_subject, eps_class, eps_uncond)
            opened = gate(loss_sude, tau)
            gated = truncate(loss_sude, tau) if config.truncate else loss_sude

        loss_regularizer = torch.zeros_like(loss_subject)
        if class_latents is not None:
            # eq. 14 in DreamBooth's own form: the noise of pictures that the model itself drew.
            pick = torch.randint(len(class_latents), (size,), generator=generator)
            noise = torch.randn(x_0.shape, generator=generator).to(device)
            z_0 = class_latents[pick].to(device)
            z_t = add_noise(z_0, noise, t, schedule)
            c_class = _conditions(backbone, config, size)[1] if method.changes_text else class_0
            guess = backbone.predict(z_t, t, c_class)
            loss_regularizer = subject_loss(guess, training_target(z_0, noise, t, schedule)) / dims

        loss = total_loss(
            loss_subject, gated, loss_regularizer, config.weight_sude, config.prior_loss_weight
        ).mean()
        if not torch.isfinite(loss):
            raise UserError(
                f"The loss became {loss.item()} at step {number}: lower --learning-rate or "
                "--weight-sude, or keep the truncation on."
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf)
        optimizer.step()

        def snapshot(number: int = number) -> dict[str, Any]:
            return {
                "step": number,
                "trained": method.state_dict(),
                "optimizer": copy.deepcopy(optimizer.state_dict()),
            }

        yield Step(
            number,
            t.cpu(),
            loss_subject.detach().cpu(),
            loss_sude.detach().cpu(),
            tau.detach().cpu(),
            opened.cpu(),
            rho.detach().cpu(),
            loss_regularizer.detach().mean().item(),
            max(group["lr"] for group in optimizer.param_groups),
            method,
            snapshot,
        )
    method.finish()


def _picture_latents(
    config: TuningConfig, backbone: Backbone, picture: Image.Image
) -> tuple[Tensor, Tensor]:
    side = config.resolution or backbone.resolution
    factor = backbone.pipeline.vae_scale_factor
    if side % factor:
        raise UserError(f"--resolution {side} must be a multiple of {factor}.")
    if picture.size != (side, side):
        picture = picture.resize((side, side), Image.Resampling.LANCZOS)
    pictures = [picture, ImageOps.mirror(picture)] if config.horizontal_flip else [picture]
    mean, std = backbone.encode_pictures(pictures)
    return mean.cpu(), std.cpu()


def _draw(
    mean: Tensor, std: Tensor, size: int, num_timesteps: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw latents of one of the pictures (B, C, h, w), noise of that shape, and t (B,)."""
    shape = (size, *mean.shape[1:])
    pick = torch.randint(len(mean), (size,), generator=generator)
    x_0 = mean[pick] + std[pick] * torch.randn(shape, generator=generator)
    eps = torch.randn(shape, generator=generator)
    return x_0, eps, torch.randint(num_timesteps, (size,), generator=generator)


def _conditions(backbone: Backbone, config: TuningConfig, size: int) -> tuple[Tensor, Tensor]:
    """Return the null condition and the category's, each (B, L, D)."""
    pair = backbone.encode_prompts(["", photo_of(config.category)])
    return pair[:1].expand(size, -1, -1), pair[1:].expand(size, -1, -1)


def _class_latents(config: TuningConfig, backbone: Backbone) -> Tensor:
    """Draw the category with the model as it is and return the latents, for prior preservation."""
    from sude_lab.generation import generate

    assert config.num_class_images is not None
    images = generate(
        backbone,
        photo_of(config.category),
        num_images=config.num_class_images,
        seed=config.seed + 10_000,
        progress=True,
    )
    mean, _ = backbone.encode_pictures(images)
    return mean.cpu()
