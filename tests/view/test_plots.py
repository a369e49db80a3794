"""Figures hold what they are given: labels, limits, lines, and pictures in their places."""

from collections.abc import Iterator

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from PIL import Image

from sude_lab.view import plots


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
    assert ax.get_xlabel() == "change of\nattribute alignment"
    assert {t.get_text() for t in ax.get_legend().get_texts()} == {"sude", "more"}


def test_gains_with_a_row_a_variant_need_no_legend(ax: Axes) -> None:
    plots.gains(ax, GAINS[GAINS["method"] == "one"], "attribute_alignment", rows="variant")
    assert ax.get_legend() is None
    assert [t.get_text() for t in ax.get_yticklabels()] == ["sude", "more"]
    (marks,) = ax.containers
    assert list(marks.lines[0].get_ydata()) == [0, 1]


def test_learning_draws_every_step_and_the_running_mean(ax: Axes) -> None:
    table = pd.DataFrame({"step": [1, 2, 3], "loss_subject": [3.0, 1.0, 5.0]})
    plots.learning(ax, {"plain": table, "sude": table}, window=2)
    dots, mean, _, _ = ax.get_lines()
    assert list(dots.get_ydata()) == [3.0, 1.0, 5.0] and dots.get_linestyle() == "None"
    assert list(mean.get_ydata()) == [3.0, 2.0, 3.0]
    legend = ax.get_legend()
    assert legend and [text.get_text() for text in legend.get_texts()] == ["plain", "sude"]
    assert "eq. 3" in ax.get_ylabel() and "2 steps" in ax.get_title()


def test_a_picture_grid_names_its_rows_in_their_middle(ax: Axes) -> None:
    grid = Image.new("RGB", (40, 60), "green")
    plots.picture_grid(ax, grid, ["a", "b", "c"], "step 5")
    assert np.array_equal(np.asarray(ax.get_images()[0].get_array()), np.asarray(grid))
    assert ax.get_yticks().tolist() == [9.5, 29.5, 49.5]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b", "c"]
    assert ax.get_title() == "step 5"


def test_rule_lines_start_at_plain_and_follow_the_strength(ax: Axes) -> None:
    table = pd.DataFrame(
        {
            "rule": ["guidance", "plain", "guidance", "composition"],
            "strength": [2.0, 0.0, 0.5, 1.0],
            "subject_fidelity": [0.3, 0.6, 0.5, 0.2],
            "attribute_alignment": [0.9, 0.1, 0.5, 0.8],
        }
    )
    plots.rule_lines(ax, table)
    lines = {str(line.get_label()): line.get_xydata().tolist() for line in ax.get_lines()}
    assert lines["guidance"] == [[0.6, 0.1], [0.5, 0.5], [0.3, 0.9]]
    assert lines["composition"] == [[0.6, 0.1], [0.2, 0.8]]
    assert lines["plain"] == [[0.6, 0.1]]
    texts = {(text.get_text(), *text.xy) for text in ax.texts}  # type: ignore[attr-defined]
    assert texts == {("0.5", 0.5, 0.5), ("2", 0.3, 0.9), ("1", 0.2, 0.8)}
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("subject fidelity", "attribute alignment")


def test_names_of_neighbouring_marks_do_not_lie_on_each_other(ax: Axes) -> None:
    near = {
        "subject_fidelity": [0.6, 0.5, 0.505, 0.51],
        "attribute_alignment": [0.1, 0.5, 0.5, 0.5],
    }
    table = pd.DataFrame({"rule": ["plain"] + ["SuDe"] * 3, "strength": [0, 0.5, 1, 2], **near})
    ax.set(xlim=(0, 1), ylim=(0, 1))
    plots.rule_lines(ax, table)
    ax.figure.draw_without_rendering()  # type: ignore[attr-defined]
    boxes = [text.get_window_extent() for text in ax.texts]
    assert not any(a.overlaps(b) for k, a in enumerate(boxes) for b in boxes[:k])


def test_a_name_is_nearest_to_its_own_mark_and_touches_none() -> None:
    (ax, *_) = plots.panels(3, 5.0, rows=2)
    ax.set(xlim=(0, 1.2), ylim=(-0.1, 1.1))  # lesson 05's candle
    table = pd.DataFrame(
        {
            "rule": ["plain", *["SuDe"] * 4],
            "strength": [0, 0.5, 1, 2, 4],
            "subject_fidelity": [0.871, 0.906, 0.872, 0.749, 0.657],
            "attribute_alignment": [0.155, 0.068, 0.098, 0.183, 0.458],
        }
    )
    plots.rule_lines(ax, table, legend=0)
    ax.figure.draw_without_rendering()
    marks = ax.transData.transform(table[["subject_fidelity", "attribute_alignment"]])
    for number, name in enumerate(ax.texts, 1):
        (x0, y0), (x1, y1) = name.get_window_extent().get_points()
        gaps = np.linalg.norm(marks - marks.clip((x0, y0), (x1, y1)), axis=1)
        assert gaps.argmin() == number and gaps.min() > 3.5 * ax.figure.dpi / 72, name.get_text()


def test_panels_are_as_wide_as_the_page_and_shown_at_the_size_of_their_letters() -> None:
    plt.switch_backend("Agg")
    one, *_ = three = plots.panels(3, 2.2)
    assert len(three) == 3 and one.figure.dpi == plots.DPI == 96
    assert one.figure.get_size_inches().tolist() == [plots.WIDTH, 2.2]
    assert plots.panels(2, 3.0, rows=2).shape == (4,) and isinstance(plots.panels(), Axes)
    plt.close("all")


def test_a_figure_in_words_names_panels_lines_and_the_pictures_of_a_table() -> None:
    left, right, off = plots.panels(3)
    plots.curves(left, [0, 1], {"plain": [0.1, 0.25]}, xlabel="$w_s$", ylabel="", title="One\nline")
    left.plot([0, 1], [3, 4], "o", label="marks")
    pictures = [Image.new("RGB", (8, 8))] * 2
    plots.picture_table(right, {"plain": {"running": pictures, "sitting": pictures}})
    off.set_axis_off()
    assert plots.in_words(left.figure) == (
        "2 panels. One line: w_s; plain from 0.1 to 0.25; marks. "
        "rows plain; columns running, sitting"
    )
    assert plots.in_words(plots.panels().figure) == ""


def test_a_difference_is_grey_where_pictures_agree_and_says_how_much_else() -> None:
    before, after = (Image.new("RGB", (1, 1), colour) for colour in ((10, 10, 10), (10, 40, 250)))
    assert plots.difference(before, after, 2).getpixel((0, 0)) == (128, 188, 255)


def test_curves_are_told_apart_by_colour_and_by_dash(ax: Axes) -> None:
    lines = {"one": [1.0, 2.0], "two": [3.0, 4.0], "three": [5.0, 6.0]}
    plots.curves(ax, [10, 20], lines, xlabel="t", ylabel="nats", title="Over t", mark=15.0, log="y")
    *drawn, mark = ax.get_lines()
    assert {str(line.get_label()): list(line.get_ydata()) for line in drawn} == lines
    assert len({line.get_color() for line in drawn}) == 3
    assert len({line.get_linestyle() for line in drawn}) == 3
    assert list(mark.get_xdata()) == [15.0, 15.0]
    assert (ax.get_xscale(), ax.get_yscale()) == ("linear", "log")
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("t", "nats", "Over t")
    assert ax.get_legend() is not None


def test_one_curve_needs_no_legend(ax: Axes) -> None:
    plots.curves(ax, [1, 2], {"": [1.0, 2.0]}, xlabel="t", ylabel="nats", log="x")
    assert ax.get_legend() is None and len(ax.get_lines()) == 1
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "linear")


def test_gate_over_time_is_shaded_where_the_gate_is_open(ax: Axes) -> None:
    plots.gate_over_time(ax, [100, 500, 900], [-5e-4, -1e-4, -3e-4], [-2e-4] * 3, now=500)
    loss, tau = ax.get_lines()[:2]
    assert np.allclose(loss.get_ydata(), [-0.5, -0.1, -0.3])
    assert np.allclose(tau.get_ydata(), -0.2)
    (shade,) = ax.collections
    x = np.concatenate([path.vertices for path in shade.get_paths()])[:, 0]
    assert 100 < x.min() < 500 < x.max() < 900
    assert 500 in [line.get_xdata()[0] for line in ax.get_lines()]
    assert ax.get_ylabel() == "per dimension, in thousandths"


def test_a_legend_covers_no_line_and_no_mark() -> None:
    waves = np.linspace(0, 40, 400)
    left, right = plots.panels(2)  # the layout of the left one changes with the right one's labels
    plots.curves(left, waves, {"one": np.sin(waves), "two": np.cos(waves)}, xlabel="", ylabel="")
    places = np.stack(np.meshgrid(np.arange(8), np.arange(8))).reshape(2, -1)
    right.plot(*places[:, ::2], "o", label="a long name")
    right.plot(*places[:, 1::2], "s", label="b")
    plots.finish(right, "everywhere", xlabel="x", ylabel="y")
    right.figure.draw_without_rendering()
    for ax in (left, right):
        legend = ax.get_legend()
        assert legend is not None
        box = legend.get_window_extent()
        drawn = [ax.transData.transform(line.get_xydata()) for line in ax.lines]
        assert not any(box.count_contains(points) for points in drawn)
    plt.close(left.figure)


def test_the_numbers_at_marks_stand_inside_the_frame(ax: Axes) -> None:
    rows = [("plain", 0.0, 0.9, 0.1), *(("SuDe", k, 0.98, 0.2 * k) for k in range(1, 5))]
    columns = ["rule", "strength", "subject_fidelity", "attribute_alignment"]
    ax.set(xlim=(0, 1), ylim=(0, 1))
    plots.rule_lines(ax, pd.DataFrame(rows, columns=columns), legend=0)
    ax.figure.draw_without_rendering()  # type: ignore[union-attr]
    assert ax.get_legend() is None and len(ax.texts) == 4
    for text in ax.texts:
        low, high = text.get_window_extent().min, text.get_window_extent().max
        assert (low > ax.bbox.min).all() and (high < ax.bbox.max).all(), text.get_text()
