"""Tiny encoders of the real classes, with random weights, saved as their users have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForImageTextRetrieval,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)

from studies.embedded.dataset import vocabulary
from studies.embedded.train import MAX_TOKENS, build_tokenizer

SIDE = 32
_SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
# BLIP's own start of 1e-10 would make every picture the same to it.
_EYES: dict[str, Any] = _SMALL | {"image_size": SIDE, "patch_size": 8, "initializer_range": 0.02}


def build_encoder(name: str, folder: Path, seed: int = 0) -> Path:
    """Write a tiny encoder for one name of `evaluate.encoders.ENCODERS`; return `folder`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = {"clip": _clip, "clip-large": _clip, "blip": _blip, "dino": _dino, "dinov2": _dino2}
        built = model[name](folder)
        with torch.no_grad():  # as they are made the weights are so small that all features agree
            for p in built.parameters():
                if p.ndim > 1:
                    p.mul_(6.0)
    built.save_pretrained(folder, safe_serialization=True)
    return folder


def _clip(folder: Path) -> CLIPModel:
    tokenizer = build_tokenizer(folder)
    tokenizer.save_pretrained(folder)
    text = _SMALL | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=_EYES, projection_dim=16))


def _blip(folder: Path) -> BlipForImageTextRetrieval:
    folder.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *vocabulary()]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    BertTokenizer(str(folder / "vocab.txt"), model_max_length=512).save_pretrained(folder)
    text = _SMALL | {
        "vocab_size": len(words),
        "encoder_hidden_size": 32,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "sep_token_id": 3,
    }
    config = BlipConfig(
        text_config=text, vision_config=_EYES, projection_dim=16, image_text_hidden_size=16
    )
    return BlipForImageTextRetrieval(config)


def _dino(folder: Path) -> ViTModel:
    return ViTModel(ViTConfig(**_EYES), add_pooling_layer=False)


def _dino2(folder: Path) -> Dinov2Model:
    return Dinov2Model(Dinov2Config(**{k: v for k, v in _EYES.items() if "intermed" not in k}))
