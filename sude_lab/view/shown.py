"""A picture with controls in a notebook: the notebook keeps the picture, the kernel the controls.

An explorer, as a cell's last line, shows its controls, and below them its picture, which follows
them in place and is stored. For controls that died with their kernel the style beside the picture
puts a sentence. With SUDE_LAB_STATIC=1, and outside a notebook, there is the picture alone.
"""

from __future__ import annotations

import html
import os
from base64 import b64encode
from collections.abc import Callable, Iterable, Sequence
from io import BytesIO
from typing import Any

import ipywidgets
from matplotlib.figure import Figure
from PIL import Image

SCALE = 2
"""Pixels of a picture to one of the page: figures are drawn at twice the page's resolution."""
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
GONE = "Run this cell again to bring its controls back."
# An output before ours without any element in it is a view whose widget is gone.
_DEAD = (
    ".jp-OutputArea-child:has(+ .jp-OutputArea-child .sude-lab-shown) "
    "> .jp-OutputArea-output:not(:has(*))"
)
_STYLE = (
    f"<style>{_DEAD} {{ visibility: hidden }} {_DEAD}::before {{ visibility: visible; "
    f"content: '{GONE}'; display: block }}</style>"
)
# ipywidgets gives the place of a slider's value for the value, and gives it no name.
_NAMED = (
    "setTimeout(() => document.querySelectorAll('.widget-hslider').forEach(one => {"
    "const [it, name, value] = ['[role=slider]', '.widget-label', '.widget-readout']"
    ".map(part => one.querySelector(part)); if (!it || !name || !value) return;"
    "it.setAttribute('aria-label', name.textContent);"
    "it.setAttribute('aria-valuetext', value.textContent)}), 300)"
)


class Shown:
    """Mixin of all that a notebook shows: one output with a picture that is updated in place.

    A class gives `figure`, its alternative text `str(self)`, and `controls` where it has some;
    after a change it calls `publish()`.
    """

    format = "png"
    figure: Figure
    controls: Sequence[Any] = ()
    _handle: Any = None

    def picture(self) -> bytes:
        """Return the picture as it is now, in `format`, packed quickly rather than tightly."""
        file = BytesIO()
        self.figure.savefig(file, format="png", pil_kwargs={"compress_level": 1})
        return file.getvalue()

    def still(self) -> bytes:
        """Return the picture for pages on which nothing moves."""
        return self.picture()

    def widget(self) -> Any:
        """Return the controls side by side, in as many lines as a narrow page needs."""
        return ipywidgets.HBox(self.controls, layout={"flex_flow": "row wrap"})

    def publish(self, *, first: bool = False) -> None:
        """Bring the picture on the page up to date; with `first` put it there."""
        if first and is_listening():
            from IPython.display import display

            self._handle = display(self._page(), raw=True, display_id=True)
        elif self._handle is not None:
            self._handle.update(self._page(), raw=True)

    def _page(self) -> dict[str, str]:
        image = as_html(self.picture(), str(self), self.format, f' onload="{_NAMED}"')
        page = f'{_STYLE}<div class="sude-lab-shown">{image}</div>'
        return {"text/plain": str(self), "text/html": page}

    def _ipython_display_(self) -> None:
        if is_static() or not self.controls or not is_listening():
            raise NotImplementedError  # IPython then asks `_repr_mimebundle_`
        from IPython.display import display

        view = self.widget()._repr_mimebundle_()[WIDGET_VIEW]
        display({"text/plain": "", WIDGET_VIEW: view}, raw=True)
        self.publish(first=True)

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, str], dict[str, Any]]:
        mime, still = f"image/{self.format}", self.still()
        data = {"text/plain": str(self), mime: b64encode(still).decode()}
        return data, {mime: {"alt": str(self)} | _size(still)}


def _size(picture: bytes) -> dict[str, int]:
    """Return the pixels of the page that a picture takes."""
    with Image.open(BytesIO(picture)) as opened:
        return dict(zip(("width", "height"), (side // SCALE for side in opened.size), strict=True))


def as_html(picture: bytes, words: str, kind: str = "png", more: str = "") -> str:
    """Return a picture as an element of a page, with words for those who do not see it."""
    source = f"data:image/{kind};base64,{b64encode(picture).decode()}"
    look = f'alt="{html.escape(words)}" width="{_size(picture)["width"]}" style="max-width: 100%"'
    return f'<img src="{source}" {look}{more}>'


def is_static() -> bool:
    """Whether what is shown is to be kept as pictures alone."""
    return os.environ.get("SUDE_LAB_STATIC", "0") not in ("", "0")


def is_listening() -> bool:
    """Whether this is a notebook's kernel; a terminal would print an object's name each time."""
    from IPython import get_ipython

    return getattr(get_ipython(), "kernel", None) is not None


def slider(
    name: str, values: Iterable[Any], value: Any, follow: Callable[[Any], None], width: str
) -> Any:
    """Return a slider over values, shown as text beside it; `follow` is called when it moves."""
    options = [(short(v), v) for v in values]
    made = ipywidgets.SelectionSlider(options=options, value=value, description=name)
    made.layout.width = width
    made.observe(follow, names="value")
    return made


def short(value: Any) -> str:
    """Return a setting's value as a label."""
    return f"{value:g}" if isinstance(value, float) else str(value)
