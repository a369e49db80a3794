"""A run's folder is whole or a checkpoint, and an interrupted run ends as an unbroken one."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sude_lab.backbone import Backbone
from sude_lab.errors import UserError
from sude_lab.runs import (
    CHECKPOINT,
    CONFIG,
    ENVIRONMENT,
    METRICS,
    PICTURE,
    SAMPLES,
    WEIGHTS,
    Run,
    default_prompts,
    run_tuning,
)
from sude_lab.tuning import Step, TuningConfig

FINISHED = {CONFIG, ENVIRONMENT, METRICS, PICTURE, SAMPLES, WEIGHTS}


@pytest.fixture
def config(subject_picture: Path, tiny_folder: Path) -> TuningConfig:
    return TuningConfig(
        image=subject_picture,
        category="dog",
        backbone=str(tiny_folder),
        token_learning_rate=1e-2,
        seed=3,
        device="cpu",
    )


@pytest.fixture
def tune_in(fresh: Callable[[], Backbone]) -> Callable[..., Run]:
    """`run_tuning` on a fresh backbone, quietly."""

    def start(config: TuningConfig, out: Path, **settings: Any) -> Run:
        chosen = {"backbone": fresh(), "progress": False, "num_samples": 2} | settings
        return run_tuning(config, out, **chosen)

    return start


def stop_at(number: int) -> Callable[[Step], None]:
    def stop(step: Step) -> None:
        if step.number == number:
            raise KeyboardInterrupt

    return stop


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its name, what was measured on this machine left out."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ENVIRONMENT
    }


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- a whole run ---------------------------------------------------------------------------------


def test_a_run_leaves_everything_that_tells_of_it(
    config: TuningConfig, tune_in: Callable[..., Run], tmp_path: Path
) -> None:
    run = tune_in(config, tmp_path / "new" / "run", sample_prompts=["photo of a {S*}", "a cat"])
    assert names(run.folder) == FINISHED
    settings = json.loads((run.folder / CONFIG).read_text())
    assert settings["max_train_steps"] == 4 and settings["weighting"] == "reference"
    missing = [name for name, value in settings.items() if value is None]
    assert set(missing) <= {"prompt"}
    assert run.config == Run.open(run.folder).config
    assert run.picture().size == (32, 32)
    metrics = run.metrics()
    assert metrics["step"].tolist() == [1, 2, 3, 4]
    assert {"t", "loss_subject", "loss_sude", "tau", "open_gates", "rho"} < set(metrics.columns)
    assert np.isfinite(metrics.to_numpy(dtype=float)).all()
    told = json.loads((run.folder / ENVIRONMENT).read_text())
    assert told["steps"] == 4 and told["device"] == "cpu" and told["seconds"] > 0
    assert {"torch", "diffusers", "sude-lab"} <= set(told["versions"])
    assert Image.open(run.folder / SAMPLES).size == (2 * 32, 2 * 32)
    assert run.prompt("photo of a {S*}") == "photo of a <sks>"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"train": "lora"},
        {"train": "unet", "train_text_encoder": True},
        {"method": "textual_inversion"},
    ],
)
def test_a_loaded_run_draws_its_sample_grid_again(
    settings: dict[str, Any], config: TuningConfig, tune_in: Callable[..., Run], tmp_path: Path
) -> None:
    from sude_lab.generation import generate

    run = tune_in(replace(config, **settings), tmp_path / "run")
    (prompt,) = default_prompts(run.config)
    images = generate(run.load("cpu"), run.prompt(prompt), num_images=2, seed=run.config.seed)
    grid = np.int16(Image.open(run.folder / SAMPLES))
    for k, image in enumerate(images):
        assert np.abs(grid[:, 32 * k : 32 * (k + 1)] - np.int16(image)).max() <= 1


def test_no_samples_are_drawn_where_none_are_asked_for(
    config: TuningConfig, tune_in: Callable[..., Run], tmp_path: Path
) -> None:
    run = tune_in(config, tmp_path / "run", num_samples=0)
    assert names(run.folder) == FINISHED - {SAMPLES}


# --- interrupted and resumed ---------------------------------------------------------------------


@pytest.mark.parametrize("stopped", [1, 3])  # before the first checkpoint, and after it
@pytest.mark.parametrize(
    "settings",
    [{}, {"method": "textual_inversion"}, {"train": "lora", "prior_loss_weight": 1.0}],
)
def test_a_resumed_run_is_the_unbroken_one_byte_for_byte(
    stopped: int,
    settings: dict[str, Any],
    config: TuningConfig,
    tune_in: Callable[..., Run],
    tmp_path: Path,
) -> None:
    config = replace(config, num_class_images=1, **settings)
    whole = tune_in(config, tmp_path / "whole", checkpoint_every=2)
    out = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        tune_in(config, out, checkpoint_every=2, on_step=stop_at(stopped))
    assert names(out) == {CONFIG, PICTURE} | ({CHECKPOINT} if stopped > 2 else set())
    with pytest.raises(UserError, match="not finished"):
        Run.open(out)
    with pytest.raises(UserError, match="--resume"):
        tune_in(config, out)
    seen: list[int] = []
    tune_in(
        config, out, checkpoint_every=2, resume=True, on_step=lambda step: seen.append(step.number)
    )
    assert seen == ([3, 4] if stopped > 2 else [1, 2, 3, 4])
    assert content(out) == content(whole.folder)


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"weight_sude": 0.0}, "--weight-sude"),
        ({"seed": 4}, "--seed"),
        ({"method": "textual_inversion"}, "--method"),
        ({"category": "cat"}, "--category"),
        ({"truncate": False}, "--truncate"),
    ],
)
def test_a_run_resumed_with_other_settings_is_refused_by_the_flags_name(
    settings: dict[str, Any],
    flag: str,
    config: TuningConfig,
    tune_in: Callable[..., Run],
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        tune_in(config, out, checkpoint_every=1, on_step=stop_at(2))
    before = content(out)
    with pytest.raises(UserError) as error:
        tune_in(replace(config, **settings), out, resume=True)
    assert flag in str(error.value)
    assert content(out) == before


def test_a_run_resumed_on_another_picture_is_refused(
    config: TuningConfig, tune_in: Callable[..., Run], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        tune_in(config, out, on_step=stop_at(2))
    moved = tmp_path / "moved.png"
    moved.write_bytes(config.image.read_bytes())
    Image.new("RGB", (64, 64), "red").save(tmp_path / "other.png")
    with pytest.raises(UserError, match="another picture"):
        tune_in(replace(config, image=tmp_path / "other.png"), out, resume=True)
    assert tune_in(replace(config, image=moved), out, resume=True).metrics()["step"].max() == 4


def test_a_finished_run_is_not_done_again(
    config: TuningConfig, tune_in: Callable[..., Run], tmp_path: Path
) -> None:
    run = tune_in(config, tmp_path / "run", num_samples=0)
    before = content(run.folder)
    with pytest.raises(UserError, match="finished run"):
        tune_in(config, run.folder)
    again = tune_in(config, run.folder, resume=True, on_step=stop_at(1))
    assert again == run and content(run.folder) == before


# --- what is no run ------------------------------------------------------------------------------


def test_a_folder_without_a_run_is_refused(
    config: TuningConfig, tune_in: Callable[..., Run], tmp_path: Path
) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "letter.txt").write_text("mine")
    for folder in (tmp_path / "letters", tmp_path / "missing"):
        with pytest.raises(UserError, match="not a run's folder"):
            Run.open(folder)
    with pytest.raises(UserError, match="holds no run"):
        tune_in(config, tmp_path / "letters")
    with pytest.raises(UserError, match="is a file"):
        tune_in(config, tmp_path / "letters" / "letter.txt")
    with pytest.raises(UserError, match="no run to resume"):
        tune_in(config, tmp_path / "missing", resume=True)
    assert names(tmp_path) == {"letters"} and names(tmp_path / "letters") == {"letter.txt"}


@pytest.mark.parametrize("text", ["{half", "[]", '{"image": 3}', '{"category": "dog"}'])
def test_a_damaged_configuration_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(text)
    (tmp_path / ENVIRONMENT).write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        Run.open(tmp_path)


def test_an_unknown_setting_in_a_configuration_is_named(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text('{"image": "a.png", "category": "dog", "colour": 1}')
    (tmp_path / ENVIRONMENT).write_text("{}")
    with pytest.raises(UserError, match="'colour'"):
        Run.open(tmp_path)


def test_a_damaged_checkpoint_is_refused(
    config: TuningConfig, tune_in: Callable[..., Run], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        tune_in(config, out, checkpoint_every=1, on_step=stop_at(2))
    (out / CHECKPOINT).write_bytes((out / CHECKPOINT).read_bytes()[:500])
    with pytest.raises(UserError, match="damaged"):
        tune_in(config, out, resume=True)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"image": "text.png"}, "not a picture"),
        ({"image": "empty.png"}, "zero bytes"),
        ({"image": "missing.png"}, "does not exist"),
        ({"image": "."}, "is a folder"),
        ({"category": "okapi"}, "never met the word 'okapi'"),
        ({"category": ""}, "category is empty"),
        ({"token": "dog"}, "already in the vocabulary"),
        ({"token": "my dog"}, "one word"),
        ({"resolution": 30}, "multiple of 4"),
    ],
)
def test_bad_input_writes_nothing(
    settings: dict[str, Any],
    expected: str,
    config: TuningConfig,
    tune_in: Callable[..., Run],
    tmp_path: Path,
) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").touch()
    if "image" in settings:
        settings = {"image": tmp_path / settings["image"]}
    before = names(tmp_path)
    with pytest.raises(UserError) as error:
        tune_in(replace(config, **settings), tmp_path / "new" / "run")
    assert expected in str(error.value)
    assert names(tmp_path) == before


def test_a_run_that_fails_at_its_first_step_writes_nothing(
    config: TuningConfig,
    tune_in: Callable[..., Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sude_lab import tuning

    total = tuning.total_loss
    monkeypatch.setattr(tuning, "total_loss", lambda *a: total(*a) * float("nan"))
    with pytest.raises(UserError, match="step 1"):
        tune_in(config, tmp_path / "run")
    assert names(tmp_path) == set()
