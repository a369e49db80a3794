"""Does SuDe beat less tuning? The registered comparison (data/grids/fair.md).

    python -m studies.fair --arms plain sude     the held-out subjects; no --arms: all arms
    python -m studies.fair --on development      the subjects on which everything was chosen

Each arm is a grid of `data/grids/fair/`. What is missing is swept on every core; the command may be
stopped and given again. Then the rows, a subject's mean a strength, are kept in
`data/results/fair.csv` (or fair_development.csv).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
import tyro
import yaml

from studies.runs import GRIDS, SWEEPS
from sude_lab.errors import UserError
from sude_lab.evaluate.stored import RESULTS
from sude_lab.io.files import atomic_write
from sude_lab.sweep.bench import subject_rows
from sude_lab.sweep.sweep import sweep

SUBJECTS = {
    "held-out": "held-out " + " ".join(map(str, range(100, 136))),
    "development": "development " + " ".join(map(str, range(100, 106))),
}
"""Held-out: four subjects a category, whom nobody had looked at before fair.md was committed.
Development: six others, who chose everything in it."""
On = Literal["held-out", "development"]
FILES = {"held-out": "fair", "development": "fair_development"}
"""The stored table of each."""
ARMS = ("plain", "sude", "drawn")
"""The first stage, which decides the question."""
TRIED = ("lazy",)
"""On the development subjects alone."""


def grid_file(arm: str, on: On, folder: Path) -> Path:
    """Write an arm's grid for one of the two groups of subjects into a folder; return the file."""
    grid = yaml.safe_load((GRIDS / "fair" / f"{arm}.yaml").read_text(encoding="utf-8"))
    with atomic_write(folder / f"{arm}.yaml") as path:
        path.write_text(yaml.safe_dump(grid | {"subjects": [SUBJECTS[on]]}), encoding="utf-8")
    return folder / f"{arm}.yaml"


def run(arm: str, on: On, *, workers: int, out: Path = SWEEPS) -> None:
    """Sweep what is missing of an arm, a thread a process.

    Raises:
        UserError: a run failed.
    """
    folder, runs = out / "fair" / on, out / "fair" / "runs"
    failed = sweep(grid_file(arm, on, folder), folder / arm, runs=runs, workers=workers)
    if failed:
        key, reason = next(iter(failed.items()))
        raise UserError(f"{len(failed)} runs of {arm} failed, {key} because: {reason}")


@dataclass(frozen=True)
class FairConfig:
    """Which arms to run, and on whom."""

    arms: tuple[str, ...] = ARMS
    on: On = "held-out"
    run: bool = True
    """Sweep what is missing first."""
    workers: int = os.cpu_count() or 1
    """Processes, one thread each."""
    out: Path = SWEEPS
    """Folder of the sweeps."""


def main(config: FairConfig) -> pd.DataFrame:
    """Sweep the arms one after another, and keep the subjects' means of all that are finished."""
    for arm in config.arms if config.run else ():
        run(arm, config.on, workers=config.workers, out=config.out)
    folders = {arm: config.out / "fair" / config.on / arm for arm in config.arms}
    table = pd.concat([subject_rows(arm, f) for arm, f in folders.items()], ignore_index=True)
    with atomic_write(RESULTS / f"{FILES[config.on]}.csv") as path:
        table.round(5).to_csv(path, index=False)
    return table


if __name__ == "__main__":
    main(tyro.cli(FairConfig))
