"""The tables of what things cost, on the guide's pages, made from files of `data/results`.

    python -m studies.costs            # prints the pages with their tables made anew
    python -m studies.costs --write    # puts them into the pages

A table stands between `<!-- FILE: NAME -->` and `<!-- end -->`; without its file it stays.
`benchmarks/cpu.sh` and `benchmarks/gpu.sh` write the files.
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
GUIDE = ROOT / "notebooks/guide"
PAGES = (GUIDE / "costs.md", GUIDE / "installing.md")
RESULTS = ROOT / "data/results"
MODELS = {"sd15": "SD 1.5", "sd3-medium": "SD3 medium", "flux2-klein-4b": "FLUX.2 klein 4B"}
Row = dict[str, str]


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table as Markdown."""
    lines = [list(header)]
    lines += [["---"] * len(lines[0]), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(row: Row) -> str:
    """Return "median [least, most]" seconds of a measurement on a card."""
    return f"{float(row['seconds']):.3f} [{float(row['least']):.3f}, {float(row['most']):.3f}]"


def ends(row: Row, name: str, digits: int = 2) -> str:
    """Return "median [least, most]" of a column that has both beside it, "" where it is empty."""
    numbers = [row[name + end] for end in ("", "_least", "_most")]
    if not numbers[0]:
        return ""
    middle, least, most = (f"{float(number):.{digits}f}" for number in numbers)
    return f"{middle} [{least}, {most}]"


def where(rows: list[Row]) -> str:
    """Return the machines of some rows, and what load they had when the rows were measured."""
    loads: dict[str, list[float]] = {}
    for row in rows:
        loads.setdefault(row["machine"], []).extend([float(row["load"])] if row.get("load") else [])
    said = []
    for name, load in loads.items():
        among = sorted({min(load), max(load)} if load else ())
        text = " to ".join(f"{value:g}" for value in among)
        said.append(name + (f", beside a load of {text}" if text else ""))
    return "; ".join(said)


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
    lines: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        point = float(row["x"]), float(row["processor_seconds"])
        rounds = lines.setdefault((row["panel"], row["variant"]), {})
        rounds.setdefault(row.get("round", ""), []).append(point)
    cells = []
    for names, found in lines.items():
        points = [(x[0][0], [y for _, y in x]) for x in zip(*found.values(), strict=True)]
        middle = [(x, statistics.median(y)) for x, y in points]
        cells.append(
            (
                *(*names, f"{points[0][0]:g}", f"{points[-1][0]:g}"),
                f"{within(points[0][1])} to {within(points[-1][1])}",
                within([power(x) for x in found.values()], power(middle)),
            )
        )
    header = ("what grows", "variant", "from", "to", "s", "power")
    told = "Medians of 7 rounds, whose spread and machine were not kept."
    if "round" in rows[0]:
        number = len(next(iter(lines.values())))
        told = f"Medians of {number} rounds, with the least and the most of them: {where(rows)}."
    return f"{markdown(header, cells)}\n\n{told}"


def within(values: list[float], middle: float | None = None) -> str:
    """Return "median [least, most]" of some values, or the only one."""
    text = f"{statistics.median(values) if middle is None else middle:.2f}"
    return text if len(values) == 1 else f"{text} [{min(values):.2f}, {max(values):.2f}]"


def power(points: list[tuple[float, float]], last: int = 3) -> float:
    """Return p of y ~ x^p through the last points, by least squares of the logarithms."""
    x, y = ([math.log(value) for value in values] for values in zip(*points[-last:], strict=True))
    return statistics.linear_regression(x, y).slope


def step_cost(rows: list[Row]) -> str:
    """Return the seconds of a step on a CPU and their ratios to plain ones, with the machine."""
    lines = (
        (
            *(row["variant"], row["batch"], ends(row, "seconds", 3), ends(row, "ratio", 3)),
            row["peak_mib"],
        )
        for row in rows
    )
    table = markdown(("variant", "batch", "s a step", "plain = 1", "peak MiB"), lines)
    blocks = f"Medians of {rows[0]['blocks']} blocks of {rows[0]['steps']} steps, with the least"
    return f"{table}\n\n{blocks} and the most of them: {where(rows)}."


def shared(rows: list[Row]) -> str:
    """Return what the two questions share: a count, no measurement."""
    lines = []
    for row in rows:
        part = int(row["shared"]) / int(row["operations"])
        whole = f"{int(row['operations']) / 1e9:.1f}"
        lines.append((row["model"], whole, f"{part:.1%}", f"{1 - part / 5:.3f}"))
    header = ("model", "Gflop a row", "before the words", "a step with SuDe, shared")
    return markdown(header, lines)


def against(rows: list[Row]) -> str:
    """Return our speed beside the script's, and what of its step are parts that we do without."""
    lines = []
    for row in rows:
        if row["side"] == "diffusers":
            parts = [f"{float(row[name]):.0%}" for name in ("VAE encoder", "text encoder", "AdamW")]
        else:
            parts = ["", "", f"{float(row['AdamW']):.0%}"]
        name = (row["model"], row["pixels"], row["batch"], row["side"], row["blocks"])
        speeds = ends(row, "speed"), ends(row, "processor_speed")
        lines.append((*name, ends(row, "seconds", 3), *speeds, *parts))
    header = ["model", "pixels", "batch", "who", "blocks", "s a step", "speed"]
    header += ["by processor time", "VAE", "prompt", "AdamW"]
    scripts = ", ".join(sorted({row["script"] for row in rows}))
    told = f"Medians of blocks, least and most; script of diffusers {scripts}: {where(rows)}."
    return f"{markdown(header, lines)}\n\n{told}"


def cold_start(rows: list[Row]) -> str:
    """Return how long one waits for a command."""
    lines = (
        (
            *(row["what"], row["times"]),
            *(ends(row, "seconds"), ends(row, "processor_seconds"), ends(row, "ratio")),
        )
        for row in rows
    )
    header = ("what", "times", "s", "s of the processor", "of `import numpy`")
    return f"{markdown(header, lines)}\n\nMedians, least and most: {where(rows)}."


def busy(rows: list[Row]) -> str:
    """Return steps with SuDe, alone and beside busy processes, by how threads wait."""
    lines = (
        (row["beside"], row["setting"], ends(row, "seconds", 1), ends(row, "ratio")) for row in rows
    )
    header = ("busy processes beside", "threads", f"s, {rows[0]['steps']} steps", "one thread = 1")
    told = f"Medians of {rows[0]['rounds']} rounds, least and most: {where(rows)}."
    return f"{markdown(header, lines)}\n\n{told}"


TABLES: dict[str, dict[str, Callable[[list[Row]], str]]] = {
    "step_cost": {"steps": step_cost},
    "shared": {"shares": shared},
    "against_diffusers": {"speeds": against},
    "growth": {"powers": growth},
    "cold_start": {"waiting": cold_start},
    "gpu": {"machine": machine, "steps": steps, "others": others},
    "busy": {"settings": busy},
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
    for path in PAGES:
        new = page(path.read_text(encoding="utf-8"))
        if "--write" in sys.argv:
            path.write_text(new, encoding="utf-8")
        else:
            print(new)
