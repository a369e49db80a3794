"""Lines in place of points: alignment read where two ways of tuning keep the subject equally well.

Any way of tuning can be made weaker or stronger (steps, a scale of the weights, w_s, ...), and
trades alignment (what the model keeps of its category) for fidelity (what it learned of the
subject). So two ways are compared by their lines, at equal fidelity, and never point by point. Of a
line its front counts: the strengths that no other one beats, in the means over subjects.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sude_lab.evaluate.metrics import MEASURES
from sude_lab.evaluate.statistics import (
    AGREES,
    CANNOT_TELL,
    DISAGREES,
    NO_DIFFERENCE,
    Interval,
    holm,
    jackknife_interval,
    sign_flip_p,
    verdict,
)
from sude_lab.io.files import atomic_write

ALIGNMENT, FIDELITY, _ = MEASURES
Fidelity = float | np.ndarray
Rows = np.ndarray | slice
EVERYONE = slice(None)
MARGIN = 0.05
"""What is no difference of alignment, or less."""


@dataclass(frozen=True)
class Line:
    """One way of tuning over its strengths: values (n, K) of n subjects at K strengths."""

    name: str
    subjects: tuple[str, ...]
    strengths: tuple[str, ...]
    fidelity: np.ndarray
    alignment: np.ndarray
    on_hull: bool = False
    """Read it on its front's upper hull: between two strengths one may choose by lot, so that a
    strength which hardly beats others lowers nothing."""

    def front(self, rows: Rows = EVERYONE) -> np.ndarray:
        """Return the indices of the strengths that no other one beats, by rising mean fidelity.

        A strength is beaten where another keeps more of the subject and of the category, or as much
        of one and more of the other; `on_hull` also where a mixture of two others does. `rows`:
        indices of the subjects that are there.
        """
        f, a = self.fidelity[rows].mean(0), self.alignment[rows].mean(0)
        order = np.lexsort((a, f))[::-1]  # by falling fidelity, of equal ones the best one first
        best = np.maximum.accumulate(np.concatenate([[-np.inf], a[order]]))[:-1]
        front = order[a[order] > best][::-1]
        if not self.on_hull:
            return front
        points = np.column_stack([f, a])
        hull: list[int] = []
        for k in front.tolist():
            while len(hull) > 1:
                (x, y), (u, v) = points[hull[-1]] - points[hull[-2]], points[k] - points[hull[-2]]
                if x * v < y * u:  # the last one lies above the way from the one before to this one
                    break
                hull.pop()
            hull.append(k)
        return np.array(hull)

    def of(self, subjects: Sequence[str]) -> Line:
        """Return the line of these subjects alone."""
        rows = [self.subjects.index(subject) for subject in subjects]
        f, a = self.fidelity[rows], self.alignment[rows]
        return replace(self, subjects=tuple(subjects), fidelity=f, alignment=a)

    def weights(self, fidelity: Fidelity, rows: Rows = EVERYONE) -> np.ndarray:
        """Return how much each strength counts where the mean fidelity is `fidelity` or more, (K,).

        On the front, and between two neighbours of it all values are interpolated linearly: one
        strength for all subjects, as somebody who tunes must choose it. Below the front's first
        strength that one is taken, which keeps more than is asked; nan where no strength reaches
        so high.

        Args: `fidelity`, one for all, or (n,) of which the mean is meant; `rows` as of `front`.
        """
        if isinstance(fidelity, np.ndarray):
            fidelity = float(fidelity[rows].mean())
        front, weights = self.front(rows), np.zeros(len(self.strengths))
        f = self.fidelity[rows].mean(0)[front]
        if fidelity > f[-1] + 1e-9:  # of rounding
            return np.full(len(weights), np.nan)
        weights[front] = [np.interp(fidelity, f, one) for one in np.eye(len(front))]
        return weights

    def at(self, fidelity: Fidelity, rows: Rows = EVERYONE) -> np.ndarray:
        """Return each subject's alignment at the strength of `weights`, (n,)."""
        return self.alignment[rows] @ self.weights(fidelity, rows)


def hull_of(one: Line) -> Line:
    """Return a line to be read on its hull."""
    return replace(one, on_hull=True)


def line(name: str, table: pd.DataFrame, by: str) -> Line:
    """Return the line of a table with a row a subject and strength (`by`).

    Only subjects that have all strengths count.

    Raises:
        ValueError: a subject has two rows of one strength, or none has all.
    """
    wide = table.pivot(index="subject", columns=by, values=[FIDELITY, ALIGNMENT]).dropna()
    if wide.empty:
        raise ValueError(f"No subject has all strengths of {name}.")
    strengths = tuple(map(str, wide[FIDELITY].columns))
    values = (wide[measure].to_numpy(float) for measure in (FIDELITY, ALIGNMENT))
    return Line(name, tuple(wide.index), strengths, *values)


def paired(a: Line, b: Line) -> tuple[Line, Line]:
    """Return both lines for the subjects that both have."""
    both = [subject for subject in a.subjects if subject in set(b.subjects)]
    return a.of(both), b.of(both)


def gain_at(
    a: Line, b: Line, *fidelities: Fidelity, of: tuple[np.ndarray, np.ndarray] | None = None
) -> Interval:
    """Return the alignment of `a` minus that of `b` at equal mean fidelity, paired by subject.

    A_a(s_a) - A_b(s_b) with the strengths s_a, s_b at which the mean fidelity is that asked for, of
    several fidelities the mean; the interval is the jackknife's over subjects, in which the fronts
    and all strengths are found anew without each subject. nan where a line does not reach one of
    them. Both lines are of the same subjects (`paired`). `of`: values (n, K) of both lines to read
    there in place of the alignment.
    """
    pairs = list(zip((a, b), of or (a.alignment, b.alignment), strict=True))

    def read(rows: np.ndarray) -> float:
        gains = []
        for fidelity in fidelities:
            at_a, at_b = (values[rows] @ one.weights(fidelity, rows) for one, values in pairs)
            gains.append((at_a - at_b).mean())
        return float(np.mean(gains))

    return jackknife_interval(read, len(a.subjects))


# --- the registered reading (data/grids/fair.md) ---

POINT = ["arm", "settings", "variant", "strength"]
"""What names a point of a line."""
END = "plain dreambooth plain "
"""The point of plain tuning after all its steps."""
SHARES = (0.75, 0.85, 0.95)
"""Of the fidelity that plain tuning ends with: where alignments are read."""


def points(table: pd.DataFrame) -> pd.Series:
    """Return the name of every row's point of a line."""
    return table[POINT].agg(" ".join, axis=1)


def end_of(whole: Line, subjects: Sequence[str]) -> np.ndarray:
    """Return the fidelities that plain tuning ends with, for these subjects of its line."""
    return whole.of(subjects).fidelity[:, whole.strengths.index(END)]


def contrast(
    a: Line, b: Line, whole: Line, shares: Sequence[float] = SHARES
) -> list[dict[str, Any]]:
    """Return a row a fidelity, and one for the area between the first and the last of them.

    The fidelities are `shares` of what plain tuning gives of these subjects at the end of `whole`.
    """
    a, b = paired(a, b)
    end = end_of(whole, a.subjects)
    rows: list[tuple[str, Interval, float]] = []
    for share in shares:
        dots = a.at(share * end) - b.at(share * end)
        flip = math.nan if np.isnan(dots).any() else sign_flip_p(dots)
        rows.append((f"{share:g}", gain_at(a, b, share * end), flip))
    low, high = min(shares), max(shares)
    area = gain_at(a, b, *np.linspace(low * end, high * end, 41))  # by its length
    rows.append((f"{low:g} to {high:g}", area, math.nan))
    about = {"arm": a.name, "against": b.name}
    return [
        about | {"fidelity": at, "gain": gain, "p": gain.p, "sign flip": flip}
        for at, gain, flip in rows
    ]


def family(
    lines: dict[str, Line],
    pairs: Sequence[tuple[str, str]],
    more: Sequence[dict[str, Any]] = (),
) -> pd.DataFrame:
    """Return the contrasts of pairs of lines, and `more`: all at a fidelity corrected together."""
    there = [(a, b) for a, b in pairs if a in lines and b in lines]
    whole = lines["less tuning"]
    rows = [row for a, b in there for row in contrast(lines[a], lines[b], whole)]
    table = pd.DataFrame([*rows, *more])
    if table.empty:
        return table
    is_area = table["fidelity"].str.contains("to")
    table.loc[~is_area, "p, Holm"] = holm(table.loc[~is_area, "p"].to_numpy())
    table["says"] = list(map(says, table["gain"], table["p, Holm"]))
    table.loc[is_area, "says"] = ""
    return table


def as_markdown(table: pd.DataFrame) -> str:
    """Return contrasts or places as Markdown: gains in words, nothing where there is no number."""
    if "gain" in table:
        words = [gain.words("+.3f").removeprefix("+nan") for gain in table["gain"]]
        table = table.assign(gain=words)
    return table.round(4).astype(object).where(table.notna(), "").to_markdown(index=False)


def says(gain: Interval, p: float) -> str:
    """Return the verdict: better or worse after the correction, else no difference, or neither."""
    if math.isnan(p):  # of the gain itself, or of one without a subject
        return "not reached" if math.isnan(gain.mean) else CANNOT_TELL
    said = {AGREES: "better", DISAGREES: "worse"}.get(verdict(gain, p=p), CANNOT_TELL)
    within = verdict(gain, margin=MARGIN) == NO_DIFFERENCE
    return NO_DIFFERENCE if within and said == CANNOT_TELL else said


def places(
    lines: dict[str, Line],
    category: dict[str, Line],
    table: pd.DataFrame,
    asks: pd.Series,
    shares: Sequence[float] = SHARES,
) -> pd.DataFrame:
    """Return what every line gives, and costs, where it is read: means over its subjects.

    `passes`: of a picture through the UNet, by `asks`, those of a step in each row of the table.
    """
    steps = table["strength"].str.extract(r"^(\d+)")[0].astype(float).fillna(table["steps"])
    passes = (steps * asks).groupby(points(table)).first()
    rows = []
    for name, one in lines.items():
        end = end_of(lines["less tuning"], one.subjects).mean()
        for share in shares:
            weights = one.weights(share * float(end))
            row = {"line": name, "subjects": len(one.subjects), "fidelity": f"{share:g}"}
            row["alignment"] = (one.alignment @ weights).mean()
            row["category"] = (category[name].alignment @ weights).mean()
            rows.append(row | {"passes": passes[list(one.strengths)].to_numpy() @ weights})
    return pd.DataFrame(rows).dropna().round({"alignment": 3, "category": 3, "passes": 0})


STYLES = {
    "less tuning": ("tab:grey", "s"),
    "SuDe": ("tab:red", "o"),
    "plain, lower rate": ("black", "v"),
    "SuDe, lower rate": ("tab:orange", "^"),
    "class images": ("tab:green", "P"),
    "semantic preservation": ("tab:purple", "X"),
    "yours": ("tab:blue", "D"),
}
"""Colour and mark of the lines that are drawn."""


def draw(file: Path, parts: dict[str, dict[str, Line]], shares: Sequence[float] = SHARES) -> None:
    """Draw the means of every line, its front drawn through and its hull dotted, as a PNG file.

    Dotted upright are the fidelities that are read. `parts`: lines by what their panel begins with.
    """
    from matplotlib.figure import Figure

    columns = min(2, len(parts))  # a page's width: labels of three beside each other are too small
    rows = math.ceil(len(parts) / columns)
    figure = Figure(figsize=(7 + columns - 1, 4 * rows), layout="constrained", dpi=160)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for spare in panels[len(parts) :]:
        spare.remove()
    for axes, (title, lines) in zip(panels, parts.items(), strict=False):
        for name in filter(lines.get, STYLES):
            (colour, mark), one, front = STYLES[name], lines[name], lines[name].front()
            fidelity, alignment = one.fidelity.mean(0), one.alignment.mean(0)
            axes.plot(fidelity, alignment, mark, ms=4, alpha=0.4, color=colour)
            axes.plot(fidelity[front], alignment[front], f"{mark}-", color=colour, lw=2, label=name)
            hull = hull_of(one).front()
            axes.plot(fidelity[hull], alignment[hull], ":", color=colour, lw=1)
        whole = lines["less tuning"]
        for share in shares:
            end = end_of(whole, whole.subjects).mean()
            axes.axvline(share * end, color="grey", lw=0.8, ls=":")
        axes.set_title(title.removesuffix(": "))
        axes.set_xlabel(f"subject fidelity: is it mine?\n(mean of {len(whole.subjects)} subjects)")
        axes.set_ylabel("attribute alignment: as asked?")
        axes.legend(loc="lower left")
    with atomic_write(file) as path:
        figure.savefig(path, format="png")
