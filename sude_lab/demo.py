"""The demo: one drawn subject, tuned with and without SuDe, and a report of the difference."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from diffusers.utils import make_image_grid
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image
from tqdm.auto import tqdm

from sude_lab import __version__
from sude_lab.errors import UserError, check_whole
from sude_lab.evaluate.metrics import MEASURES
from sude_lab.evaluate.statistics import drawings_interval
from sude_lab.generation import MOST
from sude_lab.io.files import atomic_write, require_own, write_file, write_table
from sude_lab.io.opening import open_backbone
from sude_lab.io.pictures import open_picture
from sude_lab.methods import configure
from sude_lab.runs.folder import CONFIG, Run, read_config, run_tuning
from sude_lab.view import plots
from sude_lab.world.oracle import load_oracle
from sude_lab.world.subjects import Subject, describe, measure, subject

UNTUNED, PLAIN, SUDE, NO_TRUNCATION = "untuned model", "plain", "sude", "sude, no truncation"
WATCHED_EVERY = 4
"""Plain tuning computes SuDe's loss in every fourth step, for its curves alone."""
VARIANTS: dict[str, dict[str, Any]] = {
    PLAIN: {"weight_sude": 0.0, "sude_every": WATCHED_EVERY},
    SUDE: {},
    NO_TRUNCATION: {"truncate": False, "prior": "current"},
}
RESULTS, REPORT, STRIP = "results.csv", "report.html", "difference.png"
SETTINGS = (
    *("method", "train", "weight_sude", "prior", "weighting", "truncate", "max_train_steps"),
    *("train_batch_size", "learning_rate", "token_learning_rate", "seed"),
)
STEPS = 100
"""Half of the model's default, which loses nothing: on 36 subjects (data/results/fair.csv) fidelity
after 100 steps is at most .05 below that after 200 (95 % interval), and alignment is higher."""
COLLAPSED_AFTER = 0.5
"""The part of the steps after which DreamBooth without eq. 9 has lost the category: after step 50
in data/results/collapse.csv, where two subjects of two have."""
Grids = dict[str, dict[str, list[Image.Image]]]


def run_demo(
    out: Path | str,
    *,
    seed: int = 0,
    category: str = "dog",
    num_images: int = 8,
    max_train_steps: int = STEPS,
    progress: bool = True,
) -> pd.DataFrame:
    """Tune on one drawn subject with and without SuDe, same seed, and write the report.

    `out` gets `results.csv` (a row a picture), `difference.png`, `report.html` and the runs, which
    are kept when it is called again. A third run shows what eq. 9 is good for.
    """
    check_whole("--num-images", num_images, 1, MOST)
    began, busy = time.perf_counter(), time.process_time()
    out, base, oracle = Path(out), open_backbone(), load_oracle()
    base.check_category(category)
    who, picture = subject("demo", seed, category), out / "subject.png"
    shared: dict[str, Any] = {"image": picture, "category": category, "monitor_sude": True}
    shared |= {"seed": seed, "max_train_steps": max_train_steps}
    configs = {name: configure(shared | settings, base) for name, settings in VARIANTS.items()}
    steps = math.ceil(COLLAPSED_AFTER * configs[NO_TRUNCATION].max_train_steps)
    configs[NO_TRUNCATION] = replace(configs[NO_TRUNCATION], max_train_steps=steps)
    folders = {name: out / "runs" / name.replace(", ", "-").replace(" ", "-") for name in configs}
    for name, folder in folders.items():  # before anything there is changed
        if (folder / CONFIG).is_file() and read_config(folder / CONFIG) != configs[name]:
            raise UserError(f"{out} holds a demo of other settings: choose another --out.")
    require_own(out, RESULTS, "subject,variant,", (REPORT, STRIP))
    shown = b""
    with suppress(UserError):
        shown = open_picture(picture).tobytes()
    if picture.exists() and shown != who.picture.tobytes():
        raise UserError(f"{picture} is another picture: choose another --out.")
    with atomic_write(picture) as path:
        who.picture.save(path)

    grids: Grids = {name: {} for name in (UNTUNED, *configs)}
    judged: dict[str, Any] = {"seed": seed + 500, "num_images": num_images}
    runs: dict[str, Run] = {}
    about = {"subject": who.name, "variant": UNTUNED, "category": category, "seed": seed}
    rows = [about | row for row in measure(base, oracle, who, None, grids=grids[UNTUNED], **judged)]
    for name, config in configs.items():
        # No samples and no logs: results.csv and the report hold everything.
        how: dict[str, Any] = {"num_samples": 0, "report_to": "none", "progress": progress}
        how |= {"resume": folders[name].is_dir(), "label": f"tuning, {name}"}
        runs[name] = run_tuning(config, folders[name], backbone=base.copy(), **how)
        backbone = runs[name].load(backbone=base.copy())
        if progress:
            tqdm.write(f"drawing and judging: {name}")
        about = {"subject": who.name, "variant": name} | describe(config)
        measured = measure(backbone, oracle, who, config, grids=grids[name], **judged)
        rows += [about | row for row in measured]

    table = pd.DataFrame(rows)
    write_table(out / RESULTS, table)
    strip = difference_figure(grids)
    with atomic_write(out / STRIP) as path:
        strip.savefig(path, bbox_inches="tight")
    took = f"{time.perf_counter() - began:.0f} s, {time.process_time() - busy:.0f} s"
    write_file(out / REPORT, report(who, table, grids, runs, took))
    return table


def table_with_intervals(table: pd.DataFrame) -> pd.DataFrame:
    """Return a row a variant: means over the pictures of attributes the subject does not show.

    The 95 % intervals are those of `drawings_interval`: they speak of this one subject and seed.
    """
    rows = []
    for variant, group in table[table["attribute"] != ""].groupby("variant", sort=False):
        row: dict[str, Any] = {"variant": variant, "pictures": len(group)}
        for name in MEASURES:
            ends = drawings_interval(group[name], group["attribute"], group["image"])
            row |= {name: ends.mean, f"{name}_low": ends.low, f"{name}_high": ends.high}
        rows.append(row)
    return pd.DataFrame(rows)


def difference_figure(grids: Grids) -> Figure:
    """Return the picture of the difference: a row a model, a column a prompt."""
    columns = len(next(iter(grids.values())))
    size = (1.1 * columns + 1.4, 0.57 * len(grids) + 0.35)  # as wide as a page, so is its text
    figure = Figure(figsize=size, dpi=2 * plots.DPI, layout="constrained")
    plots.picture_table(figure.subplots(), grids)
    return figure


def report(who: Subject, table: pd.DataFrame, grids: Grids, runs: dict[str, Run], took: str) -> str:
    """Return the report as one HTML page that needs no network."""
    metrics = {name: run.metrics() for name, run in runs.items()}
    curves = Figure(figsize=(13, 3.4), dpi=110, layout="constrained")
    left, middle, right = curves.subplots(1, 3)
    plots.membership(left, metrics)
    plots.open_gates(middle, metrics)
    plots.loss_against_threshold(right, metrics[SUDE])
    settings = {
        name: {key: getattr(run.config, key) for key in SETTINGS}
        | {"seconds": run.environment.get("seconds")}
        for name, run in runs.items()
    }
    here = FileSystemLoader(Path(__file__).parent)
    pages = Environment(loader=here, autoescape=True, undefined=StrictUndefined)
    look: dict[str, Any] = {"bbox_inches": "tight"}
    return pages.get_template("report.html.jinja").render(
        who=who,
        seed=runs[SUDE].config.seed,
        subject=plots.data_url(who.picture),
        strip=plots.data_url(difference_figure(grids), **look),
        measures=MEASURES,
        means=table_with_intervals(table).to_dict("records"),
        curves=plots.data_url(curves, **look),
        variants=list(grids),
        rows={
            attribute: [_cell(table, grids, name, attribute) for name in grids]
            for attribute in next(iter(grids.values()))
        },
        settings=pd.DataFrame(settings).to_html(border=0),
        watched_every=WATCHED_EVERY,
        took=took,
        version=__version__,
    )


def _cell(table: pd.DataFrame, grids: Grids, variant: str, attribute: str) -> dict[str, Any]:
    """Return what the report shows of one model under one prompt."""
    images = grids[variant][attribute]
    columns = len(images) if len(images) % 4 else 4
    name = "" if attribute == "as tuned" else attribute
    rows = table[(table["attribute"] == name) & (table["variant"] == variant)]
    return {
        "variant": variant,
        "picture": plots.data_url(make_image_grid(images, len(images) // columns, columns)),
        "prompt": rows["prompt"].iloc[0],
        "alignment": rows["attribute_alignment"].mean(),
    }
