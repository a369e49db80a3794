"""What a notebook stores of an explorer is its last picture, and no widget that comes before it."""

import base64
import re
from io import BytesIO
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from PIL import Image

from sude_lab.view import shown
from sude_lab.view.flipbook import Flipbook
from sude_lab.view.live import LiveView
from sude_lab.view.shown import WIDGET_VIEW, Shown

BOOK = """
from PIL import Image
from sude_lab.view.flipbook import Flipbook

pages = {g: {"asked": [Image.new("RGB", (32, 32), name)]} for g, name in ((0, "red"), (1, "blue"))}
book = Flipbook(pages, name="g", per_cell=1)
book
"""


def explorers() -> dict[str, Shown]:
    picture = Image.new("RGB", (16, 16), "olive")
    return {
        "flipbook": Flipbook({1.0: {"running": [picture]}}, name="g", per_cell=1),
        "live": LiveView(),
    }


def executed(*cells: str) -> nbformat.NotebookNode:
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(book, timeout=300, kernel_name="python3").execute()
    return book


def picture_of(output: Any) -> bytes:
    """The picture in an output, as a page shows it."""
    found = re.search(
        'src="data:image/.*?;base64,([^"]+)" alt="[^"]+"', output["data"]["text/html"]
    )
    assert found
    return base64.b64decode(found[1])


def test_the_stored_picture_is_the_last_one_and_stands_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SUDE_LAB_STATIC", raising=False)
    book = executed(BOOK, "before = book.picture()\nbook.slider.value = 1", "book.picture().hex()")
    controls, page = book.cells[0].outputs
    assert set(controls["data"]) == {WIDGET_VIEW, "text/plain"}
    assert WIDGET_VIEW not in page["data"]
    assert picture_of(page).hex() == book.cells[2].outputs[0]["data"]["text/plain"].strip("'")
    html, _ = HTMLExporter().from_notebook_node(book)
    assert html.count('class="sude-lab-shown"') == 1 and 'alt="g = 0' in html
    assert shown.GONE in html


def test_a_static_notebook_stores_one_picture_with_its_alternative_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SUDE_LAB_STATIC", "1")
    (output,) = executed(BOOK).cells[0].outputs
    assert set(output["data"]) == {"text/plain", "image/jpeg"}
    assert output["metadata"]["image/jpeg"]["alt"] == "g = 0\ng = 1"


FIGURE = """
from sude_lab.view import plots
lines = {"plain": [1, 2], "$L_{sude}$": [2, 0.5]}
plots.curves(plots.panels(), [0, 1], lines, xlabel="step", ylabel=r"$\\rho$ & <more>");
"""


def test_a_running_figure_has_words_and_a_stored_one_is_a_picture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.delenv("SUDE_LAB_STATIC", raising=False)
    (running,) = executed(FIGURE).cells[0].outputs
    words = "rho &amp; &lt;more&gt; over step; plain from 1 to 2; L_sude from 2 to 0.5"
    assert f'alt="{words}"' in running["data"]["text/html"]
    page, plain = picture_of(running), base64.b64decode(running["data"]["image/png"])
    sizes = [Image.open(BytesIO(file)).size for file in (page, plain)]
    assert sizes[0] == sizes[1] and f'width="{sizes[0][0] // 2}"' in running["data"]["text/html"]
    monkeypatch.setenv("SUDE_LAB_STATIC", "1")
    (stored,) = executed(FIGURE).cells[0].outputs
    assert set(stored["data"]) == {"text/plain", "image/png"}


@pytest.mark.parametrize("name", ["flipbook", "live"])
def test_every_one_is_a_picture_with_words(name: str) -> None:
    explorer = explorers()[name]
    with pytest.raises(NotImplementedError):  # no notebook listens: the bundle is asked for
        explorer._ipython_display_()
    data, metadata = explorer._repr_mimebundle_()
    mime = f"image/{explorer.format}"
    assert set(data) == {"text/plain", mime}
    assert metadata[mime]["alt"] == data["text/plain"] == str(explorer) != ""
    assert base64.b64decode(data[mime]) == explorer.still()


def test_words_are_escaped_for_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    book = Flipbook({'"><script>': {"running": [Image.new("RGB", (16, 16))]}}, name="g", per_cell=1)
    page = book._page()["text/html"]
    assert "<script>" not in page and "&quot;&gt;&lt;script&gt;" in page


def test_controls_say_their_value_and_break_on_a_narrow_page() -> None:
    widget = explorers()["flipbook"].widget()
    for control in [widget, *widget.children]:
        for leaf in getattr(control, "children", [control]):
            words = getattr(leaf, "description", "") or getattr(leaf, "value", "")
            assert isinstance(words, str)
            width = leaf.layout.width
            assert width is None or int(width.removesuffix("px")) <= 420
