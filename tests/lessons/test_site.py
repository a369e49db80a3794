"""The site holds lessons, exercises, guide and reference, and needs no network."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from IPython.core.inputtransformer2 import TransformerManager

from studies import address

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
LESSONS = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
EXERCISES = sorted(f"exercises/{path.stem}" for path in (NOTEBOOKS / "exercises").glob("*.ipynb"))
PLACE = "https://github.com/someone/a-fork"


def read(name: str) -> dict:
    return yaml.safe_load((NOTEBOOKS / name).read_text(encoding="utf-8"))


def test_every_lesson_exercise_and_guide_is_a_page() -> None:
    toc = read("_toc.yml")
    parts = {part["caption"]: [c["file"] for c in part["chapters"]] for part in toc["parts"]}
    assert toc["root"] == "index"
    assert list(parts) == ["Lessons", "Exercises", "Guide", "Reference"]
    assert parts["Lessons"] == LESSONS
    assert parts["Exercises"] == EXERCISES
    assert sorted(parts["Guide"]) == sorted(f"guide/{p.stem}" for p in NOTEBOOKS.glob("guide/*.md"))


def test_the_reference_has_every_room() -> None:
    pages = [path.read_text(encoding="utf-8") for path in NOTEBOOKS.glob("reference/*.md")]
    entries = {name for page in pages for name in re.findall(r"^   (.+)$", page, re.M)}
    names = {name.removesuffix(".*") for line in entries for name in line.split()}
    rooms = {path.stem for path in (ROOT / "sude_lab").iterdir() if path.suffix in ("", ".py")}
    beside = {"__init__", "__main__", "__pycache__", "cli", "demo", "exercises", "data", "report"}
    assert {room for room in rooms if not room.startswith(".")} - beside <= names


def test_pages_are_built_from_what_is_stored() -> None:
    assert read("_config.yml")["execute"]["execute_notebooks"] == "off"


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_has_the_address_that_the_maintainers_set_and_no_other(name: str) -> None:
    notebook = (NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8")
    places = address.address(), address.address("Errata")
    assert address.addressed(notebook, name, *places) == notebook, "make address"
    linked = address.addressed(notebook, name, PLACE)
    title, setup = ("".join(cell["source"]) for cell in json.loads(linked)["cells"][:2])
    link = (
        f"https://colab.research.google.com/github/someone/a-fork/blob/main/notebooks/{name}.ipynb"
    )
    assert re.findall(r"^\[[^\]]+\]\((https://colab[^)]+)\)$", title, re.M) == [link]
    assert f'REPOSITORY = "{PLACE}"' in setup and '"google.colab" in sys.modules' in setup
    bare = address.addressed(linked, name, "")
    assert "colab.research" not in bare and PLACE not in bare
    assert address.addressed(bare, name, PLACE) == linked
    report = address.addressed(linked, name, PLACE, f"{PLACE}/issues")
    assert f"[A mistake? Report it here]({PLACE}/issues)" in report
    assert address.addressed(report, name, PLACE) == linked


def test_the_first_cell_lets_threads_sleep_on_a_busy_machine() -> None:
    cell = TransformerManager().transform_cell(address.SETUP.format(address=""))
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    quiet = {name: value for name, value in os.environ.items() if name not in names}
    for load, expected in ((1e6, "PASSIVE False"), (0.0, "None False")):
        code = f"import os\nos.getloadavg = lambda: ({load}, 0.0, 0.0)\n{cell}\n"
        code += "print(os.environ.get('OMP_WAIT_POLICY'), 'torch' in sys.modules)"
        said = subprocess.check_output([sys.executable, "-c", code], text=True, env=quiet)
        assert said.strip() == expected


@pytest.mark.skipif(
    not (
        importlib.util.find_spec("jupyter_book")
        and importlib.util.find_spec("sphinx-mathjax-offline")
    ),
    reason='Jupyter Book is not installed: pip install -e ".[site]".',
)
def test_the_site_is_built_without_a_warning_and_needs_no_network(tmp_path: Path) -> None:
    program = "from jupyter_book.cli.main import main; main()"
    command = [sys.executable, "-c", program, "build", NOTEBOOKS, "--path-output", tmp_path]
    done = subprocess.run(
        [*command, "--warningiserror", "--keep-going"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    html = tmp_path / "_build" / "html"
    pages = {path.relative_to(html).as_posix(): path for path in html.rglob("*.html")}
    text = {name: path.read_text(encoding="utf-8") for name, path in pages.items()}
    for name in ("index", *LESSONS, *EXERCISES):
        page = text[f"{name}.html"]
        assert "Traceback" not in page
        # What a browser fetches by itself lies on the site.
        fetched = re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"([^\"]+)\"", page)
        fetched += re.findall(r"<link\b[^>]*\bhref=\"([^\"]+)\"", page)
        assert not [f for f in fetched if re.match(r"(https?:)?//", f)], name
    for name in LESSONS:
        page = text[f"{name}.html"]
        described = re.findall(r'<img alt="([^"]*)"[^>]* src="(?:\.\./)*_images/', page)
        assert described and min(map(len, described)) >= 40, name
        assert "<img" in page and ('class="math' in page) == ("_static/mathjax/" in page), name
    assert sum('class="math' in text[f"{name}.html"] for name in LESSONS) >= 8
    assert (html / "_static" / "mathjax" / "tex-chtml.js").is_file()
    for name in EXERCISES:
        assert f'href="../{name.removeprefix("exercises/ex_")}.html"' in text[f"{name}.html"]
        assert "BEGIN" not in re.sub(r"<[^>]+>", "", text[f"{name}.html"])
    assert "difference.png" in text["index.html"]
    # make site puts the playground beside the pages, where it was made.
    assert 'href="../playground/index.html"' in text["guide/playground.html"]
    assert "cp -R playground site/_build/html/" in (ROOT / "Makefile").read_text()
    assert "_modules/sude_lab/losses.html" in text["02_sude_loss.html"]
    assert (html / "_modules" / "sude_lab" / "losses.html").is_file()
    assert 'id="sude_lab.losses.sude_loss"' in text["reference/mathematics.html"]


def test_a_figure_keeps_its_shape_in_a_narrow_window(browser: Any) -> None:
    page = browser.new_page(viewport={"width": 360, "height": 600})
    picture = "data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 600 300'/>"
    style = (NOTEBOOKS / "_static" / "site.css").read_text(encoding="utf-8")
    page.set_content(
        f"<style>img {{ max-width: 100% }} {style}</style><div class='cell_output'>"
        f'<img src="{picture}" style="width: 600px; height: 300px;"></div>'
    )
    box = page.locator("img").bounding_box()
    assert 300 < box["width"] <= 360 and abs(box["width"] - 2 * box["height"]) < 2
    page.close()
