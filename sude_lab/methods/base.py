"""The protocol of a method, and what all methods share: the subjects' words and the weights' files.

A method answers five questions and nothing of SuDe: what is trained (`prepare`), how one prompts
(`template`, `initializers`), what it predicts (`predict`), what its own loss is (`own_loss`), and
how it is kept (`save`, `load`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from sude_lab.backbone import Backbone, Condition, FrozenUNet
from sude_lab.errors import UserError
from sude_lab.io.files import save_tensors
from sude_lab.prompts import PLACEHOLDER, fill, placeholder

if TYPE_CHECKING:
    from sude_lab.tuning import TuningConfig

EMBEDDINGS = "learned_embeds*.safetensors"
XL_KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
"""How embeddings for SDXL's two encoders are named by those who share them."""


class Method:
    """One baseline. A subclass names its defaults (its paper's, on Stable Diffusion) and fills
    `parameters` in `prepare`, keyed "part.name": part is unet, text_encoder, text_encoder_2, token
    or a name of its own.
    """

    name: ClassVar[str]
    template: ClassVar[str]
    """The prompt that stands for the subject while tuning; `{category}` is filled in."""
    defaults: ClassVar[dict[str, Any]]
    """Settings on Stable Diffusion, for the fields of `TuningConfig` that are None."""
    initializers: ClassVar[tuple[str, ...]] = ()
    """Words that the subjects' tokens start from, in their order; none: from their category."""
    keeps_prior: ClassVar[bool] = False
    """Whether tuning changes nothing in what the model says of prompts without the subject, so that
    the priors `current` and `pretrained` are the same."""

    def __init__(self, backbone: Backbone, config: TuningConfig) -> None:
        self.backbone = backbone
        self.config = config
        self.subjects = config.subjects
        self.parameters: dict[str, nn.Parameter] = {}
        ids = [
            [
                backbone.add_token(word, self.initializer(k))
                for word in token_words(s.token, config.num_vectors or 1)
            ]
            for k, s in enumerate(self.subjects)
        ]
        self.tokens = {
            name: _Tokens(encoder, [[word[k] for word in of] for of in ids])
            for k, (name, encoder) in enumerate(backbone.text_encoders.items())
        }
        self.prepare()
        # A copy of what is trained, so only where the run will ask for it.
        self.frozen = FrozenUNet(backbone.unet) if config.asks_pretrained else None
        if config.gradient_checkpointing:
            backbone.unet.enable_gradient_checkpointing()
            backbone.unet.train()

    # What a subclass says ------------------------------------------------------------------------

    def prepare(self) -> None:
        """Fill `self.parameters` with what is trained, and switch its gradients on."""
        raise NotImplementedError

    def start(self, latents: list[Tensor]) -> None:
        """Take notice of the subjects' clean latents, (1, C, h, w) each, before the first step."""

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition, which: Tensor) -> Tensor:
        """Return the subject's model output; `which` (B,) numbers each sample's subject."""
        return self.backbone.predict(x_t, t, condition)

    def own_loss(self) -> Tensor | None:
        """Return the method's own weighted loss of the last `predict`, (B,), where it has one."""
        return None

    def predict_pretrained(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return the model output of the UNet as it was before tuning, without gradients.

        Raises:
            ValueError: the run's settings never ask for it, so nothing was kept.
        """
        if self.frozen is None:
            raise ValueError('The model before tuning was not kept: set prior="pretrained".')
        with torch.no_grad():
            return self.backbone.predict(x_t, t, condition, self.frozen)

    def predict_current(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return what the model as it is now says of a prompt without the subject."""
        return self.backbone.predict(x_t, t, condition)

    # What all share ------------------------------------------------------------------------------

    def initializer(self, number: int) -> str:
        """Return the words whose embedding the token of subject `number` starts from."""
        if self.config.initializer:
            return self.config.initializer
        if self.initializers:
            return self.initializers[number % len(self.initializers)]
        return self.subjects[number].category

    def subject_prompts(self) -> list[str]:
        """Return the prompt c_sub of every subject, with its token in place of {S*}."""
        tokens = [s.token for s in self.subjects]
        prompts = []
        for number, subject in enumerate(self.subjects):
            text = self.config.prompt or self.template
            # The template speaks of "the subject": for the second one that is {S*2}.
            text = text.replace(PLACEHOLDER, placeholder(number))
            prompts.append(fill(text.replace("{category}", subject.category), *tokens))
        return prompts

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
        rates = (self.config.learning_rate, self.config.token_learning_rate)
        # No decay of the token: it would pull the subject's name towards no meaning at all.
        groups = [
            {"params": other, "lr": rates[0]},
            {"params": token, "lr": rates[1], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

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

    def save(self, folder: Path) -> None:
        """Write the trained weights as safetensors that diffusers' users know.

        `learned_embeds.safetensors` (a file a subject) loads with `load_textual_inversion`;
        `unet.safetensors` and `text_encoder.safetensors` hold the tensors that changed, under the
        names that they have in a pipeline folder.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for number, subject in enumerate(self.subjects):
            vectors = {
                name: tokens.of(number).detach().cpu().contiguous()
                for name, tokens in self.tokens.items()
            }
            if self.backbone.is_xl:
                tensors = {XL_KEYS[name]: rows for name, rows in vectors.items()}
            else:  # one vector without a dimension of its own, as most files have it
                rows = vectors["text_encoder"]
                tensors = {subject.token: rows[0] if len(rows) == 1 else rows}
            ending = f"-{number + 1}" if number else ""
            path = folder / EMBEDDINGS.replace("*", ending)
            save_tensors(tensors, path, metadata={"token": subject.token})
        for part in ("unet", *self.tokens):
            tensors = {
                shared_name(part, name.removeprefix(f"{part}.")): p.detach().cpu().contiguous()
                for name, p in self.parameters.items()
                if name.startswith(f"{part}.")
            }
            if tensors:
                save_tensors(tensors, folder / f"{part}.safetensors")

    @classmethod
    def load(cls, backbone: Backbone, folder: Path) -> None:
        """Put the weights that `save` wrote into a freshly opened backbone.

        Raises:
            UserError: the weights do not belong to this model, or are damaged.
        """
        # In the subjects' order (-2 before -10), which is the order of the ids.
        paths = sorted(folder.glob(EMBEDDINGS), key=lambda path: (len(path.name), path.name))
        tokens = [_add_saved_token(backbone, path) for path in paths]
        for part, module in (("unet", backbone.unet), *backbone.text_encoders.items()):
            path = folder / f"{part}.safetensors"
            if path.is_file():
                _load_part(module, part, path)
        # Last, because a trained text encoder's table has rows for the tokens, too.
        for ids, vectors in tokens:
            for encoder, rows, vector in zip(
                backbone.text_encoders.values(), ids, vectors, strict=True
            ):
                table = encoder.get_input_embeddings().weight
                with torch.no_grad():
                    table[rows] = vector.to(table)


def token_words(token: str, number: int) -> list[str]:
    """Return the words that stand for a token of several vectors: <sks>, <sks>_1, <sks>_2, ...

    The naming of diffusers' `load_textual_inversion`; a prompt says <sks> and means them all.
    """
    return [token, *(f"{token}_{k}" for k in range(1, number))]


class _Tokens:
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


_ELSEWHERE = "open the run with the backbone it was tuned on."


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file, and what it says of itself."""
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
        return load_file(path), about
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} could not be read as safetensors ({error}): the file is damaged, so take the "
            "run's weights from a copy, or tune again."
        ) from error


def _add_saved_token(backbone: Backbone, path: Path) -> tuple[list[list[int]], list[Tensor]]:
    """Add a saved token; return its ids and vectors (V, D), for each text encoder."""
    tensors, about = _read(path)
    names = set(XL_KEYS.values()) if backbone.is_xl else set(tensors)
    token = about.get("token") or next(iter(tensors), None)
    if set(tensors) != names or len(tensors) != len(backbone.text_encoders) or token is None:
        kind = "SDXL's two text encoders" if backbone.is_xl else "one text encoder"
        raise UserError(f"{path.name} holds no embedding for {kind}: {_ELSEWHERE}")
    vectors = [
        torch.atleast_2d(tensors[XL_KEYS[name] if backbone.is_xl else next(iter(tensors))])
        for name in backbone.text_encoders
    ]
    for vector, encoder in zip(vectors, backbone.text_encoders.values(), strict=True):
        width = encoder.get_input_embeddings().weight.shape[1]
        if vector.ndim != 2 or len(vector) != len(vectors[0]) or vector.shape[1] != width:
            raise UserError(
                f"The run's token has the shape {tuple(vector.shape)}, this model's text encoder "
                f"the width {width}: {_ELSEWHERE}"
            )
    ids = [backbone.add_token(word, "photo") for word in token_words(token, len(vectors[0]))]
    return [list(of) for of in zip(*ids, strict=True)], vectors


_TEXT = "text_model."


def shared_name(part: str, name: str) -> str:
    """Return a tensor's name in a pipeline folder, whatever transformers calls it in memory.

    transformers 5 leaves "text_model." out of a CLIPTextModel; files and earlier ones have it.
    """
    if part == "unet" or name.startswith((_TEXT, "text_projection.")):
        return name
    return _TEXT + name


def _load_part(module: nn.Module, part: str, path: Path) -> None:
    own = {name.removeprefix(_TEXT): name for name in module.state_dict()}
    tensors, _ = _read(path)
    tensors = {own.get(n.removeprefix(_TEXT), n): tensor for n, tensor in tensors.items()}
    try:
        result = module.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise UserError(f"The run's {part} weights do not fit this model: {_ELSEWHERE}") from error
    if result.unexpected_keys:
        raise UserError(
            f"The run's {part} weights do not fit this model (unknown tensor "
            f"{result.unexpected_keys[0]}): {_ELSEWHERE}"
        )
