"""What is left of a grid, who is at it, and what it will take by the runs that are finished."""

from __future__ import annotations

import pandas as pd

from sude_lab.sweep.grid import Plan, kind_of
from sude_lab.sweep.sweep import COSTS, TIMING, standing, timing


def describe(plan: Plan) -> str:
    """Say what is left of a grid; hours and sizes are by medians over finished runs of a kind.

    Kinds are those of `grid.kind_of`, the finished runs those in the folder of the runs. Class
    images, which are drawn once, are not counted.
    """
    states = [(job, *standing(job, plan.runs)) for job in plan.jobs]
    todo = [job for job, status, _ in states if status != "finished"]
    equal = f" ({plan.num_equal:,} more are equal to one of these)" if plan.num_equal else ""
    counts = (
        f"{len(plan.jobs):,} runs{equal}, {len(plan.jobs) - len(todo):,} of them finished. "
        f"To do: {len(todo):,} runs, {sum(job.pictures for job in todo):,} pictures."
    )
    if not todo:
        return counts
    work = pd.DataFrame(
        [(kind_of(job.config), 1, job.config.max_train_steps, job.pictures) for job in todo],
        columns=["kind of run", "runs", "steps", "pictures"],
    )
    took = pd.DataFrame(
        [timing(path.parent) for path in plan.runs.glob(f"*/{TIMING}")], columns=["kind", *COSTS]
    )
    took[[*COSTS]] = took[[*COSTS]].apply(pd.to_numeric, errors="coerce")
    finished = took.dropna().groupby("kind")
    table = work.groupby("kind of run", sort=False).sum()
    step, picture, run, each = (finished.median()[name].reindex(table.index) for name in COSTS)
    table["hours"] = (table["steps"] * step + table["pictures"] * picture) / 3600
    table["GB"] = (table["runs"] * run + table["pictures"] * each) / 1000
    known = finished.size().reindex(table.index, fill_value=0)
    shown = table.map(lambda x: f"{x:,.2f}" if isinstance(x, float) else f"{x:,}")
    shown = shown.replace("nan", "?")
    shown["known from"] = [f"{number} runs" if number else "nobody" for number in known]
    parts = [counts, shown.reset_index().to_markdown(index=False, disable_numparse=True)]
    unknown = table["runs"][known == 0].sum()
    if unknown:
        parts.append(f"Unknown are {unknown:,} of the runs: finish one of each kind to know more.")
    if unknown < len(todo):
        hours, size = table["hours"].sum(), table["GB"].sum()
        parts.append(f"About {hours:,.1f} hours one after another, {size:,.2f} GB.")
    name = "{subject}, {settings}, {variant}, seed {tuning_seed}"
    now = [f"{s}: {name.format(**job.label)} ({reason})" for job, s, reason in states if reason]
    return "\n\n".join([*parts, *filter(None, ["\n".join(now)])])
