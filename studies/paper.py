"""The paper's tables and figures, repeated on the embedded world: one command each.

    python -m studies.paper fig4

runs what is still missing of its grids and studies (on every core; it may be stopped and given
again), keeps the rows in `data/results/*.csv` with strips of pictures beside them, and writes
`fig4.md`. With `--no-run` it only writes the table anew; `--help` lists the names. The ablations
are grids of `data/grids/`: their runs are those of `sude-lab sweep`, in `results/runs`.

The subjects are those of the held-out study, fixed before anything was seen. Intervals are 95 %,
Student's t on the subjects' means; gains are paired (same subject, same seed).
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import torch
import tyro
from PIL import Image

from sude_lab.backbone import data_folder
from sude_lab.errors import UserError
from sude_lab.evaluate import stored
from sude_lab.evaluate.evaluate import FOLDER, SCORES
from sude_lab.evaluate.metrics import MEASURES
from sude_lab.io.files import atomic_write
from sude_lab.runs.folder import Run
from sude_lab.sweep.grid import Job, Plan, make_plan, read_grid
from sude_lab.sweep.sweep import sweep
from sude_lab.tuning import TuningConfig
from sude_lab.world.subjects import StudyConfig, describe, keep_strip, run_study, strip_name

RESULTS = stored.RESULTS
GRIDS = data_folder() / "grids"
SWEEPS = Path("results")
"""Where sweeps are made, and gone on with."""
SUBJECTS = (0, 1, 2, 5, 7)
STEPS = 200
"""Steps of a run, where nothing else is said."""


def _study(out: str, *methods: str, **settings: Any) -> StudyConfig:
    given: dict[str, Any] = {"subjects": "held-out", "numbers": SUBJECTS} | settings
    return StudyConfig(out=RESULTS / f"{out}.csv", pictures=RESULTS / out, methods=methods, **given)


def _weights(method: str, factors: Sequence[float]) -> tuple[str, ...]:
    return tuple(f"weight_sude={factor * stored.WEIGHTS[method]:g}" for factor in factors)


_OTHERS = tuple(
    _study("methods_w_s", method, variants=_weights(method, (0.5, 2.0)))
    for method in ("custom_diffusion", "vico")
)
_HELD_OUT = replace(
    _study("held_out", *stored.WEIGHTS, variants=("plain", "sude"), num_seeds=3), pictures=None
)
_PROMPTS = _study(
    "prompts",
    "dreambooth",
    variants=("plain", "sude"),
    num_images=4,
    asks=("P1", "P2", "P3", "background", "attribute and background"),
)
_CLASS_IMAGES = _study(
    "class_images",
    "dreambooth",
    variants=("prior_loss_weight=1,weight_sude=0", "prior_loss_weight=1"),
    num_images=4,
    asks=("P1", "background"),
)


@dataclass(frozen=True)
class Experiment:
    """A table or figure of the paper: what to run, and the table that comes of it."""

    title: str
    studies: tuple[StudyConfig, ...]
    grids: tuple[str, ...]
    table: Callable[[], pd.DataFrame]


def run(name: str, *, workers: int = os.cpu_count() or 1, out: Path = SWEEPS) -> None:
    """Run what is missing of an experiment and keep its rows and pictures in `data/results/`.

    Args:
        name: One of `EXPERIMENTS`.
        workers: Processes, a thread each.
        out: Where sweeps are made; they share `out / "runs"`.

    Raises:
        UserError: a run of a grid failed.
    """
    experiment = EXPERIMENTS[name]
    for study in experiment.studies:
        run_study(replace(study, workers=workers))
    for grid in experiment.grids:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, spawn, torch.set_num_threads, (1,)) as pool:
            shared = [pool.submit(_sweep, grid, out, k == 0) for k in range(workers)]
            failed = {key: why for one in shared for key, why in one.result().items()}
        if failed:
            key, reason = next(iter(failed.items()))
            raise UserError(f"{len(failed)} runs of {grid} failed, {key} because: {reason}")
        keep(grid, out=out)


def _sweep(grid: str, out: Path, progress: bool) -> dict[str, str]:
    return sweep(GRIDS / f"{grid}.yaml", out / grid, runs=out / "runs", progress=progress)


def keep(grid: str, *, out: Path = SWEEPS) -> pd.DataFrame:
    """Write a finished sweep's rows and strips of pictures as the studies' are; return the rows.

    A row a picture, its `variant` the settings of SuDe that the grid names.
    """
    plan = make_plan(read_grid(GRIDS / f"{grid}.yaml"), out / grid, out / "runs")
    table = pd.DataFrame([row for job in plan.jobs for row in _rows(plan, job, RESULTS / grid)])
    with atomic_write(RESULTS / f"{grid}.csv") as path:
        table.to_csv(path, index=False)
    return table


def _rows(plan: Plan, job: Job, strips: Path) -> Iterator[dict[str, Any]]:
    folder, config = plan.runs / job.key, job.config
    scores = pd.read_parquet(job.scores(plan.runs))
    files = pd.read_csv(folder / FOLDER / SCORES).set_index(["prompt", "picture"])["file"]
    key = {"subject": job.label["subject"], "method": config.method}
    key |= {"variant": _variant(config), "seed": config.seed}
    strip: dict[str, list[Image.Image]] = {}
    values = scores.pivot(
        index=["prompt", "attribute", "picture"], columns="metric", values="value"
    )
    means = scores[["open_gates", "rho"]].iloc[0].to_dict()
    ordered = scores[["prompt", "attribute", "picture"]].drop_duplicates()
    for prompt, attribute, k in ordered.itertuples(index=False, name=None):
        found = values.loc[(prompt, attribute, k)]
        place = Path(files[(prompt, k)].iloc[0])
        strip.setdefault(prompt, []).append(Image.open(folder / place))
        yield (
            key
            | describe(config)
            | means
            | {"attribute": attribute, "prompt": Run(folder, config).prompt(prompt), "image": k}
            | {measure: round(found.get(measure, float("nan")), 5) for measure in MEASURES}
        )
    keep_strip(strips / strip_name(*key.values()), strip)


def _variant(config: TuningConfig) -> str:
    """Name a run by what it sets, as a variant of a study: its w_s where it sets nothing else."""
    parts = ["prior=current"] if config.prior == "current" else []
    parts += [] if config.truncate else ["truncate=false"]
    parts += [f"truncate_at={config.truncate_at:g}"] if config.truncate_at != 1 else []
    if config.max_train_steps != STEPS:
        parts.append(f"max_train_steps={config.max_train_steps}")
    return ",".join(parts or [f"weight_sude={config.weight_sude:g}"])


EXPERIMENTS = {
    "table1": Experiment(
        "Table 1: methods, with SuDe at 0.5, 1, 2 w_s and the best of them (gain in alignment)",
        (replace(_HELD_OUT, num_seeds=1), *_OTHERS),
        ("w_s",),
        stored.table1,
    ),
    "table2": Experiment("Table 2: prompts P1, P2, P3", (_PROMPTS,), (), stored.table2),
    "fig4": Experiment("Fig. 4: w_s", (), ("w_s",), stored.fig4),
    "fig5": Experiment("Fig. 5: truncation", (), ("truncation", "collapse"), stored.fig5),
    "fig6": Experiment("Fig. 6: attribute and background", (_PROMPTS,), (), stored.fig6),
    "fig8": Experiment(
        "Fig. 8: class images against SuDe", (_PROMPTS, _CLASS_IMAGES), (), stored.fig8
    ),
}


@dataclass(frozen=True)
class PaperConfig:
    """Which table or figure of the paper to repeat on the embedded world."""

    name: Annotated[
        Literal["table1", "table2", "fig4", "fig5", "fig6", "fig8"], tyro.conf.Positional
    ]
    run: bool = True
    """Run what is missing of its grids and studies first."""
    workers: int = os.cpu_count() or 1
    """Processes, one thread each."""
    out: Path = SWEEPS
    """Folder in which its grids are swept."""


def main(config: PaperConfig) -> None:
    """Run what is missing, write the table beside the results and print it."""
    experiment = EXPERIMENTS[config.name]
    if config.run:
        run(config.name, workers=config.workers, out=config.out)
    text = experiment.table().to_markdown(index=False, disable_numparse=True)
    with atomic_write(RESULTS / f"{config.name}.md") as path:
        path.write_text(f"{experiment.title}\n\n{text}\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main(tyro.cli(PaperConfig))
