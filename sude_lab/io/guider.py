"""SuDe without training for diffusers' modular pipelines, which have a place for it: the guider."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, ClassVar

from diffusers.configuration_utils import register_to_config
from diffusers.guiders import ClassifierFreeGuidance
from torch import Tensor, nn

from sude_lab.errors import UserError
from sude_lab.frozen import without_adapters
from sude_lab.guidance import sude_correction

_ASKED = ["pred_class", "pred_null"]


class SudeGuidance(ClassifierFreeGuidance):
    """The guider of diffusers' modular pipelines that draws by (*) of `sude_lab.guidance`.

    Classifier-free guidance with two more batches, for the class prompt and for no prompt, made by
    the frozen model: the pipeline's own with its LoRA off, or `frozen`.

        guider = SudeGuidance(
            guidance_scale=7.5,
            class_inputs={"prompt_embeds": c.hidden, "text_embeds": c.pooled},
            null_inputs={"prompt_embeds": n.hidden, "text_embeds": n.pooled},
        )
        pipeline.update_components(guider=guider)

    Args:
        strength: g.
        class_inputs: the model inputs of the class prompt, one row each, by the names the pipeline
            gives its guider; other inputs are those of the drawn prompt.
        null_inputs: the same for no prompt.
        frozen: the denoiser as it was before tuning; None switches the LoRA off.

    The rest are `ClassifierFreeGuidance`'s. `save_pretrained` writes no tensors and models.
    """

    _input_predictions: ClassVar[list[str]] = ["pred_cond", "pred_uncond", *_ASKED]
    ignore_for_config: ClassVar[list[str]] = ["class_inputs", "null_inputs", "frozen"]

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        use_original_formulation: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
        strength: float = 1.0,
        *,
        class_inputs: dict[str, Tensor],
        null_inputs: dict[str, Tensor],
        frozen: nn.Module | None = None,
    ) -> None:
        super().__init__(
            guidance_scale, guidance_rescale, use_original_formulation, start, stop, enabled
        )
        self.strength = strength
        self.class_inputs, self.null_inputs = class_inputs, null_inputs
        self.frozen = frozen
        self._switched = ExitStack()

    def new(self, **kwargs: Any) -> SudeGuidance:
        """Return a copy of this guider with some settings changed."""
        settings = {k: v for k, v in self.config.items() if not k.startswith("_")}
        settings |= {name: getattr(self, name) for name in self.ignore_for_config}
        return type(self)(**settings | kwargs)

    @property
    def num_conditions(self) -> int:
        """The number of batches of a step."""
        return super().num_conditions + (2 if self._is_sude_enabled() else 0)

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        """Begin a step; a model that an error left switched is put back first."""
        self._switched.close()
        super().set_state(step, num_inference_steps, timestep)

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        """Return the batches of a step: conditional, unconditional, class, null."""
        return self._batches(partial(self._prepare_batch, data))

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        """Return the batches of a step: conditional, unconditional, class, null."""
        make = partial(self._prepare_batch_from_block_state, input_fields, data)
        return self._batches(make)

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Before the batches of the class and of no prompt, make the model the frozen one."""
        super().prepare_models(denoiser)
        if self._count_prepared > super().num_conditions:
            frozen = self.frozen and _answering_as(denoiser, self.frozen)
            self._switched.enter_context(frozen or without_adapters(denoiser))

    def cleanup_models(self, denoiser: nn.Module) -> None:
        """Put the model back."""
        self._switched.close()
        super().cleanup_models(denoiser)

    def forward(
        self,
        pred_cond: Tensor,
        pred_uncond: Tensor | None = None,
        pred_class: Tensor | None = None,
        pred_null: Tensor | None = None,
    ) -> Any:
        """Return the guided prediction with SuDe's correction."""
        if pred_class is not None and pred_null is not None:
            pred_cond = pred_cond + sude_correction(pred_cond, pred_class, pred_null, self.strength)
        return super().forward(pred_cond, pred_uncond)

    def _is_sude_enabled(self) -> bool:
        return bool(self._enabled and self.strength)

    def _batches(self, make: Callable[[int, str], Any]) -> list[Any]:
        batches = [make(0, "pred_cond")]
        if self._is_cfg_enabled():
            batches.append(make(1, "pred_uncond"))
        if self._is_sude_enabled():
            for name, inputs in zip(_ASKED, (self.class_inputs, self.null_inputs), strict=True):
                batch = make(0, name)
                for key, value in inputs.items():
                    if not hasattr(batch, key):
                        raise UserError(
                            f"This pipeline gives its guider no {key!r}: name its own inputs."
                        )
                    given = getattr(batch, key)
                    setattr(batch, key, value.to(given).expand(len(given), *value.shape[1:]))
                batches.append(batch)
        return batches


@contextmanager
def _answering_as(module: nn.Module, other: nn.Module) -> Iterator[None]:
    """Let a module answer with another one's output."""
    before = module.__dict__.get("forward")  # accelerate puts one of its own there
    module.__dict__["forward"] = lambda *args, **kwargs: other(*args, **kwargs)
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before
