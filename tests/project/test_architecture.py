"""The rules of the house that no other tool checks: sizes, private names, public names shown.

Which room may import which is in pyproject.toml, [tool.importlinter].
"""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sude_lab

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "sude_lab"
BESIDE = {"__init__", "__main__", "cli", "demo", "errors"}
"""What lies beside the core's modules; the rooms below are its wings, but for the methods."""
CORE = sorted(
    path.relative_to(PACKAGE).with_suffix("").as_posix()
    for path in [*PACKAGE.glob("*.py"), *PACKAGE.glob("methods/*.py")]
    if path.parent != PACKAGE or path.stem not in BESIDE
)
SKIPPED_AT_FIRST = ("methods/vico", "guidance")
"""Chapters of the core that a first reading leaves out."""


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def lines(path: Path) -> int:
    return len(text(path).splitlines())


def core(*without: str) -> dict[str, int]:
    return {name: lines(PACKAGE / f"{name}.py") for name in CORE if name not in without}


def test_no_file_of_the_core_is_long() -> None:
    assert not {name for name, number in core().items() if number > 450}


def test_the_core_can_be_read_in_one_sitting() -> None:
    assert sum(core(*SKIPPED_AT_FIRST).values()) <= 3000
    assert sum(core().values()) <= 3600


def test_the_package_is_small() -> None:
    assert sum(map(lines, PACKAGE.rglob("*.py"))) <= 14_500


def test_a_study_is_a_grid_or_a_short_script() -> None:
    """Not what serves all of them: the runner of grids, their report, the guide's tables."""
    scripts = {p.stem: lines(p) for p in (ROOT / "studies").glob("*.py") if "__main__" in text(p)}
    assert {"classify", "compare_guidance", "fair", "fair_report", "where"} <= scripts.keys()
    assert {name for name, number in scripts.items() if number > 150} <= {"runs", "report", "costs"}


def test_the_readme_is_short() -> None:
    assert lines(ROOT / "README.md") <= 150


def test_no_module_imports_a_private_name_of_another() -> None:
    found = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sude_lab"):
                found |= {
                    f"{name} -> {(node.module or '').removeprefix('sude_lab.')}.{alias.name}"
                    for alias in node.names
                    if alias.name.startswith("_") and not alias.name.startswith("__")
                }
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{name}: relative import"
    assert not found


def test_every_public_name_is_shown_in_a_lesson_or_in_the_guide() -> None:
    notebooks = ROOT / "notebooks"
    pages = [*notebooks.glob("*.ipynb"), *notebooks.glob("guide/*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    for name in set(sude_lab.__all__) - {"__version__"}:
        assert re.search(rf"from sude_lab import [^\n]*\b{name}\b", text), name


@pytest.mark.skipif(
    importlib.util.find_spec("importlinter") is None,
    reason='import-linter is not installed: pip install -e ".[dev]".',
)
def test_every_room_imports_only_what_it_may() -> None:
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", program, "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
