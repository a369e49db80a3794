"""Copies of the lessons for a class: as they are stored, without their outputs."""

from __future__ import annotations

import json
from pathlib import Path

from sude_lab.errors import UserError
from sude_lab.io.files import atomic_folder
from sude_lab.io.opening import data_folder


def release_lessons(folder: Path) -> list[Path]:
    """Write the lessons without outputs into `folder`, so that a class predicts before it sees.

    Answers to the predictions stay, folded. Returns the copies.

    Raises:
        UserError: there are no lessons, or the folder is not empty.
    """
    sources = sorted((data_folder().parent / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    if not sources:
        raise UserError(
            f"There are no lessons beside {data_folder()}: run from a clone of the repository."
        )
    with atomic_folder(folder) as copies:
        for source in sources:
            book = json.loads(source.read_text(encoding="utf-8"))
            for cell in book["cells"]:
                if cell["cell_type"] == "code":
                    cell |= {"outputs": [], "execution_count": None}
            text = json.dumps(book, indent=1, ensure_ascii=False) + "\n"
            (copies / source.name).write_text(text, encoding="utf-8")
    return [folder / source.name for source in sources]
