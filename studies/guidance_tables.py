"""Tables of the study of SuDe at sampling time (`studies/compare_guidance.py`)."""

from __future__ import annotations

import numpy as np
import pandas as pd

from sude_lab.errors import UserError
from sude_lab.evaluate.metrics import MEASURES, gains, per_run
from sude_lab.evaluate.statistics import jackknife_interval

PLAIN, GUIDANCE, COMPOSITION, TUNED = "plain", "guidance", "composition", "sude-tuned"


def rule_name(rule: str, strength: float) -> str:
    """Return the name of a variant: "guidance 0.5"; g = 0 is "plain"."""
    return f"{rule} {strength:g}" if strength else PLAIN


def summarize(table: pd.DataFrame, *, against: str = "plain") -> pd.DataFrame:
    """Return a row a (method, variant): means and paired differences with 95 % intervals.

    The numbers of `gains` for the runs of `per_run`, with columns for every measure.
    """
    rows = []
    changes = gains(per_run(table), MEASURES, against=against)
    keys = ["method", "variant", "subjects", "runs"]
    for values, group in changes.groupby(keys, sort=False):
        line: dict[str, object] = dict(zip(keys, values, strict=True))
        for row in group.to_dict("records"):
            ends = {f"{row['measure']}_{name}": row[name] for name in ("gain", "low", "high")}
            line |= {row["measure"]: row["mean"]} | ends
        rows.append(line)
    return pd.DataFrame(rows)


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
    means = (
        per_run(table)
        .groupby(["subject", "variant"])[["subject_fidelity", "attribute_alignment"]]
        .mean()
    )
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
    fidelity, alignment = (
        subjects["subject_fidelity"].mean(),
        subjects["attribute_alignment"].mean(),
    )
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
