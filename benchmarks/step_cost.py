"""What SuDe costs: seconds a step and peak memory, plain DreamBooth = 1.

    python benchmarks/step_cost.py --out data/results   # and step_cost.csv, for the guide's table

Variants take turns in one process (block k of each, then block k + 1 of each), so that whatever
else the machine does hits them alike; the ratio is the median of the paired ratios, least and most
of the blocks beside it. Peak memory is measured in a process of its own for each variant.

A step of plain DreamBooth is a forward and a backward, which costs two forwards: three units. SuDe
with prior `current` adds one forward of twice the rows without autograd, two units: 5/3 is the
least that it can cost.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rows import machine, spread, write

from sude_lab.config import EMBEDDED, TuningConfig
from sude_lab.io.opening import open_backbone
from sude_lab.methods import configure
from sude_lab.runs.prepare import prepared_tuning as tune
from sude_lab.tuning import Step
from sude_lab.world import subjects as study

VARIANTS: dict[str, dict[str, object]] = {
    "plain": {"weight_sude": 0.0},
    "SuDe, prior current": {"prior": "current"},
    "SuDe, prior pretrained": {"prior": "pretrained"},
    "SuDe, every 2nd step": {"prior": "pretrained", "sude_every": 2},
}


@dataclass(frozen=True)
class Benchmark:
    """What to measure."""

    backbone: str = EMBEDDED
    blocks: int = 7
    steps: int = 10
    """Steps in a block."""
    train_batch_size: int = 4
    out: Path | None = None
    """Folder for step_cost.csv; none: the table is only printed."""
    memory_of: str = ""
    """Internal: report the peak memory of one variant and stop."""


def settings_of(args: Benchmark, name: str) -> TuningConfig:
    """Return the settings of one variant."""
    return TuningConfig(
        image=Path("dog.png"),
        category="dog",
        backbone=args.backbone,
        max_train_steps=1_000_000,
        train_batch_size=args.train_batch_size,
        **VARIANTS[name],  # type: ignore[arg-type]
    )


def start(args: Benchmark, name: str) -> Iterator[Step]:
    """Return the endless run of one variant."""
    backbone = open_backbone(args.backbone)
    config = configure(settings_of(args, name), backbone)
    return tune(config, backbone, study.subject("demo", 0, "dog").picture)


def seconds_of_block(run: Iterator[Step], steps: int) -> float:
    """Return the seconds of one step, averaged over a block."""
    began = time.perf_counter()
    for _ in range(steps):
        next(run)
    return (time.perf_counter() - began) / steps


def peak_memory(args: Benchmark, name: str) -> float:
    """Return the peak memory in MiB of a process that runs one block of one variant."""
    seconds_of_block(start(args, name), args.steps)
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main(args: Benchmark) -> None:
    """Print the table."""
    if args.memory_of:
        print(json.dumps(peak_memory(args, args.memory_of)))
        return
    measure(args)


def measure(args: Benchmark) -> None:
    """Measure all variants, and print what was found."""
    runs = {name: start(args, name) for name in VARIANTS}
    for run in runs.values():
        seconds_of_block(run, args.steps)  # warm up
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(args.blocks):
        for name, run in runs.items():
            times[name].append(seconds_of_block(run, args.steps))
    where = machine(device="cuda" if torch.cuda.is_available() else "cpu")
    print(f"{args.blocks} blocks of {args.steps} steps, batch {args.train_batch_size}, {where}")
    print(f"{'':26}{'s/step':>9}{'ratio':>8}{'of blocks':>16}{'peak MiB':>10}{'ratio':>8}")
    base, rows = 0.0, []
    for name in VARIANTS:
        command = [sys.executable, __file__, "--memory-of", name, "--backbone", args.backbone]
        command += ["--train-batch-size", str(args.train_batch_size)]
        memory = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
        base = base or memory
        ratios = [a / b for a, b in zip(times[name], times["plain"], strict=True)]
        between = f"{min(ratios):.2f} to {max(ratios):.2f}"
        rows.append(
            where
            | {"variant": name, "batch": args.train_batch_size}
            | {"blocks": args.blocks, "steps": args.steps}
            | spread("seconds", times[name])
            | spread("ratio", ratios)
            | {"peak_mib": round(memory)}
        )
        print(
            f"{name:26}{statistics.median(times[name]):9.4f}{statistics.median(ratios):8.2f}"
            f"{between:>16}{memory:10.0f}{memory / base:8.2f}"
        )
    if args.out:
        write(args.out / "step_cost.csv", rows)
    print(f"The floor of prior current is 5/3 = {5 / 3:.2f}.")


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
