"""Transformers of flow matching as published, and the same at a size for tests.

Every dict holds the entries of a configuration file that lies beside the published weights, as far
as they shape the model; `small` says what a test's model has in their place. `build` makes a
pipeline of the real classes with random weights. Nothing is downloaded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from real_configs import CLIP_L, OPEN_CLIP_BIG_G, words
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, PreTrainedTokenizerFast

from studies.embedded.dataset import vocabulary

Config = dict[str, Any]


@dataclass(frozen=True)
class FlowModel:
    """One pipeline: its class, and of each part the published entries and the small ones."""

    pipeline: str
    parts: dict[str, tuple[str, Config, Config]]
    """Class, published configuration, what is smaller in a test."""
    scheduler: Config
    options: Config = field(default_factory=dict)


VAE: Config = {
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 16,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 1024,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
SMALL_VAE: Config = {"block_out_channels": [4, 8, 8, 8], "norm_num_groups": 4, "sample_size": 64,
                     "layers_per_block": 1}  # fmt: skip
SD3: Config = {
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "in_channels": 16,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 24,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "sample_size": 128,
}
SMALL_SD3: Config = {
    "attention_head_dim": 16,
    "caption_projection_dim": 32,
    "joint_attention_dim": 64,
    "num_attention_heads": 2,
    "num_layers": 3,
    "pooled_projection_dim": 32,
    "pos_embed_max_size": 8,
    "sample_size": 8,
}
SD35: Config = SD3 | {
    "dual_attention_layers": list(range(13)),
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
}
SMALL_CLIP: Config = {"hidden_size": 12, "intermediate_size": 24, "projection_dim": 12,
                      "num_attention_heads": 4, "num_hidden_layers": 2}  # fmt: skip
SMALL_BIG_CLIP: Config = SMALL_CLIP | {"hidden_size": 20, "projection_dim": 20}
T5: Config = {
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "feed_forward_proj": "gated-gelu",
    "num_heads": 64,
    "num_layers": 24,
}
SMALL_T5: Config = {"d_ff": 32, "d_kv": 8, "d_model": 64, "num_heads": 4, "num_layers": 1}
KLEIN: Config = {
    "attention_head_dim": 128,
    "axes_dims_rope": [32, 32, 32, 32],
    "guidance_embeds": False,
    "in_channels": 128,
    "joint_attention_dim": 7680,
    "num_attention_heads": 24,
    "num_layers": 5,
    "num_single_layers": 20,
    "patch_size": 1,
    "rope_theta": 2000,
}
SMALL_KLEIN: Config = {
    "attention_head_dim": 16,
    "axes_dims_rope": [4, 4, 4, 4],
    "joint_attention_dim": 48,
    "num_attention_heads": 2,
    "num_layers": 1,
    "num_single_layers": 2,
    "timestep_guidance_channels": 32,
}
KLEIN_VAE: Config = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "latent_channels": 32,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
Z_IMAGE: Config = {
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "cap_feat_dim": 2560,
    "dim": 3840,
    "in_channels": 16,
    "n_heads": 30,
    "n_kv_heads": 30,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "qk_norm": True,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
}
SMALL_Z_IMAGE: Config = {
    "axes_dims": [4, 6, 6],
    "axes_lens": [256, 32, 32],
    "cap_feat_dim": 16,
    "dim": 32,
    "n_heads": 2,
    "n_kv_heads": 2,
    "n_layers": 2,
    "n_refiner_layers": 1,
}
QWEN3: Config = {
    "head_dim": 128,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
SMALL_QWEN3: Config = {
    "head_dim": 8,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 28,  # klein reads the 9th, the 18th and the 27th
    "num_key_value_heads": 1,
}


def _stable_diffusion_3(transformer: Config, small: Config) -> FlowModel:
    return FlowModel(
        "StableDiffusion3Pipeline",
        {
            "transformer": ("SD3Transformer2DModel", transformer, SMALL_SD3 | small),
            "vae": ("AutoencoderKL", VAE, SMALL_VAE),
            "text_encoder": ("CLIPTextModelWithProjection", CLIP_L, SMALL_CLIP),
            "text_encoder_2": ("CLIPTextModelWithProjection", OPEN_CLIP_BIG_G, SMALL_BIG_CLIP),
            "text_encoder_3": ("T5EncoderModel", T5, SMALL_T5),
        },
        {"num_train_timesteps": 1000, "shift": 3.0},
    )


MODELS: dict[str, FlowModel] = {
    "sd3": _stable_diffusion_3(SD3, {}),
    "klein": FlowModel(
        "Flux2KleinPipeline",
        {
            "transformer": ("Flux2Transformer2DModel", KLEIN, SMALL_KLEIN),
            "vae": ("AutoencoderKLFlux2", KLEIN_VAE, SMALL_VAE),
            "text_encoder": ("Qwen3ForCausalLM", QWEN3, SMALL_QWEN3),
        },
        {"num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": True},
        {"is_distilled": False},
    ),
    "z_image": FlowModel(
        "ZImagePipeline",
        {
            "transformer": ("ZImageTransformer2DModel", Z_IMAGE, SMALL_Z_IMAGE),
            "vae": (
                "AutoencoderKL",
                VAE | {"scaling_factor": 0.3611, "shift_factor": 0.1159},
                SMALL_VAE,
            ),
            "text_encoder": ("Qwen3Model", QWEN3, SMALL_QWEN3 | {"num_hidden_layers": 3}),
        },
        {"num_train_timesteps": 1000, "shift": 6.0},
    ),
    "sd35": _stable_diffusion_3(SD35, {"dual_attention_layers": [0, 1]}),
}


def t5_words() -> PreTrainedTokenizerFast:
    """Return a tokenizer that ends as T5's does and knows the drawn world's words."""
    pieces = ["<pad>", "</s>", "<unk>", *vocabulary()]
    inner = Tokenizer(models.WordLevel({p: k for k, p in enumerate(pieces)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=512, **special)


CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)


def qwen_words() -> Any:
    """Return Qwen's tokenizer with bytes for words."""
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *marks]
    tokenizer = transformers.Qwen2Tokenizer(vocab={p: k for k, p in enumerate(pieces)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": marks[1:]})
    tokenizer.chat_template = CHAT
    return tokenizer


def _module(name: str, entries: Config, vocab_size: int) -> Any:
    if hasattr(diffusers, name):
        return getattr(diffusers, name).from_config(entries)
    entries = {k: v for k, v in entries.items() if k != "architectures"} | {
        "vocab_size": vocab_size
    }
    if name.startswith("CLIP"):
        return getattr(transformers, name)(CLIPTextConfig(**entries))
    kind = getattr(transformers, name)
    return kind(kind.config_class(**entries))


def build(name: str, folder: Path) -> None:
    """Write a small pipeline of a published one's make."""
    model = MODELS[name]
    tokenizers: dict[str, Any] = {}
    if "text_encoder_3" in model.parts:
        tokenizers = {"tokenizer": words(folder.with_name("words"), "<|endoftext|>"),
                      "tokenizer_2": words(folder.with_name("words_2"), "!"),
                      "tokenizer_3": t5_words()}  # fmt: skip
    else:
        tokenizers = {"tokenizer": qwen_words()}
    parts: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for part, (kind, published, small) in model.parts.items():
            known = tokenizers.get(part.replace("text_encoder", "tokenizer"))
            parts[part] = _module(kind, published | small, len(known) if known else 0)
            if part.startswith("text_encoder"):
                # Random words differ by 0.02 as they are made: too alike to tell prompts apart.
                parts[part].get_input_embeddings().weight.data.mul_(20)
        for _, p in sorted(parts["transformer"].named_parameters()):
            if not p.any():  # layers that start as no change, of which nothing would be learned
                torch.nn.init.normal_(p, std=0.1)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**model.scheduler)
    pipeline = getattr(diffusers, model.pipeline)(
        **parts, **tokenizers, scheduler=scheduler, **model.options
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    index = json.loads((folder / "model_index.json").read_text())
    for part in tokenizers:
        if index[part][1] == "TokenizersBackend":  # transformers 5's own name, which is not in 4
            index[part][1] = "PreTrainedTokenizerFast"
    (folder / "model_index.json").write_text(json.dumps(index))
    facts = {"generation": {"num_inference_steps": 2, "guidance_scale": 3.0},
             "text": {"max_sequence_length": 12 if "text_encoder_3" in parts else 64},
             "resolution": 64}  # fmt: skip
    (folder / "sude_lab.json").write_text(json.dumps(facts))
