"""A click on a run shows that run, and nothing else."""

from io import BytesIO

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from sude_lab.errors import UserError
from sude_lab.view.runs import RunExplorer

COLOURS = {("dog", 0.0): (255, 0, 0), ("dog", 2.0): (0, 160, 0), ("cat", 0.0): (0, 0, 255)}
RUNS = pd.DataFrame(
    [
        {"subject": s, "factor": f, "subject_fidelity": 0.4, "attribute_alignment": a}
        for (s, f), a in zip(COLOURS, (0.1, 0.9, 0.6), strict=True)
    ]
)


@pytest.fixture
def asked() -> list[tuple[str, float]]:
    return []


@pytest.fixture
def explorer(asked: list[tuple[str, float]]) -> RunExplorer:
    def pictures(run: pd.Series) -> dict[str, list[Image.Image]]:
        place = (run["subject"], run["factor"])
        asked.append(place)
        image = Image.new("RGB", (16, 16), COLOURS[place])
        names = ("as tuned", "running", "sleeping") if place[0] == "dog" else ("as tuned",)
        return {name: [image, image] for name in names}

    return RunExplorer(RUNS, pictures)


def shown(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(png)).convert("RGB"))


def share(png: bytes, colour: tuple[int, int, int]) -> float:
    return float((shown(png) == colour).all(-1).mean())


def test_a_click_draws_the_pictures_of_its_run(explorer: RunExplorer) -> None:
    for place, colour in COLOURS.items():
        explorer.buttons[place].click()
        assert explorer.at == place
        assert share(explorer.picture(), colour) > 0.02
        others = [share(explorer.picture(), c) for p, c in COLOURS.items() if p != place]
        assert max(others) < 0.002  # marks in the plane at most
        marked = [p for p, b in explorer.buttons.items() if "black" in b.layout.border_top]
        assert marked == [place]


def test_the_mark_and_the_line_are_those_of_the_subject(explorer: RunExplorer) -> None:
    explorer.show("dog", 2.0)
    assert explorer._mark.get_xydata().tolist() == [[0.4, 0.9]]
    assert explorer._line.get_xydata().tolist() == [[0.4, 0.1], [0.4, 0.9]]
    assert str(explorer) == "dog, factor 2: attribute alignment 0.90, subject fidelity 0.40"
    explorer.show("cat", 0.0)
    assert explorer._line.get_xydata().tolist() == [[0.4, 0.6]]


def test_names_of_the_prompts_change_with_the_run(explorer: RunExplorer) -> None:
    explorer.show("dog", 0.0)
    assert [t.get_text() for t in explorer._right.texts] == ["as tuned", "running", "sleeping"]
    explorer.show("cat", 0.0)
    assert [t.get_text() for t in explorer._right.texts] == ["as tuned"]


def test_a_run_is_drawn_once(explorer: RunExplorer, asked: list[tuple[str, float]]) -> None:
    first = explorer.show("cat", 0.0)
    explorer.show("dog", 2.0)
    assert explorer.show("cat", 0.0) == first
    assert sorted(asked) == sorted(COLOURS)


def test_buttons_stand_in_rows_and_columns_and_say_their_number(explorer: RunExplorer) -> None:
    lines = explorer.widget().children
    words = [[getattr(c, "value", None) or c.description for c in line.children] for line in lines]
    assert words[0] == ["subject \\ factor", "0", "2"]
    assert ["dog", "0.10", "0.90"] in words
    assert len(lines) == 3
    light, dark = explorer.buttons["dog", 2.0].style, explorer.buttons["dog", 0.0].style
    assert light.button_color != dark.button_color
    assert (light.text_color, dark.text_color) == ("black", "white")


def test_what_cannot_be_shown_is_refused(explorer: RunExplorer) -> None:
    with pytest.raises(UserError, match="no run with subject dog and factor 7"):
        explorer.show("dog", 7)
    with pytest.raises(UserError, match="no run to show"):
        RunExplorer(RUNS[:0], lambda run: {})
    with pytest.raises(UserError, match="same subject and factor"):
        RunExplorer(pd.concat([RUNS, RUNS]), lambda run: {})
    assert explorer.at == ("dog", 0.0)
