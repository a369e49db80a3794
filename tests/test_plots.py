"""Figures hold what they are given: labels, limits, lines, and pictures in their places."""

from collections.abc import Iterator

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from PIL import Image

from sude_lab import plots


@pytest.fixture
def ax() -> Iterator[Axes]:
    plt.switch_backend("Agg")
    figure, axes = plt.subplots()
    yield axes
    plt.close(figure)


METRICS = pd.DataFrame(
    {
        "step": [1, 2, 3, 4],
        "open_gates": [1.0, 0.0, 1.0, 0.0],
        "loss_sude": [0.3, 0.1, -0.1, -0.3],
        "tau": [-0.2, -0.2, -0.2, -0.2],
        "rho": [0.0, 0.5, 1.0, 1.5],
    }
)


def test_running_mean_takes_what_there_is_at_the_start() -> None:
    seen = plots.smooth(pd.Series([1.0, 3.0, 5.0, 7.0]), window=3)
    assert seen.tolist() == [1.0, 2.0, 3.0, 5.0]


def test_open_gates_draws_a_named_line_a_run(ax: Axes) -> None:
    assert plots.open_gates(ax, {"plain": METRICS, "sude": METRICS}, window=2) is ax
    lines = ax.get_lines()
    assert [line.get_label() for line in lines] == ["plain", "sude"]
    assert list(lines[0].get_xdata()) == [1, 2, 3, 4]
    assert list(lines[0].get_ydata()) == [1.0, 0.5, 0.5, 0.5]
    assert to_hex(lines[1].get_color()) == plots.COLOURS["sude"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "share of open gates")
    low, high = ax.get_ylim()
    assert low < 0 and high > 1
    assert "2 steps" in ax.get_title()


def test_loss_against_threshold_fills_where_the_gate_is_open(ax: Axes) -> None:
    plots.loss_against_threshold(ax, METRICS, window=1)
    loss, tau = ax.get_lines()
    assert list(loss.get_ydata()) == METRICS["loss_sude"].tolist()
    assert list(tau.get_ydata()) == METRICS["tau"].tolist()
    assert "eq. 7" in str(loss.get_label()) and "eq. 8" in str(tau.get_label())
    filled = np.concatenate([path.vertices for path in ax.collections[0].get_paths()])
    assert filled[:, 0].max() == 3  # at step 4 the loss is below the threshold
    assert ax.get_ylabel() == "per dimension"


def test_membership_marks_where_the_gate_shuts(ax: Axes) -> None:
    plots.membership(ax, {"sude": METRICS}, window=1)
    run, mark = ax.get_lines()
    assert list(run.get_ydata()) == METRICS["rho"].tolist()
    assert list(mark.get_ydata()) == [1.0, 1.0]
    assert ax.get_ylabel() == r"$\rho$"


def test_picture_table_puts_every_picture_in_its_place(ax: Axes) -> None:
    red, green, blue = ((255, 0, 0), (0, 255, 0), (0, 0, 255))

    def square(colour: tuple[int, int, int]) -> Image.Image:
        return Image.new("RGB", (20, 20), colour)

    rows = {
        "plain": {"sitting": [square(red), square(green)], "running": [square(blue)]},
        "sude": {"running": [square(green), square(blue), square(red)]},
    }
    plots.picture_table(ax, rows, per_cell=2)
    canvas = np.asarray(ax.get_images()[0].get_array())
    assert canvas.shape == (2 * 22, 2 * 42, 3)
    expected = np.full_like(canvas, 255)
    expected[:20, :20], expected[:20, 20:40], expected[:20, 42:62] = red, green, blue
    expected[22:42, 42:62], expected[22:42, 62:82] = green, blue
    assert np.array_equal(canvas, expected)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["sitting", "running"]
    assert ax.get_xticks().tolist() == [20, 62]  # the middle of each cell's two pictures
    assert [label.get_text() for label in ax.get_yticklabels()] == ["plain", "sude"]
    assert ax.get_yticks().tolist() == [10, 32]


def test_measures_draws_means_with_their_intervals(ax: Axes) -> None:
    table = pd.DataFrame(
        {
            "variant": ["plain", "sude"],
            "fidelity": [0.5, 0.6],
            "fidelity_low": [0.4, 0.55],
            "fidelity_high": [0.7, 0.65],
        }
    )
    plots.measures(ax, table, ["fidelity"])
    bars = [patch for group in ax.containers[1::2] for patch in group]
    assert [bar.get_height() for bar in bars] == [0.5, 0.6]
    assert bars[0].get_x() < bars[1].get_x()
    assert bars[0].get_x() + bars[0].get_width() <= bars[1].get_x() + 1e-12  # no overlap
    spans = [line.get_segments()[0][:, 1] for line in ax.collections]
    assert np.allclose(spans, [[0.4, 0.7], [0.55, 0.65]])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["fidelity"]


GAINS = pd.DataFrame(
    {
        "method": ["one", "two", "one", "two", "one"],
        "variant": ["sude", "sude", "more", "more", "plain"],
        "measure": ["attribute_alignment"] * 5,
        "gain": [0.3, -0.1, 0.2, 0.4, float("nan")],
        "low": [0.1, -0.2, float("nan"), 0.3, float("nan")],
        "high": [0.6, 0.1, float("nan"), 0.5, float("nan")],
    }
)


def test_gains_draw_a_mark_with_its_interval_in_the_row_of_its_name(ax: Axes) -> None:
    assert plots.gains(ax, GAINS, "attribute_alignment") is ax
    sude, more = ax.containers
    assert list(sude.lines[0].get_xdata()) == [0.3, -0.1]
    assert [round(y) for y in sude.lines[0].get_ydata()] == [0, 1]
    ends = [segment[:, 0].tolist() for segment in sude.lines[2][0].get_segments()]
    assert ends == [pytest.approx([0.1, 0.6]), pytest.approx([-0.2, 0.1])]
    ends = [segment[:, 0].tolist() for segment in more.lines[2][0].get_segments()]
    assert ends == [[0.2, 0.2], pytest.approx([0.3, 0.5])]  # no interval: the mark alone
    assert [t.get_text() for t in ax.get_yticklabels()] == ["one", "two"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first on top
    assert ax.get_xlabel() == "change of attribute alignment"
    assert {t.get_text() for t in ax.get_legend().get_texts()} == {"sude", "more"}


def test_gains_with_a_row_a_variant_need_no_legend(ax: Axes) -> None:
    plots.gains(ax, GAINS[GAINS["method"] == "one"], "attribute_alignment", rows="variant")
    assert ax.get_legend() is None
    assert [t.get_text() for t in ax.get_yticklabels()] == ["sude", "more"]
    (marks,) = ax.containers
    assert list(marks.lines[0].get_ydata()) == [0, 1]


def test_scatter_has_a_colour_and_a_shape_a_group(ax: Axes) -> None:
    table = pd.DataFrame({"x": [0.1, 0.2, 0.3], "y": [1, 2, 3], "method": ["a_b", "a_b", "c"]})
    assert plots.scatter(ax, table, "x", "y", diagonal=True) is ax
    first, second, *_ = ax.get_lines()
    assert list(first.get_xdata()) == [0.1, 0.2] and list(second.get_ydata()) == [3]
    assert first.get_marker() != second.get_marker() and first.get_color() != second.get_color()
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["a_b", "c"]
    assert len(ax.get_lines()) == 4 and len(plots.scatter(ax, table, "x", "y").get_lines()) == 7
