"""The command line does the whole job, and answers bad input with one sentence and exit code 2."""

import errno
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sude_lab import cli
from sude_lab.cli import main
from sude_lab.config import PRESETS
from sude_lab.runs.folder import Run

Tune = Callable[..., int]


@pytest.fixture
def tune(tiny_folder: Path, subject_picture: Path) -> Tune:
    """`sude-lab tune` on the tiny pipeline: one step, no samples; later flags win."""

    def run(*flags: object, image: Path = subject_picture, category: str = "dog") -> int:
        few = ("--max-train-steps", 1, "--num-samples", 0, "--device", "cpu")
        where = ("--backbone", tiny_folder, "--category", category)
        return main([str(a) for a in ("tune", image, *where, *few, *flags)])

    return run


def refused(code: int, capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence of a refusal."""
    said = capsys.readouterr()
    assert code == 2
    assert said.out == ""
    lines = said.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("sude-lab: "), said.err
    assert "Traceback" not in said.err
    return lines[0]


# --- the job -------------------------------------------------------------------------------------


@pytest.mark.quick
def test_tune_then_generate(tune: Tune, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, drawn = tmp_path / "run", tmp_path / "drawn"
    flags = ("--max-train-steps", 2, "--num-samples", 1, "--weight-sude", 0.5)
    assert tune("--out", out, *flags) == 0
    said = capsys.readouterr()
    assert f"The run is in {out}." in said.out
    assert "tuning" in said.err  # the progress bar
    run = Run.open(out)
    assert run.config.weight_sude == 0.5 and len(run.metrics()) == 2
    assert {p.name for p in out.iterdir()} >= {"samples.png", "README.md", "logs"}
    assert list((out / "logs").rglob("events.out.tfevents.*"))  # TensorBoard, by default

    words = ["photo of a running {S*} dog", "--num-images", "3", "--seed", "0", "--device", "cpu"]
    assert main(["generate", str(out), *words, "--out", str(drawn)]) == 0
    said = capsys.readouterr()
    assert "3 pictures" in said.out and "never met" not in said.err
    assert sorted(p.name for p in drawn.iterdir()) == ["000.png", "001.png", "002.png"]
    assert all(Image.open(p).size == (32, 32) for p in drawn.iterdir())

    words[0] = "photo of an okapi"
    assert main(["generate", str(out), *words, "--out", str(tmp_path / "okapi")]) == 0
    said = capsys.readouterr()
    assert "'okapi'" in said.err and "no {S*}" in said.err

    words[0] = "photo of a running <sks> dog"  # the word itself asks for the subject, too
    assert main(["generate", str(out), *words, "--out", str(tmp_path / "word")]) == 0
    said = capsys.readouterr()
    assert "never met" not in said.err and "no {S*}" not in said.err
    alike = ["--negative-prompt", "a {S*}"], ["--negative-prompt", "a <sks>"]
    for k, negative in enumerate(alike):
        assert main(["generate", str(out), *words, *negative, "--out", str(tmp_path / f"{k}")]) == 0
    pictures = [(tmp_path / name / "000.png").read_bytes() for name in ("0", "1", "word")]
    assert pictures[0] == pictures[1] != pictures[2]
    long = " ".join(["a running dog on the"] * 20)
    negative = ["--negative-prompt", long, "--num-images", "1", "--out", str(tmp_path / "long")]
    assert main(["generate", str(out), words[0], *negative, "--device", "cpu"]) == 0
    assert "too long" in capsys.readouterr().err

    half = ["--dtype", "bfloat16", "--num-images", "1", "--out", str(tmp_path / "half")]
    assert main(["generate", str(out), words[0], *half, "--device", "cpu"]) == 0
    capsys.readouterr()
    drawn_in_half = (tmp_path / "half" / "000.png").read_bytes()
    assert drawn_in_half != (tmp_path / "word" / "000.png").read_bytes()

    words[0] = "photo of a {S*} and a {S*2}"
    refusal = main(["generate", str(out), *words, "--out", str(tmp_path / "two")])
    assert "asks for {S*2}" in refused(refusal, capsys)

    words[0] = "photo of a {S*}"
    assert "not empty" in refused(main(["generate", str(out), *words, "--out", str(drawn)]), capsys)


@pytest.mark.parametrize("preset", ["paper", "reference"])
def test_a_preset_fills_what_no_flag_says(preset: str, tune: Tune, tmp_path: Path) -> None:
    flags = ["--num-class-images", 1] if preset == "reference" else []
    assert tune("--out", tmp_path / "run", "--preset", preset, *flags) == 0
    config = Run.open(tmp_path / "run").config
    assert config.max_train_steps == 1  # the flag wins
    for name, value in PRESETS[preset].items():
        if name not in ("max_train_steps", "num_class_images"):
            assert getattr(config, name) == value, name


def test_resume_continues_an_interrupted_run(
    tune: Tune,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sude_lab.runs import folder as runs

    flags = ("--out", tmp_path / "run", "--max-train-steps", 3, "--checkpoint-every", 1)
    keep = runs._keep_weights

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "_keep_weights", stop)
    assert tune(*flags) == 130
    assert "--resume" in capsys.readouterr().err
    monkeypatch.setattr(runs, "_keep_weights", keep)
    assert "--resume" in refused(tune(*flags), capsys)
    assert "--seed" in refused(tune(*flags, "--resume", "--seed", 9), capsys)
    assert tune(*flags, "--resume") == 0
    assert len(Run.open(tmp_path / "run").metrics()) == 3
    assert tune(*flags, "--resume") == 0
    assert "already finished" in "".join(capsys.readouterr())


def test_two_words_are_a_category(tune: Tune, tmp_path: Path) -> None:
    assert tune("--out", tmp_path / "run", category="stuffed animal") == 0
    assert Run.open(tmp_path / "run").config.category == "stuffed animal"


def test_two_subjects_are_tuned_and_drawn_together(
    tune: Tune, subject_picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, second = tmp_path / "run", f"candle=<my-candle>={subject_picture}"
    assert tune("--out", out, "--more-subjects", second, "--token-learning-rate", "1e-3") == 0
    assert [s.token for s in Run.open(out).config.subjects] == ["<sks>", "<my-candle>"]
    assert (out / "picture-2.png").is_file()
    capsys.readouterr()
    words = ["photo of a {S*2} on a {S*} dog", "--num-images", "1", "--device", "cpu"]
    assert main(["generate", str(out), *words, "--out", str(tmp_path / "drawn")]) == 0
    assert "never met" not in capsys.readouterr().err


def close(a: Run, b: Run) -> None:
    """The same weights but for the order in which floats were added."""
    for path in (a.folder / "weights").iterdir():
        theirs = load_file(b.folder / "weights" / path.name)
        for name, value in load_file(path).items():
            torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=2e-5)


def test_batches_are_accumulated_and_activations_recomputed(tune: Tune, tmp_path: Path) -> None:
    many = ("--max-train-steps", 2, "--prior-loss-weight", 0)
    cases: dict[str, tuple[object, ...]] = {
        "whole": ("--train-batch-size", 4),
        "halves": ("--train-batch-size", 2, "--gradient-accumulation-steps", 2),
        "recomputed": ("--train-batch-size", 4, "--gradient-checkpointing"),
        "other": ("--train-batch-size", 2),
    }
    for name, flags in cases.items():
        assert tune("--out", tmp_path / name, *many, *flags) == 0
    runs = {name: Run.open(tmp_path / name) for name in cases}
    assert runs["halves"].config.gradient_accumulation_steps == 2
    assert runs["recomputed"].config.gradient_checkpointing
    for name in ("halves", "recomputed"):
        close(runs[name], runs["whole"])
        for column in ("loss_subject", "loss_sude", "rho"):
            expected = pytest.approx(runs["whole"].metrics()[column].tolist(), rel=1e-3, abs=1e-6)
            assert runs[name].metrics()[column].tolist() == expected
    with pytest.raises(AssertionError, match="not close"):
        close(runs["other"], runs["whole"])


def test_validation_grids_are_drawn_on_request(tune: Tune, tmp_path: Path) -> None:
    flags = ("--max-train-steps", 2, "--num-samples", 1, "--validation-every", 1)
    prompts = ("--validation-prompts", "photo of a {S*}", "photo of a running {S*}")
    assert tune("--out", tmp_path / "run", *flags, *prompts, "--report-to", "none") == 0
    grids = sorted((tmp_path / "run" / "validation").iterdir())
    assert [g.name for g in grids] == ["step-000001.png", "step-000002.png"]
    assert Image.open(grids[0]).size == (32, 64)
    assert not (tmp_path / "run" / "logs").exists()


@pytest.mark.quick
def test_a_run_is_exported(tune: Tune, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "my-dog"
    assert tune("--out", out, "--train", "lora") == 0
    capsys.readouterr()
    whole, lora = tmp_path / "pipeline", tmp_path / "dog.safetensors"
    assert main(["export", str(out), "--out", str(whole)]) == 0
    assert f"The pipeline is in {whole}." in capsys.readouterr().out
    assert (whole / "model_index.json").is_file()
    assert main(["export", str(out), "--format", "kohya", "--out", str(lora)]) == 0
    assert f"The LoRA is {lora}." in capsys.readouterr().out
    assert {value.dtype for value in load_file(lora).values()} == {torch.float16}
    again = ["export", str(out), "--out", str(whole)]
    assert "not empty" in refused(main(again), capsys)
    again = ["export", str(out), "--format", "kohya", "--out", str(lora)]
    assert "exists already" in refused(main(again), capsys)
    again = ["export", str(tmp_path), "--out", str(tmp_path / "x")]
    assert "not a run's folder" in refused(main(again), capsys)


@pytest.mark.quick
def test_a_picture_is_classified(
    tiny_folder: Path, subject_picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["photo of a dog", "photo of a cat", "photo of a candle"]
    asked = [part for word in words for part in ("--prompt", word)]
    command = ["classify", str(subject_picture), "--backbone", str(tiny_folder), *asked]
    command += ["--num-pairs", "4", "--device", "cpu"]
    assert main(command) == 0
    said = capsys.readouterr()
    lines = [re.fullmatch(r"(0|1)\.(\d{4}) \+/- \d\.\d{4}  (.+)", x) for x in said.out.splitlines()]
    assert len(lines) == 3 and all(lines)
    assert "asking" in said.err  # the progress bar

    assert main([*command, "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["image"] == str(subject_picture) and found["evaluations"] <= 12
    rows = found["prompts"]
    assert [row["prompt"] for row in rows] == [line[3] for line in lines if line]
    assert {row["prompt"] for row in rows} == set(words)
    p = [row["probability"] for row in rows]
    assert p == sorted(p, reverse=True) and sum(p) == pytest.approx(1)
    assert all(row["standard_error"] >= 0 and 1 <= row["pairs"] <= 4 for row in rows)

    command[command.index("photo of a cat")] = "photo of an okapi"
    assert main([*command, "--no-prune"]) == 0
    assert "'okapi'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "at least two prompts"),
        (["--prompt", "photo of a dog"], "at least two prompts"),
        (["--prompt", "photo of a dog", "--prompt", "photo of a dog"], "given twice"),
        (["--prompt", "a dog", "--prompt", "a cat", "--backbone", "/no/such"], "/no/such"),
        (
            ["--prompt", "a dog", "--prompt", "a cat", "--backbone", "no/such-model"],
            "no/such-model",
        ),
        (["--prompt", "a dog", "--prompt", "a cat", "--num-pairs", "1"], "--num-pairs is 1"),
        (["--prompt", "a dog", "--prompt", "a cat", "--weighting", "best"], "best"),
    ],
)
def test_what_cannot_be_classified_is_refused(
    flags: list[str],
    expected: str,
    tiny_folder: Path,
    subject_picture: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    where = [] if "--backbone" in flags else ["--backbone", str(tiny_folder)]
    command = ["classify", str(subject_picture), *where, "--device", "cpu", *flags]
    assert expected in refused(main(command), capsys)


def test_prompts_that_the_model_cannot_tell_apart_are_not_judged(
    subject_picture: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = " ".join(["a running dog on the"] * 20)
    command = ["classify", str(subject_picture), "--backbone", str(tiny_folder), "--device", "cpu"]
    alike = ["--prompt", f"{long} dog", "--prompt", f"{long} cat"]
    assert "as far as the model reads" in refused(main([*command, *alike]), capsys)
    few = ["--num-pairs", "2", "--prompt", f"dog {long}", "--prompt", f"cat {long}"]
    assert main([*command, *few]) == 0
    assert "too long" in capsys.readouterr().err


def test_no_picture_to_classify_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--prompt", "a dog", "--prompt", "a cat"]
    code = main(["classify", str(tmp_path / "missing.png"), *words])
    assert "missing.png does not exist" in refused(code, capsys)
    assert "The picture" in refused(main(["classify", *words]), capsys)


# --- pictures as people have them ----------------------------------------------------------------


def phone(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.linear_gradient("L").convert("RGB").resize((64, 48)).save(path, exif=exif)


def deep(path: Path) -> None:
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(values).save(path)


def animated(path: Path) -> None:
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])


PICTURES: dict[str, tuple[Callable[[Path], None], str]] = {
    "phone.jpg": (phone, ""),
    "alpha.png": (lambda p: Image.new("RGBA", (64, 64), (255, 0, 0, 90)).save(p), ""),
    "deep.png": (deep, ""),
    "print.jpg": (lambda p: Image.new("CMYK", (64, 64), (9, 80, 0, 30)).save(p), ""),
    "animated.gif": (animated, "only the first is used"),
    "small.png": (lambda p: Image.new("RGB", (7, 5), "teal").save(p), "smaller than the model's"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_as_people_have_them_is_tuned_on(
    name: str, tune: Tune, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, note = PICTURES[name]
    make(tmp_path / name)
    assert tune("--out", tmp_path / "run", image=tmp_path / name) == 0
    run = Run.open(tmp_path / "run")
    assert run.picture().size == (32, 32)
    assert math.isfinite(run.metrics()["loss_subject"].item())
    said = "".join(capsys.readouterr())
    assert note in said
    if not note:
        assert name not in said
    if name == "animated.gif":
        assert run.picture().getpixel((16, 16)) == (255, 0, 0)
    if name == "phone.jpg":  # the gradient, dark above, was turned: dark on the right
        pixels = np.asarray(run.picture(), dtype=float).mean(axis=(0, 2))
        assert pixels[0] > 200 and pixels[-1] < 50


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("missing.png", "does not exist"),
        ("folder", "is a folder"),
        ("empty.png", "not a picture"),
        ("text.png", "not a picture"),
    ],
)
def test_what_is_no_picture_is_refused(
    name: str, expected: str, tune: Tune, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("Dear diary")
    code = tune("--out", tmp_path / "new" / "run", image=tmp_path / name)
    said = refused(code, capsys)
    assert expected in said and name in said
    assert not (tmp_path / "new").exists()


def test_a_decompression_bomb_is_refused(
    tune: Tune,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Image.new("1", (64, 64)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    code = tune("--out", tmp_path / "run", image=tmp_path / "bomb.png")
    assert "more than 1,000 pixels" in refused(code, capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--category", "okapi"], "among dog, cat, stuffed animal, candle"),
        (["--category", ""], "category is empty"),
        (["--method", "hypernetwork"], "dreambooth"),
        (["--token", "dog"], "already in the vocabulary"),
        (["--weight-sude", "nan"], "--weight-sude is nan"),
        (["--learning-rate", "inf"], "--learning-rate is inf"),
        (["--max-train-steps", "0"], "--max-train-steps is 0"),
        (["--max-train-steps", "many"], "many"),
        (["--seed", "-1"], "--seed is -1"),
        (["--checkpoint-every", "0"], "--checkpoint-every"),
        (["--device", "abacus"], "'abacus'"),
        (["--backbone", "/no/such/folder"], "/no/such/folder"),
        (["--preset", "best"], "best"),
        (["--report-to", "paper"], "no tracker 'paper'"),
        (["--validation-every", "-1"], "--validation-every"),
        (["--validation-every", "1"], "--num-samples"),
        (["--more-subjects", "candle"], "must read category=token=picture"),
        (["--more-subjects", "candle=<c>=missing.png"], "missing.png does not exist"),
        (["--sample-prompts", "a {S*2}"], "asks for {S*2}"),
        (["--no-such-flag", "1"], "--no-such-flag"),
    ],
)
def test_what_cannot_work_is_refused(
    flags: list[str],
    expected: str,
    tune: Tune,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = tune("--out", tmp_path / "run", *flags)
    assert expected in refused(code, capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_bad_out_folder_is_refused(
    tune: Tune, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    for out, expected in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "run", "cannot be made"),
        (tmp_path / "full", "holds no run"),
    ):
        assert expected in refused_with_progress(tune("--out", out), capsys)
    assert (tmp_path / "file").read_text() == "mine"
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["letter.txt"]


def refused_with_progress(code: int, capsys: pytest.CaptureFixture[str]) -> str:
    """As `refused`, where a progress bar may have been drawn before."""
    assert code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--num-images", "0"], "number of images is 0"),
        (["--guidance-scale", "nan"], "guidance scale is nan"),
        (["--num-inference-steps", "0"], "at most 1,000"),
        (["--device", "abacus"], "'abacus'"),
    ],
)
def test_drawing_that_cannot_work_is_refused(
    flags: list[str],
    expected: str,
    tune: Tune,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert tune("--out", tmp_path / "run", "--device", "cpu") == 0
    capsys.readouterr()
    out = str(tmp_path / "new" / "drawn")
    arguments = ["generate", str(tmp_path / "run"), "photo of a {S*}", "--out", out, *flags]
    assert expected in refused(main(arguments), capsys)
    assert not (tmp_path / "new").exists()


def test_drawing_without_a_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", str(tmp_path), "photo of a {S*}", "--out", str(tmp_path / "drawn")]
    assert "not a run's folder" in refused(main(arguments), capsys)
    assert list(tmp_path.iterdir()) == []


# --- words ---------------------------------------------------------------------------------------


def test_arguments_that_are_missing_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(main(["tune"]), capsys)
    assert "--category" in said and "--out" in said
    assert "demo" in refused(main([]), capsys)


@pytest.mark.quick
def test_help_names_the_commands_and_ends_well(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr()
    assert all(name in said.out for name in ("demo", "tune", "classify", "export", "lab"))


@pytest.mark.quick
def test_lab_says_where_the_notebooks_should_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUDE_LAB_DATA", str(tmp_path / "data"))
    assert "no notebooks" in refused(main(["lab"]), capsys)
    (tmp_path / "notebooks").mkdir()
    called: list[list[str]] = []
    monkeypatch.setattr(cli.subprocess, "call", lambda command: called.append(command) or 0)
    root = f"--ServerApp.root_dir={tmp_path / 'notebooks'}"
    monkeypatch.setattr(cli.os, "geteuid", lambda: 1000, raising=False)
    assert main(["lab", "--no-browser"]) == 0
    assert called[0][1:] == ["-m", "jupyterlab", root, "--no-browser"]
    monkeypatch.setattr(cli.os, "geteuid", lambda: 0, raising=False)
    assert main(["lab"]) == 0
    assert called[1][1:] == ["-m", "jupyterlab", root, "--allow-root"]

    monkeypatch.setattr(cli.subprocess, "call", lambda command: 3)
    assert "exit code 3" in refused(main(["lab"]), capsys)
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert "pip install jupyterlab" in refused(main(["lab"]), capsys)


def test_the_configuration_of_a_run_is_readable(tune: Tune, tmp_path: Path) -> None:
    assert tune("--out", tmp_path / "run") == 0
    values = json.loads((tmp_path / "run" / "config.json").read_text())
    assert values["category"] == "dog" and values["token"] == "<sks>"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (UnicodeEncodeError("utf-8", "dog-\udcff.png", 4, 5, "surrogates"), "rename the file"),
        (RuntimeError("Could not determine home directory."), "set SUDE_LAB_CACHE"),
        (OSError(errno.EFBIG, os.strerror(errno.EFBIG), "weights"), "weights cannot be"),
    ],
)
def test_what_the_machine_or_a_name_is_to_blame_for_is_no_bug(
    error: Exception,
    told: str,
    subject_picture: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("sude_lab.runs.folder.run_tuning", fail)
    command = ["tune", str(subject_picture), "--category", "dog", "--out", str(tmp_path / "run")]
    said = refused(main(command), capsys)
    assert told in said and "bug" not in said and said.isprintable()


def test_an_interruption_while_it_is_imported_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupted:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "sude_lab.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "sude_lab.cli")
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    from sude_lab.__main__ import main as command

    assert command() == 130
    assert capsys.readouterr().err.splitlines() == ["sude-lab: stopped; nothing was written."]


# --- a busy machine -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("load", "said", "expected"),
    [
        (0.9, {}, None),
        (1.0, {}, "PASSIVE"),
        (9.0, {"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"),
        (9.0, {"GOMP_SPINCOUNT": "10"}, None),
    ],
)
def test_threads_wait_asleep_on_a_busy_machine(
    load: float, said: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.setenv(name, "")  # so that it is as before afterwards
        monkeypatch.delenv(name)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert main(["sweep", "--out", "nowhere"]) == 2  # any command
    assert os.environ.get("OMP_WAIT_POLICY") == expected


def test_that_is_said_before_torch_is_loaded() -> None:
    code = "import sys, sude_lab.cli; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_an_interruption_while_a_command_imports_is_one_sentence(
    subject_picture: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    class Interrupted:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "sude_lab.runs.folder":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "sude_lab.runs.folder")
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    command = ["tune", str(subject_picture), "--category", "dog", "--out", str(tmp_path / "run")]
    assert main(command) == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sude-lab: stopped; nothing was written")


def test_a_folder_that_cannot_be_is_refused_before_a_model_is_opened(
    tune: Tune,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert tune("--out", tmp_path / "run", "--num-samples", 0, "--report-to", "none") == 0
    capsys.readouterr()
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.setattr(Run, "load", lambda *a, **k: pytest.fail("the model is opened"))
    command = ["generate", str(tmp_path / "run"), "a {S*}", "--out", str(tmp_path / "link")]
    assert "is a link, which is not replaced" in refused(main(command), capsys)
