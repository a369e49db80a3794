"""Tune on drawn subjects and let the oracle judge: the protocol behind every reported number.

Development subjects choose settings, held-out subjects (other seeds) are reported. Both lists
follow from a fixed seed, so nobody chooses them.

    python -m sude_lab.world.subjects --subjects held-out --numbers 0 1 2 5 7 --num-seeds 3 \\
        --methods dreambooth custom_diffusion vico textual_inversion --out data/results/held_out.csv

Finished (subject, variant, seed) are never redone: give the command again to continue. With other
`--asks` write another file, because a run's weights are not kept.
"""

from __future__ import annotations

import itertools
import multiprocessing
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
import tyro
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from sude_lab.backbone import Backbone
from sude_lab.config import EMBEDDED
from sude_lab.diffusion import add_noise, training_target
from sude_lab.errors import UserError
from sude_lab.generation import generate
from sude_lab.io.files import atomic_write
from sude_lab.io.opening import open_backbone
from sude_lab.losses import subject_loss
from sude_lab.methods import get_method
from sude_lab.prompts import STRUCTURES, fill, fill_words, photo_of, with_attribute
from sude_lab.runs.prior_bank import Pairs
from sude_lab.tuning import Step, TuningConfig, picture_latents, resolve, tune, with_preset
from sude_lab.world import drawing as world
from sude_lab.world.oracle import Oracle, judge, load_oracle

ASKS = {
    **STRUCTURES,
    "background": "photo of a {S*} {category} {background}",
    "attribute and background": "photo of a {attribute} {S*} {category} {background}",
}
"""What may be asked of a tuned model in place of its tuning prompt; {attribute} stands for every
attribute that the one picture does not show, {background} for every background."""

KEYS = ["subject", "method", "variant", "seed"]
STORED = {"optimizer": "adamw"}
"""What the stored numbers were made with and is no default any more; settings of a study win."""


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
            for row, seen in zip(rows[-num_images:], reading.background_alignment, strict=True):
                row |= {"ask": name, "background": background or ""}
                row |= {"background_alignment": round(seen.item(), 5)}
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
    tuned = (config.prompt or get_method(config.method).template).replace("{category}", category)
    if not asks:
        for attribute in (None, *who.other_attributes):
            yield "", attribute, None, fill(with_attribute(tuned, attribute), config.token)
    for name in asks:
        template = ASKS.get(name, name)
        attributes = who.other_attributes if "{attribute}" in template else (None,)
        backgrounds = tuple(world.BACKGROUNDS) if "{background}" in template else (None,)
        for attribute, background in itertools.product(attributes, backgrounds):
            where = world.BACKGROUNDS[background] if background else ""
            told = {"attribute": attribute or "", "category": category, "background": where}
            yield name, attribute, background, fill(fill_words(template, **told), config.token)


def tune_and_measure(
    base: Backbone,
    oracle: Oracle,
    who: Subject,
    config: TuningConfig,
    *,
    num_images: int,
    on_step: Callable[[Step], None] | None = None,
    grids: dict[str, list[Image.Image]] | None = None,
    asks: Sequence[str] = (),
    errors: bool = False,
) -> list[dict[str, Any]]:
    """Tune a copy of `base` on one subject, draw and judge; return the rows of `measure`.

    With `errors` they have those of `noise_errors` too.
    """
    backbone = base.copy()
    config = resolve(config, backbone)
    started, gates, rhos = time.time(), [], []
    for step in tune(config, backbone, who.picture):
        gates.append(step.gate.float().mean().item())
        rhos.append(step.rho.mean().item())
        if on_step:
            on_step(step)
    seconds = time.time() - started
    about = describe(config) | {
        "open_gates": float(np.mean(gates)),
        "rho": float(np.mean(rhos)),
        "tuning_seconds": round(seconds, 1),
    }
    if errors:
        about |= noise_errors(backbone, config, who.picture)
    rows = measure(
        backbone,
        oracle,
        who,
        config,
        seed=config.seed + 500,
        num_images=num_images,
        grids=grids,
        asks=asks,
    )
    return [about | row for row in rows]


@torch.no_grad()
def noise_errors(
    backbone: Backbone, config: TuningConfig, picture: Image.Image, *, number: int = 256
) -> dict[str, float]:
    """Return the tuned model's loss of eq. 2 on the pairs of its prior bank, and on new ones.

    The new ones have the bank's timesteps, and noise of their own. Where a run had no bank all are
    new: that the two are alike then says how much chance there is in them.
    """
    schedule = backbone.schedule
    mean, deviation = picture_latents(config, backbone, picture)
    size = config.prior_bank or number
    pairs = Pairs(mean, deviation, size, schedule.num_timesteps, config.seed)
    others = replace(pairs, number=number, seed=config.seed + 1)
    template = config.prompt or get_method(config.method).template
    prompt = fill(template.replace("{category}", config.category), config.token)
    condition = backbone.encode_prompts([prompt])
    found: dict[str, list[Tensor]] = {"loss_seen": [], "loss_new": []}
    for index in torch.arange(number).split(16):
        x_0, eps, t = pairs.batch((index * size).div(number, rounding_mode="floor"))
        new_x_0, new_eps, _ = others.batch(index)
        for name, latent, noise in (("loss_seen", x_0, eps), ("loss_new", new_x_0, new_eps)):
            x_t = add_noise(latent, noise, t, schedule)
            output = backbone.predict(x_t, t, condition.expand(len(t)))
            target = training_target(latent, noise, t, schedule)
            found[name].append(subject_loss(output, target) / noise[0].numel())
    return {name: round(torch.cat(values).mean().item(), 5) for name, values in found.items()}


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


@dataclass(frozen=True)
class StudyConfig:
    """Which subjects, methods, variants and seeds to run."""

    out: Path
    """CSV file of the results; rows that are there are not run again."""
    subjects: Literal["development", "held-out"] = "development"
    numbers: tuple[int, ...] = (0, 1, 2, 3, 4)
    methods: tuple[str, ...] = ("dreambooth", "textual_inversion")
    variants: tuple[str, ...] = ("plain", "sude")
    """plain, sude, 'sude, no truncation', or settings such as 'weight_sude=2,prior=current'; among
    them preset=paper and preset=reference, which fill what is not said."""
    num_seeds: int = 1
    num_images: int = 8
    workers: int = 2
    """Processes, one thread each."""
    settings: str = ""
    """Settings for every variant, such as 'max_train_steps=200,learning_rate=3e-4'."""
    asks: tuple[str, ...] = ()
    """What to draw in place of the tuning prompt with every attribute: P1, P2, P3, background,
    'attribute and background', or templates of that kind."""
    errors: bool = False
    """Judge, too, how well each tuned model predicts noise it has seen, and new noise."""
    pictures: Path | None = None
    """Folder for the first two pictures of every prompt, side by side, a WebP file a run."""
    backbone: str = EMBEDDED


def parse_settings(text: str) -> dict[str, Any]:
    """Read 'weight_sude=2,prior=current' as settings; numbers and booleans are recognised."""
    import yaml

    settings = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, value = part.partition("=")
        # YAML reads 1e-4 as text: numbers first.
        try:
            settings[name] = int(value) if value.isdigit() else float(value)
        except ValueError:
            settings[name] = yaml.safe_load(value)
    return settings


def parse_variant(text: str) -> Variant:
    """Return the variant of a name, or of settings written out."""
    for known in (PLAIN, SUDE, NO_TRUNCATION):
        if text == known.name:
            return known
    return Variant(text, parse_settings(text))


def run_study(config: StudyConfig) -> pd.DataFrame:
    """Run what is missing of a study, keep every result at once, return all rows.

    With several workers each computes with one thread: for a small model that is faster than one
    worker with several threads, and a run's numbers do not depend on how many workers there are.
    """
    table = pd.read_csv(config.out) if config.out.is_file() else pd.DataFrame(columns=KEYS)
    done = set(table[KEYS].itertuples(index=False, name=None))
    jobs = [
        (subject(config.subjects, n).name, method, parse_variant(v).name, seed)
        for seed in range(config.num_seeds)
        for n in config.numbers
        for method in config.methods
        for v in config.variants
    ]
    missing = [job for job in dict.fromkeys(jobs) if job not in done]
    with ProcessPoolExecutor(
        config.workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_open_models,
        initargs=(config,),
    ) as pool:
        running = [pool.submit(_run_job, config, job) for job in missing]
        for future in tqdm(as_completed(running), total=len(missing), desc="study", unit="run"):
            table = pd.concat([table, pd.DataFrame(future.result())], ignore_index=True)
            with atomic_write(config.out) as path:
                table.to_csv(path, index=False)
    return table


_models: dict[str, Any] = {}
"""What a worker keeps open between its jobs."""


def _open_models(config: StudyConfig) -> None:
    torch.set_num_threads(1)
    _models["base"] = open_backbone(config.backbone)
    _models["oracle"] = load_oracle()


def _run_job(config: StudyConfig, job: tuple[str, str, str, int]) -> list[dict[str, Any]]:
    name, method, variant, seed = job
    who = next(s for s in (subject(config.subjects, n) for n in config.numbers) if s.name == name)
    settings = STORED | parse_settings(config.settings) | parse_variant(variant).settings
    preset = settings.pop("preset", "default")
    key = dict(zip(KEYS, job, strict=True))
    grids: dict[str, list[Image.Image]] = {}
    try:
        tuning = TuningConfig(
            image=Path(f"{name}.png"),
            category=who.scene.category,
            method=method,
            seed=seed,
            backbone=config.backbone,
            **settings,
        )
        rows = tune_and_measure(
            _models["base"],
            _models["oracle"],
            who,
            with_preset(tuning, preset),
            num_images=config.num_images,
            grids=grids,
            asks=config.asks,
            errors=config.errors,
        )
        if config.pictures:
            keep_strip(config.pictures / strip_name(*job), grids)
    except UserError as error:  # recorded with its reason; the others go on
        rows = [{"attribute": "", "error": str(error)}]
    return [key | row for row in rows]


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
    job = rows.iloc[0][KEYS].tolist()
    path = folder / strip_name(*job)
    if not path.is_file():
        raise UserError(f"{path} is missing: give the study --pictures {folder}.")
    asked = (
        rows["prompt"] if "ask" in rows else rows["attribute"].fillna("").replace("", "as tuned")
    )
    names = list(dict.fromkeys(asked))
    with Image.open(path) as strip:
        side = strip.height
        cut = [strip.crop((x, 0, x + side, side)) for x in range(0, strip.width, side)]
    each = len(cut) // len(names)
    return {name: cut[k * each : (k + 1) * each] for k, name in enumerate(names)}


if __name__ == "__main__":
    from sude_lab.evaluate.metrics import summarize

    print(summarize(run_study(tyro.cli(StudyConfig))).round(3).to_string())
