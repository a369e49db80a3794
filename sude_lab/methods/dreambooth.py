"""DreamBooth (arXiv 2208.12242): tune the denoiser itself so that a rare name means the subject."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from sude_lab.errors import UserError
from sude_lab.methods.base import Method


class DreamBooth(Method):
    """Train the denoiser (all of it, its attention, or a LoRA), on request the text encoder.

    `prompt`: "photo of a {S*} [category]". A subject's token starts from a rare word and is
    trained where `token_learning_rate` is not 0.
    """

    name: ClassVar[str] = "dreambooth"
    template: ClassVar[str] = "photo of a {S*} {category}"
    defaults: ClassVar[dict[str, Any]] = {
        "learning_rate": 5e-6,
        "token_learning_rate": 0.0,
        "weight_sude": 0.4,
        "max_train_steps": 800,
        "train_batch_size": 1,
    }
    initializers: ClassVar[tuple[str, ...]] = ("sks", "pll", "ohwx", "zwx", "olis")

    def prepare(self) -> None:
        """Open the chosen part of the denoiser, and the text encoders and the tokens on request."""
        words = [self.initializer(self.config, number) for number in range(len(self.subjects))]
        if not self.config.token_learning_rate and len(set(words)) < len(words):
            same = "Several subjects' tokens start from the same word and stay there"
            raise UserError(f"{same}: give --token-learning-rate a value above 0.")
        denoiser, part = self.backbone.denoiser, self.backbone.part
        if self.config.train == "lora":
            from peft import LoraConfig

            rank, layers = self.config.lora_rank, list(self.backbone.lora_targets)
            # peft draws the adapters from the global generator: give it ours for that moment.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.config.seed)
                denoiser.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers))
        marks = {"unet": ("",), "attention": self.backbone.attention, "lora": (".lora_",)}
        for name, p in denoiser.named_parameters():
            if any(mark in name for mark in marks[self.config.train]):
                self.parameters[f"{part}.{name}"] = p.requires_grad_(True)
        if self.config.train_text_encoder:
            for part, encoder in self.backbone.text_encoders.items():
                for name, p in encoder.named_parameters():
                    self.parameters[f"{part}.{name}"] = p.requires_grad_(True)
        if self.config.token_learning_rate:
            self.train_tokens()
