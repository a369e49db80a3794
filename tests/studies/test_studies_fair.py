"""The registered comparison: its subjects, its lines, and what its report says of made-up rows."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from studies import fair, fair_report, registered, stopping, where
from studies.runs import GRIDS
from sude_lab.evaluate import fronts, stored
from sude_lab.evaluate.metrics import MEASURES
from sude_lab.evaluate.statistics import Interval, holm
from sude_lab.sweep.grid import make_plan, read_grid
from sude_lab.sweep.sweep import RESULTS
from sude_lab.world import drawing as world


def rows(bonus: float, n: int = 36) -> pd.DataFrame:
    """Lines of n subjects; with SuDe each one is better by `bonus` at every fidelity."""
    rng = np.random.default_rng(0)
    level = rng.normal(0, 0.05, n)
    points = [("plain", 0.0, s, k) for s, k in (("8", 1), ("40", 2), ("", 4), ("scale=0.5", 3))]
    points += [("sude", w, s, k) for w in (1.0, 2.0) for s, k in (("25", 1), ("50", 2.5), ("", 4))]
    table = [
        {
            **{"arm": arm, "settings": "dreambooth", "w_s": w_s, "strength": strength},
            **{"variant": f"SuDe, weight_sude {w_s}" if w_s else "plain", "steps": 200},
            **{"subject": f"s{i}", "category": "dog", "subject_fidelity": 0.15 * k + level[i]},
            "attribute_alignment": 1 - 0.1 * k + bonus * (arm == "sude") + 0.02 * rng.normal(),
            "category_alignment": 0.9,
        }
        for arm, w_s, strength, k in points
        for i in range(n)
    ]
    return pd.DataFrame(table)


@pytest.mark.parametrize(
    ("bonus", "says"), [(0.1, "better"), (-0.1, "worse"), (0.0, "no difference")]
)
def test_the_report_says_what_the_rows_hold(bonus: float, says: str) -> None:
    lines = fair_report.lines_of(rows(bonus))
    assert "plain, composition" not in lines  # its runs are not there
    table = fronts.family(lines, registered.PRIMARY)
    assert list(table["fidelity"]) == ["0.75", "0.85", "0.95", "0.75 to 0.95"]
    assert list(table["says"]) == [says] * 3 + [""]
    assert table["gain"].map(lambda gain: abs(gain.mean - bonus) < 0.02).all()
    assert table["p, Holm"].notna().sum() == 3  # the area is no fourth test


def test_category_and_cost_are_read_where_alignment_is() -> None:
    table = rows(0.1)
    table.loc[table["arm"] == "sude", "category_alignment"] = 0.7
    lines = fair_report.lines_of(table)
    category = fair_report.lines_of(table.assign(attribute_alignment=table["category_alignment"]))
    about = lines, category, registered.PRIMARY, fronts.SHARES
    gains = [row["gain"].mean for row in fair_report.other_rows(*about)]
    assert gains == pytest.approx([-0.2] * 3)
    at = fronts.places(lines, category, table, fair_report.asks(table)).set_index(
        ["line", "fidelity"]
    )
    passes = at.loc["plain, steps", "passes"]
    assert passes["0.95"] > passes["0.75"]
    # Fidelity rises with the step alike in both, and a step with SuDe has three passes.
    assert at.loc[("SuDe 1, steps", "0.75"), "passes"] == pytest.approx(
        3 * np.interp(0.75 * 4, [1, 2.5, 4], [25, 50, 200]), rel=0.05
    )


def test_a_fidelity_that_a_line_does_not_reach_is_no_gain() -> None:
    table = rows(0.1)
    low = table[(table["arm"] == "plain") | (table["strength"] == "25")]
    shown = fronts.family(fair_report.lines_of(low), registered.PRIMARY)
    assert list(shown["says"]) == ["not reached"] * 3 + [""]
    more = {"arm": "one", "against": "other", "fidelity": "0.75", "gain": Interval(1, 0.1, 1.9, 9)}
    shown = fronts.family(fair_report.lines_of(low), registered.PRIMARY, [more | {"p": 0.02}])
    assert shown["p, Holm"].iloc[-1] == pytest.approx(4 * 0.02)  # three more were asked


def test_what_the_correction_takes_away_is_not_said() -> None:
    """An interval below 0 whose corrected p is not below .05 says nothing, neither way."""
    below = Interval(-0.05, -0.09, -0.01, 36)
    assert fronts.says(below, 0.06) == "cannot tell"
    assert fronts.says(below, 0.04) == "worse"
    assert fronts.says(Interval(0.0, -0.03, 0.03, 36), 1.0) == "no difference"


def test_the_report_is_written_with_its_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "RESULTS", tmp_path)
    monkeypatch.setattr(fair_report, "RESULTS", tmp_path)
    rows(0.1).to_csv(tmp_path / "fair.csv", index=False)
    text = fair_report.main(fair_report.ReportConfig())
    assert "36 subjects" in text and text == (tmp_path / "fair.md").read_text()
    assert (tmp_path / "fair.png").is_file()


@pytest.mark.parametrize(
    ("on", "arm", "each", "points"),
    [
        ("held-out", "plain", 4, 12),
        ("held-out", "sude", 4, 12),
        ("held-out", "drawn", 4, 7),
        ("confirm", "plain", 8, 8),
        ("confirm", "sude", 8, 8),
        ("confirm", "sude_backgrounds", 8, 8),
        ("flow", "plain", 1, 9),
        ("flow", "sude", 1, 12),
        ("flow", "lora_plain", 1, 9),
        ("flow", "lora_sude", 1, 12),
        ("others", "custom_diffusion_plain", 1, 8),
        ("others", "custom_diffusion_sude", 1, 8),
        ("others", "textual_inversion_plain", 1, 7),
        ("others", "textual_inversion_sude", 1, 8),
        ("others", "vico_plain", 1, 6),
        ("others", "vico_sude", 1, 8),
        ("preservation", "plain", 2, 8),
        ("preservation", "sude", 2, 8),
        ("preservation", "rate_class_images", 2, 8),
        ("preservation", "rate_semantic", 2, 8),
    ],
)
def test_the_registered_grids_are_of_as_many_subjects_a_category(
    on: registered.On, arm: str, each: int, points: int, tmp_path: Path
) -> None:
    assert arm in registered.GROUPS[on].arms
    grid = fair.grid_file(arm, on, tmp_path)
    plan = make_plan(read_grid(grid), tmp_path / "out")
    of = {job.label["subject"]: job.label["category"] for job in plan.jobs}
    assert pd.Series(of).value_counts().to_dict() == dict.fromkeys(world.CATEGORIES, each)
    assert all(job.config.seed == 0 and job.asked["seed"] == 500 for job in plan.jobs)
    assert sum(len(job.strengths) for job in plan.jobs) == 9 * each * points
    method = re.sub("_?(plain|sude)$", "", arm) if on == "others" else "dreambooth"
    backbone = "embedded-flow" if on == "flow" else "embedded"
    assert {(job.config.method, job.config.backbone) for job in plan.jobs} == {(method, backbone)}
    if method == "dreambooth":
        assert {job.config.train for job in plan.jobs} == {"lora" if "lora" in arm else "unet"}
    if arm != "rate_class_images":
        assert {job.label["settings"] for job in plan.jobs} == {method}  # as END reads it


def test_preservation_is_compared_with_the_confirmations_own_runs(tmp_path: Path) -> None:
    """The same names of runs and of scores: nothing is tuned or drawn anew."""
    folder = GRIDS / "others"
    for arm in ("plain", "sude"):
        plans = [
            make_plan(read_grid(fair.grid_file(arm, on, tmp_path)), tmp_path / on)
            for on in ("confirm", "preservation")
        ]
        both, ours = ({(job.key, job.rows) for job in plan.jobs} for plan in plans)
        assert ours < both
    plain = yaml.safe_load((folder / "plain.yaml").read_text()) | {"w_s": [0]}
    for arm, own in [("class_images", "prior_loss_weight"), ("semantic", "regularizer_file")]:
        grid = yaml.safe_load((folder / f"rate_{arm}.yaml").read_text())
        assert grid["settings"].pop(own)
        assert grid | {"w_s": [0]} == plain | {"strengths": grid["strengths"]}


def test_subjects_of_the_groups_are_new_or_said_to_be_shared() -> None:
    of = {on: set(group.subjects.split()) for on, group in registered.GROUPS.items()}
    before = set().union(*(of[on] for on in of if on != "others"))
    assert of["others"] & before == {"held-out"}
    assert of["preservation"] < of["confirm"]


def test_a_lora_is_compared_with_a_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "RESULTS", tmp_path)
    monkeypatch.setattr(fair_report, "RESULTS", tmp_path)
    of_all, of_lora = rows(0.0, 9), rows(0.3, 9)
    of_lora["arm"] = "lora_" + of_lora["arm"]
    pd.concat([of_all, of_lora]).to_csv(tmp_path / "flow.csv", index=False)
    text = fair_report.main(fair_report.ReportConfig("flow"))
    assert "data/grids/flow.md" in text and "9 subjects" in text
    found = re.split(r"^## (.*)", text, flags=re.M)[1:]
    primary = dict(zip(found[::2], found[1::2], strict=True))
    gains = {
        title: float(re.findall(r"\| 0.75 .*?\| ([+-]\d\.\d+)", primary[title])[0])
        for title in ("Primary contrasts", "LoRA: Primary contrasts")
    }
    assert abs(gains["Primary contrasts"]) < 0.05
    assert abs(gains["LoRA: Primary contrasts"] - 0.3) < 0.05
    assert (tmp_path / "flow.png").is_file()


def test_three_methods_are_one_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "RESULTS", tmp_path)
    monkeypatch.setattr(fair_report, "RESULTS", tmp_path)
    tables = []
    for method, bonus in zip(registered.METHODS, (0.0, 0.3, -0.3), strict=True):
        tables.append(rows(bonus, 9).assign(settings=method))
        tables[-1]["arm"] = f"{method}_" + tables[-1]["arm"]
    pd.concat(tables).to_csv(tmp_path / "others.csv", index=False)
    text = fair_report.main(fair_report.ReportConfig("others"))
    primary = re.split(r"^## .*", text.split("## Primary contrasts")[1], flags=re.M)[0]
    cells = [[c.strip() for c in r.split("|")[1:-1]] for r in primary.splitlines()[4:] if r]
    says = {(arm, at): said for arm, _, at, *_, said in cells if "to" not in at}
    assert len(says) == 9
    assert {arm: says[arm, "0.8"] for arm, _ in says} == {
        "custom diffusion: SuDe": "no difference",
        "textual inversion: SuDe": "better",
        "vico: SuDe": "worse",
    }
    p, corrected = np.array([[float(c[4]), float(c[6])] for c in cells if "to" not in c[2]]).T
    assert corrected == pytest.approx(holm(p), abs=2e-3)  # over all nine
    assert "## vico: Where the lines are read" in text and (tmp_path / "others.png").is_file()


def test_what_keeps_the_category_is_compared_with_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "RESULTS", tmp_path)
    monkeypatch.setattr(fair_report, "RESULTS", tmp_path)
    table = rows(0.0, 18)
    kept = rows(0.2, 18).query("arm == 'sude'")
    kept = [kept.assign(arm=f"rate_{arm}", variant=arm) for arm in ("class_images", "semantic")]
    for one in kept:
        one["variant"] += one["w_s"].astype(str)
    pd.concat([table, *kept]).to_csv(tmp_path / "preservation.csv", index=False)
    text = fair_report.main(fair_report.ReportConfig("preservation"))
    primary = text.split("## Primary contrasts")[1].split("## Secondary")[0]
    assert primary.count("| better") == 12 and "| SuDe   " not in primary.split("against")[0]


def test_what_sude_adds_to_the_error_is_paired_by_subject() -> None:
    rows = [
        {"subject": who, "w_s": w_s, "step": step, "loss": base + w_s * k, "along_d": 0.0}
        for k, (who, base) in enumerate([("a", 1.0), ("b", 5.0), ("c", 9.0)], start=1)
        for w_s in where.WEIGHTS
        for step in where.STEPS
    ]
    shown = where.added(pd.DataFrame(rows)).set_index(["of", "w_s"])["added"]
    # 1, 2, 3: their mean, and t = 4.303 times 1 / sqrt(3).
    assert shown["loss", 1.0] == "+2.00000 [-0.48414, +4.48414]"
    assert shown["along_d", 2.0] == "+0.00000 [+0.00000, +0.00000]"


def test_backgrounds_stand_beside_the_attributes_of_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fair, "RESULTS", tmp_path)
    about = {"subject": "s", "category": "dog", "settings": "dreambooth", "variant": "plain"}
    about |= {"w_s": 0.0, "strength": None, "steps": 200, "rho": 1.0, "open_gates": 0.0}
    of_attributes = [
        about | {"attribute": "running", "background": "", "metric": metric, "value": 0.5}
        for metric in MEASURES
    ]
    of_backgrounds = [
        about | {"attribute": "", "background": place, "value": value} | {"metric": metric}
        for place, value in [("at night", 1.0), ("in the snow", 0.5), ("in the snow", 0.0)]
        for metric in ("background_alignment", "category_alignment")
    ]
    for arm, table in [("plain", of_attributes), ("plain_backgrounds", of_backgrounds)]:
        folder = tmp_path / "fair" / "confirm" / arm
        folder.mkdir(parents=True)
        pd.DataFrame(table).to_parquet(folder / RESULTS)
    config = fair.FairConfig(("plain", "plain_backgrounds"), on="confirm", run=False, out=tmp_path)
    (row,) = fair.main(config).to_dict("records")
    assert (row["category_alignment"], row["background_alignment"]) == (0.5, 0.625)
    assert row["arm"] == "plain"


def test_prompts_weigh_alike_in_a_subjects_mean(tmp_path: Path) -> None:
    about = {"subject": "s", "category": "dog", "settings": "", "variant": "plain"}
    about |= {"w_s": 0.0, "strength": None}
    about |= {"steps": 200, "rho": 1.0, "open_gates": 0.0, "metric": "attribute_alignment"}
    values = [("running", 1.0), ("running", 1.0), ("running", 1.0), ("standing", 0.0)]
    pd.DataFrame([about | {"attribute": a, "value": v} for a, v in values]).to_parquet(
        tmp_path / RESULTS
    )
    (row,) = fair.subject_rows("plain", tmp_path).to_dict("records")
    assert row["attribute_alignment"] == 0.5 and row["strength"] == "" and row["arm"] == "plain"


def test_a_rule_that_knows_when_gains_what_a_common_number_of_steps_loses() -> None:
    # Alignment falls to 0 at once after a step of the subject's own; the signal says when.
    kept, ends = np.arange(1, 201), (20, 60, 120)
    ways = [
        stopping.Way(
            kept, np.stack([np.full(200, 0.5), kept <= end], 1), np.where(kept < end, 1.0, 0)
        )
        for end in ends
    ]
    row = stopping.compared(ways, 0.5)
    assert row["stops"] == "20 to 120" and row["alignment"] == 1
    assert row["steps"] <= 20 and row["gain"] == "+0.000 [+0.000, +0.000]"  # all may stop early
    late = [w._replace(values=w.values + np.stack([kept / 200, 0 * kept], 1)) for w in ways]
    row = stopping.compared(late, 0.5)  # now fidelity grows with steps: an early stop is no match
    assert row["steps"] == 67 and row["their alignment"] == pytest.approx(1 / 3)
    assert row["gain"].startswith("+0.667")
    never = [w._replace(signal=w.signal + 1) for w in ways]
    assert stopping.compared(never, 0.5)["stops"] == "200 to 200"
