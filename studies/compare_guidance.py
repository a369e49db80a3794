"""Compare SuDe at sampling time with its rivals on drawn subjects, at equal fidelity.

    python -m studies.compare_guidance

Three rules, each with a strength, on one plainly tuned model a subject and seed:

- guidance: `sude_lab.guidance`, the hinge at sampling time, strength g;
- composition: the same direction without the hinge, g d, strength g;
- sude-tuned: SuDe's loss while tuning, strength = multiple of the method's default w_s.

The models are the runs of `data/grids/guidance.yaml`, which are swept first. All draw from the same
noise, with the same prompts. A rule with more strength always aligns more and keeps less of the
subject, so single settings say little: `at_equal_fidelity` compares the rules where they keep as
much of the subject as the SuDe-tuned model. What was drawn is in the table already and is never
drawn again: give the command again to continue.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import tyro
from torch import Tensor
from tqdm.auto import tqdm

from studies import runs
from studies.guidance_tables import (
    COMPOSITION,
    GUIDANCE,
    PLAIN,
    TUNED,
    at_equal_fidelity,
    rule_name,
    summarize,
)
from sude_lab.evaluate.stored import RESULTS
from sude_lab.guidance import sude_guidance
from sude_lab.io.files import atomic_write
from sude_lab.prompts import photo_of
from sude_lab.runs.folder import Run
from sude_lab.sweep.grid import Job
from sude_lab.sweep.sweep import fresh_backbone
from sude_lab.world.oracle import Oracle, load_oracle
from sude_lab.world.subjects import KEYS, Subject, measure


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


if __name__ == "__main__":
    result = compare(tyro.cli(CompareConfig))
    print(summarize(result).round(3).to_string(index=False))
    text = at_equal_fidelity(result).round(2).to_markdown(index=False)
    (RESULTS / "guidance.md").write_text(f"{text}\n", encoding="utf-8")
    print(text)
