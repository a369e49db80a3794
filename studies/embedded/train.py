"""Train the embedded pipeline from nothing: pictures, autoencoder, latents, text encoder + UNet.

    python -m studies.embedded.train --work build/toy --out data/embedded

The same command on a CPU or a GPU. Every stage keeps a checkpoint and continues from it when the
command is given again; all randomness of step k follows from (seed, k). Pictures of the progress
lie in `<work>/progress/`.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel, compute_snr
from diffusers.utils import make_image_grid
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from studies.embedded import dataset
from studies.embedded.dataset import RARE_TOKENS, caption, vocabulary
from sude_lab.io.opening import FACTS_FILE
from sude_lab.prompts import photo_of
from sude_lab.runs.export import open_to_earlier_versions
from sude_lab.world import drawing as world
from sude_lab.world.oracle import to_tensor

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
MAX_TOKENS = 32
LATENT_CHANNELS = 8


@dataclass(frozen=True)
class TrainConfig:
    """What the embedded pipeline is trained with, from nothing to a model like the one in `data/`.

    How those very weights came about, sitting by sitting, is told in `data/embedded/training.md`.
    """

    work: Path = Path("build/toy")
    """Folder for pictures, checkpoints and progress grids."""
    out: Path = Path("data/embedded")
    """Folder the finished pipeline is written to."""
    init: Path | None = None
    """Pipeline folder to go on from, after a change of the drawings say: its autoencoder is kept,
    its UNet and text encoder are where training begins."""
    num_pictures: int = 24_000
    vae_steps: int = 7_000
    vae_batch_size: int = 8
    vae_learning_rate: float = 2e-3
    vae_kl_weight: float = 1e-6
    unet_steps: int = 7_200
    unet_batch_size: int = 32
    unet_learning_rate: float = 1e-3
    unet_decay_steps: int = 2_600
    """The learning rate falls along a cosine over the last so many steps."""
    min_snr_gamma: float = 5.0
    ema_decay: float = 0.999
    seed: int = 0
    checkpoint_every: int = 250
    picture_every: int = 1_000
    device: str = "auto"
    stage: Literal["all", "vae"] = "all"
    """vae stops after the autoencoder."""


# --- parts ---------------------------------------------------------------------------------------


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write `vocab.json` and `merges.txt` in which every word of the world is one token.

    Byte-pair merges are learned on the world's own words, so any other word falls into letters.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    words = [*vocabulary(), *RARE_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=1,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        # Named here, or the trainer numbers them by chance, and merges of equal count with them.
        special_tokens=[f"{letter}</w>" for letter in sorted(alphabet)],
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(words)] * 2, trainer)
    state = json.loads(tokenizer.to_str())["model"]
    tokens = dict.fromkeys([*sorted(alphabet), *(f"{letter}</w>" for letter in sorted(alphabet))])
    tokens.update(dict.fromkeys(sorted(state["vocab"], key=state["vocab"].__getitem__)))
    vocab = {token: index for index, token in enumerate([*tokens, BOS, EOS])}
    folder.mkdir(parents=True, exist_ok=True)
    models.BPE(vocab, [tuple(pair) for pair in state["merges"]]).save(str(folder))
    special = {
        "bos_token": AddedToken(BOS, special=True),
        "eos_token": AddedToken(EOS, special=True),
    }
    return CLIPTokenizer.from_pretrained(
        folder, model_max_length=MAX_TOKENS, pad_token=EOS, unk_token=EOS, **special
    )


def build_vae() -> AutoencoderKL:
    """Return an untrained autoencoder: 64x64 RGB to 8 x 16 x 16 latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=world.RESOLUTION,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return an untrained CLIP text encoder, width 128, two layers."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            projection_dim=128,
        )
    )


def build_unet() -> UNet2DConditionModel:
    """Return an untrained UNet: cross-attention at 8x8 only, since at 16x16 it doubles the cost."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """Return Stable Diffusion's own schedule: scaled linear betas, 1000 steps, epsilon."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


# --- a loop that continues where it stopped ---


def train_loop(
    modules: dict[str, nn.Module],
    loss_of_step: Callable[[int], Tensor],
    schedule_of_step: Callable[[int], float],
    *,
    steps: int,
    learning_rate: float,
    checkpoint: Path,
    checkpoint_every: int,
    ema_decay: float,
    name: str,
) -> Iterator[tuple[int, float, EMAModel]]:
    """Train `modules` for `steps` steps, yield (step, loss, averaged weights) after each.

    The checkpoint holds weights, averages, optimiser state and the step, and is replaced whole.
    """
    parameters = [p for m in modules.values() for p in m.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=1e-2)
    ema = EMAModel(parameters, decay=ema_decay, use_ema_warmup=True, power=0.75)
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location="cpu")
        for key, module in modules.items():
            module.load_state_dict(state[key])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        first = state["step"]
    ema.to(parameters[0].device)
    recent: float | None = None
    with tqdm(range(first, steps), initial=first, total=steps, desc=name, unit="step") as bar:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * schedule_of_step(step)
            loss = loss_of_step(step)
            if not torch.isfinite(loss):
                raise RuntimeError(f"The {name} loss became {loss.item()} at step {step}.")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            ema.step(parameters)
            value = loss.item()
            recent = value if recent is None else 0.98 * recent + 0.02 * value
            bar.set_postfix(loss=f"{recent:.4f}", refresh=False)
            done = step + 1
            if done % checkpoint_every == 0 or done == steps:
                temporary = checkpoint.with_suffix(".tmp")
                state = {key: module.state_dict() for key, module in modules.items()}
                state |= {
                    "optimizer": optimizer.state_dict(),
                    "ema": ema.state_dict(),
                    "step": done,
                }
                torch.save(state, temporary)
                temporary.replace(checkpoint)
            yield done, value, ema
    if first >= steps:
        yield steps, float("nan"), ema


def warmup_cosine(
    steps: int, warmup: int, decay: int, floor: float = 0.02
) -> Callable[[int], float]:
    """Return the factor of the learning rate: linear up, flat, then a cosine down to `floor`."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        left = (steps - step) / max(1, decay)
        return floor + (1 - floor) * (0.5 - 0.5 * math.cos(math.pi * min(1.0, left)))

    return factor


def _batch(number: int, size: int, seed: int, step: int) -> Tensor:
    """Indices of the batch of one step: a fresh permutation an epoch."""
    per_epoch = number // size
    epoch, place = divmod(step, per_epoch)
    order = torch.randperm(number, generator=torch.Generator().manual_seed(seed * 7919 + epoch))
    return order[place * size : (place + 1) * size]


def _step_generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


# --- stages ---


def train_vae(config: TrainConfig, pictures: Any, device: torch.device) -> AutoencoderKL:
    """Train the autoencoder with L1 + KL, return it with its averaged weights and latent scale."""
    with torch.random.fork_rng(devices=[]):  # the seed is this function's own affair
        torch.manual_seed(config.seed)
        vae = build_vae().to(device)

    def loss_of_step(step: int) -> Tensor:
        index = _batch(len(pictures), config.vae_batch_size, config.seed, step).numpy()
        x = to_tensor(pictures[index]).to(device)
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=_step_generator(config.seed, step))
        y = vae.decode(posterior.mean + posterior.std * noise.to(device)).sample
        # Red-green is learned last and slowly: it counts most until the last fifth.
        emphasis = 6.0 if step < config.vae_steps * 4 // 5 else 2.0
        x, y = _opponent(x, emphasis), _opponent(y, emphasis)
        edges = F.l1_loss(y.diff(dim=-1), x.diff(dim=-1)) + F.l1_loss(
            y.diff(dim=-2), x.diff(dim=-2)
        )
        return F.l1_loss(y, x) + 0.5 * edges + config.vae_kl_weight * posterior.kl().mean()

    checkpoint = config.work / "vae.pt"
    for step, _, ema in train_loop(  # noqa: B007
        {"vae": vae},
        loss_of_step,
        warmup_cosine(config.vae_steps, 100, config.vae_steps // 5),
        steps=config.vae_steps,
        learning_rate=config.vae_learning_rate,
        checkpoint=checkpoint,
        checkpoint_every=config.checkpoint_every,
        ema_decay=0.998,
        name="autoencoder",
    ):
        if step % config.picture_every == 0:
            _show_vae(vae, pictures, config.work / "progress" / f"vae-{step:06d}.png", device)
    assert ema is not None
    ema.copy_to(vae.parameters())
    vae.eval().requires_grad_(False)
    with torch.no_grad():
        held = to_tensor(pictures[-512:]).to(device)
        latents = torch.cat([vae.encode(x).latent_dist.mean for x in held.split(64)])
    _sharpen(vae)
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    return vae


@torch.no_grad()
def reconstruction(vae: AutoencoderKL, pictures: Any, device: torch.device) -> float:
    """Return the mean peak signal-to-noise ratio of decoded pictures, in dB."""
    x = to_tensor(pictures).to(device)
    y = torch.cat([vae.decode(vae.encode(p).latent_dist.mean).sample for p in x.split(64)])
    return (10 * torch.log10(4 / (y.clamp(-1, 1) - x).square().mean((1, 2, 3)))).mean().item()


@torch.no_grad()
def _sharpen(vae: AutoencoderKL) -> None:
    """Set the posterior's deviation to e^-10: the UNet learns the means, so a draw must be one.

    Trained with almost no KL weight the deviation grows to 0.6, which makes the decoder forgiving
    of a sampler's noise, but a tuning loop that draws from it (as all of them do) would show the
    UNet latents it has never seen.
    """
    channels = vae.config.latent_channels
    vae.quant_conv.weight[channels:] = 0
    vae.quant_conv.bias[channels:] = -20


def _opponent(x: Tensor, red_green: float) -> Tensor:
    """Return brightness, red-green (with its weight) and yellow-blue."""
    r, g, b = x.unbind(1)
    return torch.stack([(r + g + b) / 3, red_green * (r - g), r + g - 2 * b], dim=1)


@torch.no_grad()
def _show_vae(vae: AutoencoderKL, pictures: Any, path: Path, device: torch.device) -> None:
    x = to_tensor(pictures[:16]).to(device)
    y = vae.decode(vae.encode(x).latent_dist.mean).sample
    _save_grid(torch.cat([x, y]), path, 8)


def _save_grid(x: Tensor, path: Path, columns: int) -> None:
    from diffusers.image_processor import VaeImageProcessor

    path.parent.mkdir(parents=True, exist_ok=True)
    images = VaeImageProcessor().postprocess(x.float().cpu(), output_type="pil")
    make_image_grid([i.resize((128, 128)) for i in images], len(images) // columns, columns).save(
        path
    )


@torch.no_grad()
def encode_all(vae: AutoencoderKL, pictures: Any, path: Path, device: torch.device) -> Tensor:
    """Encode every picture once, scaled to unit deviation; kept in `path`."""
    if path.exists():
        latents = torch.load(path, weights_only=True)
        if len(latents) == len(pictures):
            return latents
    parts = []
    for start in tqdm(range(0, len(pictures), 64), desc="encoding", unit="batch"):
        x = to_tensor(pictures[start : start + 64]).to(device)
        parts.append((vae.encode(x).latent_dist.mean * vae.config.scaling_factor).cpu())
    latents = torch.cat(parts)
    torch.save(latents, path)
    return latents


def train_unet(
    config: TrainConfig,
    vae: AutoencoderKL,
    latents: Tensor,
    scenes: list[world.Scene],
    device: torch.device,
) -> StableDiffusionPipeline:
    """Train UNet and text encoder together on the plain epsilon loss, return the whole pipeline."""
    if config.init:
        pipeline = StableDiffusionPipeline.from_pretrained(config.init, use_safetensors=True)
        tokenizer, text_encoder, unet = pipeline.tokenizer, pipeline.text_encoder, pipeline.unet
    else:
        tokenizer = build_tokenizer(config.work / "tokenizer")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed + 1)
            text_encoder, unet = build_text_encoder(tokenizer), build_unet()
    text_encoder.to(device).train()
    unet.to(device).train()
    scheduler = build_scheduler()
    pipeline = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)

    def loss_of_step(step: int) -> Tensor:
        index = _batch(len(latents), config.unet_batch_size, config.seed + 1, step)
        x_0 = latents[index].to(device)
        rng = random.Random(f"{config.seed}-{step}")
        texts = [caption(scenes[i], rng) for i in index.tolist()]
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        c = text_encoder(tokens.input_ids.to(device))[0]
        generator = _step_generator(config.seed + 1, step)
        eps = torch.randn(x_0.shape, generator=generator).to(device)
        t = torch.randint(0, scheduler.config.num_train_timesteps, (len(x_0),), generator=generator)
        t = t.to(device)
        guess = unet(scheduler.add_noise(x_0, eps, t), t, c).sample
        # Min-SNR weighting (arXiv 2303.09556): layout is learned before the last details.
        snr = compute_snr(scheduler, t)
        weight = snr.clamp(max=config.min_snr_gamma) / snr
        return (weight * (guess - eps).square().mean((1, 2, 3))).mean()

    trained = {"unet": unet, "text_encoder": text_encoder}
    parameters = [p for m in trained.values() for p in m.parameters()]
    log = config.work / "unet-loss.csv"
    total, count, started = 0.0, 0, time.time()
    ema = None
    for step, loss, ema in train_loop(
        trained,
        loss_of_step,
        warmup_cosine(config.unet_steps, 200, config.unet_decay_steps),
        steps=config.unet_steps,
        learning_rate=config.unet_learning_rate,
        checkpoint=config.work / "unet.pt",
        checkpoint_every=config.checkpoint_every,
        ema_decay=config.ema_decay,
        name="unet",
    ):
        total, count = total + loss, count + 1
        if step % 100 == 0 and count:
            with log.open("a") as file:
                file.write(f"{step},{total / count:.5f},{time.time() - started:.0f}\n")
            total, count = 0.0, 0
        if step % config.picture_every == 0:
            ema.store(parameters)
            ema.copy_to(parameters)
            _show_unet(pipeline, config.work / "progress" / f"unet-{step:06d}.png")
            ema.restore(parameters)
    assert ema is not None
    ema.copy_to(parameters)
    return pipeline


def _show_unet(pipeline: StableDiffusionPipeline, path: Path) -> None:
    prompts = [photo_of(f"{a} {c}") for c in world.CATEGORIES for a in world.ATTRIBUTES[c]]
    generator = torch.Generator().manual_seed(0)
    images = pipeline(
        prompts, num_inference_steps=20, guidance_scale=4.0, generator=generator
    ).images
    images += [images[-1]] * (-len(images) % 10)
    path.parent.mkdir(parents=True, exist_ok=True)
    make_image_grid([i.resize((128, 128)) for i in images], len(images) // 10, 10).save(path)


def export(pipeline: StableDiffusionPipeline, out: Path) -> None:
    """Write the pipeline folder whole: safetensors, tokenizer, and the words it was trained on."""
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    pipeline.save_pretrained(temporary, safe_serialization=True)
    open_to_earlier_versions(temporary)
    words = list(vocabulary())
    facts = {
        "categories": list(world.CATEGORIES),
        "words": words,
        "generation": {"num_inference_steps": 20, "guidance_scale": 4.0},
    }
    (temporary / FACTS_FILE).write_text(json.dumps(facts, indent=1), encoding="utf-8")
    if out.exists():
        old = out.with_name(out.name + ".old")
        os.replace(out, old)
        for name in ("README.md", "training.md", "alignment.csv", FACTS_FILE):
            if (old / name).exists():
                os.replace(old / name, temporary / name)
        os.replace(temporary, out)
        shutil.rmtree(old)
    else:
        os.replace(temporary, out)


def main(config: TrainConfig) -> None:
    """Run the stages in order; each continues from its checkpoint."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    config.work.mkdir(parents=True, exist_ok=True)
    settings = {k: str(v) for k, v in asdict(config).items()}
    (config.work / "config.json").write_text(json.dumps(settings, indent=2))
    scenes = dataset.scenes(config.num_pictures, config.seed)
    pictures = dataset.render(
        scenes, config.work / f"pictures-{config.num_pictures}-{config.seed}.npy"
    )
    if config.init:
        vae = AutoencoderKL.from_pretrained(config.init / "vae", use_safetensors=True).to(device)
        vae.eval().requires_grad_(False)
    else:
        vae = train_vae(config, pictures, device)
    print(f"autoencoder: {reconstruction(vae, pictures[-512:], device):.2f} dB on 512 drawings")
    if config.stage == "vae":
        return
    latents = encode_all(vae, pictures, config.work / "latents.pt", device)
    pipeline = train_unet(config, vae, latents, scenes, device)
    export(pipeline, config.out)
    print(f"pipeline written to {config.out}")


if __name__ == "__main__":
    main(tyro.cli(TrainConfig))
