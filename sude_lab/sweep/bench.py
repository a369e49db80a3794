"""A regulariser of one's own, by the comparison of SuDe with less tuning (data/grids/fair.md).

OUT/regularizer.py     the file, as it was when OUT was begun
OUT/grid.yaml, sweep/  its runs, as `sude-lab sweep` makes them
OUT/bench.csv          a row a subject and point, the stored ones of plain tuning and SuDe beside
OUT/bench.md, .png     what follows: gains at equal fidelity, costs, fronts
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import yaml
from jinja2 import Environment, FileSystemLoader
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from sude_lab import __version__
from sude_lab.errors import UserError
from sude_lab.evaluate.fronts import Line, as_markdown, draw, family, line, places, points
from sude_lab.evaluate.metrics import MEASURES
from sude_lab.evaluate.stored import read
from sude_lab.io.files import require_own, write_file, write_table
from sude_lab.io.opening import data_folder
from sude_lab.io.reading import digest
from sude_lab.runs.prepare import prepared_tuning
from sude_lab.runs.regularizer import NAME, OwnRegularizer, load_regularizer
from sude_lab.sweep.grid import grid_of, make_plan
from sude_lab.sweep.sweep import RESULTS, fresh_backbone, sweep

GRID, TABLE, PAGE, FIGURE = "grid.yaml", "bench.csv", "bench.md", "bench.png"
TRIED = 5
"""Steps that are taken before anything is written."""
LESS, SUDE, OWN = "less tuning", "SuDe", "yours"
ARMS = {"plain": LESS, "sude": SUDE, "own": OWN}
MEANS = ["subject_fidelity", "attribute_alignment", "category_alignment"]


@dataclass(frozen=True)
class Size:
    """How much of the comparison is run."""

    subjects: str
    stored: str
    """The table of plain tuning and SuDe on these subjects."""
    steps: int
    kept: tuple[int, ...]


SizeName = Literal["minutes", "hour", "whole"]
_DEVELOPMENT = "development 100 101 102 103 104 105"
_HELD_OUT = " ".join(["held-out", *map(str, range(100, 136))])
SIZES: dict[SizeName, Size] = {
    "minutes": Size("development 100 101", "fair_development", 100, (25, 50)),
    "hour": Size(_DEVELOPMENT, "fair_development", 200, (25, 50, 100)),
    "whole": Size(_HELD_OUT, "fair", 200, (25, 50, 100)),
}


def subject_rows(
    arm: str, folder: Path, measures: Sequence[str] = MEASURES, asked: str = "attribute"
) -> pd.DataFrame:
    """Return a row a (subject, configuration, strength): means of the oracle's measures.

    A prompt's pictures are averaged first, then the prompts: none weighs more for having more.
    `asked`: what the prompts differ in.
    """
    table = pd.read_parquet(folder / RESULTS)
    table = table[table["metric"].isin(measures)].fillna({"strength": ""})
    keys = ["subject", "category", "settings", "variant", "w_s", "strength", "steps"]
    keys += ["rho", "open_gates"]
    prompts = table.groupby([*keys, asked, "metric"], dropna=False)["value"].mean()
    means = prompts.groupby([*keys, "metric"], dropna=False).mean().unstack("metric").reset_index()
    return means.assign(arm=arm)


def bench(
    file: Path,
    out: Path,
    *,
    size: SizeName = "minutes",
    weights: Sequence[float] = (0.5, 1.0, 2.0),
    seed: int = 0,
    token_learning_rate: float | None = None,
    train_text_encoder: bool = False,
    workers: int = 1,
    progress: bool = True,
) -> str:
    """Tune with the `regularizer` of a file over weights and steps, and return what that says.

    What is finished is kept, and the same call continues. The arguments are the flags of `sude-lab
    bench`; those of the text train more than the stored lines did.
    """
    chosen, source = SIZES[size], load_regularizer(file)
    assert source is not None
    kept = out / NAME
    if kept.is_file() and kept.read_bytes() != source.source:
        raise UserError(f"{out} was begun with another file than {file}: choose another --out.")
    require_own(out, NAME, "", (GRID, TABLE, PAGE, FIGURE))
    if not weights or not all(0 < w < math.inf for w in weights):
        raise UserError("--weights are numbers above 0: a weight of 0 is plain tuning.")
    asked = {"token_learning_rate": token_learning_rate, "train_text_encoder": train_text_encoder}
    trained = {n: v for n, v in asked.items() if v is not None and v is not False}
    settings = {"max_train_steps": chosen.steps, "regularizer_file": str(kept.absolute())}
    content = yaml.safe_load((data_folder() / "grids" / "fair" / "sude.yaml").read_text("utf-8"))
    content |= {"subjects": [chosen.subjects], "seeds": [seed], "w_s": list(weights)}
    content |= {"settings": settings | trained, "strengths": [{}, {"step": list(chosen.kept)}]}
    passes = _tried(content, source)
    write_file(kept, source.source)
    write_file(out / GRID, yaml.safe_dump(content))
    failed = sweep(out / GRID, out / "sweep", workers=workers, progress=progress)
    if failed:
        key, reason = next(iter(failed.items()))
        again = "the same command tries them again"
        raise UserError(f"{len(failed)} runs failed, {key} because: {reason} ({again}).")
    own = subject_rows("own", out / "sweep")
    stored = read(chosen.stored).query("arm in ('plain', 'sude')")
    stored = stored[stored["subject"].isin(own["subject"])]
    table = pd.concat([stored, own], ignore_index=True).fillna({"strength": ""})
    table["asks"] = 1 + table["arm"].map({"plain": 0.0, "sude": 2.0, "own": passes})
    write_table(out / TABLE, table.round(5))
    draw(out / FIGURE, {"": _lines(table)})
    about = f"size {size}, w_s {', '.join(f'{w:g}' for w in weights)}, seed {seed}"
    about += "".join(f", {name} {value}" for name, value in trained.items())
    cited = f"sude_lab {__version__}, bench, {about}; {file.name}, SHA-256 {digest(kept)}"
    text = _page(table, chosen, cited)
    write_file(out / PAGE, text)
    return text


def _tried(content: dict[str, Any], own: OwnRegularizer) -> float:
    """Take a few steps in memory; return the passes of a sample that it adds to one."""
    settings = content["settings"] | {"regularizer_file": str(own.file.absolute())}
    plan = make_plan(grid_of(content | {"settings": settings}), "")
    config = replace(plan.jobs[0].config, max_train_steps=TRIED)
    picture = Image.open(io.BytesIO(plan.grid.subjects[0].png))
    reached = []

    def noted(*batch: Any) -> Tensor:
        loss = own(*batch)
        reached.append(loss.requires_grad)
        return loss

    tuning = prepared_tuning(config, fresh_backbone(config), picture, regularizer=noted)
    for _ in tqdm(tuning, desc="trying the file", total=TRIED, leave=False, disable=None):
        pass
    if not any(reached):
        raise UserError(
            f"The losses of {own.file} have no gradient, so that no weight would change anything: "
            "use output, or frozen.subject with --token-learning-rate or --train-text-encoder."
        )
    return tuning.frozen.passes / (TRIED * config.train_batch_size)


def _lines(table: pd.DataFrame) -> dict[str, Line]:
    named = table.assign(point=points(table))
    return {name: line(name, named[named["arm"] == arm], "point") for arm, name in ARMS.items()}


def _page(table: pd.DataFrame, chosen: Size, cited: str) -> str:
    """Return what a bench says, as Markdown."""
    lines = _lines(table)
    category = _lines(table.assign(attribute_alignment=table["category_alignment"]))
    decides, gains = chosen.stored == "fair", {}
    for title, other in {"Gain at equal fidelity": LESS, "Beside SuDe, exploration": SUDE}.items():
        shown = family(lines, [(OWN, other)]).drop(columns=[] if decides else ["says"])
        gains[title] = as_markdown(shown)
    at = places(lines, category, table, table["asks"])
    arms = table.assign(arm=table["arm"].map(ARMS)).groupby(["arm", "w_s", "strength"])
    page = Environment(loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True)
    text = page.get_template("bench.md.jinja").render(
        number=len(lines[OWN].subjects),
        decides=decides,
        gains=gains,
        places=at.to_markdown(index=False),
        means=arms[MEANS].mean().round(3).reset_index().to_markdown(index=False),
        cited=cited,
    )
    return f"{text}\n"
