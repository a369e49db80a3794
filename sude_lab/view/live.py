"""Watch a run while it tunes: curves and newest pictures, redrawn in place in a notebook."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from sude_lab.view import plots
from sude_lab.view.shown import SCALE, Shown

if TYPE_CHECKING:
    from sude_lab.tuning import Step


class LiveView(Shown):
    """Curves of a run, and its newest validation grid, redrawn in place while it tunes.

        with LiveView(config.max_train_steps, folder=out) as live:
            run_tuning(config, out, on_step=live, validation_every=50)

    Around `tune` call it in the loop: `live(step)`. Steps that are done again, by a run that goes
    on, replace the first ones.

    Args:
        total: the steps of the run, the length of the axes; None: as many as there are.
        folder: the run's folder, whose newest validation grid is shown.
        labels: names of the grid's rows, from the top.
        every: seconds between two drawings, at least; drawing takes a twentieth of the time.
    """

    def __init__(
        self,
        total: int | None = None,
        *,
        folder: Path | str | None = None,
        labels: Sequence[str] = (),
        every: float = 2.0,
    ) -> None:
        self.total, self.labels = total, tuple(labels)
        self.folder = Path(folder) if folder else None
        self.every = every
        self.rows: list[dict[str, float]] = []
        self.figure = Figure(figsize=(plots.WIDTH, 5.0), dpi=SCALE * plots.DPI)
        edges = {"left": 0.11, "right": 0.98, "bottom": 0.1, "top": 0.87}
        places = self.figure.add_gridspec(2, 2, wspace=0.42, hspace=0.45, **edges)
        self._axes = places.subplots(squeeze=False).ravel()
        self._began, self._next = time.perf_counter(), 0.0
        self._seconds, self._steps = 0.0, 0

    def __enter__(self) -> LiveView:
        """Show the empty figure; what matplotlib loads first is loaded before the first step."""
        self.draw()
        self._began = time.perf_counter()
        self._next = self._began + self.every  # the first drawing is no measure for the next ones
        return self

    def __exit__(self, *_: object) -> None:
        """Draw once more, with the last grid; also after an error or an interrupt."""
        self.draw()

    def __call__(self, step: Step) -> None:
        """Take a step, and redraw when it is time to."""
        while self.rows and self.rows[-1]["step"] >= step.number:  # resumed before where it stopped
            self.rows.pop()
        self.rows.append(step.row())
        now = time.perf_counter()
        self._seconds, self._steps = now - self._began, self._steps + 1
        if now >= self._next:
            self.draw()

    def metrics(self) -> pd.DataFrame:
        """Return the steps so far, one row each, as in a run's metrics.csv."""
        return pd.DataFrame(self.rows)

    def draw(self) -> None:
        """Redraw the figure now, and show it where something is listening."""
        started = time.perf_counter()
        self._redraw()
        self.publish(first=self._handle is None)
        ended = time.perf_counter()
        self._next = ended + max(self.every, 19 * (ended - started))

    def _redraw(self) -> None:
        loss, sude, member, pictures = self._axes
        for ax in self._axes:
            ax.clear()
        table = self.metrics()
        self.figure.suptitle(self._state(), fontsize=10, x=0.01, ha="left")
        if len(table):
            plots.learning(loss, {"sude": table})
        watched = len(table) and table["rho"].notna().any()
        if watched:
            plots.loss_against_threshold(sude, table)
            plots.membership(member, {"sude": table})
            gates = plots.smooth(table["open_gates"])
            (line,) = member.plot(table["step"], gates, ":", color="black")
            lines = [member.get_lines()[0], line]
            member.legend(lines, [r"$\rho$", "share of open gates"], frameon=False, fontsize=9)
            member.set(ylabel="batch mean", ylim=(min(0.0, member.get_ylim()[0]), None))
        off = "" if watched or not len(table) else " (not watched)"
        titles = (f"category: loss, threshold{off}", f"category: ρ and gates{off}")
        for ax, title in zip((loss, sude, member), ("the subject's loss", *titles), strict=True):
            ax.set_title(title, fontsize=10)
            if self.total:
                ax.set_xlim(0, self.total)
        name, picture = self._newest() or ("no pictures yet", None)
        plots.picture_grid(pictures, picture, self.labels, title=name)

    def __str__(self) -> str:
        return f"Tuning, live: {self._state()}"

    def _state(self) -> str:
        if not self.rows:
            return "waiting for the first step"
        total = f" of {self.total}" if self.total else ""
        pace = f"{self._seconds / self._steps:.2f} s a step, pictures included"
        step = f"step {self.rows[-1]['step']:.0f}{total}"
        return f"{step}   ·   {pace}   ·   lines: running means of 25 steps"

    def _newest(self) -> tuple[str, Image.Image] | None:
        files = sorted(self.folder.glob("validation/step-*.png")) if self.folder else []
        if not files:
            return None
        with Image.open(files[-1]) as picture:  # files of a run are written whole
            return f"step {int(files[-1].stem.removeprefix('step-'))}", picture.convert("RGB")
