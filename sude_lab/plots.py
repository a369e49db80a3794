"""Figures: every function takes an axis, draws on it and returns it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"plain": "#777777", "sude": "#c2410c", "sude, no truncation": "#1d4ed8"}


def smooth(values: pd.Series, window: int = 25) -> pd.Series:
    """Return the running mean over `window` steps (fewer at the start)."""
    return values.rolling(window, min_periods=1).mean()


def open_gates(ax: Axes, metrics: Mapping[str, pd.DataFrame], window: int = 25) -> Axes:
    """Draw the share of samples whose gate (eq. 9) is open, a line a run."""
    for name, table in metrics.items():
        ax.plot(table["step"], smooth(table["open_gates"], window), label=name, color=_colour(name))
    ax.set(xlabel="step", ylabel="share of open gates", ylim=(-0.02, 1.02))
    ax.set_title(f"Open gates, running mean of {window} steps", fontsize=10)
    ax.legend(frameon=False)
    return ax


def loss_against_threshold(ax: Axes, metrics: pd.DataFrame, window: int = 25) -> Axes:
    """Draw L_sude and tau over the steps of one run; the gate is open where the loss is above."""
    loss, tau = smooth(metrics["loss_sude"], window), smooth(metrics["tau"], window)
    ax.plot(metrics["step"], loss, color=COLOURS["sude"], label="$L_{sude}$ (eq. 7)")
    ax.plot(metrics["step"], tau, color="black", ls="--", label=r"$\tau_t$ (eq. 8)")
    ax.fill_between(metrics["step"], tau, loss, where=loss > tau, color=COLOURS["sude"], alpha=0.15)
    ax.set(xlabel="step", ylabel="per dimension")
    ax.set_title(f"Loss against threshold, running mean of {window} steps", fontsize=10)
    ax.legend(frameon=False)
    return ax


def membership(ax: Axes, metrics: Mapping[str, pd.DataFrame], window: int = 25) -> Axes:
    """Draw rho, how far the subject follows the category's direction; 1 is where eq. 9 stops."""
    for name, table in metrics.items():
        ax.plot(table["step"], smooth(table["rho"], window), label=name, color=_colour(name))
    ax.axhline(1.0, color="black", lw=0.8, ls="--")
    ax.set(xlabel="step", ylabel=r"$\rho$")
    ax.set_title(f"Category membership, running mean of {window} steps", fontsize=10)
    ax.legend(frameon=False)
    return ax


def picture_table(
    ax: Axes, rows: Mapping[str, Mapping[str, Sequence[Image.Image]]], per_cell: int = 2
) -> Axes:
    """Draw pictures as a table: a row a model, a column a prompt, `per_cell` pictures a cell."""
    columns = list(dict.fromkeys(name for cells in rows.values() for name in cells))
    side = next(iter(next(iter(rows.values())).values()))[0].width
    gap = max(2, side // 10)
    width = per_cell * side + gap
    canvas = np.full((len(rows) * (side + gap), len(columns) * width, 3), 255, dtype=np.uint8)
    for i, cells in enumerate(rows.values()):
        for j, name in enumerate(columns):
            for k, image in enumerate(cells.get(name, ())[:per_cell]):
                y, x = i * (side + gap), j * width + k * side
                canvas[y : y + side, x : x + side] = np.asarray(image.convert("RGB"))
    ax.imshow(canvas, interpolation="lanczos")
    ax.set_xticks([j * width + (width - gap) / 2 for j in range(len(columns))], columns)
    ax.set_yticks([i * (side + gap) + side / 2 for i in range(len(rows))], list(rows))
    ax.tick_params(length=0, labelsize=10)
    ax.xaxis.tick_top()
    for spine in ax.spines.values():
        spine.set_visible(False)
    return ax


def difference(before: Image.Image, after: Image.Image) -> Image.Image:
    """Return how two pictures differ, as a picture: grey where they agree."""
    a, b = (np.asarray(image.convert("RGB"), dtype=int) for image in (before, after))
    return Image.fromarray((128 + (b - a) // 2).astype(np.uint8))


def measures(ax: Axes, table: pd.DataFrame, names: Sequence[str]) -> Axes:
    """Draw the means of measures by variant with their intervals (`name_low`, `name_high`)."""
    width = 0.8 / len(table)
    for i, row in enumerate(table.to_dict("records")):
        means = np.array([row[n] for n in names])
        low = means - np.array([row[f"{n}_low"] for n in names])
        high = np.array([row[f"{n}_high"] for n in names]) - means
        ax.bar(
            np.arange(len(names)) + (i - (len(table) - 1) / 2) * width,
            means,
            width * 0.92,
            yerr=np.vstack([low, high]),
            capsize=3,
            color=_colour(str(row["variant"])),
            label=row["variant"],
        )
    ax.set_xticks(np.arange(len(names)), [n.replace("_", " ") for n in names])
    ax.set_ylim(0, 1.05)
    ax.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.14))
    return ax


def paired_runs(
    ax: Axes,
    runs: pd.DataFrame,
    *,
    before: str = "plain",
    after: str = "sude",
    x: str = "subject_fidelity",
    y: str = "attribute_alignment",
) -> Axes:
    """Draw an arrow a (subject, seed) from the run without SuDe to the run with it."""
    pairs = runs[runs["variant"] == before].merge(
        runs[runs["variant"] == after], on=["subject", "seed"], suffixes=("_before", "_after")
    )
    subjects = list(dict.fromkeys(pairs["subject"]))
    for row in pairs.to_dict("records"):
        colour = f"C{subjects.index(row['subject']) % 10}"
        start, end = ((row[f"{x}_{k}"], row[f"{y}_{k}"]) for k in ("before", "after"))
        ax.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": colour, "lw": 1.3})
        ax.plot(*start, "o", color=colour, markersize=4)
    for k, subject in enumerate(subjects):
        ax.plot([], [], "-", color=f"C{k % 10}", label=subject)
    ax.set(xlabel=x.replace("_", " "), ylabel=y.replace("_", " "), xlim=(0, 1), ylim=(0, 1.02))
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def curves(
    ax: Axes,
    x: Sequence[float] | np.ndarray,
    lines: Mapping[str, Sequence[float] | np.ndarray],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    log: bool = False,
) -> Axes:
    """Draw named lines over one x, told apart by colour and by dash; `log` for both axes."""
    for k, (name, y) in enumerate(lines.items()):
        ax.plot(x, np.asarray(y), label=name, color=_SAFE[k % len(_SAFE)], ls=_DASHES[k % 4])
    if log:
        ax.set(xscale="log", yscale="log")
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.set_title(title, fontsize=10)
    if len(lines) > 1:
        ax.legend(frameon=False, fontsize=9)
    return ax


def confusion(ax: Axes, counts: np.ndarray, names: Sequence[str]) -> Axes:
    """Draw how often each truth (row) was given each name (column), as shares of the row."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    ax.imshow(shares, cmap="cividis", vmin=0, vmax=1)
    for i, j in np.ndindex(*counts.shape):
        if counts[i, j]:
            tone = "black" if shares[i, j] > 0.6 else "white"
            ax.text(j, i, str(int(counts[i, j])), ha="center", va="center", color=tone, fontsize=8)
    ax.set_xticks(range(len(names)), names, rotation=45, ha="right")
    ax.set_yticks(range(len(names)), names)
    ax.set(xlabel="what the model calls it", ylabel="what it is")
    return ax


def gains(ax: Axes, table: pd.DataFrame, measure: str, *, rows: str = "method") -> Axes:
    """Draw paired gains with their intervals; 0 is no change.

    `table` is that of `sude_lab.metrics.gains`: a line a name in the column `rows`, in it a mark a
    variant, told apart by colour and by shape. Where there is no interval, the mark stands alone.
    """
    mine = table[(table["measure"] == measure) & table["gain"].notna()]
    names = list(dict.fromkeys(mine[rows]))
    variants = ["all"] if rows == "variant" else list(dict.fromkeys(mine["variant"]))
    for k, variant in enumerate(variants):
        part = mine if rows == "variant" else mine[mine["variant"] == variant]
        y = [names.index(n) + 0.24 * (k - (len(variants) - 1) / 2) for n in part[rows]]
        ends = np.vstack([part["gain"] - part["low"], part["high"] - part["gain"]])
        ax.errorbar(
            part["gain"],
            y,
            xerr=np.nan_to_num(ends).clip(min=0),
            fmt=_MARKS[k % len(_MARKS)],
            color=_SAFE[k % len(_SAFE)],
            capsize=3,
            label=variant,
        )
    ax.axvline(0.0, color="black", lw=0.8, ls="--")
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)  # the first on top
    ax.locator_params(axis="x", nbins=6)
    ax.set_xlabel(f"change of {measure.replace('_', ' ')}")
    if len(variants) > 1:
        ax.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return ax


def scatter(
    ax: Axes, table: pd.DataFrame, x: str, y: str, *, group: str = "method", diagonal: bool = False
) -> Axes:
    """Draw one column over another, a mark a row, a colour and a shape a group.

    `diagonal` adds the line y = x; the line y = 0 is always there.
    """
    for k, (name, part) in enumerate(table.groupby(group, sort=False)):
        colour, mark = _SAFE[k % len(_SAFE)], _MARKS[k % len(_MARKS)]
        ax.plot(part[x], part[y], mark, color=colour, label=name, alpha=0.8)
    ax.axhline(0.0, color="black", lw=0.8)
    if diagonal:
        ax.axline((0, 0), slope=1, color="black", lw=0.8, ls="--")
    ax.locator_params(nbins=6)
    ax.set(xlabel=x.replace("_", " "), ylabel=y.replace("_", " "))
    if table[group].nunique() > 1:
        ax.legend(frameon=False, fontsize=9)
    return ax


_SAFE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours, which the colour-blind tell apart."""
_DASHES = ("-", "--", "-.", ":")
_MARKS = ("o", "s", "^", "D", "v", "P", "X")


def _colour(name: str) -> str | None:
    return COLOURS.get(name, "#059669" if name.startswith("untuned") else None)
