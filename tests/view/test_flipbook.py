"""A flipbook without a browser: its pages, its slider, its strip, and what a page is handed."""

import base64
import time
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sude_lab.errors import UserError
from sude_lab.view.flipbook import Flipbook

COLOURS = {0.0: (200, 30, 30), 0.5: (30, 160, 30), 1.0: (30, 30, 220)}
NOTES = {0.5: "half of the way"}


def cells(rgb: tuple[int, int, int]) -> dict[str, list[Image.Image]]:
    return {name: [Image.new("RGB", (64, 64), rgb)] * 2 for name in ("running", "jumping")}


@pytest.fixture
def book() -> Flipbook:
    return Flipbook({g: cells(rgb) for g, rgb in COLOURS.items()}, name="g", notes=NOTES)


def rows_of(picture: bytes, rgb: tuple[int, int, int]) -> np.ndarray:
    """The lines of a picture that have much of a colour."""
    pixels = np.asarray(Image.open(BytesIO(picture)).convert("RGB"), dtype=int)
    near = np.abs(pixels - np.array(rgb)).max(axis=2) < 12
    return np.flatnonzero(near.mean(axis=1) > 0.3)


def test_the_slider_turns_to_the_page_and_its_note(book: Flipbook) -> None:
    assert book.slider.value == 0.0 and book.note.value == ""
    for g in (1.0, 0.5, 0.0):
        book.slider.value = g
        for other, rgb in COLOURS.items():
            assert bool(len(rows_of(book.picture(), rgb))) == (other == g)
        assert book.note.value == NOTES.get(g, "")
    assert [name for name, _ in book.slider.options] == ["0", "0.5", "1"]
    assert book.slider.description == "g"


def test_the_strip_holds_every_page_from_top_to_bottom(book: Flipbook) -> None:
    places = [rows_of(book.strip, rgb) for rgb in COLOURS.values()]
    assert all(len(place) > 20 for place in places)
    assert places[0].max() < places[1].min() and places[1].max() < places[2].min()


def test_a_static_page_gets_the_strip(book: Flipbook) -> None:
    data, metadata = book._repr_mimebundle_()
    assert base64.b64decode(data["image/jpeg"]) == book.strip
    assert data["text/plain"].splitlines() == ["g = 0", "g = 0.5:  half of the way", "g = 1"]
    assert metadata["image/jpeg"]["alt"] == data["text/plain"]


def test_the_widget_is_the_slider_beside_its_note(book: Flipbook) -> None:
    assert book.widget().children == (book.slider, book.note)


def test_a_move_of_the_slider_takes_less_than_a_fifth_of_a_second(book: Flipbook) -> None:
    """Processor time, so that a busy machine does not fail it."""
    for g in (1.0, 0.5, 0.0):
        before = time.process_time()
        book.slider.value = g
        assert time.process_time() - before < 0.2


def test_values_need_not_be_numbers() -> None:
    book = Flipbook({"hinge": cells((9, 9, 9)), "plain sum": cells((99, 99, 99))}, name="rule")
    assert [name for name, _ in book.slider.options] == ["hinge", "plain sum"]


@pytest.mark.parametrize(
    ("pages", "notes", "words"),
    [
        ({}, {}, "needs pages"),
        ({1.0: {}}, {}, "needs pages"),
        ({1.0: cells((9, 9, 9))}, {2.0: "gone"}, "g = 2.0"),
    ],
)
def test_a_book_without_pages_is_refused(pages: Any, notes: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Flipbook(pages, name="g", notes=notes)
