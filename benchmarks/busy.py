"""Steps with SuDe on a machine that others keep busy, by what is said to torch's threads.

    python benchmarks/busy.py --out data/results      # busy.csv; nothing else may run

Threads that wait for each other awake take the processor from those they wait for. Each setting is
a process of its own; all take turns, a block of steps each: alone, beside one busy process, and
beside as many as there are cores. `ratio` is a block's time over that of one thread in the same
round and situation. On a busy machine `sude-lab` and the first cell of a lesson set "asleep".
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rows import machine, spread, write
from step_cost import Benchmark as Steps
from step_cost import start

from sude_lab.config import EMBEDDED

SETTINGS: dict[str, dict[str, str]] = {
    "one thread": {"OMP_NUM_THREADS": "1"},
    "awake, as torch starts": {},
    "asleep": {"OMP_WAIT_POLICY": "PASSIVE"},
    "awake for 1,000 turns": {"GOMP_SPINCOUNT": "1000"},
    "awake for 10,000 turns": {"GOMP_SPINCOUNT": "10000"},
}
"""What stands in the environment before torch is loaded."""
BUSY = "import os\nwhile os.getppid() == {}: pass"


@dataclass(frozen=True)
class Benchmark:
    """What to measure."""

    out: Path | None = None
    """Folder for busy.csv; none: the rows are only printed."""
    backbone: str = EMBEDDED
    settings: tuple[str, ...] = tuple(SETTINGS)
    rounds: int = 3
    steps: int = 40
    """Steps with SuDe in a block."""
    others: tuple[int, ...] = (1, os.cpu_count() or 1)
    """How many busy processes are beside it, one situation after another."""
    worker: bool = False
    """Internal: this process takes the steps of one setting."""


def work(args: Benchmark) -> None:
    """Take a block of steps for each line that comes, and say how many seconds it took."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    run = start(Steps(args.backbone), "SuDe, prior pretrained")
    for line in sys.stdin:
        began, busy = time.perf_counter(), time.process_time()
        for _ in range(int(line)):
            next(run)
        spent = time.perf_counter() - began, time.process_time() - busy
        print(json.dumps(spent), file=out, flush=True)


class Worker:
    """The process of one setting; it sleeps until it is asked for steps."""

    def __init__(self, args: Benchmark, setting: str) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
        command = [sys.executable, __file__, "--worker", "--backbone", args.backbone]
        how: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        how |= {"env": kept | SETTINGS[setting]}
        self.process = subprocess.Popen(command, **how)

    def block(self, steps: int) -> tuple[float, float]:
        """Return a block's seconds: on the clock, and of the processor."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        seconds, busy = json.loads(self.process.stdout.readline())
        return seconds, busy


@contextlib.contextmanager
def others(number: int) -> Any:
    """Keep the machine busy with some processes meanwhile; they end with this one, too."""
    command = [sys.executable, "-c", BUSY.format(os.getpid())]
    busy = [subprocess.Popen(command) for _ in range(number)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def main(args: Benchmark) -> None:
    """Measure all settings in turns, and print and write their rows."""
    if args.worker:
        work(args)
        return
    where = machine(os.cpu_count())
    workers = {name: Worker(args, name) for name in args.settings}
    for worker in workers.values():
        worker.block(2)  # opens the model, and warms up
    found: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for k in range(args.rounds):
        order = [*args.settings[k % len(workers) :], *args.settings[: k % len(workers)]]
        for number in (0, *args.others):
            with others(number):
                for name in order:
                    times = workers[name].block(args.steps)
                    found.setdefault((number, name), []).append(times)
                    print(f"round {k + 1}, beside {number}, {name}: {times[0]:.1f} s", flush=True)
    for worker in workers.values():
        worker.process.communicate()
    rows = []
    for (number, name), times in sorted(found.items(), key=lambda item: item[0][0]):
        base = found[number, args.settings[0]]
        ratios = [mine[0] / one[0] for mine, one in zip(times, base, strict=True)]
        rows.append(
            where
            | {"beside": number, "setting": name, "rounds": args.rounds, "steps": args.steps}
            | spread("seconds", [seconds for seconds, _ in times])
            | spread("ratio", ratios)
            | spread("processor_seconds", [busy for _, busy in times])
        )
    for row in rows:
        print(
            f"beside {row['beside']}: {row['setting']:26}{row['seconds']:8.1f} s, "
            f"{row['ratio']:.2f} [{row['ratio_least']:.2f}, {row['ratio_most']:.2f}] "
            f"of {args.settings[0]}"
        )
    if args.out is not None:
        write(args.out / "busy.csv", rows)


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
