"""What a study asks of a tuned model, and the strips of pictures that it keeps."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from studies.runs import keep_strip
from sude_lab.backbone import Backbone
from sude_lab.config import TuningConfig
from sude_lab.errors import UserError
from sude_lab.world import drawing as world
from sude_lab.world import subjects as study
from sude_lab.world.oracle import judge, load_oracle

COLUMNS = ["attribute", "prompt", "image"]
COLUMNS += ["attribute_alignment", "subject_fidelity", "category_alignment"]


@pytest.fixture
def config() -> TuningConfig:
    return TuningConfig(image=Path("candle.png"), category="candle", method="textual_inversion")


@pytest.fixture
def with_token(tiny: Backbone) -> Backbone:
    tiny.add_token("<sks>", "candle")
    return tiny


def test_the_tuning_prompt_is_asked_with_every_attribute_in_the_stored_columns(
    with_token: Backbone, config: TuningConfig
) -> None:
    who = study.subject("held-out", 5)
    told: dict[str, Any] = {"seed": 0, "num_images": 1}
    rows = study.measure(with_token, load_oracle(), who, config, **told)
    words = ["photo of a <sks>", "photo of a burning <sks>", "photo of a melted <sks>"]
    assert [row["prompt"] for row in rows] == words
    assert list(rows[0]) == COLUMNS
    rows = study.measure(with_token, load_oracle(), who, None, **told)
    words = ["photo of a candle", "photo of a burning candle", "photo of a melted candle"]
    assert [row["prompt"] for row in rows] == words


def test_the_oracle_sees_the_background_of_a_drawing() -> None:
    rng, oracle = random.Random(4), load_oracle()
    scenes = [
        world.Scene(category, world.ATTRIBUTES[category][0], world.sample_look(rng), background)
        for category in world.CATEGORIES
        for background in world.BACKGROUNDS
    ]
    right, wrong = (
        torch.stack(
            [
                judge(oracle, [world.draw(s, 64)], s, background=asked(s)).background_alignment[0]
                for s in scenes
            ]
        )
        for asked in (lambda s: None, lambda s: "snow" if s.background == "beach" else "beach")
    )
    assert right.mean() > 0.95 and wrong.mean() < 0.05  # of 36 drawings


def test_kept_pictures_come_back_by_what_was_asked(tmp_path: Path) -> None:
    colours = {"as tuned": "red", "running": "green", "open mouth": "blue"}
    grids = {name: [Image.new("RGB", (32, 32), colour)] * 8 for name, colour in colours.items()}
    key = {"subject": "development-0-dog", "method": "dreambooth", "variant": "a=1,b=2", "seed": 0}
    keep_strip(tmp_path / "strips" / study.strip_name(*key.values()), grids)
    attributes = ["" if name == "as tuned" else name for name in colours for _ in range(8)]
    rows = pd.DataFrame(
        [key | {"attribute": a, "prompt": f"photo of a {a} dog"} for a in attributes]
    )
    kept = study.read_strip(tmp_path / "strips", rows)
    assert list(kept) == list(colours)
    for name, images in kept.items():
        assert [image.size for image in images] == [(32, 32)] * 2
        wanted = np.asarray(Image.new("RGB", (1, 1), colours[name]), dtype=float)
        assert np.abs(np.asarray(images[1], dtype=float)[8:24, 8:24] - wanted).max() < 12  # WebP
    assert len(list((tmp_path / "strips").iterdir())) == 1
    with pytest.raises(UserError, match="keeps no pictures"):
        study.read_strip(tmp_path, rows)


def test_runs_that_differ_have_names_that_differ() -> None:
    variants = ("weight_sude=2", "weight_sude=0.2", "prior=current", "prior=current,truncate=false")
    jobs = [("held-out-0-dog", "vico", v, seed) for v in variants for seed in (0, 1)]
    names = {study.strip_name(*job) for job in jobs}
    assert len(names) == len(jobs)
    assert all(name.isascii() and not set(name) & set(" ,/\\:") for name in names)
