"""Tables of the study of the implicit classifier (`studies/classify.py`): accuracy and cost."""

from __future__ import annotations

import math

import pandas as pd

from sude_lab.evaluate.statistics import Interval, Z, wilson_interval
from sude_lab.world import drawing as world

ATTRIBUTES, CATEGORIES = "attributes", "categories"
ALL, PRUNED, FIRST, ORACLE = "all pairs", "pruned", "first pairs", "oracle"
CAUTIONS = {PRUNED: 2.5, "pruned, caution 1.5": 1.5, "pruned, caution 4": 4.0}
ONE_STEP, ONE_STEP_MEAN = "one step", "one step, mean"


def share_difference(lost: int, won: int, number: int, z: float = Z) -> Interval:
    """Return the difference of two shares of the same trials, with a 95 % interval.

    From McNemar's two numbers, the trials that one way alone gets right: Wald's interval after half
    a trial is added to each of the four cells (Agresti and Min, 2005), so that it has a width where
    nothing differs.
    """
    total = number + 2
    middle = (won - lost) / total
    half = z * math.sqrt((won + lost + 1) / total - middle**2) / math.sqrt(total)
    return Interval((won - lost) / number, middle - half, middle + half, number)


def accuracy_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each way of asking: accuracy, cost, paired difference to all pairs.

    Intervals are those of `wilson_interval` and `share_difference`. `only one right` counts the
    drawings that all pairs alone and this way alone name rightly.
    """
    rows = []
    together = table[~table["form"].isin((ONE_STEP, ONE_STEP_MEAN))]
    for prompts, group in together.groupby("prompts", sort=False):
        wide = group.pivot(index="picture", columns="form", values="right")
        cost = group.groupby("form")["evaluations"].mean()
        for form in (ORACLE, ALL, *CAUTIONS, FIRST):
            if form not in wide:
                continue
            rows_of_form = group[group["form"] == form]
            share = wilson_interval(int(wide[form].sum()), len(wide))
            line: dict[str, object] = {
                "prompts": prompts,
                "asked": form,
                "accuracy": f"{share.mean:.3f} [{share.low:.3f}, {share.high:.3f}]",
                "mean probability": f"{rows_of_form['probability'].mean():.3f}",
                "UNet evaluations": f"{cost[form]:.1f}" if form != ORACLE else "",
                "times fewer": "",
                "difference to all pairs": "",
                "only one right": "",
            }
            if form in (*CAUTIONS, FIRST):
                gain = wide[form] - wide[ALL]
                lost, won = int((gain < 0).sum()), int((gain > 0).sum())
                change = share_difference(lost, won, len(gain))
                line["times fewer"] = f"{cost[ALL] / cost[form]:.2f}"
                line["difference to all pairs"] = (
                    f"{change.mean:+.3f} [{change.low:+.3f}, {change.high:+.3f}]"
                )
                line["only one right"] = f"{lost} / {won}"
            rows.append(line)
    return pd.DataFrame(rows)


def beside(table: pd.DataFrame, other: pd.DataFrame, name: str) -> str:
    """Return as Markdown how another model names the same drawings, paired."""
    rows = []
    for prompts, form in ((ATTRIBUTES, ALL), (ATTRIBUTES, PRUNED), (CATEGORIES, ALL)):
        both = [
            t[(t["prompts"] == prompts) & (t["form"] == form)].set_index("picture")["right"]
            for t in (table, other)
        ]
        pair = pd.concat(both, axis=1, keys=["this", "other"], join="inner")
        lost, won = ((pair["this"] - pair["other"] == change).sum() for change in (-1, 1))
        gain = share_difference(int(lost), int(won), len(pair))
        line: dict[str, object] = {"prompts": prompts, "asked": form, "drawings": len(pair)}
        for which, right in pair.items():
            share = wilson_interval(int(right.sum()), len(pair))
            line[str(which)] = f"{share.mean:.3f} [{share.low:.3f}, {share.high:.3f}]"
        line["this minus other"] = f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"
        rows.append(line | {"only one right": f"{lost} / {won}"})
    shown = pd.DataFrame(rows).to_markdown(index=False)
    return f"\n\nThe same drawings, named by this model and by the other one ({name}):\n\n{shown}"


def one_step_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return the accuracy of eq. 5 alone at each t, with x_{t-1} drawn and at its mean."""
    steps = table[table["form"].isin((ONE_STEP, ONE_STEP_MEAN))]
    rows = []
    for t, group in steps.groupby("t"):
        line: dict[str, object] = {"t": int(t)}
        for form, name in ((ONE_STEP, "x_{t-1} drawn"), (ONE_STEP_MEAN, "x_{t-1} at its mean")):
            right = group.loc[group["form"] == form, "right"]
            share = wilson_interval(int(right.sum()), len(right))
            line[name] = f"{share.mean:.3f} [{share.low:.3f}, {share.high:.3f}]"
        rows.append(line)
    return pd.DataFrame(rows)


def report(table: pd.DataFrame) -> str:
    """Return the tables as Markdown, with how many drawings they speak of."""
    parts = [
        f"{table['picture'].nunique()} drawings; in brackets 95 % intervals over drawings. "
        '"Only one right": drawings that all pairs alone / this way alone name rightly.',
        accuracy_table(table).to_markdown(index=False, disable_numparse=True),
    ]
    steps = one_step_table(table)
    if len(steps):
        parts += [
            "Eq. 5 at one t alone, among the 9 categories; chance is "
            f"{1 / len(world.CATEGORIES):.3f}:",
            steps.to_markdown(index=False, disable_numparse=True),
        ]
    return "\n\n".join(parts)
