"""SuDe without training: while a tuned model draws, pull it back to its category by its hinge.

For any model that was tuned without SuDe and the frozen model it came from. At each step of the
sampler, with u the model output (eps, x_0 or v) at the same (x_t, t), a bar for the frozen model,
c_sub = "photo of a running {S*}" and c_class = "photo of a running dog":

    d = u_bar(c_class) - u_bar(null)       the category's guidance direction
    a = u_tuned(c_sub) - u_bar(null)       where the subject is
    rho = <a, d> / ||d||^2                 `sude_lab.losses.guidance_projection`, per sample
    guided prediction + g w max(0, 1 - rho) d                                               (*)

with g the strength and w the scale of classifier-free guidance. It costs two predictions of the
frozen model a step, in one batched call.

**From the hinge.** While rho < 1, the gradient of truncated SuDe (`sude_lab.losses.hinge_loss`,
arXiv 2403.06775, eq. 7-9) with respect to the subject's prediction is the constant -d / sigma_t^2.
Tuning takes many small steps along it until the gate of eq. 9 shuts at rho = 1; here the prediction
itself takes the one step that shuts it, a' = a + (1 - rho) d. With another g, rho' = rho + g (1 -
rho). That (*) follows after guidance, for every prediction type: guide, "SuDe without training".

**Where it is plugged in.** A forward hook on the denoiser of pipelines that stack [unconditional,
conditional] in one batch: Stable Diffusion 1 to 3 and XL. (`callback_on_step_end` may not replace
the prediction.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from sude_lab.backbone import Backbone, Condition
from sude_lab.errors import UserError
from sude_lab.frozen import adapter_layers, without_adapters
from sude_lab.losses import guidance_projection
from sude_lab.sude import ask


def sude_correction(
    output_subject: Tensor,
    output_class: Tensor,
    output_uncond: Tensor,
    strength: float = 1.0,
    *,
    hinge: bool = True,
) -> Tensor:
    """What to add to the subject's prediction so that its category agrees.

    g max(0, 1 - rho) d, the module's docstring; without `hinge` g d: plain composition of the two
    prompts, however much of the class the subject has already.

    Args: outputs (B, ...) of one (x_t, t), in any one parametrisation: the tuned model's for the
    subject, the frozen model's for the class prompt and for no prompt. Returns (B, ...), in the
    dtype of `output_subject`.

    Raises:
        ValueError: the shapes differ.
    """
    rho = guidance_projection(output_subject, output_class, output_uncond)
    share = strength * torch.relu(1 - rho) if hinge else torch.full_like(rho, strength)
    d = output_class.to(rho.dtype) - output_uncond.to(rho.dtype)
    return (share.reshape(-1, *[1] * (d.ndim - 1)) * d).to(output_subject.dtype)


def has_adapters(unet: nn.Module) -> bool:
    """Whether the UNet carries a LoRA (peft) that can be switched off, and is not fused."""
    layers = adapter_layers(unet)
    if any(layer.merged for layer in layers):
        cure = "call unfuse_lora() on the pipeline, or give the UNet from before"
        raise UserError(f"The LoRA is fused into the weights and cannot be switched off: {cure}.")
    return bool(layers)


@contextmanager
def sude_guidance(
    pipeline: Any,
    frozen: Any,
    class_prompt: str | Condition,
    strength: float = 1.0,
    *,
    null: Condition | None = None,
    hinge: bool = True,
) -> Iterator[list[Tensor]]:
    """Let a pipeline draw by equation (*) of the module's docstring while the context is open.

        with sude_guidance(pipeline, None, "photo of a running dog"):       # a LoRA
            images = pipeline("photo of a running <sks> dog").images

    Works with classifier-free guidance and without, with any scheduler and negative prompt, with
    SDXL's added conditions and ControlNet's residuals.

    Args:
        pipeline: the tuned pipeline; its UNet is put back as it was, also after an error.
        frozen: the UNet as it was before tuning, or what is called like one; None switches the
            pipeline's LoRA off for it.
        class_prompt: the drawn prompt with the category in the subject's place, encoded by the
            pipeline's text encoders without their LoRA; or its `Condition`, one row or one a
            picture: encode it with the frozen text encoder where that was tuned, and for a
            transformer, with `null`.
        strength: g; 0 leaves the pipeline alone.
        null: the condition of no prompt; None encodes it with the pipeline.
        hinge: False composes the two prompts plainly, for comparison.

    Yields:
        A list that gets rho, (B,), of every step.

    Raises:
        UserError: the strength is negative or not finite, the pipeline has no UNet, or there is no
            LoRA to switch off; while drawing: there are not as many class conditions as pictures.
    """
    if not 0 <= strength < math.inf:
        raise UserError(f"The strength of SuDe guidance is {strength}: it must be at least 0.")
    name = type(pipeline).__name__
    unet = getattr(pipeline, "transformer" if name == "StableDiffusion3Pipeline" else "unet", None)
    # Asked of the class: the property itself has no value before the first call.
    if unet is None or not hasattr(type(pipeline), "do_classifier_free_guidance"):
        cure = "use a Stable Diffusion pipeline"
        raise UserError(f"A {name} has no UNet with guidance by text: {cure}.")
    if frozen is None and not has_adapters(unet):
        raise UserError("The pipeline has no LoRA to switch off: give the UNet from before.")
    seen: list[Tensor] = []
    if strength == 0:
        yield seen
        return
    classes, null = _conditions(pipeline, class_prompt, null)
    asking = False  # the frozen model may be this very UNet, whose hooks then run again
    call: dict[str, Any] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not asking:
            call.clear()
            names = ("sample", "timestep", "encoder_hidden_states")
            call.update(zip(names, args, strict=False), **kwargs)

    def correct(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        nonlocal asking
        if asking:
            return None
        whole = output[0]
        # [unconditional, conditional] with guidance, else the conditional rows alone.
        number = len(whole) // (2 if pipeline.do_classifier_free_guidance else 1)
        subject = whole[-number:]
        if len(classes) not in (1, number):
            found = f"There are {len(classes)} class conditions for {number} pictures"
            raise UserError(f"{found}: give one, or one for each picture.")
        x_t = call["sample" if "sample" in call else "hidden_states"][-number:]
        t = torch.as_tensor(call["timestep"], device=x_t.device).expand(len(whole))[-number:]
        model = unet if frozen is None else frozen
        asking = True
        try:
            with without_adapters(unet) if frozen is None else nullcontext():
                uncond, category = ask(partial(_predict, model, call), x_t, t, null, classes)
        finally:
            asking = False
        seen.append(guidance_projection(subject, category, uncond).detach())
        corrected = subject + sude_correction(subject, category, uncond, strength, hinge=hinge)
        whole = torch.cat([whole[:-number], corrected])
        return (whole, *output[1:]) if isinstance(output, tuple) else type(output)(sample=whole)

    # First to see the call and last to see the output: a method may have hooks of its own (ViCo).
    with (
        unet.register_forward_pre_hook(note, with_kwargs=True, prepend=True),
        unet.register_forward_hook(correct),
    ):
        yield seen


@torch.no_grad()
def _conditions(
    pipeline: Any, prompt: str | Condition, null: Condition | None
) -> tuple[Condition, Condition]:
    """Return the class condition and that of no prompt, encoded where they are not given."""
    if isinstance(prompt, Condition) and null is not None:
        return prompt, null
    if not hasattr(pipeline, "unet"):
        needed = "the class prompt as a Condition (encode_prompts), and null (null_condition)"
        raise UserError(f"The words of a transformer are encoded by its backbone: give {needed}.")
    backbone = Backbone(pipeline, source="", device=pipeline._execution_device)
    with ExitStack() as stack:
        for encoder in backbone.text_encoders.values():
            stack.enter_context(without_adapters(encoder))
        if isinstance(prompt, str):
            prompt = backbone.encode_prompts([prompt])
        return prompt, null or backbone.null_condition()


def _predict(
    model: Callable[..., Any], call: dict[str, Any], x_t: Tensor, t: Tensor, condition: Condition
) -> Tensor:
    """Ask a UNet as it was asked in `call`, for its last rows twice and with other prompts.

    What comes with the conditional rows (sizes, ControlNet's residuals) stays.
    """
    sample = "sample" if "sample" in call else "hidden_states"
    rows, number = len(call[sample]), len(x_t) // 2
    twice = list(range(rows - number, rows)) * 2

    def select(value: Any) -> Any:
        of_rows = isinstance(value, Tensor) and value.ndim and len(value) == rows
        return value[twice] if of_rows else value

    arguments = tree_map(select, call)
    hidden = condition.hidden.to(arguments["encoder_hidden_states"])
    arguments |= {sample: x_t, "timestep": t, "encoder_hidden_states": hidden}
    if "pooled_projections" in arguments and condition.pooled is not None:
        arguments["pooled_projections"] = condition.pooled.to(hidden)
    added = arguments.get("added_cond_kwargs")
    if added and condition.pooled is not None:
        added["text_embeds"] = condition.pooled.to(added["text_embeds"])
    return model(**arguments | {"return_dict": False})[0]
