"""What five runs cost together: a w_s sweep in lockstep against the same runs one by one.

    python benchmarks/lockstep.py

Separate runs and lockstep, both asking the prior in every step and both from a prior bank, take
turns in one process (a block of each run, then a block of all together), so that whatever else the
machine does hits them alike. The price is the time of a step of all five, in units of the mean
step of a separate run without a bank: the median of the paired ratios. What it costs to build the
bank is not in it (`step_cost.py` measures that). On a busy machine --clock cpu counts processor
time instead of time on the wall. That the results are equal is measured too: the largest
difference of a trained number between lockstep and separate runs after --check-steps steps.
"""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from sude_lab.backbone import Backbone
from sude_lab.config import EMBEDDED
from sude_lab.io.opening import open_backbone
from sude_lab.sweep.lockstep import tune_together
from sude_lab.tuning import Step, TuningConfig, tune
from sude_lab.world import subjects as study

METHODS: dict[str, dict[str, Any]] = {
    "textual_inversion": {"method": "textual_inversion"},
    "lora": {"method": "dreambooth", "train": "lora"},
}


@dataclass(frozen=True)
class Benchmark:
    """What to measure."""

    backbone: str = EMBEDDED
    methods: tuple[str, ...] = ("textual_inversion", "lora")
    batch_sizes: tuple[int, ...] = (1, 4)
    w_s: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 4.0)
    pairs: int = 128
    """Pairs of the prior bank."""
    blocks: int = 7
    steps: int = 5
    """Steps in a block."""
    check_steps: int = 5
    threads: int = 0
    """Threads of torch; 0: its own choice."""
    clock: Literal["wall", "cpu"] = "wall"
    device: str = "auto"


def configs(
    args: Benchmark, method: str, size: int, steps: int, pairs: int = 0
) -> list[TuningConfig]:
    """Return the members of the sweep."""
    base = TuningConfig(
        image=Path("dog.png"),
        category="dog",
        backbone=args.backbone,
        prior_bank=pairs,
        max_train_steps=steps,
        train_batch_size=size,
        **METHODS[method],
    )
    return [replace(base, weight_sude=w) for w in args.w_s]


def difference(
    args: Benchmark, backbone: Backbone, method: str, size: int, pairs: int
) -> tuple[float, float]:
    """Return the largest difference of a trained number, and how far training moved one."""
    picture = study.subject("demo", 0, "dog").picture
    members = configs(args, method, size, args.check_steps, pairs)
    joint = tune_together(members, backbone, picture)
    start: dict[str, torch.Tensor] = {}
    for together in joint:
        assert not any(isinstance(step, ValueError) for step in together), together
        start = start or together[0].method.state_dict()  # type: ignore[union-attr]
    apart = moved = 0.0
    for config, step in zip(members, together, strict=True):
        (*_, last) = tune(config, backbone.copy(), picture)
        ours, theirs = step.method.state_dict(), last.method.state_dict()  # type: ignore[union-attr]
        apart = max(apart, *((ours[k] - theirs[k]).abs().max().item() for k in theirs))
        moved = max(moved, *((start[k] - theirs[k]).abs().max().item() for k in theirs))
    return apart, moved


def seconds_a_step(run: Iterator[Any], args: Benchmark) -> float:
    """Return the seconds of one step, averaged over a block."""
    clock: Callable[[], float] = time.process_time if args.clock == "cpu" else time.perf_counter
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
    began = clock()
    for _ in range(args.steps):
        next(run)
    if cuda:
        torch.cuda.synchronize()
    return (clock() - began) / args.steps


def measure(args: Benchmark, backbone: Backbone, method: str, size: int) -> None:
    """Print a line for asking in every step, and one for a bank."""
    picture = study.subject("demo", 0, "dog").picture
    separate: dict[int, list[Iterator[Step]]] = {}
    together: dict[int, Iterator[Any]] = {}
    for pairs in (0, args.pairs):
        members = configs(args, method, size, 1_000_000, pairs)
        separate[pairs] = [tune(c, backbone.copy(), picture) for c in members]
        together[pairs] = tune_together(members, backbone, picture)
        for run in (*separate[pairs], together[pairs]):
            seconds_a_step(run, args)  # warm up
    times: dict[tuple[int, str], list[float]] = {}
    for _ in range(args.blocks):
        for pairs, runs in separate.items():
            alone = sum(seconds_a_step(run, args) for run in runs)
            times.setdefault((pairs, "separate"), []).append(alone)
            joint = seconds_a_step(together[pairs], args)
            times.setdefault((pairs, "lockstep"), []).append(joint)
    units = [alone / len(args.w_s) for alone in times[0, "separate"]]
    for pairs in separate:
        apart, moved = difference(args, backbone, method, size, pairs)
        print(f"{method:18}{size:6}{'bank' if pairs else 'asked':>7}", end="")
        for kind in ("separate", "lockstep"):
            found = times[pairs, kind]
            prices = [a / b for a, b in zip(found, units, strict=True)]
            print(
                f"{1e3 * statistics.median(found):10.1f}{statistics.median(prices):7.2f} "
                f"{f'[{min(prices):.2f}, {max(prices):.2f}]':14}",
                end="",
            )
        print(f"{apart:12.1e}{moved:10.1e}", flush=True)


def main(args: Benchmark) -> None:
    """Print the table."""
    if args.threads:
        torch.set_num_threads(args.threads)
    backbone = open_backbone(args.backbone, device=args.device)
    on_gpu = backbone.device.type == "cuda"
    device = torch.cuda.get_device_name() if on_gpu else platform.processor()
    print(
        f"{len(args.w_s)} runs, w_s {', '.join(f'{w:g}' for w in args.w_s)}, prior pretrained, "
        f"bank of {args.pairs} pairs; {args.blocks} blocks of {args.steps} steps, {args.clock} "
        f"clock, {device or platform.machine()}, {torch.get_num_threads()} threads, "
        f"{str(backbone.dtype).removeprefix('torch.')}, torch {torch.__version__}"
    )
    print("a step of all runs: ms, and the price in separate runs that ask [least, most]")
    print(
        f"{'method':18}{'batch':>6}{'prior':>7}{'separate':>10}{'price':>7} {'':14}"
        f"{'lockstep':>10}{'price':>7} {'':14}{'difference':>12}{'moved':>10}"
    )
    with tempfile.TemporaryDirectory() as folder:  # no bank of another day
        os.environ["SUDE_LAB_CACHE"] = folder
        for method in args.methods:
            for size in args.batch_sizes:
                measure(args, backbone, method, size)


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
