"""One run drawn at other strengths: kept steps, scaled weights, the category's guidance."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import content

from sude_lab.backbone import Backbone
from sude_lab.config import TuningConfig
from sude_lab.errors import UserError
from sude_lab.evaluate.evaluate import evaluate
from sude_lab.generation import generate
from sude_lab.io.opening import open_backbone
from sude_lab.io.weights import read_tensors
from sude_lab.methods import get_method
from sude_lab.runs.folder import CHECKPOINT, KEPT, Run, run_tuning
from sude_lab.runs.strength import Strength, guidance_for, split

Tune = Callable[..., Path]
QUIET: dict[str, Any] = {"num_samples": 0, "report_to": "none", "progress": False}


@pytest.fixture(scope="module")
def tune(tiny_folder: Path, subject_picture: Path, tmp_path_factory: Any) -> Tune:
    root = tmp_path_factory.mktemp("strengths")

    def run(name: str, *, keep_at: tuple[int, ...] = (), **settings: Any) -> Path:
        given: dict[str, Any] = {"image": subject_picture, "category": "dog"}
        given["backbone"] = str(tiny_folder)
        given |= {"max_train_steps": 4, "weight_sude": 0.0, "device": "cpu"}
        if not (root / name).exists():
            run_tuning(TuningConfig(**given | settings), root / name, keep_at=keep_at, **QUIET)
        return root / name

    return run


def weights(backbone: Backbone) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": value.clone()
        for part, module in (("unet", backbone.unet), *backbone.text_encoders.items())
        for name, value in module.state_dict().items()
    }


@pytest.mark.parametrize("text", ["", "25", "scale=0.5", "25,scale=0.5", "guidance_scale=2"])
def test_a_strength_is_written_as_it_is_read(text: str) -> None:
    assert str(Strength.read(text)) == text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0", "at least 1"),
        ("-3", "at least 1"),
        ("half", "no strength"),
        ("2.5", "no strength"),
        ("scale=-1", "at least 0"),
        ("scale=nan", "at least 0"),
        ("scale=", "no strength"),
        ("lambda=1", "scale="),
        ("3,4", "no strength"),
        ("compose=1,sude_guidance=1", "choose one"),
    ],
)
def test_what_is_no_strength(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        Strength.read(text)


def test_a_folder_with_an_at_in_its_name_is_that_folder(tmp_path: Path) -> None:
    odd = tmp_path / "rex@home"
    odd.mkdir()
    assert split(odd) == (odd, Strength())
    assert split(f"{odd}@7") == (odd, Strength(7))


def test_the_weights_kept_at_a_step_are_those_of_a_run_that_ends_there(tune: Tune) -> None:
    long, short = tune("long", keep_at=(2, 4)), tune("short", max_train_steps=2)
    kept = Run.open(f"{long}@2")
    assert kept.weights == long / KEPT / "000002"
    assert not (long / KEPT / "000004").exists()  # the end is kept anyway
    assert Run.open(f"{long}@4").weights == Run.open(long).weights
    for file in sorted(Run.open(short).weights.iterdir()):
        ours, theirs = read_tensors(kept.weights / file.name)[0], read_tensors(file)[0]
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(UserError, match=r"did not keep the weights of step 3 \(it has 2, 4\)"):
        Run.open(f"{long}@3")


def test_keeping_steps_changes_nothing_of_the_run(tune: Tune) -> None:
    with_kept, without = Run.open(tune("long", keep_at=(2, 4))), Run.open(tune("without"))
    assert content(with_kept.weights) == content(without.weights)


def test_a_resumed_run_keeps_its_steps_or_says_that_they_are_past(
    tune: Tune, tmp_path: Path
) -> None:
    whole = tune("long", keep_at=(2, 4))
    config = replace(Run.open(whole).config, image=whole / "picture.png")
    out = tmp_path / "run"

    def stop(step: Any) -> None:
        if step.number == 3:
            raise KeyboardInterrupt

    settings: dict[str, Any] = {**QUIET, "checkpoint_every": 1}
    with pytest.raises(KeyboardInterrupt):
        run_tuning(config, out, keep_at=(1,), on_step=stop, **settings)
    assert (out / CHECKPOINT).is_file()
    before = content(out)
    with pytest.raises(UserError, match="past step 2"):
        run_tuning(config, out, resume=True, keep_at=(2,), **settings)
    assert content(out) == before
    run_tuning(config, out, resume=True, keep_at=(1, 3), **settings)
    assert [path.name for path in sorted((out / KEPT).iterdir())] == ["000001", "000003"]
    assert content(out / "weights") == content(whole / "weights")


def test_steps_that_cannot_be_kept_are_refused_before_the_work(tune: Tune, tmp_path: Path) -> None:
    config = Run.open(tune("without")).config
    for step, says in ((0, "at least 1"), (5, "the run has 4 steps")):
        with pytest.raises(UserError, match=says):
            run_tuning(config, tmp_path / "run", keep_at=(step,), **QUIET)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"train": "unet", "train_text_encoder": True},
        {"method": "textual_inversion", "num_vectors": 2},
        {"method": "custom_diffusion", "initializer": "sitting dog"},
    ],
    ids=lambda settings: str(settings.get("method", "dreambooth")),
)
def test_a_scale_lies_between_the_untuned_weights_and_the_tuned(
    settings: dict[str, Any], tune: Tune
) -> None:
    """The words, too: at 0 they are what they started from, so that nothing was tuned."""
    run = tune("-".join(map(str, settings.values())), **settings)
    none, half, whole, usual = (
        weights(Run.open(f"{run}@{text}".removesuffix("@")).load())
        for text in ("scale=0", "scale=0.5", "scale=1", "")
    )
    assert all(torch.equal(whole[name], usual[name]) for name in usual)
    assert any(not torch.equal(none[name], whole[name]) for name in whole)
    for name, start in none.items():
        torch.testing.assert_close(half[name], (start + whole[name]) / 2)
    config = Run.open(run).config
    untuned = open_backbone(config.backbone)
    for k in range(config.num_vectors):
        word = config.token if k == 0 else f"{config.token}_{k}"
        untuned.add_token(word, get_method(config.method).initializer(config, 0))
    begins = weights(untuned)
    assert all(torch.equal(none[name], begins[name]) for name in begins)


def test_the_scale_of_a_lora(tune: Tune) -> None:
    run = tune("lora", train="lora", learning_rate=0.05)
    prompt = "photo of a <sks> dog"

    def drawn(scale: float) -> Any:
        backbone = Run.open(f"{run}@scale={scale}").load()
        condition = backbone.encode_prompts([prompt])
        x_t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            return backbone.predict(x_t, torch.tensor([500]), condition)

    backbone = Run.open(f"{run}@scale=0").load()
    assert not torch.equal(drawn(0.0), drawn(1.0))
    assert not torch.equal(drawn(0.5), drawn(1.0))
    backbone.unet.disable_adapters()
    x_t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        bare = backbone.predict(x_t, torch.tensor([500]), backbone.encode_prompts([prompt]))
    torch.testing.assert_close(drawn(0.0), bare)


def test_vico_is_drawn_whole(tune: Tune) -> None:
    with pytest.raises(UserError, match="scale 1"):
        Run.open(f"{tune('vico', method='vico', num_vectors=1)}@scale=0.5").load()


def test_each_strength_draws_something_else_and_has_its_own_scores(
    tune: Tune, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tune("long", keep_at=(2, 4), learning_rate=0.05), run)
    texts = ["", "@2", "@scale=0.5", "@compose=2", "@sude_guidance=2", "@guidance_scale=6"]
    asked: dict[str, Any] = {
        "prompts": ["plain"],
        "num_images": 1,
        "out": tmp_path / "table",
        "progress": False,
    }
    done = evaluate(
        [f"{run}{text}" for text in texts], metrics=["oracle"], judges=_oracle(), **asked
    )
    scores = done.scores
    assert list(dict.fromkeys(scores["strength"])) == [text.removeprefix("@") for text in texts]
    files = scores.groupby("strength")["file"].first()
    pictures = {(run / file).read_bytes() for file in files}
    assert len(pictures) == len(texts)
    variants = [", ".join(filter(None, ("plain", text.removeprefix("@")))) for text in texts]
    assert list(done.table["variant"].drop_duplicates()) == variants
    assert (run / "evaluation" / "scale=0.5" / "scores.csv").is_file()


def _oracle() -> Any:
    """The drawn world's judge, whatever the model is."""
    from sude_lab.world.oracle import DrawnJudge, load_oracle, read_scene

    def judges(config: TuningConfig, references: Any) -> DrawnJudge:
        oracle = load_oracle()
        return DrawnJudge(read_scene(oracle, list(references), config.category), oracle)

    return judges


def test_composition_adds_the_category_whatever_the_subject_has(tune: Tune) -> None:
    """At strength c the guided prediction gains c w d; without the hinge rho plays no part."""
    run = Run.open(tune("long", keep_at=(2, 4), learning_rate=0.05))
    text = "photo of a running {S*} dog"

    def drawn(**strength: Any) -> bytes:
        backbone = run.load()
        with guidance_for(run.config, backbone, text, Strength(**strength)):
            return generate(backbone, run.prompt(text), num_images=1)[0].tobytes()

    assert drawn() == drawn(compose=0.0)
    assert len({drawn(), drawn(compose=1.0), drawn(sude_guidance=1.0)}) == 3
    assert drawn(compose=1.0) == drawn(compose=1.0)


def test_a_stopped_evaluation_ends_with_the_same_bytes(tune: Tune, tmp_path: Path) -> None:
    """What is missing is drawn with those that were drawn with it: its last bits depend on them."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        shutil.copytree(tune("without"), folder)
    asked: dict[str, Any] = {"prompts": ["plain"], "num_images": 5, "judges": _oracle()}
    asked |= {"metrics": ["oracle"], "progress": False}
    evaluate([whole], **asked)
    evaluate([broken], **asked)
    kept = {p.relative_to(broken): p.read_bytes() for p in broken.rglob("seed-*/*.png")}
    for name in ("001.png", "004.png"):
        next(broken.rglob(name)).unlink()
    evaluate([broken], **asked | {"num_images": 3})
    evaluate([broken], **asked)
    assert {p.relative_to(broken): p.read_bytes() for p in broken.rglob("seed-*/*.png")} == kept


def test_grids_name_strengths(tune: Tune, tmp_path: Path) -> None:

    from sude_lab.sweep.grid import make_plan, read_grid

    source = Run.open(tune("without")).config
    grid = tmp_path / "grid.yaml"
    text = f"""
subjects: [{{picture: {source.image}, category: dog}}]
backbone: {source.backbone}
w_s: [0]
settings: {{max_train_steps: 3, device: cpu}}
prompts: [plain]
pictures: 2
num_gpus: 0
evaluate: {{metrics: [oracle]}}
strengths:
  - {{}}
  - step: [1, 3]
  - scale: [0.5]
    guidance_scale: [1.5, 3]
"""
    grid.write_text(text.replace("[1, 3]", "[1, 9]"))
    with pytest.raises(UserError, match="step 9 is asked for, and the run has 3"):
        make_plan(read_grid(grid), tmp_path / "out")
    grid.write_text(text)
    (job,) = make_plan(read_grid(grid), tmp_path / "out").jobs
    wanted = ["", "1", "scale=0.5,guidance_scale=1.5", "scale=0.5,guidance_scale=3"]
    assert [str(s) for s in job.strengths] == wanted  # the last step is the end
    assert job.pictures == 8
    wrong = {"scale: [-1]": "at least 0", "speed: [1]": "speed", "step: []": "empty"}
    for line, says in wrong.items():
        grid.write_text(text.replace("step: [1, 3]", line))
        with pytest.raises(UserError, match=says):
            read_grid(grid)
