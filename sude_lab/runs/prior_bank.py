"""A prior bank: what the model before tuning says of N pairs (t, noise), asked once for many runs.

SuDe's prior `pretrained` is two predictions a step, eps_class and eps_uncond, of a model that never
changes. Both follow from (t, noise): they are asked once for N pairs, from which a step draws:

    bank = open_bank(config, backbone, "dog", picture, (mean, deviation))    # config.prior_bank = N
    x_0, eps, t = bank.pairs.batch(index)                                    # the step's samples
    uncond, category = bank.outputs(index).unbind(1)                         # its prior

Kept in half precision are the null prediction and the *direction* d = category - null: SuDe's
gradient is along d (`sude_lab.losses`), which is small beside both predictions, so that the
difference of two rounded ones would lose digits. A bank takes 4 C h w bytes a pair on the disk and
in memory, 64 KiB for a latent of Stable Diffusion at 512 pixels; the pairs take none, because pair
k is drawn anew from its seed and k.

In float32 both predictions are kept, asked a pair at a time as a step of one sample asks: the
losses of a run with `train_batch_size` 1 are those of asking in every step bit for bit, those of
larger batches to rounding.

Banks lie in the cache (`class_images.cache_folder`), named by a hash of all that they follow from;
runs that differ in anything else (method, w_s, learning rates) share one.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm.auto import tqdm

from sude_lab.backbone import Backbone, Condition
from sude_lab.config import CompleteConfig
from sude_lab.diffusion import add_noise
from sude_lab.draws import Batch, Density, Latents, draw_subjects, place_of, side_of
from sude_lab.io.files import atomic_write, locked, save_tensors
from sude_lab.io.identity import digest, hash_of
from sude_lab.prompts import photo_of
from sude_lab.runs.class_images import fingerprint, place_in_cache
from sude_lab.sude import ask

FORMAT = 1
"""Changes with the way in which pairs are drawn or kept, so that no older bank is taken."""
PAIRS_AT_ONCE = 8
"""Pairs in one call of the UNet while a half-precision bank is built: 16 rows, no gradients."""
_WAIT = 2.0  # seconds before a bar is shown


@dataclass(frozen=True)
class Pairs:
    """N pairs of a timestep and noise for one picture, numbered from 0.

    Pair k is a draw of the picture's latent (which mirror image, and the encoder's deviation), of
    eps and of t, from a generator of its own. Its t is drawn from the k-th of N equal parts of the
    density of t, so that a small bank has early and late ones too.
    """

    mean: Tensor
    """Means of the latents, (K, C, h, w): the picture's, and its mirror image's where K = 2."""
    deviation: Tensor
    number: int
    num_timesteps: int
    seed: int
    density: Density = "uniform"

    def pair(self, k: int) -> tuple[Tensor, Tensor, int]:
        """Return x_0 and eps, (C, h, w) each, and t of pair k."""
        # CPU generators read 32 bits of a seed: hashed, so that they are not those of the steps.
        bits = hashlib.blake2b(f"pair {k} of seed {self.seed}".encode(), digest_size=4).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(bits, "big"))
        within = torch.rand((), generator=generator, dtype=torch.float64).item()
        share = torch.tensor((k + within) / self.number, dtype=torch.float64)
        place = place_of(share, self.density).item()
        t = min(int(place * self.num_timesteps), self.num_timesteps - 1)
        pick = int(torch.randint(len(self.mean), (), generator=generator))
        noise = torch.randn((2, *self.mean.shape[1:]), generator=generator)
        return self.mean[pick] + self.deviation[pick] * noise[0], noise[1], t

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return x_0 and eps, (B, C, h, w) each, and t, (B,), of the pairs `index`, (B,)."""
        x_0, eps, t = zip(*map(self.pair, index.tolist()), strict=True)
        return torch.stack(x_0), torch.stack(eps), torch.tensor(t)


@dataclass(frozen=True)
class PriorBank:
    """The pairs, and what the model before tuning says of them."""

    pairs: Pairs
    kept: Mapping[str, Tensor]
    """`uncond`, and `direction` or `category`, (N, C, h, w) each; empty where all is asked live."""
    path: Path | None = None
    """The bank's file."""

    def __len__(self) -> int:
        return self.pairs.number

    def outputs(self, index: Tensor) -> Tensor:
        """Return the model outputs for no condition and for the category, (B, 2, C, h, w), float32.

        Raises:
            KeyError: nothing is kept.
        """
        uncond = self.kept["uncond"][index].float()
        if "category" in self.kept:
            return torch.stack([uncond, self.kept["category"][index]], dim=1)
        return torch.stack([uncond, uncond + self.kept["direction"][index].float()], dim=1)

    @property
    def num_bytes(self) -> int:
        """What the predictions take in memory, in bytes; the file has some hundred more."""
        return sum(x.numel() * x.element_size() for x in self.kept.values())


def open_bank(
    config: CompleteConfig,
    backbone: Backbone,
    category: str,
    picture: Image.Image,
    latents: Latents,
) -> PriorBank:
    """Read the bank of a picture and its category from the cache; build it where it is not there.

    Without SuDe nothing is asked, and nothing kept: the pairs alone, so that a plain run sees the
    samples that its like with SuDe sees. Who comes second waits for who builds it. A damaged file
    is built anew, with a line that says so.

    Args:
        config: The run's settings: `prior_bank` pairs in `prior_bank_dtype`.
        backbone: The model before tuning: no adapters, no new words.
        category: What the picture shows.
        picture: The picture that was encoded.
        latents: Mean and deviation of its latents, (K, C, h, w) each.

    Raises:
        UserError: the cache cannot be written or locked.
    """
    mean, deviation = latents
    schedule = backbone.schedule
    number = schedule.num_timesteps
    pairs = Pairs(mean, deviation, config.prior_bank, number, config.seed, backbone.density)
    if config.prior_bank_dtype == "live" or not config.with_sude:
        return PriorBank(pairs, {})
    about = _about(config, backbone, category, picture)
    path = place_in_cache("prior_banks", about, ".safetensors")
    with locked(path.with_suffix(".lock")):
        tensors = _read(path, about, pairs, config.prior_bank_dtype) if path.exists() else None
        if tensors is None:
            tensors = _build(config, backbone, category, pairs)
            # The latents go with them: a machine whose encoder rounds otherwise takes these.
            tensors |= {"mean": mean.contiguous(), "deviation": deviation.contiguous()}
            header = {"about": json.dumps(about), "sum": _sum(tensors)}
            with atomic_write(path) as temporary:
                save_tensors(tensors, temporary, metadata=header)
            what = f"The prior bank of {pairs.number:,} pairs takes"
            size = f"{path.stat().st_size / 2**20:.1f} MiB on the disk and in memory"
            tqdm.write(f"{what} {size}: {path}", file=sys.stderr)
    pairs = replace(pairs, mean=tensors.pop("mean"), deviation=tensors.pop("deviation"))
    return PriorBank(pairs, tensors, path)


@dataclass(frozen=True)
class BankDraws:
    """Draw pairs of the subjects' banks, each as likely as any other."""

    banks: Sequence[PriorBank]

    def draw(self, size: int, generator: torch.Generator) -> Batch:
        """Return `size` samples."""
        which = draw_subjects(len(self.banks), size, generator)
        index = torch.randint(len(self.banks[0]), (size,), generator=generator)
        drawn = zip(which.tolist(), index.split(1), strict=True)
        pairs = [self.banks[who].pairs.batch(k) for who, k in drawn]
        x_0, eps, t = map(torch.cat, zip(*pairs, strict=True))
        return Batch(x_0, eps, t, which, which * len(self.banks[0]) + index)


@dataclass(frozen=True)
class BankClassifier:
    """Answer eq. 5 for samples of `BankDraws` by what the banks keep; nothing is asked."""

    banks: Sequence[PriorBank]

    def __call__(self, x_t: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the model outputs for no condition and for the category, (B, C, h, w) each.

        Raises:
            ValueError: the samples are from no bank.
        """
        if batch.index is None:
            raise ValueError("These samples are from no bank: draw them with BankDraws.")
        size = len(self.banks[0])
        drawn = batch.index.split(1)
        outputs = torch.cat([self.banks[int(k) // size].outputs(k % size) for k in drawn])
        outputs = outputs.to(x_t.device, non_blocking=x_t.device.type == "cuda")
        return outputs[:, 0], outputs[:, 1]


def ask_pairs(
    backbone: Backbone, pairs: Pairs, index: Tensor, null: Condition, category: Condition
) -> tuple[Tensor, Tensor]:
    """Return the model outputs of pairs, (B, C, h, w), for no condition and for the category."""
    x_0, eps, t = (x.to(backbone.device) for x in pairs.batch(index))
    x_t = add_noise(x_0, eps, t, backbone.schedule)
    uncond_output, class_output = ask(backbone.predict, x_t, t, null, category)
    return uncond_output.cpu(), class_output.cpu()


def _build(
    config: CompleteConfig, backbone: Backbone, category: str, pairs: Pairs
) -> dict[str, Tensor]:
    half = config.prior_bank_dtype == "float16"
    with torch.no_grad():
        null = backbone.null_condition(config.resolution)
        photo = backbone.encode_prompts([photo_of(category)], config.resolution)
    uncond, second = [], []
    words = "asking the model before tuning"
    with tqdm(total=pairs.number, desc=words, unit="pair", delay=_WAIT) as bar:
        for index in torch.arange(pairs.number).split(PAIRS_AT_ONCE if half else 1):
            no_condition, conditional = ask_pairs(backbone, pairs, index, null, photo)
            uncond.append(no_condition.half() if half else no_condition)
            second.append((conditional - no_condition).half() if half else conditional)
            bar.update(len(index))
    kept = {"uncond": uncond, "direction" if half else "category": second}
    # A UNet in channels_last answers so, and safetensors takes what is contiguous alone.
    return {name: torch.cat(rows).contiguous() for name, rows in kept.items()}


def _about(
    config: CompleteConfig, backbone: Backbone, category: str, picture: Image.Image
) -> dict[str, Any]:
    """Return all that a bank follows from; where its files lie has no part in it."""
    pipeline, pixels = backbone.pipeline, picture.convert("RGB")
    settings = [dict(part.config) for part in (backbone.denoiser, pipeline.vae, pipeline.scheduler)]
    settings += [encoder.config.to_dict() for encoder in backbone.text_encoders.values()]
    # A pipeline's other settings name the classes of its parts.
    settings.append({k: v for k, v in pipeline.config.items() if isinstance(v, bool)})
    return {
        "format": FORMAT,
        "weights": fingerprint(backbone),
        "schedule": hash_of(backbone.schedule.alphas_cumprod.tolist()),
        # Without a part's class, its version and the place it was read from.
        "settings": hash_of(
            [{str(k): v for k, v in s.items() if not str(k).startswith("_")} for s in settings]
        ),
        "prompts": ["", photo_of(category)],
        # The words as the text encoder reads them, which is the tokenizer's part of the model.
        "tokens": [
            backbone.tokenize(["", photo_of(category)], tokenizer).tolist()
            for tokenizer in backbone.tokenizers
        ],
        "picture": digest(f"{pixels.size}".encode() + pixels.tobytes()),
        "resolution": side_of(config, backbone),
        **({"told": side_of(config, backbone)} if backbone.is_xl else {}),
        "horizontal_flip": config.horizontal_flip,
        "seed": config.seed,
        "number": config.prior_bank,
        "kept": config.prior_bank_dtype,
        "computed": f"{str(backbone.dtype).removeprefix('torch.')} on {backbone.device.type}",
    }


def _sum(tensors: Mapping[str, Tensor]) -> str:
    """Return a checksum of the tensors' bytes: safetensors knows a file's length and no more."""
    checksum = hashlib.blake2b(digest_size=8)
    for name in sorted(tensors):
        checksum.update(f"{name} {tuple(tensors[name].shape)}".encode())
        checksum.update(tensors[name].numpy().tobytes())
    return checksum.hexdigest()


def _read(
    path: Path, about: Mapping[str, Any], pairs: Pairs, dtype: str
) -> dict[str, Tensor] | None:
    """Return the tensors of a bank's file; None, and a word of it, where they are not whole."""
    shape = (pairs.number, *pairs.mean.shape[1:])
    second = "direction" if dtype == "float16" else "category"
    expected = {"uncond": shape, second: shape}
    expected |= dict.fromkeys(("mean", "deviation"), tuple(pairs.mean.shape))
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            # Copies: these are views of the file, and a run must not die with a file cut short.
            tensors = {k: file.get_tensor(k).clone() for k in file.keys()}  # noqa: SIM118
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        same = json.loads(header["about"]) == about and shapes == expected
        if same and header["sum"] == _sum(tensors):
            return tensors
    except (SafetensorError, OSError, KeyError, ValueError, TypeError):
        pass
    tqdm.write(f"The prior bank {path} is damaged: it is built anew.", file=sys.stderr)
    return None
