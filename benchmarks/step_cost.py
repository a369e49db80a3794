"""What SuDe costs: seconds a step and peak memory, plain DreamBooth = 1.

    python benchmarks/step_cost.py

Variants take turns in one process (block k of each, then block k + 1 of each), so that whatever
else the machine does hits them alike; the ratio is the median of the paired ratios. Peak memory is
measured in a process of its own for each variant.
"""

from __future__ import annotations

import json
import platform
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

from sude_lab.backbone import EMBEDDED, open_backbone
from sude_lab.toy import study
from sude_lab.tuning import Step, TuningConfig, resolve, tune

VARIANTS: dict[str, dict[str, object]] = {
    "plain": {"weight_sude": 0.0},
    "SuDe, prior current": {"prior": "current"},
    "SuDe, prior pretrained": {"prior": "pretrained"},
}


@dataclass(frozen=True)
class Benchmark:
    """What to measure."""

    backbone: str = EMBEDDED
    blocks: int = 7
    steps: int = 10
    """Steps in a block."""
    train_batch_size: int = 4
    memory_of: str = ""
    """Internal: report the peak memory of one variant and stop."""


def start(args: Benchmark, name: str) -> Iterator[Step]:
    """Return the endless run of one variant."""
    backbone = open_backbone(args.backbone)
    who = study.subject("demo", 0, "dog")
    config = TuningConfig(
        image=Path("dog.png"),
        category="dog",
        backbone=args.backbone,
        max_train_steps=1_000_000,
        train_batch_size=args.train_batch_size,
        **VARIANTS[name],  # type: ignore[arg-type]
    )
    return tune(resolve(config, backbone), backbone, who.picture)


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
    runs = {name: start(args, name) for name in VARIANTS}
    for run in runs.values():
        seconds_of_block(run, args.steps)  # warm up
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(args.blocks):
        for name, run in runs.items():
            times[name].append(seconds_of_block(run, args.steps))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    print(
        f"{args.blocks} blocks of {args.steps} steps, batch {args.train_batch_size}, "
        f"{device or platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}"
    )
    print(f"{'':26}{'s/step':>9}{'ratio':>8}{'peak MiB':>10}{'ratio':>8}")
    base = 0.0
    for name in VARIANTS:
        command = [sys.executable, __file__, "--memory-of", name, "--backbone", args.backbone]
        command += ["--train-batch-size", str(args.train_batch_size)]
        memory = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
        base = base or memory
        ratio = statistics.median(a / b for a, b in zip(times[name], times["plain"], strict=True))
        print(
            f"{name:26}{statistics.median(times[name]):9.4f}{ratio:8.2f}"
            f"{memory:10.0f}{memory / base:8.2f}"
        )


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
