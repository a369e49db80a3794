"""Copies for a class: exercises without solutions, by nbgrader, and lessons without outputs."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

from sude_lab.errors import UserError
from sude_lab.io.files import atomic_folder
from sude_lab.io.opening import data_folder

COURSE = "sude_lab"
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|\d\d_)[^)\s]+")
"""Where a link leads, but to an address, to the same page, or to another lesson."""
# 30 seconds a cell, nbgrader's own limit, is little for a first `import torch` on a busy machine.
SETTINGS = f"""from sude_lab.exercises.grading import guard

c = get_config()
c.CourseDirectory.course_id = "{COURSE}"
c.Execute.timeout = 300
guard(c)
"""


def notebooks(pattern: str) -> list[Path]:
    """Return our notebooks by name, in the order of the lessons; exercises with the solutions."""
    folder = data_folder().parent / "notebooks"
    found = sorted(folder.glob(pattern))
    if not found:
        raise UserError(f"There are no {pattern} in {folder}: run from a clone of the repository.")
    return found


def release_lessons(folder: Path) -> list[Path]:
    """Write the lessons without outputs into `folder`, so that a class predicts before it sees.

    Answers to the predictions stay, folded; links lead to this clone. Returns the copies.
    """
    sources = notebooks("[0-9][0-9]_*.ipynb")
    back = Path(os.path.relpath(sources[0].parent.resolve(), folder.resolve())).as_posix()
    with atomic_folder(folder) as copies:
        for source in sources:
            book = json.loads(source.read_text(encoding="utf-8"))
            for cell in book["cells"]:
                if cell["cell_type"] == "code":
                    cell |= {"outputs": [], "execution_count": None}
                else:
                    lines = [_LINK.sub(lambda to: f"{back}/{to[0]}", x) for x in cell["source"]]
                    cell["source"] = lines
            text = json.dumps(book, indent=1, ensure_ascii=False) + "\n"
            (copies / source.name).write_text(text, encoding="utf-8")
    return [folder / source.name for source in sources]


def release(folder: Path, course: Path | None = None) -> list[Path]:
    """Write the students' copies into `folder`, and into `course` what nbgrader grades them with.

    Returns the copies. In the course every exercise is an assignment: hand-ins belong into
    `course`/submitted/STUDENT/ex_NN_NAME/ex_NN_NAME.ipynb.
    """
    sources = notebooks("exercises/ex_*.ipynb")
    if course is not None:
        one, other = folder.resolve(), course.resolve()
        if one == other or one in other.parents or other in one.parents:
            raise UserError("Name two folders, neither inside the other: the course has solutions.")
    in_course = TemporaryDirectory() if course is None else atomic_folder(course)
    with atomic_folder(folder) as copies, in_course as place:
        room = Path(place)
        (room / "nbgrader_config.py").write_text(SETTINGS, encoding="utf-8")
        for source in sources:
            assignment = room / "source" / source.stem
            assignment.mkdir(parents=True)
            shutil.copy(source, assignment)
        _generate(room, [source.stem for source in sources])
        for source in sources:
            shutil.copy(room / "release" / source.stem / source.name, copies)
    return [folder / source.name for source in sources]


def _generate(room: Path, assignments: list[str]) -> None:
    """Let nbgrader make release/ and gradebook.db of source/."""
    try:
        from nbgrader.converters import GenerateAssignment
        from nbgrader.coursedir import CourseDirectory
        from nbgrader.utils import capture_log
    except ImportError as error:
        says = "Students' copies are made by nbgrader, which is not installed"
        raise UserError(f'{says}: pip install -e ".[teach]"') from error
    # nbgrader looks for `alembic`, also where the virtual environment was not activated
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    for name in assignments:
        course = CourseDirectory(root=str(room.resolve()), course_id=COURSE, assignment_id=name)
        with patch.dict(os.environ, PATH=path):
            done = capture_log(GenerateAssignment(coursedir=course))
        if not done["success"]:
            log = done.get("log", "") + done.get("error", "")
            reasons = re.findall(r"^[\w.]*(?:Error|Exception)\b.*", log, re.M) or [log]
            raise UserError(f"nbgrader cannot release {name}: {reasons[0]}")
