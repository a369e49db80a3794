"""DreamBench, the DreamBooth data set: 30 subjects, 15 classes, 25 prompts for each of two kinds.

A clone of google/dreambooth holds dataset/prompts_and_classes.txt and dataset/SUBJECT/00.jpg, ...
One-shot tuning takes `00.jpg` alone; all pictures of a subject are the references that its
fidelity is measured against. The attribute prompts are our own: `data/attribute_prompts.yaml`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from sude_lab.errors import UserError
from sude_lab.evaluate.prompts import Prompt
from sude_lab.io.opening import data_folder
from sude_lab.io.reading import read_text
from sude_lab.prompts import PLACEHOLDER, caption

FILE = "prompts_and_classes.txt"
ONE_SHOT = "00.jpg"
LIVE = ("cat", "dog")
"""The classes that the data set's authors ask the prompts for live subjects of."""
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Subject:
    """One subject of the data set, with all its pictures by name: the references."""

    name: str
    category: str
    images: tuple[Path, ...]
    prompts: tuple[Prompt, ...]
    """The data set's own: those for live subjects, or for objects."""

    @property
    def picture(self) -> Path:
        """The one picture that is tuned on."""
        return self.images[0].parent / ONE_SHOT


@dataclass(frozen=True)
class DreamBench:
    """The data set: its subjects by name."""

    folder: Path
    subjects: dict[str, Subject]

    def subject(self, name: str) -> Subject:
        """Return a subject by its name."""
        if name not in self.subjects:
            close = get_close_matches(name, self.subjects, n=3) or sorted(self.subjects)
            raise UserError(
                f"DreamBench in {self.folder} has no subject {name!r}: choose among "
                f"{', '.join(close)}."
            )
        return self.subjects[name]


def find_dreambench(folder: Path) -> Path | None:
    """Return the folder of the data set in a clone or in itself; None where it is neither."""
    return next((f for f in (folder, folder / "dataset") if (f / FILE).is_file()), None)


def load_dreambench(folder: Path | str) -> DreamBench:
    """Read the data set from a clone of its repository, or from the folder `dataset` in it.

    No picture is opened here.
    """
    folder = Path(folder)
    root = find_dreambench(folder)
    if root is None:
        raise UserError(
            f"{folder} does not hold {FILE}: name a clone of the DreamBooth data set, or the "
            "folder dataset in it."
        )
    # Every part begins with its title; the lists of prompts are Python code, which is not run.
    text = read_text(root / FILE, str(root / FILE), "a clone of the DreamBooth data set")
    parts = re.split(r"^(?:Object|Live Subject) Prompts\s*$", text, flags=re.M)
    if len(parts) != 3:
        raise UserError(f"{root / FILE} is not the data set's own: it must have two prompt lists.")
    lists = [re.findall(r"^\s*(['\"])(.+?)\1\.format\(", p, flags=re.M) for p in parts[1:]]
    subjects: dict[str, Subject] = {}
    for name, category in re.findall(r"^([\w-]+),([\w -]+?)[ \t\r]*$", parts[0], flags=re.M):
        if name == "subject_name":
            continue
        if name in subjects:
            raise UserError(f"{root / FILE} names the subject {name} twice: remove one of them.")
        if not (root / name / ONE_SHOT).is_file():
            missing = f"{root / name} has no {ONE_SHOT}, the picture to tune on"
            raise UserError(f"{missing}: copy it from the data set.")
        words = lists[category in LIVE]
        texts = [t.replace("{0}", PLACEHOLDER).replace("{1}", category) for _, t in words]
        prompts = [Prompt(t, caption(t, category), group="dreambench") for t in texts]
        subjects[name] = Subject(name, category, pictures_in(root / name), tuple(prompts))
    if not subjects or not all(lists):
        raise UserError(f"{root / FILE} has no subjects or no prompts: take the data set's own.")
    return DreamBench(root, subjects)


def pictures_in(folder: Path) -> tuple[Path, ...]:
    """Return the picture files of a folder in the order of their names."""
    shown = (p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    return tuple(sorted(p for p in shown if p.suffix.lower() in _SUFFIXES))


@cache
def _own_prompts(folder: Path) -> dict[str, Any]:
    path = folder / "attribute_prompts.yaml"
    if not path.is_file():
        raise UserError(
            f"There is no {path.name} in {folder}: run from a clone of the repository, or name "
            "a file with --prompts."
        )
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def attributes_of(category: str) -> tuple[str, ...]:
    """Return our five attributes for a class of DreamBench."""
    attributes = _own_prompts(data_folder())["attributes"]
    if category not in attributes:
        raise UserError(
            f"There are no attribute prompts for the category {category!r} (there are for "
            f"{', '.join(attributes)}): name a file of prompts with --prompts."
        )
    return tuple(attributes[category])


def backgrounds() -> tuple[str, ...]:
    """Return the backgrounds of our prompts: "on the beach", ...; raises as `attributes_of`."""
    return tuple(_own_prompts(data_folder())["backgrounds"])
