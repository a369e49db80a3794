"""Pictures of every method, with and without SuDe, on one drawn subject and seed.

    python -m studies.gallery --out data/results/methods.png

The pictures are the first ones of the runs of `data/grids/held_out.yaml`; what is missing of that
grid is swept first.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure
from PIL import Image

from studies import runs
from sude_lab.evaluate.metrics import MEASURES
from sude_lab.io.files import atomic_write
from sude_lab.view import plots


@dataclass(frozen=True)
class GalleryConfig:
    """Which subject to draw with the methods of the held-out study."""

    out: Path
    """PNG file of the figure."""
    grid: str = "held_out"
    subject: str = "held-out-0-dog"
    seed: int = 0
    run: bool = True
    """Sweep what is missing of the grid first."""
    sweeps: Path = runs.SWEEPS
    """Folder of the sweeps."""


def gallery(config: GalleryConfig) -> Figure:
    """Return the figure: a row a (method, variant) with its alignment, a column an attribute."""
    if config.run:
        runs.run(config.grid, out=config.sweeps)
    (plan,) = runs.plans(config.grid, config.sweeps)
    rows: dict[str, dict[str, list[Image.Image]]] = {}
    for job in plan.jobs:
        if (job.label["subject"], job.config.seed) != (config.subject, config.seed):
            continue
        pictures: dict[str, list[Image.Image]] = {}
        alignments = []
        for row, picture in runs.rows_of(plan, job):
            pictures.setdefault(row["attribute"] or "as tuned", []).append(picture)
            alignments.append(row[MEASURES[0]])
        method, variant = job.config.method.replace("_", " "), runs.variant(job.config, named=True)
        rows[f"{method}\n{variant}: {np.nanmean(alignments):.2f}"] = pictures
    figure = Figure(figsize=(9.5, 0.98 * len(rows) + 0.35), layout="constrained")
    plots.picture_table(figure.subplots(), rows)
    return figure


if __name__ == "__main__":
    chosen = tyro.cli(GalleryConfig)
    figure = gallery(chosen)
    with atomic_write(chosen.out) as path:
        figure.savefig(path, dpi=100, bbox_inches="tight")
