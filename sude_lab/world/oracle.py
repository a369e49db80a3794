"""The oracle of the embedded world: one small network that names everything a picture shows.

It is trained on drawings, whose truth is known, and on the same drawings as the embedded
autoencoder renders them with a little latent noise, so that it reads the sampler's pictures too.

    python -m sude_lab.world.oracle --work build/toy --pipeline data/embedded --out data/oracle
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from sude_lab.errors import UserError
from sude_lab.io.files import replaced_folder, save_tensors
from sude_lab.io.opening import data_folder
from sude_lab.world import dataset
from sude_lab.world import drawing as world

ALL_ATTRIBUTES = tuple(dict.fromkeys(a for values in world.ATTRIBUTES.values() for a in values))
HEADS: dict[str, tuple[str, ...]] = {
    "category": world.CATEGORIES,
    "attribute": ALL_ATTRIBUTES,
    "background": ("none", *world.BACKGROUNDS),
    "companion": ("none", *world.COMPANIONS),
    "colour": tuple(world.COLOURS),
    "second": tuple(world.COLOURS),
    "pattern": world.PATTERNS,
    "accent": ("none", *world.ACCENTS),
}
LOOK = ("colour", "second", "pattern", "accent")


def labels(scene: world.Scene) -> dict[str, int]:
    """Return the truth of a scene as class indices; -1 where the picture does not show it.

    A plain look shows no second colour; gold and metal hide the first.
    """
    look = scene.look
    truth = {
        "category": scene.category,
        "attribute": scene.attribute,
        "background": scene.background or "none",
        "companion": scene.companion or "none",
        "colour": look.colour if scene.attribute not in ("golden", "metal") else None,
        "second": look.second if look.pattern != "plain" else None,
        "pattern": look.pattern,
        "accent": look.accent or "none",
    }
    return {k: -1 if v is None else HEADS[k].index(v) for k, v in truth.items()}


class Oracle(nn.Module):
    """A convolutional classifier with one head for each thing a picture shows."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        w = width
        self.features = nn.Sequential(
            *(_block(3, w)),
            *(_block(w, 2 * w)),
            *(_block(2 * w, 3 * w)),
            *(_block(3 * w, 4 * w)),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(4 * w * (world.RESOLUTION // 16) ** 2, 8 * w),
            nn.SiLU(),
        )
        self.heads = nn.ModuleDict({k: nn.Linear(8 * w, len(v)) for k, v in HEADS.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the logits of every head for pictures (B, 3, 64, 64) in [-1, 1]."""
        h = self.features(x)
        return {name: head(h) for name, head in self.heads.items()}

    @torch.no_grad()
    def read(self, images: list[Image.Image] | Tensor) -> dict[str, Tensor]:
        """Return the probabilities (B, classes) of every head, in evaluation mode."""
        if not isinstance(images, Tensor):
            side = world.RESOLUTION
            arrays = [np.asarray(i.convert("RGB").resize((side, side))) for i in images]
            images = dataset.to_tensor(np.stack(arrays))
        self.eval()
        return {name: logits.softmax(-1) for name, logits in self(images).items()}


def _block(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(inputs, outputs, 3, stride=2, padding=1),
        nn.GroupNorm(8, outputs),
        nn.SiLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1, groups=8),
        nn.SiLU(),
    )


@dataclass(frozen=True)
class Reading:
    """What the oracle says of a set of pictures, per picture (B,), each between 0 and 1."""

    attribute_alignment: Tensor
    """Probability of the attribute among the attributes its category can have."""
    category_alignment: Tensor
    """Probability of the category."""
    subject_fidelity: Tensor
    """Mean probability of the parts of the private look that a picture can show."""
    background_alignment: Tensor
    """Probability of the background (of none, where none is asked for)."""


def judge(
    oracle: Oracle,
    images: list[Image.Image],
    scene: world.Scene,
    attribute: str | None = None,
    background: str | None = None,
) -> Reading:
    """Judge pictures that should show `scene`'s subject; attribute, background: its own if None."""
    attribute = attribute or scene.attribute
    where = HEADS["background"].index(background or scene.background or "none")
    seen = oracle.read(images)
    allowed = [ALL_ATTRIBUTES.index(a) for a in world.ATTRIBUTES[scene.category]]
    wanted = world.ATTRIBUTES[scene.category].index(attribute)
    among = seen["attribute"][:, allowed]
    among = among / among.sum(-1, keepdim=True).clamp_min(1e-12)
    truth = labels(world.replace(scene, attribute=attribute))
    look = [seen[part][:, truth[part]] for part in LOOK if truth[part] >= 0]
    return Reading(
        among[:, wanted],
        seen["category"][:, HEADS["category"].index(scene.category)],
        torch.stack(look).mean(0),
        seen["background"][:, where],
    )


def read_scene(oracle: Oracle, images: list[Image.Image], category: str) -> world.Scene:
    """Return what the oracle takes pictures of one subject to show: its attribute and its look.

    For subjects whose truth nobody wrote down. The parts of the look are read from the mean of the
    probabilities over the pictures; a part that they do not show is a guess.
    """
    seen = {name: p.mean(0) for name, p in oracle.read(images).items()}
    allowed = world.ATTRIBUTES[category]
    index = [ALL_ATTRIBUTES.index(a) for a in allowed]
    best = {name: HEADS[name][int(p.argmax())] for name, p in seen.items()}
    others = seen["second"].clone()
    others[HEADS["second"].index(best["colour"])] = -1.0  # the second colour is another one
    accent = None if best["accent"] == "none" else best["accent"]
    second = HEADS["second"][int(others.argmax())]
    look = world.Look(best["colour"], second, best["pattern"], accent)
    return world.Scene(category, allowed[int(seen["attribute"][index].argmax())], look)


def load_oracle(folder: Path | None = None) -> Oracle:
    """Load the oracle from `data/oracle`, or from a folder.

    Raises:
        UserError: there is no oracle there.
    """
    folder = folder or data_folder() / "oracle"
    if not (folder / "oracle.safetensors").is_file():
        raise UserError(f"There is no oracle in {folder}: run from a clone of the repository.")
    with torch.random.fork_rng(devices=[]):  # new weights are drawn, then written over
        oracle = Oracle()
    oracle.load_state_dict(load_file(folder / "oracle.safetensors"))
    return oracle.eval().requires_grad_(False)


# --- training ---


@dataclass(frozen=True)
class OracleConfig:
    """What the oracle is trained with."""

    work: Path = Path("build/toy")
    pipeline: Path = Path("data/embedded")
    out: Path = Path("data/oracle")
    num_pictures: int = 24_000
    steps: int = 2_200
    batch_size: int = 64
    learning_rate: float = 2e-3
    seed: int = 0
    held_out: int = 1_000


def _disturb(x: Tensor, generator: torch.Generator) -> Tensor:
    """Blur half of the pictures a little, shift brightness, add noise: what a sampler does."""
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    mix = torch.rand(len(x), 1, 1, 1, generator=generator)
    x = x + (blurred - x) * mix * (torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5)
    gain = 1 + 0.16 * (torch.rand(len(x), 3, 1, 1, generator=generator) - 0.5)
    strength = 0.12 * torch.rand(len(x), 1, 1, 1, generator=generator)
    return (x * gain + strength * torch.randn(x.shape, generator=generator)).clamp(-1, 1)


@torch.no_grad()
def _rendered(vae: Any, latents: Tensor, generator: torch.Generator) -> np.ndarray:
    """Decode latents with noise of up to 0.3 deviations, as uint8."""
    pictures = []
    for z in tqdm(latents.split(64), desc="decoding", unit="batch"):
        strength = 0.3 * torch.rand(len(z), 1, 1, 1, generator=generator)
        z = z + strength * torch.randn(z.shape, generator=generator)
        y = vae.decode(z / vae.config.scaling_factor).sample.clamp(-1, 1)
        pictures.append(((y + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
    return np.concatenate(pictures)


def train_oracle(config: OracleConfig) -> pd.DataFrame:
    """Train the oracle and write it with its table of held-out accuracies."""
    from diffusers import AutoencoderKL

    scenes = dataset.scenes(config.num_pictures, config.seed)
    pictures = dataset.render(
        scenes, config.work / f"pictures-{config.num_pictures}-{config.seed}.npy"
    )
    vae_folder = config.pipeline / "vae"
    vae = AutoencoderKL.from_pretrained(vae_folder, use_safetensors=True).eval()
    latents = torch.load(config.work / "latents.pt", weights_only=True)
    generator = torch.Generator().manual_seed(config.seed)
    number = min(12_000, len(latents))
    decoded = _rendered(vae, latents[:number], generator)
    truth = {k: torch.tensor([labels(s)[k] for s in scenes]) for k in HEADS}

    with torch.random.fork_rng(devices=[]):  # dropout draws from torch's own generator
        torch.manual_seed(config.seed)
        oracle = Oracle()
        optimizer = torch.optim.AdamW(
            oracle.parameters(), lr=config.learning_rate, weight_decay=1e-2
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, config.learning_rate, total_steps=config.steps
        )
        half = config.batch_size // 2
        with tqdm(range(config.steps), desc="oracle", unit="step") as bar:
            for step in bar:
                index = torch.randint(len(pictures), (half,), generator=generator)
                again = torch.randint(number, (half,), generator=generator)
                x = np.concatenate([pictures[index.numpy()], decoded[again.numpy()]])
                index = torch.cat([index, again])
                out = oracle(_disturb(dataset.to_tensor(x), generator))
                loss = torch.stack(
                    [
                        F.cross_entropy(
                            out[k], truth[k][index], ignore_index=-1, label_smoothing=0.02
                        )
                        for k in HEADS
                    ]
                ).sum()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                if step % 20 == 0:
                    bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)

    held = [
        world.sample_scene(random.Random(f"held-out-{config.seed}-{k}"))
        for k in range(config.held_out)
    ]
    drawings = dataset.to_tensor(dataset.render(held))
    with torch.no_grad():
        z = torch.cat([vae.encode(x).latent_dist.mean for x in drawings.split(64)])
    z = z * vae.config.scaling_factor
    sets = {"drawings": drawings, "decoded": dataset.to_tensor(_rendered(vae, z, generator))}
    table = pd.DataFrame(
        {name: _accuracy(oracle, x, held) for name, x in sets.items()}, index=list(HEADS)
    )
    with replaced_folder(config.out) as folder:
        save_tensors(oracle.state_dict(), folder / "oracle.safetensors")
        table.round(4).to_csv(folder / "held_out_accuracy.csv", index_label="head")
        (folder / "training.json").write_text(
            json.dumps({k: str(v) for k, v in vars(config).items()}, indent=2)
        )
    return table


def _accuracy(oracle: Oracle, pictures: Tensor, scenes: list[world.Scene]) -> list[float]:
    seen = oracle.read(pictures)
    result = []
    for name in HEADS:
        truth = torch.tensor([labels(s)[name] for s in scenes])
        shown = truth >= 0
        result.append((seen[name].argmax(-1)[shown] == truth[shown]).float().mean().item())
    return result


if __name__ == "__main__":
    print(train_oracle(tyro.cli(OracleConfig)))
