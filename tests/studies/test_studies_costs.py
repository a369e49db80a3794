"""The guide's pages on costs say what `data/results/gpu.csv` and its like hold, no more."""

import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from studies import costs

ROWS = costs.read("gpu")
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in costs.PAGES}
PAGE = PAGES["costs"]
OWN = r"<!-- \w+: \w+ -->.*?<!-- end -->|```.*?```|`[^`]*`"
"""What is no prose: tables of files, and commands."""
MEASURED = r"\d+\.\d+|\d+(?= (?:s|ms|%|MiB|GiB|GB|minutes)\b)|\d+ %"


def test_the_tables_of_the_pages_are_those_of_the_stored_rows() -> None:
    known = [(file, name) for file, names in costs.TABLES.items() for name in names]
    assert re.findall(r"<!-- (\w+): (\w+) -->", "".join(PAGES.values())) == known
    for page in PAGES.values():
        assert costs.page(page) == page


def test_no_measured_number_stands_outside_of_the_tables_but_those_that_tests_compute() -> None:
    """The full size's sentences are checked below; 1.3, 60 s and 12 GB are goals."""
    prose = re.sub(r"\[[^\]]*\]\([^)]*\)", "", re.sub(OWN, "", PAGE, flags=re.S))
    cpu, full_size = prose.split("## Full size")
    names = r"Stable Diffusion [\d.]+|SD 1\.5|FLUX\.2"
    assert re.findall(MEASURED, re.sub(names, "", cpu)) == ["1.3"]
    left = set(re.findall(MEASURED, re.sub(names, "", full_size)))
    assert left <= {
        "1.28",
        "1.55",
        "1.20",
        "1.78",
        "3 %",
        "3",
        "89",
        "100",
        "60",
        "6.8",
        "5.4",
        "12",
    }


def test_the_power_is_that_of_the_largest_points() -> None:
    assert costs.power([(1, 7.0), (2, 4.0), (4, 16.0), (8, 64.0)]) == pytest.approx(2)


def grown(round_: str, factor: float) -> list[dict[str, str]]:
    shared = {"machine": "a quiet one", "load": "0.1", "round": round_, "panel": "batch"}
    shared |= {"variant": "plain"}
    return [shared | {"x": str(x), "processor_seconds": str(factor * x)} for x in (1, 2, 4, 8)]


def test_growth_of_several_rounds_has_its_spread() -> None:
    rows = [row for k, factor in enumerate((1.0, 2.0, 4.0)) for row in grown(str(k), factor)]
    rows[-1]["processor_seconds"] = "64"  # the last round grows faster
    said = costs.growth(rows)
    assert "| 2.00 [1.00, 4.00] to 16.00 [8.00, 64.00] | 1.00 [1.00, 1.50] |" in said
    assert "Medians of 3 rounds" in said and "a quiet one, beside a load of 0.1" in said


MEASUREMENT = {"machine": "a quiet one", "load": 0.1}


@pytest.mark.parametrize(
    ("file", "row", "names", "expected"),
    [
        (
            "cold_start",
            {"what": "sude-lab demo", "times": 3, "ratio": "", "ratio_least": "", "ratio_most": ""},
            ("seconds", "processor_seconds"),
            "| sude-lab demo | 3 | 0.50 [0.25, 0.75] | 0.50 [0.25, 0.75] |  |",
        ),
        (
            "busy",
            {"beside": 2, "setting": "asleep", "rounds": 3, "steps": 40},
            ("seconds", "ratio"),
            "| 2 | asleep | 0.5 [0.2, 0.8] | 0.50 [0.25, 0.75] |",
        ),
        (
            "against_diffusers",
            {"script": "0.40", "model": "m", "pixels": 64, "batch": 4, "side": "sude_lab"}
            | {"blocks": 9, "VAE encoder": 0, "text encoder": 0, "AdamW": 0.05},
            ("seconds", "speed", "processor_speed"),
            "| m | 64 | 4 | sude_lab | 9 | 0.500 [0.250, 0.750] | 0.50 [0.25, 0.75] | "
            "0.50 [0.25, 0.75] |  |  | 5% |",
        ),
    ],
)
def test_what_is_measured_comes_into_its_table(
    file: str, row: dict[str, Any], names: tuple[str, ...], expected: str, tmp_path: Path
) -> None:
    for name in names:
        row = row | {name: 0.5, f"{name}_least": 0.25, f"{name}_most": 0.75}
    pd.DataFrame([MEASUREMENT | row]).to_csv(tmp_path / f"{file}.csv", index=False)
    page = PAGES["installing" if file == "busy" else "costs"]
    new = costs.page(page, tmp_path)
    assert expected in new and "a quiet one, beside a load of 0.1." in new
    assert re.sub(OWN, "", new, flags=re.S) == re.sub(OWN, "", page, flags=re.S)


def test_step_costs_replace_the_table_once_they_are_measured(tmp_path: Path) -> None:
    row: dict[str, Any] = {
        "machine": "a quiet one",
        "variant": "plain",
        "batch": 4,
        "blocks": 7,
        "steps": 8,
    }
    for name in ("seconds", "ratio"):
        row |= {name: 0.5, f"{name}_least": 0.25, f"{name}_most": 0.75}
    pd.DataFrame([row | {"peak_mib": 100}]).to_csv(tmp_path / "step_cost.csv", index=False)
    new = costs.page(PAGE, tmp_path)
    assert "| plain | 4 | 0.500 [0.250, 0.750] | 0.500 [0.250, 0.750] | 100 |" in new
    assert "Medians of 7 blocks of 8 steps" in new and "a quiet one" in new
    assert new.split("<!-- end -->")[1:] == PAGE.split("<!-- end -->")[1:]


def test_the_sentences_of_the_page_say_what_the_rows_say() -> None:
    words = " ".join(PAGE.split())
    ratios: dict[str, list[float]] = {"SD 1.5": [], "flow": []}
    for line in costs.steps(ROWS).splitlines()[2:]:
        model, _, _, _, _, ratio, *_ = (part.strip() for part in line.strip("|").split("|"))
        ratios[model if model in ratios else "flow"].append(float(ratio))
    low, high = min(ratios["SD 1.5"]), max(ratios["SD 1.5"])
    assert f"a step with SuDe costs {low:.2f} to {high:.2f} plain ones" in words
    assert f"flow models {min(ratios['flow']):.2f} to {max(ratios['flow']):.2f}" in words
    (long,) = (row for row in ROWS if row["variant"] == "SuDe, 400 steps")
    assert (
        f"{long['steps']} steps of ViCo with SuDe took {float(long['total_seconds']):.0f} s"
        in words
    )
    assert 400 * float(long["seconds"]) < 105
    lora = {r["variant"]: float(r["peak_gib"]) for r in ROWS if r["method"] == "dreambooth lora"}
    assert lora["SuDe, checkpointing"] < lora["SuDe"] < 12
    assert f"at {lora['SuDe, checkpointing']:.1f} with gradient checkpointing" in words


def test_a_row_that_failed_is_in_no_table() -> None:
    failed = {**ROWS[2], "model": "none", "seconds": "", "least": "", "error": "out of memory"}
    assert costs.steps([*ROWS, failed]) == costs.steps(ROWS)
    assert costs.others([*ROWS, failed]) == costs.others(ROWS)
