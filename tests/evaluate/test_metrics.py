"""Similarities, means, intervals, paired differences: against cases worked out by hand."""

import numpy as np
import pandas as pd
import pytest

from studies.guidance_tables import summarize
from sude_lab.evaluate.metrics import (
    MEASURES,
    compare,
    cosines,
    gains,
    image_similarity,
    per_run,
    text_similarity,
)
from sude_lab.evaluate.statistics import drawings_interval, mean_interval, t_quantile

pytestmark = pytest.mark.quick

T_1 = t_quantile(1)  # 12.7: of two subjects the interval is mean -+ T_1 half their distance


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
    # rex has two runs, fay one: each subject counts once.
    assert sude["attribute_alignment"] == pytest.approx(((0.5 + 1.0) / 2 + 0.7) / 2)
    assert sude["attribute_alignment_gain"] == pytest.approx((0.3 + 0.1) / 2)
    assert sude["attribute_alignment_low"] == pytest.approx(0.2 - T_1 * 0.1)
    assert sude["attribute_alignment_high"] == pytest.approx(0.2 + T_1 * 0.1)
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


# --- similarities --------------------------------------------------------------------------------


def test_cosines_are_those_of_the_angles() -> None:
    degrees = np.array([0.0, 30.0, 90.0, 180.0, 245.0])
    a = np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], axis=1)
    lengths = np.array([1.0, 0.1, 7.0, 2.0, 300.0])[:, None]  # which do not matter
    expected = np.cos(np.radians(degrees[:, None] - degrees[None]))
    np.testing.assert_allclose(cosines(a * lengths, a), expected, atol=1e-12)


def test_similarities_are_the_plain_loops() -> None:
    rng = np.random.default_rng(0)
    pictures, references, texts = (rng.normal(size=(n, 6)) for n in (4, 3, 4))

    def cosine(u: np.ndarray, v: np.ndarray) -> float:
        dot = sum(x * y for x, y in zip(u, v, strict=True))
        return dot / (sum(x * x for x in u) ** 0.5 * sum(y * y for y in v) ** 0.5)

    fidelity = [sum(cosine(p, r) for r in references) / 3 for p in pictures]
    np.testing.assert_allclose(image_similarity(pictures, references), fidelity)
    alignment = [cosine(p, t) for p, t in zip(pictures, texts, strict=True)]
    np.testing.assert_allclose(text_similarity(pictures, texts), alignment)


# --- evaluations ---------------------------------------------------------------------------------


def scores(values: dict[tuple[str, str, int, int, int], float], metric: str = "M") -> pd.DataFrame:
    """Scores by (variant, subject, tuning seed, prompt number, picture)."""
    rows = [
        {
            "run": f"{variant}-{subject}-{tuning_seed}",
            "settings": "dreambooth",
            "variant": variant,
            "subject": subject,
            "tuning_seed": tuning_seed,
            "number": number,
            "caption": f"caption {number}",
            "kind": "attribute",
            "seed": 0,
            "picture": picture,
            "metric": metric,
            "value": value,
        }
        for (variant, subject, tuning_seed, number, picture), value in values.items()
    ]
    return pd.DataFrame(rows)


def test_runs_are_compared_picture_by_picture() -> None:
    plain = {("plain", "rex", 0, n, k): 0.1 * n + 0.01 * k for n in range(3) for k in range(2)}
    sude = {("SuDe", "rex", 0, n, k): v + 0.2 + 0.1 * n for (_, _, _, n, k), v in plain.items()}
    sude[("SuDe", "rex", 0, 7, 0)] = 0.9  # asked of one run alone: in the mean, not in the pairs
    table = compare(scores(dict(reversed(sude.items())) | plain)).set_index("variant")
    assert table.loc["plain", "mean"] == pytest.approx(0.105)
    assert table.loc["plain", "over"] == "3 prompts x 2 noises"
    row = table.loc["SuDe"]
    assert row["pictures"] == 7 and row["pairs"] == 6
    assert row["against"] == "dreambooth, plain"
    assert row["difference"] == pytest.approx(0.3)
    # The differences are 0.2, 0.3, 0.4 by prompt, whatever the noise; one subject: over drawings.
    ends = drawings_interval([0.2, 0.3, 0.4], [0, 1, 2], [0, 0, 0])
    assert row["difference_low"] == pytest.approx(ends.low, abs=0.02)
    assert row["difference_high"] == pytest.approx(ends.high, abs=0.02)
    assert np.isnan(table.loc["plain", "difference"])


def test_pairs_share_subject_and_tuning_seed() -> None:
    plain = {("plain", s, t, 0, 0): float(t) for s in ("rex", "fay") for t in (0, 1)}
    sude = {("SuDe", s, t, 0, 0): t + 0.5 for s in ("rex", "fay") for t in (0, 1)}
    del sude["SuDe", "fay", 1, 0, 0]
    row = compare(scores(plain | sude)).set_index("variant").loc["SuDe"]
    assert row["pairs"] == 3 and row["difference"] == pytest.approx(0.5)
    assert row["over"] == "2 subjects"


def test_several_subjects_count_once_each_however_many_pictures_they_have() -> None:
    plain = {("plain", s, 0, n, 0): 0.0 for s, k in (("rex", 1), ("fay", 9)) for n in range(k)}
    gain = {"rex": 0.4, "fay": 0.2}
    sude = {("SuDe", *key[1:]): gain[key[1]] for key in plain}
    row = compare(scores(plain | sude)).set_index("variant").loc["SuDe"]
    assert row["mean"] == row["difference"] == pytest.approx(0.3)
    assert row["difference_low"] == pytest.approx(0.3 - T_1 * 0.1)
    assert row["pictures"] == row["pairs"] == 10


def test_one_subject_with_several_seeds_of_tuning_is_an_interval_over_those() -> None:
    values = {("plain", "rex", t, n, 0): 0.1 * t + n for t in (0, 1, 2) for n in (0, 1)}
    row = compare(scores(values)).iloc[0]
    assert row["over"] == "2 prompts x 3 tuning seeds" and row["low"] < row["mean"] < row["high"]


def test_without_a_plain_run_the_first_is_the_base() -> None:
    table = compare(scores({("SuDe, 1", "rex", 0, 0, 0): 0.1, ("SuDe, 2", "rex", 0, 0, 0): 0.4}))
    second = table.set_index("variant").loc["SuDe, 2"]
    assert second["against"] == "dreambooth, SuDe, 1"
    assert second["difference"] == pytest.approx(0.3) and np.isnan(second["difference_low"])
    assert second["over"] == ""  # one picture each: there is no interval


def small_study() -> pd.DataFrame:
    """Two subjects, two pictures a run; "sude" gains 0.4 and 0.2, "other" ran for one subject."""
    values = {
        ("a", "plain"): (0.1, 0.3),
        ("a", "sude"): (0.5, 0.7),
        ("a", "other"): (0.2, 0.2),
        ("b", "plain"): (0.5, 0.5),
        ("b", "sude"): (0.6, 0.8),
    }
    return pd.DataFrame(
        [
            {"subject": s, "variant": v, "seed": 0, "method": m, "ask": "P1", "share": x}
            for m in ("one", "two")
            for (s, v), both in values.items()
            for x in both
        ]
    )


def test_gains_are_means_of_pairs_with_the_interval_over_subjects() -> None:
    table = gains(small_study(), ("share",), by=("method", "ask")).set_index(["method", "variant"])
    sude = table.loc[("two", "sude")]
    assert sude["mean"] == pytest.approx(0.65) and sude["gain"] == pytest.approx(0.3)
    assert (sude["low"], sude["high"]) == pytest.approx((0.3 - T_1 * 0.1, 0.3 + T_1 * 0.1))
    assert sude["p"] == pytest.approx(mean_interval([0.2, 0.4]).p)
    assert (sude["ask"], sude["measure"], sude["subjects"], sude["runs"]) == ("P1", "share", 2, 2)
    assert len(table) == 6 and np.isnan(table.loc[("one", "plain"), "gain"])


def test_gains_leave_out_what_has_no_partner() -> None:
    table = gains(small_study(), ("share",)).set_index(["method", "variant"])
    other = table.loc[("one", "other")]
    assert other["gain"] == pytest.approx(0.0) and np.isnan(other["low"])  # one subject
    against = gains(small_study(), ("share",), against="other").set_index(["method", "variant"])
    # Subject b has no run of "other": a alone counts, and the mean is over both all the same.
    assert against.loc[("one", "sude"), "gain"] == pytest.approx(0.4)
    assert against.loc[("one", "sude"), "mean"] == pytest.approx(0.65)


# --- what a reader of the tables relies on: names, order, and what counts as independent ----------


def test_a_row_without_an_attribute_is_not_counted_however_it_is_written() -> None:
    rows = [("rex", "plain", 0, "running", 0.2), ("rex", "plain", 0, None, 0.9)]
    runs = per_run(table(rows))
    assert list(runs.columns) == ["subject", "category", "method", "variant", "seed", *MEASURES]
    assert runs["attribute_alignment"].tolist() == [0.2]


def test_summary_keeps_the_order_of_the_runs_and_counts_subjects() -> None:
    # One subject gains 0.2 and the other 0.4, in each of three seeds: two values in truth, not six.
    gain = {"a": 0.2, "b": 0.4}
    rows = [(s, "sude", seed, "running", 0.1 + gain[s]) for s in gain for seed in range(3)]
    rows += [(s, "plain", seed, "running", 0.1) for s in gain for seed in range(3)]
    rows += [("a", "zero", 0, "running", 0.1)]
    rows = [row for row in rows if row[:3] != ("a", "plain", 2)]
    found = summarize(table(rows))
    assert list(found["variant"]) == ["plain", "sude", "zero"]
    sude = found.set_index("variant").loc["sude"]
    assert sude["attribute_alignment_low"] == pytest.approx(0.3 - T_1 * 0.1)
    assert sude["attribute_alignment_high"] == pytest.approx(0.3 + T_1 * 0.1)
    later = [row for row in rows if row[0] == "b" or row[1] == "sude"]
    assert list(summarize(table(later))["variant"]) == ["sude", "plain"]  # as subject a begins


def test_gains_have_their_columns_in_order_and_count_subjects() -> None:
    study = small_study()
    found = gains(study, ("share",))
    names = ["method", "variant", "measure", "mean", "gain", "low", "high", "p"]
    assert list(found.columns) == [*names, "subjects", "runs"]
    assert list(found["variant"]) == ["plain", "sude", "other"] * 2  # as they come, not by name
    assert found.loc[found["variant"] == "plain", ["gain", "low", "high"]].isna().all(axis=None)
    assert all(isinstance(x, float) for x in found["gain"])
    seeds = pd.concat([study.assign(seed=seed) for seed in range(4)])
    sude = gains(seeds, ("share",)).set_index(["method", "variant"]).loc[("one", "sude")]
    assert (sude["low"], sude["high"]) == pytest.approx((0.3 - T_1 * 0.1, 0.3 + T_1 * 0.1))
    assert sude["runs"] == 8 and sude["subjects"] == 2


def test_comparisons_have_their_columns_and_keep_kinds_and_metrics_apart() -> None:
    values = {("SuDe", "rex", 0, n, 0): 0.5 + 0.1 * n for n in range(3)}
    values |= {("plain", "rex", 0, n, 0): 0.2 * n for n in range(3)}
    both = [scores(values, "M").assign(kind=kind) for kind in ("background", "attribute")]
    other = scores({key: 10 * value for key, value in values.items()}, "A")
    found = compare(pd.concat([*both, other]))
    names = ["settings", "variant", "kind", "metric", "pictures", "over", "mean", "low", "high"]
    names += ["against", "pairs", "difference", "difference_low", "difference_high"]
    assert list(found.columns) == names
    asked = [("SuDe", "background", "M"), ("plain", "background", "M"), ("SuDe", "attribute", "M")]
    asked += [("plain", "attribute", "M"), ("SuDe", "attribute", "A"), ("plain", "attribute", "A")]
    # In the order in which they first come.
    assert list(found[["variant", "kind", "metric"]].itertuples(index=False, name=None)) == asked
    sude = found[found["variant"] == "SuDe"]
    assert sude["pairs"].tolist() == [3, 3, 3]
    assert sude["difference"].tolist() == pytest.approx([0.4, 0.4, 4.0])
    assert sude["mean"].tolist() == pytest.approx([0.6, 0.6, 6.0])
