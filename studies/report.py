"""Tables and a picture of a study's CSV: what SuDe changes, for every method and every subject.

    python -m studies.report data/results/held_out.csv

writes `held_out.md` and `held_out.png` beside it. Means are over the attributes that a subject's
one picture does not show; intervals are 95 % bootstrap intervals over subjects. A search for
settings, which has other variants than plain and sude, gets a table alone: a row a setting. A study
of prior banks (variants sude and prior_bank=N) gets a table of what N changes.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pandas as pd
import tyro

from sude_lab.evaluate.metrics import per_run, summarize
from sude_lab.io.files import atomic_write
from sude_lab.io.opening import data_folder
from sude_lab.view import plots

WATCHED = ("open_gates", "rho")
NAMES = {"attribute_alignment": "attribute alignment", "subject_fidelity": "subject fidelity"}


@dataclass(frozen=True)
class ReportConfig:
    """Which study to report."""

    table: Annotated[Path, tyro.conf.Positional]
    """CSV file that `python -m sude_lab.world.subjects` wrote."""


def untuned_alignment(category: str, shown: str) -> float:
    """Return the model card's mean alignment of the attributes of a category but the one shown."""
    card = pd.read_csv(data_folder() / "embedded" / "alignment.csv")
    rows = card[(card["category"] == category) & (card["attribute"] != shown)]
    return float(rows["attribute_alignment"].mean())


def one_row_a_run(table: pd.DataFrame) -> pd.DataFrame:
    """Return the first row of every run: for means of what was seen while it was tuned.

    A study has a row a picture, and some categories have more attributes, hence more pictures.
    """
    return table.drop_duplicates(["method", "variant", "subject", "seed"])


def means_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return the README's table: a row a (method, variant), gains with their intervals."""
    runs = one_row_a_run(table).groupby(["method", "variant"])[list(WATCHED)].mean()
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
    for (method, subject), group in runs.groupby(["method", "subject"]):
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


def settings_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return a row a (method, settings): means over the subjects it was tried on.

    "fidelity, as tuned" is that of the tuning prompt: how well the look was learned at all.
    """
    rows = []
    for (method, variant), mine in table.groupby(["method", "variant"], sort=False):
        asked = mine["attribute"].fillna("") != ""
        # Every subject counts alike, however many attributes its category has.
        new, old = (mine[part].groupby("subject") for part in (asked, ~asked))
        gates = mine.groupby("subject")["open_gates"].mean().mean()
        rows.append(
            {
                "method": method.replace("_", " "),
                "settings": variant.replace(",", ", "),
                "subjects": ", ".join(sorted(re.sub(r".*-\d+-", "", n) for n in new.groups)),
                "attribute alignment": f"{new['attribute_alignment'].mean().mean():.2f}",
                "subject fidelity": f"{new['subject_fidelity'].mean().mean():.2f}",
                "fidelity, as tuned": f"{old['subject_fidelity'].mean().mean():.2f}",
                "open gates": f"{gates:.0%}" if mine["rho"].notna().any() else "",
            }
        )
    return pd.DataFrame(rows)


def banks_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return a row a (method, bank): means, and paired differences from asking live, by size.

    Live is the variant `sude`: pairs drawn anew in every step. A loss is eq. 2 after tuning: a bank
    is too small where the model has learnt its noise by heart, and new noise costs more.
    """
    rows = []
    for row in summarize(table, against="sude").to_dict("records"):
        size = re.fullmatch(r"prior_bank=(\d+)(.*)", str(row["variant"]))
        if size is None and row["variant"] not in ("sude", "plain"):
            continue
        name = f"{int(size[1]):,}{size[2].replace(',', ', ')}" if size else str(row["variant"])
        line: dict[str, object] = {
            "method": str(row["method"]).replace("_", " "),
            "pairs": {"sude": "drawn anew", "plain": "plain, no SuDe"}.get(name, name),
        }
        for measure, label in NAMES.items():
            line[label] = f"{row[measure]:.3f}"
            gain = row.get(f"{measure}_gain")
            if gain is not None and gain == gain:
                low, high = row[f"{measure}_low"], row[f"{measure}_high"]
                line[label] = f"{row[measure]:.3f} ({gain:+.3f} [{low:+.3f}, {high:+.3f}])"
        mine = one_row_a_run(table)
        mine = mine[(mine["method"] == row["method"]) & (mine["variant"] == row["variant"])]
        line["rho"] = "" if name == "plain" else f"{mine['rho'].mean():.2f}"
        if "loss_seen" in mine:
            line["loss on its pairs"] = f"{mine['loss_seen'].mean():.3f}" if size else ""
            line["on new noise"] = f"{mine['loss_new'].mean():.3f}"
        line["runs"] = f"{row['subjects']} x {row['runs'] // row['subjects']}"
        order = {"plain": -1.0, "sude": math.inf}.get(name, float(size[1]) if size else 0.0)
        rows.append((row["method"], order, name, line))
    return pd.DataFrame([line for *_, line in sorted(rows, key=lambda r: r[:3])])


def lost_and_gained(table: pd.DataFrame) -> pd.DataFrame:
    """Return a row a (method, subject), means over the seeds: what was lost, what SuDe gave back.

    `lost` is the untuned model's alignment less plain tuning's, `gained` and `fidelity_change` are
    SuDe's less plain tuning's; `freed` is how much less surely, with SuDe, the tuning prompt draws
    the attribute of the one picture; `open_gates` and `rho` are those of the runs with SuDe.
    """
    rows = []
    as_tuned = table[table["attribute"].fillna("") == ""]
    own = as_tuned.groupby(["method", "subject", "variant"])["attribute_alignment"].mean()
    runs = per_run(table)
    steered = table[table["variant"] == "sude"].groupby(["method", "subject"])[list(WATCHED)].mean()
    for (method, subject), group in runs.groupby(["method", "subject"], sort=False):
        means = group.groupby("variant")[list(NAMES)].mean()
        if not {"plain", "sude"} <= set(means.index):
            continue
        change = means.loc["sude"] - means.loc["plain"]
        untuned = untuned_alignment(group["category"].iloc[0], _shown(table, subject))
        row = {"method": method, "subject": subject}
        row |= {"lost": untuned - means.loc["plain", "attribute_alignment"]}
        row |= {"gained": change["attribute_alignment"]}
        row |= {"fidelity_change": change["subject_fidelity"]}
        row |= {"freed": own[method, subject, "plain"] - own[method, subject, "sude"]}
        rows.append(row | steered.loc[(method, subject)].to_dict())
    return pd.DataFrame(rows)


def _shown(table: pd.DataFrame, subject: str) -> str:
    from sude_lab.world import drawing as world

    mine = table[table["subject"] == subject]
    asked = set(mine["attribute"].dropna())
    return next(a for a in world.ATTRIBUTES[mine["category"].iloc[0]] if a not in asked)


def main(config: ReportConfig) -> None:
    """Write the tables and the picture beside the study's CSV and print the tables."""
    from matplotlib.figure import Figure

    table = pd.read_csv(config.table)
    study = set(table["variant"]) == {"plain", "sude"}
    banks = table["variant"].str.startswith("prior_bank=").any() and "sude" in set(table["variant"])
    parts = (means_table, subjects_table) if study else (settings_table,)
    parts = (banks_table,) if banks else parts
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
        plots.paired_runs(ax, runs[runs["method"] == method])
        ax.set_title(method.replace("_", " "), fontsize=10)
    for ax in list(axes)[len(methods) :]:
        ax.remove()
    with atomic_write(config.table.with_suffix(".png")) as path:
        figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main(tyro.cli(ReportConfig))
