"""The guide's page on costs says what `data/results/gpu.csv` holds."""

import re

from studies import costs

ROWS = costs.read()
PAGE = costs.PAGE.read_text(encoding="utf-8")


def test_the_tables_of_the_page_are_those_of_the_stored_rows() -> None:
    assert re.findall(r"<!-- gpu: (\w+) -->", PAGE) == list(costs.TABLES)
    assert costs.page(PAGE, ROWS) == PAGE


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
