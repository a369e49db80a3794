"""Pinned encoders of pictures and texts: CLIP, DINO, DINOv2 and BLIP, all through transformers.

    dino = open_encoder("dino")
    features = dino.images(pictures)  # (N, D), of unit length

Weights are safetensors at a fixed revision. Where a model's main branch has none, the revision is
the hub's own conversion of it (its bot's pull request).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from sude_lab.errors import UserError, explained
from sude_lab.io.opening import check_harmless, pick_device, quiet
from sude_lab.io.reading import digest, hash_of


@dataclass(frozen=True)
class Preprocessing:
    """How an encoder wants its pictures: bicubic resize, centre crop, mean and deviation."""

    side: int
    """Side of the square that the encoder sees, in pixels."""
    resize: int
    """The shorter side before the crop, in pixels."""
    mean: Sequence[float]
    deviation: Sequence[float]
    stretch: bool = False
    """Resize to the square at once, whatever the proportions (BLIP), in place of a crop."""

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the picture as (3, side, side) float32: (value / 255 - mean) / deviation."""
        whole = [int(self.resize * x / min(image.size)) for x in image.size]
        width, height = (self.side, self.side) if self.stretch else whole
        image = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - self.side) // 2, (height - self.side) // 2
        image = image.crop((left, top, left + self.side, top + self.side))
        x = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)
        mean, deviation = (torch.tensor(v)[:, None, None] for v in (self.mean, self.deviation))
        return (x - mean) / deviation

    def at(self, side: int) -> Preprocessing:
        """Return the same for a model that sees smaller squares."""
        return replace(self, side=side, resize=round(self.resize * side / self.side))


@dataclass(frozen=True)
class Pinned:
    """Where an encoder comes from, and what goes into it."""

    source: str
    revision: str
    model_type: str
    loader: str
    """The class of transformers that opens it."""
    preprocessing: Preprocessing
    max_words: int = 0
    """Tokens of a text that are read; 0: the encoder reads no texts."""


_FILE = Path(__file__).with_suffix(".yaml")
ENCODERS: dict[str, Pinned] = {
    name: Pinned(**about | {"preprocessing": Preprocessing(**about["preprocessing"])})
    for name, about in yaml.safe_load(_FILE.read_text("utf-8")).items()
}
"""By name: clip, clip-large, dino, dinov2, blip."""


class Encoder:
    """One encoder, opened: pictures and, where it reads them, texts become unit vectors.

    Features are float32, on the CPU.
    """

    def __init__(self, pinned: Pinned, folder: Path | None, *, device: torch.device) -> None:
        import transformers

        self.pinned, self.device = pinned, device
        source = pinned.source if folder is None else str(folder)
        revision = {"revision": pinned.revision} if folder is None else {}
        # Unsaid means: ask at the terminal whether to run code that the folder brings.
        no_code: dict[str, Any] = revision | {"trust_remote_code": False}
        kind = transformers.AutoConfig.from_pretrained(source, **no_code).model_type
        if kind != pinned.model_type:
            # Another class would load, with random weights for all that it lacks.
            another = f"{source} holds a {kind} model"
            raise UserError(f"{another}: this encoder is a {pinned.model_type}.")
        options: dict[str, Any] = {"add_pooling_layer": False} if kind == "vit" else {}
        options |= revision | {"dtype": torch.float32, "output_loading_info": True}
        loader = getattr(transformers, pinned.loader)
        model, report = loader.from_pretrained(source, use_safetensors=True, **options)
        if missing := sorted(report["missing_keys"]):
            lacks = f"lacks {len(missing)} of the encoder's tensors ({missing[0]}, ...)"
            raise UserError(f"{source} {lacks}: take the whole model.")
        self.model = model.eval().requires_grad_(False).to(device)
        if pinned.max_words:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(source, **no_code)
        if folder is None:
            self.identity = f"{pinned.source}@{pinned.revision[:8]}"
        else:
            files = sorted([folder / "config.json", *folder.glob("*.safetensors")])
            self.identity = f"{folder.resolve().name}@{hash_of(list(map(digest, files)))[:8]}"
        side = getattr(model.config, "vision_config", model.config).image_size
        if not isinstance(side, int):
            raise UserError(f"The encoder's image_size is {side!r}: it must be one whole number.")
        self.preprocessing = pinned.preprocessing
        if side < self.preprocessing.side:
            self.preprocessing = self.preprocessing.at(side)

    @torch.no_grad()
    def images(
        self, images: Sequence[Image.Image], *, batch_size: int = 32, progress: bool = False
    ) -> Tensor:
        """Return the features of pictures, (N, D), each of length 1."""
        parts = []
        starts = range(0, len(images), batch_size)
        for start in tqdm(starts, desc="encoding", unit="batch", disable=not progress):
            batch = images[start : start + batch_size]
            pixels = torch.stack([self.preprocessing(image) for image in batch])
            parts.append(_unit(_image_features(self.model, pixels.to(self.device))))
        return torch.cat(parts)

    @torch.no_grad()
    def texts(self, texts: Sequence[str], *, batch_size: int = 64) -> Tensor:
        """Return the features of texts, (N, D), each of length 1; equal texts are read once.

        Raises:
            ValueError: the encoder reads no texts.
        """
        if not self.pinned.max_words:
            raise ValueError(f"{self.identity} reads no texts.")
        distinct = list(dict.fromkeys(texts))
        parts = []
        for start in range(0, len(distinct), batch_size):
            tokens = self.tokenizer(
                distinct[start : start + batch_size],
                padding=True,
                truncation=True,
                max_length=min(self.pinned.max_words, self.tokenizer.model_max_length),
                return_tensors="pt",
            ).to(self.device)
            features = _text_features(self.model, tokens.input_ids, tokens.attention_mask)
            parts.append(_unit(features))
        return torch.cat(parts)[[distinct.index(text) for text in texts]]


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=-1).cpu()


def _image_features(model: Any, pixels: Tensor) -> Tensor:
    """The picture's token, after the last norm; CLIP and BLIP project it to the texts' space."""
    if model.config.model_type == "clip":
        return model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    if model.config.model_type == "blip":
        return model.vision_proj(model.vision_model(pixel_values=pixels).last_hidden_state[:, 0])
    return model(pixel_values=pixels).last_hidden_state[:, 0]


def _text_features(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    if model.config.model_type == "clip":
        pooled = model.text_model(input_ids=ids, attention_mask=mask).pooler_output
        return model.text_projection(pooled)
    states = model.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    return model.text_proj(states[:, 0])


def open_encoder(name: str, source: str | Path | None = None, *, device: str = "auto") -> Encoder:
    """Open an encoder by its name in `ENCODERS`: from the hub, or from a folder of the same kind.

    `source`: a folder as transformers' `save_pretrained` writes it; None: the pinned weights.
    """
    if name not in ENCODERS:
        raise UserError(f"There is no encoder {name!r}: choose one of {', '.join(ENCODERS)}.")
    pinned = ENCODERS[name]
    if source is None:
        folder, what = None, f"The {name} encoder {pinned.source} could not be had from the hub"
        cure = f"run once with a connection, or download its revision {pinned.revision} elsewhere "
        cure += f"and name the folder with --encoders {name}=FOLDER"
    else:
        folder, what = Path(source), f"The {name} encoder in {source} could not be opened"
        cure = "save it with transformers' save_pretrained"
        if not (folder / "config.json").is_file():
            raise UserError(f"There is no {name} encoder in {folder}: {cure}, and name its folder.")
        check_harmless(folder)
    with explained(what, cure), quiet():
        return Encoder(pinned, folder, device=pick_device(device))
