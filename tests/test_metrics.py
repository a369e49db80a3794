"""Means, intervals and paired differences, against cases worked out by hand."""

import numpy as np
import pandas as pd
import pytest

from sude_lab.metrics import MEASURES, bootstrap_interval, per_run, summarize


def test_interval_of_two_values_is_the_quantiles_of_its_four_resamples() -> None:
    # Of {0, 1} a resample has mean 0, 1/2, 1 with probability 1/4, 1/2, 1/4.
    assert bootstrap_interval([0, 1], level=0.95, resamples=2000) == (0.0, 1.0)
    assert bootstrap_interval([0, 1], level=0.40, resamples=2000) == (0.5, 0.5)


def test_interval_of_equal_values_is_that_value() -> None:
    assert bootstrap_interval([0.25] * 6, resamples=100) == (0.25, 0.25)


def test_interval_is_the_normal_one_for_many_values() -> None:
    x = np.random.default_rng(0).normal(3.0, 2.0, size=2000)
    low, high = bootstrap_interval(x, resamples=2000)
    half = 1.96 * x.std() / np.sqrt(len(x))
    assert low == pytest.approx(x.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(x.mean() + half, abs=0.1 * half)


def test_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for k in range(300):
        low, high = bootstrap_interval(rng.normal(size=30), resamples=400, seed=k)
        hits += low <= 0 <= high
    # 0.95 less the percentile method's known shortfall at n = 30 (0.94), +- 4 deviations of 300.
    assert 0.88 <= hits / 300 <= 0.99


def test_correlated_clusters_widen_the_interval() -> None:
    rng = np.random.default_rng(2)
    subjects = np.repeat(np.arange(8), 5)
    x = rng.normal(size=8)[subjects] + 0.1 * rng.normal(size=40)
    alone = bootstrap_interval(x, resamples=2000)
    together = bootstrap_interval(x, subjects, resamples=2000)
    width = (together[1] - together[0]) / (alone[1] - alone[0])
    # The seeds of a subject are nearly equal: 8 values in truth, not 40.
    assert width == pytest.approx(np.sqrt(5), rel=0.15)


def test_clusters_of_unequal_size_weigh_as_their_values_do() -> None:
    # {a, b} drawn twice: aa -> 0, ab -> 3/4, bb -> 1.
    low, high = bootstrap_interval([0, 1, 1, 1], ["a", "b", "b", "b"], level=0.4, resamples=2000)
    assert (low, high) == (0.75, 0.75)


@pytest.mark.parametrize(("values", "clusters"), [([], None), ([1.0], None), ([1.0, 2.0], "aa")])
def test_fewer_than_two_clusters_give_no_interval(values: list[float], clusters: str) -> None:
    low, high = bootstrap_interval(values, list(clusters) if clusters else None)
    assert np.isnan(low) and np.isnan(high)


def test_interval_depends_on_its_seed_alone() -> None:
    x = np.random.default_rng(3).normal(size=12)
    np.random.seed(0)
    first = bootstrap_interval(x, resamples=200, seed=1)
    np.random.seed(1)
    assert bootstrap_interval(x, resamples=200, seed=1) == first
    assert bootstrap_interval(x, resamples=200, seed=2) != first


def table(rows: list[tuple[str, str, int, str, float]]) -> pd.DataFrame:
    names = ["subject", "variant", "seed", "attribute", "attribute_alignment"]
    frame = pd.DataFrame(rows, columns=names)
    return frame.assign(
        category="dog", method="dreambooth", subject_fidelity=0.5, category_alignment=1.0
    )


HAND_MADE = table(
    [
        ("rex", "plain", 0, "running", 0.1),
        ("rex", "plain", 0, "jumping", 0.3),  # the run's mean is 0.2
        ("rex", "sude", 0, "running", 0.4),
        ("rex", "sude", 0, "jumping", 0.6),  # 0.5: +0.3
        ("fay", "sude", 0, "running", 0.7),  # other order than plain: pairs go by name
        ("fay", "plain", 0, "running", 0.6),  # +0.1
        ("rex", "plain", 0, "", 0.9),  # no attribute asked for: not counted
        ("rex", "sude", 1, "running", 1.0),  # no plain run of this seed: not in the pairs
    ]
)


def test_a_run_is_the_mean_over_the_pictures_that_ask_for_an_attribute() -> None:
    runs = per_run(HAND_MADE).set_index(["subject", "variant", "seed"])["attribute_alignment"]
    assert len(runs) == 5
    assert runs["rex", "plain", 0] == pytest.approx(0.2)
    assert runs["rex", "sude", 0] == pytest.approx(0.5)


def test_summary_pairs_runs_of_one_subject_and_seed() -> None:
    rows = summarize(HAND_MADE).set_index("variant")
    assert rows.loc["plain", "attribute_alignment"] == pytest.approx((0.2 + 0.6) / 2)
    sude = rows.loc["sude"]
    assert sude["subjects"] == 2 and sude["runs"] == 3
    assert sude["attribute_alignment"] == pytest.approx((0.5 + 0.7 + 1.0) / 3)
    assert sude["attribute_alignment_gain"] == pytest.approx((0.3 + 0.1) / 2)
    assert sude["attribute_alignment_low"] == pytest.approx(0.1)
    assert sude["attribute_alignment_high"] == pytest.approx(0.3)
    assert sude["subject_fidelity_gain"] == 0.0
    assert np.isnan(rows.loc["plain"].get("attribute_alignment_gain", np.nan))


def test_summary_keeps_methods_apart() -> None:
    other = HAND_MADE.assign(
        method="textual_inversion", attribute_alignment=HAND_MADE["attribute_alignment"] * 0
    )
    rows = summarize(pd.concat([HAND_MADE, other]))
    gains = rows[rows["variant"] == "sude"].set_index("method")["attribute_alignment_gain"]
    assert gains["dreambooth"] == pytest.approx(0.2)
    assert gains["textual_inversion"] == 0.0


def test_summary_of_plain_runs_alone_has_means_and_no_gain() -> None:
    rows = summarize(HAND_MADE[HAND_MADE["variant"] == "plain"])
    assert len(rows) == 1
    assert set(MEASURES) <= set(rows.columns)
