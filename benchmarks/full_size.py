"""What SuDe costs at full size: Stable Diffusion 1.5 (2.1, SDXL base) with random weights.

    python benchmarks/full_size.py --out full_size        # on a CUDA card; nothing is downloaded
    python benchmarks/full_size.py --out full_size --minutes 9    # stops in time; again: continues
    python benchmarks/full_size.py --device cpu --tiny --compiler eager    # does it run at all?

Every method, plain and with SuDe, at every batch size, in every setting: as it is, with gradient
checkpointing, with the UNet in channels_last, with torch.compile. A row is printed, and kept, as
soon as it is measured; rows that `--out` holds already are not measured again.

Seconds a step are the median of `--steps` steps after `--warm-up`; peak memory is what the device
held at most during these steps (weights and optimiser included), on CUDA only. Ratios are to the
plain method in the same setting. Random weights cost what trained ones cost. `share` is the part of
the card's own matrix rate that a step reaches: its operations (matrix products and convolutions, as
torch.utils.flop_counter counts them in an uncompiled step; recomputed ones count) a second, over
the rate of a product of two large square matrices in the same precision, measured at the start.
"""

from __future__ import annotations

import csv
import gc
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import pandas as pd
import torch
import tyro
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from real_configs import REAL, build, shrink

from sude_lab.backbone import Backbone
from sude_lab.errors import UserError
from sude_lab.io.files import atomic_write
from sude_lab.io.opening import pick_device
from sude_lab.tuning import TuningConfig, tune

METHODS: dict[str, dict[str, Any]] = {
    "dreambooth unet": {"train": "unet"},
    "dreambooth attention": {"train": "attention"},
    "dreambooth lora": {"train": "lora"},
    # Without its class images, which would have to be drawn first.
    "custom_diffusion": {"method": "custom_diffusion", "prior_loss_weight": 0.0},
    "vico": {"method": "vico"},
    "textual_inversion": {"method": "textual_inversion"},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"weight_sude": 0.0},
    "SuDe, prior current": {"prior": "current"},
    "SuDe, prior pretrained": {"prior": "pretrained"},
    # A small one: a step costs the same with any, and this one is built anew for every row.
    "SuDe, prior bank": {"prior": "pretrained", "prior_bank": 16},
}
SETTINGS = ("as it is", "checkpointing", "channels_last", "compile", "compile, channels_last")
KEYS = ("device", "dtype", "optimizer", "model", "setting", "method", "batch", "variant")
"""What names a row."""


@dataclass(frozen=True)
class Benchmark:
    """What to measure: every combination, in the order of the table."""

    models: tuple[Literal["sd14", "sd15", "sd21", "sdxl"], ...] = ("sd15",)
    settings: tuple[str, ...] = SETTINGS
    """as it is, checkpointing, channels_last, compile; several at once with commas between."""
    methods: tuple[str, ...] = tuple(METHODS)
    train_batch_sizes: tuple[int, ...] = (1, 4)
    steps: int = 7
    """Steps that are timed."""
    warm_up: int = 3
    """Steps before them."""
    optimizer: Literal["adamw", "adamw_fused", "adamw8bit"] = "adamw_fused"
    compiler: Literal["inductor", "aot_eager", "eager"] = "inductor"
    """torch.compile's backend; inductor is what it is for, eager shows soon whether it runs."""
    device: str = "cuda"
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    tiny: bool = False
    """Small models of the same make, to see that the script runs."""
    out: Path | None = None
    """Folder for full_size.csv and full_size.md; what is there already is not measured again."""
    minutes: float = math.inf
    """Begin no row after so many minutes."""


def check(args: Benchmark) -> None:
    """Stop with a sentence where the measurement would be of no use, or a name is unknown."""
    known = {"methods": METHODS, "settings": SETTINGS[:-1]}
    for field, names in known.items():
        asked = {part for name in getattr(args, field) for part in name.split(", ")}
        if asked - set(names):
            sys.exit(f"--{field} takes {', '.join(names)}, not {', '.join(asked - set(names))}.")
    if args.tiny:
        return
    if not args.device.startswith("cuda"):
        sys.exit("Full-size models are measured on a CUDA card: add --tiny to try the script here.")
    if not torch.cuda.is_available():
        sys.exit(
            "There is no CUDA card here, and full-size models are measured on one: "
            "use --device cpu --tiny to try the script."
        )


def wait(device: str) -> float:
    """Return the time in seconds, once the device is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def matrix_rate(args: Benchmark) -> float:
    """Return the operations a second of a product of two large square matrices in `dtype`."""
    side = 256 if args.tiny else 8192
    a = torch.randn(side, side, device=args.device, dtype=getattr(torch, args.dtype))
    for _ in range(3):
        a @ a
    times = []
    for _ in range(9):
        began = wait(args.device)
        for _ in range(5):
            a @ a
        times.append((wait(args.device) - began) / 5)
    return 2 * side**3 / statistics.median(times)


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


def configuration(
    args: Benchmark, setting: str, method: str, batch: int, variant: str
) -> TuningConfig:
    """Return the run's settings."""
    return TuningConfig(
        image=Path("dog.png"),
        category="dog",
        gradient_checkpointing="checkpointing" in setting,
        train_batch_size=batch,
        max_train_steps=2 + args.warm_up + args.steps,
        optimizer=args.optimizer,
        **METHODS[method] | VARIANTS[variant],
    )


def measure(args: Benchmark, name: str, config: TuningConfig, setting: str) -> dict[str, float]:
    """Return the median seconds of a step, its operations, and the peak MiB (NaN on a CPU)."""
    cuda = args.device.startswith("cuda")
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    backbone = random_backbone(args, name)
    if "channels_last" in setting:
        backbone.unet.to(memory_format=torch.channels_last)
    side = backbone.resolution
    run = tune(config, backbone, Image.linear_gradient("L").convert("RGB").resize((side, side)))
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, SUDE_LAB_CACHE=folder):
        next(run)  # encodes the picture and the prompts, and builds a bank, once
    with FlopCounterMode(display=False) as counted:
        next(run)
    if "compile" in setting:
        backbone.unet.compile(backend=args.compiler)
    for _ in range(args.warm_up):
        next(run)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(args.steps):
        began = wait(args.device)
        next(run)
        times.append(wait(args.device) - began)
    run.close()
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else math.nan
    return {
        "seconds_per_step": statistics.median(times),
        "peak_mib": peak,
        "operations": counted.get_total_flops(),
    }


def failure(error: Exception) -> str:
    """Return why a row has no numbers, in a few words."""
    if any(isinstance(e, torch.OutOfMemoryError) for e in (error, error.__cause__)):
        return "out of memory"
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:80]}"


def rows(
    args: Benchmark, card: str, rate: float, kept: dict[tuple[Any, ...], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield one setting after another, measured or kept; NaN: see `note`, or none to tell (CPU)."""
    began = time.monotonic()
    combinations = [
        (name, setting, method, batch)
        for name in args.models
        for setting in args.settings
        for method in args.methods
        for batch in args.train_batch_sizes
    ]
    for name, setting, method, batch in combinations:
        plain: dict[str, Any] = {}
        for variant in VARIANTS:
            key = (card, args.dtype, args.optimizer, name, setting, method, batch, variant)
            row = kept.get(key)
            if row is None:
                if time.monotonic() - began > 60 * args.minutes:
                    return
                row = dict(zip(KEYS, key, strict=True))
                config = configuration(args, setting, method, batch, variant)
                try:
                    found, note = measure(args, name, config, setting), ""
                except (UserError, torch.OutOfMemoryError) as error:
                    note = failure(error)
                    if note != "out of memory":
                        raise
                except Exception as error:  # a compiler fails with errors of any class
                    if "compile" not in setting:
                        raise
                    note = failure(error)
                if note:
                    found = dict.fromkeys(("seconds_per_step", "peak_mib", "operations"), math.nan)
                seconds, peak = found["seconds_per_step"], found["peak_mib"]
                plain = plain or {"seconds_per_step": seconds, "peak_mib": peak}
                row |= {
                    "seconds_per_step": round(seconds, 5),
                    "time_ratio": round(seconds / plain["seconds_per_step"], 3),
                    "peak_mib": round(peak, 1),
                    "memory_ratio": round(peak / plain["peak_mib"], 3),
                    "tera_operations": float(f"{found['operations'] / 1e12:.4g}"),
                    "share": round(found["operations"] / seconds / rate, 3),
                    "note": note,
                }
            plain = plain or row
            yield row


def targets(found: list[dict[str, Any]]) -> list[str]:
    """Return what full size was meant to reach, and what was measured; best setting."""
    said = []
    for method, value, factor, unit, aim in (
        ("vico", "seconds_per_step", 400, "s", "400 steps of ViCo with SuDe under 60 s on an H200"),
        ("dreambooth lora", "peak_mib", 1 / 1024, "GiB", "LoRA with SuDe within 12 GiB"),
    ):
        measured = [
            (row[value] * factor, f"{row['setting']}, {row['variant']}")
            for row in found
            if row["model"] == "sd15" and row["method"] == method and row["batch"] == 1
            if row["variant"] != "plain" and not math.isnan(row[value])
        ]
        best = f"{min(measured)[0]:.1f} {unit} ({min(measured)[1]})" if measured else "not measured"
        said.append(f"{aim}: {best}")
    return said


def write(folder: Path, found: list[dict[str, Any]], heading: str) -> None:
    """Write the rows measured so far as full_size.csv and full_size.md."""
    table = pd.DataFrame(found)
    with atomic_write(folder / "full_size.csv") as path:
        table.to_csv(path, index=False)
    with atomic_write(folder / "full_size.md") as path:
        path.write_text(f"{heading}\n\n{table.to_markdown(index=False)}\n", encoding="utf-8")


def kept_rows(folder: Path | None) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Return the rows of an earlier call by what names them."""
    if folder is None or not (folder / "full_size.csv").is_file():
        return {}
    table = pd.read_csv(folder / "full_size.csv", keep_default_na=False, na_values=[""])
    table["note"] = table["note"].astype(object).fillna("")
    return {tuple(row[key] for key in KEYS): row for row in table.to_dict("records")}


def main(args: Benchmark) -> None:
    """Print the rows as CSV as they come, then all of them as a table, and the targets."""
    check(args)
    card = torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU"
    rate = matrix_rate(args)
    heading = (
        f"{'small models' if args.tiny else 'full size'}, {card}, torch {torch.__version__}, "
        f"{args.dtype}, {args.optimizer}, median of {args.steps} steps after {args.warm_up}, "
        f"matrix rate {rate / 1e12:.2f} Tflop/s"
    )
    print(heading, flush=True)
    found: list[dict[str, Any]] = []
    lines = csv.writer(sys.stdout, lineterminator="\n")
    kept = kept_rows(args.out)
    for row in rows(args, card, rate, kept):
        if not found:
            lines.writerow(row)
        lines.writerow(row.values())
        sys.stdout.flush()  # what was measured stays, should the next model not fit
        found.append(row)
        if args.out is not None:
            measured = {tuple(r[key] for key in KEYS): r for r in found}
            write(args.out, list((measured | kept | measured).values()), heading)
    if not found:
        sys.exit("Nothing was measured: give more --minutes.")
    print(f"\n{pd.DataFrame(found).to_markdown(index=False)}\n")
    if not args.tiny:
        print("\n".join(targets(found)))


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
