"""How time and memory grow: with the picture, the batch, the number of prompts and of pictures.

    python benchmarks/growth.py --out data/results      # growth.csv and growth.png, 15 minutes
    python benchmarks/growth.py --redraw data/results   # the figure again, from growth.csv

On the included model. Every point is measured in a process of its own, so that its peak memory is
its own (forked where nothing has been computed yet, which saves the imports; Linux and macOS); from
that is taken what the process held when the model was open and nothing had been done. All points
take turns for `--rounds` rounds, so that a machine that grows slower meanwhile bends no line; in a
round a point's time is the median of `--repeats` after one that does not count. growth.csv has a
row for every point and round; what is drawn and told is the median over the rounds. On a CPU one
thread's own time is plotted, which other programs disturb less (growth.csv has the time on the
clock, too); on a CUDA card the time on the clock. Exponents p of y ~ x^p are fitted to the three
largest x, where what does not grow matters least.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
import tyro
from rows import machine
from tqdm.auto import tqdm

from sude_lab.backbone import Backbone
from sude_lab.classify.implicit import ImplicitClassifier
from sude_lab.config import EMBEDDED, TuningConfig
from sude_lab.generation import generate
from sude_lab.io.files import atomic_write
from sude_lab.io.opening import open_backbone
from sude_lab.runs.prepare import prepared_tuning as tune
from sude_lab.world import drawing as world
from sude_lab.world import subjects as study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS: dict[str, tuple[str, str]] = {
    "picture": ("a tuning step, batch 1", "side of the picture, pixels"),
    "batch": ("a tuning step", "pictures in a batch"),
    "prompts": ("classify one picture", "prompts"),
    "drawing": ("generate", "pictures drawn"),
}
"""What each row of the figure measures, against what."""
TUNING: dict[str, dict[str, Any]] = {"plain": {"weight_sude": 0.0}, "SuDe": {}}
COLOURS = ("#777777", "#c2410c")


class Bar(tqdm):
    """A progress bar without a watching thread, which a fork would lose with its locks held."""

    monitor_interval = 0


@dataclass(frozen=True)
class Benchmark:
    """What to measure."""

    out: Path | None = None
    """Folder for growth.csv and growth.png."""
    redraw: Path | None = None
    """Folder with growth.csv: only draw growth.png again."""
    backbone: str = EMBEDDED
    picture: tuple[int, ...] = (32, 64, 96, 128, 192)
    batch: tuple[int, ...] = (1, 2, 4, 8, 16)
    prompts: tuple[int, ...] = (2, 4, 8, 16, 32)
    drawing: tuple[int, ...] = (1, 2, 4, 8, 16)
    num_pairs: int = 6
    """classify: pairs of t and noise a prompt."""
    num_inference_steps: int = 5
    """generate: steps of the sampler; 20 are usual for the included model."""
    rounds: int = 7
    repeats: int = 3
    threads: int = 1
    """More than one wait for each other, which counts as the processor's time, too."""
    device: Literal["cpu", "cuda"] = "cpu"


# --- one point, in a process of its own -----------------------------------------------------------


def tuning(
    args: Benchmark, backbone: Backbone, variant: str, side: int, batch: int
) -> Iterator[object]:
    """Return the steps of a run, DreamBooth on the whole UNet."""
    config = TuningConfig(
        image=Path("dog.png"),
        category="dog",
        train="unet",
        resolution=side,
        train_batch_size=batch,
        max_train_steps=args.repeats + 1,
        **TUNING[variant],
    )
    return tune(config, backbone, study.subject("demo", 0, "dog").picture)


def some_prompts(number: int) -> list[str]:
    """Return different prompts that the included model knows, one animal or thing after another."""
    colours = ("brown", "white", "black", "grey", "orange", "blue", "green", "pink")
    found = [f"photo of a {c} {k}" for c in colours for k in world.CATEGORIES][:number]
    if len(found) < number:
        sys.exit(f"There are {len(found)} prompts here, not {number}.")
    return found


def job(args: Benchmark, backbone: Backbone, panel: str, variant: str, x: int) -> Callable[[], Any]:
    """Return what one repetition of a point does."""
    if panel in ("picture", "batch"):
        side, batch = (x, 1) if panel == "picture" else (backbone.resolution, x)
        run = tuning(args, backbone, variant, side, batch)
        return lambda: next(run)
    if panel == "prompts":
        classifier = ImplicitClassifier(
            backbone, some_prompts(x), num_pairs=args.num_pairs, prune=variant == "pruned"
        )
        picture = world.draw(study.subject("demo", 0, "dog").scene, backbone.resolution)
        return lambda: classifier.classify([picture])
    asked = [(p, 1) for p in some_prompts(x)] if variant == "a prompt each" else [("a dog", x)]
    steps = args.num_inference_steps
    return lambda: [
        generate(backbone, prompt, num_images=number, num_inference_steps=steps)
        for prompt, number in asked
    ]


def peak_mib(device: str) -> float:
    """Return the most memory that this process has held so far, on the device that computes."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def measure(args: Benchmark, panel: str, variant: str, x: int) -> dict[str, float]:
    """Return seconds on the clock and of the processor, and memory in MiB."""
    backbone = open_backbone(args.backbone, device=args.device)
    do = job(args, backbone, panel, variant, x)
    opened = peak_mib(args.device)
    times = []
    for _ in range(args.repeats + 1):
        began, busy = time.perf_counter(), time.process_time()
        do()
        if args.device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - began, time.process_time() - busy))
    seconds, processor = (statistics.median(column) for column in zip(*times[1:], strict=True))
    peak = peak_mib(args.device)
    return {
        "seconds": seconds,
        "processor_seconds": processor,
        "opened_mib": opened,
        "peak_mib": peak,
    }


# --- all points -----------------------------------------------------------------------------------


def variants(panel: str) -> tuple[str, str]:
    """Return the two lines of a column: the plain one first."""
    if panel in ("picture", "batch"):
        return ("plain", "SuDe")
    return ("all to the end", "pruned") if panel == "prompts" else ("a prompt each", "one prompt")


def rows(args: Benchmark) -> pd.DataFrame:
    """Measure point after point, each in a process of its own, and that for some rounds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # OpenMP's threads do not come along into a fork: none may run here
    open_backbone(args.backbone, device="cpu")  # imports what the children need

    def child(answer: Any, panel: str, variant: str, x: int) -> None:
        torch.set_num_threads(args.threads)
        answer.send(measure(args, panel, variant, x))

    fork = multiprocessing.get_context("fork")
    points = [(p, v, x) for p in PANELS for v in variants(p) for x in getattr(args, p)]
    found = []
    for k, (panel, variant, x) in enumerate(Bar(points * args.rounds, desc="growth", unit="point")):
        answer, there = fork.Pipe(duplex=False)
        process = fork.Process(target=child, args=(there, panel, variant, x))
        process.start()
        there.close()
        try:
            numbers = answer.recv()
        except EOFError:
            sys.exit(f"{panel}, {variant}, {x}: the process ended; its reason stands above.")
        process.join()
        point = {"panel": panel, "variant": variant, "x": x, "device": args.device}
        here = machine(args.threads, args.device) | {"round": 1 + k // len(points)}
        found.append(here | point | numbers)
    torch.set_num_threads(before)
    return pd.DataFrame(found).round(5)


def medians(table: pd.DataFrame) -> pd.DataFrame:
    """Return a row a point: medians over the rounds."""
    point = ["panel", "variant", "x", "device"]
    return table.groupby(point, sort=False).median(numeric_only=True).reset_index()


def exponent(x: Any, y: Any, last: int = 3) -> float:
    """Return p of y ~ x^p through the `last` largest x (least squares of log y over log x).

    NaN where fewer than two of them have y > 0.
    """
    order = np.argsort(np.asarray(x, dtype=float))[-last:]
    x, y = np.asarray(x, dtype=float)[order], np.asarray(y, dtype=float)[order]
    x, y = x[y > 0], y[y > 0]
    return float(np.polyfit(np.log(x), np.log(y), 1)[0]) if len(x) > 1 else float("nan")


def figure(table: pd.DataFrame) -> Figure:
    """Draw growth.csv: a row for what grows, time on the left, memory on the right, log-log."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, StrMethodFormatter

    cuda = (table.device == "cuda").all()
    clock = "seconds" if cuda else "processor_seconds"
    table = medians(table)
    table = table.assign(memory=table.peak_mib - table.opened_mib)
    page = Figure(figsize=(8, 11), dpi=120, layout="constrained")
    axes = page.subplots(len(PANELS), 2)
    for row, (panel, (what, against)) in zip(axes, PANELS.items(), strict=True):
        here = table[table.panel == panel]
        for ax, value, unit in (
            (row[0], clock, "seconds" if cuda else "processor seconds"),
            (row[1], "memory", "MiB more than idle"),
        ):
            for variant, colour in zip(variants(panel), COLOURS, strict=True):
                line = here[(here.variant == variant) & (here[value] > 0)].sort_values("x")
                label = f"{variant}: power {exponent(line.x, line[value]):.2f}"
                ax.plot(line.x, line[value], "o-", ms=4, color=colour, label=label)
            ax.set(xscale="log", yscale="log", xlabel=against, ylabel=unit)
            ax.xaxis.set_major_locator(FixedLocator(sorted(here.x.unique())))
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_minor_locator(NullLocator())
                axis.set_major_formatter(StrMethodFormatter("{x:g}"))
            low, high = ax.get_ylim()
            ax.set_ylim(low, high * (high / low) ** 0.3)  # room for the legend
            ax.grid(alpha=0.3)
            ax.legend(loc="upper left", frameon=False, fontsize=9)
        row[0].set_title(what, fontsize=10)
    return page


def draw(folder: Path) -> None:
    """Write growth.png from the growth.csv beside it."""
    page = figure(pd.read_csv(folder / "growth.csv"))
    with atomic_write(folder / "growth.png") as path:
        page.savefig(path)


def main(args: Benchmark) -> None:
    """Print the table, and write it and its figure."""
    if args.redraw is not None:
        draw(args.redraw)
        return
    where = machine(args.threads, args.device)
    print(f"{args.backbone}, {where}, {args.rounds} rounds of {args.repeats}", flush=True)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as it would say itself after a fork
    table = rows(args)
    print(medians(table).to_string(index=False))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        with atomic_write(args.out / "growth.csv") as path:
            table.to_csv(path, index=False)
        draw(args.out)


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
