"""The tables made of stored results, against studies small enough to work out by hand."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from studies import tables
from studies.guidance_tables import at_equal_fidelity, rule_name
from studies.runs import scores
from sude_lab.errors import UserError
from sude_lab.evaluate import stored
from sude_lab.evaluate.metrics import PAIR, compare, gains
from sude_lab.evaluate.statistics import holm, verdict

DOG, CAT = "held-out-0-dog", "held-out-1-cat"
NEVER = "prior=current,truncate=false"
PLAIN_SUDE = ("plain", "sude")
GAIN = {0.0: 0.0, 0.5: 0.1, 1.0: 0.2, 2.0: 0.4, 4.0: 0.3}


def row(subject: str, variant: str, alignment: float, **more: Any) -> dict[str, Any]:
    told = {"subject": subject, "method": "dreambooth", "variant": variant, "seed": 0}
    told |= {"category": subject.split("-")[-1], "weight_sude": 2.0, "steps": 200}
    told |= {"attribute": "running", "prompt": "photo of a running <sks> dog", "image": 0}
    told |= {"attribute_alignment": alignment, "subject_fidelity": 0.5, "category_alignment": 1.0}
    return told | {"open_gates": 0.3, "rho": 1.1} | more


def dosed(method: str, factors: tuple[float, ...]) -> list[dict[str, Any]]:
    """Two subjects: the dog gains GAIN, the cat half of it."""
    default = tables.WEIGHTS[method]
    return [
        row(
            subject,
            f"weight_sude={factor * default:g}",
            0.2 + share * GAIN[factor],
            method=method,
            weight_sude=factor * default,
            subject_fidelity=0.5 - 0.1 * (factor == 4),
        )
        for factor in factors
        for subject, share in ((DOG, 1.0), (CAT, 0.5))
    ]


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    pd.DataFrame(rows).to_csv(folder / f"{name}.csv", index=False)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(stored, "RESULTS", tmp_path)
    write(tmp_path, "w_s", dosed("dreambooth", tuple(GAIN)))
    methods = ("custom_diffusion", "vico")
    write(tmp_path, "methods_w_s", [r for m in methods for r in dosed(m, (0.5, 2.0))])
    held_out = []
    for method in tables.WEIGHTS:
        for r in dosed(method, (0.0, 1.0)):
            held_out.append(r | {"variant": "plain" if r["weight_sude"] == 0 else "sude"})
    write(tmp_path, "held_out", held_out)
    truncation = [
        row(
            s,
            variant,
            alignment,
            category_alignment=category,
            truncate="truncate=false" not in variant,
        )
        for s in (DOG, CAT)
        for variant, alignment, category in (
            ("weight_sude=0", 0.2, 1.0),
            ("weight_sude=2", 0.4, 1.0),
            ("truncate=false", 0.3, 0.9),
            (NEVER, 0.1, 0.2),
            ("prior=current", 0.4, 1.0),
            ("truncate_at=0.5", 0.3, 1.0),
            ("truncate_at=1.5", 0.35, 1.0),
        )
    ]
    write(tmp_path, "truncation", truncation)
    prompts, images = [], []
    for s in (DOG, CAT):
        for variant, plus in (("plain", 0.0), ("sude", 0.2)):
            for ask, alignment in (("P1", 0.3), ("P2", 0.4), ("P3", 0.5)):
                prompts.append(row(s, variant, alignment + plus, ask=ask, background_alignment=0.9))
            for ask in ("background", "attribute and background"):
                prompts.append(
                    row(s, variant, 0.5 + plus, ask=ask, background_alignment=0.6 - plus)
                )
        for variant in ("prior_loss_weight=1,weight_sude=0", "prior_loss_weight=1"):
            images.append(row(s, variant, 0.35, ask="P1", background_alignment=0.9))
            images.append(row(s, variant, 0.5, ask="background", background_alignment=0.8))
    write(tmp_path, "prompts", prompts)
    write(tmp_path, "class_images", images)
    return tmp_path


def test_table_1_has_the_best_of_three_and_the_choice_of_the_others(results: Path) -> None:
    table = tables.table1().set_index("method")
    assert set(table.index) == {"dreambooth", "custom diffusion", "vico"}
    line = table.loc["dreambooth"]
    assert line["plain"] == "0.20"
    # The dog gains 0.2 and the cat 0.1 at w_s: Student's t, 12.7 times half their distance.
    assert line["1 w_s"] == "+0.15 [-0.49, +0.79]"
    assert line["best"] == line["2 w_s"] == "+0.30 [-0.97, +1.57]"
    assert line["chosen by the others"] == line["2 w_s"]


def test_the_best_flatters_and_the_others_choice_does_not(results: Path) -> None:
    rows = tables.by_factor(stored.read("w_s"))
    luck = (rows["subject"] == CAT) & (rows["factor"] == 0.5)
    rows.loc[luck, "attribute_alignment"] = 0.9
    told = tables.best_factors(rows).set_index("subject")
    assert told.loc[CAT, "best"] == pytest.approx(0.7)
    assert told.loc[CAT, "chosen by the others"] == pytest.approx(0.2)  # the dog chooses 2 w_s
    assert told.loc[DOG, "chosen by the others"] == pytest.approx(0.1)  # the cat chooses 0.5 w_s


def test_fig_4_compares_with_no_sude(results: Path) -> None:
    table = tables.fig4().set_index("variant")
    assert list(table.index) == ["0 w_s", "0.5 w_s", "1 w_s", "2 w_s", "4 w_s"]
    assert table.loc["0 w_s", "attribute alignment"] == "0.20"
    assert table.loc["2 w_s", "attribute alignment"] == "0.50 (+0.30 [-0.97, +1.57])"
    assert table.loc["4 w_s", "subject fidelity"] == "0.40 (-0.10 [-0.10, -0.10])"
    assert table.loc["4 w_s", "runs"] == "2 x 1"


def test_fig_5_names_gates_and_judges(results: Path) -> None:
    table = tables.fig5().set_index("variant")
    assert list(table.index)[:2] == ["plain", "SuDe, stops at rho = 1"]
    assert table.loc["never stops, prior current", "category alignment"].startswith("0.20 (-0.80")
    assert len(table) == 7


def test_prompts_and_edits_are_compared_within_what_was_asked(results: Path) -> None:
    table = tables.table2().set_index(["ask", "variant"])
    assert table.loc[("P3", "sude"), "attribute alignment"] == "0.70 (+0.20 [+0.20, +0.20])"
    both = tables.fig6().set_index("variant")
    assert both.loc["plain", "both"] == "0.30"
    assert both.loc["sude", "both"].startswith("0.28 (-0.02")
    edits = tables.fig8().set_index(["edit", "variant"])
    assert edits.loc[("background", "class images"), "alignment"].startswith("0.80 (+0.20")
    assert edits.loc[("attribute", "class images"), "alignment"].startswith("0.35 (+0.05")
    assert [v for e, v in edits.index if e == "attribute"] == [
        "plain",
        "class images",
        "sude",
        "SuDe and class images",
    ]


def test_claims_agree_or_disagree_or_cannot_be_told(results: Path) -> None:
    table = tables.claims().set_index("claim")
    # Where all subjects change alike the interval has no width, and p is 0.
    assert table.loc["never stopping costs the category", "seen here"] == "+0.80 [+0.80, +0.80]"
    assert table.loc["never stopping costs the category", "verdict"] == "agrees"
    assert table.loc["fidelity holds: ViCo", "by itself"] == "no difference"
    assert table.loc["attribute and background combine", "verdict"] == "disagrees"
    # The dog gains 0.10 and the cat 0.05, and two subjects tell little.
    assert table.loc["4 w_s raises alignment over 1 w_s", "seen here"] == "+0.07 [-0.24, +0.39]"
    assert table.loc["4 w_s raises alignment over 1 w_s", "by itself"] == "cannot tell"
    assert set(table["verdict"]) <= {"agrees", "disagrees", "no difference", "cannot tell"}


def test_holm_s_correction_can_only_take_back(results: Path) -> None:
    table = pd.DataFrame(
        [
            row(s, v, 0.5 + c * (v == "sude"))
            for s, c in (("a", 0.3), ("b", 0.31))
            for v in PLAIN_SUDE
        ]
    )
    change, p = tables._change(table, "plain", "sude", tables.ALIGNMENT)
    assert verdict(change) == "agrees" and 0.01 < p < 0.05
    assert verdict(change, p=holm([p] * 18)[0]) == "cannot tell"


def test_missing_studies_are_named(results: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.csv is missing"):
        stored.read("nothing")


def test_a_stored_table_is_read_as_it_was_written() -> None:
    for name, made in (("fig4", tables.fig4()), ("table1", tables.table1())):
        pd.testing.assert_frame_equal(stored.table(name), made)
    held_out = stored.table("held_out")  # the first of two
    assert held_out.columns[1] == "" and len(held_out) == 8


def test_a_stored_table_has_the_schema_of_evaluations(results: Path) -> None:
    table = scores(stored.read("prompts").head(2))
    assert len(table) == 2 * 4  # alignment, fidelity, category, background
    first = table[(table["metric"] == "attribute_alignment")].iloc[0]
    assert (first["tuning_seed"], first["seed"], first["picture"]) == (0, 500, 0)
    assert (first["subject"], first["kind"], first["settings"]) == (DOG, "attribute", "dreambooth")
    assert {*PAIR, "method", "variant", "metric", "value"} <= set(table)
    nothing = pd.DataFrame([row(DOG, "plain", float("nan"), attribute=None)])
    nothing = scores(nothing)
    assert nothing["metric"].tolist() == ["subject_fidelity", "category_alignment"]
    assert nothing["kind"].tolist() == ["plain"] * 2


def test_one_schema_one_answer() -> None:
    """The stored study, compared as evaluations are, has the gains and intervals of `gains`."""
    table = stored.read("held_out")
    table = table[table["attribute"].fillna("") != ""]
    compared = compare(scores(table)).set_index(["settings", "variant", "metric"])
    for change in gains(table).to_dict("records"):
        line = compared.loc[(change["method"], change["variant"], change["measure"])]
        assert line["mean"] == pytest.approx(change["mean"], abs=1e-9)
        for name, other in (("gain", ""), ("low", "_low"), ("high", "_high")):
            expected = pytest.approx(change[name], abs=1e-9, nan_ok=True)
            assert line[f"difference{other}"] == expected


# --- rules at equal fidelity ---------------------------------------------------------------------


def points(rule: str, rows: list[tuple[float, float, float]], shift: float) -> list[dict[str, Any]]:
    return [
        {
            "subject": subject,
            "method": "dreambooth",
            "variant": rule_name(rule, strength),
            "rule": rule if strength else "plain",
            "strength": strength,
            "seed": 0,
            "attribute": "running",
            "subject_fidelity": fidelity + sign * shift,
            "attribute_alignment": alignment + sign * shift,
            "category_alignment": 1.0,
        }
        for subject, sign in (("a", 1), ("b", -1))
        for strength, fidelity, alignment in rows
    ]


def test_equal_fidelity_is_read_between_two_strengths() -> None:
    """By hand: at fidelity -0.3 guidance is half-way from g = 1 to 2, composition before 1."""
    table = pd.DataFrame(
        [
            *points("guidance", [(0.0, -0.1, 0.2), (1.0, -0.2, 0.6), (2.0, -0.4, 0.8)], 0.01),
            *points("composition", [(1.0, -0.5, 0.6)], 0.01),
            *points("sude-tuned", [(1.0, -0.3, 0.9)], 0.01),
        ]
    )
    found = at_equal_fidelity(table).set_index("rule")
    assert found.loc["guidance", "strength"] == pytest.approx(1.5)
    assert found.loc["guidance", "alignment"] == pytest.approx(0.7)
    assert found.loc["guidance", "difference"] == pytest.approx(-0.2)
    assert found.loc["composition", "strength"] == pytest.approx(0.5)
    assert found.loc["composition", "alignment"] == pytest.approx(0.4)
    # Both subjects are shifted alike in every variant: the interval has no width.
    assert found["low"].to_numpy() == pytest.approx(found["difference"].to_numpy())
    assert found["high"].to_numpy() == pytest.approx(found["difference"].to_numpy())


def test_a_rule_that_keeps_more_is_read_at_its_greatest_strength() -> None:
    table = pd.DataFrame(
        [
            *points("guidance", [(0.0, -0.1, 0.2), (1.0, -0.2, 0.6)], 0.0),
            *points("composition", [(1.0, -0.15, 0.3)], 0.0),
            *points("sude-tuned", [(1.0, -0.3, 0.9)], 0.0),
        ]
    )
    found = at_equal_fidelity(table).set_index("rule")
    assert list(found["strength"]) == [1.0, 1.0]
    assert list(found["fidelity"]) == pytest.approx([-0.2, -0.15])
    with pytest.raises(UserError, match="--sude-weights"):
        at_equal_fidelity(table, against=2.0)
