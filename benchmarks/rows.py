"""What the benchmarks write of a measurement: median, least and most, on which machine."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from sude_lab.io.files import atomic_write


def processor() -> str:
    """Return the processor's name, as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine(threads: int | None = None, device: str = "cpu") -> dict[str, Any]:
    """Return the columns that say where something is measured, and beside how much else.

    `load` is the system's mean over the last minute: what other programs, and this one, had to do.
    """
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    used = threads or torch.get_num_threads()
    text = f"{name}, {used} thread{'s' * (used > 1)} of {os.cpu_count()} cores"
    return {"machine": f"{text}, torch {torch.__version__}", "load": round(os.getloadavg()[0], 1)}


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Return the median of some values as `name`, with the least and the most of them."""
    ends = {name: statistics.median(values), f"{name}_least": min(values)}
    return {k: round(v, 5) for k, v in (ends | {f"{name}_most": max(values)}).items()}


def write(path: Path, rows: list[dict[str, Any]], by: Sequence[str] = ()) -> None:
    """Write rows; those of before stay, where none of the new ones has the same values `by`."""
    table = pd.DataFrame(rows)
    if by and path.is_file():
        table = pd.concat([pd.read_csv(path), table]).drop_duplicates([*by], keep="last")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as new:
        table.to_csv(new, index=False)
