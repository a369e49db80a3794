"""What SuDe costs at full size: Stable Diffusion 1.5, 2.1 and SDXL base with random weights.

    python benchmarks/full_size.py                        # on a CUDA card; nothing is downloaded
    python benchmarks/full_size.py --device cpu --tiny    # does it run? says nothing of the cost

Seconds a step are the median of `--steps` steps after `--warm-up`; peak memory is what the device
held at most during these steps (weights and optimiser included), on CUDA only. Ratios are to the
plain method in the same setting. Random weights cost what trained ones cost.
"""

from __future__ import annotations

import csv
import gc
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
import tyro
from PIL import Image
from torch import nn

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from real_configs import REAL, build, shrink

from sude_lab.backbone import Backbone, pick_device
from sude_lab.errors import UserError
from sude_lab.tuning import TuningConfig, tune

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"weight_sude": 0.0},
    "SuDe, prior current": {"prior": "current"},
    "SuDe, prior pretrained": {"prior": "pretrained"},
}


@dataclass(frozen=True)
class Benchmark:
    """What to measure: every combination."""

    models: tuple[Literal["sd14", "sd15", "sd21", "sdxl"], ...] = ("sd15", "sd21", "sdxl")
    train: tuple[Literal["unet", "attention", "lora"], ...] = ("unet", "attention", "lora")
    gradient_checkpointing: tuple[Literal["off", "on"], ...] = ("off", "on")
    steps: int = 7
    """Steps that are timed."""
    warm_up: int = 3
    """Steps before them."""
    train_batch_size: int = 1
    device: str = "cuda"
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    tiny: bool = False
    """Small models of the same make, to see that the script runs."""
    out: Path | None = None
    """Folder for full_size.csv and full_size.md."""


def check(args: Benchmark) -> None:
    """Stop with a sentence where the measurement would be of no use."""
    if args.tiny:
        return
    if not args.device.startswith("cuda"):
        sys.exit("Full-size models are measured on a CUDA card: add --tiny to try the script here.")
    if not torch.cuda.is_available():
        sys.exit(
            "There is no CUDA card here, and full-size models are measured on one: "
            "use --device cpu --tiny to try the script."
        )


def random_backbone(args: Benchmark, name: str) -> Backbone:
    """Return the model with random weights, made on the device itself."""
    config = shrink(REAL[name])[0] if args.tiny else REAL[name]
    device = pick_device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        pipeline = build(config, Path(folder), device=str(device), full=not args.tiny)
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    dtype = getattr(torch, args.dtype)
    return Backbone(pipeline, f"{name}, random weights", device, dtype)


def measure(
    args: Benchmark, name: str, train: Any, checkpointing: str, variant: str
) -> tuple[float, float]:
    """Return the median seconds of a step and the peak MiB; NaN where memory ran out."""
    cuda = args.device.startswith("cuda")
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    try:
        backbone = random_backbone(args, name)
        config = TuningConfig(
            image=Path("dog.png"),
            category="dog",
            train=train,
            gradient_checkpointing=checkpointing == "on",
            train_batch_size=args.train_batch_size,
            max_train_steps=args.warm_up + args.steps,
            **VARIANTS[variant],
        )
        side = backbone.resolution
        run = tune(config, backbone, Image.linear_gradient("L").convert("RGB").resize((side, side)))
        for _ in range(args.warm_up):
            next(run)
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(args.steps):
            began = time.perf_counter()
            next(run)
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        run.close()
    except (UserError, torch.OutOfMemoryError) as error:
        memory = (error, error.__cause__)
        if not any(isinstance(e, torch.OutOfMemoryError) for e in memory):
            raise
        return math.nan, math.nan
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else math.nan
    return statistics.median(times), peak


def rows(args: Benchmark) -> Iterator[dict[str, Any]]:
    """Measure one setting after another; NaN in a row: no memory, or none to be told (CPU)."""
    for name in args.models:
        for train in args.train:
            for checkpointing in args.gradient_checkpointing:
                plain = (math.nan, math.nan)
                for variant in VARIANTS:
                    seconds, peak = measure(args, name, train, checkpointing, variant)
                    if variant == "plain":
                        plain = (seconds, peak)
                    yield {
                        "model": name,
                        "train": train,
                        "gradient_checkpointing": checkpointing,
                        "variant": variant,
                        "seconds_per_step": round(seconds, 5),
                        "time_ratio": round(seconds / plain[0], 3),
                        "peak_mib": round(peak, 1),
                        "memory_ratio": round(peak / plain[1], 3),
                    }


def main(args: Benchmark) -> None:
    """Print the rows as CSV as they come, then all of them as a table."""
    check(args)
    card = torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU"
    print(
        f"{'small models' if args.tiny else 'full size'}, {card}, torch {torch.__version__}, "
        f"{args.dtype}, batch {args.train_batch_size}, median of {args.steps} steps after "
        f"{args.warm_up}",
        flush=True,
    )
    found: list[dict[str, Any]] = []
    lines = csv.writer(sys.stdout, lineterminator="\n")
    for row in rows(args):
        if not found:
            lines.writerow(row)
        lines.writerow(row.values())
        sys.stdout.flush()  # what was measured stays, should the next model not fit
        found.append(row)
    table = pd.DataFrame(found)
    markdown = table.to_markdown(index=False)
    print(f"\n{markdown}")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        table.to_csv(args.out / "full_size.csv", index=False)
        (args.out / "full_size.md").write_text(f"{markdown}\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
