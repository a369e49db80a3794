"""Figures: every function takes an axis, draws on it and returns it."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Numbers = Sequence[float] | np.ndarray
Rows = Mapping[str, Mapping[str, Sequence[Image.Image]]]
"""Pictures under the names of a row and a column."""
WIDTH, DPI = 6.0, 96
"""Inches that JupyterLab has for a figure in a window of 1024 pixels, beside its file browser, and
pixels to the inch there."""
COLOURS = {"plain": "#777777", "sude": "#c2410c", "sude, no truncation": "#1d4ed8"}


def panels(columns: int = 1, height: float = 2.6, *, rows: int = 1, **how: Any) -> Any:
    """Return axes on a figure as wide as the page: one, or an array of them, row after row.

    A point of its labels is a point as read, and a notebook shows it with twice the pixels; a
    running one, with `in_words` for those who do not see it: JupyterLab gives a PNG no words.
    `height`: inches; `how`: as `plt.subplots`.
    """
    from matplotlib import pyplot as plt

    if "inline" in plt.get_backend():
        from IPython.core.interactiveshell import InteractiveShell
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        from sude_lab.view import shown

        set_matplotlib_formats("retina")
        if shown.is_listening() and not shown.is_static():
            look: dict[str, Any] = {"dpi": shown.SCALE * DPI, "bbox_inches": "tight"}
            shell: Any = InteractiveShell.instance()
            pages = shell.display_formatter.formatters["text/html"]
            pages.for_type(plt.Figure, lambda f: shown.as_html(encoded(f, **look), in_words(f)))
    size = (how.pop("width", WIDTH), height)
    _, axes = plt.subplots(rows, columns, figsize=size, dpi=DPI, layout="constrained", **how)
    return axes if rows * columns == 1 else axes.ravel()


def in_words(figure: Figure) -> str:
    """Say what a figure shows, from its titles, labels, legends and the ends of its lines."""
    drawn = [ax for ax in figure.axes if ax.axison]
    said = [f"{len(drawn)} panels"] if len(drawn) > 1 else []
    for ax in drawn:
        about = [" over ".join(filter(None, (ax.get_ylabel(), ax.get_xlabel())))]
        about += map(_ends, *ax.get_legend_handles_labels())
        if ax.images:
            ticks = {"rows": ax.get_yticklabels(), "columns": ax.get_xticklabels()}
            names = {kind: ", ".join(t.get_text() for t in some) for kind, some in ticks.items()}
            about = [f"{kind} {some}" for kind, some in names.items() if some]
        said.append(": ".join(filter(None, (ax.get_title(), "; ".join(filter(None, about))))))
    return re.sub(r"[${}\\]", "", " ".join(". ".join(filter(None, said)).split()))


def _ends(handle: Any, name: str) -> str:
    if not hasattr(handle, "get_ydata") or handle.get_linestyle() == "None":
        return name
    y = handle.get_ydata(orig=False)
    return f"{name} from {y[0]:.3g} to {y[-1]:.3g}"


def smooth(values: pd.Series, window: int = 25) -> pd.Series:
    """Return the running mean over `window` steps (fewer at the start)."""
    return values.rolling(window, min_periods=1).mean()


def open_gates(ax: Axes, metrics: Mapping[str, pd.DataFrame], window: int = 25) -> Axes:
    """Draw the share of samples whose gate (eq. 9) is open, a line a run."""
    y = {"ylabel": "share of open gates", "ylim": (-0.02, 1.02)}
    return _over_steps(ax, metrics, "open_gates", "Open gates", window, **y)


def loss_against_threshold(ax: Axes, metrics: pd.DataFrame, window: int = 25) -> Axes:
    """Draw L_sude and tau over the steps of one run; the gate is open where the loss is above."""
    _gate(ax, metrics["step"], *(smooth(metrics[name], window) for name in ("loss_sude", "tau")))
    title = f"Loss and threshold,\nmean of {window} steps"
    return finish(ax, title, xlabel="step", ylabel="per dimension")


def membership(ax: Axes, metrics: Mapping[str, pd.DataFrame], window: int = 25) -> Axes:
    """Draw rho, how far the subject follows the category's direction; 1 is where eq. 9 stops."""
    _over_steps(ax, metrics, "rho", "Category membership", window, ylabel=r"$\rho$")
    ax.axhline(1.0, **_EDGE)
    return ax


def learning(ax: Axes, metrics: Mapping[str, pd.DataFrame], window: int = 25) -> Axes:
    """Draw L_sub over the steps, a line a run: single steps faint, their running mean strong."""
    how = {"legend": 9 * (len(metrics) > 1), "ylabel": "$L_{sub}$ (eq. 3), per dimension"}
    for name, table in metrics.items():
        ax.plot(table["step"], table["loss_subject"], ".", ms=2, alpha=0.3, color=COLOURS.get(name))
        _over_steps(ax, {name: table}, "loss_subject", "The subject's loss", window, **how)
    return ax


def picture_grid(
    ax: Axes, picture: Image.Image | None, rows: Sequence[str] = (), title: str = ""
) -> Axes:
    """Draw a grid of pictures that is one picture already, with names beside its equal rows."""
    ax.set_title(title, fontsize=9)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    if picture is not None:
        ax.imshow(np.asarray(picture.convert("RGB")), interpolation="lanczos")
        height = picture.height / max(1, len(rows))
        ax.set_yticks([(k + 0.5) * height - 0.5 for k in range(len(rows))], list(rows))
        ax.tick_params(length=0, labelsize=9)
    return ax


def tile(rows: Rows, per_cell: int = 2) -> tuple[np.ndarray, list[str], int, int]:
    """Return pictures as one (H, W, 3) array of `picture_table`, its columns, and side and gap."""
    columns = list(dict.fromkeys(name for cells in rows.values() for name in cells))
    side = next(iter(next(iter(rows.values())).values()))[0].width
    gap = max(2, side // 10)
    width = per_cell * side + gap
    canvas = np.full((len(rows) * (side + gap), len(columns) * width, 3), 255, dtype=np.uint8)
    for i, cells in enumerate(rows.values()):
        for name, pictures in cells.items():
            for k, picture in enumerate(pictures[:per_cell]):
                y, x = i * (side + gap), columns.index(name) * width + k * side
                canvas[y : y + side, x : x + side] = np.asarray(picture.convert("RGB"))
    return canvas, columns, side, gap


def picture_table(ax: Axes, rows: Rows, per_cell: int = 2) -> Axes:
    """Draw pictures as a table: a row a model, a column a prompt, `per_cell` pictures a cell."""
    canvas, columns, side, gap = tile(rows, per_cell)
    width = per_cell * side + gap
    ax.imshow(canvas, interpolation="lanczos")
    ax.set_xticks([j * width + (width - gap) / 2 for j in range(len(columns))], columns)
    ax.set_yticks([i * (side + gap) + side / 2 for i in range(len(rows))], list(rows))
    ax.tick_params(length=0, labelsize=9)
    ax.xaxis.tick_top()
    ax.spines[:].set_visible(False)
    return ax


def encoded(picture: Figure | Image.Image, kind: str = "png", **how: Any) -> bytes:
    """Return a figure or a picture as the bytes of a file, PNG or JPEG."""
    file = BytesIO()
    save = picture.save if isinstance(picture, Image.Image) else picture.savefig
    save(file, format=kind, **how)
    return file.getvalue()


def data_url(picture: Figure | Image.Image, **how: Any) -> str:
    """Return a figure or a picture as a PNG inside an address, for pages of one file."""
    return f"data:image/png;base64,{b64encode(encoded(picture, **how)).decode()}"


def difference(before: Image.Image, after: Image.Image, times: float = 2.0) -> Image.Image:
    """Return `times` the difference of two pictures, as a picture: grey where they agree."""
    a, b = (np.asarray(image.convert("RGB"), dtype=float) for image in (before, after))
    return Image.fromarray((128 + times * (b - a)).clip(0, 255).astype(np.uint8))


def rule_lines(ax: Axes, table: pd.DataFrame, legend: int = 9) -> Axes:
    """Draw rules with a strength as lines from the row of "plain" through two measures' plane.

    `table`: columns rule, strength and both measures, a row a (rule, strength); numbers at the
    marks are strengths.
    """
    x, y = "subject_fidelity", "attribute_alignment"
    plain, others = table[table["rule"] == "plain"], table[table["rule"] != "plain"]
    marks: list[tuple[str, np.ndarray, str]] = []
    for k, (rule, part) in enumerate(others.groupby("rule", sort=False)):
        part, colour = part.sort_values("strength"), _SAFE[k % len(_SAFE)]
        line = pd.concat([plain, part])
        ax.plot(line[x], line[y], f"{_MARKS[k % 4]}{_DASHES[k % 4]}", color=colour, label=rule)
        places = zip(part["strength"], part[[x, y]].to_numpy(), strict=True)
        marks += [(f"{strength:g}", place, colour) for strength, place in places]
    ax.plot(plain[x], plain[y], "o", color="black", markersize=8, label="plain")
    _name(ax, marks)
    return finish(ax, legend=legend, xlabel=words(x), ylabel=words(y))


def curves(
    ax: Axes,
    x: Numbers,
    lines: Mapping[str, Numbers],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    log: Literal["", "x", "y", "xy"] = "",
    mark: float | None = None,
) -> Axes:
    """Draw named lines over one x, told apart by colour and by dash.

    `log` names the logarithmic axes; `mark` is an x worth a thin vertical line.
    """
    for k, (name, y) in enumerate(lines.items()):
        ax.plot(x, np.asarray(y), label=name, color=_SAFE[k % len(_SAFE)], ls=_DASHES[k % 4])
    if mark is not None:
        ax.axvline(mark, color="black", lw=0.7)
    ax.set(**{f"{axis}scale": "log" for axis in log})
    return finish(ax, title, legend=9 * (len(lines) > 1), xlabel=xlabel, ylabel=ylabel)


def gate_over_time(
    ax: Axes, times: Numbers, loss: Numbers, threshold: Numbers, *, now: float | None = None
) -> Axes:
    """Draw L_sude and tau_t of one noised picture over t; the gate is open where it is shaded.

    Losses are means over the latent's dimensions, drawn in thousandths; `now` marks one timestep.
    """
    x = np.asarray(times, dtype=float)
    y, tau = (1000 * np.asarray(values, dtype=float) for values in (loss, threshold))
    _gate(ax, x, y, tau, "o-", interpolate=True, lw=0)
    ax.axhline(0, color="black", lw=0.5)
    if now is not None:
        ax.axvline(now, color=_SAFE[0], lw=1.2)
    return finish(ax, xlabel="timestep t", ylabel="per dimension, in thousandths")


def gains(ax: Axes, table: pd.DataFrame, measure: str, *, rows: str = "method") -> Axes:
    """Draw paired gains with their intervals; 0 is no change.

    `table` is that of `sude_lab.evaluate.metrics.gains`: a line a name in the column `rows`, in it
    a mark a variant, told apart by colour and by shape. Where there is no interval, the mark stands
    alone.
    """
    drawn = table[(table["measure"] == measure) & table["gain"].notna()]
    names = list(drawn[rows].unique())
    parts = [("", drawn)] if rows == "variant" else list(drawn.groupby("variant", sort=False))
    for k, (variant, part) in enumerate(parts):
        y = [names.index(n) + 0.24 * (k - (len(parts) - 1) / 2) for n in part[rows]]
        ends = np.vstack([part["gain"] - part["low"], part["high"] - part["gain"]])
        ends = np.nan_to_num(ends).clip(min=0)
        look: dict[str, Any] = {"color": _SAFE[k % len(_SAFE)], "marker": _MARKS[k % len(_MARKS)]}
        ax.errorbar(part["gain"], y, xerr=ends, ls="", capsize=3, label=variant, **look)
    ax.axvline(0.0, **_EDGE)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)  # the first on top
    ax.locator_params(axis="x", nbins=3)
    ax.set_xlabel(f"change of\n{words(measure)}")
    if len(parts) > 1:
        ax.legend(frameon=False, fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return ax


_SAFE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours, which the colour-blind tell apart."""
_DASHES = ("-", "--", "-.", ":")
_MARKS = ("o", "s", "^", "D", "v", "P", "X")
_EDGE: dict[str, Any] = {"color": "black", "lw": 0.8, "ls": "--"}


def _name(ax: Axes, marks: Sequence[tuple[str, np.ndarray, str]]) -> None:
    """Write names beside marks, each where lines and earlier names are farthest, in the frame."""
    ax.autoscale_view()
    to_points, pixels = ax.transData.transform, ax.figure.dpi / 72
    turns = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    ends = [np.asarray(line.get_xydata()) for line in ax.lines]
    ways = [np.linspace(xy[:-1], xy[1:], 20).reshape(-1, 2) for xy in ends]
    taken, frame = to_points(np.concatenate([*ends, *ways])), ax.bbox
    for name, place, colour in marks:
        half = np.array([2.5 * len(name) + 1, 4])  # of a name's width and height, in points
        around = np.column_stack([np.cos(turns), np.sin(turns)]) * (half + 7)
        spots = (to_points(place) + around * pixels).round(6)
        gaps = np.abs(spots[:, None] - taken) - half * pixels
        room = np.linalg.norm(gaps.clip(0), axis=2).min(1)
        inside = (np.minimum(spots - frame.min, frame.max - spots) - half * pixels).min(1)
        best = int(np.minimum(room, 3 * inside).argmax())
        taken = np.vstack([taken, spots[best] + half * pixels * [[-1, 0], [0, 0], [1, 0]]])
        look: dict[str, Any] = {"color": colour, "fontsize": 9, "ha": "center", "va": "center"}
        ax.annotate(name, tuple(place), tuple(around[best]), textcoords="offset points", **look)


def words(column: str) -> str:
    """Return a column's name as words."""
    return column.replace("_", " ")


def _gate(ax: Axes, x: Any, loss: Any, tau: Any, line: str = "-", **shade: Any) -> None:
    """Draw L_sude and tau_t over x, with shade where the gate of eq. 9 is open."""
    ax.plot(x, loss, line, color=COLOURS["sude"], ms=3, label="$L_{sude}$ (eq. 7)")
    ax.plot(x, tau, "--", color="black", label=r"$\tau_t$ (eq. 8)")
    shade |= {"color": COLOURS["sude"], "alpha": 0.15, "where": loss > tau}
    ax.fill_between(x, tau, loss, **shade)


def _over_steps(
    ax: Axes, metrics: Mapping[str, pd.DataFrame], column: str, title: str, window: int, **how: Any
) -> Axes:
    for name, table in metrics.items():
        ax.plot(table["step"], smooth(table[column], window), label=name, color=COLOURS.get(name))
    return finish(ax, f"{title},\nmean of {window} steps", xlabel="step", **how)


def finish(
    ax: Axes, title: str | None = None, *, legend: int = 9, beside: bool = False, **labels: Any
) -> Axes:
    """Set labels, the title, and a legend of that size (0: none), perhaps beside the axis."""
    ax.set(**labels)
    if title is not None:
        ax.set_title(title, fontsize=10)
    if legend:
        place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if beside else {}
        how: dict[str, Any] = {"framealpha": 1, "edgecolor": "none", "handlelength": 1.7}
        drawn = ax.legend(fontsize=legend, **how, **place)
        drawn.set_in_layout(beside)  # one inside, of long names, would push its axis together
        _make_room(ax.figure)
    return ax


def _make_room(figure: Any) -> None:
    """Raise the tops of a figure's axes until no legend covers a line or a mark."""
    for _ in range(12):
        figure.draw_without_rendering()
        covered = [ax for ax in figure.axes if (drawn := ax.get_legend()) and _covers(drawn, ax)]
        for ax in covered:
            top = ax.transAxes.transform((0, 1.08))
            ax.set_ylim(top=ax.transData.inverted().transform(top)[1])
        if not covered:
            break


def _covers(legend: Any, ax: Axes) -> bool:
    """Return whether a legend lies on lines, marks or bars; an upright line may pass behind it."""
    box = legend.get_window_extent().padded(4)
    for line in ax.lines:
        path = line.get_transform().transform_path(line.get_path())
        if len(np.unique(line.get_xdata())) < 2:
            continue
        if line.get_linestyle() == "None":
            if box.count_contains(path.vertices):
                return True
        elif path.intersects_bbox(box, filled=False):
            return True
    return any(box.overlaps(bar.get_window_extent()) for bar in ax.patches)
