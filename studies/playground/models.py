"""The models of the playground: one drawn subject, one seed, tuned in six ways.

The subject is the demo's, the weights of SuDe and the stops are those of the registered comparison
(data/grids/fair.md), the run without truncation is the demo's: nothing was chosen for its effect.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sude_lab.backbone import Backbone
from sude_lab.config import TuningConfig
from sude_lab.demo import NO_TRUNCATION, PLAIN, VARIANTS
from sude_lab.errors import UserError
from sude_lab.io.files import atomic_write
from sude_lab.runs.folder import ENVIRONMENT, Run, run_tuning
from sude_lab.world.subjects import subject

CATEGORY, SEED, STEPS = "dog", 0, 200
WEIGHTS = (0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Model:
    """A picture of the page: a run, and the step after which it is drawn."""

    name: str
    label: str
    run: str
    """The name of the run's folder."""
    settings: dict[str, Any] = field(default_factory=dict)
    stop: int = 0
    """The step whose weights are drawn; 0: the last one."""


def models(steps: int = STEPS) -> tuple[Model, ...]:
    """Return all tuned models, of runs of so many steps."""
    early, short = max(1, steps // 8), max(1, steps // 4)
    plain = VARIANTS[PLAIN] | {"max_train_steps": steps}
    never = VARIANTS[NO_TRUNCATION] | {"weight_sude": 2.0, "max_train_steps": short}
    return (
        Model(f"plain-{early}", f"plain, {early} steps", "plain", plain, early),
        Model("plain", f"plain, {steps} steps", "plain", plain),
        *(
            Model(f"sude-{w:g}", f"SuDe, w_s = {w:g}, {steps} steps", f"sude-{w:g}", settings)
            for w in WEIGHTS
            for settings in ({"weight_sude": w, "max_train_steps": steps},)
        ),
        Model("never", f"no truncation, w_s = 2, {short} steps", "no-truncation", never),
    )


def tuned(runs: Path, base: Backbone, steps: int = STEPS) -> list[tuple[Model, Run]]:
    """Return every model with its run; what is missing in the folder `runs` is tuned first.

    Raises:
        UserError: the folder holds a run of another number of steps.
    """
    picture = runs / "subject.png"
    with atomic_write(picture) as path:
        subject("demo", SEED, CATEGORY).picture.save(path)
    done = []
    for model in models(steps):
        folder = runs / model.run
        if not (folder / ENVIRONMENT).is_file():
            run_tuning(
                TuningConfig(picture, CATEGORY, seed=SEED, **model.settings),
                folder,
                backbone=base.copy(),
                resume=folder.is_dir(),
                keep_at=(model.stop,) if model.stop else (),
                num_samples=0,
                report_to="none",
                label=f"tuning, {model.label}",
            )
        run = Run.open(f"{folder}@{model.stop}" if model.stop else folder)
        if run.config.max_train_steps != model.settings["max_train_steps"]:
            raise UserError(f"{folder} has {run.config.max_train_steps} steps: name other --runs.")
        done.append((model, run))
    return done
