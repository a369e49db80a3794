"""The guide's page on costs says what `data/results/gpu.csv` and its like hold."""

import re
from pathlib import Path

import pandas as pd

from studies import costs

ROWS = costs.read("gpu")
PAGE = costs.PAGE.read_text(encoding="utf-8")


def test_the_tables_of_the_page_are_those_of_the_stored_rows() -> None:
    known = [(file, name) for file, names in costs.TABLES.items() for name in names]
    assert re.findall(r"<!-- (\w+): (\w+) -->", PAGE) == known
    assert costs.page(PAGE) == PAGE


def test_the_power_is_that_of_the_largest_points() -> None:
    assert costs.power([(1, 7.0), (2, 4.0), (4, 16.0), (8, 64.0)]) == "2.00"
    words = " ".join(PAGE.split())
    powers = {
        tuple(cells[:2]): float(cells[-1])
        for line in costs.growth(costs.read("growth")).splitlines()[2:]
        for cells in [[part.strip() for part in line.strip("|").split("|")]]
    }
    plain, sude = (powers["picture", name] for name in ("plain", "SuDe"))
    assert f"side^{plain:.1f} to side^{sude:.1f}" in words
    assert f"to the power {powers['prompts', 'all to the end']:.2f} when all" in words


def test_step_costs_replace_the_table_once_they_are_measured(tmp_path: Path) -> None:
    row = {"machine": "a quiet one", "variant": "plain", "batch": 4, "blocks": 7, "steps": 8}
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
