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

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from sude_lab.adapters.family import DISTILLED, Family, FlowBackbone, no_flow
from sude_lab.adapters.unet import CLIP_WORDS, SHARED, misread
from sude_lab.backbone import Condition

T5_TOKENS = 256
"""How many of T5's words the pipeline asks for unless told."""


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
    """Stable Diffusion 3 or 3.5; its facts may say how many words of T5 it is told."""

    attention: ClassVar[tuple[str, ...]] = (".attn.", ".attn2.")
    lora_targets: ClassVar[tuple[str, ...]] = (
        *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    )
    ask = staticmethod(ask)

    @property
    def text_encoders(self) -> dict[str, Any]:
        """The two CLIPs, which know the subjects' words."""
        return {name: getattr(self.pipeline, name) for name in ("text_encoder", "text_encoder_2")}

    @property
    def tokenizers(self) -> list[Any]:
        """The tokenizers of the two CLIPs."""
        return [self.pipeline.tokenizer, self.pipeline.tokenizer_2]

    @property
    def t5_tokens(self) -> int:
        """How many words of T5 the transformer is told."""
        return int(self.facts.get("text", {}).get("max_sequence_length", T5_TOKENS))

    def encode_prompts(self, prompts: list[str], side: int | None = None) -> Condition:
        """Return the condition of the prompts, by the pipeline's own path."""
        with self.autocast():
            hidden, _, pooled, _ = self.pipeline.encode_prompt(
                prompts,
                None,
                None,
                do_classifier_free_guidance=False,
                max_sequence_length=self.t5_tokens,
            )
        return Condition(hidden, pooled)

    def null_condition(self, side: int | None = None) -> Condition:
        """Return the condition of no prompt, one row: that of ""."""
        return self.encode_prompts([""])

    def loss_weight(self, t: Tensor) -> Tensor:
        """Return s^2, (B,): the error of x_0 = x_t - s u in place of that of u."""
        s = self.schedule.to_time(t) / self.schedule.num_timesteps
        return s.square()

    def call_arguments(self, **settings: Any) -> dict[str, Any]:
        """Return the pipeline's arguments, with the number of T5 words."""
        return settings | {"max_sequence_length": self.t5_tokens}


def misfits(pipeline: Any) -> Iterator[str]:
    """Yield which parts of a pipeline do not fit each other."""
    yield from no_flow(pipeline)
    model, channels = pipeline.transformer.config, pipeline.vae.config.latent_channels
    if (model.in_channels, model.out_channels) != (channels, channels):
        yield (
            f"its transformer takes {model.in_channels} channels and gives {model.out_channels}, "
            f"its VAE has {channels}"
        )
    yield from misread(pipeline)
    clips = (pipeline.text_encoder.config, pipeline.text_encoder_2.config)
    pooled = sum(config.projection_dim for config in clips)
    if model.pooled_projection_dim != pooled:
        yield f"its transformer takes pooled words of {model.pooled_projection_dim}, not {pooled}"
    t5 = pipeline.text_encoder_3.config.d_model
    if model.joint_attention_dim != t5:
        yield f"its transformer reads words of width {model.joint_attention_dim}, T5's are {t5}"


def refusal(folder: Path, index: dict[str, Any], read: Callable[[str], Any]) -> str | None:
    """Say why a folder cannot be used: it has no T5, a VAE without shift, or is distilled."""
    if "turbo" in folder.name.lower():
        return f"{folder} {DISTILLED}"
    if not (folder / "text_encoder_3").is_dir():
        return (
            f"{folder} has no T5 (text_encoder_3), in whose place diffusers puts words of zeros "
            "that the model was not trained with: save the pipeline with its T5"
        )
    if read("vae/config.json").get("shift_factor") is None:
        return (
            f"The VAE in {folder} has no shift_factor, without which a StableDiffusion3Pipeline "
            'cannot draw: write "shift_factor": 0.0 into vae/config.json if it needs none'
        )
    return None


STABLE_DIFFUSION_3 = Family(
    "Stable Diffusion 3",
    "stable-diffusion-3",
    StableDiffusion3,
    SHARED
    | {
        "transformer": r"diffusers SD3Transformer2DModel",
        **dict.fromkeys(
            ("text_encoder", "text_encoder_2"), r"transformers CLIPTextModelWithProjection"
        ),
        **dict.fromkeys(("tokenizer", "tokenizer_2"), CLIP_WORDS),
        "text_encoder_3": r"transformers T5EncoderModel",
        "tokenizer_3": r"transformers (T5Tokenizer(Fast)?|PreTrainedTokenizerFast)",
        "image_encoder": r"transformers SiglipVisionModel",
        "feature_extractor": r"transformers SiglipImageProcessor",
    },
    (
        "transformer",
        "vae",
        "scheduler",
        *(f"{part}{end}" for part in ("text_encoder", "tokenizer") for end in ("", "_2", "_3")),
    ),
    misfits,
    refusal,
)
