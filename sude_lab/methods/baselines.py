"""Three baselines and what each trains: the denoiser, what it reads in the words, a word alone."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from sude_lab.errors import UserError
from sude_lab.methods.base import Method


class DreamBooth(Method):
    """Train the denoiser itself so that a rare name means the subject, arXiv 2208.12242.

    All of it, its attention, or a LoRA; on request the text encoder, too. `prompt`: "photo of a
    {S*} [category]". A subject's token starts from a rare word and is trained where
    `token_learning_rate` is not 0.
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


class CustomDiffusion(Method):
    """Train the keys and values of every cross-attention, and new words, arXiv 2212.04488.

    The weights to_k and to_v of every attn2 are the only ones of the UNet that meet the text; all
    subjects of a run share them, each has its own word. Words start from rare ones, which say
    little beside the category. Prior preservation is on: give real pictures with `class_images`,
    else the model draws them.

    Of the authors' code: 1e-5 is the learning rate of their command, which its `--scale_lr`
    multiplies by the batch size, the number of processes, and 2 for the class images (4e-5 for a
    batch of 2 on one card). Left out: their changes of the picture's size ("a far away", "zoomed
    in" in the prompt), and their stop of the gradient at the first token's key and value.
    """

    name: ClassVar[str] = "custom_diffusion"
    template: ClassVar[str] = "photo of a {S*} {category}"
    defaults: ClassVar[dict[str, Any]] = {
        "learning_rate": 1e-5,
        "token_learning_rate": 1e-5,
        "weight_sude": 2.0,
        "max_train_steps": 250,
        "train_batch_size": 2,
        "prior_loss_weight": 1.0,
        "num_class_images": 200,
    }
    initializers: ClassVar[tuple[str, ...]] = ("ktn", "pll", "ucd")

    def prepare(self) -> None:
        """Open the keys and values of the cross-attentions, and the subjects' words."""
        for name, p in keys_and_values(self.backbone.unet).items():
            p.requires_grad_(True)
            self.parameters[f"unet.{name}"] = p
        if self.config.token_learning_rate:
            self.train_tokens()


def keys_and_values(unet: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights that make keys and values of the text, in every cross-attention.

    K = W_k c, V = W_v c, arXiv 2212.04488, section 3: `to_k` and `to_v` of every `attn2`, by the
    names of the UNet's state dict; (inner width, text width) each.
    """
    ends = (".attn2.to_k.weight", ".attn2.to_v.weight")
    return {name: p for name, p in unet.named_parameters() if name.endswith(ends)}


class TextualInversion(Method):
    """Train the embedding of S* alone, arXiv 2208.01618; `prompt`: "photo of a {S*}".

    The token starts from the category's own word. The UNet never changes, so the priors `current`
    and `pretrained` are the same. One vector holds little of a look; with several (`num_vectors`)
    the subject comes closer, and the category is forgotten as by the other methods.
    """

    name: ClassVar[str] = "textual_inversion"
    template: ClassVar[str] = "photo of a {S*}"
    defaults: ClassVar[dict[str, Any]] = {
        "learning_rate": 0.0,
        "token_learning_rate": 5e-4,
        "weight_sude": 0.4,
        "max_train_steps": 2000,
        "train_batch_size": 1,
    }

    def prepare(self) -> None:
        """Open the token's embedding."""
        self.train_tokens()
