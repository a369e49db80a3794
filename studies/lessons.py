"""Store what the lessons show, and make slides of them.

python -m studies.lessons store notebooks/03_truncation_thresholds.ipynb
python -m studies.lessons slides --out slides        # or: make slides
"""

from __future__ import annotations

import io
import os
from base64 import b64decode, b64encode
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import nbformat
import tyro
from nbclient import NotebookClient
from nbconvert import SlidesExporter
from PIL import Image

from sude_lab.io.files import atomic_write

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
INLINE = {"SUDE_LAB_STATIC": "1", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}


def packed(png: str) -> tuple[str, str]:
    """Return a PNG (base64) as a smaller file, and its kind: lines in 256 colours, or a JPEG."""
    picture = Image.open(io.BytesIO(b64decode(png))).convert("RGB")
    files = {"image/png": io.BytesIO(), "image/jpeg": io.BytesIO()}
    lines = picture.quantize(256, dither=Image.Dither.NONE)
    lines.save(files["image/png"], "png", optimize=True)
    picture.save(files["image/jpeg"], "jpeg", quality=85, subsampling=0, optimize=True)
    kind = min(files, key=lambda one: len(files[one].getvalue()))
    return kind, b64encode(files[kind].getvalue()).decode()


def store(notebooks: Annotated[tuple[Path, ...], tyro.conf.Positional]) -> None:
    """Run notebooks from top to bottom, and keep their outputs, without widgets."""
    for path in notebooks:
        book = nbformat.read(path, 4)
        for cell in book.cells:
            cell.metadata.pop("execution", None)
        place = {"metadata": {"path": str(path.parent)}}
        client = NotebookClient(book, timeout=900, record_timing=False, resources=place)
        client.store_widget_state = False
        with patch.dict(os.environ, INLINE):
            client.execute()
        for output in (o for cell in book.cells for o in cell.get("outputs", ())):
            if "image/png" in output.get("data", {}):
                output.data.pop("image/jpeg", None)  # a picture of PIL's comes as both
                kind, output.data[kind] = packed(output.data.pop("image/png"))
                output.metadata = dict.fromkeys([kind], output.metadata.get("image/png", {}))
        with atomic_write(path) as new:
            nbformat.write(book, new)


def as_slides(book: Any) -> Any:
    """Mark where slides begin: a heading opens one, what a cell shows stands below it.

    A prediction stands on a slide before its answer; code that shows nothing is left out.
    """
    for cell in book.cells:
        kind = "subslide"
        if cell.cell_type == "markdown" and cell.source.startswith("#"):
            kind = "slide"
        elif cell.cell_type == "code" and not cell.outputs:
            kind = "skip"
        cell.metadata["slideshow"] = {"slide_type": kind}
    return book


def slides(out: Path = Path("slides")) -> None:
    """Make a page of slides (reveal.js) of every lesson, from its stored outputs."""
    out.mkdir(parents=True, exist_ok=True)
    exporter = SlidesExporter(reveal_scroll=True, reveal_number="c/t")
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        page, _ = exporter.from_notebook_node(as_slides(nbformat.read(path, 4)))
        (out / f"{path.stem}.html").write_text(page, encoding="utf-8")
    print(f"Open {out / '00_start_here.html'} in a browser.")


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"store": store, "slides": slides})
