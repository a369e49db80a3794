"""Compare SuDe at sampling time with its rivals on drawn subjects, at equal fidelity.

    python -m studies.compare_guidance

Three rules, each with a strength, on one plainly tuned model a subject and seed:

- guidance: `sude_lab.guidance`, the hinge at sampling time, strength g;
- composition: the same direction without the hinge, g d, strength g;
- sude-tuned: SuDe's loss while tuning, strength = multiple of the method's default w_s.

The models are the runs of `data/grids/guidance.yaml`, which are swept first. All draw from the same
noise, with the same prompts. A rule with more strength always aligns more and keeps less of the
subject, so single settings say little: `at_equal_fidelity` compares the rules where they
keep as much of the subject as the SuDe-tuned model. What was drawn is in the table already and is
never drawn again: give the command again to continue.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import tyro
from torch import Tensor
from tqdm.auto import tqdm

from studies import runs
from sude_lab.errors import UserError
from sude_lab.evaluate.metrics import MEASURES, gains, per_run
from sude_lab.evaluate.statistics import jackknife_interval
from sude_lab.evaluate.stored import RESULTS
from sude_lab.guidance import sude_guidance
from sude_lab.io.files import atomic_write
from sude_lab.prompts import photo_of
from sude_lab.runs.folder import Run
from sude_lab.sweep.grid import Job
from sude_lab.sweep.sweep import fresh_backbone
from sude_lab.world.oracle import Oracle, load_oracle
from sude_lab.world.subjects import KEYS, Subject, measure

PLAIN, GUIDANCE, COMPOSITION, TUNED = "plain", "guidance", "composition", "sude-tuned"


def rule_name(rule: str, strength: float) -> str:
    """Return the name of a variant: "guidance 0.5"; g = 0 is "plain"."""
    return f"{rule} {strength:g}" if strength else PLAIN


@dataclass(frozen=True)
class CompareConfig:
    """Which strengths to compare, on the models of which grid."""

    out: Path = RESULTS / "guidance.csv"
    """CSV file of the results; rows that are there are not made again."""
    grid: str = "guidance"
    """Its runs with w_s 0 are drawn by every rule, the others as they are."""
    strengths: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0)
    """g of guidance and composition; 0 is the plainly tuned model, common to both."""
    run: bool = True
    """Sweep what is missing of the grid first."""
    workers: int = os.cpu_count() or 1
    """Processes of the sweep, one thread each."""
    sweeps: Path = runs.SWEEPS
    """Folder of the sweeps."""


def draws_of(config: CompareConfig, job: Job) -> dict[str, tuple[str, float]]:
    """Return what to draw with a tuned model, by its name: (rule, strength)."""
    if job.config.with_sude:
        factor = job.label["w_s_factor"]
        return {rule_name(TUNED, factor): (TUNED, factor)}
    pairs = [(rule, g) for g in config.strengths for rule in (GUIDANCE, COMPOSITION)]
    return {rule_name(rule, g): (rule, g) for rule, g in pairs}  # g = 0: one for both rules


def compare(config: CompareConfig) -> pd.DataFrame:
    """Draw what is missing, keep the rows of every (run, rule, strength) at once, return all."""
    if config.run:
        runs.run(config.grid, workers=config.workers, out=config.sweeps)
    table = pd.read_csv(config.out) if config.out.is_file() else pd.DataFrame(columns=KEYS)
    done = set(table[KEYS].itertuples(index=False, name=None))
    (plan,) = runs.plans(config.grid, config.sweeps)
    oracle = load_oracle()
    for job in tqdm(plan.jobs, desc="comparing", unit="model"):
        for name, (rule, strength) in draws_of(config, job).items():
            key = runs.run_key(job) | {"variant": name}
            if tuple(key.values()) in done:
                continue
            run = Run.open(plan.runs / job.key)
            about = {"category": job.config.category, "rule": rule if strength else PLAIN}
            about |= {"strength": strength, "weight_sude": job.config.weight_sude}
            about |= {"steps": job.config.max_train_steps}
            rows = [key | about | row for row in _draw(run, job, oracle, rule, strength)]
            table = pd.concat([table, pd.DataFrame(rows)], ignore_index=True)
            with atomic_write(config.out) as path:
                table.to_csv(path, index=False)
    return table


def _draw(run: Run, job: Job, oracle: Oracle, rule: str, strength: float) -> list[dict[str, Any]]:
    """Return the rows of `world.subjects.measure` under one rule, with an attribute's mean rho."""
    base, backbone = fresh_backbone(run.config), run.load(backbone=fresh_backbone(run.config))
    assert job.scene is not None  # the grid names drawn subjects
    who = Subject(job.label["subject"], job.scene, run.picture())
    rhos: dict[str, list[Tensor]] = {}

    @contextmanager
    def guide(attribute: str | None) -> Iterator[None]:
        words = f"{attribute} {who.scene.category}" if attribute else who.scene.category
        with torch.no_grad():
            classes, null = base.encode_prompts([photo_of(words)]), base.null_condition()
        with sude_guidance(
            backbone.pipeline,
            base.unet,
            classes,
            0.0 if rule == TUNED else strength,
            null=null,
            hinge=rule != COMPOSITION,
        ) as rhos[attribute or ""]:
            yield

    rows = measure(
        backbone,
        oracle,
        who,
        run.config,
        seed=job.asked["seed"],
        num_images=job.asked["num_images"],
        guide=guide,
    )
    rho = {k: torch.cat(v).mean().item() if v else float("nan") for k, v in rhos.items()}
    return [row | {"rho": round(rho[row["attribute"]], 5)} for row in rows]


def summarize(table: pd.DataFrame, *, against: str = "plain") -> pd.DataFrame:
    """Return a row a (method, variant): means and paired differences with 95 % intervals.

    The numbers of `gains` for the runs of `per_run`, with columns for every measure.
    """
    rows = []
    changes = gains(per_run(table), MEASURES, against=against)
    keys = ["method", "variant", "subjects", "runs"]
    for values, group in changes.groupby(keys, sort=False):
        line: dict[str, object] = dict(zip(keys, values, strict=True))
        for row in group.to_dict("records"):
            ends = {f"{row['measure']}_{name}": row[name] for name in ("gain", "low", "high")}
            line |= {row["measure"]: row["mean"]} | ends
        rows.append(line)
    return pd.DataFrame(rows)


def at_equal_fidelity(table: pd.DataFrame, *, against: float = 1.0) -> pd.DataFrame:
    """Return each rule's alignment where it keeps as much of the subject as SuDe-tuned models do.

    A rule is a line through its strengths (0 is plain tuning) in the plane of mean fidelity and
    mean alignment under attribute prompts. From g = 0 upwards the first point whose fidelity is
    that of sude-tuned `against` is read off, linearly between two strengths; a rule that never
    loses so much is read at its greatest strength, one that starts below at 0: `fidelity` says
    where it was read. The whole reading is one number of all subjects; its 95 % interval is
    `statistics.jackknife_interval`.

    Raises:
        UserError: there is no such variant, or no subject has all variants.
    """
    means = (
        per_run(table)
        .groupby(["subject", "variant"])[["subject_fidelity", "attribute_alignment"]]
        .mean()
    )
    named = table.groupby("variant")[["rule", "strength"]].first()
    goal = rule_name(TUNED, against)
    if goal not in named.index:
        raise UserError(f"There is no {goal!r} to compare with: add {against:g} to --sude-weights.")
    # Only subjects that every variant has: the same ones on both sides.
    wide = means.unstack("variant").dropna()
    if wide.empty:
        raise UserError("No subject has every variant yet: let the comparison run to its end.")
    rows = []
    for rule in (GUIDANCE, COMPOSITION):
        line = named[named["rule"].isin([rule, PLAIN])]["strength"].sort_values()

        def difference(index: np.ndarray, line: pd.Series = line) -> float:
            return _read_off(wide.iloc[index], line, goal)["difference"]

        ends = jackknife_interval(difference, len(wide))
        row = {"rule": rule} | _read_off(wide, line, goal) | {"low": ends.low, "high": ends.high}
        rows.append(row | {"subjects": len(wide)})
    return pd.DataFrame(rows)


def _read_off(subjects: pd.DataFrame, line: pd.Series, goal: str) -> dict[str, float]:
    """Return where a rule's line (strength by variant) first falls to the fidelity of the goal."""
    fidelity, alignment = (
        subjects["subject_fidelity"].mean(),
        subjects["attribute_alignment"].mean(),
    )
    points = np.array([(strength, fidelity[v], alignment[v]) for v, strength in line.items()])
    below = points[:, 1] <= fidelity[goal]
    k = int(below.argmax()) if below.any() else len(points) - 1
    point = points[k]
    if below[k] and k > 0:  # between the two strengths around it, linearly
        before = points[k - 1]
        share = (before[1] - fidelity[goal]) / (before[1] - point[1])
        point = before + share * (point - before)
    row = dict(zip(("strength", "fidelity", "alignment"), point.tolist(), strict=True))
    row |= {"goal fidelity": fidelity[goal], "goal alignment": alignment[goal]}
    return row | {"difference": row["alignment"] - alignment[goal]}


if __name__ == "__main__":
    result = compare(tyro.cli(CompareConfig))
    print(summarize(result).round(3).to_string(index=False))
    text = at_equal_fidelity(result).round(2).to_markdown(index=False)
    (RESULTS / "guidance.md").write_text(f"{text}\n", encoding="utf-8")
    print(text)
