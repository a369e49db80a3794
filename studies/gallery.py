"""Pictures of every method, with and without SuDe, on one drawn subject and seed.

    python -m studies.gallery --out data/results/methods.png

Subject, seed and noise are those of `sude_lab.world.subjects`: the pictures are the first ones
of the study's runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from matplotlib.figure import Figure
from PIL import Image
from tqdm.auto import tqdm

from sude_lab.backbone import Backbone
from sude_lab.config import EMBEDDED
from sude_lab.io.files import atomic_write
from sude_lab.io.opening import open_backbone
from sude_lab.methods import METHODS
from sude_lab.tuning import TuningConfig
from sude_lab.view import plots
from sude_lab.world import subjects as study
from sude_lab.world.oracle import Oracle, load_oracle


@dataclass(frozen=True)
class GalleryConfig:
    """Which subject to draw with which methods."""

    out: Path
    """PNG file of the figure."""
    subjects: Literal["development", "held-out"] = "held-out"
    number: int = 0
    methods: tuple[str, ...] = tuple(METHODS)
    seed: int = 0
    num_images: int = 8
    """Pictures an attribute that are judged; the first two are shown."""
    settings: str = ""
    """Settings for every run, such as 'max_train_steps=100'."""


def gallery(config: GalleryConfig, base: Backbone, oracle: Oracle) -> Figure:
    """Return the figure: a row a (method, variant) with its alignment, a column an attribute."""
    who = study.subject(config.subjects, config.number)
    pairs = [(method, v) for method in config.methods for v in (study.PLAIN, study.SUDE)]
    rows: dict[str, dict[str, list[Image.Image]]] = {}
    for method, variant in tqdm(pairs, desc="gallery", unit="run"):
        tuning = TuningConfig(
            image=Path(f"{who.name}.png"),
            category=who.scene.category,
            method=method,
            seed=config.seed,
            **study.STORED | study.parse_settings(config.settings) | variant.settings,
        )
        grids: dict[str, list[Image.Image]] = {}
        told = study.tune_and_measure(
            base, oracle, who, tuning, num_images=config.num_images, grids=grids
        )
        alignment = np.mean([row["attribute_alignment"] for row in told if row["attribute"]])
        rows[f"{method.replace('_', ' ')}\n{variant.name}: {alignment:.2f}"] = grids
    figure = Figure(figsize=(9.5, 0.98 * len(rows) + 0.35), layout="constrained")
    plots.picture_table(figure.subplots(), rows)
    return figure


if __name__ == "__main__":
    chosen = tyro.cli(GalleryConfig)
    figure = gallery(chosen, open_backbone(EMBEDDED), load_oracle())
    with atomic_write(chosen.out) as path:
        figure.savefig(path, dpi=100, bbox_inches="tight")
