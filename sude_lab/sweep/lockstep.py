"""Ablations in lockstep: runs that differ in their use of SuDe alone, tuned as one batch.

    configs = [replace(config, weight_sude=w) for w in (0, 0.5, 1, 2, 4)]
    for steps in tune_together(configs, backbone, picture):  # a step of every member
        print([step.loss_subject.mean() for step in steps])

Members with one seed draw the same latents, noise and t, so that much of their work is one work:

- the two predictions of the frozen classifier (eq. 7) are made once, not once a member, or taken
  from a prior bank;
- what the UNet does before its first attention depends on x_t and t alone: it is done once, for
  the classifier and for all members, and its rows are repeated where the prompts come in;
- the subject's predictions are one batch. Frozen weights multiply the rows of all members at once;
  what is trained is stacked, (M, ...): the words' embeddings are put in row by row, LoRA's two
  small products are batched matrix products. (`torch.func.vmap` over the stacked weights does the
  same; here it was slower.)

What is left is a forward and a backward pass over the rows of all members: where these are many
enough to keep the machine busy, only the shared part is won. `benchmarks/lockstep.py` measures it.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import chain
from queue import SimpleQueue
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from sude_lab.backbone import Backbone, Condition, concatenate
from sude_lab.config import CompleteConfig, TuningConfig, fields_of
from sude_lab.diffusion import add_noise, training_target
from sude_lab.draws import Batch, one_of_each, picture_latents, step_generator
from sude_lab.errors import UserError, machine_failure
from sude_lab.losses import subject_loss, total_loss
from sude_lab.methods import Method, configure, get_method
from sude_lab.runs.prepare import prepare
from sude_lab.sude import SudeTerms, sude_terms
from sude_lab.tuning import Classifier, Step, category_conditions, check_finite, make_optimizer

MAY_DIFFER = fields_of("sude")
"""The settings in which members may differ: those of SuDe that change no weight and no draw."""
PRIOR = fields_of("prior")
"""Who is asked, and how that is kept: one for all members with SuDe; nothing to those without."""


def check_together(configs: Sequence[TuningConfig]) -> None:
    """Say in one sentence why `configs`, resolved, cannot be tuned together, if they cannot.

    Raises:
        UserError: there are none, they differ in more than `MAY_DIFFER`, or their method or one of
            their settings does not work in lockstep.
    """
    if not configs:
        raise UserError("There is nothing to tune together: give at least one configuration.")
    first = next((c for c in configs if c.with_sude), configs[0])
    for other in configs:
        unsaid = (*MAY_DIFFER, *(() if other.with_sude else PRIOR))
        for f in fields(TuningConfig):
            if f.name not in unsaid and getattr(first, f.name) != getattr(other, f.name):
                raise UserError(
                    f"Runs in lockstep may differ in {', '.join(MAY_DIFFER)} alone, and these "
                    f"differ in {f.name} ({getattr(first, f.name)} and {getattr(other, f.name)}): "
                    "tune them one by one."
                )
    lora = first.method == "dreambooth" and first.train == "lora" and not first.train_text_encoder
    if not lora and first.method != "textual_inversion":
        raise UserError(
            f"Lockstep does not work for {first.method} as it is set here: it works for "
            "textual_inversion, and for dreambooth with --train lora and without "
            "--train-text-encoder."
        )
    unfit = {
        "--prior-loss-weight above 0": bool(first.prior_loss_weight),
        f"--optimizer {first.optimizer}": first.optimizer == "adamw8bit",
        "--dtype float16": first.dtype == "float16",
    }
    for setting, wanted in unfit.items():
        if wanted:
            raise UserError(
                f"Lockstep does not work with {setting}: leave it out, or tune the runs one by one."
            )


def tune_together(
    configs: Sequence[TuningConfig],
    backbone: Backbone,
    picture: Image.Image | Sequence[Image.Image],
    *,
    states: Sequence[dict[str, Any]] | None = None,
) -> Iterator[tuple[Step | UserError, ...]]:
    """Tune the members, one for each of `configs`, and yield a `Step` of every one of them.

    Every member takes the step that `tune` takes with its configuration: the same draws, losses,
    clipping and optimiser, its numbers equal to `tune`'s but for float32 rounding (sums run over
    other batches). Where L_sude equals tau to the last digit, rounding opens or shuts the gate,
    here as in `tune`: so at the first step of a Textual Inversion whose one vector starts from the
    category's own word.

    A member whose loss or gradient is not finite stops there, and in place of its steps its error
    is yielded from then on; the others go on as if it had never been.

    `backbone` itself stays as it was. A member's model is `step.method.backbone`, which shares all
    frozen weights with `backbone` except the tables of words. As with `tune`, a step's method and
    `state_dict` are those of the moment: read them before the next step.

    Args:
        configs: The members' settings; they differ in `MAY_DIFFER` alone.
        backbone: The model, opened.
        picture: The subject's picture, or one of each subject.
        states: What `Step.state_dict()` gave, of `tune` or of `tune_together`, one a member and all
            after the same step; the runs are continued from there.

    Raises:
        UserError: the settings do not fit each other, the model or lockstep, the last member
            failed, or memory ran out.
    """
    complete = [configure(config, backbone) for config in configs]
    check_together(complete)
    if backbone.is_xl:
        raise UserError("Lockstep is made for Stable Diffusion 1 and 2: tune SDXL one by one.")
    if backbone.dtype == torch.float16:
        raise UserError("Lockstep does not work with --dtype float16: use bfloat16 or float32.")
    pictures = one_of_each(complete[0], picture)
    try:
        yield from _tune_together(complete, backbone, pictures, states)
    except (RuntimeError, MemoryError) as error:
        told = machine_failure(error)
        if told is None:
            raise
        raise UserError(
            f"{told}: tune fewer runs together, or use --gradient-checkpointing, --dtype bfloat16, "
            "a smaller --train-batch-size or a smaller --resolution."
        ) from error


def _tune_together(
    configs: Sequence[CompleteConfig],
    backbone: Backbone,
    pictures: list[Image.Image],
    states: Sequence[dict[str, Any]] | None,
) -> Iterator[tuple[Step | UserError, ...]]:
    config = configs[0]
    schedule, device, size = backbone.schedule, backbone.device, config.train_batch_size
    latents = [picture_latents(config, backbone, picture) for picture in pictures]
    asks = next((own for own in configs if own.with_sude), config)
    draws, classifier = prepare(asks, backbone, pictures)
    with torch.no_grad():
        fixed = category_conditions(backbone, config)
    kind = get_method(config.method)
    methods = {k: kind(sharing_copy(backbone), own) for k, own in enumerate(configs)}
    for method in methods.values():
        method.start([mean for mean, _ in latents])
    stack = _Stack(config, methods, states)
    joint = _JointModel(kind(sharing_copy(backbone), config), stack)
    losses_of = partial(_losses, configs, joint, fixed, schedule, classifier)
    failed: dict[int, UserError] = {}
    accumulate = config.gradient_accumulation_steps
    number = stack.first + 1
    while number <= config.max_train_steps:
        stack.warm(min(1.0, number / max(1, config.lr_warmup_steps)))
        generator = step_generator(config.seed, number)
        whole = draws.draw(size * accumulate, generator)
        stack.optimizer.zero_grad(set_to_none=True)
        seen = []
        for k in range(accumulate):
            losses = losses_of(whole.rows(slice(k * size, (k + 1) * size)).to(device))
            bad = _not_finite(number, losses.t, losses.total, stack.members, "loss")
            if bad:
                break
            (losses.total.mean(dim=1).sum() / accumulate).backward()
            seen.append(losses)
        else:
            norms = stack.clip(config.max_grad_norm or math.inf)
            drawn = torch.cat([losses.t for losses in seen])
            bad = _not_finite(number, drawn, norms.unsqueeze(1), stack.members, "gradient")
        if bad:  # nothing was changed yet: the others take this step anew
            failed |= bad
            for member in bad:
                stack.drop(member)
            if not stack.members:
                raise next(iter(bad.values()))
            continue
        stack.optimizer.step()
        steps = _steps(number, seen, stack, len(configs))
        yield tuple(failed.get(k) or steps[k] for k in range(len(configs)))
        number += 1
    for method in stack.methods.values():
        method.finish()


def sharing_copy(backbone: Backbone) -> Backbone:
    """Return a backbone with modules of its own and the tensors of `backbone`.

    Only the text encoders' tables of words are copied, since new words are written into them.
    """
    parts = [p for p in backbone.pipeline.components.values() if isinstance(p, nn.Module)]
    tables = [e.get_input_embeddings().weight for e in backbone.text_encoders.values()]
    shared = {id(x): x for part in parts for x in chain(part.parameters(), part.buffers())}
    for table in tables:
        shared.pop(id(table), None)
    return replace(backbone, pipeline=copy.deepcopy(backbone.pipeline, dict(shared)))


def feed(consumers: Sequence[Callable[..., Any]], backbone: Backbone) -> list[BaseException | None]:
    """Let code that runs `tune` for itself run in lockstep; return the errors, None without one.

    Each consumer gets a tuner to use in the place of `tune`. It runs in a thread of its own, but
    never beside another: it has its turn until it asks for its next step, and when all that are
    left have asked, this thread takes that step for all of them with `tune_together`.

    Args:
        consumers: What to run, once each, as `consumer(tuner=...)`; the configurations that they
            give their tuners must fit together.
        backbone: The model, opened; the consumers' own stay unused.
    """
    turn, asked = threading.Lock(), SimpleQueue[tuple[int, bool]]()
    answers: list[SimpleQueue[Any]] = [SimpleQueue() for _ in consumers]
    errors: list[BaseException | None] = [None] * len(consumers)
    given: dict[int, tuple[TuningConfig, Sequence[Image.Image]]] = {}

    def tuner(
        k: int, config: TuningConfig, _: Backbone, pictures: Any, **settings: Any
    ) -> Iterator[Step]:
        if any(value is not None for value in settings.values()):
            raise UserError("A run that is continued, or of several processes, is tuned alone.")
        given[k] = config, pictures
        while True:
            asked.put((k, True))
            turn.release()
            found = answers[k].get()
            turn.acquire()
            if isinstance(found, BaseException):
                raise found
            if found is None:
                return
            yield found

    def consume(k: int) -> None:
        with turn:
            try:
                consumers[k](tuner=partial(tuner, k))
            except BaseException as error:  # told by the caller of `feed`
                errors[k] = error
            finally:
                asked.put((k, False))

    threads = [threading.Thread(target=consume, args=(k,), daemon=True) for k in range(len(errors))]
    left, waiting = set(range(len(consumers))), set[int]()
    order: list[int] = []
    steps: Iterator[tuple[Step | UserError, ...]] = iter(())
    try:
        for thread in threads:
            thread.start()
        while left:
            k, asks = asked.get()
            (waiting.add if asks else left.discard)(k)
            if not left or waiting != left:
                continue
            if not order:
                order = sorted(left)
                steps = tune_together([given[k][0] for k in order], backbone, given[order[0]][1])
            try:
                found: Any = next(steps, None) or [None] * len(order)
            except Exception as error:
                found = [error] * len(order)
            waiting.clear()
            for k, answer in zip(order, found, strict=True):
                if k in left:
                    answers[k].put(answer)
    finally:
        for k in left:  # this thread was stopped
            answers[k].put(UserError("The runs in lockstep were stopped."))
    for thread in threads:
        thread.join()
    return errors


# --- the losses of a step ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Losses:
    """What one batch gave: t (B,), the rest (M, B), a row a member."""

    t: Tensor
    subject: Tensor
    sude: SudeTerms
    total: Tensor


def _losses(
    configs: Sequence[CompleteConfig],
    joint: _JointModel,
    fixed: tuple[Condition, Condition],
    schedule: Any,
    classifier: Classifier | None,
    batch: Batch,
) -> _Losses:
    """Return eq. 10 of every member that is left, for one batch that they share."""
    members, size = joint.stack.members, len(batch.t)
    x_t = add_noise(batch.x_0, batch.eps, batch.t, schedule)
    joint.begin(x_t, batch.t)
    # The classifier first: gradient checkpointing computes the subject's part anew, as it was left.
    asked = [k for k in members if configs[k].with_sude]
    priors: dict[int, tuple[Tensor, Tensor]] = {}
    if asked and classifier is not None:  # known from the bank
        priors = dict.fromkeys(asked, classifier(x_t, batch))
    elif asked:
        null, classes = fixed
        pair = concatenate([null.expand(size), classes[batch.which]])
        with torch.no_grad():
            if configs[asked[0]].prior == "current" and joint.adapted:
                output = joint.predict(concatenate([pair] * len(asked)), asked)
                pairs = output.unflatten(0, (len(asked), 2, size))
                priors = {k: (both[0], both[1]) for k, both in zip(asked, pairs, strict=True)}
            else:  # nothing that is trained speaks here: one answer for all
                uncond, category = joint.predict(pair, []).chunk(2)
                priors = dict.fromkeys(asked, (uncond, category))
    output = joint.predict(joint.subject_condition(batch.which), members)
    dims = x_t[0].numel()
    target = training_target(batch.x_0, batch.eps, batch.t, schedule)
    of_subject = subject_loss(output, _repeat(target, len(members))) / dims
    subject, outputs = (x.unflatten(0, (len(members), size)) for x in (of_subject, output))

    terms = {k: SudeTerms.none(subject[0].detach()) for k in members}
    for group in _alike(configs, asked):
        own = configs[group[0]]
        of_group = sude_terms(
            torch.cat([outputs[members.index(k)] for k in group]),
            torch.cat([priors[k][1] for k in group]),
            torch.cat([priors[k][0] for k in group]),
            _repeat(x_t, len(group)),
            batch.t.repeat(len(group)),
            schedule,
            weighting=own.weighting,
            truncated=own.truncate,
            truncate_at=own.truncate_at,
        )
        for row, k in enumerate(group):
            rows = slice(row * size, (row + 1) * size)
            terms[k] = of_group.map(lambda x, rows=rows: x[rows])
    none = torch.zeros_like(subject[0]).detach()
    total = [
        total_loss(subject[row], terms[k].gated, none, configs[k].weight_sude, 0.0)
        for row, k in enumerate(members)
    ]
    first, *others = terms.values()
    sude = first.map(lambda *rows: torch.stack(rows), *others)
    return _Losses(batch.t, subject, sude, torch.stack(total))


def _alike(configs: Sequence[CompleteConfig], members: list[int]) -> list[list[int]]:
    """Return the members in groups for which eq. 7-9 are one computation."""
    groups: dict[Any, list[int]] = {}
    for k in members:
        own = configs[k]
        groups.setdefault((own.weighting, own.truncate, own.truncate_at), []).append(k)
    return list(groups.values())


def _not_finite(
    number: int, t: Tensor, values: Tensor, members: list[int], what: str
) -> dict[int, UserError]:
    """Return the errors of members whose row of `values`, (M, B) or (M, 1), is not all finite."""
    found: dict[int, UserError] = {}
    if not bool(torch.isfinite(values).all()):
        for member, row in zip(members, values, strict=True):
            try:
                check_finite(number, t, row, what)
            except UserError as error:
                found[member] = error
    return found


def _steps(number: int, seen: list[_Losses], stack: _Stack, members: int) -> list[Any]:
    """Return the step of every member, None where it failed; losses (M, B) become rows."""

    def told(pick: Callable[[_Losses], Tensor]) -> Tensor:
        return torch.cat([pick(losses).detach() for losses in seen], dim=-1).cpu()

    t = told(lambda x: x.t)
    subject = told(lambda x: x.subject)
    loss, tau = told(lambda x: x.sude.loss), told(lambda x: x.sude.threshold)
    gate, rho = told(lambda x: x.sude.gate), told(lambda x: x.sude.rho)
    steps: list[Any] = [None] * members
    for row, (k, method) in enumerate(stack.methods.items()):
        rate = max(group["lr"] for group in stack.optimizer.param_groups)
        snapshot = partial(stack.snapshot, k, number)
        steps[k] = Step(
            number,
            t,
            subject[row],
            loss[row],
            tau[row],
            gate[row],
            rho[row],
            0.0,
            0.0,
            rate,
            method,
            snapshot,
        )
    return steps


def _repeat(x: Tensor, times: int) -> Tensor:
    """Return the rows of x, all of them `times` times."""
    return x.repeat(times, *([1] * (x.ndim - 1)))


# --- what is trained -----------------------------------------------------------------------------


class _Stack:
    """What the members train, (M, ...) a tensor, and the AdamW that moves it.

    AdamW works element by element, so one for the stack is one for every member. The members' own
    parameters are views of their rows: who saves a member, or draws with it, sees it as it is.
    """

    def __init__(
        self,
        config: CompleteConfig,
        methods: Mapping[int, Method],
        states: Sequence[dict[str, Any]] | None,
    ) -> None:
        self.methods = dict(methods)
        own = methods[0]
        groups = own.groups()
        if states is not None:
            self._check_states(states)
            for method, state in zip(methods.values(), states, strict=True):
                method.load_state_dict(state["trained"])
        self.parameters = {
            name: nn.Parameter(torch.stack([m.parameters[name].data for m in methods.values()]))
            for name in own.parameters
        }
        names = {id(p): name for name, p in own.parameters.items()}
        for group in groups:
            group["params"] = [self.parameters[names[id(p)]] for p in group["params"]]
        self.optimizer = make_optimizer(config, groups)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.first = 0
        if states is not None:
            self._load_optimizers([copy.deepcopy(state["optimizer"]) for state in states])
            self.first = states[0]["step"]
        self._show()

    @property
    def members(self) -> list[int]:
        """The numbers of the members that are left, in the order of the rows."""
        return list(self.methods)

    def warm(self, factor: float) -> None:
        """Set the learning rates to a part of what they shall be."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """Clip the gradient of every member by its own norm; return the norms before, (M,)."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
        factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_ has it
        for gradient in gradients:
            gradient.mul_(factors.view(-1, *([1] * (gradient.ndim - 1))))
        return norms

    def drop(self, member: int) -> None:
        """Leave a member as it is, and go on without it."""
        row = self.members.index(member)
        method = self.methods.pop(member)
        for own in method.parameters.values():
            own.data = own.data.clone()

        def without(x: Tensor) -> Tensor:
            return torch.cat([x[:row], x[row + 1 :]])

        # New parameters: autograd remembers the old ones' shape.
        new = {p: nn.Parameter(without(p.data)) for p in self.parameters.values()}
        self.parameters = {name: new[p] for name, p in self.parameters.items()}
        for group in self.optimizer.param_groups:
            group["params"] = [new[p] for p in group["params"]]
        for p in new:
            state = self.optimizer.state.pop(p, {})
            kept = {name: without(x) if x.ndim else x for name, x in state.items()}
            if kept:
                self.optimizer.state[new[p]] = kept
        self._show()

    def snapshot(self, member: int, number: int) -> dict[str, Any]:
        """Return what `tune`, too, needs to continue one member."""
        row = self.members.index(member)
        whole = self.optimizer.state_dict()
        own = {
            k: {name: (x[row] if x.ndim else x).clone() for name, x in state.items()}
            for k, state in whole["state"].items()
        }
        return {
            "step": number,
            "trained": self.methods[member].state_dict(),
            "optimizer": copy.deepcopy(whole | {"state": own}),
            "scaler": {},
        }

    def _show(self) -> None:
        """Let the members' parameters be views of their rows."""
        for row, method in enumerate(self.methods.values()):
            for name, own in method.parameters.items():
                own.data = self.parameters[name].data[row]

    def _check_states(self, states: Sequence[dict[str, Any]]) -> None:
        try:
            together = len(states) == len(self.methods) and len({s["step"] for s in states}) == 1
            whole = all({"trained", "optimizer"} <= s.keys() for s in states)
        except (AttributeError, KeyError, TypeError):
            whole = together = False
        if not (whole and together):
            raise UserError(
                "To continue runs in lockstep give one checkpoint for each of them, all after the "
                "same step; else continue them one by one."
            )

    def _load_optimizers(self, states: list[dict[str, Any]]) -> None:
        try:
            joined = {
                k: {
                    name: torch.stack([s["state"][k][name] for s in states]) if x.ndim else x
                    for name, x in state.items()
                }
                for k, state in states[0]["state"].items()
            }
            self.optimizer.load_state_dict(states[0] | {"state": joined})
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                "The checkpoints do not fit these runs' weights and optimiser: start new runs."
            ) from error


# --- one model that answers for all --------------------------------------------------------------


class _JointModel:
    """One UNet and text encoder with the stacked weights: rows of all members in one call.

    The batch of a call is (K, B): K conditions for each of the B pairs (x_t, t), B of them in a
    row. The UNet is called with x_t of B rows; they become K B rows at the first attention.

    Args: method: of a copy of the backbone that nobody else uses; stack: the members' weights.
    """

    def __init__(self, method: Method, stack: _Stack) -> None:
        self.backbone, self.stack = method.backbone, stack
        self.prompts = method.subject_prompts()
        self._rows: list[int] = []
        tokens = {name: of.ids for name, of in method.tokens.items()}
        method.finish()  # takes the hooks away that put the method's own vectors in
        self._trains_words = method.changes_subject_text
        if self._trains_words:
            for name, encoder in self.backbone.text_encoders.items():
                insert = partial(self._insert, f"token.{name}", tokens[name])
                encoder.get_input_embeddings().register_forward_hook(insert)
        with torch.no_grad():
            self._fixed = None if self._trains_words else self._encode()
        unet = self.backbone.unet
        layers = {
            name: m for name, m in unet.named_modules() if hasattr(m, "lora_A") and m.lora_A.keys()
        }
        self.adapted = bool(layers)
        for name, layer in layers.items():
            layer.forward = partial(self._low_rank, name, layer)
        self._once = _share_before_attention(unet)

    def begin(self, x_t: Tensor, t: Tensor) -> None:
        """Take a new batch: all calls until the next `begin` are about these x_t and t."""
        self._x_t, self._t = x_t, t
        for once in self._once:
            once.forget()

    def subject_condition(self, which: Tensor) -> Condition:
        """Return the subject's condition of every member, (M B rows), `which` (B,) the subjects."""
        members = len(self.stack.members)
        if self._fixed is not None:
            return self._fixed[which.repeat(members)]
        rows = torch.arange(members, device=which.device).unsqueeze(1) * len(self.prompts) + which
        return self._encode()[rows.flatten()]

    def predict(self, condition: Condition, members: list[int]) -> Tensor:
        """Return the model output, (K B, C, h, w); K B rows of `condition`, in equal parts those of
        `members`, or of the model before tuning where there are none.
        """
        self._rows = [self.stack.members.index(k) for k in members]
        return self.backbone.predict(self._x_t, self._t, condition)

    def _encode(self) -> Condition:
        times = len(self.stack.members) if self._trains_words else 1
        return self.backbone.encode_prompts(self.prompts * times)

    def _insert(
        self, name: str, ids: list[int], module: nn.Module, args: tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        """Put every member's vectors into its rows."""
        vectors = self.stack.parameters[name]
        each = len(args[0]) // len(vectors)
        rows = vectors.repeat_interleave(each, dim=0).unsqueeze(2).to(output.dtype)
        for k, index in enumerate(ids):
            output = torch.where((args[0] == index).unsqueeze(-1), rows[:, k], output)
        return output

    def _low_rank(self, name: str, layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return W x + s B_m (A_m x) for the rows of every member m, or W x."""
        result: Tensor = layer.base_layer(x, *args, **kwargs)
        if not self._rows:
            return result
        (adapter,) = layer.active_adapters
        down: Tensor
        up: Tensor
        down, up = (
            self.stack.parameters[f"unet.{name}.{part}.{adapter}.weight"]
            for part in ("lora_A", "lora_B")
        )
        if len(self._rows) < len(down):
            down, up = down[self._rows], up[self._rows]
        low = torch.bmm(x.reshape(len(down), -1, x.shape[-1]), down.mT)
        change = torch.bmm(low, up.mT) * layer.scaling[adapter]
        return result + change.reshape(result.shape).to(result.dtype)


class _Once:
    """A module's forward that computes once, and gives the same again until told to forget."""

    def __init__(self, module: Any) -> None:
        self._forward, self._kept = module.forward, None
        module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._kept is None:
            with torch.no_grad():  # nothing is trained before the first attention
                self._kept = self._forward(*args, **kwargs)
        return self._kept

    def forget(self) -> None:
        self._kept = None


def _share_before_attention(unet: Any) -> list[_Once]:
    """Let a UNet do once what knows of no prompt, and repeat the rows where a prompt comes in.

    What comes before the first attention: the first convolution, down blocks without attention,
    and the first residual block of the one that has some.
    """
    from diffusers.models.resnet import ResnetBlock2D

    early = [unet.conv_in]
    for block in unet.down_blocks:
        if getattr(block, "attentions", None):
            early.append(block.resnets[0])
            break
        early.append(block)
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        for attention in getattr(block, "attentions", None) or ():
            attention.register_forward_pre_hook(_widen_states, with_kwargs=True)
    for block in unet.up_blocks:
        block.register_forward_pre_hook(_widen_kept, with_kwargs=True)
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            module.register_forward_pre_hook(_widen_time)
    return [_Once(module) for module in early]


def _widen_states(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before an attention: a row of states for every row of the condition."""
    times = len(kwargs["encoder_hidden_states"]) // len(args[0])
    return None if times == 1 else ((_repeat(args[0], times), *args[1:]), kwargs)


def _widen_time(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Before a residual block: an embedding of t for every row of states."""
    times = len(args[0]) // len(args[1])
    return None if times == 1 else (args[0], _repeat(args[1], times), *args[2:])


def _widen_kept(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before an up block: what came from the way down has as many rows as the states."""
    rows = len(kwargs["hidden_states"])
    kept = tuple(_repeat(x, rows // len(x)) for x in kwargs["res_hidden_states_tuple"])
    return args, kwargs | {"res_hidden_states_tuple": kept}
