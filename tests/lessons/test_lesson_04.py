"""The code that lesson 04 shows, taken from its cell: rho of the samples of a run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from sude_lab.view import plots

LESSON = Path(__file__).parents[2] / "notebooks" / "04_one_shot_tuning.ipynb"


def drawn(samples: pd.DataFrame) -> Any:
    """The axis of the cell that draws every sample's rho over its timestep."""
    cells = json.loads(LESSON.read_text(encoding="utf-8"))["cells"]
    (source,) = (text for cell in cells if "ax.scatter(" in (text := "".join(cell["source"])))
    names = {"pd": pd, "plots": plots, "samples": samples.to_numpy().tolist()}
    exec(source, names)
    plt.close("all")
    return names["ax"]


@pytest.mark.parametrize("wild", [1e6, -1e6])
def test_one_wild_sample_does_not_rule_the_axis(wild: float) -> None:
    rho = np.linspace(0, 2, 1000)
    rho[7] = wild
    low, high = drawn(pd.DataFrame({"t": np.arange(1000), "rho": rho, "gate": rho < 1})).get_ylim()
    assert -1 < low < 0.1 and 1.9 < high < 3


def test_open_gates_are_full_marks_and_shut_ones_are_hollow() -> None:
    rows = {"t": [10, 500, 900, 950], "rho": [0.2, 1.4, 0.9, 1.0], "gate": [1, 0, 1, 0]}
    is_open, shut = (ax := drawn(pd.DataFrame(rows))).collections
    assert np.array_equal(is_open.get_offsets(), [[10, 0.2], [900, 0.9]])
    assert np.array_equal(shut.get_offsets(), [[500, 1.4], [950, 1.0]])
    assert len(is_open.get_facecolor()) and not len(shut.get_facecolor())
    assert "open: 50%" in str(is_open.get_label()) and "shut: 50%" in str(shut.get_label())
    assert list(ax.get_lines()[0].get_ydata()) == [1.0, 1.0]
