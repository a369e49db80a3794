"""A regulariser of one's own: it stands where SuDe stands, and its file is run by tuning alone."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from sude_lab.backbone import Backbone
from sude_lab.config import TuningConfig
from sude_lab.errors import UserError
from sude_lab.io.opening import data_folder
from sude_lab.runs.export import share
from sude_lab.runs.folder import Run, run_tuning
from sude_lab.runs.prepare import prepared_tuning
from sude_lab.runs.regularizer import load_regularizer
from sude_lab.sweep.grid import make_plan, read_grid
from sude_lab.tuning import Frozen, Tuning

Fresh = Callable[[], Backbone]
SUDE = data_folder() / "bench" / "sude.py"
SIZE = "def regularizer(x_t, t, output, frozen):\n    return output.square().flatten(1).mean(1)\n"


@pytest.fixture
def config(subject_picture: Path, tiny_folder: Path) -> TuningConfig:
    settings: dict[str, Any] = {"category": "dog", "backbone": str(tiny_folder), "device": "cpu"}
    settings |= {"weight_sude": 1.5, "max_train_steps": 3, "seed": 3, "token_learning_rate": 1e-2}
    return TuningConfig(image=subject_picture, **settings)


@pytest.fixture
def picture(subject_picture: Path) -> Image.Image:
    return Image.open(subject_picture).convert("RGB")


@pytest.fixture
def tune_in(fresh: Fresh) -> Callable[..., Run]:
    def start(config: TuningConfig, out: Path, **settings: Any) -> Run:
        quiet: dict[str, Any] = {"progress": False, "num_samples": 0, "report_to": "none"}
        return run_tuning(config, out, **{"backbone": fresh()} | quiet | settings)

    return start


def written(folder: Path, text: str) -> Path:
    file = folder / "own.py"
    file.write_text(text, encoding="utf-8")
    return file


def trained(tuning: Tuning) -> dict[str, Tensor]:
    return list(tuning)[-1].state_dict()["trained"]


# --- it stands where SuDe stands -----------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"train": "unet", "weighting": "reference"},
        {"train": "lora", "weighting": "reference", "sude_every": 2, "learning_rate": 1e-2},
        {"train_text_encoder": True, "weighting": "reference"},
        {"method": "vico", "weighting": "reference"},
        {"weighting": "reference", "prior_loss_weight": 1.0, "num_class_images": 2},
        {"weighting": "reference", "more_subjects": ("cat=<kit>=kit.png",)},
    ],
    ids=lambda s: " ".join(s),
)
def test_sude_as_a_file_is_sude_to_the_bit(
    settings: dict[str, Any], config: TuningConfig, fresh: Fresh, picture: Image.Image
) -> None:
    config = replace(config, **settings)
    pictures = [picture, picture.rotate(90)][: len(config.subjects)]
    own = prepared_tuning(replace(config, regularizer_file=SUDE), fresh(), pictures)
    built_in = prepared_tuning(config, fresh(), pictures)
    without = prepared_tuning(replace(config, weight_sude=0.0), fresh(), pictures)
    weights, expected, plain = map(trained, (own, built_in, without))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    assert not all(torch.equal(weights[name], plain[name]) for name in weights)
    assert own.frozen.passes == 2 * own.config.train_batch_size * asked(config)


def test_the_hinge_with_a_margin_pulls_as_a_later_threshold(
    config: TuningConfig, fresh: Fresh, picture: Image.Image
) -> None:
    config = replace(config, train="unet", learning_rate=1e-3)
    hinge = replace(config, regularizer_file=SUDE.with_name("hinge_margin.py"))
    later = replace(config, weighting="simple", truncate_at=1.25)
    own, built_in, usual = (
        trained(prepared_tuning(c, fresh(), picture))
        for c in (hinge, later, replace(later, weight_sude=0.0))
    )
    for name in own:
        torch.testing.assert_close(own[name], built_in[name], rtol=0, atol=2e-5)
    assert any((own[name] - usual[name]).abs().max() > 1e-4 for name in own)


def asked(config: TuningConfig) -> int:
    """Steps in which SuDe is asked."""
    return len(range(0, config.max_train_steps or 0, config.sude_every))


def test_its_value_stands_as_sude_and_what_only_sude_has_is_left_empty(
    config: TuningConfig, tune_in: Callable[..., Run], tmp_path: Path
) -> None:
    own = tune_in(replace(config, regularizer_file=written(tmp_path, SIZE)), tmp_path / "run")
    table = own.metrics()
    assert (table["loss_sude"] > 0).all()
    assert table[["tau", "open_gates", "rho"]].isna().all(axis=None)
    assert (own.folder / "regularizer.py").read_text() == SIZE
    assert "`own.py` in the place of SuDe" in (own.folder / "README.md").read_text()


def test_frozen_is_the_model_before_tuning_and_the_subject_as_it_is_now(
    config: TuningConfig, fresh: Fresh, picture: Image.Image
) -> None:
    config = replace(config, learning_rate=1e-2)
    before, seen = fresh(), []
    close = partial(torch.testing.assert_close, rtol=0, atol=1e-5)  # batches of other sizes

    def regularizer(x_t: Tensor, t: Tensor, output: Tensor, frozen: Frozen) -> Tensor:
        assert output.requires_grad and len(frozen.uncond) == len(frozen.category) == len(x_t)
        uncond, category = frozen.ask(x_t, t)
        assert frozen.passes == (3 * len(seen) + 2) * len(x_t)
        close(category, before.predict(x_t, t, frozen.category))
        close(uncond, before.predict(x_t, t, frozen.uncond))
        close(frozen(x_t, t, frozen.category[:1]), category)
        assert not category.requires_grad and frozen.subject.hidden.requires_grad
        seen.append(frozen.subject.hidden.detach())
        # Of the text alone: where it has no gradient, nothing but L_sub would move the word.
        return frozen.subject.hidden.square().flatten(1).mean(1)

    own = Tuning(config, fresh(), picture, regularizer=regularizer)
    without = Tuning(replace(config, weight_sude=0.0), fresh(), picture)
    weights, plain = trained(own), trained(without)
    assert len(seen) == 3 and not torch.equal(seen[0], seen[2])
    assert not torch.equal(weights["token.text_encoder"], plain["token.text_encoder"])
    moved = own.backbone.denoiser.state_dict()
    assert any((moved[k] - v).abs().max() > 1e-3 for k, v in before.unet.state_dict().items())


def test_without_a_weight_it_is_not_asked(
    config: TuningConfig, fresh: Fresh, picture: Image.Image
) -> None:
    silent = Tuning(replace(config, weight_sude=0.0), fresh(), picture, regularizer=pytest.fail)
    assert trained(silent)


# --- what is wrong is said before anything is written --------------------------------------------

WRONG = {
    "x = 1\n": "own.py defines no function named regularizer",
    "import nothing_of_this_name\n": "own.py, line 1: ModuleNotFoundError: No module named",
    "raise SystemExit(3)\n": "own.py, line 1: SystemExit: 3",
    "def regularizer(:\n": "own.py, line 1: SyntaxError",
    SIZE.replace(".flatten(1).mean(1)", ""): r"returned the shape \(1, 4, 8, 8\): its regularizer",
    SIZE.replace(".flatten(1).mean(1)", ".mean()"): r"returned the shape \(\): its",
    SIZE.replace("output.square().flatten(1).mean(1)", "0.5"): r"returned 0.5: .* Tensor \(1,\)",
    SIZE.replace(".square()", ".log()"): r"returned \[nan\] at t = \[\d+\]",
    SIZE.replace("output.square()", "frozen.nothing"): "own.py, line 2: AttributeError",
}


@pytest.mark.parametrize("text", WRONG, ids=lambda text: text.splitlines()[-1].strip()[:40])
def test_a_file_that_cannot_serve_is_refused_in_one_sentence(
    text: str, config: TuningConfig, tune_in: Callable[..., Run], tmp_path: Path
) -> None:
    own = replace(config, regularizer_file=written(tmp_path, text), train_batch_size=1)
    with pytest.raises(UserError, match=WRONG[text]):
        tune_in(own, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_not_there_is_refused(
    config: TuningConfig, tune_in: Callable[..., Run], fresh: Fresh, tmp_path: Path
) -> None:
    missing = replace(config, regularizer_file=tmp_path / "none.py")
    with pytest.raises(UserError, match=r"none\.py cannot be read .*: name a file of Python"):
        tune_in(missing, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_with_a_file_is_never_tuned_without_it(
    config: TuningConfig, fresh: Fresh, picture: Image.Image
) -> None:
    own = replace(config, regularizer_file=SUDE)
    with pytest.raises(UserError, match=r"regularizer, which are made before: start it with"):
        Tuning(own, fresh(), picture)


# --- a run keeps its file and never runs it ------------------------------------------------------


def test_a_resumed_run_needs_the_same_file_wherever_it_lies(
    config: TuningConfig, tune_in: Callable[..., Run], tmp_path: Path
) -> None:
    def stop(step: Any) -> None:
        if step.number == 2:
            raise KeyboardInterrupt

    file, out = written(tmp_path, SIZE), tmp_path / "run"
    own = replace(config, regularizer_file=file)
    whole = tune_in(own, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        tune_in(own, out, checkpoint_every=1, on_step=stop)
    other = replace(config, regularizer_file=tmp_path / "other.py")
    for changed in (SIZE + "# more\n", "def regularizer(*a): return a[2].flatten(1).mean(1)"):
        (tmp_path / "other.py").write_text(changed)
        with pytest.raises(UserError, match="was started with another --regularizer-file"):
            tune_in(other, out, resume=True)
    with pytest.raises(UserError, match="was started with another --regularizer-file, or without"):
        tune_in(config, out, resume=True)
    (tmp_path / "other.py").write_text(SIZE)
    resumed = tune_in(other, out, resume=True)
    weights = [next(run.weights.glob("unet*")).read_bytes() for run in (whole, resumed)]
    assert weights[0] == weights[1]


def test_nothing_but_tuning_runs_the_file(
    config: TuningConfig, tune_in: Callable[..., Run], fresh: Fresh, tmp_path: Path
) -> None:
    trace = tmp_path / "was-run"
    file = written(tmp_path, f"import pathlib\npathlib.Path({str(trace)!r}).touch()\n{SIZE}")
    run = tune_in(replace(config, regularizer_file=file), tmp_path / "run", num_samples=1)
    assert trace.exists()
    trace.unlink()
    opened = Run.open(run.folder)
    opened.load("cpu", backbone=fresh())
    copy = share(opened, tmp_path / "shared")
    assert not trace.exists() and not (copy / "regularizer.py").exists()
    assert json.loads((copy / "config.json").read_text())["regularizer_file"] == "own.py"
    assert tune_in(replace(config, regularizer_file=file), run.folder, resume=True)  # finished
    assert not trace.exists()


def test_a_sweep_names_its_runs_by_the_files_bytes(tmp_path: Path) -> None:
    def keys(text: str, folder: str = "a") -> list[str]:
        (tmp_path / folder).mkdir(exist_ok=True)
        file = written(tmp_path / folder, text)
        grid = {"subjects": ["held-out 0"], "w_s": [0, 1]}
        grid |= {"settings": {"regularizer_file": str(file)}} if text else {}
        (tmp_path / "grid.yaml").write_text(json.dumps(grid))
        return [job.key for job in make_plan(read_grid(tmp_path / "grid.yaml"), tmp_path).jobs]

    plain, own = keys(SIZE)
    assert keys(SIZE, "b") == [plain, own]
    assert keys(SIZE + "\n")[0] == plain and keys(SIZE + "\n")[1] != own
    assert keys("")[0] == plain and keys("")[1] != own


def test_a_file_is_read_anew_for_every_run(tmp_path: Path) -> None:
    file = written(tmp_path, "seen = []\ndef regularizer(*batch):\n    seen.append(1)\n")
    first, second = load_regularizer(file), load_regularizer(file)
    assert first and second and load_regularizer(None) is None
    assert first.function.__globals__["seen"] is not second.function.__globals__["seen"]
    assert not (tmp_path / "__pycache__").exists()
