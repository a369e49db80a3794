"""The demo: one drawn subject, tuned with and without SuDe, and a report of the difference."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
from diffusers.utils import make_image_grid
from PIL import Image
from tqdm.auto import tqdm

from sude_lab import __version__
from sude_lab.errors import UserError
from sude_lab.evaluate.metrics import MEASURES, bootstrap_interval
from sude_lab.generation import MOST
from sude_lab.io.files import atomic_write, require_own
from sude_lab.io.opening import open_backbone
from sude_lab.io.reading import read_json
from sude_lab.runs.folder import CONFIG, ENVIRONMENT, Run, _read_config, run_tuning
from sude_lab.tuning import TuningConfig, resolve
from sude_lab.view import plots
from sude_lab.world import subjects as study
from sude_lab.world.oracle import load_oracle

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNTUNED = "untuned model"
RESULTS, REPORT, STRIP = "results.csv", "report.html", "difference.png"
Grids = dict[str, dict[str, list[Image.Image]]]


def run_demo(
    out: Path | str,
    *,
    seed: int = 0,
    category: str = "dog",
    method: Literal["dreambooth", "textual_inversion"] = "dreambooth",
    num_images: int = 8,
    max_train_steps: int | None = None,
    truncation: bool = True,
    progress: bool = True,
) -> pd.DataFrame:
    """Tune on one drawn subject with and without SuDe, same seed, and write the report.

    Writes `results.csv` (a row a picture), `difference.png`, `report.html` and the runs' folders
    into `out`; finished runs are kept when it is called again. With `truncation` a third run shows
    what happens without eq. 9.

    Raises:
        UserError: the category is unknown, a number is out of range, or `out` cannot be written or
            holds other files of these names.
    """
    out = Path(out)
    if out.is_file():
        raise UserError(f"{out} is a file: --out takes a folder.")
    if not 1 <= num_images <= MOST:
        raise UserError(f"--num-images is {num_images}: it must lie between 1 and {MOST}.")
    base, oracle = open_backbone(), load_oracle()
    base.check_category(category)
    who = study.subject("demo", seed, category)
    picture = out / "subject.png"
    variants = [study.PLAIN, study.SUDE, *([study.NO_TRUNCATION] if truncation else [])]
    configs = {
        variant.name: TuningConfig(
            image=picture,
            category=category,
            method=method,
            seed=seed,
            max_train_steps=max_train_steps,
            monitor_sude=True,
            **variant.settings,
        )
        for variant in variants
    }
    folders = {name: out / "runs" / name.replace(", ", "-").replace(" ", "-") for name in configs}
    for name, folder in folders.items():  # before anything there is changed
        before = folder / CONFIG
        if before.is_file() and _read_config(before) != resolve(configs[name], base):
            raise UserError(f"{out} holds a demo of other settings: choose another --out.")
    require_own(out, RESULTS, "subject,variant,", (REPORT, STRIP))
    if picture.exists() and not _shows(picture, who.picture):
        raise UserError(f"{picture} is another picture: choose another --out.")
    with atomic_write(picture) as path:
        who.picture.save(path)

    grids: Grids = {}
    rows: list[dict[str, Any]] = []
    runs: dict[str, Run] = {}
    grids[UNTUNED] = {}
    about = {"subject": who.name, "variant": UNTUNED, "category": category, "seed": seed}
    rows += [
        about | row
        for row in study.measure(
            base, oracle, who, None, seed=seed + 500, num_images=num_images, grids=grids[UNTUNED]
        )
    ]
    for variant in variants:
        config, folder = configs[variant.name], folders[variant.name]
        backbone = base.copy()
        unfinished = folder.is_dir() and not (folder / ENVIRONMENT).is_file()
        if (folder / ENVIRONMENT).is_file():
            runs[variant.name] = Run.open(folder)
            backbone = runs[variant.name].load()
        else:
            runs[variant.name] = run_tuning(
                config,
                folder,
                backbone=backbone,
                resume=unfinished,
                num_samples=0,
                report_to="none",  # results.csv and the report tell it all
                progress=progress,
                label=f"tuning, {variant.name}",
            )
        grids[variant.name] = {}
        tqdm.write(f"drawing and judging: {variant.name}") if progress else None
        config = resolve(config, base)
        measured = study.measure(
            backbone,
            oracle,
            who,
            config,
            seed=seed + 500,
            num_images=num_images,
            grids=grids[variant.name],
        )
        about = {"subject": who.name, "variant": variant.name} | study.describe(config)
        rows += [about | row for row in measured]

    table = pd.DataFrame(rows)
    with atomic_write(out / RESULTS) as path:
        table.to_csv(path, index=False)
    strip = difference_figure(grids)
    with atomic_write(out / STRIP) as path:
        strip.savefig(path, dpi=110, bbox_inches="tight")
    with atomic_write(out / REPORT) as path:
        path.write_text(report(who, table, grids, runs, seed), encoding="utf-8")
    return table


def _shows(file: Path, picture: Image.Image) -> bool:
    try:
        with Image.open(file) as found:
            return found.size == picture.size and found.tobytes() == picture.tobytes()
    except (OSError, ValueError):
        return False


def table_with_intervals(table: pd.DataFrame) -> pd.DataFrame:
    """Return a row a variant: means over the pictures of attributes the subject does not show.

    The 95 % intervals are bootstrapped over pictures: they speak of this one subject and seed.
    """
    asked = table[table["attribute"] != ""]
    rows = []
    for variant, group in asked.groupby("variant", sort=False):
        row: dict[str, Any] = {"variant": variant, "pictures": len(group)}
        for name in MEASURES:
            row[name] = group[name].mean()
            row[f"{name}_low"], row[f"{name}_high"] = bootstrap_interval(group[name].to_numpy())
        rows.append(row)
    return pd.DataFrame(rows)


def difference_figure(grids: Grids, per_cell: int = 2) -> Figure:
    """Return the picture of the difference: a row a model, a column a prompt."""
    from matplotlib.figure import Figure

    columns = len(next(iter(grids.values())))
    figure = Figure(figsize=(1.9 * columns + 1.5, 0.98 * len(grids) + 0.35), layout="constrained")
    plots.picture_table(figure.subplots(), grids, per_cell)
    return figure


def curves_figure(runs: dict[str, Run]) -> Figure:
    """Return the curves of the report: membership, open gates, loss against threshold."""
    from matplotlib.figure import Figure

    metrics = {name: run.metrics() for name, run in runs.items()}
    figure = Figure(figsize=(13, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    plots.membership(left, metrics)
    plots.open_gates(middle, metrics)
    plots.loss_against_threshold(right, metrics["sude"])
    return figure


def report(
    who: study.Subject, table: pd.DataFrame, grids: Grids, runs: dict[str, Run], seed: int
) -> str:
    """Return the report as one HTML page that needs no network."""
    from matplotlib.figure import Figure

    e = html.escape
    means = table_with_intervals(table)
    bars = Figure(figsize=(9, 3.2), layout="constrained")
    plots.measures(bars.subplots(), means, MEASURES)
    attributes = list(next(iter(grids.values())))
    grid_rows = []
    for attribute in attributes:
        prompts = table[table["attribute"] == ("" if attribute == "as tuned" else attribute)]
        cells = []
        for name in grids:
            mine = prompts[prompts["variant"] == name]
            images = grids[name][attribute]
            grid = (
                make_image_grid(images, -(-len(images) // 4), 4)
                if len(images) % 4 == 0
                else (make_image_grid(images, 1, len(images)))
            )
            score = mine["attribute_alignment"].mean()
            cells.append(
                f"<td><img src='{_png(grid)}' alt='{e(name)}, {e(attribute)}'>"
                f"<div class='note'>“{e(str(mine['prompt'].iloc[0]))}”</div>"
                f"<div class='note'>attribute alignment {score:.2f}</div></td>"
            )
        grid_rows.append(f"<tr><th>{e(attribute)}</th>{''.join(cells)}</tr>")
    head = "".join(f"<th>{e(name)}</th>" for name in grids)
    lines = []
    for row in means.to_dict("records"):
        numbers = "".join(
            f"<td>{row[n]:.2f} <span>[{row[f'{n}_low']:.2f}, {row[f'{n}_high']:.2f}]</span></td>"
            for n in MEASURES
        )
        lines.append(f"<tr><th>{e(row['variant'])}</th>{numbers}<td>{row['pictures']}</td></tr>")
    settings = {
        name: {
            k: getattr(run.config, k)
            for k in (
                "method",
                "train",
                "weight_sude",
                "prior",
                "weighting",
                "truncate",
                "max_train_steps",
                "train_batch_size",
                "learning_rate",
                "token_learning_rate",
                "seed",
            )
        }
        | {"seconds": _seconds(run)}
        for name, run in runs.items()
    }
    template = (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        category=e(who.scene.category),
        attribute=e(who.scene.attribute),
        look=e(who.scene.look.words()),
        others=e(", ".join(who.other_attributes)),
        seed=seed,
        subject=_png(who.picture),
        strip=_figure(difference_figure(grids)),
        measures="".join(f"<th>{e(n.replace('_', ' '))}</th>" for n in MEASURES),
        means="".join(lines),
        bars=_figure(bars),
        curves=_figure(curves_figure(runs)),
        head=head,
        grids="".join(grid_rows),
        settings=pd.DataFrame(settings).to_html(border=0),
        version=e(__version__),
        method=e(next(iter(runs.values())).config.method),
    )


def _seconds(run: Run) -> Any:
    try:
        return read_json(run.folder / ENVIRONMENT)["seconds"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{run.folder / ENVIRONMENT} is damaged: delete the folder {run.folder}, and the demo "
            "tunes it anew."
        ) from error


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _figure(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
