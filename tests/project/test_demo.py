"""The demo writes what it says, and its page needs no network."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image
from refusals import content

from sude_lab.cli import Demo, main
from sude_lab.demo import REPORT, RESULTS, STEPS, STRIP, run_demo, table_with_intervals
from sude_lab.errors import UserError
from sude_lab.evaluate.fronts import MARGIN
from sude_lab.evaluate.statistics import mean_interval
from sude_lab.evaluate.stored import RESULTS as STORED
from sude_lab.runs.folder import ENVIRONMENT, Run

COLUMNS = {
    "subject",
    "category",
    "method",
    "weight_sude",
    "truncate",
    "seed",
    "attribute",
    "attribute_alignment",
    "subject_fidelity",
    "category_alignment",
}


@pytest.fixture(scope="module", autouse=True)
def _tiny_model(tiny_data: Path) -> Iterator[None]:
    """The tiny model in the embedded one's place, whose demo `.ci/run` runs whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUDE_LAB_DATA", str(tiny_data))
        yield


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "out"
    words = ["demo", "--out", str(out), "--num-images", "2", "--max-train-steps", "3"]
    assert main(words) == 0
    return out


@pytest.mark.quick
def test_results_are_tidy(demo: Path) -> None:
    table = pd.read_csv(demo / RESULTS)
    assert set(table.columns) >= COLUMNS
    assert set(table["variant"]) == {"untuned model", "plain", "sude", "sude, no truncation"}
    assert table["attribute_alignment"].between(0, 1).all()
    assert (table.groupby(["variant", "prompt"]).size() == 2).all()


@pytest.mark.quick
def test_the_page_is_whole_and_needs_no_network(demo: Path) -> None:
    page = (demo / REPORT).read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert not re.search(r"\$|{{|{%|{#", re.sub(r"base64,[^'\"]*", "", page))  # all is filled in
    assert page.count("<img") >= 3 + 4 * 5
    assert "[" in page and "rho" in page


def test_each_run_takes_the_steps_that_its_row_needs(demo: Path) -> None:
    runs = {name: Run.open(demo / "runs" / name) for name in ("plain", "sude")}
    runs["never"] = Run.open(demo / "runs" / "sude-no-truncation")
    assert {name: len(run.metrics()) for name, run in runs.items()} == {
        "plain": 3,
        "sude": 3,
        "never": 2,  # half of them
    }
    watched = {name: run.metrics()["rho"].notna().tolist() for name, run in runs.items()}
    assert watched == {"plain": [True, False, False], "sude": [True] * 3, "never": [True] * 2}
    page = (demo / REPORT).read_text(encoding="utf-8")
    assert "in every 4th step" in page and "<td>2</td>" in page


@pytest.mark.quick
@pytest.mark.parametrize(("arm", "weight_sude"), [("plain", 0.0), ("sude", 2.0)])
def test_half_the_usual_steps_lose_nothing(arm: str, weight_sude: float) -> None:
    """What the demo's 100 steps are based on, from the stored lines of 36 subjects."""
    table = pd.read_csv(STORED / "fair.csv", keep_default_na=False)
    line = table[(table["arm"] == arm) & (table["w_s"] == weight_sude)].set_index("subject")
    short, usual = (line[line["strength"] == strength] for strength in (str(STEPS), ""))
    assert (usual["steps"] == 200).all() and len(short) == len(usual) == 36
    fidelity = mean_interval(short["subject_fidelity"] - usual["subject_fidelity"])
    assert fidelity.low > -MARGIN
    assert mean_interval(short["attribute_alignment"] - usual["attribute_alignment"]).low > 0
    assert Demo(out=Path()).max_train_steps == STEPS


def test_the_report_says_what_it_took(demo: Path) -> None:
    page = (demo / REPORT).read_text(encoding="utf-8")
    took = r"Tuning, drawing and judging took (\d+) s, (\d+) s of\s+the processor"
    (spent,) = re.findall(took, page)
    seconds = [Run.open(f).environment["seconds"] for f in (demo / "runs").iterdir()]
    assert int(spent[0]) >= round(sum(seconds)) and int(spent[1]) > 0


def test_a_second_call_keeps_finished_runs(demo: Path) -> None:
    weights = demo / "runs" / "sude" / "weights"
    before = {f: f.stat().st_mtime_ns for f in weights.iterdir()}
    first = pd.read_csv(demo / RESULTS)
    again = run_demo(demo, num_images=2, max_train_steps=3, progress=False)
    assert {f: f.stat().st_mtime_ns for f in weights.iterdir()} == before
    pd.testing.assert_series_equal(
        first["attribute_alignment"], again["attribute_alignment"], check_exact=True
    )


def test_a_demo_of_other_settings_is_refused(demo: Path) -> None:
    before = content(demo)
    for settings in ({"max_train_steps": 4}, {"seed": 99}):
        with pytest.raises(UserError, match="other settings"):
            run_demo(demo, num_images=2, progress=False, **settings)
    assert content(demo) == before


@pytest.mark.parametrize("name", ["subject.png", RESULTS, REPORT, STRIP])
def test_somebody_elses_file_is_left_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    before = content(tmp_path)
    with pytest.raises(UserError, match=f"{name} is .*another --out"):
        run_demo(tmp_path, num_images=1, max_train_steps=1, progress=False)
    assert content(tmp_path) == before


def test_another_picture_of_a_subject_is_left_alone(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "subject.png")
    before = content(tmp_path)
    with pytest.raises(UserError, match="another picture"):
        run_demo(tmp_path, num_images=1, max_train_steps=1, progress=False)
    assert content(tmp_path) == before


def test_a_run_whose_environment_is_damaged_says_so(demo: Path, tmp_path: Path) -> None:
    for text in ("{half", "3"):
        (tmp_path / ENVIRONMENT).write_text(text)
        run = replace(Run.open(demo / "runs" / "plain"), folder=tmp_path)
        with pytest.raises(UserError, match=r"is damaged .*: tune again"):
            assert run.environment


def test_intervals_hold_their_means(demo: Path) -> None:
    means = table_with_intervals(pd.read_csv(demo / RESULTS, keep_default_na=False))
    for name in ("attribute_alignment", "subject_fidelity"):
        assert (means[f"{name}_low"] <= means[name]).all()
        assert (means[name] <= means[f"{name}_high"]).all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"category": "horse"}, "horse"),
        ({"num_images": 0}, "--num-images is 0"),
        ({"max_train_steps": 0}, "--max-train-steps is 0"),
        ({"seed": -1}, "--seed is -1"),
    ],
)
def test_bad_settings_write_nothing(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        run_demo(tmp_path / "out", progress=False, **settings)
    assert not (tmp_path / "out").exists()
