r"""The notebooks are what a lesson should be: short cells, one seed, stored results to compare.

nbval runs them (see `addopts` in pyproject.toml); here nothing is run. Outputs are stored by

    python -m studies.lessons store notebooks/03_truncation_thresholds.ipynb
"""

import copy
import json
import re
from base64 import b64decode, b64encode
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytestmark = pytest.mark.quick

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))
EXERCISES = sorted((NOTEBOOKS[0].parent / "exercises").glob("*.ipynb"))
PAGE = (NOTEBOOKS[0].parent / "guide" / "lessons.md").read_text(encoding="utf-8")
README = (NOTEBOOKS[0].parent.parent / "README.md").read_text(encoding="utf-8")
MAX_LINES, MAX_BYTES, MAX_WIDTH = 20, 600_000, 610
PREDICTION = re.compile(r"\*\*Predict(\s+first)?(,\s+then\s+move)?\*\*|<summary>(Answer)</summary>")
CHECKED = "# NBVAL_CHECK_OUTPUT"
SEED = re.compile(r"^SEED = \d+", re.M)
WIDGETS = ("application/vnd.jupyter.widget-view+json", "application/vnd.jupyter.widget-state+json")
Notebook = dict[str, Any]


def source(cell: Notebook) -> str:
    return "".join(cell["source"])


def problems(notebook: Notebook, *, lesson: bool = True) -> list[str]:
    """Return what is wrong with a notebook, a sentence each; `lesson`: with goals and takeaways."""
    found = []
    cells = notebook["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    texts = [source(cell) for cell in cells if cell["cell_type"] == "markdown"]
    for number, cell in enumerate(cells):
        where = f"cell {number}"
        if cell["cell_type"] != "code":
            continue
        if len(source(cell).splitlines()) > MAX_LINES:
            found.append(f"{where} has more than {MAX_LINES} lines")
        kinds = [output["output_type"] for output in cell["outputs"]]
        pictures = {"image/png", "image/jpeg"}
        draws = any(pictures & set(output.get("data", {})) for output in cell["outputs"])
        if "error" in kinds:
            found.append(f"{where} stores an error")
        if any(kind in output.get("data", {}) for output in cell["outputs"] for kind in WIDGETS):
            found.append(f"{where} stores a widget: execute with SUDE_LAB_STATIC=1")
        if CHECKED in source(cell):
            # nbval compares nothing in a cell without a count, and nothing with an empty output.
            if cell["execution_count"] is None:
                found.append(f"{where} is to be compared and has no count")
            if not cell["outputs"]:
                found.append(f"{where} is to be compared and has no output")
            # Without the inline backend (MPLBACKEND=Agg) there is no picture, and nbval misses it.
            if draws:
                found.append(f"{where} is to be compared and draws: draw in another cell")
        if draws and len(cell["metadata"].get("alt", "")) < 40:
            found.append(f"{where} shows a picture, and its metadata `alt` does not say what")
        for output in cell["outputs"]:
            if "<Figure" not in "".join(output.get("data", {}).get("text/plain", "")):
                continue
            kind, size = next(iter(output["metadata"].items()), ("image/png", {"width": 0}))
            drawn = Image.open(BytesIO(b64decode(output["data"][kind])))
            if not 0 < size["width"] <= MAX_WIDTH:
                found.append(f"{where} draws wider than the page: use plots.panels")
            elif drawn.width < 2 * size["width"] - 1:
                found.append(f"{where} is not drawn with twice the pixels")
    if [cell["execution_count"] for cell in code] != list(range(1, len(code) + 1)):
        found.append("the cells were not executed once, from top to bottom")
    if not any(CHECKED in source(cell) for cell in code):
        found.append("no cell is compared")
    seeds = sum(len(SEED.findall(source(cell))) for cell in code)
    if seeds != 1:
        found.append(f"SEED is set {seeds} times, not once")
    if WIDGETS[1] in notebook["metadata"].get("widgets", {}):
        found.append("the notebook stores widgets: execute with store_widget_state=False")
    if not texts or "*Time*" not in texts[0] or not texts[0].startswith("# "):
        found.append("the first cell has no title or does not say how long it takes")
    if lesson:
        found += unanswered(cells)
        if not any("**Goals.**" in text for text in texts[:1]):
            found.append("the first cell has no goals")
        last = texts[-1] if texts else ""
        if not all(word in last for word in ("## Takeaways", "**Next**", "**Reading**")):
            found.append("the last cell has no takeaways, no way on, or no reading")
    return found


def unanswered(cells: list[Notebook]) -> list[str]:
    """Return which predictions have no folded answer right after the cells that show it."""
    found, asked, shown = [], "", False
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            shown = shown or bool(cell["outputs"])
            continue
        for match in PREDICTION.finditer(source(cell)):
            if bool(match[3]) != bool(asked):
                found.append(f"cell {number}: a prediction and its answer do not take turns")
            if match[3] and not shown:
                found.append(f"cell {number} answers before anything is shown")
            asked, shown = "" if match[3] else f"cell {number}", False
    if asked:
        found.append(f"{asked} predicts, and nothing answers")
    if not any(PREDICTION.search(source(cell)) for cell in cells):
        found.append("nothing is to be predicted")
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_a_notebook_has_no_problem(path: Path) -> None:
    assert path.stat().st_size < MAX_BYTES
    notebook = json.loads(path.read_text(encoding="utf-8"))
    found = problems(notebook)
    if path.name.startswith("00"):  # a tour: its goal is its title
        found.remove("the first cell has no goals")
    assert found == []


@pytest.mark.parametrize("path", EXERCISES, ids=lambda p: p.name)
def test_no_cell_of_an_exercise_has_a_problem(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    found = problems(notebook, lesson=False)
    assert not [p for p in found if re.search("compared|draw|picture", p)]


def sound() -> Notebook:
    def text(words: str) -> Notebook:
        return {"cell_type": "markdown", "source": [words]}

    def code(number: int, words: str) -> Notebook:
        output = {"output_type": "stream", "name": "stdout", "text": ["1\n"]}
        return {
            "cell_type": "code",
            "execution_count": number,
            "metadata": {},
            "source": [words],
            "outputs": [output],
        }

    cells = [
        text("# 99 · Why?\n**Goals.** None. *Time*: a minute."),
        code(1, "SEED = 0"),
        text("**Predict first**: one or two?"),
        code(2, f"{CHECKED}\nprint(1)"),
        text("<details><summary>Answer</summary>\n\nOne.\n\n</details>"),
        text("## Takeaways\n- None.\n\n**Next**: lesson 100.\n\n**Reading**: nothing."),
    ]
    return {"cells": cells, "metadata": {}}


def change(place: int, **what: Any) -> Callable[[Notebook], None]:
    return lambda notebook: notebook["cells"][place].update(what)


WIDGET = {"output_type": "display_data", "data": {WIDGETS[0]: {"model_id": "1"}}}
PICTURE = {"output_type": "display_data", "data": {"image/png": ""}}


def figure(shown: int, drawn: int) -> dict[str, Any]:
    file = BytesIO()
    Image.new("RGB", (drawn, 8)).save(file, "png")
    data = {"image/png": b64encode(file.getvalue()).decode(), "text/plain": "<Figure size 1x1>"}
    size = {"image/png": {"width": shown, "height": 4}}
    return {"output_type": "display_data", "data": data, "metadata": size}


BREAKS: dict[str, Callable[[Notebook], None]] = {
    "compared and draws": change(3, outputs=[PICTURE]),
    "has no count": change(3, execution_count=None),
    "has no output": change(3, outputs=[]),
    "more than 20 lines": change(1, source=["SEED = 0\n"] + ["x = 1\n"] * 20),
    "SEED is set 0 times": change(1, source=["seed = 0"]),
    "SEED is set 2 times": change(3, source=[f"{CHECKED}\n", "SEED = 1"]),
    "stores an error": change(1, outputs=[{"output_type": "error"}]),
    "stores a widget": change(1, outputs=[WIDGET]),
    "stores widgets": lambda notebook: notebook["metadata"].update(widgets={WIDGETS[1]: {}}),
    "not executed once": change(3, execution_count=3),
    "no cell is compared": change(3, source=["print(1)"]),
    "how long": change(0, source=["# 99\n**Goals.** None."]),
    "no goals": change(0, source=["# 99\n*Time*: a minute."]),
    "predicted": lambda notebook: [change(k, source=["Look:"])(notebook) for k in (2, 4)] and None,
    "take turns": change(2, source=["Look:"]),
    "nothing answers": change(4, source=["One."]),
    "before anything is shown": change(3, outputs=[]),
    "does not say what": change(1, outputs=[PICTURE]),
    "wider than the page": change(1, outputs=[figure(700, 1400)]),
    "twice the pixels": change(1, outputs=[figure(600, 600)]),
    "no takeaways": change(5, source=["**Next**: x. **Reading**: nothing."]),
    "no way on": change(5, source=["## Takeaways\n**Reading**: nothing."]),
    "no reading": change(5, source=["## Takeaways\n**Next**: x."]),
}


def test_a_sound_notebook_is_found_sound() -> None:
    assert problems(sound()) == []
    longest = copy.deepcopy(sound())
    longest["cells"][1]["source"] = ["SEED = 0\n"] + ["x = 1\n"] * 19
    assert problems(longest) == []


@pytest.mark.parametrize("sentence", BREAKS)
def test_a_broken_notebook_is_found_broken(sentence: str) -> None:
    notebook = sound()
    BREAKS[sentence](notebook)
    assert len(problems(notebook)) >= 1
    assert any(sentence in problem for problem in problems(notebook)), problems(notebook)


def test_the_guide_counts_what_is_there() -> None:
    root = NOTEBOOKS[0].parent.parent
    names = [path.stem for path in NOTEBOOKS]
    assert re.findall(r"^\| \[(\w+)\]\(\.\./\w+\.ipynb\) \|.*$", PAGE, re.M) == names
    assert re.findall(r"^\| \[(\w+)\]\(notebooks/\w+\.ipynb\) \|.*$", README, re.M) == names
    for path in NOTEBOOKS:
        line = re.search(rf"^\| \[{path.stem}\].*$", PAGE, re.M)
        assert line
        *_, cells, compared, tasks = (part.strip() for part in line[0].strip("| ").split("|"))
        found = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = [cell for cell in found if cell["cell_type"] == "code"]
        assert (int(cells), int(compared)) == (len(found), sum(CHECKED in source(c) for c in code))
        exercise = root / "notebooks" / "exercises" / f"ex_{path.stem}.ipynb"
        graded = json.loads(exercise.read_text(encoding="utf-8"))["cells"]
        assert int(tasks) == sum(c["metadata"].get("nbgrader", {}).get("grade", 0) for c in graded)
