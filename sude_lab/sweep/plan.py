"""What a grid will take: runs, pictures, hours and gigabytes, before anything is run."""

from __future__ import annotations

import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image
from tqdm.auto import tqdm

from sude_lab.generation import generate
from sude_lab.io.opening import resolve_source
from sude_lab.sweep.grid import Grid, Job, Plan, kind_of
from sude_lab.sweep.sweep import TIMING, fresh_backbone, megabytes, timing
from sude_lab.tuning import TuningConfig, tune

MEASURES = (
    *("seconds_per_step", "seconds_per_picture", "megabytes_per_run", "megabytes_per_picture"),
)


@dataclass(frozen=True)
class Rate:
    """What one kind of run takes, and how that is known."""

    seconds_per_step: float
    seconds_per_picture: float
    """To draw and to judge it."""
    megabytes_per_run: float
    """Without its pictures."""
    megabytes_per_picture: float
    known_from: str


def _rate(values: Sequence[float], known_from: str) -> Rate:
    step, picture, run, one = values
    return Rate(step, picture, run, one, known_from)


def describe(plan: Plan) -> str:
    """Say what is left of a grid, and where the times come from.

    Times are medians over the finished runs of the same kind (`grid.kind_of`) in the folder of the
    runs; else what the grid's `assume` says; else three steps are measured on this machine, where
    the model is a folder (a hub id is not fetched for this).
    """
    todo = [job for job in plan.jobs if not job.scores(plan.runs).is_file()]
    equal = f" ({plan.num_equal:,} more are equal to one of these)" if plan.num_equal else ""
    pictures = sum(job.pictures for job in todo)
    told = [
        f"{len(plan.jobs):,} runs{equal}, {len(plan.jobs) - len(todo):,} of them finished. "
        f"To do: {len(todo):,} runs, {pictures:,} pictures."
    ]
    known = _measured(plan.runs)
    kinds: dict[str, list[Job]] = {}
    for job in todo:
        kinds.setdefault(kind_of(job.config), []).append(job)
    rates = {k: known.get(k) or _assumed(plan.grid, j[0].config) for k, j in kinds.items()}
    lines = []
    prior: set[Any] = set()
    for kind, jobs in kinds.items():
        if rates[kind] is None and Path(resolve_source(jobs[0].config.backbone)).is_dir():
            rates[kind] = _calibrated(jobs[0])
        # Class images for prior preservation are drawn once, by whoever comes first, then kept.
        needed = set(map(_class_images, jobs)) - prior
        prior |= needed
        lines.append(_line(kind, jobs, rates[kind], sum(number for *_, number in needed)))
    if not todo:
        return told[0]
    table = pd.DataFrame(lines)
    shown = table.map(lambda x: f"{x:,.2f}" if isinstance(x, float) else x).replace("nan", "?")
    told.append(shown.to_markdown(index=False, disable_numparse=True))
    unknown = sum(len(jobs) for kind, jobs in kinds.items() if rates[kind] is None)
    if unknown:
        told.append(
            f"Nobody has measured {unknown:,} of the runs, which are left out below: write times "
            "under `assume`, or finish one of each kind."
        )
    hours, gpus = table["hours"].sum(), plan.grid.num_gpus
    told.append(f"About {hours:,.1f} hours one after another, {table['GB'].sum():,.2f} GB.")
    if gpus:
        told[-1] += (
            f" With num_gpus {gpus:g} that is {gpus * hours:,.0f} GPU hours, "
            f"{gpus * hours / 8 / 24:,.1f} days on 8 GPUs."
        )
        if price := plan.grid.assume.get("price_per_gpu_hour"):
            told[-1] += f" At {price} a GPU hour: {price * gpus * hours:,.0f}."
    if "source" in plan.grid.assume and any(
        r and "assumed" in r.known_from for r in rates.values()
    ):
        told.append(f"What is assumed: {plan.grid.assume['source']}")
    return "\n\n".join(told)


def _class_images(job: Job) -> tuple[str, str, int, int]:
    """Return what names the class images that a run needs, and how many they are."""
    c = job.config
    drawn = c.prior_loss_weight and c.class_images is None
    return c.backbone, c.category, c.seed, (c.num_class_images or 0) if drawn else 0


def _line(kind: str, jobs: Sequence[Job], rate: Rate | None, extra: int) -> dict[str, object]:
    steps = sum(job.config.max_train_steps or 0 for job in jobs)
    pictures = sum(job.pictures for job in jobs)
    rate = rate or _rate(4 * [float("nan")], "nobody")
    seconds = steps * rate.seconds_per_step + (pictures + extra) * rate.seconds_per_picture
    size = len(jobs) * rate.megabytes_per_run + pictures * rate.megabytes_per_picture
    return {
        "kind of run": kind,
        "runs": f"{len(jobs):,}",
        "steps": f"{steps:,}",
        "s a step": rate.seconds_per_step,
        "pictures": f"{pictures:,}" + (f" + {extra:,} of classes" if extra else ""),
        "s a picture": rate.seconds_per_picture,
        "hours": seconds / 3600,
        "GB": size / 1000,
        "known from": rate.known_from,
    }


def _measured(runs: Path) -> dict[str, Rate]:
    found = [timing(path.parent) for path in runs.glob(f"*/{TIMING}")]
    kinds: dict[str, list[dict[str, Any]]] = {}
    for one in found:
        if "kind" in one and all(isinstance(one.get(m), int | float) for m in MEASURES):
            kinds.setdefault(one["kind"], []).append(one)
    return {
        kind: _rate([statistics.median(r[m] for r in rows) for m in MEASURES], f"{len(rows)} runs")
        for kind, rows in kinds.items()
    }


def _assumed(grid: Grid, config: TuningConfig) -> Rate | None:
    values = []
    for name in MEASURES:
        value = grid.assume.get(name)
        value = value.get(config.method) if isinstance(value, dict) else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        values.append(float(value))
    asks = not config.prior_bank or config.prior_bank_dtype == "live"
    if config.with_sude and asks:
        values[0] *= float(grid.assume.get("sude_factor", 1.5))
    return _rate(values, "assumed")


def _calibrated(job: Job) -> Rate:
    tqdm.write(f"Measuring a few steps: {kind_of(job.config)}.", file=sys.stderr)
    backbone = fresh_backbone(job.config)
    config = replace(job.config, max_train_steps=5)
    number = min(4, job.asked["num_images"])
    image = Image.new("RGB", (backbone.resolution,) * 2, "grey")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        steps = tune(config, backbone, [image] * len(config.subjects))
        next(steps)  # opens what is slow
        started = time.perf_counter()
        *_, step = itertools.islice(steps, 3)
        tuned = time.perf_counter()
        step.method.save(folder)
        saved = time.perf_counter()
        images = generate(backbone, f"photo of a {config.category}", num_images=number)
        drawn = time.perf_counter()
        for k, picture in enumerate(images):
            picture.save(folder / f"{k}.png")
        return Rate(
            (tuned - started) / 3,
            (drawn - saved) / number,
            megabytes(p for p in folder.rglob("*") if p.suffix != ".png"),
            megabytes(folder.glob("*.png")) / number,
            "3 steps now",
        )
