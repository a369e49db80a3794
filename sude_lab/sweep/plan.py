"""What is left of a grid, and what it will take by the runs that are finished, before it is run."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from sude_lab.sweep.grid import Job, Plan, kind_of
from sude_lab.sweep.sweep import COSTS, TIMING, timing


def describe(plan: Plan) -> str:
    """Say what is left of a grid; hours and sizes are by medians over finished runs of a kind.

    Kinds are those of `grid.kind_of`, the finished runs those in the folder of the runs. Class
    images, which are drawn once, are not counted.
    """
    todo = [job for job in plan.jobs if not job.scores(plan.runs).is_file()]
    equal = f" ({plan.num_equal:,} more are equal to one of these)" if plan.num_equal else ""
    counts = (
        f"{len(plan.jobs):,} runs{equal}, {len(plan.jobs) - len(todo):,} of them finished. "
        f"To do: {len(todo):,} runs, {sum(job.pictures for job in todo):,} pictures."
    )
    if not todo:
        return counts
    kinds: dict[str, list[Job]] = {}
    for job in todo:
        kinds.setdefault(kind_of(job.config), []).append(job)
    took = pd.DataFrame(
        [timing(path.parent) for path in plan.runs.glob(f"*/{TIMING}")], columns=["kind", *COSTS]
    )
    took[[*COSTS]] = took[[*COSTS]].apply(pd.to_numeric, errors="coerce")
    finished = dict(iter(took.dropna().groupby("kind")))
    table = pd.DataFrame([_line(kind, jobs, finished.get(kind)) for kind, jobs in kinds.items()])
    shown = table.map(lambda x: f"{x:,.2f}" if isinstance(x, float) else x).replace("nan", "?")
    parts = [counts, shown.to_markdown(index=False, disable_numparse=True)]
    unknown = sum(len(kinds[kind]) for kind in table[table["hours"].isna()]["kind of run"])
    if unknown:
        parts.append(f"Unknown are {unknown:,} of the runs: finish one of each kind to know more.")
    if unknown < len(todo):
        hours, size = table["hours"].sum(), table["GB"].sum()
        parts.append(f"About {hours:,.1f} hours one after another, {size:,.2f} GB.")
    return "\n\n".join(parts)


def _line(kind: str, jobs: list[Job], finished: pd.DataFrame | None) -> dict[str, Any]:
    medians = [math.nan] * len(COSTS) if finished is None else finished[[*COSTS]].median()
    step, picture, run, each = medians
    steps = sum(job.config.max_train_steps for job in jobs)
    pictures = sum(job.pictures for job in jobs)
    return {
        "kind of run": kind,
        "runs": f"{len(jobs):,}",
        "steps": f"{steps:,}",
        "pictures": f"{pictures:,}",
        "hours": (steps * step + pictures * picture) / 3600,
        "GB": (len(jobs) * run + pictures * each) / 1000,
        "known from": "nobody" if finished is None else f"{len(finished)} runs",
    }
