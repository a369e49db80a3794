"""Tables and a picture of a study's CSV: what SuDe changes, for every method and every subject.

    python -m sude_lab.toy.report data/results/held_out.csv

writes `held_out.md` and `held_out.png` beside it. Means are over the attributes that a subject's
one picture does not show; intervals are 95 % bootstrap intervals over subjects.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pandas as pd
import tyro

from sude_lab import plots
from sude_lab.backbone import data_folder
from sude_lab.files import atomic_write
from sude_lab.metrics import per_run, summarize

WATCHED = ("open_gates", "rho")
NAMES = {"attribute_alignment": "attribute alignment", "subject_fidelity": "subject fidelity"}


@dataclass(frozen=True)
class ReportConfig:
    """Which study to report."""

    table: Annotated[Path, tyro.conf.Positional]
    """CSV file that `python -m sude_lab.toy.study` wrote."""


def untuned_alignment(category: str, shown: str) -> float:
    """Return the model card's mean alignment of the attributes of a category but the one shown."""
    card = pd.read_csv(data_folder() / "embedded" / "alignment.csv")
    rows = card[(card["category"] == category) & (card["attribute"] != shown)]
    return float(rows["attribute_alignment"].mean())


def means_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return the README's table: a row a (method, variant), gains with their intervals."""
    runs = table.groupby(["method", "variant"])[list(WATCHED)].mean()
    rows = []
    for row in summarize(table).to_dict("records"):
        line: dict[str, object] = {
            "method": str(row["method"]).replace("_", " "),
            "": row["variant"],
        }
        for measure, name in NAMES.items():
            text = f"{row[measure]:.2f}"
            gain = row.get(f"{measure}_gain")
            if gain is not None and gain == gain:
                low, high = row[f"{measure}_low"], row[f"{measure}_high"]
                text += f" ({gain:+.2f} [{low:+.2f}, {high:+.2f}])"
            line[name] = text
        watched = runs.loc[(row["method"], row["variant"])]
        seen = row["variant"] != "plain"
        line["open gates"] = f"{watched['open_gates']:.0%}" if seen else ""
        line["rho"] = f"{watched['rho']:.2f}" if seen else ""
        line["runs"] = f"{row['subjects']} x {row['runs'] // row['subjects']}"
        rows.append(line)
    return pd.DataFrame(rows)


def subjects_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return a row a (method, subject): alignment and fidelity of each variant, over the seeds."""
    runs = per_run(table)
    rows = []
    for (method, subject), group in runs.groupby(["method", "subject"], sort=False):
        category = group["category"].iloc[0]
        line: dict[str, object] = {
            "method": method.replace("_", " "),
            "subject": subject,
            "untuned": f"{untuned_alignment(category, _shown(table, subject)):.2f}",
        }
        for variant, mine in group.groupby("variant", sort=False):
            for measure, name in NAMES.items():
                line[f"{name.split()[-1]}, {variant}"] = f"{mine[measure].mean():.2f}"
        steered = table[(table["method"] == method) & (table["subject"] == subject)]
        steered = steered[steered["variant"] == "sude"]
        line["open gates"] = f"{steered['open_gates'].mean():.0%}"
        line["rho"] = f"{steered['rho'].mean():.2f}"
        rows.append(line)
    return pd.DataFrame(rows)


def _shown(table: pd.DataFrame, subject: str) -> str:
    from sude_lab.toy import world

    mine = table[table["subject"] == subject]
    asked = set(mine["attribute"].dropna())
    return next(a for a in world.ATTRIBUTES[mine["category"].iloc[0]] if a not in asked)


def main(config: ReportConfig) -> None:
    """Write the tables and the picture beside the study's CSV and print the tables."""
    from matplotlib.figure import Figure

    table = pd.read_csv(config.table)
    text = "\n\n".join(
        part.fillna("").to_markdown(index=False, disable_numparse=True)
        for part in (means_table(table), subjects_table(table))
    )
    with atomic_write(config.table.with_suffix(".md")) as path:
        path.write_text(text + "\n", encoding="utf-8")
    runs = per_run(table)
    methods = list(dict.fromkeys(runs["method"]))
    figure = Figure(figsize=(6.2 * len(methods), 4.2), layout="constrained")
    for ax, method in zip(figure.subplots(1, len(methods), squeeze=False)[0], methods, strict=True):
        plots.paired_runs(ax, runs[runs["method"] == method])
        ax.set_title(method.replace("_", " "), fontsize=10)
    with atomic_write(config.table.with_suffix(".png")) as path:
        figure.savefig(path, dpi=90)
    print(text)


if __name__ == "__main__":
    main(tyro.cli(ReportConfig))
