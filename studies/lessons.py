"""Store what the lessons show, and make slides of them.

python -m studies.lessons store notebooks/03_truncation_thresholds.ipynb
python -m studies.lessons slides --out slides        # or: make slides
"""

from __future__ import annotations

import io
import os
import re
from base64 import b64decode, b64encode
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import nbformat
import tyro
from nbclient import NotebookClient
from nbconvert import SlidesExporter
from nbformat.v4 import new_markdown_cell
from PIL import Image
from traitlets.config import Config

from sude_lab.io.files import atomic_write

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
INLINE = {"SUDE_LAB_STATIC": "1", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}

SCRIPTS = {
    "reveal_url_prefix": "node_modules/reveal.js",
    "require_js_url": "node_modules/requirejs/require.js",
    "jquery_url": "node_modules/jquery/dist/jquery.min.js",
    "mathjax_url": "node_modules/mathjax/MathJax.js?config=TeX-AMS_CHTML-full,Safe",
}

LOOK = """<style>
  :root { --jp-code-font-size: 14px; --jp-cell-prompt-width: 70px }
  .reveal h1 { font-size: 42px }
  .reveal img { width: 800px; max-height: 560px; object-fit: contain; object-position: left }
</style></head>"""


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
    """Cut a lesson into slides: a heading opens one, what a cell shows stands below it.

    A prediction stands on a slide before its answer, which is unfolded; figures are as wide as the
    slide, and code that shows nothing is left out, but for equations.
    """
    cells = []
    for cell in book.cells:
        if cell.cell_type == "markdown":
            parts = re.split(r"(?<=</details>)\n+|\n+(?=## )", cell.source)
            cells += [
                new_markdown_cell(part.replace("<details>", "<details open>")) for part in parts
            ]
        elif cell.outputs or "# eq. " in cell.source:
            for output in cell.outputs:
                output.get("metadata", {}).clear()  # the size of a figure in a notebook
            cells.append(cell)
    for cell in cells:
        opens = cell.cell_type == "markdown" and cell.source.startswith("#")
        cell.metadata["slideshow"] = {"slide_type": "slide" if opens else "subslide"}
    book.cells = cells
    return book


def slides(out: Path = Path("slides")) -> None:
    """Make a page of slides (reveal.js) of every lesson, from its stored outputs.

    Where `out` has a folder node_modules the pages take their scripts from it and need no network.
    """
    out.mkdir(parents=True, exist_ok=True)
    exporter = SlidesExporter(reveal_scroll=True, reveal_number="c/t")
    if (out / "node_modules").is_dir():
        if lost := [name for name in SCRIPTS.values() if not (out / name.split("?")[0]).exists()]:
            raise SystemExit(f"There is no {out / lost[0]}: guide/teaching.md has the command.")
        exporter.update_config(Config(SlidesExporter=SCRIPTS))
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        page, _ = exporter.from_notebook_node(as_slides(nbformat.read(path, 4)))
        (out / f"{path.stem}.html").write_text(page.replace("</head>", LOOK, 1), encoding="utf-8")
    print(f"Open {out / '00_start_here.html'} in a browser.")


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"store": store, "slides": slides})
