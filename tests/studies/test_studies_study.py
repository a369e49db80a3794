"""What a study asks of a tuned model, and with which settings it tunes."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from sude_lab.backbone import Backbone
from sude_lab.config import TuningConfig
from sude_lab.errors import UserError
from sude_lab.world import drawing as world
from sude_lab.world import subjects as study
from sude_lab.world.oracle import judge, load_oracle

OLD_COLUMNS = ["attribute", "prompt", "image"]
OLD_COLUMNS += ["attribute_alignment", "subject_fidelity", "category_alignment"]


@pytest.fixture
def config() -> TuningConfig:
    return TuningConfig(image=Path("candle.png"), category="candle", method="textual_inversion")


@pytest.fixture
def with_token(tiny: Backbone) -> Backbone:
    tiny.add_token("<sks>", "candle")
    return tiny


def test_asks_are_drawn_with_every_attribute_and_every_background(
    with_token: Backbone, config: TuningConfig
) -> None:
    who, grids = study.subject("held-out", 5), {}
    rows = study.measure(
        with_token,
        load_oracle(),
        who,
        config,
        seed=0,
        num_images=1,
        grids=grids,
        asks=("P3", "background", "photo of a {S*} at night"),
    )
    where = list(world.BACKGROUNDS.values())
    assert [(row["ask"], row["prompt"]) for row in rows] == [
        ("P3", "photo of a <sks> and it is a burning candle"),
        ("P3", "photo of a <sks> and it is a melted candle"),
        *(("background", f"photo of a <sks> candle {words}") for words in where),
        ("photo of a {S*} at night", "photo of a <sks> at night"),
    ]
    assert [row["attribute"] for row in rows] == ["burning", "melted", *[""] * 5]
    assert [row["background"] for row in rows] == ["", "", *world.BACKGROUNDS, ""]
    assert all(0 <= row["background_alignment"] <= 1 for row in rows)
    assert list(grids) == [row["prompt"] for row in rows]


def test_both_at_once_are_all_pairs(with_token: Backbone, config: TuningConfig) -> None:
    asked = list(
        study._prompts(study.subject("held-out", 5), config, ("attribute and background",))
    )
    assert len(asked) == 2 * 4
    assert asked[0] == (
        "attribute and background",
        "burning",
        "beach",
        "photo of a burning <sks> candle on the beach",
    )


def test_without_asks_the_tuning_prompt_is_asked_and_the_columns_are_the_old_ones(
    with_token: Backbone, config: TuningConfig
) -> None:
    who = study.subject("held-out", 5)
    told: dict[str, Any] = {"seed": 0, "num_images": 1}
    rows = study.measure(with_token, load_oracle(), who, config, **told)
    words = ["photo of a <sks>", "photo of a burning <sks>", "photo of a melted <sks>"]
    assert [row["prompt"] for row in rows] == words
    assert list(rows[0]) == OLD_COLUMNS
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


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("preset=paper", {"weighting": "exact", "prior": "pretrained", "weight_sude": None}),
        (
            "preset=reference,learning_rate=3e-4",
            {"prior": "current", "learning_rate": 3e-4, "train_text_encoder": True},
        ),
        ("sude", {"weighting": None, "prior": None}),
    ],
)
def test_a_variant_may_start_from_a_preset(
    variant: str, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[TuningConfig, tuple[str, ...]]] = []

    def tune_and_measure(base: Any, oracle: Any, who: Any, config: TuningConfig, **told: Any):  # type: ignore[no-untyped-def]
        seen.append((config, told["asks"]))
        return [{"attribute": ""}]

    monkeypatch.setattr(study, "tune_and_measure", tune_and_measure)
    monkeypatch.setattr(study, "_models", {"base": None, "oracle": None})
    asked = study.StudyConfig(out=Path("study.csv"), asks=("P1",))
    job = ("development-0-dog", "dreambooth", variant, 0)
    (row,) = study._run_job(asked, job)
    assert row == dict(zip(study.KEYS, job, strict=True)) | {"attribute": ""}
    ((config, asks),) = seen
    assert {name: getattr(config, name) for name in expected} == expected and asks == ("P1",)


def test_an_unknown_preset_is_recorded_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "_models", {"base": None, "oracle": None})
    job = ("development-0-dog", "dreambooth", "preset=nothing", 0)
    (row,) = study._run_job(study.StudyConfig(out=Path("study.csv")), job)
    assert "preset" in row["error"]


def test_kept_pictures_come_back_by_what_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    colours = {"as tuned": "red", "running": "green", "open mouth": "blue"}

    def tune_and_measure(base: Any, oracle: Any, who: Any, config: TuningConfig, **told: Any):  # type: ignore[no-untyped-def]
        for name, colour in colours.items():
            told["grids"][name] = [Image.new("RGB", (32, 32), colour)] * 8
        asked = ["" if name == "as tuned" else name for name in colours]
        return [{"attribute": a, "prompt": f"photo of a {a} dog"} for a in asked for _ in range(8)]

    monkeypatch.setattr(study, "tune_and_measure", tune_and_measure)
    monkeypatch.setattr(study, "_models", {"base": None, "oracle": None})
    job = ("development-0-dog", "dreambooth", "prior=current,truncate=false", 0)
    asked = study.StudyConfig(out=Path("study.csv"), pictures=tmp_path / "strips")
    rows = pd.DataFrame(study._run_job(asked, job))
    kept = study.read_strip(tmp_path / "strips", rows)
    assert list(kept) == list(colours)
    for name, images in kept.items():
        assert [image.size for image in images] == [(32, 32)] * 2
        wanted = np.asarray(Image.new("RGB", (1, 1), colours[name]), dtype=float)
        assert np.abs(np.asarray(images[1], dtype=float)[8:24, 8:24] - wanted).max() < 12  # WebP
    assert len(list((tmp_path / "strips").iterdir())) == 1
    with pytest.raises(UserError, match="--pictures"):
        study.read_strip(tmp_path, rows)


def test_runs_that_differ_have_names_that_differ() -> None:
    variants = ("weight_sude=2", "weight_sude=0.2", "prior=current", "prior=current,truncate=false")
    jobs = [("held-out-0-dog", "vico", v, seed) for v in variants for seed in (0, 1)]
    names = {study.strip_name(*job) for job in jobs}
    assert len(names) == len(jobs)
    assert all(name.isascii() and not set(name) & set(" ,/\\:") for name in names)


def test_a_small_bank_s_noise_is_learnt_by_heart(tiny: Backbone) -> None:
    """The loss falls on the pairs that were seen; without tuning none was."""
    who = study.subject("held-out", 5)
    config = TuningConfig(
        image=Path("candle.png"),
        category="candle",
        max_train_steps=80,
        learning_rate=3e-3,
        prior_bank=2,
        prior_bank_dtype="live",
    )
    config = study.configure(config, tiny)
    untuned = tiny.copy()
    untuned.add_token(config.token, "candle")
    before = study.noise_errors(untuned, config, who.picture)
    assert before["loss_seen"] == pytest.approx(before["loss_new"], rel=0.1)
    tuned = tiny.copy()
    assert len(list(study.tune(config, tuned, who.picture))) == 80
    after = study.noise_errors(tuned, config, who.picture)
    assert after["loss_seen"] < 0.8 * after["loss_new"]
    assert after["loss_seen"] < 0.8 * before["loss_seen"]
