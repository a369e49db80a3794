"""Drawn subjects, and what the oracle says of pictures of them: the protocol of every study.

Development subjects choose settings, held-out subjects (other seeds) are reported. Both lists
follow from a fixed seed, so nobody chooses them. Pictures are kept as strips, a WebP file a run.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator, Sequence
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
from sude_lab.io.files import atomic_write
from sude_lab.methods import get_method
from sude_lab.prompts import STRUCTURES, fill, fill_words, photo_of, with_attribute
from sude_lab.world import drawing as world
from sude_lab.world.oracle import Oracle, judge

ASKS = {
    **STRUCTURES,
    "background": "photo of a {S*} {category} {background}",
    "attribute and background": "photo of a {attribute} {S*} {category} {background}",
}
"""What may be asked of a tuned model in place of its tuning prompt; {attribute} stands for every
attribute that the one picture does not show, {background} for every background."""

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


@dataclass(frozen=True)
class Variant:
    """A named change of the tuning settings."""

    name: str
    settings: dict[str, Any]


PLAIN = Variant("plain", {"weight_sude": 0.0})
SUDE = Variant("sude", {})
NO_TRUNCATION = Variant("sude, no truncation", {"truncate": False, "prior": "current"})


def measure(
    backbone: Backbone,
    oracle: Oracle,
    who: Subject,
    config: TuningConfig | None,
    *,
    seed: int,
    num_images: int,
    grids: dict[str, list[Image.Image]] | None = None,
    guide: Callable[[str | None], AbstractContextManager[Any]] | None = None,
    asks: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Draw the subject under its tuning prompt and every other attribute; return a row a picture.

    Without `config` the backbone is the untuned one and draws the category instead. The numbers
    are those of `sude_lab.world.oracle.Reading`; `grids` collects the pictures by attribute, and
    `guide` gives the context in which those of an attribute are drawn. `asks`, names of `ASKS` or
    templates, are drawn in place of the tuning prompt, and then `grids` collects them by prompt.
    """
    rows = []
    for name, attribute, background, prompt in _prompts(who, config, asks):
        with guide(attribute) if guide else nullcontext():
            images = generate(backbone, prompt, num_images=num_images, seed=seed, batch_size=16)
        reading = judge(oracle, images, who.scene, attribute, background)
        if grids is not None:
            grids[prompt if asks else attribute or "as tuned"] = images
        rows += [
            {
                "attribute": attribute or "",
                "prompt": prompt,
                "image": k,
                "attribute_alignment": round(reading.attribute_alignment[k].item(), 5),
                "subject_fidelity": round(reading.subject_fidelity[k].item(), 5),
                "category_alignment": round(reading.category_alignment[k].item(), 5),
            }
            for k in range(num_images)
        ]
        if asks:
            for row, share in zip(rows[-num_images:], reading.background_alignment, strict=True):
                row |= {"ask": name, "background": background or ""}
                row |= {"background_alignment": round(share.item(), 5)}
    return rows


def _prompts(
    who: Subject, config: TuningConfig | None, asks: Sequence[str]
) -> Iterator[tuple[str, str | None, str | None, str]]:
    """Yield what to draw: the ask's name, the attribute, the background, the prompt itself."""
    category = who.scene.category
    if config is None:
        for attribute in (None, *who.other_attributes):
            words = f"{attribute} {category}" if attribute else category
            yield "", attribute, None, photo_of(words)
        return
    template = config.prompt or get_method(config.method).template
    tuned = template.replace("{category}", category)
    if not asks:
        for attribute in (None, *who.other_attributes):
            yield "", attribute, None, fill(with_attribute(tuned, attribute), config.token)
    for name in asks:
        template = ASKS.get(name, name)
        attributes = who.other_attributes if "{attribute}" in template else (None,)
        backgrounds = tuple(world.BACKGROUNDS) if "{background}" in template else (None,)
        for attribute, background in itertools.product(attributes, backgrounds):
            where = world.BACKGROUNDS[background] if background else ""
            parts = {"attribute": attribute or "", "category": category, "background": where}
            yield name, attribute, background, fill(fill_words(template, **parts), config.token)


def describe(config: TuningConfig) -> dict[str, Any]:
    """Return the settings that a row of results carries."""
    return {
        "category": config.category,
        "method": config.method,
        "weight_sude": config.weight_sude,
        "truncate": config.truncate,
        "truncate_at": config.truncate_at,
        "prior": config.prior,
        "weighting": config.weighting,
        "seed": config.seed,
        "steps": config.max_train_steps,
    }


def strip_name(name: str, method: str, variant: str, seed: int) -> str:
    """Return the file name of a run's pictures."""
    return "_".join([name, method, re.sub(r"[^\w.=]+", "-", variant), str(seed)]) + ".webp"


def keep_strip(path: Path, grids: dict[str, list[Image.Image]], each: int = 2) -> None:
    """Write the first pictures of every prompt side by side, in the order of the prompts."""
    images = [image for grid in grids.values() for image in grid[:each]]
    width, height = images[0].size
    strip = Image.new("RGB", (width * len(images), height))
    for k, image in enumerate(images):
        strip.paste(image, (k * width, 0))
    with atomic_write(path) as temporary:
        strip.save(temporary, format="webp", quality=90)


def read_strip(folder: Path, rows: pd.DataFrame) -> dict[str, list[Image.Image]]:
    """Return the kept pictures of one run by what was asked for, as `measure` collects them.

    `rows`: the run's rows in the study's table, in their order.

    Raises:
        UserError: the run has no pictures there.
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
