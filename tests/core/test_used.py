"""A backbone remembers that it is used, and a step that it is past."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sude_lab.backbone import Backbone
from sude_lab.config import TuningConfig
from sude_lab.errors import UserError
from sude_lab.io.opening import open_backbone
from sude_lab.io.weights import load_weights, save_weights
from sude_lab.methods import configure
from sude_lab.runs.folder import Run, run_tuning
from sude_lab.runs.prepare import prepared_tuning
from sude_lab.tuning import Tuning, tune

Fresh = Callable[[], Backbone]
CURE = r"use backbone\.copy\(\) before such a use, or open it again\."


@pytest.fixture
def picture(subject_picture: Path) -> Image.Image:
    return Image.open(subject_picture).convert("RGB")


def config(**settings: Any) -> TuningConfig:
    chosen = {"image": Path("dog.png"), "category": "dog", "max_train_steps": 3, "seed": 5}
    return TuningConfig(**chosen | settings)


def test_a_second_run_on_one_backbone_is_refused(fresh: Fresh, picture: Image.Image) -> None:
    backbone = fresh()
    list(tune(config(), backbone, picture))
    for settings in (config(), config(token="<kit>"), config(method="textual_inversion")):
        with pytest.raises(UserError, match=rf"has been tuned \(dreambooth, dog\).*{CURE}"):
            tune(settings, backbone, picture)
    with pytest.raises(UserError, match=CURE):
        prepared_tuning(config(), backbone, picture)


def test_a_run_that_was_left_has_used_its_backbone(fresh: Fresh, picture: Image.Image) -> None:
    backbone = fresh()
    for _ in tune(config(), backbone, picture):
        break
    with pytest.raises(UserError, match=CURE):
        tune(config(), backbone, picture)
    with pytest.raises(UserError, match=CURE):  # so has its copy, which is tuned as far
        tune(config(), backbone.copy(), picture)


def test_a_copy_from_before_is_another_backbone(fresh: Fresh, picture: Image.Image) -> None:
    backbone = fresh()
    copy = backbone.copy()
    first = list(tune(config(), backbone, picture))
    again = list(tune(config(), copy, picture))
    assert first[-1].row() == again[-1].row()


def test_settings_that_are_refused_leave_the_backbone_unused(
    fresh: Fresh, picture: Image.Image
) -> None:
    backbone = fresh()
    for wrong in (config(token="dog"), config(category="okapi"), config(resolution=33)):
        with pytest.raises(UserError):
            tune(wrong, backbone, picture)
    assert len(list(tune(config(), backbone, picture))) == 3


def test_a_loop_that_was_left_goes_on_where_it_was(fresh: Fresh, picture: Image.Image) -> None:
    whole = [step.row() for step in Tuning(config(), fresh(), picture)]
    tuning, rows = Tuning(config(), fresh(), picture), []
    for step in tuning:
        rows.append(step.row())
        break
    rows += [step.row() for step in tuning]
    assert rows == whole
    assert list(tuning) == []


def test_a_second_run_is_not_loaded_into_one_backbone(
    fresh: Fresh, picture: Image.Image, tmp_path: Path
) -> None:
    *_, step = tune(config(), fresh(), picture)
    save_weights(step.method, tmp_path)
    backbone = fresh()
    load_weights("dreambooth", backbone, tmp_path)
    with pytest.raises(UserError, match=f"holds the weights of a run.*{CURE}"):
        load_weights("dreambooth", backbone, tmp_path)
    with pytest.raises(UserError, match=CURE):
        tune(config(), backbone, picture)


def test_the_state_of_a_step_that_is_past_is_refused(fresh: Fresh, picture: Image.Image) -> None:
    first, second, third = tune(config(), fresh(), picture)
    for past in (first, second):
        with pytest.raises(UserError, match=rf"Step {past.number} is past.*of step 3"):
            past.state_dict()
    assert third.state_dict()["step"] == 3


def test_a_run_that_failed_does_not_go_on(
    fresh: Fresh, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning = Tuning(config(), fresh(), picture)
    step = next(tuning)
    monkeypatch.setattr(tuning, "_losses", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(tuning)
    monkeypatch.undo()
    with pytest.raises(UserError, match="failed after step 1: continue from a step's state_dict"):
        next(tuning)
    *_, last = tune(config(), fresh(), picture, state=step.state_dict())
    *_, whole = tune(config(), fresh(), picture)
    assert last.row() == whole.row()


def test_run_tuning_takes_only_the_backbone_that_its_settings_name(
    fresh: Fresh, wider_folder: Path, subject_picture: Path, tmp_path: Path
) -> None:
    backbone = fresh()
    quiet: dict[str, Any] = {"num_samples": 0, "report_to": "none", "progress": False}
    settings = config(image=subject_picture, backbone=str(wider_folder), max_train_steps=1)
    for named in (
        settings,
        replace(settings, backbone="someone/else"),
        config(image=settings.image),
    ):
        with pytest.raises(
            UserError, match=f"name the backbone {named.backbone}, and .* handed in"
        ):
            run_tuning(named, tmp_path / "run", backbone=backbone, **quiet)
    assert not (tmp_path / "run").exists()
    here = Path(backbone.source)
    beside = str(here.parent / "." / here.name)  # the same folder in other words
    run = run_tuning(
        replace(settings, backbone=beside), tmp_path / "run", backbone=backbone, **quiet
    )
    assert Run.open(run.folder).config == configure(replace(settings, backbone=beside), fresh())


def test_a_run_without_its_class_images_says_where_they_are_made(
    fresh: Fresh, picture: Image.Image
) -> None:
    for settings in ({"prior_loss_weight": 1.0}, {"method": "custom_diffusion"}):
        with pytest.raises(UserError, match=r"sude_lab\.runs\.prepare"):
            Tuning(config(**settings), fresh(), picture)


def test_anyone_may_answer_eq_5(fresh: Fresh, picture: Image.Image) -> None:
    """A classifier that is handed in is asked in the model's place, and nothing is kept."""
    backbone = fresh()
    null, dog = backbone.null_condition(), backbone.encode_prompts(["photo of a dog"])
    frozen, asked = fresh(), []

    def classifier(x_t: torch.Tensor, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(len(x_t))
        with torch.no_grad():
            both = [frozen.predict(x_t, batch.t, c.expand(len(x_t))) for c in (null, dog)]
        return both[0], both[1]

    steps = list(Tuning(config(), backbone, picture, classifier=classifier))
    assert asked == [2, 2, 2] and steps[0].method.frozen is None
    for step, own in zip(steps, tune(config(), fresh(), picture), strict=True):
        torch.testing.assert_close(step.loss_sude, own.loss_sude, rtol=1e-3, atol=1e-6)


def test_a_backbone_opened_by_hand_is_unused(tiny_folder: Path) -> None:
    assert open_backbone(tiny_folder, device="cpu").used == ""
