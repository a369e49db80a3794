"""Click on a run, and its pictures appear: a table of runs beside the plane of two measures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets
import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from sude_lab.errors import UserError
from sude_lab.view import plots
from sude_lab.view.shown import SCALE, Shown, png, short

_PLACE = ["subject", "factor"]
_X, _Y = "subject_fidelity", "attribute_alignment"


class RunExplorer(Shown):
    """A button a run, coloured by a measure; a click marks the run in the plane and draws it.

    Args:
        runs: a row a run; its subject and factor say where its button stands.
        pictures: gives a run's pictures by their prompts; called at the first click on the run.
        at: the (subject, factor) to begin with.

    Raises:
        UserError: there is no run, two have the same place, or `at` is not among them.
    """

    def __init__(
        self,
        runs: pd.DataFrame,
        pictures: Callable[[pd.Series], dict[str, list[Image.Image]]],
        *,
        at: Sequence[Any] | None = None,
    ) -> None:
        if runs.empty:
            raise UserError("There is no run to show.")
        if runs.duplicated(_PLACE).any():
            raise UserError("Two runs have the same subject and factor: choose among them first.")
        self.runs = runs.sort_values("factor", kind="stable").set_index(_PLACE, drop=False)
        self._pictures = pictures
        self._drawn: dict[tuple[Any, Any], bytes] = {}
        self.figure = Figure(figsize=(plots.WIDTH, 5.2), dpi=SCALE * plots.DPI)
        self.canvas = FigureCanvasAgg(self.figure)
        self._plane, self._right = (
            self.figure.add_axes(box) for box in ((0.1, 0.55, 0.5, 0.43), (0.02, 0.02, 0.96, 0.39))
        )
        self.buttons = self._make_buttons()
        self._prepare()
        self.show(*(at or self.runs.index[0]))

    def show(self, subject: Any, factor: Any) -> bytes:
        """Mark a run, draw its pictures, and return the figure as a PNG.

        Raises:
            UserError: there is no such run.
        """
        if (subject, factor) not in self.runs.index:
            raise UserError(f"There is no run with subject {subject} and factor {factor}.")
        self.at = (subject, factor)
        for place, button in self.buttons.items():
            button.layout.border = "3px solid black" if place == self.at else "3px solid white"
        if self.at not in self._drawn:
            self._move_mark()
            self._draw_pictures()
            self.canvas.draw()
            self._drawn[self.at] = png(self.canvas)
        self.publish()
        return self.picture()

    def picture(self) -> bytes:
        """Return the plane and the pictures of the marked run."""
        return self._drawn[self.at]

    def widget(self) -> Any:
        """Return the table of buttons."""

        def label(text: Any, width: str = "70px") -> Any:
            return ipywidgets.Label(short(text), layout={"width": width})

        rows, columns = (list(dict.fromkeys(self.runs[name])) for name in _PLACE)
        lines = [[label("subject \\ factor", "190px"), *map(label, columns)]]
        for row in rows:
            cells = [self.buttons.get((row, column)) or label("") for column in columns]
            lines.append([label(row, "190px"), *cells])
        return ipywidgets.VBox([ipywidgets.HBox(line) for line in lines])

    def __str__(self) -> str:
        run = self.runs.loc[self.at]
        return (
            f"{self.at[0]}, factor {short(self.at[1])}: "
            f"{plots.words(_Y)} {run[_Y]:.2f}, {plots.words(_X)} {run[_X]:.2f}"
        )

    def _make_buttons(self) -> dict[tuple[Any, Any], Any]:
        shades = colormaps["cividis"]
        buttons = {}
        for place, run in self.runs.iterrows():
            value = float(run[_Y])
            about = f"{place[0]}, factor {short(place[1])}"
            button = ipywidgets.Button(description=f"{value:.2f}", tooltip=about)
            button.layout.width, button.style.button_color = "70px", to_hex(shades(value))
            button.style.text_color = "black" if value > 0.5 else "white"
            button.on_click(lambda _, place=place: self.show(*place))
            buttons[place] = button
        return buttons

    def _prepare(self) -> None:
        """Draw once what every state has: clearing axes costs more than all the rest."""
        plane, right = self._plane, self._right
        plane.plot(self.runs[_X], self.runs[_Y], "o", ms=4, color="#bbbbbb")
        (self._line,) = plane.plot([], [], "-o", ms=5, color="#0072B2", lw=1)
        (self._mark,) = plane.plot([], [], "o", ms=12, mfc="none", mec="#D55E00", mew=2)
        plane.set(xlim=(0, 1.03), ylim=(-0.03, 1.03))
        plane.set(xlabel=plots.words(_X), ylabel=plots.words(_Y))
        self._canvas = right.imshow(np.full((2, 2, 3), 255, dtype=np.uint8))
        self._title = right.set_title("", fontsize=10)
        right.set_axis_off()

    def _move_mark(self) -> None:
        of_row = self.runs[self.runs["subject"] == self.at[0]]
        self._line.set_data(of_row[_X], of_row[_Y])
        run = self.runs.loc[self.at]
        self._mark.set_data([run[_X]], [run[_Y]])
        self._title.set_text(str(self))

    def _draw_pictures(self) -> None:
        cells = list(self._pictures(self.runs.loc[self.at]).items())
        half = -(-len(cells) // 2)
        # Two lines of prompts: in one, the pictures would be too small to see anything.
        lines = [part for part in (cells[:half], cells[half:]) if part]
        canvases = [plots.tile({"": dict(part)}, len(cells[0][1]))[0] for part in lines]
        height, width = canvases[0].shape[:2]
        gap = height // 3
        whole = np.full((len(lines) * (height + gap), width, 3), 255, dtype=np.uint8)
        for text in list(self._right.texts):
            text.remove()
        for k, (part, canvas) in enumerate(zip(lines, canvases, strict=True)):
            top, step = k * (height + gap) + gap, canvas.shape[1] / len(part)
            whole[top : top + height, : canvas.shape[1]] = canvas
            for j, (name, _) in enumerate(part):
                self._right.text((j + 0.5) * step, top - 4, name, ha="center", fontsize=9)
        self._canvas.set_data(whole)
        self._canvas.set_extent((0, whole.shape[1], whole.shape[0], 0))
        self._right.set(xlim=(0, whole.shape[1]), ylim=(whole.shape[0], 0))
