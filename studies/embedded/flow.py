"""Train the second embedded model from nothing: a `StableDiffusion3Pipeline`, by flow matching.

    python -m studies.embedded.flow --out data/embedded_flow
    python -m studies.embedded.flow --out data/embedded_flow --time-budget 300 --device cuda

The same command on a CPU or a GPU, continued from its checkpoint when it is given again. The
autoencoder and the text encoder are those of `data/embedded`, frozen; the transformer alone learns.
Without a time budget all randomness of step k follows from (seed, k); with one, training begins
while the pictures are still being drawn, and its length is what the clock allows.
"""

from __future__ import annotations

import copy
import csv
import json
import math
import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

# All that this study takes from the package: the drawings here, in light imports, since processes
# that draw are forked before torch is there; the rest in `alignment` and `write_pipeline`.
from studies.embedded.dataset import caption, vocabulary
from sude_lab.prompts import photo_of
from sude_lab.world import drawing as world

STARTED = time.monotonic()
CHUNK = 256
"""Pictures that one process draws at a time."""
CAPTIONS = 8
"""Captions kept of a scene; a step takes one of them."""
MAX_TOKENS = 32
SHORT = (0, 2, 8, 16)
LONG = (64, 256)
"""Numbers of T5 tokens. Plain diffusers asks for 256 unless told; they cost four times the rest."""
FACTS_FILE = "sude_lab.json"
TUNING: dict[str, Any] = {
    "dreambooth": {
        "train": "unet",
        "learning_rate": 2e-5,
        "token_learning_rate": 1e-3,
        "weight_sude": 2.0,
        "weighting": "simple",
        "max_train_steps": 100,
        "train_batch_size": 4,
    },
    "textual_inversion": {
        "token_learning_rate": 5e-3,
        "weight_sude": 1.0,
        "weighting": "simple",
        "max_train_steps": 400,
        "train_batch_size": 4,
    },
}
"""Settings that suit the model: tried on one subject, compared with nothing."""
POOLED_SCALE = 3.0
WORD_SCALE = 10.0
"""Of the first weights that read the text encoder, whose embeddings have a deviation of a tenth."""


@dataclass(frozen=True)
class FlowConfig:
    """What the flow model is trained with."""

    out: Path = Path("data/embedded_flow")
    """Folder the finished pipeline is written to."""
    work: Path = Path("build/flow")
    """Folder for the checkpoint, the log and what was measured."""
    source: Path = Path("data/embedded")
    """Pipeline whose autoencoder, tokenizer and text encoder are used as they are."""
    weights: Path | None = None
    """Folder of a trained transformer: the pipeline is put together and judged, nothing trained."""
    parts: Path | None = None
    """Folder to leave the transformer in, too, in files of less than 16 MB."""
    steps: int = 14_000
    time_budget: float | None = None
    """Seconds from the start of the program to its end; replaces `steps`."""
    reserve: float = 25.0
    """Seconds of the time budget kept for judging and writing."""
    pictures: int = 24_000
    first: int = 16_384
    """With a time budget training begins when so many pictures are there."""
    workers: int = 2
    """Processes that draw."""
    width: int = 192
    layers: int = 6
    head: int = 32
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup: int = 300
    flat: float = 0.3
    """Share of the training after which the learning rate falls along a cosine."""
    ema_decay: float = 0.999
    uniform: float = 0.1
    """Share of the noise levels drawn evenly; the others are logit-normal, as in SD3."""
    checkpoint_every: float = 60.0
    """Seconds between checkpoints."""
    look_every: float | None = None
    """Seconds between short judgements on the way."""
    num_images: int = 16
    """Pictures of every (category, attribute) that the card's table counts."""
    sampling_steps: int = 20
    guidance_scale: float = 4.0
    sweep: bool = False
    """Judge other numbers of steps, scales of guidance and numbers of T5 tokens, too."""
    seed: int = 2
    device: str = "auto"


# --- drawings, in processes of their own -------------------------------------------------------


def word_ids(text: str, vocab: dict[str, int]) -> list[int]:
    """Return the `MAX_TOKENS` ids of a caption, every word of which is one token."""
    end = vocab["<|endoftext|>"]
    ids = [vocab["<|startoftext|>"], *(vocab[f"{word}</w>"] for word in text.split()), end]
    return ids + [end] * (MAX_TOKENS - len(ids))


def draw_chunk(task: tuple[int, int, int, dict[str, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Draw scenes first..last of a seed; return pictures (N, H, W, 3) and ids (N, captions, L)."""
    seed, first, last, vocab = task
    pictures, ids = [], []
    for k in range(first, last):
        scene = world.sample_scene(random.Random(f"{seed}-{k}"))
        rng = random.Random(f"captions-{seed}-{k}")
        pictures.append(np.asarray(world.draw(scene)))
        ids.append([word_ids(caption(scene, rng), vocab) for _ in range(CAPTIONS)])
    return np.stack(pictures), np.array(ids, dtype=np.int16)


def start_drawing(config: FlowConfig) -> tuple[Any, Any]:
    """Start the processes; return them, and an iterator over the chunks in their order."""
    fork = "fork" in multiprocessing.get_all_start_methods()
    processes = multiprocessing.get_context("fork" if fork else "spawn").Pool(config.workers)
    vocab = json.loads((config.source / "tokenizer/vocab.json").read_text(encoding="utf-8"))
    words = {f"{word}</w>" for word in vocabulary()} | {"<|startoftext|>", "<|endoftext|>"}
    vocab = {word: number for word, number in vocab.items() if word in words}
    starts = range(0, config.pictures, CHUNK)
    tasks = ((config.seed, k, min(k + CHUNK, config.pictures), vocab) for k in starts)
    return processes, processes.imap(draw_chunk, tasks)


class Drawings:
    """Latents and captions on the training device; more come in while it is trained."""

    def __init__(self, config: FlowConfig, chunks: Any, vae: Any, device: Any) -> None:
        import torch

        self.vae, self.chunks, self.device, self.number = vae, chunks, device, 0
        side, channels = world.RESOLUTION // 4, vae.config.latent_channels
        self.latents = torch.empty(config.pictures, channels, side, side, device=device)
        shape = (config.pictures, CAPTIONS, MAX_TOKENS)
        self.ids = torch.empty(shape, dtype=torch.int16, device=device)

    def take(self, timeout: float) -> bool:
        """Take the next chunk, where it is there in time; False where it is not, or none is left.

        Raises:
            RuntimeError: a process could not draw.
        """
        import torch

        if self.number == len(self.latents):
            return False
        try:
            pictures, ids = self.chunks.next(timeout)
        except multiprocessing.TimeoutError:
            return False
        with torch.no_grad():
            x = self._move(torch.from_numpy(pictures)).permute(0, 3, 1, 2)
            x = x.float().div_(127.5).sub_(1.0)
            parts = [self.vae.encode(part).latent_dist.mean for part in x.split(CHUNK)]
            place = slice(self.number, self.number + len(x))
            self.latents[place] = torch.cat(parts) * self.vae.config.scaling_factor
            self.ids[place] = self._move(torch.from_numpy(ids))
        self.number += len(x)
        return True

    def _move(self, x: Any) -> Any:
        if self.device.type == "cuda":  # from pinned memory nobody waits for the card
            return x.pin_memory().to(self.device, non_blocking=True)
        return x.to(self.device)

    def wait(self, number: int) -> None:
        """Wait until `number` pictures are there."""
        while self.number < min(number, len(self.latents)):
            self.take(10.0)


# --- the pipeline ------------------------------------------------------------------------------


def build_transformer(config: FlowConfig, channels: int, text: int) -> Any:
    """Return an untrained SD3 transformer: 64 tokens of 2 x 2 latents beside those of the text."""
    import torch
    from diffusers import SD3Transformer2DModel

    transformer = SD3Transformer2DModel(
        sample_size=world.RESOLUTION // 4,
        patch_size=2,
        in_channels=channels,
        out_channels=channels,
        num_layers=config.layers,
        attention_head_dim=config.head,
        num_attention_heads=config.width // config.head,
        joint_attention_dim=2 * text,
        caption_projection_dim=config.width,
        pooled_projection_dim=2 * text,
        pos_embed_max_size=world.RESOLUTION // 8,
        qk_norm="rms_norm",
    )
    with torch.no_grad():
        transformer.context_embedder.weight.mul_(WORD_SCALE)
    return transformer


def build_t5(width: int) -> tuple[Any, Any]:
    """Return a T5 encoder whose every token is zeros, and a tokenizer that knows no word.

    Zeros are what diffusers puts in the place of a T5 that is left out; with this one the folder
    opens without arguments.
    """
    import torch
    from tokenizers import Tokenizer, models, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    settings = T5Config(
        vocab_size=8, d_model=width, d_kv=16, d_ff=32, num_layers=1, num_heads=1, is_decoder=False
    )
    encoder = T5EncoderModel(settings)
    with torch.no_grad():
        for weight in encoder.parameters():
            weight.zero_()
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    inner = Tokenizer(models.Unigram(pieces, unk_id=2))  # a whole text is one unknown piece
    inner.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    # The T5 tokenizers of transformers 4 and 5 read different files; this class is in both.
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=256, **special)
    return encoder, tokenizer


def build_clip(folder: Path) -> Any:
    """Return the first layer of the embedded text encoder, its pooled state at unit deviation.

    SD3 reads the state before the last layer, which is here the embedding of words and places. The
    one after the first of two layers has some values a hundred times as large as the others.
    """
    import torch
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    old = CLIPTextModel.from_pretrained(folder, use_safetensors=True)
    config = copy.deepcopy(old.config)
    config.num_hidden_layers = 1
    encoder = CLIPTextModelWithProjection(config)
    weights = {name.removeprefix("text_model."): w for name, w in old.state_dict().items()}
    for name, weight in encoder.state_dict().items():
        if name == "text_projection.weight":
            weight.copy_(POOLED_SCALE * torch.eye(len(weight)))
        else:
            weight.copy_(weights[name.removeprefix("text_model.")])
    return encoder


def build_pipeline(config: FlowConfig) -> Any:
    """Return the whole pipeline; its transformer is untrained, or that of `config.weights`."""
    import torch
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTokenizer

    source = config.source
    vae = AutoencoderKL.from_pretrained(source / "vae", use_safetensors=True)
    vae.register_to_config(shift_factor=0.0)  # None, as in SD 1, is a TypeError in SD 3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        clips = [build_clip(source / "text_encoder") for _ in range(2)]
        text = clips[0].config.projection_dim
        t5, t5_tokenizer = build_t5(2 * text)
        if config.weights:
            transformer = SD3Transformer2DModel.from_pretrained(
                config.weights, use_safetensors=True
            )
        else:
            transformer = build_transformer(config, vae.config.latent_channels, text)
    tokenizers = [CLIPTokenizer.from_pretrained(source / "tokenizer") for _ in range(2)]
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0),
        vae=vae,
        text_encoder=clips[0],
        tokenizer=tokenizers[0],
        text_encoder_2=clips[1],
        tokenizer_2=tokenizers[1],
        text_encoder_3=t5,
        tokenizer_3=t5_tokenizer,
    )
    for part in (vae, *clips, t5):
        part.eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def write_pipeline(pipeline: Any, config: FlowConfig, card: str) -> None:
    """Write the folder whole: safetensors, tokenizers that transformers 4 reads, facts and card."""
    from tokenizers import Tokenizer

    temporary = config.out.with_name(config.out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    pipeline.transformer.half()
    pipeline.save_pretrained(temporary, safe_serialization=True)
    pipeline.transformer.float()
    for name in ("tokenizer", "tokenizer_2"):
        folder = temporary / name
        Tokenizer.from_file(str(folder / "tokenizer.json")).model.save(str(folder))
    index = json.loads((temporary / "model_index.json").read_text("utf-8"))
    index["tokenizer_3"] = ["transformers", "PreTrainedTokenizerFast"]  # 5's own name is not in 4
    (temporary / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    path = temporary / "tokenizer_3/tokenizer_config.json"
    settings = json.loads(path.read_text("utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    for path in temporary.glob("*/config.json"):
        settings = json.loads(path.read_text("utf-8"))
        settings.pop("_name_or_path", None)  # where the weights lay
        path.write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    facts = {
        "categories": list(world.CATEGORIES),
        "words": list(vocabulary()),
        "generation": {
            "num_inference_steps": config.sampling_steps,
            "guidance_scale": config.guidance_scale,
        },
        "text": {"max_sequence_length": SHORT[1]},
        "tuning": TUNING,
    }
    (temporary / FACTS_FILE).write_text(json.dumps(facts, indent=1), "utf-8")
    (temporary / "README.md").write_text(card, "utf-8")
    shutil.rmtree(config.out, ignore_errors=True)
    os.replace(temporary, config.out)


# --- training ----------------------------------------------------------------------------------


class Texts:
    """What the transformer is told of captions, as the pipeline's `encode_prompt` makes it."""

    def __init__(self, pipeline: Any) -> None:
        self.clip, self.width = (
            pipeline.text_encoder,
            pipeline.transformer.config.joint_attention_dim,
        )

    def __call__(self, ids: Any, t5_tokens: int) -> tuple[Any, Any]:
        """Return hidden states (B, L + t5_tokens, D) and pooled states (B, D) of ids (B, L)."""
        import torch

        with torch.no_grad():
            out = self.clip(ids.long(), output_hidden_states=True)
            hidden, pooled = out.hidden_states[-2], out.text_embeds
            hidden = torch.cat([hidden, hidden], dim=-1)  # both encoders are one
            zeros = hidden.new_zeros(len(hidden), t5_tokens, self.width)
            return torch.cat([hidden, zeros], dim=1), torch.cat([pooled, pooled], dim=-1)


class Training:
    """Weights, averages and optimiser, with their checkpoint in one safetensors file."""

    def __init__(self, config: FlowConfig, pipeline: Any, device: Any) -> None:
        import torch

        self.config, self.device = config, device
        self.transformer = pipeline.transformer.to(device).train()
        self.texts = Texts(pipeline)
        self.names = [name for name, _ in self.transformer.named_parameters()]
        self.parameters = list(self.transformer.parameters())
        self.averages = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=1e-2,
            fused=device.type == "cuda",
        )
        self.generator = torch.Generator(device)
        self.checkpoint = config.work / "checkpoint.safetensors"
        self.step, self.samples, self.seconds_before = 0, 0, 0.0
        if self.checkpoint.exists():
            self._load()

    def seconds(self) -> float:
        """Return the seconds of all sittings so far."""
        return self.seconds_before + time.monotonic() - STARTED

    def progress(self) -> float:
        """Return the share of the training that is done, by steps or by the clock."""
        if self.config.time_budget is None:
            return self.step / self.config.steps
        return self.seconds() / (self.config.time_budget - self.config.reserve)

    def rate(self) -> float:
        """Return the factor of the learning rate: linear up, flat, then a cosine down to 1 %."""
        fall = max(0.0, min(1.0, self.progress()) - self.config.flat) / (1 - self.config.flat)
        cosine = 0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * fall))
        return min(1.0, (self.step + 1) / self.config.warmup) * cosine

    def loss(self, drawings: Drawings) -> Any:
        """Return the flow-matching loss |v - (eps - x_0)|^2 at x_s = (1 - s) x_0 + s eps."""
        import torch

        config, g, device = self.config, self.generator, self.device
        g.manual_seed(config.seed * 1_000_003 + self.step)
        rng = random.Random(f"{config.seed}-{self.step}")
        long = self.step % 8 == 7
        size = max(1, config.batch_size // 4) if long else config.batch_size
        self.samples += size
        index = torch.randint(drawings.number, (size,), generator=g, device=device)
        which = torch.randint(CAPTIONS, (size,), generator=g, device=device)
        x_0 = drawings.latents[index]
        hidden, pooled = self.texts(drawings.ids[index, which], rng.choice(LONG if long else SHORT))
        eps = torch.randn(x_0.shape, generator=g, device=device)
        s = torch.randn(size, generator=g, device=device).sigmoid()
        u = torch.rand(2, size, generator=g, device=device)
        s = torch.where(u[0] < config.uniform, u[1], s)
        wide = s.view(-1, 1, 1, 1)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            v = self.transformer(
                hidden_states=(1 - wide) * x_0 + wide * eps,
                timestep=1000 * s,
                encoder_hidden_states=hidden,
                pooled_projections=pooled,
                return_dict=False,
            )[0]
        return (v.float() - (eps - x_0)).square().mean()

    def run(self, drawings: Drawings) -> Iterator[tuple[int, float, float]]:
        """Train; yield (step, loss, factor of the learning rate) now and then.

        Raises:
            RuntimeError: the loss is no number any more.
        """
        import torch

        total, count = torch.zeros((), device=self.device), 0
        while self.progress() < 1:
            drawings.take(0.0)
            factor = self.rate()
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.learning_rate * factor
            loss = self.loss(drawings)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.step += 1
            decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(self.averages, [p.detach() for p in self.parameters], 1 - decay)
            total, count = total + loss.detach(), count + 1
            if self.step % 100 == 0:
                mean = (total / count).item()
                if not math.isfinite(mean):
                    raise RuntimeError(f"The loss became {mean} before step {self.step}.")
                yield self.step, mean, factor
                total, count = torch.zeros((), device=self.device), 0

    def save(self) -> None:
        """Replace the checkpoint whole."""
        from safetensors.torch import save_file

        state = self.optimizer.state
        tensors: dict[str, Any] = {}
        for name, weight, average in zip(self.names, self.parameters, self.averages, strict=True):
            tensors |= {f"weight.{name}": weight.detach(), f"average.{name}": average}
            tensors |= {f"{key}.{name}": value for key, value in state[weight].items()}
        facts = {"step": self.step, "samples": self.samples, "seconds": self.seconds()}
        temporary = self.checkpoint.with_suffix(".tmp")
        save_file(tensors, temporary, metadata={k: str(v) for k, v in facts.items()})
        os.replace(temporary, self.checkpoint)

    def _load(self) -> None:
        import torch
        from safetensors import safe_open

        with safe_open(self.checkpoint, "pt", device="cpu") as file:
            facts = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        with torch.no_grad():
            for name, weight, average in zip(
                self.names, self.parameters, self.averages, strict=True
            ):
                weight.copy_(tensors[f"weight.{name}"])
                average.copy_(tensors[f"average.{name}"])
        keys = ("step", "exp_avg", "exp_avg_sq")
        state = {
            k: {key: tensors[f"{key}.{name}"] for key in keys} for k, name in enumerate(self.names)
        }
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.step, self.samples = int(facts["step"]), int(facts["samples"])
        self.seconds_before = float(facts["seconds"])

    def swap(self) -> None:
        """Put the averages in the place of the weights, or back."""
        import torch

        with torch.no_grad():
            for weight, average in zip(self.parameters, self.averages, strict=True):
                weight.data, average.data = average.data, weight.data


# --- what the oracle sees ----------------------------------------------------------------------


def alignment(
    pipeline: Any,
    number: int,
    *,
    steps: int,
    guidance: float,
    t5_tokens: int = SHORT[1],
    seed: int = 0,
    sheet: Path | None = None,
) -> list[dict[str, Any]]:
    """Return, for every (category, attribute), the oracle's mean probabilities on `number` samples.

    The plain pipeline draws them; with `sheet` the first of each is kept there as one picture.
    """
    import torch
    from diffusers.utils import make_image_grid

    from sude_lab.world.oracle import judge, load_oracle

    oracle, rows, shown = load_oracle(), [], []
    pairs = [(c, a) for c in world.CATEGORIES for a in world.ATTRIBUTES[c]]
    prompts = [photo_of(f"{a} {c}") for c, a in pairs for _ in range(number)]
    generator, images = torch.Generator().manual_seed(seed), []
    for first in range(0, len(prompts), 320):
        images += pipeline(
            prompts[first : first + 320],
            num_inference_steps=steps,
            guidance_scale=guidance,
            max_sequence_length=t5_tokens,
            generator=generator,
        ).images
    for k, (category, attribute) in enumerate(pairs):
        drawn = images[k * number : (k + 1) * number]
        shown.append(drawn[0])
        # What the picture asks for; the look is anyone's, and not counted here.
        scene = world.sample_scene(random.Random(0), category)
        reading = judge(oracle, drawn, scene, attribute)
        rows.append(
            {
                "category": category,
                "attribute": attribute,
                "prompt": prompts[k * number],
                "attribute_alignment": round(reading.attribute_alignment.mean().item(), 3),
                "category_alignment": round(reading.category_alignment.mean().item(), 3),
                "pictures": number,
            }
        )
    if sheet:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        make_image_grid(shown, len(shown) // 8, 8).save(sheet)
    return rows


def by_category(rows: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Return the mean (attribute, category) alignment of every category."""
    means = {}
    for category in world.CATEGORIES:
        of = [row for row in rows if row["category"] == category]
        means[category] = tuple(
            sum(row[key] for row in of) / len(of)
            for key in ("attribute_alignment", "category_alignment")
        )
    return means


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows that share their columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def sweep(pipeline: Any, config: FlowConfig) -> list[dict[str, Any]]:
    """Judge other ways to draw: steps, guidance, and the 256 T5 tokens of plain diffusers."""
    rows = []
    for steps, guidance, tokens in (
        *((steps, config.guidance_scale, SHORT[1]) for steps in (8, 12, 16, 20, 28, 40)),
        *((config.sampling_steps, g, SHORT[1]) for g in (1.0, 2.0, 3.0, 5.0, 7.0)),
        (config.sampling_steps, config.guidance_scale, 1),
        (config.sampling_steps, config.guidance_scale, 16),
        (config.sampling_steps, config.guidance_scale, 256),
        (28, 7.0, 256),
    ):
        if config.time_budget and time.monotonic() - STARTED > config.time_budget - 6:
            break
        table = alignment(pipeline, 8, steps=steps, guidance=guidance, t5_tokens=tokens, seed=1)
        means = by_category(table).values()
        rows.append(
            {
                "steps": steps,
                "guidance": guidance,
                "t5_tokens": tokens,
                "attribute_alignment": round(sum(a for a, _ in means) / len(means), 3),
                "attribute_lowest": round(min(a for a, _ in means), 3),
                "category_alignment": round(sum(c for _, c in means) / len(means), 3),
                "category_lowest": round(min(c for _, c in means), 3),
            }
        )
        print(*rows[-1].values(), flush=True)
    return rows


def card(
    pipeline: Any, config: FlowConfig, facts: dict[str, Any], rows: list[dict[str, Any]]
) -> str:
    """Return the model's card; what it was trained with stands in `facts`."""
    size = sum(p.numel() for p in pipeline.transformer.parameters()) / 1e6
    shape = pipeline.transformer.config
    trained = facts["config"]
    table = ["| category | attribute | prompt | attribute_alignment | category_alignment |"]
    table.append("|:--|:--|:--|--:|--:|")
    keys = ("category", "attribute", "prompt", "attribute_alignment", "category_alignment")
    table += ["| " + " | ".join(str(row[key]) for key in keys) + " |" for row in rows]
    means = ["| category | attribute_alignment | category_alignment |", "|:--|--:|--:|"]
    means += [f"| {c} | {a:.3f} | {b:.3f} |" for c, (a, b) in by_category(rows).items()]
    heads, width = shape.num_attention_heads, shape.attention_head_dim
    return f"""# The embedded flow model

A `StableDiffusion3Pipeline` trained from nothing, by flow matching, on pictures that we draw:
`StableDiffusion3Pipeline.from_pretrained("data/embedded_flow")` is all it needs. It is the second
embedded model, for learning and testing SuDe on a flow-matching transformer; it can draw nothing
but the world of the first (`data/embedded`, whose card describes pictures and captions).

## Parts
- Transformer: SD3's, {shape.num_layers} layers, {heads} heads of {width}, patches of 2 x 2 latents,
  RMS norm of queries and keys as in SD3.5: {size:.2f} M parameters, all that was trained here,
  stored in half precision (diffusers reads them as float32 unless told).
- Autoencoder and text encoder of `data/embedded`, frozen. Of the text encoder the first layer is
  there, twice, as SD3 asks for two: the transformer reads its embeddings, which is what stands
  before the last layer, and its pooled state, projected by a multiple of the identity.
- A T5 encoder whose every token is zeros, which is what diffusers puts in the place of a T5 that is
  left out. Its tokens cost time and say nothing: plain diffusers makes 256 of them unless told
  (`max_sequence_length=2` is four times as fast). The transformer was trained with
  {", ".join(map(str, SHORT + LONG))} of them and draws alike with each.
- `FlowMatchEulerDiscreteScheduler`, shift 1.

## Training
`python -m studies.embedded.flow`, {facts["device"]}: {facts["step"]} steps, {facts["samples"]:,}
samples of {facts["pictures"]:,} drawings in {facts["seconds"]:.0f} seconds, drawing included. Loss
|v - (eps - x_0)|^2, s logit-normal ({trained["uniform"]:.0%} of it uniform), AdamW
{trained["learning_rate"]} with a cosine at the end, averaged weights (EMA {trained["ema_decay"]}),
batches of {trained["batch_size"]} (every eighth a quarter of that, with many T5 tokens), empty
captions in 10 % of cases.

## What the oracle sees
{rows[0]["pictures"]} pictures of every prompt, Euler, {config.sampling_steps} steps, guidance
{config.guidance_scale}, seed 0: mean probability of the attribute among those of its category,
and of the category, by `data/oracle`.

{chr(10).join(means)}

{chr(10).join(table)}

## Limits
Flat drawings of nine things, always facing right, one of each: no photos, no people, no text.
The oracle was trained on the same world and shares its blind spots.
"""


# --- the whole ---------------------------------------------------------------------------------


def check_words(pipeline: Any, config: FlowConfig) -> None:
    """Check that the drawing processes number words as the tokenizer does.

    Raises:
        RuntimeError: they do not.
    """
    rng = random.Random(0)
    texts = [caption(world.sample_scene(rng), rng) for _ in range(64)]
    vocab = json.loads((config.source / "tokenizer/vocab.json").read_text(encoding="utf-8"))
    ids = pipeline.tokenizer(texts, padding="max_length", truncation=True).input_ids
    if ids != [word_ids(text, vocab) for text in texts]:
        raise RuntimeError(f"The tokenizer of {config.source} splits the world's words.")


def train(config: FlowConfig, pipeline: Any, chunks: Any, device: Any) -> dict[str, Any]:
    """Train the pipeline's transformer, leave the averaged weights in it; return what was done."""
    import torch

    training = Training(config, pipeline, device)
    drawings = Drawings(config, chunks, pipeline.vae, device)
    drawings.wait(config.first if config.time_budget else config.pictures)
    print(f"{time.monotonic() - STARTED:.1f} s: {drawings.number} drawings, training", flush=True)
    saved = looked = time.monotonic()
    log = (config.work / "log.csv").open("a", encoding="utf-8")
    with log:
        for step, loss, factor in training.run(drawings):
            line = f"{step},{loss:.5f},{factor:.4f},{drawings.number},{training.seconds():.1f}"
            log.write(line + "\n")
            log.flush()
            if step % 500 == 0 or device.type == "cpu":
                print(line, flush=True)
            now = time.monotonic()
            if now - saved > config.checkpoint_every:
                training.save()
                saved = now
            if config.look_every and now - looked > config.look_every:
                training.swap()
                rows = alignment(pipeline, 2, steps=12, guidance=config.guidance_scale)
                training.swap()
                print(f"step {step}:", _short(rows), flush=True)
                looked = time.monotonic()
    training.save()
    training.swap()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    return {
        "device": name,
        "step": training.step,
        "samples": training.samples,
        "pictures": drawings.number,
        "seconds": round(training.seconds(), 1),
        "config": {k: v for k, v in asdict(config).items() if not isinstance(v, Path | None)},
    }


def _short(rows: list[dict[str, Any]]) -> str:
    return ", ".join(f"{c} {a:.2f}/{b:.2f}" for c, (a, b) in by_category(rows).items())


def main(config: FlowConfig) -> None:
    """Draw, train, judge and write."""
    processes: Any = None
    chunks: Any = None
    if config.weights is None:
        processes, chunks = start_drawing(config)
    import torch

    torch.set_float32_matmul_precision("high")
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    config.work.mkdir(parents=True, exist_ok=True)
    pipeline = build_pipeline(config).to(device)
    check_words(pipeline, config)
    print(f"{time.monotonic() - STARTED:.1f} s: pipeline built on {device}", flush=True)
    if config.weights:
        facts = json.loads((config.weights / "training.json").read_text(encoding="utf-8"))
    else:
        facts = train(config, pipeline, chunks, device)
        processes.terminate()
    # Kept in half precision, which halves the file; judged as it will be read.
    pipeline.transformer.eval().requires_grad_(False).half().float()
    print(f"{time.monotonic() - STARTED:.1f} s: trained", flush=True)
    if config.parts:
        pipeline.transformer.save_pretrained(config.parts, max_shard_size="12MB")
        told = json.dumps(facts, indent=1)
        (config.parts / "training.json").write_text(told, encoding="utf-8")
    rows = alignment(
        pipeline,
        config.num_images,
        steps=config.sampling_steps,
        guidance=config.guidance_scale,
        sheet=config.work / "sheet.png",
    )
    for row in rows:
        print(row["prompt"], row["attribute_alignment"], row["category_alignment"])
    print(f"{time.monotonic() - STARTED:.1f} s: judged:", _short(rows), flush=True)
    write_pipeline(pipeline.to("cpu"), config, card(pipeline, config, facts, rows))
    write_csv(config.out / "alignment.csv", rows)
    (config.out / "training.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    print(f"{time.monotonic() - STARTED:.1f} s: pipeline written to {config.out}", flush=True)
    if config.sweep and (judged := sweep(pipeline.to(device), config)):
        write_csv(config.work / "sweep.csv", judged)


if __name__ == "__main__":
    main(tyro.cli(FlowConfig))
