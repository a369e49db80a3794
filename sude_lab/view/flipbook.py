"""A slider over pictures that were drawn beforehand: what a setting does, at once."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import ipywidgets
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from sude_lab.errors import UserError
from sude_lab.view import plots

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


class Flipbook:
    """Pages of pictures under one slider; where nothing slides, all pages below each other.

    Show it as the last line of a cell. Every page is drawn once, here: a move of the slider only
    exchanges one finished picture for another. A page whose widgets do not run (a stored notebook,
    a site) shows the strip of all pages instead; with the environment variable SUDE_LAB_STATIC=1
    there is the strip alone: so notebooks are stored, because a widget needs the kernel that made
    it.

    Args:
        pages: the setting's value, and under it a column's name and its pictures; all of one size.
        name: what the slider sets.
        notes: a line of text for some of the values.
        per_cell: pictures a column.

    Raises:
        UserError: there is no page, or a note is for a page that is not there.
    """

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
        lost = [value for value in self.notes if value not in self._pages]
        if lost:
            raise UserError(f"There is a note for {name} = {lost[0]}, but no such page.")
        self.images = {value: self._drawn([value]) for value in self._pages}
        self.strip = self._drawn(list(self._pages))
        self.slider = ipywidgets.SelectionSlider(
            options=[(_short(value), value) for value in self._pages],
            value=next(iter(self._pages)),
            description=name,
            layout={"width": "420px"},
        )
        self.image = ipywidgets.Image(format="jpeg")
        self.note = ipywidgets.Label()
        self.slider.observe(self._follow, names="value")
        self._follow()

    def widget(self) -> Any:
        """Return the slider with its page below."""
        return ipywidgets.VBox([ipywidgets.HBox([self.slider, self.note]), self.image])

    def _follow(self, _: Any = None) -> None:
        """Turn to where the slider is."""
        self.image.value = self.images[self.slider.value]
        self.note.value = self.notes.get(self.slider.value, "")

    def _title(self, value: Any, gap: str = ":  ") -> str:
        note = self.notes.get(value)
        return f"{self.name} = {_short(value)}" + (f"{gap}{note}" if note else "")

    def _drawn(self, values: list[Any]) -> bytes:
        """Return some pages below each other, as a JPEG; a strip names them, a single page not."""
        single = len(values) == 1
        rows = {"" if single else self._title(v, "\n"): self._pages[v] for v in values}
        across = self.per_cell * len(self._pages[values[0]])
        side = min(1.2, 9 / across)  # inches; small pictures gain nothing from more, files grow
        size = (1.3 + side * across, 0.4 + 1.1 * side * len(rows))
        figure = Figure(figsize=size, dpi=80, layout="constrained")
        FigureCanvasAgg(figure)
        plots.picture_table(figure.subplots(), rows, self.per_cell)
        file = BytesIO()
        # JPEG: a quarter of a PNG's size, and a notebook that stores it stays small.
        how = {"quality": 90, "subsampling": 0}
        figure.savefig(file, format="jpeg", bbox_inches="tight", pad_inches=0.05, pil_kwargs=how)
        return file.getvalue()

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        bundle: dict[str, Any] = {
            "text/plain": "\n".join(self._title(value) for value in self._pages),
            "image/jpeg": base64.b64encode(self.strip).decode("ascii"),
        }
        if os.environ.get("SUDE_LAB_STATIC", "0") in ("", "0"):
            bundle[WIDGET_VIEW] = self.widget()._repr_mimebundle_()[WIDGET_VIEW]
        return bundle


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
