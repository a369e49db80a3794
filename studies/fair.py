"""Does SuDe beat less tuning? The registered comparisons (fair.md and others in data/grids).

    python -m studies.fair --arms plain sude     the held-out subjects; no --arms: all arms
    python -m studies.fair --on development      the subjects on which everything was chosen
    python -m studies.fair --on confirm          new subjects, for what the held-out ones suggest
    python -m studies.fair --on flow             the same question on the embedded flow model
    python -m studies.fair --on others           and of Custom Diffusion, Textual Inversion, ViCo
    python -m studies.fair --on preservation     class images and ClassDiffusion's term beside SuDe

Each arm is a grid of `data/grids/fair/`, `confirm/`, `flow/` or `others/`. What is missing is swept
on every core; the command may be stopped and given again. Then the rows, a subject's mean a
strength, go to the group's table, `data/results/fair.csv` or another one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import tyro
import yaml

from studies.registered import BACKGROUNDS, GROUPS, SAME, On
from studies.runs import GRIDS, SWEEPS
from sude_lab.errors import UserError
from sude_lab.evaluate.stored import RESULTS
from sude_lab.io.files import atomic_write
from sude_lab.sweep.bench import subject_rows
from sude_lab.sweep.sweep import sweep


def grid_file(arm: str, on: On, folder: Path) -> Path:
    """Write an arm's grid for a group of subjects into a folder; return the file."""
    group = GROUPS[on]
    grid = yaml.safe_load((GRIDS / group.page / f"{arm}.yaml").read_text(encoding="utf-8"))
    with atomic_write(folder / f"{arm}.yaml") as path:
        path.write_text(yaml.safe_dump(grid | {"subjects": [group.subjects]}), encoding="utf-8")
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

    arms: tuple[str, ...] = ()
    """None: all of the group."""
    on: On = "held-out"
    run: bool = True
    """Sweep what is missing first."""
    workers: int = os.cpu_count() or 1
    """Processes, one thread each."""
    out: Path = SWEEPS
    """Folder of the sweeps."""


def main(config: FairConfig) -> pd.DataFrame:
    """Sweep the arms one after another, and keep the subjects' means of all that are finished."""
    group = GROUPS[config.on]
    arms = config.arms or group.arms
    for arm in arms if config.run else ():
        run(arm, config.on, workers=config.workers, out=config.out)
    folder = config.out / "fair" / config.on
    tables = []
    for arm in (arm for arm in arms if not arm.endswith(BACKGROUNDS)):
        rows = subject_rows(arm, folder / arm)
        if arm + BACKGROUNDS in arms:
            about = folder / (arm + BACKGROUNDS), ["background_alignment"], "background"
            more = subject_rows(arm, *about)[[*SAME, "background_alignment"]]
            rows = rows.merge(more, how="left", on=SAME, validate="one_to_one")
        tables.append(rows)
    table = pd.concat(tables, ignore_index=True)
    with atomic_write(RESULTS / f"{group.table}.csv") as path:
        table.round(5).to_csv(path, index=False)
    return table


if __name__ == "__main__":
    main(tyro.cli(FairConfig))
