"""Tune a text-to-image model on one picture, with SuDe (arXiv 2403.06775, eq. 10).

A `Tuning` is iterated over, a `Step` at a time: whoever iterates decides what to log and to keep.

    backbone = open_backbone("embedded")
    config = TuningConfig(image=Path("dog.png"), category="dog")
    for step in Tuning(config, backbone, picture):
        print(step.number, step.loss_sude.mean())

What differs between runs is handed in: `draws` (`sude_lab.draws`: where x_0, noise and t come
from), `classifier` (who answers eq. 5), `method` (what is trained), `regularizer` (SuDe's place).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sude_lab.backbone import Backbone, Condition
from sude_lab.config import CompleteConfig, TuningConfig
from sude_lab.diffusion import Schedule, add_noise, training_target
from sude_lab.draws import Batch, Draws, FreshDraws, one_of_each, picture_latents, step_generator
from sude_lab.errors import UserError, machine_failures
from sude_lab.losses import class_regularizer, subject_loss, total_loss
from sude_lab.methods import Method, configure, get_method
from sude_lab.prompts import photo_of
from sude_lab.sude import Predict, ask, sude_terms

Classifier = Callable[[Tensor, Batch], tuple[Tensor, Tensor]]
"""Answers eq. 5 for x_t of a batch: the model outputs for no condition and for the category."""


@dataclass
class Frozen:
    """The model as it was before tuning, for a regulariser of one's own; no gradients in it."""

    predict: Predict
    schedule: Schedule
    uncond: Condition
    """Of no prompt; this one and the others have a row a sample of the batch."""
    category: Condition
    subject: Condition
    """Of the subject's prompt as it is now, with gradients where its text is trained."""
    passes: int = 0
    """How many rows it was asked so far."""

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return its output for x_t (B, ...), t (B,) and a condition of one row, or B."""
        self.passes += len(x_t)
        return self.predict(x_t, t, condition.expand(len(x_t)))

    def ask(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return its answers to eq. 5, for no condition and for the category, in one call."""
        return ask(self, x_t, t, self.uncond, self.category)


Regularizer = Callable[[Tensor, Tensor, Tensor, Frozen], Tensor]
"""Of x_t, t, the output for the subject, and `Frozen`: a loss (B,), a mean over dimensions."""


@dataclass(frozen=True)
class Step:
    """One step of tuning; tensors are (B,), detached, on the CPU; None: nobody asked for it.

    `loss_subject`, `loss_sude` and `tau` are means over the latent's dimensions, before w_s;
    `loss_own` is the method's own loss (ViCo's attention), with its weight. In a run without SuDe
    every gate is shut.
    """

    number: int
    t: Tensor
    loss_subject: Tensor
    loss_sude: Tensor | None
    tau: Tensor | None
    gate: Tensor | None
    rho: Tensor | None
    loss_regularizer: float
    loss_own: float
    learning_rate: float
    method: Method
    state_dict: Callable[[], dict[str, Any]]
    """Everything `Tuning` needs to continue after this step; refuses once the step is past."""

    def row(self) -> dict[str, float]:
        """Return the step as one row of a table: means over the batch, NaN for None."""
        terms = {"t": self.t, "loss_subject": self.loss_subject, "loss_sude": self.loss_sude}
        terms |= {"tau": self.tau, "open_gates": self.gate, "rho": self.rho}
        names = ("loss_regularizer", "loss_own", "learning_rate")
        return {
            "step": self.number,
            **{n: math.nan if x is None else x.float().mean().item() for n, x in terms.items()},
            **{name: getattr(self, name) for name in names},
        }


class Tuning:
    """One run: tunes `backbone` in place on one picture (one of each subject), step by step.

    The loss is the batch mean of L_sub + w_s lambda_tau L_sude + w_r L_reg (arXiv 2403.06775,
    eq. 10) and the method's own loss, every term a mean over the latent's dimensions, L_sub the
    loss the model was trained with. With `sude_every` k, steps 1, 1 + k, ... have k w_s in place of
    w_s and the others none: derived, the gradient is eq. 10's in the mean over a step's place in
    the k. Where the loop over it was left, it goes on with the next step.

    Args:
        config: The settings; what is None is filled in by `configure`.
        backbone: The model, used for this run only.
        pictures: The subject's picture, or one of each subject.
        draws: Where the samples come from; None: drawn anew in every step.
        classifier: Who answers eq. 5; None: the run's own model, which one `config.prior` says.
        method: What is trained; None: `config.method`.
        regularizer: Stands in the place of lambda_tau L_sude, weighted alike, as `loss_sude`.
        state: What `Step.state_dict()` gave, to continue after that step.
        accelerator: An `accelerate.Accelerator`: each of its processes takes its part of one larger
            batch, and all take the same step.

    Raises:
        UserError: the settings do not fit the model, it has been used already, the run needs class
            images or a regulariser, the loss became NaN, memory ran out, or the device failed.
    """

    def __init__(
        self,
        config: TuningConfig,
        backbone: Backbone,
        pictures: Image.Image | Sequence[Image.Image],
        *,
        draws: Draws | None = None,
        classifier: Classifier | None = None,
        method: type[Method] | None = None,
        regularizer: Regularizer | None = None,
        state: dict[str, Any] | None = None,
        accelerator: Any = None,
    ) -> None:
        backbone.use()
        self.config = config = configure(config, backbone, method=method)
        self.backbone, self.classifier, self.regularizer = backbone, classifier, regularizer
        self.schedule = backbone.schedule.to(backbone.device)
        self.accelerator = accelerator
        self._processes = accelerator.num_processes if accelerator else 1
        self.number = 0
        """The last step that was taken."""
        self._state = "running"
        made = draws is None and config.prior_loss_weight
        if made or (config.regularizer_file and regularizer is None):
            needs = "This run needs class images or a regularizer, which are made before"
            cure = "start it with sude_lab.runs.prepare, or leave their settings out"
            raise UserError(f"{needs}: {cure}.")
        with machine_failures():
            latents = [picture_latents(config, backbone, p) for p in one_of_each(config, pictures)]
            number = self.schedule.num_timesteps
            self.draws = draws or FreshDraws(latents, number, backbone.density)
            with torch.no_grad():
                self._before = category_conditions(backbone, config)
            kind = method or get_method(config.method)
            self.method = kind(backbone, config, keep_frozen=self._asks_frozen)
            self.method.start([mean for mean, _ in latents])
            self.optimizer = make_optimizer(config, self.method.groups())
            self.scaler = torch.amp.GradScaler(
                backbone.device.type, enabled=backbone.dtype == torch.float16
            )
            self._rates = [group["lr"] for group in self.optimizer.param_groups]
            if state is not None:
                self._load(state)
            prompts = self.method.subject_prompts()
            for prompt, subject in zip(prompts, config.subjects, strict=True):
                if rest := backbone.beyond_reach(prompt, subject.token):
                    raise UserError(f"The model does not read {rest!r}: shorten the tuning prompt.")
            with torch.no_grad():
                self._subjects = self.method.subject_conditions()
            asked = self.method.predict_pretrained, self.schedule, *self._before, self._subjects
            self.frozen = Frozen(*asked)

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        if self._state == "failed":
            cure = "continue from a step's state_dict() on a backbone that is opened again"
            raise UserError(f"This run failed after step {self.number}: {cure}.")
        if self.number >= self.config.max_train_steps:
            if self._state == "running":
                self.method.finish()
                self._state = "finished"
            raise StopIteration
        self._state = "failed"  # until the step is whole
        with machine_failures():
            step = self._step(self.number + 1)
        self._state = "running"
        return step

    def state_dict(self) -> dict[str, Any]:
        """Return everything that is needed to continue after the last step."""
        return {
            "step": self.number,
            "trained": self.method.state_dict(),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "scaler": self.scaler.state_dict(),
        }

    def _state_after(self, number: int) -> dict[str, Any]:
        if number != self.number:
            past = f"Step {number} is past, and the weights are those of step {self.number}"
            raise UserError(f"{past}: call state_dict() before the next step is taken.")
        return self.state_dict()

    def _load(self, state: dict[str, Any]) -> None:
        try:
            self.method.load_state_dict(state["trained"])
            self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
            self.scaler.load_state_dict(copy.deepcopy(state.get("scaler", {})))
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, UserError):
                raise
            wrong = "The checkpoint does not fit this run's weights and optimiser"
            raise UserError(f"{wrong}: start a new run.") from error
        self.number = state["step"]

    @property
    def _asks_frozen(self) -> bool:
        """Whether the run asks the model as it was before tuning."""
        config = self.config
        sude = self.classifier is None and config.prior == "pretrained"
        teacher = config.prior_loss_weight and config.prior_preservation == "teacher"
        return bool(teacher or (config.with_sude and (sude or self.regularizer)))

    def _step(self, number: int) -> Step:
        config, size = self.config, self.config.train_batch_size
        warm = min(1.0, number / max(1, config.lr_warmup_steps))
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * warm
        share = size * config.gradient_accumulation_steps
        whole = self.draws.draw(share * self._processes, step_generator(config.seed, number))
        first = share * self.accelerator.process_index if self._processes > 1 else 0
        asks = config.with_sude and (number - 1) % config.sude_every == 0
        self.optimizer.zero_grad(set_to_none=True)
        batches = []
        for k in range(first, first + share, size):
            batch = whole.rows(slice(k, k + size)).to(self.backbone.device)
            terms = self._losses(batch, asks)
            loss = terms["total"].mean() / config.gradient_accumulation_steps
            self.scaler.scale(loss).backward()
            columns = [term.detach().float() for term in terms.values()]
            batches.append(torch.stack(columns, dim=1))
        rows = self._move(number, torch.cat(batches))
        shown = dict(zip(terms, rows.unbind(1), strict=True))
        self.number = number
        return Step(
            number,
            t=shown["t"].long(),
            loss_subject=shown["loss_subject"],
            loss_sude=shown.get("loss_sude"),
            tau=shown.get("tau"),
            rho=shown.get("rho"),
            gate=shown["gate"].bool() if "gate" in shown else None,
            loss_regularizer=shown["loss_regularizer"].mean().item(),
            loss_own=shown["loss_own"].mean().item(),
            learning_rate=max(group["lr"] for group in self.optimizer.param_groups),
            method=self.method,
            state_dict=partial(self._state_after, number),
        )

    def _losses(self, batch: Batch, asks: bool) -> dict[str, Tensor]:
        """Return what a `Step` shows of every sample, t first, and eq. 10, the total, last; (B,)
        each, with SuDe where the step asks.
        """
        config, method, schedule = self.config, self.method, self.schedule
        now = self._before
        moves = (asks and config.prior == "current") or batch.z_0 is not None
        if method.changes_text and moves:
            now = category_conditions(self.backbone, config)
        subjects = self._subjects
        if method.changes_subject_text:
            subjects = method.subject_conditions()
        condition = subjects[batch.which]
        x_t = add_noise(batch.x_0, batch.eps, batch.t, schedule)
        output = method.predict(x_t, batch.t, condition, batch.which)
        own = method.own_loss()
        target = training_target(batch.x_0, batch.eps, batch.t, schedule)
        subject = subject_loss(output, target) / x_t[0].numel()
        terms = {"t": batch.t, "loss_subject": subject}
        gated = nothing = torch.zeros_like(subject)
        if not config.with_sude:
            terms["gate"] = nothing
        elif asks and self.regularizer:
            frozen, (null, categories) = self.frozen, self._before
            frozen.uncond, frozen.category = null.expand(len(x_t)), categories[batch.which]
            frozen.subject = condition
            terms["loss_sude"] = gated = self.regularizer(x_t, batch.t, output, frozen)
        elif asks:
            uncond, category = self._answers(x_t, batch, now)
            sude = sude_terms(
                *(output, category, uncond, x_t, batch.t, schedule),
                weighting=config.weighting,
                truncated=config.truncate,
                truncate_at=config.truncate_at,
            )
            gated = sude.gated
            terms |= {"loss_sude": sude.loss, "tau": sude.threshold}
            terms |= {"gate": sude.gate, "rho": sude.rho}
        preservation = self._preservation(batch, now[1]) if config.prior_loss_weight else nothing
        own = nothing if own is None else own
        weights = config.sude_every * config.weight_sude, config.prior_loss_weight
        total = total_loss(subject, gated, preservation, *weights)
        total = total * self.backbone.loss_weight(batch.t) + own
        return terms | {"loss_regularizer": preservation, "loss_own": own, "total": total}

    def _answers(
        self, x_t: Tensor, batch: Batch, now: tuple[Condition, Condition]
    ) -> tuple[Tensor, Tensor]:
        """Return the classifier's answers to eq. 5: for no condition, and for the category."""
        if self.classifier is not None:
            return self.classifier(x_t, batch)
        if self.config.prior == "current":
            predict, (null, categories) = self.method.predict_current, now
        else:
            predict, (null, categories) = self.method.predict_pretrained, self._before
        return ask(predict, x_t, batch.t, null, categories[batch.which])

    def _preservation(self, batch: Batch, categories: Condition) -> Tensor:
        """Return L_reg of eq. 10: the class images' own loss, or eq. 14 as it is written."""
        if batch.z_0 is None or batch.noise is None:
            raise UserError("The draws have no class images, and prior_loss_weight is above 0.")
        schedule, dims = self.schedule, batch.z_0[0].numel()
        z_t = add_noise(batch.z_0, batch.noise, batch.t, schedule)
        guess = self.method.predict_current(z_t, batch.t, categories[batch.which])
        if self.config.prior_preservation == "images":
            target = training_target(batch.z_0, batch.noise, batch.t, schedule)
            return subject_loss(guess, target) / dims
        fixed = self._before[1][batch.which]
        return class_regularizer(guess, self.method.predict_pretrained(z_t, batch.t, fixed)) / dims

    def _move(self, number: int, rows: Tensor) -> Tensor:
        """Take the optimiser's step along the gradients, averaged over processes and clipped.

        Returns the rows of all processes on the CPU: they and the gradient's norm come over
        together, the one moment of a step at which the CPU waits for the device.
        """
        parameters = list(self.method.parameters.values())
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self._processes > 1:
            rows = self.accelerator.gather(rows)
            for gradient in gradients:
                gradient.copy_(self.accelerator.reduce(gradient, reduction="mean"))
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm(gradients)
        values = torch.cat([rows.flatten(), norm.to(rows).reshape(1)]).cpu()
        rows, length = values[:-1].view_as(rows), values[-1:]
        t = rows[:, 0].long()
        check_finite(number, t, rows[:, -1])
        if not self.scaler.is_enabled():  # the scaler leaves out a step whose gradient overflowed
            check_finite(number, t, length, "gradient")
        # torch's clip_grad_norm_ multiplies by 1 where nothing is clipped: a pass over all weights.
        most = self.config.max_grad_norm
        if most and bool(length + 1e-6 > most):
            torch.nn.utils.clip_grads_with_norm_(parameters, most, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return rows


def tune(
    config: TuningConfig,
    backbone: Backbone,
    pictures: Image.Image | Sequence[Image.Image],
    **handed_in: Any,
) -> Iterator[Step]:
    """Tune `backbone` in place and return the iterator over its steps: `Tuning` as a function."""
    return iter(Tuning(config, backbone, pictures, **handed_in))


def category_conditions(backbone: Backbone, config: CompleteConfig) -> tuple[Condition, Condition]:
    """Return the null condition, one row, and the category's of every subject."""
    prompts, side = [photo_of(s.category) for s in config.subjects], config.resolution
    return backbone.null_condition(side), backbone.encode_prompts(prompts, side)


def check_finite(number: int, t: Tensor, values: Tensor, what: str = "loss") -> None:
    """Stop before the weights are spoilt; with a value for each t, name those that went wrong."""
    wrong = ~torch.isfinite(values)
    if bool(wrong.any()):
        bad = t[wrong] if len(t) == len(values) else t
        at = f"at step {number} (t = {', '.join(map(str, bad.tolist()))})"
        cure = "lower --learning-rate or --weight-sude, or keep the truncation on"
        raise UserError(f"The {what} became {values[wrong][0].item()} {at}: {cure}.")


def make_optimizer(config: CompleteConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return the optimiser of a run for a method's parameter groups."""
    if not any(group["lr"] for group in groups):
        rates = "--learning-rate or --token-learning-rate"
        raise UserError(f"Nothing would be trained: give {rates} a value above 0.")
    if config.optimizer != "adamw8bit":
        fused = config.optimizer == "adamw_fused" or None  # None: as torch chooses
        return torch.optim.AdamW(groups, weight_decay=config.adam_weight_decay, fused=fused)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        package = "the package bitsandbytes: pip install bitsandbytes"
        raise UserError(f"--optimizer adamw8bit needs {package}.") from error
    return AdamW8bit(groups, weight_decay=config.adam_weight_decay)
