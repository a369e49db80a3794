"""Where on t, and in which direction, does SuDe lose the subject? (exploration, fair.md)

    python -m studies.where                data/results/where.csv and where.png

Runs of `python -m studies.fair --on development` are asked of noised copies of their own picture:
how wrong is the noise they predict, and how much of the error lies along the category's guidance
direction d, in which alone SuDe pushes?
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import tyro
from torch import Tensor

from studies.fair import grid_file
from studies.runs import SWEEPS
from sude_lab.backbone import Backbone
from sude_lab.classify.probe import answers
from sude_lab.evaluate.statistics import mean_interval
from sude_lab.evaluate.stored import RESULTS
from sude_lab.io.files import atomic_write
from sude_lab.prompts import photo_of
from sude_lab.runs.folder import Run
from sude_lab.sweep.grid import make_plan, read_grid
from sude_lab.sweep.sweep import fresh_backbone

WEIGHTS, STEPS = (0.0, 1.0, 2.0), (25, 100, 200)
TIMES = range(25, 1000, 50)
NOISES = 16


def error_rows(tuned: Backbone, frozen: Backbone, run: Run) -> Iterator[dict[str, float]]:
    """Yield a row a t, means over noises: the error's mean square, and what of it lies along d."""
    pictures, category = [run.picture()] * NOISES, photo_of(run.config.category)
    prompt = run.prompt("photo of a {S*} " + run.config.category)
    predicted, eps = outputs(tuned, pictures, [prompt])
    frozen_outputs, _ = outputs(frozen, pictures, [category, ""])
    subject, (of_class, null) = predicted[:, :, 0], frozen_outputs.unbind(2)
    d, error, dims = of_class - null, subject - eps[:, :, 0], subject[0, 0].numel()
    length = d.square().sum(-1)
    along = (error * d).sum(-1).square() / length
    rho = ((subject - null) * d).sum(-1) / length
    for k, t in enumerate(TIMES):
        values = {"loss": error.square().sum(-1) / dims, "along_d": along / dims, "rho": rho}
        yield {"t": t} | {name: value[:, k].mean().item() for name, value in values.items()}


def outputs(model: Backbone, pictures: list[Any], prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Return predicted and true noise, (noises, times, prompts, dimensions)."""
    batches = list(answers(model, pictures, prompts, TIMES))
    shape = len(pictures), len(TIMES), len(prompts), -1
    predicted, noise = [b.noise for b in batches], [b.eps for b in batches]
    return torch.cat(predicted).reshape(shape), torch.cat(noise).reshape(shape)


def figure(table: pd.DataFrame, path: Path) -> None:
    """Draw loss and rho over t, a line a (w_s, step): means over subjects."""
    import matplotlib.pyplot as plt

    means = table.groupby(["w_s", "step", "t"])[["loss", "along_d", "rho"]].mean()
    fig, axes = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained", dpi=160)
    titles = {"loss": "error of the noise", "along_d": "its part along d", "rho": "rho"}
    styles = dict(zip(STEPS, (":", "--", "-"), strict=True))
    for ax, (name, title) in zip(axes, titles.items(), strict=True):
        for w_s, colour in zip(WEIGHTS, ("tab:grey", "tab:orange", "tab:red"), strict=True):
            for step, style in styles.items():
                label = f"w_s {w_s:g}, {step} steps" if name == "rho" else None
                means.loc[w_s, step][name].plot(ax=ax, color=colour, ls=style, label=label)
        ax.set(title=title, xlabel="t", yscale="linear" if name == "rho" else "log")
    axes[2].axhline(1, color="black", lw=0.5)
    fig.legend(*axes[2].get_legend_handles_labels(), loc="outside lower center", ncol=9, fontsize=6)
    with atomic_write(path) as file:
        fig.savefig(file, format="png")
    plt.close(fig)


def added(table: pd.DataFrame) -> pd.DataFrame:
    """Return what SuDe adds to the errors after the last step: paired by subject, Student's t."""
    last = table[table["step"] == max(STEPS)]
    means = last.groupby(["subject", "w_s"])[["loss", "along_d"]].mean().unstack("w_s")
    return pd.DataFrame(
        {"w_s": w_s, "of": name, "plain": f"{means[name][0.0].mean():.5f}"}
        | {"added": mean_interval((means[name][w_s] - means[name][0.0]).to_numpy()).words("+.5f")}
        for name, w_s in product(("loss", "along_d"), WEIGHTS[1:])
    )


@dataclass(frozen=True)
class WhereConfig:
    """Where the runs are."""

    out: Path = SWEEPS
    """Folder of the sweeps of `studies.fair`."""


def main(config: WhereConfig) -> pd.DataFrame:
    """Ask the runs of the development subjects, and keep the table and the figure."""
    folder = config.out / "fair"
    rows = []
    for arm in ("plain", "sude"):
        grid = read_grid(grid_file(arm, "development", folder / "development"))
        for job in make_plan(grid, folder / "development" / arm, folder / "runs").jobs:
            w_s = job.config.weight_sude
            for step in STEPS if w_s in WEIGHTS else ():
                run = Run.open(f"{folder / 'runs' / job.key}@{step}")
                frozen = fresh_backbone(job.config)
                tuned = run.load(backbone=frozen.copy())
                about = {"subject": job.label["subject"], "w_s": w_s, "step": step}
                rows += [about | row for row in error_rows(tuned, frozen, run)]
    table = pd.DataFrame(rows)
    with atomic_write(RESULTS / "where.csv") as path:
        table.round(6).to_csv(path, index=False)
    figure(table, RESULTS / "where.png")
    return table


if __name__ == "__main__":
    print(added(main(tyro.cli(WhereConfig))).to_string(index=False))
