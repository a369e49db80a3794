"""Class images are drawn once by the model and reused, or are the user's own."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from sude_lab.backbone import Backbone
from sude_lab.config import TuningConfig
from sude_lab.errors import UserError
from sude_lab.generation import generate
from sude_lab.methods import configure
from sude_lab.runs import prepare as module
from sude_lab.runs.prepare import cache_folder, class_latents, drawn_class_images, fingerprint

Fresh = Callable[[], Backbone]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own, which does not exist yet."""
    folder = tmp_path / "cache" / "of the test"
    monkeypatch.setenv("SUDE_LAB_CACHE", str(folder))
    return folder


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that were really drawn."""
    prompts: list[str] = []

    def watch(backbone: Backbone, prompt: str, **settings: Any) -> list[Image.Image]:
        prompts.append(prompt)
        return generate(backbone, prompt, **settings)

    monkeypatch.setattr(module, "generate", watch)
    return prompts


def folders(cache: Path) -> set[Path]:
    """The sets of pictures in the cache."""
    return {path for path in (cache / "class_images").glob("*") if path.is_dir()}


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def config(**settings: Any) -> TuningConfig:
    return TuningConfig(
        **{"image": Path("dog.png"), "category": "dog", "num_class_images": 2} | settings
    )


# --- drawn ---------------------------------------------------------------------------------------


def test_pictures_are_drawn_once_and_found_the_next_time(
    tiny: Backbone, cache: Path, calls: list[str]
) -> None:
    first = drawn_class_images(tiny, "stuffed animal", number=3, seed=4)
    assert calls == ["photo of a stuffed animal"]
    assert [(image.size, image.mode) for image in first] == [((32, 32), "RGB")] * 3
    assert (pixels(first) == pixels(generate(tiny, calls[0], num_images=3, seed=4))).all()
    (folder,) = folders(cache)
    stamps = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = drawn_class_images(tiny, "stuffed animal", number=3, seed=4)
    assert calls == ["photo of a stuffed animal"]
    assert (pixels(again) == pixels(first)).all()
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == stamps
    about = json.loads((folder / "about.json").read_text())
    assert (about["prompt"], about["number"], about["seed"]) == (calls[0], 3, 4)


def test_another_copy_of_the_model_finds_them(fresh: Fresh, calls: list[str]) -> None:
    first = drawn_class_images(fresh(), "dog", number=1, seed=0)
    again = drawn_class_images(fresh(), "dog", number=1, seed=0)
    assert len(calls) == 1 and (pixels(first) == pixels(again)).all()


@pytest.mark.parametrize("what", ["unet", "text_encoder", "vae", "category", "seed", "number"])
def test_what_makes_other_pictures_has_another_folder(
    what: str, fresh: Fresh, cache: Path, calls: list[str]
) -> None:
    settings: dict[str, Any] = {"category": "dog", "seed": 0, "number": 2}
    drawn_class_images(fresh(), **settings)
    other = fresh()
    if what in settings:
        settings[what] = "cat" if what == "category" else 1
    else:  # a single weight of the model
        part = getattr(other.pipeline, what)
        with torch.no_grad():
            list(part.parameters())[-1].flatten()[-1] += 1e-3
    drawn_class_images(other, **settings)
    assert len(calls) == len(folders(cache)) == 2
    drawn_class_images(fresh(), category="dog", seed=0, number=2)
    assert len(calls) == 2


def test_other_settings_of_the_sampler_have_another_folder(
    fresh: Fresh, cache: Path, calls: list[str]
) -> None:
    for steps in (2, 3):
        backbone = fresh()
        backbone.facts = {"generation": {"num_inference_steps": steps, "guidance_scale": 2.0}}
        drawn_class_images(backbone, "dog", number=1, seed=0)
    assert len(calls) == len(folders(cache)) == 2


def test_the_fingerprint_is_that_of_the_weights_alone(fresh: Fresh) -> None:
    backbone = fresh()
    name = fingerprint(backbone)
    assert len(name) == 16 and fingerprint(fresh()) == name
    backbone.unet.train()
    backbone.unet.requires_grad_(True)
    assert fingerprint(backbone) == name
    # Two weights that change places have the same sum.
    with torch.no_grad():
        weight = backbone.unet.conv_in.weight.view(-1)
        weight[:2] = weight[:2].flip(0)
    assert fingerprint(backbone) != name


def test_a_drawing_that_is_stopped_leaves_nothing(
    tiny: Backbone, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "generate", stop)
        with pytest.raises(KeyboardInterrupt):
            drawn_class_images(tiny, "dog", number=1, seed=0)
    assert not cache.exists()
    assert len(drawn_class_images(tiny, "dog", number=1, seed=0)) == 1


def test_two_runs_that_draw_the_same_at_the_same_time_both_have_it(
    tiny: Backbone, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []

    def slow(*args: Any, **settings: Any) -> list[Image.Image]:
        started.append(len(started))
        if len(started) == 1:  # while the first draws, the second begins and is done
            drawn_class_images(tiny, "dog", number=2, seed=0)
        return generate(*args, **settings)

    monkeypatch.setattr(module, "generate", slow)
    images = drawn_class_images(tiny, "dog", number=2, seed=0)
    assert started == [0, 1] and len(images) == 2
    assert len(list((cache / "class_images").iterdir())) == 1


@pytest.mark.skipif(os.name != "posix", reason="a file in the way is refused in another way")
def test_a_cache_that_cannot_be_written_is_told_before_anything_is_drawn(
    tiny: Backbone, cache: Path, calls: list[str]
) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder should be")
    with pytest.raises(UserError) as error:
        drawn_class_images(tiny, "dog", number=1, seed=0)
    assert not calls and "\n" not in str(error.value)


def test_the_cache_is_where_the_environment_says_or_below_home(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert cache_folder() == cache
    monkeypatch.delenv("SUDE_LAB_CACHE")
    monkeypatch.setattr(Path, "home", classmethod(lambda cls: tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "sude_lab"


# --- latents -------------------------------------------------------------------------------------


def test_latents_are_those_of_the_drawn_pictures(tiny: Backbone, calls: list[str]) -> None:
    settings = configure(config(seed=3), tiny)
    latents = class_latents(settings, tiny, "dog")
    assert calls == ["photo of a dog"] and latents.shape == (2, 4, 8, 8)
    images = drawn_class_images(tiny, "dog", number=2, seed=10_003)
    assert len(calls) == 1  # found: the run's seed moved out of the way of its samples' seeds
    torch.testing.assert_close(latents, tiny.encode_pictures(images)[0])
    assert not torch.allclose(latents[0], latents[1])


def test_latents_have_the_size_of_the_run(tiny: Backbone) -> None:
    latents = class_latents(configure(config(resolution=48), tiny), tiny, "dog")
    assert latents.shape == (2, 4, 12, 12)


# --- the user's own ------------------------------------------------------------------------------


def picture(colour: str) -> Image.Image:
    """A ramp to a colour: on one flat colour group norm divides rounding errors by nearly 0."""
    return ImageOps.colorize(Image.linear_gradient("L").resize((32, 32)), "black", colour)


def save(folder: Path, *colours: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for colour in colours:
        picture(colour).save(folder / f"{colour}.png")


def expected(backbone: Backbone, *colours: str) -> torch.Tensor:
    return backbone.encode_pictures([picture(colour) for colour in colours])[0]


def test_the_users_pictures_take_the_place_of_drawn_ones(
    tiny: Backbone, tmp_path: Path, cache: Path, calls: list[str]
) -> None:
    save(tmp_path / "dogs", "red", "green", "blue")
    (tmp_path / "dogs" / ".hidden").write_text("not a picture")
    (tmp_path / "dogs" / "older").mkdir()
    settings = configure(config(class_images=tmp_path / "dogs"), tiny)
    latents = class_latents(settings, tiny, "dog")  # all three, whatever num_class_images says
    torch.testing.assert_close(latents, expected(tiny, "blue", "green", "red"))
    assert not calls and not cache.exists()


def test_several_categories_have_a_subfolder_each(tiny: Backbone, tmp_path: Path) -> None:
    save(tmp_path / "real" / "dog", "red")
    save(tmp_path / "real" / "stuffed animal", "green", "blue")
    more = ("stuffed animal=<bear>=bear.png",)
    settings = configure(config(class_images=tmp_path / "real", more_subjects=more), tiny)
    for category, colours in (("dog", ["red"]), ("stuffed animal", ["blue", "green"])):
        latents = class_latents(settings, tiny, category)
        torch.testing.assert_close(latents, expected(tiny, *colours))
    alone = configure(config(class_images=tmp_path / "real"), tiny)
    torch.testing.assert_close(class_latents(alone, tiny, "dog"), expected(tiny, "red"))


def test_pictures_that_do_not_tell_the_categories_apart_are_refused(
    tiny: Backbone, tmp_path: Path
) -> None:
    """Dogs must not stand for candles because they lie in the one folder there is."""
    save(tmp_path / "real", "red")
    both = configure(
        config(class_images=tmp_path / "real", more_subjects=("candle=<wax>=wax.png",)), tiny
    )
    with pytest.raises(UserError, match="candle"):
        class_latents(both, tiny, "candle")
    same = configure(
        config(class_images=tmp_path / "real", more_subjects=("dog=<dog-2>=dog.png",)), tiny
    )
    assert len(class_latents(same, tiny, "dog")) == 1


@pytest.mark.parametrize("made", [True, False])
def test_a_folder_without_pictures_is_refused(tiny: Backbone, tmp_path: Path, made: bool) -> None:
    folder = tmp_path / "empty"
    if made:
        folder.mkdir()
    settings = configure(config(class_images=folder), tiny)
    with pytest.raises(UserError, match=r"There are no class images in .*empty") as error:
        class_latents(settings, tiny, "dog")
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_a_file_that_is_no_picture_is_named(tiny: Backbone, tmp_path: Path) -> None:
    save(tmp_path / "dogs", "red")
    (tmp_path / "dogs" / "notes.txt").write_text("dogs I met")
    settings = configure(config(class_images=tmp_path / "dogs"), tiny)
    with pytest.raises(UserError, match=r"notes\.txt"):
        class_latents(settings, tiny, "dog")


def test_damaged_pictures_of_the_cache_are_told(
    fresh: Callable[[], Backbone], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SUDE_LAB_CACHE", str(tmp_path))
    drawn_class_images(fresh(), "dog", number=1, seed=0)
    (file,) = tmp_path.rglob("*.png")
    for damage in (file.read_bytes()[:60], b"no picture"):
        file.write_bytes(damage)
        with pytest.raises(UserError, match=r"are damaged .* delete the folder"):
            drawn_class_images(fresh(), "dog", number=1, seed=0)
