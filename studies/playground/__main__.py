"""The page that runs the included model in a browser, as a folder of static files.

    python -m studies.playground --out playground        then: python -m http.server -d playground

Runs that are missing are tuned first (900 steps, some minutes; stop it and give it again).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from studies.playground.build import build
from studies.playground.models import STEPS, tuned
from sude_lab.io.opening import open_backbone


@dataclass(frozen=True)
class PlaygroundConfig:
    """Where to build the page, and from what."""

    out: Path
    """Folder of the page."""
    runs: Path = Path("results/playground")
    """Folder of the tuned runs."""
    steps: int = STEPS
    """Of a run."""
    runtime: Path | None = None
    """onnxruntime-web as `npm pack` gives it; None: fetched."""


def main(config: PlaygroundConfig) -> None:
    """Tune what is missing, and write the page."""
    config.runs.mkdir(parents=True, exist_ok=True)
    config.out.mkdir(parents=True, exist_ok=True)
    base = open_backbone(device="cpu")
    build(config.out, base, tuned(config.runs, base, config.steps), config.runtime)
    size = sum(file.stat().st_size for file in config.out.iterdir())
    print(f"{config.out}: {size / 1e6:.0f} MB. python -m http.server -d {config.out}")


if __name__ == "__main__":
    main(tyro.cli(PlaygroundConfig))
