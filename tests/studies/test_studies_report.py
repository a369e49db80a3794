"""The tables of a study, against a study small enough to work out by hand."""

from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

from studies import report
from sude_lab.evaluate.metrics import per_run
from sude_lab.io.opening import data_folder
from sude_lab.world import drawing as world


def hand_made() -> pd.DataFrame:
    """Two subjects, one seed: SuDe adds 0.4 and 0.2 to the alignment and takes 0.1 of fidelity."""
    rows = []
    for subject, category, plain, sude in (
        ("held-out-0-dog", "dog", 0.2, 0.6),
        ("held-out-7-teapot", "teapot", 0.5, 0.7),
    ):
        for variant, alignment in (("plain", plain), ("sude", sude)):
            own = 0.99 if variant == "plain" else 0.9
            for attribute in ("", *world.ATTRIBUTES[category][1:]):
                rows.append(
                    {
                        "subject": subject,
                        "category": category,
                        "method": "textual_inversion",
                        "variant": variant,
                        "seed": 0,
                        "attribute": attribute,
                        "attribute_alignment": alignment if attribute else own,
                        "subject_fidelity": 0.5 if variant == "plain" else 0.4,
                        "category_alignment": 1.0,
                        "open_gates": 0.0 if variant == "plain" else 0.25,
                        "rho": float("nan") if variant == "plain" else 0.8,
                    }
                )
    return pd.DataFrame(rows)


def test_what_was_seen_while_tuning_counts_once_a_run() -> None:
    """However many pictures a run has: one with three times as many rows weighs the same."""
    table = hand_made()
    first = table["subject"] == table["subject"].iloc[0]
    table.loc[first & (table["variant"] == "sude"), ["open_gates", "rho"]] = 0.75, 1.2
    more = pd.concat([table, table[first], table[first]])
    _, sude = report.means_table(more).to_dict("records")
    assert (sude["open gates"], sude["rho"]) == ("50%", "1.00")


def test_means_and_gains_with_the_interval_of_two_subjects() -> None:
    plain, sude = report.means_table(hand_made()).to_dict("records")
    assert plain["attribute alignment"] == "0.35" and plain["open gates"] == ""
    # Student's t on two subjects, which gain 0.2 and 0.4: mean -+ 12.7 times half their distance.
    assert sude["attribute alignment"] == "0.65 (+0.30 [-0.97, +1.57])"
    assert sude["subject fidelity"] == "0.40 (-0.10 [-0.10, -0.10])"
    assert sude["open gates"] == "25%" and sude["rho"] == "0.80" and sude["runs"] == "2 x 1"
    assert sude["method"] == "textual inversion"


def test_a_row_a_subject_beside_the_untuned_model() -> None:
    dog, teapot = report.subjects_table(hand_made()).to_dict("records")
    assert (dog["alignment, plain"], dog["alignment, sude"]) == ("0.20", "0.60")
    assert (teapot["fidelity, plain"], teapot["fidelity, sude"]) == ("0.50", "0.40")
    card = pd.read_csv(data_folder() / "embedded" / "alignment.csv")
    dogs = card[(card["category"] == "dog") & (card["attribute"] != "sitting")]
    assert dog["untuned"] == f"{dogs['attribute_alignment'].mean():.2f}"


def test_it_writes_the_tables_and_the_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hand_made().to_csv(tmp_path / "study.csv", index=False)
    report.main(report.ReportConfig(tmp_path / "study.csv"))
    text = (tmp_path / "study.md").read_text()
    assert "0.65 (+0.30 [-0.97, +1.57])" in text and text.strip() in capsys.readouterr().out
    assert (tmp_path / "study.png").stat().st_size > 5_000


def test_a_search_is_a_table_of_its_settings(tmp_path: Path) -> None:
    """Every subject counts alike: (0.2 + 0.5) / 2, though the dog has more attributes."""
    table = hand_made().replace({"variant": {"plain": "lr=1,w=0", "sude": "lr=1,w=2"}})
    table.to_csv(tmp_path / "search.csv", index=False)
    plain, sude = report.settings_table(table).to_dict("records")
    assert plain["settings"] == "lr=1, w=0" and plain["attribute alignment"] == "0.35"
    assert sude["attribute alignment"] == "0.65" and sude["subjects"] == "dog, teapot"
    assert (plain["open gates"], sude["open gates"]) == ("", "25%")
    report.main(report.ReportConfig(tmp_path / "search.csv"))
    assert "lr=1, w=2" in (tmp_path / "search.md").read_text()
    assert not (tmp_path / "search.png").exists()


def test_an_arrow_leads_from_the_plain_run_to_the_one_with_sude() -> None:
    ax = report.paired_runs(Figure().subplots(), per_run(hand_made()))
    arrows = [text for text in ax.texts if text.arrow_patch is not None]
    starts = [value for a in arrows for value in a.xyann]
    ends = [value for a in arrows for value in a.xy]
    assert starts == pytest.approx([0.5, 0.2, 0.5, 0.5])
    assert ends == pytest.approx([0.4, 0.6, 0.4, 0.7])
    assert ax.get_xlabel() == "subject fidelity"
