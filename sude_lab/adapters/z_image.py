"""Z-Image base: `ZImagePipeline`; Turbo is distilled, which its name alone says.

The transformer is told 1 - s and says x_0 - noise, of lists of pictures and of words without
padding; the pipeline's scale of guidance counts from 0, and it writes over the caller's prompts.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from sude_lab.adapters.family import CHAT_WORDS, SHARED, ChatBackbone
from sude_lab.backbone import Condition


def ask(model: Any, x_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
    """Return noise - x_0 for times 1000 s, (B, C, h, w)."""
    assert condition.sizes is not None
    lengths = condition.sizes[:, 0].tolist()
    words = [row[:length] for row, length in zip(condition.hidden, lengths, strict=True)]
    pictures = list(x_t.unsqueeze(2).unbind(0))
    output = model(pictures, (1000 - time) / 1000, words, return_dict=False)[0]
    return -torch.stack(list(output)).squeeze(2)


class ZImage(ChatBackbone):
    """Z-Image base: the output is x_0 - noise at the time 1 - s, and words have no padding."""

    title: ClassVar[str] = "Z-Image"
    tag: ClassVar[str] = "z-image"
    classes: ClassVar[dict[str, str]] = SHARED | {
        "transformer": r"diffusers ZImageTransformer2DModel",
        "text_encoder": r"transformers Qwen3(Model|ForCausalLM)",
        "tokenizer": CHAT_WORDS,
    }
    attention: ClassVar[tuple[str, ...]] = (".attention.",)
    ask = staticmethod(ask)

    def encode_prompts(self, prompts: list[str], side: int | None = None) -> Condition:
        """Return the condition of the prompts: rows of `sizes` words, then zeros."""
        with self.autocast():  # the pipeline writes over the list that it is given
            rows, _ = self.pipeline.encode_prompt(
                list(prompts), do_classifier_free_guidance=False, max_sequence_length=self.length
            )
        hidden = rows[0].new_zeros(len(rows), self.length, rows[0].shape[1])
        for k, row in enumerate(rows):
            hidden[k, : len(row)] = row
        return Condition(hidden, sizes=torch.tensor([[len(row)] for row in rows]))

    def scaled(self, mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
        """Return (latents - shift) * scale; the script draws nothing."""
        latents, _ = super().scaled(mean, deviation)
        return latents, torch.zeros_like(latents)

    def call_arguments(self, **settings: Any) -> dict[str, Any]:
        """Return the pipeline's arguments: its scale g means u_cond + g (u_cond - u_neg)."""
        scale = settings.pop("guidance_scale") - 1
        return super().call_arguments(**settings, guidance_scale=scale)

    def needed(self) -> dict[str, Any]:
        """Return what the transformer's configuration must say, by the other parts'."""
        channels = self.pipeline.vae.config.latent_channels
        return {"in_channels": channels, "cap_feat_dim": self.text_encoder.config.hidden_size}
