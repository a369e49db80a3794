"""The same command, the same numbers; and nothing outside is changed by asking for them."""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sude_lab.cli import main
from sude_lab.config import TuningConfig
from sude_lab.generation import generate
from sude_lab.runs.folder import METRICS, WEIGHTS, run_tuning

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS_APART, PIXELS_APART = 1e-4, 4
"""What the README promises across thread counts: of the weights' change, and of 255."""


def global_state() -> dict[str, Any]:
    """What a library has no business to change, as values that compare."""
    return {
        "torch's numbers": torch.get_rng_state().tolist(),
        "numpy's numbers": str(np.random.get_state()),
        "python's numbers": random.getstate(),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "figures": dict(matplotlib.rcParams),
        "warnings": list(map(str, warnings.filters)),
        "folder": os.getcwd(),
        "logging": (logging.root.level, list(logging.root.handlers)),
        "paths": list(sys.path),
    }


@contextmanager
def nothing_changes() -> Iterator[None]:
    before, environment = global_state(), dict(os.environ)
    yield
    after = global_state()
    changed = [name for name in before if before[name] != after[name]]
    assert not changed
    assert dict(os.environ) == environment


def config(tiny_folder: Path, picture: Path, **settings: Any) -> TuningConfig:
    return TuningConfig(picture, "dog", str(tiny_folder), max_train_steps=6, seed=3, **settings)


@pytest.mark.parametrize("method", ["dreambooth", "custom_diffusion", "vico", "textual_inversion"])
def test_tuning_and_drawing_change_nothing_outside(
    method: str, tiny_folder: Path, subject_picture: Path, tmp_path: Path
) -> None:
    settings = {"method": method, "num_class_images": 2, "device": "cpu"}
    warm = config(tiny_folder, subject_picture, **settings)
    run_tuning(warm, tmp_path / "warm", num_samples=1, report_to="none", progress=False)
    with nothing_changes():
        again = tmp_path / "again"
        run = run_tuning(warm, again, num_samples=1, report_to="none", progress=False)
        generate(run.load("cpu"), run.prompt("photo of a {S*}"), num_images=1, seed=1)


def test_the_command_line_changes_nothing_outside(
    tiny_folder: Path, subject_picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--category", "dog", "--backbone", str(tiny_folder), "--max-train-steps", "2"]
    common += ["--num-samples", "0", "--report-to", "none", "--device", "cpu"]
    assert main(["tune", str(subject_picture), "--out", str(tmp_path / "warm"), *common]) == 0
    with nothing_changes():
        run = tmp_path / "run"
        assert main(["tune", str(subject_picture), "--out", str(run), *common]) == 0
        assert main(["tune", str(subject_picture), "--out", str(run), *common]) == 2
        out = str(tmp_path / "pictures")
        drawn = ["generate", str(run), "a {S*}", "--out", out, "--num-images", "1"]
        assert main(drawn) == 0


def test_no_other_command_changes_anything_outside(
    tiny_data: Path, subject_picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each once to warm up, then again beside what it made: classes and modules are loaded once."""
    monkeypatch.setenv("SUDE_LAB_DATA", str(tiny_data))
    (tmp_path / "grid.yaml").write_text(
        "{subjects: [held-out 0], w_s: [0, x1], pictures: 1, num_gpus: 0, prompts: [plain], "
        "settings: {max_train_steps: 1, device: cpu}}"
    )
    run = tmp_path / "run"
    settings = TuningConfig(subject_picture, "dog", max_train_steps=1, device="cpu")
    run_tuning(settings, run, num_samples=0, report_to="none", progress=False)
    few = ["--num-images", "1", "--num-inference-steps", "2"]
    asked = ["--prompt", "photo of a dog", "--prompt", "photo of a cat"]
    for name, *words in (
        ["evaluate", str(run), "--prompts", "plain", *few],
        ["classify", str(subject_picture), *asked, "--num-pairs", "4"],
        ["export", str(run)],
        ["sweep", str(tmp_path / "grid.yaml")],
        ["demo", "--max-train-steps", "1", "--num-images", "1"],
    ):
        outs = [str(tmp_path / f"{name}-{len(words)}-{k}") for k in range(2)]
        first, second = ([] if name == "classify" else ["--out", out] for out in outs)
        assert main([name, *words, *first]) == 0, name
        with nothing_changes():
            assert main([name, *words, *second]) == 0, name


IMPORTS = """
import json, locale, logging, os, random, signal, sys, warnings
import numpy, torch, matplotlib, accelerate, peft
from diffusers import StableDiffusionPipeline, UNet2DConditionModel  # which add filters of warnings
from transformers import CLIPTextModel
import diffusers, transformers
def state():
    return repr((torch.get_rng_state().sum().item(), str(numpy.random.get_state()),
        random.getstate(), torch.get_num_threads(), torch.get_default_dtype(),
        torch.is_grad_enabled(), warnings.filters, dict(os.environ), os.getcwd(),
        logging.root.level, logging.root.handlers, locale.setlocale(locale.LC_ALL),
        signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM),
        sorted(matplotlib.rcParams.items(), key=str), diffusers.logging.get_verbosity(),
        transformers.logging.get_verbosity(), torch.get_float32_matmul_precision()))
before = state()
import pkgutil, importlib, sude_lab
for found in pkgutil.walk_packages(sude_lab.__path__, "sude_lab."):
    if found.name not in ("sude_lab.__main__", "sude_lab.exercises.grading"):  # for nbgrader alone
        importlib.import_module(found.name)
after = state()
print("same" if before == after else before + "\\n" + after)
"""


def test_importing_every_room_changes_nothing_outside() -> None:
    found = subprocess.run(
        [sys.executable, "-c", IMPORTS], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert found.stdout.strip() == "same"


def tuned(
    tiny_folder: Path, picture: Path, out: Path, threads: int
) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """Weights and a picture of a run in a process of its own, with so many threads."""
    settings = ["--category", "dog", "--backbone", tiny_folder, "--max-train-steps", 6]
    settings += ["--num-samples", 0, "--report-to", "none", "--device", "cpu"]
    commands = [["tune", picture, "--out", out, *settings]]
    commands += [
        ["generate", out, "photo of a {S*} dog", "--out", out / "drawn", "--num-images", 1]
    ]
    code = "import json, sys; from sude_lab.cli import main\n"
    code += "sys.exit(max(main(c) for c in json.loads(sys.argv[1])))"
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    told = json.dumps([[str(x) for x in command] for command in commands])
    subprocess.run([sys.executable, "-c", code, told], check=True, env=environment, cwd=ROOT)
    from PIL import Image

    weights = {k: v for f in (out / WEIGHTS).glob("*.safetensors") for k, v in load_file(f).items()}
    with Image.open(out / "drawn" / "000.png") as picture_drawn:
        return weights, np.asarray(picture_drawn, dtype=float)


def test_the_same_command_gives_the_same_and_two_threads_the_same_within_the_tolerance(
    tiny_folder: Path, subject_picture: Path, tmp_path: Path
) -> None:
    """Sums of floats hang on their order; how far that goes is promised, and tested here."""
    one, drawn = tuned(tiny_folder, subject_picture, tmp_path / "one", 1)
    two, drawn_again = tuned(tiny_folder, subject_picture, tmp_path / "two", 2)
    assert one.keys() == two.keys()
    for name, value in one.items():
        apart = (two[name] - value).norm() / value.norm().clamp_min(1e-6)
        assert apart <= WEIGHTS_APART, (name, apart)
    assert np.abs(drawn - drawn_again).max() <= PIXELS_APART
    again, drawn_again = tuned(tiny_folder, subject_picture, tmp_path / "again", 1)
    assert all(torch.equal(value, again[name]) for name, value in one.items())  # the same bytes
    assert (drawn == drawn_again).all()
    first = (tmp_path / "one" / METRICS).read_text(encoding="utf-8").splitlines()
    assert len(first) == 7
