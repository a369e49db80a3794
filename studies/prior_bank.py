"""Banks of SuDe's questions by their size: what the pictures say, and what was learnt by heart.

    python -m studies.prior_bank

sweeps and keeps the grid `data/grids/prior_bank.yaml` (`studies.runs`), and adds to every row the
tuned model's loss on the noise of its own bank, `loss_seen`, and on new noise, `loss_new`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
import tyro
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from studies import runs
from sude_lab.backbone import Backbone
from sude_lab.config import CompleteConfig
from sude_lab.diffusion import add_noise, training_target
from sude_lab.draws import picture_latents
from sude_lab.evaluate.stored import RESULTS
from sude_lab.io.files import atomic_write
from sude_lab.losses import subject_loss
from sude_lab.methods import get_method
from sude_lab.prompts import fill
from sude_lab.runs.folder import Run
from sude_lab.runs.prior_bank import Pairs
from sude_lab.sweep.sweep import fresh_backbone
from sude_lab.world.subjects import KEYS


@torch.no_grad()
def noise_errors(
    backbone: Backbone, config: CompleteConfig, picture: Image.Image, *, number: int = 256
) -> dict[str, float]:
    """Return the tuned model's loss of eq. 2 on the pairs of its prior bank, and on new ones.

    The new ones have the bank's timesteps, and noise of their own. Where a run had no bank all are
    new: that the two are alike then says how much chance there is in them.
    """
    schedule = backbone.schedule
    mean, deviation = picture_latents(config, backbone, picture)
    size = config.prior_bank or number
    pairs = Pairs(mean, deviation, size, schedule.num_timesteps, config.seed)
    others = replace(pairs, number=number, seed=config.seed + 1)
    template = config.prompt or get_method(config.method).template
    prompt = fill(template.replace("{category}", config.category), config.token)
    condition = backbone.encode_prompts([prompt])
    losses: dict[str, list[Tensor]] = {"loss_seen": [], "loss_new": []}
    for index in torch.arange(number).split(16):
        x_0, eps, t = pairs.batch((index * size).div(number, rounding_mode="floor"))
        new_x_0, new_eps, _ = others.batch(index)
        for name, latent, noise in (("loss_seen", x_0, eps), ("loss_new", new_x_0, new_eps)):
            x_t = add_noise(latent, noise, t, schedule)
            output = backbone.predict(x_t, t, condition.expand(len(t)))
            target = training_target(latent, noise, t, schedule)
            losses[name].append(subject_loss(output, target) / noise[0].numel())
    return {name: round(torch.cat(values).mean().item(), 5) for name, values in losses.items()}


@dataclass(frozen=True)
class BankConfig:
    """How to make the study of banks anew."""

    run: bool = True
    """Sweep what is missing first."""
    workers: int = 2
    """Processes, one thread each."""
    out: Path = runs.SWEEPS
    """Folder of the sweeps."""


def main(config: BankConfig) -> None:
    """Sweep, keep, and add both losses of every run to the stored rows."""
    table = runs.main(runs.RunsConfig("prior_bank", config.run, config.workers, config.out))
    rows = []
    (plan,) = runs.plans("prior_bank", config.out)
    for job in tqdm(plan.jobs, desc="losses", unit="run"):
        run = Run.open(plan.runs / job.key)
        backbone = run.load(backbone=fresh_backbone(run.config))
        errors = noise_errors(backbone, job.config, run.picture())
        rows.append(runs.run_key(job, named=True) | errors)
    table = table.merge(pd.DataFrame(rows), on=KEYS)
    with atomic_write(RESULTS / "prior_bank.csv") as path:
        table.to_csv(path, index=False)


if __name__ == "__main__":
    main(tyro.cli(BankConfig))
