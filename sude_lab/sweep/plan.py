"""What a grid will take: runs, pictures, hours and gigabytes, before anything is run."""

from __future__ import annotations

import itertools
import math
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image
from tqdm.auto import tqdm

from sude_lab.config import CompleteConfig
from sude_lab.generation import generate
from sude_lab.io.opening import resolve_source
from sude_lab.io.weights import save_weights
from sude_lab.runs.prepare import prepared_tuning
from sude_lab.sweep.grid import Assumed, Costs, Job, Plan, kind_of
from sude_lab.sweep.sweep import TIMING, fresh_backbone, megabytes, timing

_MEASURES = tuple(f.name for f in fields(Costs))


@dataclass
class _Rate(Costs):
    """What one kind of run takes, and who knows that."""

    source: str = "nobody"


def describe(plan: Plan, *, measure: bool = False) -> str:
    """Say what is left of a grid, and where the times come from.

    Times are medians over the finished runs of the same kind (`grid.kind_of`) in the folder of the
    runs; else what the grid's `assume` says; else, with `measure`, three steps on this machine,
    where the model is a folder (a hub id is not fetched for this); else they are unknown.
    """
    assume, gpus = plan.grid.file.assume, plan.grid.file.num_gpus
    todo = [job for job in plan.jobs if not job.scores(plan.runs).is_file()]
    equal = f" ({plan.num_equal:,} more are equal to one of these)" if plan.num_equal else ""
    parts = [
        f"{len(plan.jobs):,} runs{equal}, {len(plan.jobs) - len(todo):,} of them finished. "
        f"To do: {len(todo):,} runs, {sum(job.pictures for job in todo):,} pictures."
    ]
    if not todo:
        return parts[0]
    kinds: dict[str, list[Job]] = {}
    for job in todo:
        kinds.setdefault(kind_of(job.config), []).append(job)
    measured, lines = _measured(plan.runs), []
    prior: set[Any] = set()
    for kind, jobs in kinds.items():
        config = jobs[0].config
        rate = measured.get(kind) or _assumed(assume, config)
        if rate.source == "nobody" and measure and Path(resolve_source(config.backbone)).is_dir():
            rate = _calibrated(jobs[0])
        # Class images for prior preservation are drawn once, by whoever comes first, then kept.
        needed = set(map(_class_images, jobs)) - prior
        prior |= needed
        lines.append(_line(kind, jobs, rate, sum(number for *_, number in needed)))
    table = pd.DataFrame(lines)
    shown = table.map(lambda x: f"{x:,.2f}" if isinstance(x, float) else x).replace("nan", "?")
    parts.append(shown.to_markdown(index=False, disable_numparse=True))
    if unknown := sum(len(kinds[line["kind of run"]]) for line in lines if math.isnan(line["GB"])):
        parts.append(
            f"The times of {unknown:,} of the runs are unknown, and left out here: give --measure, "
            "finish one run of each kind, or write times under `assume`."
        )
    if unknown < len(todo):
        hours = table["hours"].sum()
        text = f"About {hours:,.1f} hours one after another, {table['GB'].sum():,.2f} GB."
        if gpus:
            text += f" With num_gpus {gpus:g} that is {gpus * hours:,.0f} GPU hours, "
            text += f"{gpus * hours / 8 / 24:,.1f} days on 8 GPUs."
        if price := gpus and assume.price_per_gpu_hour:
            text += f" At {price:g} a GPU hour: {price * (gpus or 0) * hours:,.0f}."
        parts.append(text)
    if assume.source and "assumed" in set(table["known from"]):
        parts.append(f"What is assumed: {assume.source}")
    return "\n\n".join(parts)


def _class_images(job: Job) -> tuple[str, str, int, int]:
    """Return what names the class images that a run needs, and how many they are."""
    c = job.config
    drawn = c.prior_loss_weight and c.class_images is None
    return c.backbone, c.category, c.seed, c.num_class_images if drawn else 0


def _line(kind: str, jobs: list[Job], rate: _Rate, extra: int) -> dict[str, Any]:
    values = (getattr(rate, name) for name in _MEASURES)
    step, picture, run, each = (math.nan if value is None else value for value in values)
    steps = sum(job.config.max_train_steps for job in jobs)
    pictures = sum(job.pictures for job in jobs)
    return {
        "kind of run": kind,
        "runs": f"{len(jobs):,}",
        "steps": f"{steps:,}",
        "s a step": step,
        "pictures": f"{pictures:,}" + (f" + {extra:,} of classes" if extra else ""),
        "s a picture": picture,
        "hours": (steps * step + (pictures + extra) * picture) / 3600,
        "GB": (len(jobs) * run + pictures * each) / 1000,
        "known from": rate.source,
    }


def _measured(runs: Path) -> dict[str, _Rate]:
    kinds: dict[str, list[dict[str, Any]]] = {}
    for took in (timing(path.parent) for path in runs.glob(f"*/{TIMING}")):
        if "kind" in took and all(isinstance(took.get(m), int | float) for m in _MEASURES):
            kinds.setdefault(took["kind"], []).append(took)
    rates = {}
    for kind, rows in kinds.items():
        medians = {m: statistics.median(row[m] for row in rows) for m in _MEASURES}
        rates[kind] = _Rate(**medians, source=f"{len(rows)} runs")
    return rates


def _assumed(assume: Assumed, config: CompleteConfig) -> _Rate:
    costs = {name: getattr(assume, name) for name in _MEASURES}
    costs = {k: v.get(config.method) if isinstance(v, dict) else v for k, v in costs.items()}
    if None in costs.values():
        return _Rate()
    live = not config.prior_bank or config.prior_bank_dtype == "live"
    costs["seconds_per_step"] *= assume.sude_factor if config.with_sude and live else 1
    return _Rate(**{name: float(cost) for name, cost in costs.items()}, source="assumed")


def _calibrated(job: Job) -> _Rate:
    tqdm.write(f"Measuring a few steps: {kind_of(job.config)}.", file=sys.stderr)
    backbone = fresh_backbone(job.config)
    config = replace(job.config, max_train_steps=5)
    number = min(4, job.asked["num_images"])
    image = Image.new("RGB", (backbone.resolution,) * 2, "grey")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        steps = iter(prepared_tuning(config, backbone, [image] * len(config.subjects)))
        next(steps)  # opens what is slow
        started = time.perf_counter()
        *_, step = itertools.islice(steps, 3)
        tuned = time.perf_counter()
        save_weights(step.method, folder)
        saved = time.perf_counter()
        images = generate(backbone, f"photo of a {config.category}", num_images=number)
        drawn = time.perf_counter()
        for k, picture in enumerate(images):
            picture.save(folder / f"{k}.png")
        sizes = megabytes(p for p in folder.rglob("*") if p.suffix != ".png")
        each = megabytes(folder.glob("*.png")) / number
        return _Rate((tuned - started) / 3, (drawn - saved) / number, sizes, each, "3 steps now")
