"""The paper's tables and figures, repeated on the embedded world: one command each.

    python -m studies.paper fig4

runs what is still missing of its grids and studies (on every core; it may be stopped and given
again), keeps the rows in `data/results/*.csv` with strips of pictures beside them, and writes
`fig4.md`. With `--no-run` it only writes the table anew; `--help` lists the names. The ablations
are grids of `data/grids/`: their runs are those of `sude-lab sweep`, in `results/runs`.

The subjects are those of the held-out study, fixed before anything was seen. Intervals are 95 %
bootstrap intervals over subjects; gains are paired (same subject, same seed).
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

from sude_lab.errors import UserError
from sude_lab.evaluate.evaluate import FOLDER, SCORES
from sude_lab.evaluate.metrics import MEASURES, bootstrap_interval, gains
from sude_lab.io.files import atomic_write
from sude_lab.io.opening import data_folder
from sude_lab.runs.folder import Run
from sude_lab.sweep.grid import Job, Plan, make_plan, read_grid
from sude_lab.sweep.sweep import sweep
from sude_lab.tuning import TuningConfig
from sude_lab.world.subjects import StudyConfig, describe, keep_strip, run_study, strip_name

RESULTS = data_folder() / "results"
GRIDS = data_folder() / "grids"
SWEEPS = Path("results")
"""Where sweeps are made, and gone on with."""
SUBJECTS = (0, 1, 2, 5, 7)
ALIGNMENT, FIDELITY, CATEGORY = MEASURES
BACKGROUND = "background_alignment"
FACTORS = (0.0, 0.5, 1.0, 2.0, 4.0)
"""The paper's multiples of w_s."""
WEIGHTS = {"dreambooth": 2.0, "custom_diffusion": 2.0, "vico": 1.5, "textual_inversion": 1.0}
"""w_s of the methods on the embedded model when these studies were made."""
STEPS = 200
"""Steps of a run, where nothing else is said."""


def _study(out: str, *methods: str, **settings: Any) -> StudyConfig:
    given: dict[str, Any] = {"subjects": "held-out", "numbers": SUBJECTS} | settings
    return StudyConfig(out=RESULTS / f"{out}.csv", pictures=RESULTS / out, methods=methods, **given)


def _weights(method: str, factors: Sequence[float]) -> tuple[str, ...]:
    return tuple(f"weight_sude={factor * WEIGHTS[method]:g}" for factor in factors)


_OTHERS = tuple(
    _study("methods_w_s", method, variants=_weights(method, (0.5, 2.0)))
    for method in ("custom_diffusion", "vico")
)
_HELD_OUT = replace(
    _study("held_out", *WEIGHTS, variants=("plain", "sude"), num_seeds=3), pictures=None
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


def read(name: str) -> pd.DataFrame:
    """Return the stored rows of a study.

    Raises:
        UserError: it has not been run.
    """
    path = RESULTS / f"{name}.csv"
    if not path.is_file():
        raise UserError(f"{path} is missing: run its experiment without --no-run.")
    table = pd.read_csv(path)
    return table[table["error"].isna()] if "error" in table else table


def by_factor(*tables: pd.DataFrame) -> pd.DataFrame:
    """Return the pictures that ask for a new attribute, with `factor`: w_s over its default."""
    rows = pd.concat(tables, ignore_index=True)
    rows = rows[rows["attribute"].fillna("") != ""]
    factor = rows["weight_sude"] / rows["method"].map(WEIGHTS)
    rows = rows.assign(factor=factor.round(4), variant=factor.map("{:g} w_s".format))
    return rows.drop_duplicates(["method", "subject", "seed", "factor", "attribute", "image"])


def dosed() -> pd.DataFrame:
    """Return the rows of Fig. 4: DreamBooth at every multiple of w_s, two seeds."""
    return by_factor(read("w_s")).sort_values("factor", kind="stable")


def against(
    table: pd.DataFrame, base: str, measures: Sequence[str], *, by: Sequence[str] = ("method",)
) -> pd.DataFrame:
    """Return a row a (`by`, variant) in words: every measure's mean, and its gain over `base`."""
    told = gains(table, measures, by=by, against=base)
    rows = []
    for names, group in told.groupby([*by, "variant"], sort=False):
        line = dict(zip([*by, "variant"], names, strict=True))
        for row in group.to_dict("records"):
            text = f"{row['mean']:.2f}"
            if row["gain"] == row["gain"]:
                text += f" ({row['gain']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}])"
            line[str(row["measure"]).replace("_", " ")] = text
        rows.append(line | {"runs": f"{group['subjects'].iloc[0]} x {_seeds(group)}"})
    return pd.DataFrame(rows)


def _seeds(group: pd.DataFrame) -> int:
    return int(group["runs"].iloc[0] // group["subjects"].iloc[0])


def best_factors(table: pd.DataFrame, measure: str = ALIGNMENT) -> pd.DataFrame:
    """Return a row a (method, subject): the gain at each factor, at the best, at the others' best.

    `best` is the largest gain of 0.5, 1 and 2 w_s, chosen on the very pictures that it is measured
    on: it flatters. `chosen by the others` takes the factor with the highest mean gain over the
    *other* subjects.
    """
    runs = table.groupby(["method", "subject", "factor"])[measure].mean().unstack("factor")
    gain = runs[[0.5, 1.0, 2.0]].sub(runs[0.0], axis=0)
    rows = []
    for (method, subject), line in gain.iterrows():
        others = gain.loc[method].drop(subject).mean()
        rows.append(
            {"method": method, "subject": subject}
            | {f"{factor:g} w_s": line[factor] for factor in gain.columns}
            | {"best": line.max(), "chosen by the others": line[others.idxmax()]}
        )
    return pd.DataFrame(rows)


def table1() -> pd.DataFrame:
    """Return Table 1: its methods, plain, and the gain of SuDe at 0.5, 1, 2 w_s and their best."""
    others = [read("methods_w_s"), _first_seed("w_s")]
    held_out = read("held_out")
    swept = held_out["method"].isin(pd.concat(others)["method"])
    rows = by_factor(held_out[swept & (held_out["seed"] == 0)], *others)
    plain = rows[rows["factor"] == 0].groupby("method")[ALIGNMENT].mean()
    lines = []
    for method, group in best_factors(rows).groupby("method", sort=False):
        line = {"method": str(method).replace("_", " "), "plain": f"{plain[method]:.2f}"}
        for name in group.columns[2:]:
            low, high = bootstrap_interval(group[name].to_numpy())
            line[name] = f"{group[name].mean():+.2f} [{low:+.2f}, {high:+.2f}]"
        lines.append(line)
    return pd.DataFrame(lines)


def fig4() -> pd.DataFrame:
    """Return Fig. 4: alignment, fidelity and category over the multiples of w_s."""
    return against(dosed(), "0 w_s", MEASURES)


def truncation() -> pd.DataFrame:
    """Return the rows of Fig. 5: with, without and with other thresholds, plain tuning as well."""
    told = {
        "weight_sude=0": "plain",
        "weight_sude=2": "SuDe, stops at rho = 1",
        "truncate_at=0.5": "SuDe, stops at rho = 0.5",
        "truncate_at=1.5": "SuDe, stops at rho = 1.5",
        "truncate=false": "never stops",
        "prior=current": "stops at rho = 1, prior current",
        "prior=current,truncate=false": "never stops, prior current",
    }
    rows = read("truncation")
    rows = rows[rows["variant"].isin(told) & (rows["attribute"].fillna("") != "")]
    order = {name: k for k, name in enumerate(told)}
    rows = rows.sort_values("variant", key=lambda v: v.map(order), kind="stable")
    return rows.assign(variant=rows["variant"].map(told))


def fig5() -> pd.DataFrame:
    """Return Fig. 5: what the truncation is for."""
    return against(truncation(), "plain", MEASURES)


def collapse() -> pd.DataFrame:
    """Return the pictures of new attributes after 50, 100 and 200 steps, truncated and not."""
    few, all_steps = read("collapse"), read("truncation")
    never = all_steps["variant"] == "prior=current,truncate=false"
    all_steps = all_steps[never | (all_steps["variant"] == "weight_sude=2")]
    rows = pd.concat([all_steps[all_steps["subject"].isin(few["subject"])], few])
    rows = rows[rows["attribute"].fillna("") != ""]
    told = {True: "stops at rho = 1", False: "never stops, prior current"}
    return rows.assign(run=rows["truncate"].astype(bool).map(told)).reset_index(drop=True)


def asked(*names: str) -> pd.DataFrame:
    """Return the rows of the study of prompts for these asks."""
    rows = read("prompts")
    return rows[rows["ask"].isin(names)]


def table2() -> pd.DataFrame:
    """Return Table 2: three ways to ask for an attribute, plain and with SuDe."""
    return against(asked("P1", "P2", "P3"), "plain", MEASURES, by=("ask",))


def fig6() -> pd.DataFrame:
    """Return Fig. 6: an attribute and a background asked for at once; `both` multiplies the two."""
    rows = asked("attribute and background")
    rows = rows.assign(both=rows[ALIGNMENT] * rows[BACKGROUND])
    return against(rows, "plain", (ALIGNMENT, BACKGROUND, "both", FIDELITY), by=("ask",))


def class_images() -> pd.DataFrame:
    """Return the rows of Fig. 8: attributes (P1) and backgrounds, with class images, SuDe, both."""
    told = {
        "prior_loss_weight=1,weight_sude=0": "class images",
        "prior_loss_weight=1": "SuDe and class images",
    }
    others = read("class_images")
    rows = asked("P1", "background")
    rows = pd.concat([rows, others.assign(variant=others["variant"].map(told))], ignore_index=True)
    aimed = rows[ALIGNMENT].where(rows["ask"] == "P1", rows[BACKGROUND])
    order = ["plain", "class images", "sude", "SuDe and class images"]
    rows = rows.assign(alignment=aimed, edit=rows["ask"].replace({"P1": "attribute"}))
    return rows.sort_values("variant", key=lambda v: v.map(order.index), kind="stable")


def fig8() -> pd.DataFrame:
    """Return Fig. 8: class-image regularisation (eq. 14) against SuDe, by what is edited."""
    return against(class_images(), "plain", ("alignment", FIDELITY), by=("edit",))


def claims() -> pd.DataFrame:
    """Return what the paper claims, what it reports on Stable Diffusion, and what is seen here.

    `agrees` is yes or no where the 95 % interval over subjects lies on one side of 0 (for "holds",
    within 0.05 of 0, or below 0), and "cannot tell" elsewhere. The paper's numbers are BLIP-T
    points of real photographs, ours are probabilities of a drawn world's oracle: only signs and
    order can be compared.
    """
    held_out = read("held_out")
    held_out = held_out[held_out["attribute"].fillna("") != ""]
    rows = []
    for method, name, reported in (
        ("vico", "ViCo", "+4.2 / +2.6"),
        ("custom_diffusion", "Custom Diffusion", "+0.9 / +2.0"),
        ("dreambooth", "DreamBooth", "+1.2 / +1.5"),
    ):
        mine = held_out[held_out["method"] == method]
        change = _change(mine, "plain", "sude", ALIGNMENT)
        rows.append(("Table 1", f"SuDe raises alignment: {name}", reported, *change))
        change = _change(mine, "plain", "sude", FIDELITY, holds=True)
        rows.append(("Table 1", f"fidelity holds: {name}", "slight fluctuation", *change))
    w_s = dosed()
    for claim, reported, a, b, measure, holds in (
        ("2 w_s raises alignment over 1 w_s", "more with more", 1, 2, ALIGNMENT, False),
        ("4 w_s raises alignment over 1 w_s", "more with more", 1, 4, ALIGNMENT, False),
        ("fidelity holds at 2 w_s", "holds", 0, 2, FIDELITY, True),
    ):
        change = _change(w_s, f"{a} w_s", f"{b} w_s", measure, holds=holds)
        rows.append(("Fig. 4", claim, reported, *change))
    change = _change(w_s, "4 w_s", "1 w_s", FIDELITY)
    rows.append(("Fig. 4", "at 4 w_s fidelity is below 1 w_s", "lost for a bowl", *change))
    stops, never = "SuDe, stops at rho = 1", "never stops, prior current"
    change = _change(truncation(), never, stops, CATEGORY)
    rows.append(("Fig. 5", "never stopping costs the category", "collapse at epoch 3", *change))
    for ask in ("P1", "P2", "P3"):
        change = _change(asked(ask), "plain", "sude", ALIGNMENT)
        rows.append(("Table 2", f"SuDe adds to {ask}", "over +1.5", *change))
    plain = asked("P1", "P3")
    plain = plain[plain["variant"] == "plain"]
    plain = plain.assign(variant=plain["ask"])
    change = _change(plain, "P1", "P3", ALIGNMENT)
    rows.append(("Table 2", "without SuDe P3 is above P1", "41.2, the highest", *change))
    both = asked("attribute and background")
    both = both.assign(both=both[ALIGNMENT] * both[BACKGROUND])
    change = _change(both, "plain", "sude", "both")
    rows.append(("Fig. 6", "attribute and background combine", "pictures", *change))
    edits = class_images()
    background = edits[edits["edit"] == "background"]
    change = _change(background, "plain", "class images", "alignment")
    rows.append(("Fig. 8", "class images raise background edits", "pictures", *change))
    attribute = edits[edits["edit"] == "attribute"]
    change = _change(attribute, "class images", "sude", "alignment")
    rows.append(("Fig. 8", "attributes: SuDe above class images", "pictures", *change))
    columns = ["paper", "claim", "reported there", "seen here", "agrees"]
    return pd.DataFrame(rows, columns=columns)


def _change(
    table: pd.DataFrame, base: str, other: str, measure: str, *, holds: bool = False
) -> tuple[str, str]:
    """Return the paired change from one variant to another in words, and what it says."""
    told = gains(table[table["variant"].isin([base, other])], [measure], against=base)
    gain, low, high = told[told["variant"] == other].iloc[0][["gain", "low", "high"]]
    if holds:
        verdict = "no" if high < 0 else "yes" if low > -0.05 and high < 0.05 else "cannot tell"
    else:
        verdict = "no" if high < 0 else "yes" if low > 0 else "cannot tell"
    return f"{gain:+.2f} [{low:+.2f}, {high:+.2f}]", verdict


def _first_seed(name: str) -> pd.DataFrame:
    rows = read(name)
    return rows[rows["seed"] == 0]


EXPERIMENTS = {
    "table1": Experiment(
        "Table 1: methods, with SuDe at 0.5, 1, 2 w_s and the best of them (gain in alignment)",
        (replace(_HELD_OUT, num_seeds=1), *_OTHERS),
        ("w_s",),
        table1,
    ),
    "table2": Experiment("Table 2: prompts P1, P2, P3", (_PROMPTS,), (), table2),
    "fig4": Experiment("Fig. 4: w_s", (), ("w_s",), fig4),
    "fig5": Experiment("Fig. 5: truncation", (), ("truncation", "collapse"), fig5),
    "fig6": Experiment("Fig. 6: attribute and background", (_PROMPTS,), (), fig6),
    "fig8": Experiment("Fig. 8: class images against SuDe", (_PROMPTS, _CLASS_IMAGES), (), fig8),
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
