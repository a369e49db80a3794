"""Textual Inversion (arXiv 2208.01618): the model stays as it is, one word is learned."""

from __future__ import annotations

from typing import Any, ClassVar

from sude_lab.methods.base import Method


class TextualInversion(Method):
    """Train the embedding of S* alone; `prompt`: "photo of a {S*}".

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
