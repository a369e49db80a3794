"""The training set of the embedded world: scenes from a seed, drawn once and kept as one array."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from sude_lab.io.workers import worker_pool
from sude_lab.world.drawing import Scene, draw, sample_scene

_CHUNK = 500


def scenes(number: int, seed: int) -> list[Scene]:
    """Draw `number` scenes; scene k depends on (seed, k) alone: longer sets extend shorter ones."""
    return [sample_scene(random.Random(f"{seed}-{k}")) for k in range(number)]


def _draw_chunk(chunk: list[Scene]) -> np.ndarray:
    return np.stack([np.asarray(draw(scene)) for scene in chunk])


def render(chosen: list[Scene], path: Path | None = None, workers: int = 2) -> np.ndarray:
    """Draw scenes as uint8 (N, H, W, 3); with `path` the array is kept there and memory-mapped."""
    if path is not None and path.exists():
        pictures = np.load(path, mmap_mode="r")
        if len(pictures) == len(chosen):
            return pictures
    chunks = [chosen[i : i + _CHUNK] for i in range(0, len(chosen), _CHUNK)]
    with worker_pool(workers) as pool:
        drawn = tqdm(pool.map(_draw_chunk, chunks), total=len(chunks), desc="drawing", unit="chunk")
        pictures = np.concatenate(list(drawn))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp.npy")
        np.save(temporary, pictures)
        temporary.replace(path)
        pictures = np.load(path, mmap_mode="r")
    return pictures
