"""How long one waits before anything begins: importing sude_lab, and `sude-lab --help`.

    python benchmarks/cold_start.py

Every command is a fresh process, in alternating pairs with `import numpy`; ratios are medians of
the paired ratios, so that a busy machine slows both of a pair. `busy` counts the processor's time
alone (user and system). The first round only fills the file cache.
"""

from __future__ import annotations

import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

import tyro

BASE = "import numpy"
COMMANDS: dict[str, list[str]] = {
    "import sude_lab": ["-c", "import sude_lab"],
    "sude-lab --help": ["-m", "sude_lab", "--help"],
    "sude-lab tune --help": ["-m", "sude_lab", "tune", "--help"],
}
TARGETS = {"import sude_lab": 0.3, "sude-lab --help": 0.5}
"""Seconds on a quiet machine."""


@dataclass(frozen=True)
class Benchmark:
    """What to measure."""

    pairs: int = 11


def seconds_of(command: list[str]) -> tuple[float, float]:
    """Run Python with these arguments; return seconds on the clock and of the processor."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, check=True)
    spent = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(args: Benchmark) -> None:
    """Print a row a command."""
    base = ["-c", BASE]
    for command in (base, *COMMANDS.values()):
        seconds_of(command)
    pairs = {
        name: [(seconds_of(base), seconds_of(command)) for _ in range(args.pairs)]
        for name, command in COMMANDS.items()
    }
    print(
        f"medians of {args.pairs} pairs of processes, {platform.machine()}, {os.cpu_count()} "
        f"cores, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}"
    )
    head = f"{'':22}{'s':>8}{'busy s':>8}{'of import numpy':>17}{'of pairs':>16}{'busy':>8}"
    print(f"{head}{'target s':>10}")
    first = [one for found in pairs.values() for one, _ in found]
    wall, busy = (statistics.median(column) for column in zip(*first, strict=True))
    print(f"{BASE:22}{wall:8.3f}{busy:8.3f}{1:17.2f}{'':>16}{1:8.2f}{'':>10}")
    for name, found in pairs.items():
        wall, busy = (statistics.median(v) for v in zip(*(two for _, two in found), strict=True))
        ratios = [[two[k] / one[k] for one, two in found if one[k]] for k in (0, 1)]
        between = f"{min(ratios[0]):.2f} to {max(ratios[0]):.2f}"
        middle = [statistics.median(some) for some in ratios]
        print(
            f"{name:22}{wall:8.3f}{busy:8.3f}{middle[0]:17.2f}{between:>16}{middle[1]:8.2f}"
            f"{TARGETS.get(name, ''):>10}"
        )


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
