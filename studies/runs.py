"""From a grid file to stored results: sweep what is missing, keep a row a picture, and strips.

    python -m studies.runs held_out

A study is one or several grids of `data/grids/`. What is missing of them is swept on every core (it
may be stopped and given again); their runs are those of `sude-lab sweep`, shared in `results/runs`.
Then the rows are kept in `data/results/held_out.csv`, with the first two pictures of every prompt,
a WebP file a run, beside them. `--no-run` only keeps what was swept.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import tyro
from PIL import Image

from studies.tables import BACKGROUND
from sude_lab.errors import UserError
from sude_lab.evaluate.evaluate import evaluate
from sude_lab.evaluate.metrics import MEASURES
from sude_lab.evaluate.stored import RESULTS
from sude_lab.io.files import atomic_write
from sude_lab.io.opening import data_folder
from sude_lab.runs.folder import Run
from sude_lab.sweep.grid import Job, Plan, make_plan, read_grid
from sude_lab.sweep.sweep import sweep
from sude_lab.tuning import TuningConfig
from sude_lab.world import drawing as world
from sude_lab.world.oracle import drawn_judge
from sude_lab.world.subjects import KEYS, describe, strip_name

GRIDS = data_folder() / "grids"
SWEEPS = Path("results")
"""Where sweeps are made, and gone on with."""
DRAWN_FROM = 500
"""Pictures of a run tuned with seed k are drawn from seed k + 500: `evaluate: {seed: 500}`."""
STEPS = 200
"""Steps of a run, where nothing else is said."""


@dataclass(frozen=True)
class Study:
    """Grids whose rows are kept together; `named`: variants are "plain" and "sude", not w_s."""

    grids: tuple[str, ...]
    named: bool = False
    strips: bool = True


STUDIES = {
    "held_out": Study(("held_out",), named=True, strips=False),
    "w_s": Study(("w_s",)),
    "methods_w_s": Study(("methods_w_s",)),
    "truncation": Study(("truncation",)),
    "collapse": Study(("collapse",)),
    "prompts": Study(("prompts_p1", "prompts_p2", "prompts_p3"), named=True),
    "class_images": Study(("class_images",), named=True),
}


def plans(study: str, out: Path = SWEEPS) -> list[Plan]:
    """Return the plans of a study's grids; their runs are in `out / "runs"`."""
    grids = STUDIES[study].grids if study in STUDIES else (study,)
    return [make_plan(read_grid(GRIDS / f"{g}.yaml"), out / g, out / "runs") for g in grids]


def run(grid: str, *, workers: int = os.cpu_count() or 1, out: Path = SWEEPS) -> None:
    """Sweep what is missing of a grid in several processes, a thread each.

    Raises:
        UserError: a run failed.
    """
    failed = sweep(GRIDS / f"{grid}.yaml", out / grid, runs=out / "runs", workers=workers)
    if failed:
        key, reason = next(iter(failed.items()))
        raise UserError(f"{len(failed)} runs of {grid} failed, {key} because: {reason}")


def keep(study: str, *, out: Path = SWEEPS) -> pd.DataFrame:
    """Write a swept study's rows, a row a picture, and its strips; return the rows."""
    rows: list[dict[str, Any]] = []
    strips: dict[str, dict[str, list[Image.Image]]] = {}
    for plan in plans(study, out):
        for job in plan.jobs:
            key = run_key(job, STUDIES[study].named)
            strip = strips.setdefault(strip_name(*key.values()), {})
            for row, picture in rows_of(plan, job):
                strip.setdefault(row["prompt"], []).append(picture)
                rows.append(key | row)
    for name, pictures in strips.items() if STUDIES[study].strips else ():
        keep_strip(RESULTS / study / name, pictures)
    table = pd.DataFrame(rows)
    with atomic_write(RESULTS / f"{study}.csv") as path:
        table.to_csv(path, index=False)
    return table


def keep_strip(path: Path, grids: dict[str, list[Image.Image]], each: int = 2) -> None:
    """Write the first pictures of every prompt side by side, in the order of the prompts."""
    images = [image for grid in grids.values() for image in grid[:each]]
    width, height = images[0].size
    strip = Image.new("RGB", (width * len(images), height))
    for k, image in enumerate(images):
        strip.paste(image, (k * width, 0))
    with atomic_write(path) as temporary:
        strip.save(temporary, format="webp", quality=90)


def run_key(job: Job, named: bool = False) -> dict[str, Any]:
    """Return what names a run in a stored table: subject, method, variant, seed."""
    values = (job.label["subject"], job.config.method, variant(job.config, named), job.config.seed)
    return dict(zip(KEYS, values, strict=True))


def variant(config: TuningConfig, named: bool = False) -> str:
    """Name a run by what it sets: its w_s where it sets nothing else, or plain and sude."""
    parts = ["prior=current"] if config.prior == "current" else []
    parts += [] if config.truncate else ["truncate=false"]
    parts += [f"truncate_at={config.truncate_at:g}"] if config.truncate_at != 1 else []
    parts += [f"prior_loss_weight={config.prior_loss_weight:g}"] if config.prior_loss_weight else []
    if named:
        zero = [] if config.weight_sude else ["weight_sude=0"]
        return ",".join(parts + zero) if parts else ("plain" if zero else "sude")
    if config.max_train_steps != STEPS:
        parts.append(f"max_train_steps={config.max_train_steps}")
    return ",".join(parts or [f"weight_sude={config.weight_sude:g}"])


def rows_of(plan: Plan, job: Job) -> Iterator[tuple[dict[str, Any], Image.Image]]:
    """Yield a row a picture of a finished run, and the picture."""
    folder, config = plan.runs / job.key, job.config
    judges = partial(drawn_judge, scene=job.scene)
    scores = evaluate([folder], **job.asked, judges=judges, progress=False).scores
    run = Run.open(folder)
    about = describe(config) | run.metrics()[["open_gates", "rho"]].mean().to_dict()
    phrases = {phrase: name for name, phrase in world.BACKGROUNDS.items()}
    for _, group in scores.groupby(["number", "picture"], sort=False):
        first, values = group.iloc[0], group.set_index("metric")["value"]
        row = {"attribute": first["attribute"], "prompt": run.prompt(first["prompt"])}
        row |= {"image": first["picture"]}
        row |= {measure: round(values.get(measure, float("nan")), 5) for measure in MEASURES}
        if "structure" in job.asked:
            asks = {"attribute": job.asked["structure"], "background": "background"}
            row |= {"ask": asks.get(first["kind"], "attribute and background")}
            row |= {"background": phrases.get(first["background"], "")}
            row |= {BACKGROUND: values.get(BACKGROUND, float("nan"))}
        yield about | row, Image.open(folder / first["file"])


def scores(table: pd.DataFrame) -> pd.DataFrame:
    """Return a stored table in the schema of `evaluate` and of sweeps: a row a picture and metric.

    So `metrics.compare` reads it, too. `seed` (of tuning) becomes `tuning_seed`, `image` becomes
    `picture`, the method is the `settings`, and every measure a row with `metric` and `value`; what
    is not known of a picture has no row. Stored tables keep no captions: the prompt stands there.
    """
    asked = [n for n in ("attribute", "background") if n in table]
    is_asked = table[asked].fillna("").ne("").to_numpy()
    rows = table.rename(columns={"seed": "tuning_seed", "image": "picture"}).assign(
        settings=table["method"],
        kind=[" x ".join(compress(asked, row)) or "plain" for row in is_asked],
        number=table.groupby("subject")["prompt"].transform(lambda p: pd.factorize(p)[0]),
        caption=table["prompt"],
        seed=table["seed"] + DRAWN_FROM,
    )
    names = [n for n in (*MEASURES, BACKGROUND) if n in table]
    others = [n for n in rows if n not in names]
    return rows.melt(others, names, "metric", "value").dropna(subset="value", ignore_index=True)


@dataclass(frozen=True)
class RunsConfig:
    """Which study to make anew."""

    study: Annotated[str, tyro.conf.Positional]
    run: bool = True
    """Sweep what is missing of its grids first."""
    workers: int = os.cpu_count() or 1
    """Processes, one thread each."""
    out: Path = SWEEPS
    """Folder of the sweeps."""


def main(config: RunsConfig) -> pd.DataFrame:
    """Sweep what is missing of a study, and keep its rows and pictures in `data/results/`."""
    if config.study not in STUDIES:
        raise UserError(f"There is no study {config.study!r}: choose {', '.join(STUDIES)}.")
    for grid in STUDIES[config.study].grids if config.run else ():
        run(grid, workers=config.workers, out=config.out)
    return keep(config.study, out=config.out)


if __name__ == "__main__":
    main(tyro.cli(RunsConfig))
