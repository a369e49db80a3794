"""Train the oracle of the embedded world, on drawings and on what the autoencoder makes of them.

python -m studies.embedded.oracle --work build/toy --pipeline data/embedded --out data/oracle
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
from torch import Tensor
from tqdm.auto import tqdm

from studies.embedded import dataset
from sude_lab.io.files import atomic_write, save_tensors
from sude_lab.world import drawing as world
from sude_lab.world.oracle import HEADS, Oracle, labels, to_tensor


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
                out = oracle(_disturb(to_tensor(x), generator))
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
    drawings = to_tensor(dataset.render(held))
    with torch.no_grad():
        z = torch.cat([vae.encode(x).latent_dist.mean for x in drawings.split(64)])
    z = z * vae.config.scaling_factor
    sets = {"drawings": drawings, "decoded": to_tensor(_rendered(vae, z, generator))}
    table = pd.DataFrame(
        {name: _accuracy(oracle, x, held) for name, x in sets.items()}, index=list(HEADS)
    )
    with atomic_write(config.out / "oracle.safetensors") as path:
        save_tensors(oracle.state_dict(), path)
    with atomic_write(config.out / "held_out_accuracy.csv") as path:
        table.round(4).to_csv(path, index_label="head")
    with atomic_write(config.out / "training.json") as path:
        path.write_text(json.dumps({k: str(v) for k, v in vars(config).items()}, indent=2))
    return table


def _accuracy(oracle: Oracle, pictures: Tensor, scenes: list[world.Scene]) -> list[float]:
    probabilities = oracle.read(pictures)
    result = []
    for name in HEADS:
        truth = torch.tensor([labels(s)[name] for s in scenes])
        shown = truth >= 0
        result.append((probabilities[name].argmax(-1)[shown] == truth[shown]).float().mean().item())
    return result


if __name__ == "__main__":
    print(train_oracle(tyro.cli(OracleConfig)))
