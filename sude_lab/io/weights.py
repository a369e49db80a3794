"""The trained weights as files that diffusers' users know; nothing but safetensors is opened.

learned_embeds.safetensors           a word of several vectors; -2, -3, ...: further subjects';
                                     loads with `load_textual_inversion`
unet.safetensors, text_encoder...    the tensors that changed, by their names in a pipeline folder
                                     (transformer.safetensors where that is the denoiser)
pytorch_lora_weights.safetensors     a LoRA; loads with `load_lora_weights`
vico.safetensors                     ViCo's blocks and references
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from sude_lab.backbone import Backbone
from sude_lab.errors import UserError, explained
from sude_lab.io.files import save_tensors
from sude_lab.io.opening import quiet
from sude_lab.methods import Method, ViCo
from sude_lab.methods.base import token_words
from sude_lab.methods.custom_diffusion import keys_and_values
from sude_lab.methods.vico import REFERENCES, ImageAttention, check_one_text_encoder

EMBEDDINGS = "learned_embeds*.safetensors"
LORA_FILE = "pytorch_lora_weights.safetensors"
VICO_FILE = "vico.safetensors"
XL_KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
"""How embeddings for the CLIPs of SDXL and SD3 are named by those who share them."""
_ELSEWHERE = "open the run with the backbone it was tuned on"
_TEXT = "text_model."


def save_weights(method: Method, folder: Path) -> None:
    """Write what a method trained into a folder, as this module's text says."""
    folder.mkdir(parents=True, exist_ok=True)
    backbone = method.backbone
    for number, subject in enumerate(method.subjects if method.tokens else ()):
        vectors = {name: _plain(tokens.of(number)) for name, tokens in method.tokens.items()}
        tensors = {XL_KEYS[name]: rows for name, rows in vectors.items()}
        if len(vectors) == 1:  # one vector without a dimension of its own, as most files have it
            (rows,) = vectors.values()
            tensors = {subject.token: rows[0] if len(rows) == 1 else rows}
        ending = f"-{number + 1}" if number else ""
        path = folder / EMBEDDINGS.replace("*", ending)
        save_tensors(tensors, path, metadata={"token": subject.token})
    for part in (backbone.part, *method.tokens):
        tensors = {
            name.removeprefix(f"{part}."): _plain(p)
            for name, p in method.parameters.items()
            if name.startswith(f"{part}.")
        }
        if tensors and any(".lora_" in name for name in tensors):
            from peft import get_peft_model_state_dict

            layers = {f"{part}_lora_layers": get_peft_model_state_dict(backbone.denoiser)}
            backbone.pipeline.save_lora_weights(folder, **layers)
        elif tensors:
            tensors = {shared_name(part, name): value for name, value in tensors.items()}
            save_tensors(tensors, folder / f"{part}.safetensors")
    if isinstance(method, ViCo):
        tensors = {name: _plain(p) for name, p in method.images.weights().items()}
        tensors[REFERENCES] = _plain(method.images.references)
        words = json.dumps([subject.token for subject in method.subjects])
        save_tensors(tensors, folder / VICO_FILE, metadata={"tokens": words})


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def load_weights(
    method: str,
    backbone: Backbone,
    folder: Path,
    *,
    scale: float = 1.0,
    initializers: Sequence[str] = (),
) -> None:
    """Put the weights of a `method` that `save_weights` wrote into a freshly opened backbone.

    Args:
        scale: lambda of W_0 + lambda (W - W_0), W_0 the opened model's weights and the embeddings
            that the words started from, W the written ones; of a LoRA its scale.
        initializers: The words that each subject's token started from, where `scale` is not 1.
    """
    backbone.use()
    if method == "vico" and scale != 1:
        raise UserError("ViCo's weights begin at no image attention at all: draw them at scale 1.")
    with explained(f"The weights in {folder} are damaged, or do not fit this model", _ELSEWHERE):
        if method == "custom_diffusion":
            path = folder / "unet.safetensors"
            # A smaller model's weights would fit some layers of a larger one: all or nothing.
            if read_tensors(path)[0].keys() != keys_and_values(backbone.unet).keys():
                raise UserError(f"The run's keys and values do not fit this model: {_ELSEWHERE}.")
        if method == "vico":
            check_one_text_encoder(backbone)
            read_tensors(folder / VICO_FILE)  # before anything is changed
        # In the subjects' order (-2 before -10), which is the order of the ids.
        paths = sorted(folder.glob(EMBEDDINGS), key=lambda path: (len(path.name), path.name))
        saved = [_read_token(backbone, path) for path in paths]
        backbone.use(f"holds the weights of a run ({folder})")
        tokens: list[tuple[Any, list[int], Tensor]] = []
        encoders = backbone.text_encoders.values()
        for number, (token, vectors) in enumerate(saved):
            start = initializers[number] if number < len(initializers) else "photo"
            words = token_words(token, len(vectors[0]))
            added = [backbone.add_token(word, start) for word in words]
            rows = [list(of_encoder) for of_encoder in zip(*added, strict=True)]
            for encoder, ids, end in zip(encoders, rows, vectors, strict=True):
                table = encoder.get_input_embeddings().weight
                tokens.append((encoder, ids, _between(table[ids].detach(), end, scale)))
        for part, module in ((backbone.part, backbone.denoiser), *backbone.text_encoders.items()):
            path = folder / f"{part}.safetensors"
            if path.is_file():
                _load_part(module, path, scale)
        # Last, because a trained text encoder's table has rows for the tokens, too.
        for encoder, ids, rows_of in tokens:
            encoder.get_input_embeddings().weight.data[ids] = rows_of
        if (folder / LORA_FILE).is_file():
            with quiet():  # it misses a LoRA of the text encoders, which there is none of
                backbone.pipeline.load_lora_weights(folder, weight_name=LORA_FILE)
            if scale != 1:
                backbone.pipeline.set_adapters(list(backbone.denoiser.peft_config), scale)
        if method == "vico":
            _load_images(backbone, folder / VICO_FILE)


def _load_images(backbone: Backbone, path: Path) -> None:
    """Add ViCo's image attention with the blocks and references of a file."""
    tensors, about = read_tensors(path)
    words = json.loads(about.get("tokens", "[]"))
    vocabulary = backbone.tokenizer.get_vocab()
    references = tensors.pop(REFERENCES, torch.zeros(0))
    shape = (len(words), backbone.unet.config.in_channels)
    if not words or references.ndim != 4 or references.shape[:2] != shape:
        raise ValueError(f"references of the shape {tuple(references.shape)}")
    ids = []
    for word in words:
        number = 1
        while f"{word}_{number}" in vocabulary:
            number += 1
        ids.append([vocabulary[one] for one in token_words(word, number)])
    images = ImageAttention(backbone, ids, references)
    weights = images.weights()
    if {n: v.shape for n, v in tensors.items()} != {n: p.shape for n, p in weights.items()}:
        raise ValueError("another image attention")
    with torch.no_grad():
        for name, p in weights.items():
            p.copy_(tensors[name])


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file, and what it says of itself."""
    if not path.is_file():
        raise UserError(f"The run's weights {path} are not there: tune it anew.")
    cure = "the file is damaged, so take the run's weights from a copy, or tune again"
    with explained(f"{path} could not be read as safetensors", cure), safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, file.metadata() or {}


def _read_token(backbone: Backbone, path: Path) -> tuple[str, list[Tensor]]:
    """Return a saved token and its vectors (V, D), for each text encoder."""
    tensors, about = read_tensors(path)
    several = len(backbone.text_encoders) > 1
    keys = [XL_KEYS[n] for n in backbone.text_encoders] if several else list(tensors)
    return about.get("token") or keys[0], [torch.atleast_2d(tensors[key]) for key in keys]


def shared_name(part: str, name: str) -> str:
    """Return a tensor's name in a pipeline folder, whatever transformers calls it in memory.

    transformers 5 leaves "text_model." out of a CLIPTextModel; files and earlier ones have it.
    """
    if not part.startswith("text_encoder") or name.startswith((_TEXT, "text_projection.")):
        return name
    return _TEXT + name


def _between(start: Tensor, end: Tensor, scale: float) -> Tensor:
    """Return W_0 + lambda (W - W_0) in the dtype of W_0; for lambda = 1 W to the bit."""
    if start.shape != end.shape:
        raise ValueError(f"a tensor of the shape {tuple(end.shape)}, not {tuple(start.shape)}")
    end = end.to(start)
    return end if scale == 1 else torch.lerp(start, end, scale)


def _load_part(module: nn.Module, path: Path, scale: float) -> None:
    tensors, before = read_tensors(path)[0], module.state_dict()
    own = {name.removeprefix(_TEXT): name for name in before}
    tensors = {own[name.removeprefix(_TEXT)]: tensor for name, tensor in tensors.items()}
    tensors = {name: _between(before[name], end, scale) for name, end in tensors.items()}
    module.load_state_dict(tensors, strict=False)
