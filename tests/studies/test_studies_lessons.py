"""What the lessons show is packed small, and slides begin where they should."""

import re
from base64 import b64decode, b64encode
from io import BytesIO
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image, ImageDraw

lessons = pytest.importorskip("studies.lessons", reason='needs pip install -e ".[lab]"')


def png(picture: Image.Image) -> str:
    file = BytesIO()
    picture.save(file, "png")
    return b64encode(file.getvalue()).decode()


def test_lines_stay_exact_and_pictures_become_small() -> None:
    plot = Image.new("RGB", (400, 200), "white")
    ImageDraw.Draw(plot).line((0, 0, 400, 200), fill="black")
    x, y = np.meshgrid(np.linspace(0, 255, 400), np.linspace(0, 255, 200))
    noise = np.random.default_rng(0).integers(0, 9, x.shape)
    photo = Image.fromarray(np.stack([x, y, (x + y) / 2 + noise], -1).clip(0, 255).astype("uint8"))
    for picture, expected in ((plot, "image/png"), (photo, "image/jpeg")):
        kind, text = lessons.packed(png(picture))
        assert kind == expected and len(text) < len(png(picture))
        back = np.asarray(Image.open(BytesIO(b64decode(text))).convert("RGB"), dtype=int)
        assert np.abs(back - np.asarray(picture)).mean() < (1e-9 if picture is plot else 3)


def test_a_heading_opens_a_slide_and_a_prediction_stands_before_what_is_shown() -> None:
    shown = nbformat.v4.new_output("stream", text="1")
    drawn = nbformat.v4.new_output(
        "display_data", {"image/png": ""}, metadata={"image/png": {"width": 300}}
    )
    answer = "<details><summary>Answer</summary>\n\nOne.\n\n</details>"
    cells = [
        nbformat.v4.new_markdown_cell("# 99 · Why?"),
        nbformat.v4.new_code_cell("SEED = 0"),
        nbformat.v4.new_code_cell("loss = a - b  # eq. 3"),
        nbformat.v4.new_markdown_cell("**Predict first**: one or two?"),
        nbformat.v4.new_code_cell("print(1)", outputs=[shown, drawn]),
        nbformat.v4.new_markdown_cell(f"{answer}\n\nSo far.\n\n## Next\n\nTwo?"),
    ]
    book = lessons.as_slides(nbformat.v4.new_notebook(cells=cells))
    kinds = [cell.metadata.slideshow.slide_type for cell in book.cells]
    texts = [cell.source.splitlines()[0] for cell in book.cells]
    assert kinds == ["slide", *["subslide"] * 5, "slide"]
    assert texts == [
        *("# 99 · Why?", "loss = a - b  # eq. 3", "**Predict first**: one or two?", "print(1)"),
        *("<details open><summary>Answer</summary>", "So far.", "## Next"),
    ]
    assert book.cells[3].outputs[1].metadata == {}  # as wide as the slide


def test_slides_for_a_room_without_a_network_need_their_scripts(tmp_path: Path) -> None:
    (tmp_path / "node_modules").mkdir()
    with pytest.raises(SystemExit, match=r"node_modules.reveal\.js: guide/teaching\.md"):
        lessons.slides(tmp_path)
    for name in lessons.SCRIPTS.values():
        (tmp_path / name.split("?")[0]).mkdir(parents=True)
    lessons.slides(tmp_path)
    for path in lessons.NOTEBOOKS.glob("*.ipynb"):
        page = (tmp_path / f"{path.stem}.html").read_text(encoding="utf-8")
        assert all(place in page for place in lessons.SCRIPTS.values())
        assert not re.search(r'<script[^>]* src="https?:', page)
