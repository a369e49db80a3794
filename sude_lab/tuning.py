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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from sude_lab.backbone import Backbone, Condition, concatenate
from sude_lab.config import PRESETS as PRESETS
from sude_lab.config import Subject as Subject
from sude_lab.config import TuningConfig
from sude_lab.config import with_preset as with_preset
from sude_lab.diffusion import add_noise, training_target
from sude_lab.errors import UserError, machine_failure
from sude_lab.io.opening import hub_id
from sude_lab.losses import class_regularizer, subject_loss, total_loss
from sude_lab.methods import Method, get_method
from sude_lab.prompts import photo_of
from sude_lab.runs.class_images import class_latents
from sude_lab.runs.prior_bank import PriorBank, open_bank
from sude_lab.sude import SudeTerms, sude_terms

GENERAL_DEFAULTS: dict[str, Any] = {
    "prior": "pretrained",
    "weighting": "reference",
    "train": "attention",
    "train_text_encoder": False,
    "prior_loss_weight": 0.0,
    "num_class_images": 16,
    "num_vectors": 1,
}


def with_defaults(config: TuningConfig, facts: Mapping[str, Any]) -> TuningConfig:
    """Fill the fields that are None and have a default: the model's own facts', then the method's.

    No model is opened; what only the open model knows (`resolution`) stays None.

    Args:
        config: The settings of a run.
        facts: `Backbone.facts`, or what `opening.read_facts` returns.

    Raises:
        UserError: there is no such method, or a prior bank is of no use to the prior.
    """
    known: dict[str, Any] = dict(GENERAL_DEFAULTS)
    known |= get_method(config.method).defaults
    known |= facts.get("tuning", {}).get(config.method, {})
    missing = {
        f.name: known[f.name]
        for f in fields(config)
        if getattr(config, f.name) is None and f.name in known
    }
    config = replace(config, **missing)
    moves = config.prior == "current" and not get_method(config.method).keeps_prior
    if config.prior_bank and config.with_sude and moves:
        raise UserError(
            "--prior-bank keeps what the model says before tuning, and --prior current asks it as "
            "it is by then: use --prior pretrained, or leave --prior-bank out."
        )
    return config


def resolve(config: TuningConfig, backbone: Backbone) -> TuningConfig:
    """Fill every field that is None: from the backbone's own defaults, then from the method's.

    `initializer` and `prompt` may stay None: the method then builds them. A hub id gets the commit
    that was opened: the run stays that model's when the hub has a newer one.

    Raises:
        UserError: the category is one the model cannot know, or a prior bank is of no use.
    """
    config = with_defaults(config, backbone.facts)
    more = tuple(
        f"{backbone.check_category(s.category)}={s.token}={s.image}" for s in config.subjects[1:]
    )
    category = backbone.check_category(config.category)
    resolution = config.resolution or backbone.resolution
    told = hub_id(config.backbone)
    source = f"{told[0]}@{backbone.commit}" if told and backbone.commit else config.backbone
    return replace(
        config, backbone=source, category=category, more_subjects=more, resolution=resolution
    )


@dataclass(frozen=True)
class Step:
    """One step of tuning; tensors are (B,), detached, on the CPU, NaN where nothing was computed.

    `loss_subject`, `loss_sude` and `tau` are means over the latent's dimensions, before w_s;
    `loss_own` is the method's own loss (ViCo's attention), with its weight.
    """

    number: int
    t: Tensor
    loss_subject: Tensor
    loss_sude: Tensor
    tau: Tensor
    gate: Tensor
    rho: Tensor
    loss_regularizer: float
    loss_own: float
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
            "loss_own": self.loss_own,
            "learning_rate": self.learning_rate,
        }


def one_of_each(
    config: TuningConfig, picture: Image.Image | Sequence[Image.Image]
) -> list[Image.Image]:
    """Return the pictures of a run's subjects as a list.

    Raises:
        UserError: there are more or fewer of them than subjects.
    """
    pictures = [picture] if isinstance(picture, Image.Image) else list(picture)
    if len(pictures) != len(config.subjects):
        raise UserError(
            f"There are {len(config.subjects)} subjects and {len(pictures)} pictures: give one "
            "of each."
        )
    return pictures


def step_generator(seed: int, step: int) -> torch.Generator:
    """Return the generator of one step: what step k draws depends on (seed, k) alone."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


def tune(
    config: TuningConfig,
    backbone: Backbone,
    picture: Image.Image | Sequence[Image.Image],
    *,
    state: dict[str, Any] | None = None,
    accelerator: Any = None,
) -> Iterator[Step]:
    """Tune `backbone` in place on one picture (one of each subject) and yield every step.

    The loss is the batch mean of L_sub + w_s lambda_tau L_sude + w_r L_reg (arXiv 2403.06775,
    eq. 10) and the method's own loss, every term a mean over the latent's dimensions, L_sub the
    loss the model was trained with; eq. 7-9 are those of `sude_lab.sude.sude_terms`.

    `state` continues a run from `Step.state_dict()`. With an `accelerate.Accelerator` of several
    processes each takes its part of one larger batch, and all take the same step. Use the backbone
    for one run only.

    Raises:
        UserError: the settings do not fit the model, the loss became NaN, memory ran out, or the
            device failed.
    """
    config = resolve(config, backbone)
    pictures = one_of_each(config, picture)
    try:
        yield from _tune(config, backbone, pictures, state, _Processes(accelerator))
    except (RuntimeError, MemoryError) as error:
        told = machine_failure(error)
        if told is None:
            raise
        advice = (
            "use --train lora, --gradient-checkpointing, --optimizer adamw8bit, --dtype bfloat16, "
            "or a smaller --train-batch-size with --gradient-accumulation-steps, or a smaller "
            "--resolution"
        )
        if "memory" not in told:
            advice = "see whether it is still there, and continue with --resume"
        raise UserError(f"{told}: {advice}.") from error


@dataclass(frozen=True)
class _Losses:
    """What one batch gave, (B,) each."""

    t: Tensor
    subject: Tensor
    sude: SudeTerms
    regularizer: Tensor
    own: Tensor
    total: Tensor


def _tune(
    config: TuningConfig,
    backbone: Backbone,
    pictures: list[Image.Image],
    state: dict[str, Any] | None,
    processes: _Processes,
) -> Iterator[Step]:
    assert config.max_train_steps is not None and config.train_batch_size is not None
    schedule, device, size = backbone.schedule, backbone.device, config.train_batch_size
    latents = [picture_latents(config, backbone, picture) for picture in pictures]
    with torch.no_grad():
        fixed = _conditions(backbone, config)
    with processes.in_turn():  # the first one builds, the others find it built
        banks = _banks(config, backbone, pictures, latents)
    regularized = None
    if config.prior_loss_weight:
        with processes.in_turn():  # the first one draws, the others find them drawn
            regularized = [class_latents(config, backbone, s.category) for s in config.subjects]

    method = get_method(config.method)(backbone, config)
    method.start([mean for mean, _ in latents])
    optimizer = _optimizer(config, method.groups())
    scaler = torch.amp.GradScaler(device.type, enabled=backbone.dtype == torch.float16)
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = list(method.parameters.values())
    first = 0
    if state is not None:
        try:
            method.load_state_dict(state["trained"])
            optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
            scaler.load_state_dict(copy.deepcopy(state.get("scaler", {})))
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                "The checkpoint does not fit this run's weights and optimiser: start a new run."
            ) from error
        first = state["step"]
    prompts = method.subject_prompts()
    for prompt, subject in zip(prompts, config.subjects, strict=True):
        backbone.beyond_reach(prompt, subject.token)
    with torch.no_grad():
        fixed_subjects = backbone.encode_prompts(prompts)

    def one_batch(batch: _Batch) -> _Losses:
        null, classes = fixed
        if method.changes_text and (config.prior == "current" or batch.z_0 is not None):
            null, classes = _conditions(backbone, config)
        subjects = (
            backbone.encode_prompts(prompts) if method.changes_subject_text else fixed_subjects
        )
        x_t = add_noise(batch.x_0, batch.eps, batch.t, schedule)
        output = method.predict(x_t, batch.t, subjects[batch.which], batch.which)
        own = method.own_loss()
        dims = x_t[0].numel()
        target = training_target(batch.x_0, batch.eps, batch.t, schedule)
        of_subject = subject_loss(output, target) / dims
        sude = _sude(config, backbone, method, output, x_t, batch, (null, classes), fixed)
        regularizer = torch.zeros_like(of_subject)
        if batch.z_0 is not None and batch.noise is not None:
            z_t = add_noise(batch.z_0, batch.noise, batch.t, schedule)
            guess = method.predict_current(z_t, batch.t, classes[batch.which])
            if config.regularizer == "teacher":
                teacher = method.predict_pretrained(z_t, batch.t, fixed[1][batch.which])
                regularizer = class_regularizer(guess, teacher) / dims
            else:
                noise_target = training_target(batch.z_0, batch.noise, batch.t, schedule)
                regularizer = subject_loss(guess, noise_target) / dims
        assert config.weight_sude is not None and config.prior_loss_weight is not None
        total = total_loss(
            of_subject,
            sude.gated,
            regularizer,
            config.weight_sude,
            config.prior_loss_weight,
        )
        if own is None:
            own = torch.zeros_like(of_subject)
        return _Losses(batch.t, of_subject, sude, regularizer, own, total + own)

    accumulate = config.gradient_accumulation_steps
    for number in range(first + 1, config.max_train_steps + 1):
        generator = step_generator(config.seed, number)
        warm = min(1.0, number / max(1, config.lr_warmup_steps))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * warm
        # Everything random is drawn on the CPU, for all processes alike: the same numbers on every
        # device, and one process with the whole batch takes the same step as many with their parts.
        rows = size * accumulate * processes.number
        if banks:
            whole = _draw_pairs(banks, rows, generator)
        else:
            whole = _draw(latents, rows, schedule.num_timesteps, generator)
        if regularized is not None:
            whole = _draw_class_images(whole, regularized, generator)
        mine = whole.rows(processes.part(len(whole.t)))
        optimizer.zero_grad(set_to_none=True)
        seen = []
        for k in range(accumulate):
            batch = mine.rows(slice(k * size, (k + 1) * size)).to(device)
            losses = one_batch(batch)
            _check_finite(number, processes.gather(losses.t), processes.gather(losses.total))
            scaler.scale(losses.total.mean() / accumulate).backward()
            seen.append(losses)
        gradients = [p.grad for p in parameters if p.grad is not None]
        processes.average(gradients)
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.get_total_norm(gradients)
        # torch's clip_grad_norm_ multiplies by 1 where nothing is clipped: a pass over all weights.
        if config.max_grad_norm and bool(norm + 1e-6 > config.max_grad_norm):
            torch.nn.utils.clip_grads_with_norm_(parameters, config.max_grad_norm, norm)
        if not scaler.is_enabled():  # the scaler leaves out a step whose gradient overflowed
            drawn = torch.cat([losses.t for losses in seen])
            _check_finite(number, processes.gather(drawn), norm.expand(1), "gradient")
        scaler.step(optimizer)
        scaler.update()

        def snapshot(number: int = number) -> dict[str, Any]:
            return {
                "step": number,
                "trained": method.state_dict(),
                "optimizer": copy.deepcopy(optimizer.state_dict()),
                "scaler": scaler.state_dict(),
            }

        def told(pick: Callable[[_Losses], Tensor], seen: list[_Losses] = seen) -> Tensor:
            return processes.gather(torch.cat([pick(x).detach() for x in seen])).cpu()

        yield Step(
            number,
            told(lambda x: x.t),
            told(lambda x: x.subject),
            told(lambda x: x.sude.loss),
            told(lambda x: x.sude.threshold),
            told(lambda x: x.sude.gate),
            told(lambda x: x.sude.rho),
            told(lambda x: x.regularizer).mean().item(),
            told(lambda x: x.own).mean().item(),
            max(group["lr"] for group in optimizer.param_groups),
            method,
            snapshot,
        )
    method.finish()


def _check_finite(number: int, t: Tensor, values: Tensor, what: str = "loss") -> None:
    """Stop before the weights are spoilt; with a value for each t, name those that went wrong."""
    values = values.detach()
    wrong = ~torch.isfinite(values)
    if bool(wrong.any()):
        bad = t[wrong] if len(t) == len(values) else t
        raise UserError(
            f"The {what} became {values[wrong][0].item()} at step {number} "
            f"(t = {', '.join(map(str, bad.tolist()))}): lower --learning-rate or --weight-sude, "
            "or keep the truncation on."
        )


def _banks(
    config: TuningConfig,
    backbone: Backbone,
    pictures: list[Image.Image],
    latents: list[tuple[Tensor, Tensor]],
) -> list[PriorBank]:
    """Return the prior bank of every subject; none where a step draws its samples anew."""
    if not config.prior_bank:
        return []
    return [
        open_bank(config, backbone, subject.category, picture, latent)
        for subject, picture, latent in zip(config.subjects, pictures, latents, strict=True)
    ]


def _sude(
    config: TuningConfig,
    backbone: Backbone,
    method: Method,
    output: Tensor,
    x_t: Tensor,
    batch: _Batch,
    now: tuple[Condition, Condition],
    fixed: tuple[Condition, Condition],
) -> SudeTerms:
    """Return eq. 7-9 of a batch; where SuDe is neither used nor watched, NaN and shut gates."""
    if not config.with_sude:
        nothing = torch.full_like(x_t[:, 0, 0, 0], math.nan)
        shut = torch.zeros_like(nothing, dtype=torch.bool)
        return SudeTerms(nothing, nothing, torch.zeros_like(nothing), shut, nothing)
    assert config.weighting is not None
    if batch.prior is not None:  # known from the bank
        uncond, category = batch.prior.unbind(1)
    else:
        null, classes = now if config.prior == "current" else fixed
        predict = method.predict_current if config.prior == "current" else method.predict_pretrained
        condition = concatenate([null.expand(len(x_t)), classes[batch.which]])
        with torch.no_grad():
            both = predict(torch.cat([x_t, x_t]), torch.cat([batch.t, batch.t]), condition)
        uncond, category = both.chunk(2)
    return sude_terms(
        output,
        category,
        uncond,
        x_t,
        batch.t,
        backbone.schedule,
        weighting=config.weighting,
        truncated=config.truncate,
        truncate_at=config.truncate_at,
    )


def _optimizer(config: TuningConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if not any(group["lr"] for group in groups):
        raise UserError(
            "Nothing would be trained: give --learning-rate or --token-learning-rate a value above "
            "0."
        )
    if config.optimizer != "adamw8bit":
        fused = config.optimizer == "adamw_fused" or None  # None: as torch chooses
        return torch.optim.AdamW(groups, weight_decay=config.adam_weight_decay, fused=fused)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            "--optimizer adamw8bit needs the package bitsandbytes: pip install bitsandbytes."
        ) from error
    return AdamW8bit(groups, weight_decay=config.adam_weight_decay)


class _Processes:
    """The processes that share a run: one, or those of an Accelerator."""

    def __init__(self, accelerator: Any = None) -> None:
        self.accelerator = accelerator
        self.number = accelerator.num_processes if accelerator else 1

    def part(self, size: int) -> slice:
        """Return the rows of this process among `size`."""
        each = size // self.number
        index = self.accelerator.process_index if self.accelerator else 0
        return slice(index * each, (index + 1) * each)

    def average(self, gradients: list[Tensor]) -> None:
        """Replace gradients by their means over the processes."""
        if self.number > 1:
            for gradient in gradients:
                gradient.copy_(self.accelerator.reduce(gradient, reduction="mean"))

    def gather(self, values: Tensor) -> Tensor:
        """Return the rows of all processes, in their order."""
        return self.accelerator.gather(values) if self.number > 1 else values

    def in_turn(self) -> AbstractContextManager[Any]:
        """Return a context that the main process passes before the others."""
        return self.accelerator.main_process_first() if self.number > 1 else nullcontext()


@dataclass(frozen=True)
class _Batch:
    """What a step draws: latents, noise, t, whose picture it is, and the same for class images.

    `prior`: what a bank knows of these samples, (B, 2, C, h, w), no condition first.
    """

    x_0: Tensor
    eps: Tensor
    t: Tensor
    which: Tensor
    z_0: Tensor | None = None
    noise: Tensor | None = None
    prior: Tensor | None = None

    def _map(self, function: Callable[[Tensor], Tensor]) -> _Batch:
        found: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: function(v) for k, v in found.items() if v is not None})

    def rows(self, index: slice) -> _Batch:
        return self._map(lambda x: x[index])

    def to(self, device: torch.device) -> _Batch:
        return self._map(lambda x: x.to(device))


def picture_latents(
    config: TuningConfig, backbone: Backbone, picture: Image.Image
) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of a picture's latents, (K, C, h, w) each, on the CPU.

    K is 2 with its mirror image, else 1.

    Raises:
        UserError: the resolution is none that the encoder can halve so often.
    """
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
    latents: list[tuple[Tensor, Tensor]], size: int, num_timesteps: int, generator: torch.Generator
) -> _Batch:
    """Draw latents of the subjects' pictures (B, C, h, w), noise of that shape, and t (B,)."""
    means = torch.stack([mean for mean, _ in latents])
    deviations = torch.stack([std for _, std in latents])
    which = torch.zeros(size, dtype=torch.long)
    if len(latents) > 1:
        which = torch.randint(len(latents), (size,), generator=generator)
    pick = torch.randint(means.shape[1], (size,), generator=generator)
    shape = (size, *means.shape[2:])
    x_0 = means[which, pick] + deviations[which, pick] * torch.randn(shape, generator=generator)
    eps = torch.randn(shape, generator=generator)
    t = torch.randint(num_timesteps, (size,), generator=generator)
    return _Batch(x_0, eps, t, which)


def _draw_pairs(banks: list[PriorBank], size: int, generator: torch.Generator) -> _Batch:
    """Draw pairs of the subjects' banks, each as likely as any other, with what is kept of them."""
    which = torch.zeros(size, dtype=torch.long)
    if len(banks) > 1:
        which = torch.randint(len(banks), (size,), generator=generator)
    index = torch.randint(len(banks[0]), (size,), generator=generator)
    drawn = [(banks[who], k) for who, k in zip(which.tolist(), index.split(1), strict=True)]
    x_0, eps, t = map(torch.cat, zip(*(bank.pairs.batch(k) for bank, k in drawn), strict=True))
    known = [found for bank, k in drawn if (found := bank.outputs(k)) is not None]
    return _Batch(x_0, eps, t, which, prior=torch.cat(known) if known else None)


def _draw_class_images(
    batch: _Batch, class_latents: list[Tensor], generator: torch.Generator
) -> _Batch:
    """Add a class image of every sample's category, with noise of its own."""
    number = min(len(z) for z in class_latents)
    pick = torch.randint(number, batch.t.shape, generator=generator)
    noise = torch.randn(batch.x_0.shape, generator=generator)
    rows = zip(batch.which.tolist(), pick.tolist(), strict=True)
    z_0 = torch.stack([class_latents[who][k] for who, k in rows])
    return replace(batch, z_0=z_0, noise=noise)


def _conditions(backbone: Backbone, config: TuningConfig) -> tuple[Condition, Condition]:
    """Return the null condition, one row, and the category's of every subject."""
    categories = [photo_of(s.category) for s in config.subjects]
    return backbone.null_condition(), backbone.encode_prompts(categories)
