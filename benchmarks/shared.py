"""What the category's question and the null one share in a UNet: all before the words come in.

    python benchmarks/shared.py --out data/results   # and shared.csv, for the guide's table

Both questions of eq. 5 are asked of the same x_t and t; up to the first cross-attention they are
the same. Counts floating point operations (on the meta device: no weights, no numbers) of a pass of
one row, whole and up to there.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from diffusers import UNet2DConditionModel
from rows import write
from torch.utils.flop_counter import FlopCounterMode

from sude_lab.io.opening import open_backbone

SD15: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}


@dataclass(frozen=True)
class Benchmark:
    """What to count."""

    words: int = 77
    """Places of a prompt."""
    out: Path | None = None
    """Folder for shared.csv."""


class _Words(Exception):
    """The words come in."""


def operations(unet: Any, words: int, until_words: bool = False) -> int:
    """Return the operations of a pass of one row: whole, or up to the first cross-attention."""

    def stop(*_: Any) -> None:
        raise _Words

    first = next(m for name, m in unet.named_modules() if name.endswith("attn2"))
    handle = first.register_forward_pre_hook(stop) if until_words else None
    side, width = unet.config.sample_size, unet.config.cross_attention_dim
    x = torch.empty(1, unet.config.in_channels, side, side, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter, suppress(_Words):
        unet(x, torch.empty(1, device="meta"), torch.empty(1, words, width, device="meta"))
    if handle:
        handle.remove()
    return counter.get_total_flops()


def main(args: Benchmark) -> None:
    """Print the shares."""
    rows = []
    with torch.device("meta"):
        models = {"SD 1.5, 512 pixels": UNet2DConditionModel(**SD15)}
    models["embedded"] = open_backbone("embedded", device="cpu").unet.to("meta")
    for name, unet in models.items():
        whole, shared = operations(unet, args.words), operations(unet, args.words, True)
        rows.append({"model": name, "operations": whole, "shared": shared})
        # A step with SuDe: forward and backward of the subject (3), two questions (2).
        print(
            f"{name}: {whole / 1e9:.1f} Gflop a row, {shared / whole:.1%} of them before the words;"
            f" shared, a step with SuDe costs {1 - shared / whole / 5:.3f} of what it does."
        )
    if args.out is not None:
        write(args.out / "shared.csv", rows)


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
