"""How well the classifier inside the embedded model names drawings, and what pruning saves.

    python -m studies.classify --out data/results/classify.csv
    python -m studies.classify --backbone embedded-flow --num-pictures 200 --num-pairs 20 \\
        --beside data/results/classify.csv --out data/results/classify_flow.csv

writes the table and, beside it, the report `classify.md`; with `--beside` another model's answers
to the same drawings are compared. Drawings follow from (group, number)
alone: "development" ones chose the settings, "reported" ones are reported. Each shows one of 20
prompts (every second attribute of the 9 categories) in turn, with a look, background and companion
of its own. Asked are

- "attributes": the 20 prompts, "photo of a running dog", ...: all pairs (t, eps), and `pruned`, the
  rule of `sude_lab.classify.implicit` replayed on the same pairs, as the same answers would have
  led it, with more and with less caution, too; and `first pairs`, all prompts with as many pairs
  as the evaluations of pruning would have paid for, rounded up;
- "categories": the 9 prompts "photo of a dog", ... at a grid of t, all together (`all pairs`), and
  eq. 5 of arXiv 2403.06775 at each t alone: `one step` with x_{t-1} drawn from
  q(x_{t-1} | x_t, x_0), `one step, mean` with x_{t-1} at that distribution's mean;
- the oracle, on the same drawings, among the same prompts.

Finished drawings are never asked again: give the command again to continue. (No run is tuned here,
so there is no grid to sweep.) The tables are those of `studies/classify_tables.py`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
import tyro
from tqdm.auto import tqdm

from studies.classify_tables import beside, report
from studies.naming import SHOWN, Weighting, name_attributes, name_by_oracle, name_categories
from sude_lab.config import EMBEDDED
from sude_lab.errors import UserError
from sude_lab.io.files import atomic_write
from sude_lab.io.opening import open_backbone
from sude_lab.world import drawing as world
from sude_lab.world.oracle import load_oracle


@dataclass(frozen=True)
class ClassifyConfig:
    """Which drawings to name, and with how many pairs."""

    out: Path
    """CSV file of the results; drawings that are there are not asked again."""
    num_pictures: int = 500
    group: Literal["development", "reported"] = "reported"
    num_pairs: int = 10
    """Pairs for each of the 20 prompts."""
    num_times: int = 6
    """Timesteps of the grid for the 9 categories, one pair each; 0 leaves them out."""
    weighting: Weighting = "elbo"
    seed: int = 0
    """Seed of the noise."""
    device: str = "auto"
    backbone: str = EMBEDDED
    beside: Path | None = None
    """Table of another model: its answers to the same drawings stand beside these."""


def scene(group: str, number: int) -> world.Scene:
    """Return drawing `number` of a group: category and attribute in turn, the rest at random."""
    rng = random.Random(f"classify-{group}-{number}")
    category, attribute = SHOWN[number % len(SHOWN)]
    return replace(world.sample_scene(rng, category), attribute=attribute)


def run_study(config: ClassifyConfig, chunk: int = 5) -> pd.DataFrame:
    """Name the drawings that are missing, keep every result at once, return all rows."""
    table = pd.read_csv(config.out) if config.out.is_file() else pd.DataFrame()
    done = set(table["picture"]) if len(table) else set()
    missing = [k for k in range(config.num_pictures) if k not in done]
    if config.num_pairs < 2 or config.num_times == 1:
        raise UserError("--num-pairs must be at least 2, and --num-times 0 or at least 2.")
    if not missing:
        return table
    backbone, oracle = open_backbone(config.backbone, device=config.device), load_oracle()
    backbone.denoiser.to(memory_format=torch.channels_last)  # a sixth faster on a CPU
    with tqdm(total=len(missing), desc="naming", unit="picture") as bar:
        for start in range(0, config.num_pictures, chunk):
            numbers = range(start, min(start + chunk, config.num_pictures))
            if not set(numbers) & set(missing):
                continue
            pictures = [world.draw(scene(config.group, k)) for k in numbers]
            how: dict[str, Any] = {"weighting": config.weighting, "seed": config.seed}
            about = backbone, pictures, start
            rows = name_by_oracle(oracle, pictures, start)
            rows += name_attributes(*about, num_pairs=config.num_pairs, **how)
            if config.num_times:
                rows += name_categories(*about, num_times=config.num_times, **how)
            rows = [row for row in rows if row["picture"] not in done]
            table = pd.concat([table, pd.DataFrame(rows)], ignore_index=True)
            with atomic_write(config.out) as path:
                table.to_csv(path, index=False)
            bar.update(len(set(numbers) - done))
    return pd.read_csv(config.out)


def main(config: ClassifyConfig) -> None:
    """Run what is missing, write the report beside the table and print it."""
    table, text = run_study(config), ""
    if config.beside:
        text = beside(table, pd.read_csv(config.beside), str(config.beside))
    text = report(table) + text
    with atomic_write(config.out.with_suffix(".md")) as path:
        path.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main(tyro.cli(ClassifyConfig))
