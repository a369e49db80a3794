"""The tables of the guide's page on costs, made from `data/results/gpu.csv`.

    python -m studies.costs            # prints the page with its tables made anew
    python -m studies.costs --write    # puts them into the page

A table stands between `<!-- gpu: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "notebooks/guide/costs.md"
CARD = ROOT / "data/results/gpu.csv"
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
    """Return what is no pair of plain and SuDe: banks, checkpointing, drawing, diffusers' loop."""
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


TABLES = {"machine": machine, "steps": steps, "others": others}


def page(text: str, rows: list[Row]) -> str:
    """Return the page with every table made anew."""

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]](rows)}\n{match[3]}"

    return re.sub(r"(<!-- gpu: (\w+) -->)\n.*?(<!-- end -->)", table, text, flags=re.S)


def read(path: Path = CARD) -> list[Row]:
    """Return the rows that `benchmarks/gpu.sh` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    new = page(PAGE.read_text(encoding="utf-8"), read())
    if "--write" in sys.argv:
        PAGE.write_text(new, encoding="utf-8")
    else:
        print(new)
