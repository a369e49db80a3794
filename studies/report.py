"""Tables and a picture of a study's CSV: what SuDe changes, for every method and every subject.

    python -m studies.report data/results/held_out.csv

writes `held_out.md` and `held_out.png` beside it. Means are over the attributes that a subject's
one picture does not show; intervals are 95 %, Student's t on the subjects' means. A search for
settings, which has other variants than plain and sude, gets a table alone: a row a setting.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import pandas as pd
import tyro

from studies.tables import ALIGNMENT, FIDELITY, against
from sude_lab.evaluate.metrics import per_run
from sude_lab.io.files import atomic_write
from sude_lab.io.opening import data_folder
from sude_lab.view import plots
from sude_lab.world.subjects import KEYS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMES = {"attribute_alignment": "attribute alignment", "subject_fidelity": "subject fidelity"}


@dataclass(frozen=True)
class ReportConfig:
    """Which study to report."""

    table: Annotated[Path, tyro.conf.Positional]
    """CSV file that `python -m sude_lab.world.subjects` wrote."""


WATCHED = ("open_gates", "rho")


def means_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return the README's table: a row a (method, variant), gains with their intervals."""
    # A row a run: some categories have more attributes, hence more pictures.
    runs = table.drop_duplicates(KEYS).groupby(["method", "variant"])[list(WATCHED)].mean()
    lines = against(per_run(table), "plain", (ALIGNMENT, FIDELITY))
    watched = runs.loc[list(zip(lines["method"], lines["variant"], strict=True))]
    for place, (name, form) in enumerate(zip(WATCHED, ("{:.0%}", "{:.2f}"), strict=True)):
        column = np.where(lines["variant"] == "plain", "", watched[name].map(form.format))
        lines.insert(4 + place, name.replace("_", " "), column)
    names = lines["method"].str.replace("_", " ")
    return lines.assign(method=names).rename(columns={"variant": ""})


def untuned_alignment(table: pd.DataFrame, subject: str) -> float:
    """Return the untuned model's mean alignment of the attributes that a subject was asked for.

    They are those of the model card, but the one that the subject's picture shows.
    """
    card = pd.read_csv(data_folder() / "embedded" / "alignment.csv")
    rows = table[table["subject"] == subject]
    card = card[card["category"] == rows["category"].iloc[0]]
    return float(card[card["attribute"].isin(rows["attribute"])]["attribute_alignment"].mean())


def subjects_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return a row a (method, subject): alignment and fidelity of each variant, over the seeds."""
    runs = per_run(table)
    rows = []
    for (method, subject), group in runs.groupby(["method", "subject"]):
        line: dict[str, object] = {
            "method": method.replace("_", " "),
            "subject": subject,
            "untuned": f"{untuned_alignment(table, subject):.2f}",
        }
        for variant, runs_of_variant in group.groupby("variant", sort=False):
            for measure, name in NAMES.items():
                line[f"{name.split()[-1]}, {variant}"] = f"{runs_of_variant[measure].mean():.2f}"
        steered = table[(table["method"] == method) & (table["subject"] == subject)]
        steered = steered[steered["variant"] == "sude"]
        line["open gates"] = f"{steered['open_gates'].mean():.0%}"
        line["rho"] = f"{steered['rho'].mean():.2f}"
        rows.append(line)
    return pd.DataFrame(rows)


def settings_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return a row a (method, settings): means over the subjects it was tried on.

    "fidelity, as tuned" is that of the tuning prompt: how well the look was learned at all.
    """
    rows = []
    for (method, variant), pictures in table.groupby(["method", "variant"], sort=False):
        edits = pictures["attribute"].fillna("") != ""
        # Every subject counts alike, however many attributes its category has.
        new, old = (pictures[part].groupby("subject") for part in (edits, ~edits))
        gates = pictures.groupby("subject")["open_gates"].mean().mean()
        rows.append(
            {
                "method": method.replace("_", " "),
                "settings": variant.replace(",", ", "),
                "subjects": ", ".join(sorted(re.sub(r".*-\d+-", "", n) for n in new.groups)),
                "attribute alignment": f"{new['attribute_alignment'].mean().mean():.2f}",
                "subject fidelity": f"{new['subject_fidelity'].mean().mean():.2f}",
                "fidelity, as tuned": f"{old['subject_fidelity'].mean().mean():.2f}",
                "open gates": f"{gates:.0%}" if pictures["rho"].notna().any() else "",
            }
        )
    return pd.DataFrame(rows)


def paired_runs(ax: Axes, runs: pd.DataFrame) -> Axes:
    """Draw an arrow a (subject, seed) from the run without SuDe to the run with it."""
    x, y = "subject_fidelity", "attribute_alignment"
    plain, sude = (runs[runs["variant"] == name] for name in ("plain", "sude"))
    pairs = plain.merge(sude, on=["subject", "seed"], suffixes=("_before", "_after"))
    subjects = list(dict.fromkeys(pairs["subject"]))
    for row in pairs.to_dict("records"):
        colour = f"C{subjects.index(row['subject']) % 10}"
        start, end = ((row[f"{x}_{k}"], row[f"{y}_{k}"]) for k in ("before", "after"))
        ax.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": colour, "lw": 1.3})
        ax.plot(*start, "o", color=colour, markersize=4)
    for k, subject in enumerate(subjects):
        ax.plot([], [], "-", color=f"C{k % 10}", label=subject)
    labels = {"xlabel": plots.words(x), "ylabel": plots.words(y)}
    return plots.finish(ax, legend=8, beside=True, xlim=(0, 1), ylim=(0, 1.02), **labels)


def main(config: ReportConfig) -> None:
    """Write the tables and the picture beside the study's CSV and print the tables."""
    from matplotlib.figure import Figure

    table = pd.read_csv(config.table)
    study = set(table["variant"]) == {"plain", "sude"}
    parts = (means_table, subjects_table) if study else (settings_table,)
    text = "\n\n".join(
        part(table).fillna("").to_markdown(index=False, disable_numparse=True) for part in parts
    )
    with atomic_write(config.table.with_suffix(".md")) as path:
        path.write_text(text + "\n", encoding="utf-8")
    print(text)
    if not study:
        return
    runs = per_run(table)
    methods = list(dict.fromkeys(runs["method"]))
    columns = min(2, len(methods))
    lines = -(-len(methods) // columns)
    figure = Figure(figsize=(6.2 * columns, 4.2 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for ax, method in zip(axes, methods, strict=False):
        paired_runs(ax, runs[runs["method"] == method])
        ax.set_title(method.replace("_", " "), fontsize=10)
    for ax in list(axes)[len(methods) :]:
        ax.remove()
    with atomic_write(config.table.with_suffix(".png")) as path:
        figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main(tyro.cli(ReportConfig))
