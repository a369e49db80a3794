"""What a course's nbgrader_config.py adds: hand-ins are graded by the source's marks and checks.

Of a student's notebook only the answers count: marks come from the gradebook, once a cell, so that
no copied cell, old or changed mark stops grading or skips a check, and every check is imported
afresh. An answer runs as the user who grades: grade in a container or an account of its own.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from nbgrader.api import Gradebook
from nbgrader.preprocessors import (
    CheckCellMetadata,
    ClearOutput,
    Execute,
    LimitOutput,
    NbGraderPreprocessor,
    OverwriteCells,
    OverwriteKernelspec,
    SaveAutoGrades,
)
from nbgrader.utils import is_grade

FRESH = """import importlib, sys
for _name in [name for name in sys.modules if name.split(".")[0] == "sude_lab"]:
    del sys.modules[_name]
exercises = importlib.import_module("sude_lab.exercises")
"""


class SourceMarks(NbGraderPreprocessor):
    """Give every cell the marks that its source has; of copies the last one counts."""

    def preprocess(self, nb: Any, resources: Any) -> tuple[Any, Any]:
        """Return the notebook with the gradebook's marks, and without tags."""
        about = resources["nbgrader"]
        with Gradebook(about["db_url"]) as book:
            notebook = book.find_notebook(about["notebook"], about["assignment"])
            points = {cell.name: float(cell.max_score) for cell in notebook.grade_cells}
            solutions = {cell.name for cell in notebook.solution_cells}
            left = {cell.name: cell for cell in notebook.source_cells}
            for cell in reversed(nb.cells):
                cell.metadata.pop("tags", None)  # one of them lets a cell be skipped
                mark = cell.metadata.pop("nbgrader", None)
                name = mark.get("grade_id") if isinstance(mark, dict) else None
                source = left.pop(name, None) if isinstance(name, str) else None
                if source is None:
                    continue
                cell.metadata["nbgrader"] = {
                    "grade": name in points,
                    "grade_id": name,
                    "locked": bool(source.locked),
                    "schema_version": 3,
                    "solution": name in solutions,
                    "task": False,
                } | ({"points": points[name]} if name in points else {})
        return nb, resources


class FreshChecks(Execute):
    """Run the notebook, and import `exercises` afresh before every check."""

    def preprocess_cell(self, cell: Any, resources: Any, index: int) -> tuple[Any, Any]:
        """Run a cell; a check's source is stored as it was."""
        source = cell.source
        if is_grade(cell):
            cell.source = FRESH + source
        try:
            return super().preprocess_cell(cell, resources, index)
        finally:
            cell.source = source


def rename_downloads(*, notebooks: list[str], **_: Any) -> None:
    """Take "ex_01 (1).ipynb", as browsers name a second download, for ex_01.ipynb if that lacks."""
    for path in map(Path, list(notebooks)):
        name = re.sub(r"( ?\(\d+\)|-Copy\d+)$", "", path.stem)
        target = path.with_name(f"{name}.ipynb")
        if name != path.stem and not target.exists():
            shutil.copy(path, target)
            notebooks.append(str(target))


def guard(config: Any) -> None:
    """Set all of the above in nbgrader's configuration."""
    first = [ClearOutput, SourceMarks, OverwriteKernelspec, OverwriteCells, CheckCellMetadata]
    config.Autograde.sanitize_preprocessors = first
    then = [FreshChecks, LimitOutput, SaveAutoGrades, CheckCellMetadata]
    config.Autograde.autograde_preprocessors = then
    config.Autograde.pre_convert_hook = rename_downloads
