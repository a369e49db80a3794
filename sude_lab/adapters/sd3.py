"""Stable Diffusion 3 and 3.5: `StableDiffusion3Pipeline`.

The transformer is told t = 1000 s and says noise - x_0; guidance is true, and no condition is the
prompt "". A condition is CLIP's words (two encoders side by side, filled up with zeros to T5's
width) with T5's below them, and both CLIPs' pooled states. Subjects' words are CLIP's: T5 reads
their letters.

Training is that of diffusers' `train_dreambooth_lora_sd3.py` as it is by default: s logit-normal,
and the error of the picture that the output stands for (`precondition_outputs`), which is s^2 times
the error of the output.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from sude_lab.adapters.family import CLIP_WORDS, SHARED, FlowBackbone
from sude_lab.backbone import Condition


def ask(model: Any, x_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
    """Return the transformer's output for times 1000 s, (B, C, h, w)."""
    return model(
        hidden_states=x_t,
        timestep=time,
        encoder_hidden_states=condition.hidden,
        pooled_projections=condition.pooled,
        return_dict=False,
    )[0]


class StableDiffusion3(FlowBackbone):
    """Stable Diffusion 3 or 3.5; `words` are T5's."""

    title: ClassVar[str] = "Stable Diffusion 3"
    tag: ClassVar[str] = "stable-diffusion-3"
    classes: ClassVar[dict[str, str]] = SHARED | {
        "transformer": r"diffusers SD3Transformer2DModel",
        "text_encoder": r"transformers CLIPTextModelWithProjection",
        "text_encoder_2": r"transformers CLIPTextModelWithProjection",
        **dict.fromkeys(("tokenizer", "tokenizer_2"), CLIP_WORDS),
        "text_encoder_3": r"transformers T5EncoderModel",
        "tokenizer_3": r"transformers (T5Tokenizer(Fast)?|PreTrainedTokenizerFast)",
        "image_encoder": r"transformers SiglipVisionModel",
        "feature_extractor": r"transformers SiglipImageProcessor",
    }
    words: ClassVar[int] = 256
    attention: ClassVar[tuple[str, ...]] = (".attn.", ".attn2.")
    lora_targets: ClassVar[tuple[str, ...]] = (
        *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    )
    ask = staticmethod(ask)

    def encode_prompts(self, prompts: list[str], side: int | None = None) -> Condition:
        """Return the condition of the prompts, by the pipeline's own path."""
        settings = {"do_classifier_free_guidance": False, "max_sequence_length": self.length}
        with self.autocast():
            hidden, _, pooled, _ = self.pipeline.encode_prompt(prompts, None, None, **settings)
        return Condition(hidden, pooled)

    def loss_weight(self, t: Tensor) -> Tensor:
        """Return s^2, (B,): the error of x_0 = x_t - s u in place of that of u."""
        return (self.times[t] / len(self.times)).square()

    def needed(self) -> dict[str, Any]:
        """Return what the transformer's configuration must say, by the other parts'."""
        channels = self.pipeline.vae.config.latent_channels
        pooled = sum(encoder.config.projection_dim for encoder in self.text_encoders.values())
        width = self.pipeline.text_encoder_3.config.d_model
        sides = {"in_channels": channels, "out_channels": channels}
        return sides | {"pooled_projection_dim": pooled, "joint_attention_dim": width}

    @classmethod
    def refusal(cls, folder: Path, index: dict[str, Any], read: Callable[[str], Any]) -> str | None:
        """Say why a folder cannot be used: it has no T5, or as `FlowBackbone` says."""
        if not (folder / "text_encoder_3").is_dir():
            return (
                f"{folder} has no T5 (text_encoder_3), in whose place diffusers puts words of "
                "zeros that the model was not trained with: save the pipeline with its T5"
            )
        return super().refusal(folder, index, read)
