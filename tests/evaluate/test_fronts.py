"""Reading two lines at equal fidelity: by hand, and in simulated studies."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from sude_lab.evaluate.fronts import Line, gain_at, hull_of, line, paired


def table(values: dict[str, list[tuple[float, float]]]) -> pd.DataFrame:
    return pd.DataFrame(
        {"subject": who, "steps": k, "subject_fidelity": f, "attribute_alignment": a}
        for who, points in values.items()
        for k, (f, a) in enumerate(points)
    )


def test_a_line_is_read_where_its_mean_fidelity_is_the_asked_one() -> None:
    of = line(
        "plain", table({"x": [(0.2, 1.0), (0.6, 0.4)], "y": [(0.4, 0.8), (0.8, 0.6)]}), "steps"
    )
    assert of.at(0.3) == pytest.approx([1.0, 0.8])
    assert of.at(0.4) == pytest.approx([0.85, 0.75])  # a quarter of the way, for both
    assert of.at(0.1) == pytest.approx([1.0, 0.8])  # which keeps more than is asked
    assert of.at(0.7) == pytest.approx([0.4, 0.6]) and np.isnan(of.at(0.71)).all()


def test_a_strength_that_another_one_beats_is_not_of_the_front() -> None:
    points = [(0.2, 0.9), (0.5, 0.8), (0.4, 0.7), (0.5, 0.6), (0.8, 0.1), (0.2, 0.95), (0.8, 0.1)]
    of = line("plain", table({"x": points}), "steps")
    assert of.front().tolist() in ([5, 1, 4], [5, 1, 6])
    assert of.at(0.35) == pytest.approx([0.875])
    assert Line("one", ("x",), ("",), of.fidelity[:, :1], of.alignment[:, :1]).front() == [0]


def test_on_the_hull_no_strength_lowers_what_is_read() -> None:
    """(.5, .5) is beaten by nobody; by lot between its neighbours one gets (.5, .75)."""
    few, many = [(0.2, 1.0), (0.8, 0.5)], [(0.2, 1.0), (0.5, 0.5), (0.8, 0.5 - 1e-9), (0.6, 0.2)]
    front = line("", table({"x": many}), "steps")
    hull = hull_of(front)
    assert front.front().tolist() == [0, 1, 2] and hull.front().tolist() == [0, 2]
    assert front.at(0.4) == pytest.approx([2 / 3]) and hull.at(0.4) == pytest.approx([5 / 6])
    above = line("", table({"x": [*few, (0.5, 0.78), (0.4, 0.87)]}), "steps")
    assert hull_of(above).front().tolist() == [0, 3, 2, 1]
    assert paired(hull, front)[0].front().tolist() == [0, 2]  # of some subjects: a hull again
    rng = np.random.default_rng(0)
    for _ in range(50):
        one = Line("", ("x",), tuple("abcdef"), rng.random((1, 6)), rng.random((1, 6)))
        fewer = Line("", ("x",), tuple("abcde"), one.fidelity[:, :5], one.alignment[:, :5])
        for at in rng.random(5) * fewer.fidelity.max():
            assert hull_of(one).at(at)[0] >= hull_of(fewer).at(at)[0] - 1e-9


def test_a_line_of_one_point_is_read_at_its_own_fidelity() -> None:
    of = line("one", table({"x": [(0.1, 0.9)], "y": [(0.2, 0.7)], "z": [(0.3, 0.5)]}), "steps")
    own = of.fidelity.mean()
    for fidelity in (own, np.nextafter(own, 1), own - 0.1):  # the mean's last bit may differ
        assert of.at(float(fidelity)) == pytest.approx([0.9, 0.7, 0.5])


def test_the_order_of_the_strengths_says_nothing() -> None:
    points = [(0.2, 1.0), (0.6, 0.4), (0.4, 0.9)]
    forward, backward = (line("", table({"x": p}), "steps") for p in (points, points[::-1]))
    assert forward.at(0.5) == pytest.approx(backward.at(0.5))
    assert forward.at(0.5) == pytest.approx([0.65])


def test_subjects_without_a_strength_or_without_a_partner_do_not_count() -> None:
    a = table({"x": [(0.2, 1.0), (0.6, 0.4)], "y": [(0.2, 0.0), (0.6, 0.0)]})
    whole = line("a", a, "steps")
    lacking = line("b", a.drop(index=3), "steps")
    assert lacking.subjects == ("x",)
    both = paired(whole, lacking)
    assert both[0].subjects == both[1].subjects == ("x",) and gain_at(*both, 0.4).mean == 0
    with pytest.raises(ValueError, match="all strengths"):
        line("c", a.drop(index=[0, 3]), "steps")


def test_the_gain_is_read_at_equal_fidelity_and_not_at_equal_strength() -> None:
    """`b` is `a` at half of its strengths: point by point it is better, as a line it is equal."""
    rng = np.random.default_rng(0)
    slopes = rng.uniform(0.5, 1.5, (8, 1))
    names = tuple(map(str, range(8)))

    def made(name: str, at: np.ndarray, bonus: float = 0.0) -> Line:
        return Line(name, names, tuple(map(str, at)), 0 * slopes + at, 1 - slopes * at + bonus)

    a, b = made("a", np.linspace(0, 1, 6)), made("b", np.linspace(0, 0.5, 6))
    assert (b.alignment - a.alignment).mean() > 0.2
    assert abs(gain_at(b, a, 0.3).mean) < 1e-12
    better = gain_at(made("c", np.linspace(0, 1, 6), bonus=0.1), a, 0.3)
    assert better.mean == pytest.approx(0.1) and better.low == pytest.approx(0.1)
    area = gain_at(made("c", np.linspace(0, 1, 6), bonus=0.1), a, *np.linspace(0.1, 0.9, 41))
    assert area.mean == pytest.approx(0.1)
    assert math.isnan(gain_at(b, a, 0.8).mean)
    shares = np.linspace(0.1, 0.5, 8)  # a fidelity a subject: their mean is meant, here 0.3
    assert a.at(shares) == pytest.approx(a.at(0.3))
    assert a.at(shares, np.arange(4)) == pytest.approx(a.at(shares[:4].mean(), np.arange(4)))


@pytest.mark.parametrize("read", [lambda one: one, hull_of], ids=["front", "hull"])
@pytest.mark.parametrize("over_trained", [False, True])
def test_the_interval_of_a_gain_holds_the_truth_as_often_as_it_says(
    over_trained: bool, read: Callable[[Line], Line]
) -> None:
    """600 simulated studies of 36 subjects: their own levels, slopes and drawing noise.

    Both lines are equal, but `b` has other strengths and more of them: the true gain is 0. With
    `over_trained` fidelity stops to rise half way along, so that the front is found among noise.
    """
    rng = np.random.default_rng(1)
    names, held, gains = tuple(map(str, range(36))), 0, []
    for _ in range(600):
        reach, keeps = rng.normal(0.6, 0.15, (36, 1)), rng.normal(0.9, 0.1, (36, 1))
        fall = rng.gamma(4, 0.2, (36, 1))

        def made(at: np.ndarray, reach: np.ndarray = reach, *about: np.ndarray) -> Line:
            keeps, fall = about
            rising = np.minimum(at, 0.75) / 0.75 if over_trained else at
            f = reach * rising + rng.normal(0, 0.05, (36, len(at)))
            a = keeps - fall * at**2 + rng.normal(0, 0.1, (36, len(at)))
            return read(Line("", names, tuple(map(str, at)), f, a))

        ends = gain_at(
            made(np.linspace(0.1, 1, 10), reach, keeps, fall),
            made(np.linspace(0.1, 1, 13), reach, keeps, fall),
            0.45,
        )
        held += ends.low <= 0 <= ends.high
        gains.append(ends.mean)
    assert held >= 0.93 * 600
    assert abs(np.mean(gains)) < 0.01
