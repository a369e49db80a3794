"""The protocol of a method, and what all methods share: the subject's token and its weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

from sude_lab.backbone import Backbone
from sude_lab.errors import UserError
from sude_lab.prompts import fill

if TYPE_CHECKING:
    from sude_lab.tuning import TuningConfig

EMBEDDING_FILE = "learned_embeds.safetensors"


class Method:
    """One baseline: `prepare` opens what it trains, the rest is told by `parameters`.

    A subclass names its defaults (the settings of its paper, on Stable Diffusion) and fills
    `parameters` with the tensors it trains, keyed "part.name"; part is unet, text_encoder or token.
    """

    name: ClassVar[str]
    template: ClassVar[str]
    """The prompt that stands for the subject while tuning; `{category}` is filled in."""
    defaults: ClassVar[dict[str, Any]]
    """Settings on Stable Diffusion, for the fields of `TuningConfig` that are None."""

    def __init__(self, backbone: Backbone, config: TuningConfig) -> None:
        self.backbone = backbone
        self.config = config
        self.parameters: dict[str, nn.Parameter] = {}
        self.token_index = backbone.add_token(config.token, self.initializer())
        table = backbone.text_encoder.get_input_embeddings()
        self.token_vector = nn.Parameter(table.weight[self.token_index].detach().clone())
        self._hook = table.register_forward_hook(self._insert_token)
        self.prepare()
        self._pretrained = {
            name.removeprefix("unet."): p.detach().clone()
            for name, p in self.parameters.items()
            if name.startswith("unet.") and self.keeps_pretrained
        }

    # What a subclass says ------------------------------------------------------------------------

    def initializer(self) -> str:
        """Return the words whose embedding the subject's token starts from."""
        return self.config.initializer or self.config.category

    def prepare(self) -> None:
        """Fill `self.parameters` with what is trained."""
        raise NotImplementedError

    keeps_pretrained: bool = True
    """Whether the values that `parameters` start from are kept for `predict_pretrained`."""

    # What all share ------------------------------------------------------------------------------

    def subject_prompt(self) -> str:
        """Return the prompt c_sub, with the subject's token in place of {S*}."""
        text = self.config.prompt or self.template
        return fill(text.replace("{category}", self.config.category), self.config.token)

    @property
    def changes_text(self) -> bool:
        """Whether tuning changes the condition of the category prompt (not only that of {S*})."""
        return any(name.startswith("text_encoder.") for name in self.parameters)

    @property
    def changes_subject_text(self) -> bool:
        """Whether tuning changes the condition of the subject prompt."""
        return self.changes_text or "token.vector" in self.parameters

    def groups(self) -> list[dict[str, Any]]:
        """Return the optimiser's parameter groups: the token has a learning rate of its own."""
        token = [p for name, p in self.parameters.items() if name.startswith("token.")]
        other = [p for name, p in self.parameters.items() if not name.startswith("token.")]
        rates = (self.config.learning_rate, self.config.token_learning_rate)
        # No decay of the token: it would pull the subject's name towards no meaning at all.
        groups = [
            {"params": other, "lr": rates[0]},
            {"params": token, "lr": rates[1], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    @torch.no_grad()
    def predict_pretrained(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Return the model output of the UNet as it was before tuning."""
        unet = self.backbone.unet
        if not self._pretrained:
            return self.backbone.predict(x_t, t, condition)

        def original(*args: Any, **kwargs: Any) -> Any:
            return functional_call(unet, self._pretrained, args, kwargs)

        return self.backbone.predict(x_t, t, condition, original)

    def _insert_token(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        mask = (args[0] == self.token_index).unsqueeze(-1)
        return torch.where(mask, self.token_vector.to(output.dtype), output)

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the trained tensors."""
        return {name: p.detach().cpu().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put trained tensors back, as `state_dict` gave them."""
        if state.keys() != self.parameters.keys():
            raise UserError("The checkpoint was made with other trained weights: start a new run.")
        for name, p in self.parameters.items():
            p.copy_(state[name])

    def finish(self) -> None:
        """Write the token into the text encoder's table, so that the pipeline alone has it."""
        table = self.backbone.text_encoder.get_input_embeddings().weight
        with torch.no_grad():
            table[self.token_index] = self.token_vector
        self._hook.remove()

    def save(self, folder: Path) -> None:
        """Write the trained weights as safetensors that diffusers' users know.

        `learned_embeds.safetensors` loads with `load_textual_inversion`; `unet.safetensors` and
        `text_encoder.safetensors` hold the tensors that changed, under the model's own names.
        """
        folder.mkdir(parents=True, exist_ok=True)
        vector = self.token_vector.detach().cpu().contiguous()
        save_file({self.config.token: vector}, folder / EMBEDDING_FILE)
        for part in ("unet", "text_encoder"):
            tensors = {
                name.removeprefix(f"{part}."): p.detach().cpu().contiguous()
                for name, p in self.parameters.items()
                if name.startswith(f"{part}.")
            }
            if tensors:
                save_file(tensors, folder / f"{part}.safetensors")

    @classmethod
    def load(cls, backbone: Backbone, folder: Path) -> None:
        """Put the weights that `save` wrote into a freshly opened backbone.

        Raises:
            UserError: the weights do not belong to this model.
        """
        for token, vector in load_file(folder / EMBEDDING_FILE).items():
            width = backbone.text_encoder.get_input_embeddings().weight.shape[1]
            if vector.shape != (width,):
                raise UserError(
                    f"The run's token has width {vector.numel()}, this model's text encoder "
                    f"{width}: open the run with the backbone it was tuned on."
                )
            index = backbone.add_token(token, "photo")
            table = backbone.text_encoder.get_input_embeddings().weight
            with torch.no_grad():
                table[index] = vector.to(table)
        for part, module in (("unet", backbone.unet), ("text_encoder", backbone.text_encoder)):
            path = folder / f"{part}.safetensors"
            if not path.is_file():
                continue
            try:
                result = module.load_state_dict(load_file(path), strict=False)
            except RuntimeError as error:
                raise UserError(
                    f"The run's {part} weights do not fit this model: open the run with the "
                    "backbone it was tuned on."
                ) from error
            if result.unexpected_keys:
                raise UserError(
                    f"The run's {part} weights do not fit this model (unknown tensor "
                    f"{result.unexpected_keys[0]}): open the run with the backbone it was tuned on."
                )
