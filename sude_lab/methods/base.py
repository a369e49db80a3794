"""The protocol of a method, and what all methods share: the subjects' words.

A method answers four questions and nothing of SuDe: what is trained (`prepare`), how one prompts
(`template`, `initializers`), what it predicts (`predict`), and what its own loss is (`own_loss`).
`sude_lab.io.weights` writes and reads what it trained.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sude_lab.backbone import Backbone, Condition
from sude_lab.config import CompleteConfig, TuningConfig
from sude_lab.errors import UserError
from sude_lab.frozen import FrozenUNet
from sude_lab.prompts import PLACEHOLDER, fill, placeholder


class Method:
    """One baseline. A subclass names its defaults (its paper's, on Stable Diffusion) and fills
    `parameters` in `prepare`, keyed "part.name": part is unet (or transformer), text_encoder,
    text_encoder_2, token or a name of its own.

    With `keep_frozen` the denoiser is kept as it is now, for `predict_pretrained`.
    """

    name: ClassVar[str]
    template: ClassVar[str]
    """The prompt that stands for the subject while tuning; `{category}` is filled in."""
    defaults: ClassVar[dict[str, Any]]
    """Settings on Stable Diffusion, for the fields of `TuningConfig` that are None."""
    initializers: ClassVar[tuple[str, ...]] = ()
    """Words that the subjects' tokens start from, in their order; none: from their category."""

    def __init__(
        self, backbone: Backbone, config: CompleteConfig, *, keep_frozen: bool = False
    ) -> None:
        backbone.use()
        self.backbone = backbone
        self.config = config
        self.subjects = config.subjects
        self.parameters: dict[str, nn.Parameter] = {}
        ids = [
            [
                backbone.add_token(word, self.initializer(config, k))
                for word in token_words(s.token, config.num_vectors)
            ]
            for k, s in enumerate(self.subjects)
        ]
        backbone.use(f"has been tuned ({config.method}, {config.category})")
        self.tokens = {
            name: Tokens(encoder, [[word[k] for word in of] for of in ids])
            for k, (name, encoder) in enumerate(backbone.text_encoders.items())
        }
        self.prepare()
        if config.gradient_checkpointing:
            backbone.denoiser.enable_gradient_checkpointing()
            backbone.denoiser.train()
        self.frozen = FrozenUNet(backbone.denoiser) if keep_frozen else None

    def prepare(self) -> None:
        """Fill `self.parameters` with what is trained, and switch its gradients on."""
        raise NotImplementedError

    def start(self, latents: list[Tensor]) -> None:
        """Take notice of the subjects' clean latents, (1, C, h, w) each, before the first step."""

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition, which: Tensor) -> Tensor:
        """Return the subject's output; `which` (B,), on the CPU, numbers each sample's subject."""
        return self.backbone.predict(x_t, t, condition)

    def own_loss(self) -> Tensor | None:
        """Return the method's own weighted loss of the last `predict`, (B,), where it has one."""
        return None

    @torch.no_grad()
    def predict_pretrained(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return the output of the denoiser as it was before tuning, where that was kept."""
        if self.frozen is None:
            raise ValueError("The model before tuning was not kept: make this with keep_frozen.")
        return self.backbone.predict(x_t, t, condition, self.frozen)

    def predict_current(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return what the model as it is now says of a prompt without the subject."""
        return self.backbone.predict(x_t, t, condition)

    @classmethod
    def initializer(cls, config: CompleteConfig, number: int) -> str:
        """Return the words whose embedding the token of subject `number` starts from."""
        if config.initializer:
            return config.initializer
        if cls.initializers:
            return cls.initializers[number % len(cls.initializers)]
        return config.subjects[number].category

    @classmethod
    def prompts(cls, config: TuningConfig) -> list[str]:
        """Return the tuning prompt of every subject, with {S*}, for the second one {S*2}, ..."""
        text = config.prompt or cls.template
        return [
            text.replace(PLACEHOLDER, placeholder(k)).replace("{category}", s.category)
            for k, s in enumerate(config.subjects)
        ]

    def subject_prompts(self) -> list[str]:
        """Return the prompt c_sub of every subject, with its token in place of {S*}."""
        tokens = [s.token for s in self.subjects]
        return [fill(prompt, *tokens) for prompt in self.prompts(self.config)]

    def subject_conditions(self) -> Condition:
        """Return the condition of every subject's prompt as it is now, one row each."""
        return self.backbone.encode_prompts(self.subject_prompts(), self.config.resolution)

    @property
    def changes_text(self) -> bool:
        """Whether tuning changes the condition of the category prompt (not only that of {S*})."""
        return any(name.startswith("text_encoder") for name in self.parameters)

    @property
    def changes_subject_text(self) -> bool:
        """Whether tuning changes the condition of the subject prompt."""
        return self.changes_text or any(name.startswith("token.") for name in self.parameters)

    def train_tokens(self) -> None:
        """Train the embeddings of the subjects' words, in every text encoder."""
        for name, tokens in self.tokens.items():
            self.parameters[f"token.{name}"] = tokens.vectors

    def groups(self) -> list[dict[str, Any]]:
        """Return the optimiser's parameter groups: the tokens have a learning rate of their own."""
        token = [p for name, p in self.parameters.items() if name.startswith("token.")]
        other = [p for name, p in self.parameters.items() if not name.startswith("token.")]
        # No decay of the token: it would pull the subject's name towards no meaning at all.
        slow = {"lr": self.config.token_learning_rate, "weight_decay": 0.0}
        groups: list[dict[str, Any]] = [{"params": other, "lr": self.config.learning_rate}]
        return [group for group in (*groups, {"params": token, **slow}) if group["params"]]

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
        """Write the tokens into the text encoders' tables, so that the pipeline alone has them."""
        for tokens in self.tokens.values():
            tokens.write()


def token_words(token: str, number: int) -> list[str]:
    """Return the words that stand for a token of several vectors: <sks>, <sks>_1, <sks>_2, ...

    The naming of diffusers' `load_textual_inversion`; a prompt says <sks> and means them all.
    """
    return [token, *(f"{token}_{k}" for k in range(1, number))]


class Tokens:
    """The embeddings of the subjects' words in one text encoder, trained beside its own table.

    Args: groups: the ids of every subject's words.
    """

    def __init__(self, encoder: Any, groups: list[list[int]]) -> None:
        self.groups = groups
        self.ids = ids = [index for group in groups for index in group]
        self.table = encoder.get_input_embeddings()
        self.vectors = nn.Parameter(self.table.weight[ids].detach().clone())
        self._hook = self.table.register_forward_hook(self._insert)

    def of(self, number: int) -> Tensor:
        """Return the vectors of subject `number`, (V, D)."""
        first = sum(len(group) for group in self.groups[:number])
        return self.vectors[first : first + len(self.groups[number])]

    def _insert(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        for index, vector in zip(self.ids, self.vectors, strict=True):
            output = torch.where((args[0] == index).unsqueeze(-1), vector.to(output.dtype), output)
        return output

    @torch.no_grad()
    def write(self) -> None:
        """Write the vectors into the encoder's table and let go of it."""
        self.table.weight[self.ids] = self.vectors.to(self.table.weight)
        self._hook.remove()
