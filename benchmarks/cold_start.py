"""How long one waits: until a command begins, until it draws, and for the demo.

    python benchmarks/cold_start.py --out data/results   # and cold_start.csv, for the guide's table

Every command is a fresh process. Those of COMMANDS alternate with `import numpy`; ratios are
medians of the paired ratios, so that a busy machine slows both of a pair. Those of BEGINNINGS end
when the model is asked for the first time. `busy` counts the processor's time alone (user and
system). The first round only fills the file cache. Of the demo its report says what tuning, drawing
and judging took.
"""

from __future__ import annotations

import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rows import machine, spread, write

from sude_lab.world import subjects as study

BASE = "import numpy"
COMMANDS: dict[str, list[str]] = {
    "import sude_lab": ["-c", "import sude_lab"],
    "sude-lab --help": ["-m", "sude_lab", "--help"],
    "sude-lab tune --help": ["-m", "sude_lab", "tune", "--help"],
}
TARGETS = {"import sude_lab": 0.3, "sude-lab --help": 0.5}
"""Seconds on a quiet machine."""
UNTIL_DRAWING = """
import os, sys
from diffusers import UNet2DConditionModel
from sude_lab.cli import main
UNet2DConditionModel.forward = lambda *_, **__: os._exit(0)
sys.exit(main(sys.argv[1:]) or "The model was not asked.")
"""
GRID = Path(__file__).resolve().parent.parent / "data/grids/w_s.yaml"
PROMPTS = ["--prompt", "photo of a dog", "--prompt", "photo of a cat"]
TUNE = ["tune", "dog.png", "--category", "dog", "--out", "run", "--max-train-steps", "1"]
BEGINNINGS: dict[str, list[str]] = {
    "sude-lab sweep --dry-run": ["-m", "sude_lab", "sweep", str(GRID), "--out", "new", "--dry-run"],
    "sude-lab evaluate, until it draws": ["-c", UNTIL_DRAWING, "evaluate", "run", "--out", "new"],
    "sude-lab classify, until it asks": ["-c", UNTIL_DRAWING, "classify", "dog.png", *PROMPTS],
}
DEMO = ["-m", "sude_lab", "demo", "--out", "demo"]
REPORTED = re.compile(r"took (\d+) s, (\d+) s of\s+the processor")


@dataclass(frozen=True)
class Benchmark:
    """What to measure."""

    pairs: int = 11
    starts: int = 5
    """Of each command that draws or plans."""
    demos: int = 3
    out: Path | None = None
    """Folder for cold_start.csv; none: the table is only printed."""


def seconds_of(command: list[str], folder: Path | None = None) -> tuple[float, float]:
    """Run Python with these arguments; return seconds on the clock and of the processor."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True)
    spent = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr[-500:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def row(what: str, times: list[tuple[float, float]]) -> dict[str, Any]:
    """Return what is written of a command: seconds on the clock and of the processor."""
    seconds, busy = zip(*times, strict=True)
    found = spread("seconds", seconds) | spread("processor_seconds", busy)
    return {"what": what, "times": len(times)} | found


def begun(args: Benchmark) -> list[dict[str, Any]]:
    """Measure what takes seconds until it begins."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        study.subject("demo", 0, "dog").picture.save(folder / "dog.png")
        seconds_of(["-m", "sude_lab", *TUNE, "--num-samples", "0"], folder)
        for what, command in BEGINNINGS.items():
            _, *times = (seconds_of(command, folder) for _ in range(args.starts + 1))
            rows.append(row(what, times))
            print(rows[-1], flush=True)
    return rows


def demo(args: Benchmark) -> list[dict[str, Any]]:
    """Measure the demo: the whole command, and what its report says of itself."""
    whole, inside = [], []
    for _ in range(args.demos):
        with tempfile.TemporaryDirectory() as name:
            whole.append(seconds_of(DEMO, Path(name)))
            page = (Path(name) / "demo" / "report.html").read_text(encoding="utf-8")
        wall, busy = REPORTED.search(page).groups()  # type: ignore[union-attr]
        inside.append((float(wall), float(busy)))
    if not whole:
        return []
    return [row("sude-lab demo", whole), row("of it tuning, drawing, judging", inside)]


def main(args: Benchmark) -> None:
    """Print a row a command."""
    where = machine()
    base = ["-c", BASE]
    for command in (base, *COMMANDS.values()):
        seconds_of(command)
    pairs = {
        name: [(seconds_of(base), seconds_of(command)) for _ in range(args.pairs)]
        for name, command in COMMANDS.items()
    }
    print(
        f"medians of {args.pairs} pairs of processes, {where}, Python {platform.python_version()}"
    )
    head = f"{'':22}{'s':>8}{'busy s':>8}{'of import numpy':>17}{'of pairs':>16}{'busy':>8}"
    print(f"{head}{'target s':>10}")
    first = [one for found in pairs.values() for one, _ in found]
    wall, busy = (statistics.median(column) for column in zip(*first, strict=True))
    print(f"{BASE:22}{wall:8.3f}{busy:8.3f}{1:17.2f}{'':>16}{1:8.2f}{'':>10}")
    rows = [row(BASE, first)]
    for name, found in pairs.items():
        ratios = [[two[k] / one[k] for one, two in found if one[k]] for k in (0, 1)]
        rows.append(row(name, [two for _, two in found]) | spread("ratio", ratios[0]))
        line = rows[-1]
        between = f"{min(ratios[0]):.2f} to {max(ratios[0]):.2f}"
        print(
            f"{name:22}{line['seconds']:8.3f}{line['processor_seconds']:8.3f}{line['ratio']:17.2f}"
            f"{between:>16}{statistics.median(ratios[1]):8.2f}{TARGETS.get(name, ''):>10}",
            flush=True,
        )
    rows += begun(args) + demo(args)
    if args.out is not None:
        write(args.out / "cold_start.csv", [where | line for line in rows])


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
