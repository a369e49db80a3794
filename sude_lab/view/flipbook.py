"""A slider over pictures that were drawn beforehand: what a setting does, at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ipywidgets
from matplotlib.figure import Figure
from PIL import Image

from sude_lab.errors import UserError
from sude_lab.view import plots
from sude_lab.view.shown import SCALE, Shown, short, slider


class Flipbook(Shown):
    """Pages of pictures under one slider; on a static page, all pages below each other.

    Args:
        pages: the setting's value, and under it a column's name and its pictures; all of one size.
        name: what the slider sets.
        notes: a line of text for some of the values.
        per_cell: pictures a column.
    """

    format = "jpeg"

    def __init__(
        self,
        pages: Mapping[Any, Mapping[str, Sequence[Image.Image]]],
        *,
        name: str,
        notes: Mapping[Any, str] | None = None,
        per_cell: int = 2,
    ) -> None:
        if not pages or not all(pages.values()):
            raise UserError("A flipbook needs pages with pictures: draw some first.")
        self.name, self.notes, self.per_cell = name, dict(notes or {}), per_cell
        self._pages = {value: dict(cells) for value, cells in pages.items()}
        if lost := [value for value in self.notes if value not in self._pages]:
            raise UserError(f"There is a note for {name} = {lost[0]}, but no such page.")
        self.images = {value: self._drawn({"": cells}) for value, cells in self._pages.items()}
        self.strip = self._drawn({self._title(v, "\n"): cells for v, cells in self._pages.items()})
        self.slider = slider(name, self._pages, next(iter(self._pages)), self._follow, "420px")
        self.note = ipywidgets.Label()
        self.controls = (self.slider, self.note)
        self._follow()

    def picture(self) -> bytes:
        """Return the page at which the slider stands."""
        return self.images[self.slider.value]

    def still(self) -> bytes:
        """Return all pages below each other."""
        return self.strip

    def __str__(self) -> str:
        return "\n".join(map(self._title, self._pages))

    def _follow(self, _: Any = None) -> None:
        """Turn to where the slider is."""
        self.note.value = self.notes.get(self.slider.value, "")
        self.publish()

    def _title(self, value: Any, gap: str = ":  ") -> str:
        note = self.notes.get(value)
        return f"{self.name} = {short(value)}" + (f"{gap}{note}" if note else "")

    def _drawn(self, rows: plots.Rows) -> bytes:
        """Return pages below each other, as a JPEG: a quarter of a PNG's size in a notebook."""
        across = self.per_cell * len(next(iter(rows.values())))
        # In inches; small pictures gain nothing from more, files grow.
        side = min(1.0, (plots.WIDTH - 1.3) / across)
        size = (1.3 + side * across, 0.4 + 1.1 * side * len(rows))
        figure = Figure(figsize=size, dpi=SCALE * plots.DPI, layout="constrained")
        plots.picture_table(figure.subplots(), rows, self.per_cell)
        how = {"quality": 85, "subsampling": 0}
        edge: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.05}
        return plots.encoded(figure, self.format, pil_kwargs=how, **edge)
