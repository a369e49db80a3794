"""A run's folder is whole or a checkpoint, and an interrupted run ends as an unbroken one."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import say
from safetensors.torch import load_file, save_file

from sude_lab import tuning
from sude_lab.backbone import Backbone
from sude_lab.config import TuningConfig
from sude_lab.errors import UserError
from sude_lab.io.files import sole_writer
from sude_lab.io.pictures import load_picture
from sude_lab.methods import get_method
from sude_lab.runs import folder as runs
from sude_lab.runs.export import CARD
from sude_lab.runs.folder import (
    CHECKPOINT,
    CONFIG,
    ENVIRONMENT,
    LOGS,
    METRICS,
    PICTURE,
    SAMPLES,
    VALIDATION,
    WEIGHTS,
    Run,
    run_tuning,
)
from sude_lab.tuning import Step

FINISHED = {CARD, CONFIG, ENVIRONMENT, METRICS, PICTURE, SAMPLES, WEIGHTS}


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
def candle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The picture of a second subject."""
    path = tmp_path_factory.mktemp("candle") / "candle.png"
    gradient = Image.linear_gradient("L").resize((64, 64))
    Image.merge("RGB", (gradient, gradient.rotate(90), gradient.rotate(180))).save(path)
    return path


@pytest.fixture
def tune_in(fresh: Callable[[], Backbone]) -> Callable[..., Run]:
    """`run_tuning` on a fresh backbone, quietly."""

    def start(config: TuningConfig, out: Path, **settings: Any) -> Run:
        quiet = {"progress": False, "num_samples": 2, "report_to": "none"}
        return run_tuning(config, out, **{"backbone": fresh()} | quiet | settings)

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
        if path.is_file() and path.name != ENVIRONMENT and LOGS not in path.parts
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
    stays = {"class_images", "initializer", "prompt", "regularizer_file", "resolution"}
    assert set(missing) <= stays
    assert run.config == Run.open(run.folder).config
    assert run.picture().size == (32, 32)
    metrics = run.metrics()
    assert metrics["step"].tolist() == [1, 2, 3, 4]
    assert {"t", "loss_subject", "loss_sude", "tau", "open_gates", "rho"} < set(metrics.columns)
    assert np.isfinite(metrics.to_numpy(dtype=float)).all()
    about = json.loads((run.folder / ENVIRONMENT).read_text())
    assert about["steps"] == 4 and about["device"] == "cpu" and about["seconds"] > 0
    assert {"torch", "diffusers", "sude-lab"} <= set(about["versions"])
    assert Image.open(run.folder / SAMPLES).size == (2 * 32, 2 * 32)
    assert run.prompt("photo of a {S*}") == "photo of a <sks>"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"checkpoint_every": 0},
            "--checkpoint-every is 0: it must be a whole number of at least 1",
        ),
        ({"checkpoint_every": 2.5}, "--checkpoint-every is 2.5"),
        ({"num_samples": -1}, "--num-samples is -1"),
        ({"num_samples": "4"}, "--num-samples is '4'"),
        ({"validation_every": True}, "--validation-every is True"),
        ({"sample_prompts": "a {S*2}"}, "asks for {S*2}"),
        ({"sample_prompts": [5]}, "[5] is no text"),
    ],
)
def test_what_python_hands_over_is_refused_before_the_work(
    settings: dict[str, Any],
    expected: str,
    config: TuningConfig,
    tune_in: Callable[..., Run],
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError) as error:
        tune_in(config, tmp_path / "run", **settings)
    assert expected in str(error.value) and not list(tmp_path.iterdir())


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
    (prompt,) = get_method(run.config.method).prompts(run.config)
    images = generate(run.load("cpu"), run.prompt(prompt), num_images=2, seed=run.config.seed)
    grid = np.int16(Image.open(run.folder / SAMPLES))
    for k, image in enumerate(images):
        assert np.abs(grid[:, 32 * k : 32 * (k + 1)] - np.int16(image)).max() <= 1


def test_no_samples_are_drawn_where_none_are_asked_for(
    config: TuningConfig, tune_in: Callable[..., Run], tmp_path: Path
) -> None:
    run = tune_in(config, tmp_path / "run", num_samples=0)
    assert names(run.folder) == FINISHED - {SAMPLES}


def test_the_bar_shows_gates_where_somebody_asked(
    config: TuningConfig,
    tune_in: Callable[..., Run],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runs, "tqdm", partial(runs.tqdm, mininterval=0, miniters=1))
    watched = replace(config, weight_sude=0.0, monitor_sude=True, sude_every=2, max_train_steps=4)
    tune_in(watched, tmp_path / "run", progress=True)
    shown = capsys.readouterr().err
    assert "gates=0." in shown or "gates=1." in shown
    assert "nan" not in shown


def test_several_subjects_are_one_run(
    config: TuningConfig, candle: Path, tune_in: Callable[..., Run], tmp_path: Path
) -> None:
    config = replace(config, more_subjects=(f"candle=<my-candle>={candle}",))
    run = tune_in(config, tmp_path / "run")
    assert names(run.folder) == FINISHED | {"picture-2.png"}
    assert [s.category for s in run.config.subjects] == ["dog", "candle"]
    assert run.config == Run.open(run.folder).config
    for number, path in enumerate((config.image, candle)):
        expected = load_picture(path, resolution=32).image
        assert run.picture(number).tobytes() == expected.tobytes()
    assert run.prompt("a {S*} and a {S*2}") == "a <sks> and a <my-candle>"
    with pytest.raises(UserError, match=r"asks for \{S\*3\}, but the run has 2"):
        run.prompt("a {S*3}")
    # A row of the grid for each of them: the second one is the candle's.
    from sude_lab.generation import generate

    row = generate(run.load("cpu"), "photo of a <my-candle> candle", num_images=2, seed=3)
    grid = np.int16(Image.open(run.folder / SAMPLES))
    assert grid.shape == (64, 64, 3)
    assert np.abs(grid[32:] - np.concatenate([np.int16(i) for i in row], axis=1)).max() <= 1


# --- interrupted and resumed ---------------------------------------------------------------------


@pytest.mark.parametrize("stopped", [1, 3])  # before the first checkpoint, and after it
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "textual_inversion"},
        {"train": "lora", "prior_loss_weight": 1.0},
        {"method": "vico", "max_train_steps": 4},
    ],
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
    steps: list[int] = []
    tune_in(
        config,
        out,
        checkpoint_every=2,
        resume=True,
        on_step=lambda step: steps.append(step.number),
    )
    assert steps == ([3, 4] if stopped > 2 else [1, 2, 3, 4])
    assert content(out) == content(whole.folder)


@pytest.fixture
def system_signals() -> Iterator[None]:
    """SIGTERM as a process begins with it: Ray, where a test before used it, leaves its own."""
    handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.usefixtures("system_signals")
def test_a_run_that_the_system_ends_is_continued_from_its_last_step(
    config: TuningConfig, tune_in: Callable[..., Run], tmp_path: Path
) -> None:
    def terminate(step: Step) -> None:
        if step.number == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    whole, out = tune_in(config, tmp_path / "whole"), tmp_path / "broken"
    with pytest.raises(runs.Terminated):
        tune_in(config, out, on_step=terminate)  # no checkpoint was due
    assert runs._read_checkpoint(out / CHECKPOINT)["step"] == 3
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert content(tune_in(config, out, resume=True).folder) == content(whole.folder)


@pytest.mark.usefixtures("system_signals")
def test_the_command_says_how_a_run_that_was_ended_goes_on(
    config: TuningConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = Step.row

    def terminate(step: Step) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return row(step)

    monkeypatch.setattr(Step, "row", terminate)
    words = ["tune", config.image, "--category", "dog", "--backbone", config.backbone]
    result = say(*words, "--device", "cpu", "--num-samples", 0, "--out", tmp_path / "run")
    assert result.code == 143 and "--resume" in result.err and "checkpoint" in result.err


LONG = " ".join(["a running dog on the"] * 20)


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"prompt": f"photo of a {{S*}} {LONG}"}, {}),
        ({"prompt": "a {S*}", "num_vectors": 64}, {}),
        ({}, {"sample_prompts": ["a {S*}", f"{LONG} {{S*}}"]}),
        ({}, {"validation_prompts": [LONG]}),
    ],
)
def test_a_prompt_that_is_not_read_to_its_end_is_refused(
    settings: dict[str, Any],
    options: dict[str, Any],
    config: TuningConfig,
    tune_in: Callable[..., Run],
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match="leaves out"):
        tune_in(replace(config, **settings), tmp_path / "run", **options)
    assert not list(tmp_path.iterdir())


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


def test_every_picture_is_compared_when_a_run_is_resumed(
    config: TuningConfig, candle: Path, tune_in: Callable[..., Run], tmp_path: Path
) -> None:
    def with_second(path: Path, token: str = "<my-candle>") -> TuningConfig:
        return replace(config, more_subjects=(f"candle={token}={path}",))

    out = tmp_path / "run"
    whole = tune_in(with_second(candle), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        tune_in(with_second(candle), out, checkpoint_every=1, on_step=stop_at(3))
    moved, other = tmp_path / "moved.png", tmp_path / "other.png"
    moved.write_bytes(candle.read_bytes())
    Image.new("RGB", (64, 64), "red").save(other)
    with pytest.raises(UserError, match=r"another picture than .*other\.png"):
        tune_in(with_second(other), out, resume=True)
    with pytest.raises(UserError, match="--more-subjects"):
        tune_in(with_second(candle, token="<wax>"), out, resume=True)
    with pytest.raises(UserError, match="--more-subjects"):
        tune_in(config, out, resume=True)
    run = tune_in(with_second(moved), out, resume=True)
    assert content(run.folder) == content(whole.folder)


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


@pytest.mark.parametrize(
    "text",
    [
        "{half",
        "[]",
        '{"image": 3}',
        '{"category": "dog"}',
        '{"image": "a.png", "category": "dog", "seed": "four"}',
        '{"image": "a.png", "category": "dog", "more_subjects": 3}',
    ],
)
def test_a_damaged_configuration_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(text)
    (tmp_path / ENVIRONMENT).write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        Run.open(tmp_path)


def test_an_unknown_setting_in_a_configuration_is_named(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text('{"image": "a.png", "category": "dog", "colour": 1}')
    (tmp_path / ENVIRONMENT).write_text("{}")
    with pytest.raises(UserError, match="'colour': open it with the version of sude_lab"):
        Run.open(tmp_path)
    (tmp_path / CONFIG).write_text('{"image": "a.png", "category": "dog", "method": "hyper"}')
    with pytest.raises(UserError, match="no method 'hyper'"):
        Run.open(tmp_path)


class Foreign:
    """What a checkpoint must not be able to call."""


CHECKPOINTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "cut short": (lambda state: None, "damaged"),
    "with code in it": (lambda state: {"step": Foreign()}, "damaged"),
    "a model": (lambda state: state["trained"], "no checkpoint of this version"),
    "a list": (lambda state: [1], "no checkpoint of this version"),
    "of a longer run": (lambda state: state | {"step": 10**6}, "delete it, and --resume starts"),
    "of no step": (lambda state: state | {"step": -1}, "delete it, and --resume starts anew"),
    "without an optimiser": (lambda state: state | {"optimizer": {}}, "start a new run"),
    "of another optimiser": (
        lambda state: state | {"optimizer": state["optimizer"] | {"param_groups": []}},
        "start a new run",
    ),
    "of other weights": (
        lambda state: state | {"trained": {"unet.conv": torch.zeros(1)}},
        "start a new run",
    ),
    "of a wider model": (
        lambda state: state | {"trained": {k: torch.zeros(7, 5, 3) for k in state["trained"]}},
        "start a new run",
    ),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_an_old_or_foreign_checkpoint_is_refused(
    kind: str, config: TuningConfig, tune_in: Callable[..., Run], tmp_path: Path
) -> None:
    change, expected = CHECKPOINTS[kind]
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        tune_in(config, out, checkpoint_every=1, on_step=stop_at(2))
    path = out / CHECKPOINT
    changed = change(torch.load(path, weights_only=True))
    if changed is None:
        path.write_bytes(path.read_bytes()[:500])
    else:
        torch.save(changed, path)
    before = content(out)
    with pytest.raises(UserError, match=expected) as error:
        tune_in(config, out, resume=True)
    assert str(path) in str(error.value)
    assert content(out) == before


def nothing(path: Path) -> None:
    path.unlink()


def pickled(path: Path) -> None:
    torch.save({"weights": torch.zeros(2)}, path.with_suffix(".bin"))
    path.unlink()


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def text(path: Path) -> None:
    path.write_text("Dear diary")


def foreign(path: Path) -> None:
    save_file({"transformer.blocks.0.weight": torch.zeros(3, 3)}, path)


def longer(path: Path) -> None:
    save_file({k: torch.cat([v, v], dim=-1) for k, v in load_file(path).items()}, path)


@pytest.mark.parametrize("change", [nothing, pickled, half, text, foreign, longer])
@pytest.mark.parametrize(
    ("settings", "file"),
    [
        ({"method": "textual_inversion"}, "learned_embeds.safetensors"),
        ({"method": "custom_diffusion"}, "unet.safetensors"),
        ({"train": "unet", "train_text_encoder": True}, "text_encoder.safetensors"),
        ({"train": "lora"}, "pytorch_lora_weights.safetensors"),
    ],
)
def test_old_or_foreign_weights_are_refused(
    settings: dict[str, Any],
    file: str,
    change: Callable[[Path], None],
    config: TuningConfig,
    tune_in: Callable[..., Run],
    tmp_path: Path,
) -> None:
    steps = {"max_train_steps": 1, "learning_rate": 1e-3, "num_class_images": 1}
    run = tune_in(replace(config, **steps | settings), tmp_path / "run", num_samples=0)
    for path in (run.folder / WEIGHTS).iterdir():
        if path.name != file and change in (nothing, pickled):
            path.unlink()
    change(run.folder / WEIGHTS / file)
    with pytest.raises(UserError) as error:
        run.load("cpu")
    assert "\n" not in str(error.value)
    if change in (nothing, pickled):
        assert "has no safetensors" in str(error.value)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"image": "text.png"}, "not a picture"),
        ({"image": "empty.png"}, "not a picture"),
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


# --- failures while tuning -----------------------------------------------------------------------


def spoil(monkeypatch: pytest.MonkeyPatch, at: int, how: Callable[[torch.Tensor], Any]) -> None:
    """Let the loss of step `at` go wrong."""
    total, calls = tuning.total_loss, []

    def spoilt(*args: Any) -> torch.Tensor:
        calls.append(1)
        loss = total(*args)
        return how(loss) if len(calls) == at else loss

    monkeypatch.setattr(tuning, "total_loss", spoilt)


def full_memory(loss: torch.Tensor) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")


FAILURES: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "nan": (lambda loss: loss * float("nan"), "The loss became nan at step 4 (t = "),
    "memory": (full_memory, "--train-batch-size"),
}


@pytest.mark.parametrize("kind", FAILURES)
@pytest.mark.parametrize("settings", [{}, {"train": "lora"}, {"method": "textual_inversion"}])
def test_a_failure_keeps_the_checkpoint_and_names_it(
    kind: str,
    settings: dict[str, Any],
    config: TuningConfig,
    tune_in: Callable[..., Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, (how, expected) = replace(config, **settings), FAILURES[kind]
    whole = tune_in(config, tmp_path / "whole")
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        spoil(patch, 4, how)
        with pytest.raises(UserError) as error:
            tune_in(config, out, checkpoint_every=2)
    message = str(error.value)
    assert expected in message and "\n" not in message
    assert message.endswith(f"; {out / CHECKPOINT} is kept, so that --resume continues.")
    assert names(out) == {CONFIG, PICTURE, CHECKPOINT}
    # With more memory, say, the run goes on as if nothing had been.
    tune_in(config, out, resume=True)
    assert content(out) == content(whole.folder)


def test_a_failure_before_the_first_checkpoint_names_none(
    config: TuningConfig,
    tune_in: Callable[..., Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil(monkeypatch, 2, full_memory)
    with pytest.raises(UserError) as error:
        tune_in(config, tmp_path / "run")
    assert "--train-batch-size" in str(error.value) and CHECKPOINT not in str(error.value)


def test_a_failure_at_the_first_step_after_a_resume_names_the_checkpoint(
    config: TuningConfig,
    tune_in: Callable[..., Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        tune_in(config, out, checkpoint_every=2, on_step=stop_at(3))
    spoil(monkeypatch, 1, full_memory)
    with pytest.raises(UserError) as error:
        tune_in(config, out, resume=True)
    assert f"{out / CHECKPOINT} is kept" in str(error.value)
    assert names(out) == {CONFIG, PICTURE, CHECKPOINT}


def test_a_grid_that_does_not_fit_into_the_memory_says_so(
    config: TuningConfig,
    tune_in: Callable[..., Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(runs, "generate", full)
    with pytest.raises(UserError, match=r"smaller --num-samples; .*checkpoint\.pt is kept"):
        tune_in(config, tmp_path / "run", validation_every=2, checkpoint_every=1)
    with pytest.raises(UserError, match=r"samples\.png was drawn: use a smaller --num-samples"):
        tune_in(config, tmp_path / "other")


def test_a_run_that_fails_at_its_first_step_writes_nothing(
    config: TuningConfig,
    tune_in: Callable[..., Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil(monkeypatch, 1, lambda loss: loss * float("nan"))
    with pytest.raises(UserError, match="step 1"):
        tune_in(config, tmp_path / "run")
    assert names(tmp_path) == set()


# --- validation ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"train": "lora", "gradient_checkpointing": True},
        {"method": "textual_inversion"},
        {"method": "custom_diffusion", "learning_rate": 1e-3, "num_class_images": 1},
        {"method": "vico", "learning_rate": 1e-3},
    ],
)
def test_validation_shows_the_model_as_it_is_and_changes_no_bit(
    settings: dict[str, Any], config: TuningConfig, tune_in: Callable[..., Run], tmp_path: Path
) -> None:
    config = replace(config, max_train_steps=4, **settings)
    modes: dict[int, list[bool]] = {0: [], 2: []}
    runs_of = {}
    chance = torch.get_rng_state()
    for every, flags in modes.items():

        def look(step: Step, flags: list[bool] = flags) -> None:
            flags.append(step.method.backbone.unet.training)

        runs_of[every] = tune_in(
            config, tmp_path / str(every), validation_every=every, on_step=look
        )
    assert torch.equal(chance, torch.get_rng_state())
    assert modes[0] == modes[2] == [config.gradient_checkpointing] * 4
    watched = content(runs_of[2].folder)
    grids = [watched.pop(f"{VALIDATION}/step-{k:06d}.png") for k in (2, 4)]
    assert watched == content(runs_of[0].folder)
    # The grid of the last step is what the finished run draws, that of step 2 a run of two steps.
    assert grids[1] == watched[SAMPLES]
    two = tune_in(replace(config, max_train_steps=2), tmp_path / "two")
    assert grids[0] == (two.folder / SAMPLES).read_bytes() != grids[1]


def test_validation_has_prompts_of_its_own(
    config: TuningConfig, tune_in: Callable[..., Run], tmp_path: Path
) -> None:
    prompts = ["photo of a running {S*} dog", "photo of a {S*}", "photo of a dog"]
    config = replace(config, max_train_steps=1)
    run = tune_in(config, tmp_path / "run", validation_every=1, validation_prompts=prompts)
    grid = Image.open(run.folder / VALIDATION / "step-000001.png")
    assert grid.size == (2 * 32, 3 * 32)
    with pytest.raises(UserError, match=r"asks for \{S\*2\}"):
        tune_in(config, tmp_path / "a", validation_every=1, validation_prompts=["a {S*2}"])
    with pytest.raises(UserError, match="at least 1"):
        tune_in(config, tmp_path / "a", validation_every=1, num_samples=0)
    assert not (tmp_path / "a").exists()


# --- trackers ------------------------------------------------------------------------------------


def scalars(folder: Path, name: str) -> tuple[list[int], list[float]]:
    """The steps and the values of one curve, as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    curve = events.Scalars(name)
    return [event.step for event in curve], [event.value for event in curve]


def test_tensorboard_shows_the_metrics_and_the_grids(
    config: TuningConfig, tune_in: Callable[..., Run], tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracked = tune_in(config, tmp_path / "tracked", report_to="tensorboard", validation_every=4)
    assert names(tracked.folder) == FINISHED | {LOGS, VALIDATION}
    (logs,) = (tracked.folder / LOGS).iterdir()
    for name in ("loss_subject", "loss_sude", "rho", "learning_rate"):
        steps, values = scalars(logs, name)
        assert steps == [1, 2, 3, 4]
        assert values == pytest.approx(tracked.metrics()[name].tolist())
    events = EventAccumulator(str(logs))
    events.Reload()
    (picture,) = events.Images("validation")
    assert (picture.step, picture.width, picture.height) == (4, 64, 32)
    plain = tune_in(config, tmp_path / "plain", validation_every=4)
    assert content(tracked.folder) == content(plain.folder)


def test_the_curves_of_a_resumed_run_are_those_of_an_unbroken_one(
    config: TuningConfig, tune_in: Callable[..., Run], tmp_path: Path
) -> None:
    whole = tune_in(config, tmp_path / "whole")
    out, settings = tmp_path / "run", {"report_to": "tensorboard", "checkpoint_every": 2}
    with pytest.raises(KeyboardInterrupt):
        tune_in(config, out, on_step=stop_at(4), **settings)
    (logs,) = (out / LOGS).iterdir()
    assert scalars(logs, "rho")[0] == [1, 2, 3]  # one more than the checkpoint has
    time.sleep(1.1)  # files of one second are read in the order of their names, .10 before .9
    run = tune_in(config, out, resume=True, **settings)
    assert content(out) == content(whole.folder)
    steps, values = scalars(logs, "rho")
    assert steps == [1, 2, 3, 4]
    assert values == pytest.approx(run.metrics()["rho"].tolist())


def test_any_tracker_of_accelerate_is_told(
    config: TuningConfig,
    tune_in: Callable[..., Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from accelerate import tracking

    class Diary(tracking.GeneralTracker):
        name = "diary"
        requires_logging_directory = True
        entries: ClassVar[list[Any]] = []

        def __init__(self, run_name: str, logging_dir: str, **kwargs: Any) -> None:
            super().__init__()
            self.entries.append((run_name, Path(logging_dir)))

        @property
        def tracker(self) -> list[Any]:
            return self.entries

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            self.entries.append(values["category"])

        def log(self, values: dict[str, float], step: int | None = None, **kwargs: Any) -> None:
            self.entries.append((step, "loss_subject" in values))

        def finish(self) -> None:
            self.entries.append("the end")

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "diary", Diary)
    out = tmp_path / "run"
    tune_in(replace(config, max_train_steps=2), out, report_to="diary")
    assert Diary.entries == [("sude_lab", out / LOGS), "dog", (1, True), (2, True), "the end"]


def test_a_tracker_that_is_missing_is_one_sentence(
    config: TuningConfig,
    tune_in: Callable[..., Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from accelerate import PartialState, tracking

    monkeypatch.setattr(PartialState, "_shared_state", {})  # a run that no launcher started
    with pytest.raises(UserError, match="no tracker 'paper': choose --report-to among none, all"):
        tune_in(config, tmp_path / "run", report_to="paper")
    monkeypatch.setattr(tracking, "get_available_trackers", list)
    with pytest.raises(UserError, match="pip install tensorboard, or use --report-to none"):
        tune_in(config, tmp_path / "run", report_to="tensorboard")
    assert names(tmp_path) == set()


def test_a_tracker_that_does_not_start_leaves_a_run_to_resume(
    config: TuningConfig,
    tune_in: Callable[..., Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from accelerate import tracking

    def broken(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no account\nno network")

    monkeypatch.setattr(tracking.TensorBoardTracker, "start", broken)
    with pytest.raises(UserError, match=r"no account no network.*--report-to none"):
        tune_in(config, tmp_path / "run", report_to="tensorboard")
    run = tune_in(config, tmp_path / "run", resume=True)
    assert run.metrics()["step"].tolist() == [1, 2, 3, 4]


# --- the launcher's word -------------------------------------------------------------------------


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """An environment as `accelerate launch` makes it, and its state forgotten afterwards."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield monkeypatch
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    ("precision", "dtype", "expected"),
    [
        ("bf16", "auto", "bfloat16"),
        ("bf16", "float32", "float32"),
        ("no", "auto", "float32"),
        (None, "auto", "float32"),
    ],
)
def test_the_precision_follows_the_launcher_where_no_flag_says(
    precision: str | None,
    dtype: str,
    expected: str,
    config: TuningConfig,
    launcher: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    if precision is not None:
        launcher.setenv("ACCELERATE_MIXED_PRECISION", precision)
    config = replace(config, dtype=dtype, max_train_steps=1)
    run = run_tuning(config, tmp_path / "run", num_samples=0, progress=False, report_to="none")
    about = json.loads((run.folder / ENVIRONMENT).read_text())
    assert about["precision"] == expected and about["processes"] == 1
    assert run.config.dtype == dtype


def test_processes_that_cannot_be_set_up_are_one_sentence(
    config: TuningConfig, launcher: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import accelerate

    def broken(*args: Any, **kwargs: Any) -> None:
        raise ValueError("no precision\nof that name")

    launcher.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    launcher.setattr(accelerate, "Accelerator", broken)
    with pytest.raises(
        UserError, match=r"set the processes up \(ValueError: no precision of that name\)"
    ):
        run_tuning(config, tmp_path / "run", progress=False)
    assert names(tmp_path) == set()


# --- where its model is --------------------------------------------------------------------------


def test_a_run_finds_its_model_from_any_working_folder(
    config: TuningConfig, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "models").mkdir(parents=True)
    (tmp_path / "here" / "models" / "tiny").symlink_to(tiny_folder)
    monkeypatch.chdir(tmp_path / "here")
    config = replace(config, backbone="models/tiny", max_train_steps=1, weight_sude=0.0)
    quiet: dict[str, Any] = {"progress": False, "num_samples": 0, "report_to": "none"}
    run = run_tuning(config, "../runs/one", **quiet)
    # A namesake, which is no model.
    (tmp_path / "there" / "models" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "there")
    whole = str(tmp_path / "here" / "models" / "tiny")
    run = Run.open("../runs/one")
    assert run.config.backbone == whole == json.loads((run.folder / CONFIG).read_text())["backbone"]
    run.load("cpu")
    (run.folder / ENVIRONMENT).unlink()
    monkeypatch.chdir(tmp_path / "here")
    assert run_tuning(config, tmp_path / "runs" / "one", resume=True, **quiet).config == run.config


# --- two commands on one folder ------------------------------------------------------------------


@pytest.mark.parametrize("resume", [False, True])
def test_two_commands_never_tune_into_one_folder(
    resume: bool, config: TuningConfig, tune_in: Callable[..., Run], tmp_path: Path
) -> None:
    """The second is refused at once, in the midst of the first, which notices nothing."""
    out = tmp_path / "run"
    words = ["tune", config.image, "--category", "dog", "--backbone", config.backbone]
    words += ["--seed", 4, "--device", "cpu", "--out", out, *(["--resume"] if resume else [])]

    def second(step: Step) -> None:
        before = content(out)
        assert str(out) in say(*words).sentence and "Another command" in say(*words).sentence
        assert content(out) == before

    run = tune_in(config, out, on_step=second)
    assert names(out) == FINISHED and run.config.seed == 3
    assert names(tmp_path) == {"run"}


def test_every_command_that_writes_is_alone(
    config: TuningConfig, tune_in: Callable[..., Run], tmp_path: Path
) -> None:
    config = replace(config, train="lora", max_train_steps=1, weight_sude=0.0)
    run, out = tune_in(config, tmp_path / "run", num_samples=0).folder, tmp_path / "out"
    here = ("--device", "cpu", "--out", out)
    with sole_writer(out, inside=True):
        commands = [("demo", "--out", out), ("evaluate", run, *here)]
        assert all("Another command" in say(*words).sentence for words in commands)
    with sole_writer(run / "evaluation", inside=True):
        assert "Another command" in say("evaluate", run, "--device", "cpu").sentence
    file = tmp_path / "lora.safetensors"
    with sole_writer(out), sole_writer(file):
        commands = [("generate", run, "a {S*}", *here), ("export", run, "--out", out)]
        commands.append(("export", run, "--format", "kohya", "--out", file))
        assert all("Another command" in say(*words).sentence for words in commands)
    assert names(tmp_path) == {"run"}
    assert say("export", run, "--format", "kohya", "--out", file).code == 0
    assert names(tmp_path) == {"run", file.name}
