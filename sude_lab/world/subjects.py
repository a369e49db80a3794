"""Drawn subjects, and what the oracle says of pictures of them: the protocol of every study.

Development subjects choose settings, held-out subjects (other seeds) are reported. Both lists
follow from a fixed seed, so nobody chooses them. Pictures are kept as strips, a WebP file a run.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from sude_lab.backbone import Backbone
from sude_lab.config import TuningConfig
from sude_lab.errors import UserError
from sude_lab.generation import generate
from sude_lab.methods import get_method
from sude_lab.prompts import fill, photo_of, with_attribute
from sude_lab.world import drawing as world
from sude_lab.world.oracle import Oracle, judge

KEYS = ["subject", "method", "variant", "seed"]
"""What names a run in a table of results."""


@dataclass(frozen=True)
class Subject:
    """A drawn subject: its name, the scene of its one picture, and the picture."""

    name: str
    scene: world.Scene
    picture: Image.Image = field(compare=False)

    @property
    def other_attributes(self) -> tuple[str, ...]:
        """The attributes of its category that its one picture does not show."""
        return tuple(a for a in world.ATTRIBUTES[self.scene.category] if a != self.scene.attribute)


def subject(group: str, number: int, category: str | None = None) -> Subject:
    """Return subject `number` of a group ("development", "held-out", "demo"); no choice is made.

    The one picture shows the first attribute of the category (sitting, unlit, plain) on the plain
    ground, without a companion.
    """
    rng = random.Random(f"{group}-{number}")
    category = category or world.CATEGORIES[number % len(world.CATEGORIES)]
    look = world.sample_look(rng)
    if look.pattern == "plain" and look.accent is None:  # nothing private but a colour: too easy
        look = replace(look, accent=rng.choice(tuple(world.ACCENTS)))
    scene = world.vary(world.Scene(category, world.ATTRIBUTES[category][0], look), rng)
    return Subject(f"{group}-{number}-{category.replace(' ', '-')}", scene, world.draw(scene, 256))


def measure(
    backbone: Backbone,
    oracle: Oracle,
    who: Subject,
    config: TuningConfig | None,
    *,
    seed: int,
    num_images: int,
    grids: dict[str, list[Image.Image]] | None = None,
    guide: Callable[[str | None], AbstractContextManager[Any]] = nullcontext,
) -> list[dict[str, Any]]:
    """Draw the subject under its tuning prompt and every other attribute; return a row a picture.

    Without `config` the backbone is the untuned one and draws the category instead. The numbers
    are those of `sude_lab.world.oracle.Reading`; `grids` collects the pictures by attribute, and
    `guide` gives the context in which those of an attribute are drawn.
    """
    rows = []
    for attribute in (None, *who.other_attributes):
        prompt = photo_of(f"{attribute or ''} {who.scene.category}".strip())
        if config is not None:
            tuned = get_method(config.method).prompts(config)[0]
            prompt = fill(with_attribute(tuned, attribute), config.token)
        with guide(attribute):
            images = generate(backbone, prompt, num_images=num_images, seed=seed, batch_size=16)
        reading = judge(oracle, images, who.scene, attribute)
        if grids is not None:
            grids[attribute or "as tuned"] = images
        measures = ("attribute_alignment", "subject_fidelity", "category_alignment")
        for k in range(num_images):
            row = {"attribute": attribute or "", "prompt": prompt, "image": k}
            rows.append(row | {n: round(getattr(reading, n)[k].item(), 5) for n in measures})
    return rows


def describe(config: TuningConfig) -> dict[str, Any]:
    """Return the settings that a row of results carries."""
    names = ("category", "method", "weight_sude", "truncate", "truncate_at", "prior", "weighting")
    settings = {name: getattr(config, name) for name in (*names, "seed")}
    return settings | {"steps": config.max_train_steps}


def strip_name(name: str, method: str, variant: str, seed: int) -> str:
    """Return the file name of a run's pictures."""
    return "_".join([name, method, re.sub(r"[^\w.=]+", "-", variant), str(seed)]) + ".webp"


def read_strip(folder: Path, rows: pd.DataFrame) -> dict[str, list[Image.Image]]:
    """Return the kept pictures of one run by what was asked for, as `measure` collects them.

    `rows`: the run's rows in the study's table, in their order.
    """
    path = folder / strip_name(*rows.iloc[0][KEYS].tolist())
    if not path.is_file():
        raise UserError(f"{path} is missing: this study keeps no pictures, or is not made yet.")
    attributes = rows["attribute"].fillna("").replace("", "as tuned")
    names = list(dict.fromkeys(rows["prompt"] if "ask" in rows else attributes))
    with Image.open(path) as strip:
        side = strip.height
        cut = [strip.crop((x, 0, x + side, side)) for x in range(0, strip.width, side)]
    each = len(cut) // len(names)
    return {name: cut[k * each : (k + 1) * each] for k, name in enumerate(names)}
