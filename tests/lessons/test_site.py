"""The site holds every lesson, as it is stored, and its badges lead to the right notebook."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
LESSONS = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
HOME = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


def read(name: str) -> dict:
    return yaml.safe_load((NOTEBOOKS / name).read_text(encoding="utf-8"))


def test_every_lesson_is_a_page() -> None:
    toc = read("_toc.yml")
    assert [toc["root"], *(c["file"] for c in toc["chapters"])] == LESSONS


def test_pages_are_built_from_what_is_stored_and_link_home() -> None:
    config = read("_config.yml")
    assert config["execute"]["execute_notebooks"] == "off"
    assert config["repository"]["url"] == HOME
    assert config["repository"]["path_to_book"] == "notebooks"
    assert config["launch_buttons"]["colab_url"] == "https://colab.research.google.com"


@pytest.mark.parametrize("name", LESSONS)
def test_a_badge_opens_its_own_notebook_and_the_cell_below_fetches_the_rest(name: str) -> None:
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    title, setup = ("".join(cell["source"]) for cell in cells[:2])
    place = HOME.removeprefix("https://github.com/")
    link = f"https://colab.research.google.com/github/{place}/blob/main/notebooks/{name}.ipynb"
    assert re.findall(r"\[!\[[^\]]+\]\([^)]+\)\]\(([^)]+)\)", title) == [link]
    assert f"git clone -q --depth 1 {HOME}" in setup and '"google.colab" in sys.modules' in setup


@pytest.mark.skipif(
    importlib.util.find_spec("jupyter_book") is None,
    reason='Jupyter Book is not installed: pip install -e ".[site]".',
)
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    shutil.copytree(NOTEBOOKS, tmp_path / "notebooks")
    command = [sys.executable, "-m", "jupyter_book", "build", "notebooks", "--path-output", "site"]
    told = subprocess.run(
        [*command, "--warningiserror", "--keep-going"], cwd=tmp_path, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stdout[-3000:] + told.stderr[-3000:]
    html = tmp_path / "site" / "_build" / "html"
    for name in LESSONS:
        page = (html / f"{name}.html").read_text(encoding="utf-8")
        assert "<img" in page and "Traceback" not in page
