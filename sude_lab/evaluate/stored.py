"""Stored results, and the tables that are made of them: `data/results/*.csv`, read and compared.

    read("w_s")        the rows of a study, a row a picture
    fig4(), table1()   the paper's tables and figures on the embedded world
    claims()           what the paper claims, and what these rows say of it

Lessons read what is here; `studies/` makes it. The subjects are those of the held-out study, fixed
before anything was seen. Intervals are 95 %, Student's t on the subjects' means (`statistics`);
gains are paired: same subject, same seed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from sude_lab.errors import UserError
from sude_lab.evaluate.metrics import MEASURES, gains, per_run
from sude_lab.evaluate.statistics import Interval, holm, jackknife_interval, mean_interval, verdict
from sude_lab.io.opening import data_folder

RESULTS = data_folder() / "results"
ALIGNMENT, FIDELITY, CATEGORY = MEASURES
BACKGROUND = "background_alignment"
KEYS = ["subject", "method", "variant", "seed"]
"""What names a run in a table of results."""
WATCHED = ("open_gates", "rho")
WEIGHTS = {"dreambooth": 2.0, "custom_diffusion": 2.0, "vico": 1.5, "textual_inversion": 1.0}
"""w_s of the methods on the embedded model when these studies were made."""
MARGIN = 0.05
"""What counts as no difference, in probabilities of the oracle."""
PLAIN, GUIDANCE, COMPOSITION, TUNED = "plain", "guidance", "composition", "sude-tuned"
"""The rules of the study of guidance."""


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


def _edits(table: pd.DataFrame) -> pd.DataFrame:
    """Return the pictures that ask for a new attribute."""
    return table[table["attribute"].fillna("") != ""]


def by_factor(*tables: pd.DataFrame) -> pd.DataFrame:
    """Return the pictures that ask for a new attribute, with `factor`: w_s over its default."""
    rows = _edits(pd.concat(tables, ignore_index=True))
    factor = rows["weight_sude"] / rows["method"].map(WEIGHTS)
    rows = rows.assign(factor=factor.round(4), variant=factor.map("{:g} w_s".format))
    return rows.drop_duplicates(["method", "subject", "seed", "factor", "attribute", "image"])


def dosed() -> pd.DataFrame:
    """Return the rows of Fig. 4: DreamBooth at every multiple of w_s, two seeds."""
    return by_factor(read("w_s")).sort_values("factor", kind="stable")


def against(
    table: pd.DataFrame,
    base: str,
    measures: Sequence[str],
    *,
    by: Sequence[str] = ("method",),
    digits: int = 2,
) -> pd.DataFrame:
    """Return a row a (`by`, variant) in words: every measure's mean, and its gain over `base`."""
    changes = gains(table, measures, by=by, against=base)
    rows = []
    for names, group in changes.groupby([*by, "variant"], sort=False):
        line = dict(zip([*by, "variant"], names, strict=True))
        for row in group.to_dict("records"):
            gain = Interval(row["gain"], row["low"], row["high"], row["subjects"])
            words = "" if pd.isna(gain.mean) else f" ({gain.words(f'+.{digits}f')})"
            line[str(row["measure"]).replace("_", " ")] = f"{row['mean']:.{digits}f}{words}"
        subjects, runs = group[["subjects", "runs"]].iloc[0]
        rows.append(line | {"runs": f"{subjects} x {runs // subjects}"})
    return pd.DataFrame(rows)


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
    others = pd.concat([read("methods_w_s"), read("w_s").query("seed == 0")])
    held_out = read("held_out").query("seed == 0")
    rows = by_factor(held_out[held_out["method"].isin(others["method"])], others)
    plain = rows[rows["factor"] == 0].groupby("method")[ALIGNMENT].mean()
    lines = []
    for method, group in best_factors(rows).groupby("method", sort=False):
        line = {"method": str(method).replace("_", " "), "plain": f"{plain[method]:.2f}"}
        for name in group.columns[2:]:
            line[name] = str(mean_interval(group[name], group["subject"]))
        lines.append(line)
    return pd.DataFrame(lines)


def fig4() -> pd.DataFrame:
    """Return Fig. 4: alignment, fidelity and category over the multiples of w_s."""
    return against(dosed(), "0 w_s", MEASURES)


def truncation() -> pd.DataFrame:
    """Return the rows of Fig. 5: with, without and with other thresholds, plain tuning as well."""
    names = {
        "weight_sude=0": "plain",
        "weight_sude=2": "SuDe, stops at rho = 1",
        "truncate_at=0.5": "SuDe, stops at rho = 0.5",
        "truncate_at=1.5": "SuDe, stops at rho = 1.5",
        "truncate=false": "never stops",
        "prior=current": "stops at rho = 1, prior current",
        "prior=current,truncate=false": "never stops, prior current",
    }
    rows = _edits(read("truncation"))
    rows = rows[rows["variant"].isin(names)]
    rows = rows.sort_values("variant", key=lambda v: v.map(list(names).index), kind="stable")
    return rows.assign(variant=rows["variant"].map(names))


def fig5() -> pd.DataFrame:
    """Return Fig. 5: what the truncation is for."""
    return against(truncation(), "plain", MEASURES)


def collapse() -> pd.DataFrame:
    """Return the pictures of new attributes after 50, 100 and 200 steps, truncated and not."""
    few, all_steps = read("collapse"), read("truncation")
    compared = all_steps["variant"].isin(["weight_sude=2", "prior=current,truncate=false"])
    all_steps = all_steps[compared & all_steps["subject"].isin(few["subject"])]
    rows = _edits(pd.concat([all_steps, few]))
    names = {True: "stops at rho = 1", False: "never stops, prior current"}
    return rows.assign(run=rows["truncate"].astype(bool).map(names)).reset_index(drop=True)


def prompted(*names: str) -> pd.DataFrame:
    """Return the rows of the study of prompts for these asks."""
    rows = read("prompts")
    return rows[rows["ask"].isin(names)]


def table2() -> pd.DataFrame:
    """Return Table 2: three ways to ask for an attribute, plain and with SuDe."""
    return against(prompted("P1", "P2", "P3"), "plain", MEASURES, by=("ask",))


def fig6() -> pd.DataFrame:
    """Return Fig. 6: an attribute and a background asked for at once; `both` multiplies the two."""
    return against(_both(), "plain", (ALIGNMENT, BACKGROUND, "both", FIDELITY), by=("ask",))


def _both() -> pd.DataFrame:
    rows = prompted("attribute and background")
    return rows.assign(both=rows[ALIGNMENT] * rows[BACKGROUND])


def class_images() -> pd.DataFrame:
    """Return the rows of Fig. 8: attributes (P1) and backgrounds, with class images, SuDe, both."""
    names = {
        "prior_loss_weight=1,weight_sude=0": "class images",
        "prior_loss_weight=1": "SuDe and class images",
    }
    others = read("class_images")
    others = others.assign(variant=others["variant"].map(names))
    rows = pd.concat([prompted("P1", "background"), others], ignore_index=True)
    aimed = rows[ALIGNMENT].where(rows["ask"] == "P1", rows[BACKGROUND])
    order = ["plain", "class images", "sude", "SuDe and class images"]
    rows = rows.assign(alignment=aimed, edit=rows["ask"].replace({"P1": "attribute"}))
    return rows.sort_values("variant", key=lambda v: v.map(order.index), kind="stable")


def fig8() -> pd.DataFrame:
    """Return Fig. 8: class-image regularisation (eq. 14) against SuDe, by what is edited."""
    return against(class_images(), "plain", ("alignment", FIDELITY), by=("edit",))


def claims() -> pd.DataFrame:
    """Return what the paper claims, what it reports on Stable Diffusion, and what is seen here.

    `by itself` is what the 95 % interval over subjects says of each claim alone, in the words of
    `statistics.verdict` ("holds" is "no difference" within 0.05); `verdict` is the same after
    Holm's correction of the p-values of Student's t for all claims together. The paper's numbers
    are BLIP-T points of real photographs, ours are probabilities of a drawn world's oracle: only
    signs and order can be compared.
    """
    rows: list[tuple[tuple[str, str, str], bool, Interval, float]] = []

    def claim(
        where: tuple[str, str, str],
        table: pd.DataFrame,
        base: str = "plain",
        other: str = "sude",
        measure: str = ALIGNMENT,
        holds: bool = False,
    ) -> None:
        rows.append((where, holds, *_change(table, base, other, measure)))

    held_out, w_s, edits = _edits(read("held_out")), dosed(), class_images()
    for method, name, reported in (
        ("vico", "ViCo", "+4.2 / +2.6"),
        ("custom_diffusion", "Custom Diffusion", "+0.9 / +2.0"),
        ("dreambooth", "DreamBooth", "+1.2 / +1.5"),
    ):
        runs = held_out[held_out["method"] == method]
        claim(("Table 1", f"SuDe raises alignment: {name}", reported), runs)
        where = ("Table 1", f"fidelity holds: {name}", "slight fluctuation")
        claim(where, runs, measure=FIDELITY, holds=True)
    for text, reported, a, b, measure, holds in (
        ("2 w_s raises alignment over 1 w_s", "more with more", 1, 2, ALIGNMENT, False),
        ("4 w_s raises alignment over 1 w_s", "more with more", 1, 4, ALIGNMENT, False),
        ("fidelity holds at 2 w_s", "holds", 0, 2, FIDELITY, True),
        ("at 4 w_s fidelity is below 1 w_s", "lost for a bowl", 4, 1, FIDELITY, False),
    ):
        claim(("Fig. 4", text, reported), w_s, f"{a} w_s", f"{b} w_s", measure, holds)
    where = ("Fig. 5", "never stopping costs the category", "collapse at epoch 3")
    claim(where, truncation(), "never stops, prior current", "SuDe, stops at rho = 1", CATEGORY)
    for ask in ("P1", "P2", "P3"):
        claim(("Table 2", f"SuDe adds to {ask}", "over +1.5"), prompted(ask))
    plain = prompted("P1", "P3").query("variant == 'plain'")
    where = ("Table 2", "without SuDe P3 is above P1", "41.2, the highest")
    claim(where, plain.assign(variant=plain["ask"]), "P1", "P3")
    claim(("Fig. 6", "attribute and background combine", "pictures"), _both(), measure="both")
    for text, edit, base, other in (
        ("class images raise background edits", "background", "plain", "class images"),
        ("attributes: SuDe above class images", "attribute", "class images", "sude"),
    ):
        of_edit = edits[edits["edit"] == edit]
        claim(("Fig. 8", text, "pictures"), of_edit, base, other, "alignment")
    table = pd.DataFrame(
        [where for where, *_ in rows], columns=["paper", "claim", "reported there"]
    )
    corrected = holm([p for *_, p in rows])
    table["seen here"] = [str(change) for _, _, change, _ in rows]
    table["by itself"] = [verdict(c, margin=MARGIN if h else None) for _, h, c, _ in rows]
    table["verdict"] = [
        verdict(change, p=p, margin=MARGIN if holds else None)
        for (_, holds, change, _), p in zip(rows, corrected, strict=True)
    ]
    return table


def _change(table: pd.DataFrame, base: str, other: str, measure: str) -> tuple[Interval, float]:
    """Return the paired change from one variant to another, and the p of Student's t."""
    changes = gains(table[table["variant"].isin([base, other])], [measure], against=base)
    row = changes[changes["variant"] == other].iloc[0]
    return Interval(row["gain"], row["low"], row["high"], row["subjects"]), row["p"]


# --- the study of the README ---


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


def lost_and_gained(table: pd.DataFrame) -> pd.DataFrame:
    """Return a row a (method, subject), means over the seeds: what was lost, what SuDe gave back.

    `lost` is the untuned model's alignment less plain tuning's, `gained` and `fidelity_change` are
    SuDe's less plain tuning's; `freed` is how much less surely, with SuDe, the tuning prompt draws
    the attribute of the one picture; `open_gates` and `rho` are those of the runs with SuDe.
    """
    rows = []
    as_tuned = table[table["attribute"].fillna("") == ""]
    own = as_tuned.groupby(["method", "subject", "variant"])[ALIGNMENT].mean()
    steered = table[table["variant"] == "sude"].groupby(["method", "subject"])[list(WATCHED)].mean()
    for (method, subject), group in per_run(table).groupby(["method", "subject"], sort=False):
        means = group.groupby("variant")[[ALIGNMENT, FIDELITY]].mean()
        if not {"plain", "sude"} <= set(means.index):
            continue
        plain, sude = means.loc["plain"], means.loc["sude"]
        row = {"method": method, "subject": subject}
        row |= {"lost": untuned_alignment(table, subject) - plain[ALIGNMENT]}
        row |= {"gained": sude[ALIGNMENT] - plain[ALIGNMENT]}
        row |= {"fidelity_change": sude[FIDELITY] - plain[FIDELITY]}
        row |= {"freed": own[method, subject, "plain"] - own[method, subject, "sude"]}
        rows.append(row | steered.loc[(method, subject)].to_dict())
    return pd.DataFrame(rows)


# --- rules at equal fidelity ---


def rule_name(rule: str, strength: float) -> str:
    """Return the name of a variant: "guidance 0.5"; g = 0 is "plain"."""
    return f"{rule} {strength:g}" if strength else PLAIN


def at_equal_fidelity(table: pd.DataFrame, *, against: float = 1.0) -> pd.DataFrame:
    """Return each rule's alignment where it keeps as much of the subject as SuDe-tuned models do.

    A rule is a line through its strengths (0 is plain tuning) in the plane of mean fidelity and
    mean alignment under attribute prompts. From g = 0 upwards the first point whose fidelity is
    that of sude-tuned `against` is read off, linearly between two strengths; a rule that never
    loses so much is read at its greatest strength, one that starts below at 0: `fidelity` says
    where it was read. The whole reading is one number of all subjects; its 95 % interval is
    `statistics.jackknife_interval`.

    Raises:
        UserError: there is no such variant, or no subject has all variants.
    """
    means = per_run(table).groupby(["subject", "variant"])[[FIDELITY, ALIGNMENT]].mean()
    named = table.groupby("variant")[["rule", "strength"]].first()
    goal = rule_name(TUNED, against)
    if goal not in named.index:
        raise UserError(f"There is no {goal!r} to compare with: add {against:g} to --sude-weights.")
    # Only subjects that every variant has: the same ones on both sides.
    wide = means.unstack("variant").dropna()
    if wide.empty:
        raise UserError("No subject has every variant yet: let the comparison run to its end.")
    rows = []
    for rule in (GUIDANCE, COMPOSITION):
        line = named[named["rule"].isin([rule, PLAIN])]["strength"].sort_values()

        def difference(index: np.ndarray, line: pd.Series = line) -> float:
            return _read_off(wide.iloc[index], line, goal)["difference"]

        ends = jackknife_interval(difference, len(wide))
        row = {"rule": rule} | _read_off(wide, line, goal) | {"low": ends.low, "high": ends.high}
        rows.append(row | {"subjects": len(wide)})
    return pd.DataFrame(rows)


def _read_off(subjects: pd.DataFrame, line: pd.Series, goal: str) -> dict[str, float]:
    """Return where a rule's line (strength by variant) first falls to the fidelity of the goal."""
    fidelity, alignment = subjects[FIDELITY].mean(), subjects[ALIGNMENT].mean()
    points = np.array([(strength, fidelity[v], alignment[v]) for v, strength in line.items()])
    below = points[:, 1] <= fidelity[goal]
    k = int(below.argmax()) if below.any() else len(points) - 1
    point = points[k]
    if below[k] and k > 0:  # between the two strengths around it, linearly
        before = points[k - 1]
        share = (before[1] - fidelity[goal]) / (before[1] - point[1])
        point = before + share * (point - before)
    row = dict(zip(("strength", "fidelity", "alignment"), point.tolist(), strict=True))
    row |= {"goal fidelity": fidelity[goal], "goal alignment": alignment[goal]}
    return row | {"difference": row["alignment"] - alignment[goal]}
