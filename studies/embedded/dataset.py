"""The training set of the embedded world: scenes from a seed, drawn once, and their captions."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from sude_lab.io.workers import worker_pool
from sude_lab.prompts import photo_of
from sude_lab.world.drawing import (
    ACCENTS,
    ANIMALS,
    ATTRIBUTES,
    BACKGROUNDS,
    CATEGORIES,
    COLOURS,
    COMPANIONS,
    Scene,
    draw,
    sample_scene,
)

RARE_TOKENS = ("sks", "zwx", "xqv", "olis", "pll", "ohwx")
"""Words in the vocabulary that no caption ever uses: free names for a subject."""
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


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """Describe a scene; with `rng` every part is dropped at random and 10 % of captions are empty.

    Without `rng` the caption is complete. The private look is named half of the time, so that the
    text space can hold a subject's look.
    """

    def keep(probability: float) -> bool:
        return rng is None or rng.random() < probability

    if not keep(0.9):
        return ""
    look, named = scene.look, keep(0.55)
    words = [scene.attribute] if keep(0.75) else []
    words += [look.colour] if named and keep(0.85) else []
    text = photo_of(" ".join([*words, scene.category]))
    private = []
    if named and look.pattern != "plain" and keep(0.85):
        article = "a " if look.pattern == "patch" else ""
        private.append(f"{article}{look.second} {look.pattern}")
    if named and look.accent and keep(0.85):
        private.append(f"a {look.accent} {'collar' if scene.category in ANIMALS else 'base'}")
    if private:
        text += " with " + " and ".join(private)
    if scene.companion and keep(0.85):
        text += f" {COMPANIONS[scene.companion]}"
    if scene.background and keep(0.8):
        text += f" {BACKGROUNDS[scene.background]}"
    return text


def vocabulary() -> tuple[str, ...]:
    """Return every word that captions use, in a fixed order (rare tokens not included)."""
    text = ["photo of a an with and collar base spots stripes patch", *COLOURS, *ACCENTS]
    text += [*BACKGROUNDS.values(), *COMPANIONS.values(), *CATEGORIES]
    text += [attribute for values in ATTRIBUTES.values() for attribute in values]
    return tuple(dict.fromkeys(" ".join(text).split()))
