"""The oracle of the embedded world: a network names what pictures show, and judges runs by it.

It was trained on drawings, whose truth is known, and on the same drawings as the embedded
autoencoder renders them with a little latent noise, so that it reads the sampler's pictures too:
`studies/embedded/oracle.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from sude_lab.config import TuningConfig
from sude_lab.errors import UserError
from sude_lab.io.opening import data_folder, is_embedded
from sude_lab.world import drawing as world

ALL_ATTRIBUTES = tuple(dict.fromkeys(a for values in world.ATTRIBUTES.values() for a in values))
HEADS: dict[str, tuple[str, ...]] = {
    "category": world.CATEGORIES,
    "attribute": ALL_ATTRIBUTES,
    "background": ("none", *world.BACKGROUNDS),
    "companion": ("none", *world.COMPANIONS),
    "colour": tuple(world.COLOURS),
    "second": tuple(world.COLOURS),
    "pattern": world.PATTERNS,
    "accent": ("none", *world.ACCENTS),
}
LOOK = ("colour", "second", "pattern", "accent")


def labels(scene: world.Scene) -> dict[str, int]:
    """Return the truth of a scene as class indices; -1 where the picture does not show it.

    A plain look shows no second colour; gold and metal hide the first.
    """
    values = {k: getattr(scene.look if k in LOOK else scene, k) or "none" for k in HEADS}
    truth = {k: HEADS[k].index(value) for k, value in values.items()}
    hidden = ["colour"] if scene.attribute in ("golden", "metal") else []
    hidden += ["second"] if scene.look.pattern == "plain" else []
    return truth | dict.fromkeys(hidden, -1)


def to_tensor(pictures: np.ndarray) -> Tensor:
    """Map uint8 pictures (N, H, W, 3) to floats in [-1, 1] of shape (N, 3, H, W)."""
    x = torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2)
    return x.float().div_(127.5).sub_(1.0)


class Oracle(nn.Module):
    """A convolutional classifier with one head for each thing a picture shows."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        w, layers = width, list[nn.Module]()
        for inputs, outputs in pairwise((3, w, 2 * w, 3 * w, 4 * w)):
            halved = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
            grouped = nn.Conv2d(outputs, outputs, 3, padding=1, groups=8)
            layers += [halved, nn.GroupNorm(8, outputs), nn.SiLU(), grouped, nn.SiLU()]
        last = nn.Linear(4 * w * (world.RESOLUTION // 16) ** 2, 8 * w)
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.1), last, nn.SiLU())
        self.heads = nn.ModuleDict({k: nn.Linear(8 * w, len(v)) for k, v in HEADS.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the logits of every head for pictures (B, 3, 64, 64) in [-1, 1]."""
        features = self.features(x)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def read(self, images: list[Image.Image] | Tensor) -> dict[str, Tensor]:
        """Return the probabilities (B, classes) of every head, in evaluation mode."""
        if not isinstance(images, Tensor):
            side = world.RESOLUTION
            arrays = [np.asarray(i.convert("RGB").resize((side, side))) for i in images]
            images = to_tensor(np.stack(arrays))
        self.eval()
        return {name: logits.softmax(-1) for name, logits in self(images).items()}


@dataclass(frozen=True)
class Reading:
    """What the oracle says of a set of pictures: probabilities, each (B,).

    Of the attribute among those that its category can have, of the background or companion (of no
    background, where none is asked for), of the category, and of the parts of the private look that
    a picture can show (their mean).
    """

    attribute_alignment: Tensor
    background_alignment: Tensor
    category_alignment: Tensor
    subject_fidelity: Tensor


def judge(
    oracle: Oracle,
    images: list[Image.Image],
    scene: world.Scene,
    attribute: str | None = None,
    background: str | None = None,
) -> Reading:
    """Judge pictures that should show `scene`'s subject; attribute, background: its own if None.

    A companion may stand in the background's place.
    """
    attribute = attribute or scene.attribute
    background = background or scene.background or "none"
    head = "companion" if background in world.COMPANIONS else "background"
    read = oracle.read(images)
    among = read["attribute"][:, _allowed(scene.category)]
    among = among / among.sum(-1, keepdim=True).clamp_min(1e-12)
    wanted = world.ATTRIBUTES[scene.category].index(attribute)
    truth = labels(world.replace(scene, attribute=attribute))
    look = [read[part][:, truth[part]] for part in LOOK if truth[part] >= 0]
    return Reading(
        among[:, wanted],
        read[head][:, HEADS[head].index(background)],
        read["category"][:, HEADS["category"].index(scene.category)],
        torch.stack(look).mean(0),
    )


def read_scene(oracle: Oracle, images: list[Image.Image], category: str) -> world.Scene:
    """Return what the oracle takes pictures of one subject to show: its attribute and its look.

    For subjects whose truth nobody wrote down. The parts of the look are read from the mean of the
    probabilities over the pictures; a part that they do not show is a guess.
    """
    means = {name: p.mean(0) for name, p in oracle.read(images).items()}
    best = {name: HEADS[name][int(p.argmax())] for name, p in means.items()}
    means["second"][HEADS["second"].index(best["colour"])] = -1.0  # it is another colour
    accent = None if best["accent"] == "none" else best["accent"]
    second = HEADS["second"][int(means["second"].argmax())]
    look = world.Look(best["colour"], second, best["pattern"], accent)
    attribute = int(means["attribute"][_allowed(category)].argmax())
    return world.Scene(category, world.ATTRIBUTES[category][attribute], look)


def _allowed(category: str) -> list[int]:
    return [ALL_ATTRIBUTES.index(a) for a in world.ATTRIBUTES[category]]


def load_oracle(folder: Path | None = None) -> Oracle:
    """Load the oracle from `data/oracle`, or from a folder."""
    folder = folder or data_folder() / "oracle"
    if not (folder / "oracle.safetensors").is_file():
        raise UserError(f"There is no oracle in {folder}: run from a clone of the repository.")
    with torch.random.fork_rng(devices=[]):  # new weights are drawn, then written over
        oracle = Oracle()
    oracle.load_state_dict(load_file(folder / "oracle.safetensors"))
    return oracle.eval().requires_grad_(False)


@dataclass(frozen=True)
class DrawnJudge:
    """What a drawn subject can be asked for, and, with an oracle, what pictures of it show."""

    scene: world.Scene
    """What the subject's one picture shows."""
    oracle: Oracle | None = None

    @property
    def measures(self) -> bool:
        """Whether it can say anything of pictures: it has an oracle."""
        return self.oracle is not None

    @property
    def attributes(self) -> tuple[str, ...]:
        """The attributes that the one picture does not show: what it shows is no test."""
        of_category = world.ATTRIBUTES[self.scene.category]
        return tuple(a for a in of_category if a != self.scene.attribute)

    @property
    def backgrounds(self) -> tuple[str, ...]:
        """The phrases of all backgrounds."""
        return tuple(world.BACKGROUNDS.values())

    def measure(
        self, images: Sequence[Image.Image], text: str, attribute: str, background: str
    ) -> dict[str, list[float | None]]:
        """Return the oracle's measures of pictures of one prompt; None where nothing was asked."""
        assert self.oracle is not None
        of_category = world.ATTRIBUTES[self.scene.category]
        name = attribute or _mentioned(text, of_category)
        places = world.BACKGROUNDS | world.COMPANIONS  # a background goes before a companion
        phrase = _mentioned(f"{text} {background}", places.values())
        asked = {
            "attribute": name if name in of_category else None,
            "background": next((k for k, v in places.items() if v == phrase), None),
        }
        reading = judge(self.oracle, list(images), self.scene, **asked)
        nothing = {f"{k}_alignment": [None] * len(images) for k, v in asked.items() if v is None}
        return {k: v.tolist() for k, v in vars(reading).items()} | nothing


def drawn_judge(
    config: TuningConfig, references: Iterable[Image.Image], *, scene: world.Scene | None = None
) -> DrawnJudge | None:
    """Return the judge of a run; None where neither its model nor its subject is of this world.

    The oracle judges runs of the embedded models. Without a known `scene` it reads it from the
    references.
    """
    if not is_embedded(config.backbone):
        return DrawnJudge(scene) if scene else None
    oracle = load_oracle()
    if scene is None:
        if config.category not in world.ATTRIBUTES:
            says = f"The oracle does not know the category {config.category!r}: it knows"
            raise UserError(f"{says} {', '.join(world.CATEGORIES)}.")
        scene = read_scene(oracle, list(references), config.category)
    return DrawnJudge(scene, oracle)


def _mentioned(text: str, phrases: Iterable[str]) -> str | None:
    return next((p for p in phrases if re.search(rf"\b{re.escape(p)}\b", text)), None)
