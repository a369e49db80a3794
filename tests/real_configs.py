"""Stable Diffusion 1.4, 1.5, 2.1 and SDXL base as published, and the same at a size for tests.

Every dict holds a configuration file that lies beside the published weights: `unet/config.json`,
`vae/config.json`, `scheduler/scheduler_config.json`, `text_encoder*/config.json`. Left out are
entries that are null, and those that only tell where a file came from. 1.4's files are older than
1.5's and say less of the same model; what they do not say is left out here too, because a reader of
such files must cope with it.

`shrink` makes a small model of a published one and says what it changed; `build` makes a pipeline
with random weights of either. Nothing is downloaded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from transformers import CLIPTextConfig, CLIPTokenizer

from studies.embedded.train import BOS, EOS, build_tokenizer

Config = dict[str, Any]


@dataclass(frozen=True)
class RealConfig:
    """One pipeline, part by part."""

    unet: Config
    vae: Config
    scheduler: Config
    text_encoder: Config
    pad_token: str
    """What the tokenizer fills a short prompt up with."""
    text_encoder_2: Config = field(default_factory=dict)
    """Empty where there is only one."""
    pad_token_2: str = ""
    options: Config = field(default_factory=dict)
    """What `model_index.json` says of the pipeline itself."""


UNET_1_4: Config = {
    "act_fn": "silu",
    "attention_head_dim": 8,  # the number of heads: diffusers' historical name for it
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
UNET_NEWER_DETAILS: Config = {
    "addition_embed_type_num_heads": 64,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "dual_cross_attention": False,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
}
UNET_1_5: Config = UNET_1_4 | UNET_NEWER_DETAILS | {"use_linear_projection": False}
UNET_2_1: Config = UNET_1_4 | {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "only_cross_attention": False,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
UNET_XL: Config = (
    UNET_1_4
    | UNET_NEWER_DETAILS
    | {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "attention_head_dim": [5, 10, 20],
        "attention_type": "default",
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
        "dropout": 0.0,
        "projection_class_embeddings_input_dim": 2816,
        "sample_size": 128,
        "transformer_layers_per_block": [1, 2, 10],
        "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
        "use_linear_projection": True,
    }
)

VAE_1_4: Config = {
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
VAE_1_5: Config = VAE_1_4 | {"scaling_factor": 0.18215}
VAE_2_1: Config = VAE_1_4 | {"sample_size": 768}
VAE_XL: Config = VAE_1_4 | {"force_upcast": True, "sample_size": 1024, "scaling_factor": 0.13025}

SCHEDULER_1_4: Config = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
SCHEDULER_1_5: Config = SCHEDULER_1_4 | {
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "dynamic_thresholding_ratio": 0.995,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "thresholding": False,
}
SCHEDULER_2_1: Config = SCHEDULER_1_4 | {
    "_class_name": "DDIMScheduler",
    "clip_sample": False,
    "prediction_type": "v_prediction",
}
SCHEDULER_XL: Config = SCHEDULER_1_4 | {
    "_class_name": "EulerDiscreteScheduler",
    "clip_sample": False,
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}

CLIP_L: Config = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    # These three ids are not those of CLIP's tokenizer. Every published file has them, and 2 makes
    # transformers look for the prompt's end at its highest token id.
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
    "vocab_size": 49408,
}
OPEN_CLIP_H: Config = CLIP_L | {
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,  # of 24: the last but one is what the UNet was trained with
    "projection_dim": 512,
}
OPEN_CLIP_BIG_G: Config = CLIP_L | {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}

REAL: dict[str, RealConfig] = {
    "sd14": RealConfig(UNET_1_4, VAE_1_4, SCHEDULER_1_4, CLIP_L, EOS),
    "sd15": RealConfig(UNET_1_5, VAE_1_5, SCHEDULER_1_5, CLIP_L, EOS),
    "sd21": RealConfig(UNET_2_1, VAE_2_1, SCHEDULER_2_1, OPEN_CLIP_H, "!"),
    "sdxl": RealConfig(
        UNET_XL,
        VAE_XL,
        SCHEDULER_XL,
        CLIP_L,
        EOS,
        OPEN_CLIP_BIG_G,
        "!",
        {"force_zeros_for_empty_prompt": True},
    ),
}

PARAMETERS: dict[str, dict[str, int]] = {
    "sd14": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd21": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sdxl": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
}
"""How many weights the published models have, counted by others on the published files."""

# --- small ---------------------------------------------------------------------------------------

LATENT_SIDE = 16
PICTURE_SIDE = 8 * LATENT_SIDE
DIVISORS: dict[str, dict[str, int]] = {
    "unet": {
        "block_out_channels": 40,
        "norm_num_groups": 8,
        "layers_per_block": 2,
        # As the text encoders: what they hand over must fit.
        "cross_attention_dim": 64,
        "addition_time_embed_dim": 64,
        "projection_class_embeddings_input_dim": 64,
    },
    "vae": {"block_out_channels": 32, "norm_num_groups": 8, "layers_per_block": 2},
    "text_encoder": {
        "hidden_size": 64,
        "intermediate_size": 64,
        "projection_dim": 64,
        "num_attention_heads": 4,
    },
}
"""By how much `shrink` divides; every division leaves no rest."""
LIMITS: dict[str, dict[str, int]] = {
    "unet": {"transformer_layers_per_block": 3},
    "vae": {},
    "text_encoder": {"num_hidden_layers": 2},
}
"""How deep a stack may be."""


def shrink(real: RealConfig) -> tuple[RealConfig, dict[str, tuple[Any, Any]]]:
    """Return a small model of the same make, and {"part.entry": (published, small)}.

    Widths, heads, depths and picture sizes shrink; block types, activations, projections, what is
    predicted, the noise schedule and the latents' scale stay. `build` gives small text encoders the
    vocabulary that its tokenizer has.
    """
    small: dict[str, Config] = {}
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        config: Config = getattr(real, part)
        kind = part.removesuffix("_2")
        rules = DIVISORS[kind]
        if part == "unet":
            heads = config["attention_head_dim"]
            rules = rules | {"attention_head_dim": 5 if isinstance(heads, list) else 4}
        small[part] = {key: _divided(value, rules.get(key, 1)) for key, value in config.items()}
        for key, most in LIMITS[kind].items():
            if key in config:
                small[part][key] = _at_most(config[key], most)
    small["unet"]["sample_size"] = LATENT_SIDE
    small["vae"]["sample_size"] = PICTURE_SIDE
    tiny = replace(real, **small)
    changed = {}
    for f in fields(real):
        before, after = getattr(real, f.name), getattr(tiny, f.name)
        if isinstance(before, dict):
            changed |= {
                f"{f.name}.{key}": (before[key], after[key])
                for key in before
                if before[key] != after[key]
            }
    return tiny, changed


def _divided(value: Any, by: int) -> Any:
    if by == 1:
        return value
    if isinstance(value, list):
        return [_divided(v, by) for v in value]
    quotient, rest = divmod(value, by)
    assert rest == 0, f"{value} / {by} leaves a rest"
    return quotient


def _at_most(value: Any, most: int) -> Any:
    return [min(v, most) for v in value] if isinstance(value, list) else min(value, most)


# --- pipelines -----------------------------------------------------------------------------------


def words(folder: Path, pad_token: str, vocab_size: int = 0) -> CLIPTokenizer:
    """Return a CLIP tokenizer that knows the drawn world's words, 77 tokens a prompt.

    With `vocab_size`, words that nobody says fill its vocabulary up, so that the beginning and the
    end of a prompt have the two highest ids, as in CLIP's own.
    """
    tokenizer = build_tokenizer(folder)
    known = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    if vocab_size > len(known):
        spoken = sorted(known, key=known.__getitem__)[:-2]
        unspoken = [f"<unspoken-{k}>" for k in range(vocab_size - len(known))]
        ids = {word: k for k, word in enumerate([*spoken, *unspoken, BOS, EOS])}
        (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(
        folder,
        model_max_length=CLIP_L["max_position_embeddings"],
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        unk_token=tokenizer.unk_token,
        pad_token=pad_token,
    )


def build_parts(
    config: RealConfig, vocab_sizes: tuple[int, int] | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """Return the pipeline's networks with random weights; "meta" makes them without any."""
    with torch.device(device):
        parts: dict[str, Any] = {
            "unet": diffusers.UNet2DConditionModel.from_config(config.unet),
            "vae": diffusers.AutoencoderKL.from_config(config.vae),
        }
        for k, part in enumerate(("text_encoder", "text_encoder_2")):
            entries = dict(getattr(config, part))
            if entries:
                make = getattr(transformers, entries.pop("architectures")[0])
                if vocab_sizes is not None:
                    entries["vocab_size"] = vocab_sizes[k]
                parts[part] = make(CLIPTextConfig(**entries))
    return parts


def build(config: RealConfig, folder: Path, *, device: str = "cpu", full: bool = False) -> Any:
    """Return a pipeline with random weights; `folder` gets the tokenizers' files.

    A full one has the published vocabulary's size, a small one that of the words it knows.
    """
    vocab_size = config.text_encoder["vocab_size"] if full else 0
    tokenizers = {"tokenizer": words(folder / "words", config.pad_token, vocab_size)}
    if config.text_encoder_2:
        tokenizers["tokenizer_2"] = words(folder / "words_2", config.pad_token_2, vocab_size)
    sizes = [len(tokenizer) for tokenizer in tokenizers.values()]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = build_parts(config, (sizes[0], sizes[-1]), device)
    for name in ("text_encoder", "text_encoder_2"):
        if name in parts:
            # Random words differ by 0.02 as they are made: too alike to tell two prompts apart.
            parts[name].get_input_embeddings().weight.data.mul_(20)
    scheduler = getattr(diffusers, config.scheduler["_class_name"]).from_config(config.scheduler)
    if config.text_encoder_2:
        return diffusers.StableDiffusionXLPipeline(
            **parts, **tokenizers, scheduler=scheduler, **config.options
        )
    return diffusers.StableDiffusionPipeline(
        **parts,
        **tokenizers,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
