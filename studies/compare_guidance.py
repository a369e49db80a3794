"""Compare SuDe at sampling time with its rivals on drawn subjects, at equal fidelity.

    python -m studies.compare_guidance --subjects held-out --numbers 0 1 2 5 7 \\
        --sude-weights 1 --num-images 4 --out data/results/guidance.csv

Three rules, each with a strength, on one plainly tuned model a subject and seed:

- guidance: `sude_lab.guidance`, the hinge at sampling time, strength g;
- composition: the same direction without the hinge, g d, strength g;
- sude-tuned: SuDe's loss while tuning, strength = multiple of the method's default w_s.

All draw from the same noise, with the same prompts. A rule with more strength always aligns more
and keeps less of the subject, so single settings say little: `at_equal_fidelity` compares the
rules where they keep as much of the subject as the SuDe-tuned model. Finished (subject, rule,
strength, seed) are never redone: give the command again to continue.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
import tyro
from torch import Tensor
from tqdm.auto import tqdm

from sude_lab.backbone import Backbone
from sude_lab.config import EMBEDDED
from sude_lab.errors import UserError
from sude_lab.evaluate.metrics import per_run, summarize
from sude_lab.guidance import sude_guidance
from sude_lab.io.files import atomic_write
from sude_lab.io.opening import open_backbone
from sude_lab.prompts import photo_of
from sude_lab.tuning import TuningConfig, resolve, tune
from sude_lab.world import subjects as study
from sude_lab.world.oracle import Oracle, load_oracle

PLAIN, GUIDANCE, COMPOSITION, TUNED = "plain", "guidance", "composition", "sude-tuned"


@dataclass(frozen=True)
class CompareConfig:
    """Which subjects, strengths and seeds to compare."""

    out: Path
    """CSV file of the results; rows that are there are not made again."""
    subjects: Literal["development", "held-out"] = "development"
    numbers: tuple[int, ...] = (0, 1, 2, 5, 7)
    strengths: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0)
    """g of guidance and composition; 0 is the plainly tuned model, common to both."""
    sude_weights: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Multiples of the default w_s for the SuDe-tuned models."""
    method: str = "dreambooth"
    num_seeds: int = 1
    num_images: int = 8
    workers: int = 2
    """Processes, one thread each; 1 computes in this one, with all its threads."""
    settings: str = ""
    """Settings of every tuning, such as 'max_train_steps=100,learning_rate=3e-4'."""
    backbone: str = EMBEDDED


@dataclass(frozen=True)
class Job:
    """One tuned model and what is to be drawn with it: (rule, strength) each."""

    number: int
    seed: int
    weight: float
    """Multiple of the default w_s; 0 is plain tuning."""
    draws: tuple[tuple[str, float], ...]


def label(rule: str, strength: float) -> str:
    """Return the name of a variant: "guidance 0.5"; g = 0 is "plain"."""
    return f"{rule} {strength:g}" if strength else PLAIN


def jobs(config: CompareConfig, table: pd.DataFrame) -> list[Job]:
    """Return what is missing in the table, one job a tuned model."""
    done = set(table[study.KEYS].itertuples(index=False, name=None))
    sampled = [(r, g) for g in config.strengths for r in (GUIDANCE, COMPOSITION)]
    plans = [(0.0, sampled), *((w, [(TUNED, w)]) for w in config.sude_weights)]
    found = []
    for seed in range(config.num_seeds):
        for number in config.numbers:
            name = study.subject(config.subjects, number).name
            for weight, draws in plans:
                # By their labels: g = 0 is the same for both rules.
                missing = {
                    label(rule, strength): (rule, strength)
                    for rule, strength in draws
                    if (name, config.method, label(rule, strength), seed) not in done
                }
                if missing:
                    found.append(Job(number, seed, weight, tuple(missing.values())))
    return found


def run_job(
    config: CompareConfig, base: Backbone, oracle: Oracle, job: Job
) -> list[dict[str, Any]]:
    """Tune a copy of the base, draw by every rule and judge; return a row a picture."""
    who = study.subject(config.subjects, job.number)
    tuning = TuningConfig(
        image=Path(f"{who.name}.png"),
        category=who.scene.category,
        method=config.method,
        seed=job.seed,
        backbone=config.backbone,
        **study.STORED | study.parse_settings(config.settings),
    )
    tuning = resolve(tuning, base)
    assert tuning.weight_sude is not None
    tuning = replace(tuning, weight_sude=job.weight * tuning.weight_sude)
    rows = []
    backbone, error = base.copy(), ""
    try:
        for _ in tune(tuning, backbone, who.picture):
            pass
    except UserError as failure:  # recorded with its reason; the others go on
        error = str(failure)
    for rule, strength in job.draws:
        about = {
            "subject": who.name,
            "category": who.scene.category,
            "method": config.method,
            "variant": label(rule, strength),
            "rule": rule if strength else PLAIN,
            "strength": strength,
            "seed": job.seed,
            "weight_sude": tuning.weight_sude,
            "steps": tuning.max_train_steps,
        }
        if error:
            rows.append(about | {"attribute": "", "error": error})
            continue
        drawn = _draw(base, backbone, oracle, who, tuning, rule, strength, config.num_images)
        rows += [about | row for row in drawn]
    return rows


def _draw(
    base: Backbone,
    backbone: Backbone,
    oracle: Oracle,
    who: study.Subject,
    tuning: TuningConfig,
    rule: str,
    strength: float,
    num_images: int,
) -> list[dict[str, Any]]:
    """Return the rows of `study.measure` under one rule, with the mean rho of an attribute."""
    seen: dict[str, list[Tensor]] = {}

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
        ) as seen[attribute or ""]:
            yield

    rows = study.measure(
        backbone, oracle, who, tuning, seed=tuning.seed + 500, num_images=num_images, guide=guide
    )
    rho = {k: torch.cat(v).mean().item() if v else float("nan") for k, v in seen.items()}
    return [row | {"rho": round(rho[row["attribute"]], 5)} for row in rows]


def compare(config: CompareConfig) -> pd.DataFrame:
    """Make what is missing, keep every result at once, return all rows."""
    table = pd.read_csv(config.out) if config.out.is_file() else pd.DataFrame(columns=study.KEYS)
    missing = jobs(config, table)
    results = _results(config, missing)
    for rows in tqdm(results, total=len(missing), desc="comparing", unit="model"):
        table = pd.concat([table, pd.DataFrame(rows)], ignore_index=True)
        with atomic_write(config.out) as path:
            table.to_csv(path, index=False)
    return table


def _results(config: CompareConfig, missing: list[Job]) -> Iterator[list[dict[str, Any]]]:
    if not missing:
        return
    if config.workers == 1:
        base, oracle = open_backbone(config.backbone), load_oracle()
        for job in missing:
            yield run_job(config, base, oracle, job)
        return
    with ProcessPoolExecutor(
        config.workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_open_models,
        initargs=(config,),
    ) as pool:
        for future in as_completed([pool.submit(_in_worker, config, job) for job in missing]):
            yield future.result()


_models: dict[str, Any] = {}
"""What a worker keeps open between its jobs."""


def _open_models(config: CompareConfig) -> None:
    torch.set_num_threads(1)
    _models.update(base=open_backbone(config.backbone), oracle=load_oracle())


def _in_worker(config: CompareConfig, job: Job) -> list[dict[str, Any]]:
    return run_job(config, _models["base"], _models["oracle"], job)


def at_equal_fidelity(
    table: pd.DataFrame, *, against: float = 1.0, resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """Return each rule's alignment where it keeps as much of the subject as SuDe-tuned models do.

    A rule is a line through its strengths (0 is plain tuning) in the plane of mean fidelity and
    mean alignment under attribute prompts. From g = 0 upwards the first point whose fidelity is
    that of sude-tuned `against` is read off, linearly between two strengths; a rule that never
    loses so much is read at its greatest strength, one that starts below at 0: `fidelity` says
    where it was read. Intervals (95 %) are bootstrapped over subjects, the whole reading each time.
    """
    runs = per_run(table)
    means = runs.groupby(["subject", "variant"])[["subject_fidelity", "attribute_alignment"]].mean()
    strengths = table.groupby("variant")["strength"].first()
    rules = table.groupby("variant")["rule"].first()
    goal = label(TUNED, against)
    if goal not in rules:
        raise UserError(f"There is no {goal!r} to compare with: add {against:g} to --sude-weights.")
    # Only subjects that every variant has: the same ones on both sides.
    wide = means.unstack("variant").dropna()
    if wide.empty:
        raise UserError("No subject has every variant yet: let the comparison run to its end.")
    rng = np.random.default_rng(seed)
    draws = [np.arange(len(wide)), *rng.integers(len(wide), size=(resamples, len(wide)))]
    values = wide.to_numpy()[np.stack(draws)].mean(axis=1)
    mean = dict(zip(wide.columns, values.T, strict=True))
    target = mean["attribute_alignment", goal]
    rows = []
    for rule in (GUIDANCE, COMPOSITION):
        line = sorted((strengths[v], v) for v in rules.index if rules[v] in (rule, PLAIN))
        found = np.array(
            [
                _first_crossing(
                    [
                        (s, mean["subject_fidelity", v][k], mean["attribute_alignment", v][k])
                        for s, v in line
                    ],
                    mean["subject_fidelity", goal][k],
                )
                for k in range(len(draws))
            ]
        )
        difference = found[:, 2] - target
        enough = len(wide) > 1
        low, high = np.quantile(difference[1:], [0.025, 0.975]) if enough else (np.nan, np.nan)
        rows.append(
            {
                "rule": rule,
                "strength": found[0, 0],
                "fidelity": found[0, 1],
                "alignment": found[0, 2],
                "goal fidelity": mean["subject_fidelity", goal][0],
                "goal alignment": target[0],
                "difference": difference[0],
                "low": low,
                "high": high,
                "subjects": len(wide),
            }
        )
    return pd.DataFrame(rows)


def _first_crossing(
    points: list[tuple[float, float, float]], fidelity: float
) -> tuple[float, float, float]:
    """Return the (strength, fidelity, alignment) where such a line first falls to `fidelity`."""
    if points[0][1] <= fidelity:
        return points[0]
    for before, after in pairwise(points):
        if after[1] <= fidelity:
            share = (before[1] - fidelity) / (before[1] - after[1])
            low, high = np.array(before), np.array(after)
            s, f, a = (low + share * (high - low)).tolist()
            return s, f, a
    return points[-1]


if __name__ == "__main__":
    result = compare(tyro.cli(CompareConfig))
    print(summarize(result).round(3).to_string(index=False))
    print(at_equal_fidelity(result).round(3).to_string(index=False))
