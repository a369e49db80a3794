"""Custom Diffusion (arXiv 2212.04488): tune what the picture reads in the words, and a new word."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from sude_lab.methods.base import Method


class CustomDiffusion(Method):
    """Train the keys and values of every cross-attention, and the subjects' new words.

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
