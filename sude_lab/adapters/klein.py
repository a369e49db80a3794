"""FLUX.2 klein base: `Flux2KleinPipeline` where `is_distilled` is false.

The transformer is told s = t / 1000 and says noise - x_0 of packed latents, with ids for words and
picture; latents are patches of 2 x 2, normalised by the VAE's running statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from sude_lab.adapters.family import CHAT_WORDS, DISTILLED, SHARED, ChatBackbone
from sude_lab.backbone import Condition, send
from sude_lab.errors import UserError


def ask(model: Any, x_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
    """Return the transformer's output for times 1000 s, (B, C, h, w): packed, with its ids."""
    batch, channels, height, width = x_t.shape
    one, sides = torch.arange(1), (torch.arange(height), torch.arange(width))
    words = torch.arange(condition.hidden.shape[1])
    ids = [torch.cartesian_prod(one, *sides, one), torch.cartesian_prod(one, one, one, words)]
    img_ids, txt_ids = (send(i, x_t.device).expand(batch, -1, -1) for i in ids)
    output = model(
        hidden_states=x_t.flatten(2).transpose(1, 2),
        timestep=time / 1000,
        guidance=None,
        encoder_hidden_states=condition.hidden,
        txt_ids=txt_ids,
        img_ids=img_ids,
        return_dict=False,
    )[0]
    return output[:, : height * width].transpose(1, 2).reshape(batch, channels, height, width)


class Klein(ChatBackbone):
    """FLUX.2 klein base: latents in patches of 2 x 2, normalised by the VAE."""

    title: ClassVar[str] = "FLUX.2 klein"
    tag: ClassVar[str] = "flux2"
    classes: ClassVar[dict[str, str]] = SHARED | {
        "transformer": r"diffusers Flux2Transformer2DModel",
        "vae": r"diffusers AutoencoderKLFlux2",
        "text_encoder": r"transformers Qwen3ForCausalLM",
        "tokenizer": CHAT_WORDS,
    }
    lora_targets: ClassVar[tuple[str, ...]] = (*ChatBackbone.lora_targets, "to_qkv_mlp_proj")
    patch: ClassVar[int] = 2
    ask = staticmethod(ask)

    def encode_prompts(self, prompts: list[str], side: int | None = None) -> Condition:
        """Return the condition of the prompts: three of Qwen3's layers side by side."""
        with self.autocast():
            hidden, _ = self.pipeline.encode_prompt(prompts, max_sequence_length=self.length)
        return Condition(hidden)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        vae = self.pipeline.vae
        mean, variance = (x.view(1, -1, 1, 1) for x in (vae.bn.running_mean, vae.bn.running_var))
        return mean, (variance + vae.config.batch_norm_eps).sqrt()

    def scaled(self, mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
        """Return (patches - mean) / deviation of the VAE's statistics; the script draws nothing."""
        center, spread = self._statistics()
        if mean.shape[2] % 2:
            raise UserError("--resolution must be a multiple of 16 for this model.")
        latents = (pixel_unshuffle(mean, 2) - center) / spread
        return latents, torch.zeros_like(latents)

    def unscaled(self, latents: Tensor) -> Tensor:
        """Return latents as the decoder reads them."""
        center, spread = self._statistics()
        return pixel_shuffle(latents * spread + center, 2)

    def call_arguments(self, **settings: Any) -> dict[str, Any]:
        """Return the pipeline's arguments; it has no place for a negative prompt."""
        if settings.pop("negative_prompt", None):
            raise UserError("A Flux2KleinPipeline takes no negative prompt: leave it out.")
        return super().call_arguments(**settings)

    def needed(self) -> dict[str, Any]:
        """Return what the transformer's configuration must say, by the other parts'."""
        return {
            "in_channels": 4 * self.pipeline.vae.config.latent_channels,
            "joint_attention_dim": 3 * self.text_encoder.config.hidden_size,
        }

    @classmethod
    def refusal(cls, folder: Path, index: dict[str, Any], read: Callable[[str], Any]) -> str | None:
        """Say why a folder cannot be used: it is distilled, in steps or in guidance."""
        guided = read("transformer/config.json").get("guidance_embeds", True)
        return f"{folder} {DISTILLED}" if index.get("is_distilled") or guided else None
