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


def _colour(name: str) -> str | None:
    return COLOURS.get(name, "#059669" if name.startswith("untuned") else None)
