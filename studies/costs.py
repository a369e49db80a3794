"""The tables of the guide's page on costs, made from `gpu.csv`, `growth.csv` and, where it has been
measured, `step_cost.csv` in `data/results`.

    python -m studies.costs            # prints the page with its tables made anew
    python -m studies.costs --write    # puts them into the page

A table stands between `<!-- FILE: NAME -->` and `<!-- end -->`; without its file it stays.
"""

from __future__ import annotations

import csv
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "notebooks/guide/costs.md"
RESULTS = ROOT / "data/results"
MODELS = {"sd15": "SD 1.5", "sd3-medium": "SD3 medium", "flux2-klein-4b": "FLUX.2 klein 4B"}
Row = dict[str, str]


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table as Markdown."""
    lines = [list(header)]
    lines += [["---"] * len(lines[0]), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(row: Row) -> str:
    """Return "median [least, most]" seconds of a measurement."""
    return f"{float(row['seconds']):.3f} [{float(row['least']):.3f}, {float(row['most']):.3f}]"


def steps(rows: list[Row]) -> str:
    """Return the seconds and the memory of a step, plain beside SuDe, a line a setting."""
    pairs: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        if row["variant"] in ("plain", "SuDe") and not row["error"]:
            pairs.setdefault((row["model"], row["method"], row["batch"]), {})[row["variant"]] = row
    lines = []
    for (model, method, batch), pair in pairs.items():
        if len(pair) < 2:
            continue
        plain, sude = pair["plain"], pair["SuDe"]
        lines.append(
            (
                *(MODELS.get(model, model), method, batch, spread(plain), spread(sude)),
                f"{float(sude['seconds']) / float(plain['seconds']):.2f}",
                f"{float(plain['peak_gib']):.1f}, {float(sude['peak_gib']):.1f}",
                f"{float(sude['share']):.0%}",
            )
        )
    header = ("model", "method", "batch", "plain, s a step", "SuDe, s a step", "ratio")
    return markdown((*header, "peak GiB", "of the card"), lines)


def others(rows: list[Row]) -> str:
    """Return what is no pair of plain and SuDe: checkpointing, drawing, diffusers' loop."""
    lines = [
        (
            *(MODELS.get(row["model"], row["model"]), row["method"], row["variant"], row["batch"]),
            spread(row) if row["least"] else f"{float(row['seconds']):.3f}",
            f"{float(row['peak_gib']):.1f}",
            row["note"],
        )
        for row in rows
        if row["seconds"] and row["variant"] not in ("plain", "SuDe") and row["method"] != "machine"
    ]
    header = ("model", "method", "what", "batch", "seconds", "peak GiB", "note")
    return markdown(header, lines)


def machine(rows: list[Row]) -> str:
    """Return the line that says on which card all of it was measured."""
    (row,) = [row for row in rows if row["method"] == "machine"]
    return f"One {row['card']}: {row['note']}."


def growth(rows: list[Row]) -> str:
    """Return how processor time grows: its ends, and the power of x over the three largest x."""
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        point = float(row["x"]), float(row["processor_seconds"])
        lines.setdefault((row["panel"], row["variant"]), []).append(point)
    header = ("what grows", "variant", "from", "to", "s", "power")
    return markdown(
        header,
        (
            (*names, f"{x[0][0]:g}", f"{x[-1][0]:g}", f"{x[0][1]:.2f} to {x[-1][1]:.2f}", power(x))
            for names, x in lines.items()
        ),
    )


def power(points: list[tuple[float, float]], last: int = 3) -> str:
    """Return p of y ~ x^p through the last points, by least squares of the logarithms."""
    x, y = ([math.log(value) for value in values] for values in zip(*points[-last:], strict=True))
    return f"{statistics.linear_regression(x, y).slope:.2f}"


def step_cost(rows: list[Row]) -> str:
    """Return the seconds of a step on a CPU and their ratios to plain ones, with the machine."""
    lines = (
        (
            *(row["variant"], row["batch"]),
            *(
                f"{float(row[n]):.3f} [{float(row[n + '_least']):.3f}, "
                f"{float(row[n + '_most']):.3f}]"
                for n in ("seconds", "ratio")
            ),
            row["peak_mib"],
        )
        for row in rows
    )
    table = markdown(("variant", "batch", "s a step", "plain = 1", "peak MiB"), lines)
    blocks = f"Medians of {rows[0]['blocks']} blocks of {rows[0]['steps']} steps, with the least"
    return f"{table}\n\n{blocks} and the most of them: {rows[0]['machine']}."


TABLES: dict[str, dict[str, Callable[[list[Row]], str]]] = {
    "step_cost": {"steps": step_cost},
    "growth": {"powers": growth},
    "gpu": {"machine": machine, "steps": steps, "others": others},
}


def page(text: str, results: Path = RESULTS) -> str:
    """Return the page with every table made anew."""

    def table(match: re.Match[str]) -> str:
        if not (results / f"{match[2]}.csv").is_file():
            return match[0]
        return f"{match[1]}\n{TABLES[match[2]][match[3]](read(match[2], results))}\n{match[4]}"

    return re.sub(r"(<!-- (\w+): (\w+) -->)\n.*?(<!-- end -->)", table, text, flags=re.S)


def read(name: str, results: Path = RESULTS) -> list[Row]:
    """Return the rows of one of the files."""
    with (results / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    new = page(PAGE.read_text(encoding="utf-8"))
    if "--write" in sys.argv:
        PAGE.write_text(new, encoding="utf-8")
    else:
        print(new)
