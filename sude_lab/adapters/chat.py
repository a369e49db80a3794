"""What FLUX.2 klein base and Z-Image base share: they read a chat with Qwen3.

Both have true guidance, and no condition is the prompt "" within the chat's marks, as the pipelines
themselves write it. A subject's word is read by its letters: nothing of the language model is
trained, and there is no file of words to load. Training is that of diffusers' scripts by default:
s even over the training's table, the error of the output as it is, and the encoder's mean.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor

from sude_lab.adapters.family import FlowBackbone
from sude_lab.errors import UserError

RESOLUTION = 1024
WORDS = r"transformers Qwen2Tokenizer(Fast)?"


class ChatBackbone(FlowBackbone):
    """What the two have in common; facts may say `resolution`, too."""

    parts: ClassVar[tuple[str, ...]] = (
        *("transformer", "vae", "text_encoder", "tokenizer", "scheduler"),
    )
    encoders: ClassVar[tuple[str, ...]] = ()
    density: ClassVar[Literal["uniform", "logit_normal"]] = "uniform"
    unavailable: ClassVar[tuple[str, ...]] = ("custom_diffusion", "vico", "textual_inversion")
    words: ClassVar[int] = 512  # the chat's marks among them
    patch: ClassVar[int] = 1
    """How many numbers of the VAE's, each way, are one of the transformer's."""

    @property
    def resolution(self) -> int:
        """The side of a picture in pixels."""
        return int(self.facts.get("resolution", RESOLUTION))

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of a picture's latents, (C, h, w)."""
        side = self.resolution // (self.patch * self.pipeline.vae_scale_factor)
        return (self.denoiser.config.in_channels, side, side)

    def check_method(self, config: Any) -> None:
        """Refuse, with a UserError, what is made for UNets, and what trains words."""
        super().check_method(config)
        if config.train_text_encoder or config.token_learning_rate:
            kind, flags = (
                type(self.pipeline).__name__,
                "--train-text-encoder, --token-learning-rate",
            )
            raise UserError(f"The language model of a {kind} is not trained: leave out {flags}.")

    def tokenize(self, prompts: list[str], tokenizer: Any = None) -> Tensor:
        """Return token ids (B, L), without the chat's marks, on the CPU."""
        how = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        return self.tokenizer(prompts, max_length=self.length, **how).input_ids

    def beyond_reach(self, prompt: str, *tokens: str) -> str:
        """Return the end of a prompt, which is not read; "": all is."""
        return self.tokenizer.decode(self.tokenizer(prompt).input_ids[self.length :])

    def call_arguments(self, **settings: Any) -> dict[str, Any]:
        """Return the pipeline's arguments, with sides and number of words."""
        side = self.resolution
        return super().call_arguments(**settings, height=side, width=side)
