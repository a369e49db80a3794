"""Pictures follow from (seed, k) alone, and are what diffusers itself would draw."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline
from PIL import Image

from sude_lab.backbone import Backbone
from sude_lab.errors import UserError
from sude_lab.generation import STABLE_DIFFUSION, generate, sampling_settings

PROMPT = "photo of a running dog"


def distance(a: list[Image.Image], b: list[Image.Image]) -> int:
    """The largest difference of a pixel, of 255."""
    pairs = zip(a, b, strict=True)
    return max(int(np.abs(np.int16(x) - np.int16(y)).max()) for x, y in pairs)


def test_pictures_have_the_models_size(tiny: Backbone) -> None:
    images = generate(tiny, PROMPT, num_images=3)
    assert [(image.size, image.mode) for image in images] == [((32, 32), "RGB")] * 3


def test_picture_k_does_not_depend_on_the_batch(tiny: Backbone) -> None:
    whole = generate(tiny, PROMPT, num_images=5, batch_size=5)
    parts = generate(tiny, PROMPT, num_images=5, batch_size=2)
    fewer = generate(tiny, PROMPT, num_images=2)
    assert distance(whole, parts) <= 1  # rounding to 8 bit
    assert distance(whole[:2], fewer) <= 1
    assert distance(whole[:1], whole[1:2]) > 8


def test_pictures_in_the_middle_are_those_of_the_whole(tiny: Backbone) -> None:
    whole = generate(tiny, PROMPT, num_images=5)
    assert distance(whole[2:4], generate(tiny, PROMPT, num_images=2, first=2)) <= 1
    alone = generate(tiny, PROMPT, num_images=3, first=2, batch_size=1)
    assert len(alone) == 3 and distance(whole[2:], alone) <= 1


def test_seeds_prompts_and_guidance_change_the_pictures(tiny: Backbone) -> None:
    first = generate(tiny, PROMPT, num_images=1, seed=0)
    assert distance(first, generate(tiny, PROMPT, num_images=1, seed=0)) == 0
    for other in (
        generate(tiny, PROMPT, num_images=1, seed=1),
        generate(tiny, PROMPT, num_images=1, guidance_scale=9.0),
        generate(tiny, PROMPT, num_images=1, num_inference_steps=4),
        generate(tiny, "photo of a candle", num_images=1, guidance_scale=9.0),
    ):
        assert distance(first, other) > 0


def test_pictures_are_those_of_a_plain_call_of_diffusers(tiny: Backbone) -> None:
    ddim = DDIMScheduler.from_config(tiny.pipeline.scheduler.config)
    parts = tiny.pipeline.components | {"scheduler": ddim}
    plain = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    plain.set_progress_bar_config(disable=True)
    noise = torch.stack(
        [
            torch.randn((4, 8, 8), generator=torch.Generator().manual_seed(7 * 100_003 + k))
            for k in range(2)
        ]
    )
    expected = plain(
        [PROMPT] * 2,
        latents=noise,
        num_inference_steps=3,
        guidance_scale=5.0,
        negative_prompt=["candle"] * 2,
    ).images
    seen = generate(
        tiny,
        PROMPT,
        num_images=2,
        seed=7,
        num_inference_steps=3,
        guidance_scale=5.0,
        negative_prompt="candle",
    )
    assert distance(seen, expected) == 0


def test_the_scheduler_is_put_back_even_after_an_error(
    tiny: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained_with = PNDMScheduler.from_config(tiny.pipeline.scheduler.config)
    tiny.pipeline.scheduler = trained_with
    generate(tiny, PROMPT, num_images=1)
    assert tiny.pipeline.scheduler is trained_with

    def fail(*args: Any, **kwargs: Any) -> None:
        assert isinstance(tiny.pipeline.scheduler, DDIMScheduler)
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny.pipeline.vae, "decode", fail)
    with pytest.raises(KeyboardInterrupt):
        generate(tiny, PROMPT, num_images=1)
    assert tiny.pipeline.scheduler is trained_with


def test_drawing_leaves_the_global_generator_and_the_gradients_alone(tiny: Backbone) -> None:
    before = torch.get_rng_state()
    generate(tiny, PROMPT, num_images=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()


def test_a_seed_of_numpy_is_one_and_a_prompt_is_a_text(tiny: Backbone) -> None:
    (one,) = generate(tiny, PROMPT, num_images=1, seed=np.int64(2), num_inference_steps=2)
    (other,) = generate(tiny, PROMPT, num_images=1, seed=2, num_inference_steps=2)
    assert one.tobytes() == other.tobytes()
    for prompts in ({"prompt": None}, {"prompt": []}, {"prompt": "a dog", "negative_prompt": 5}):
        with pytest.raises(UserError, match="give one text"):
            generate(tiny, **prompts)  # type: ignore[arg-type]


def test_settings_are_those_chosen_then_the_folders_then_stable_diffusions(
    tiny: Backbone,
) -> None:
    assert sampling_settings(tiny.facts) == {"num_inference_steps": 2, "guidance_scale": 2.0}
    assert sampling_settings(tiny.facts, guidance_scale=0.0)["guidance_scale"] == 0.0
    assert sampling_settings(tiny.facts, num_inference_steps=None)["num_inference_steps"] == 2
    assert sampling_settings({}) == STABLE_DIFFUSION


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_images": 0}, "number of images is 0"),
        ({"num_images": -1}, "number of images is -1"),
        ({"num_inference_steps": 0}, "steps is 0: it must be a whole number of at least 1"),
        ({"num_inference_steps": 1001}, "steps is 1,001: it must be"),
        ({"guidance_scale": float("nan")}, "guidance scale is nan"),
        ({"guidance_scale": float("inf")}, "guidance scale is inf"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 10**30}, "seed is 1,000"),
        ({"seed": 1.5}, "seed is 1.5: it must be a whole number"),
        ({"num_images": "3"}, "number of images is '3'"),
        ({"num_images": True}, "number of images is True"),
        ({"num_images": 2.0}, "number of images is 2.0"),
        ({"num_inference_steps": 2.5}, "steps is 2.5"),
        ({"guidance_scale": "7"}, "guidance scale is '7'"),
        ({"batch_size": 0}, "batch size is 0"),
        ({"first": -1}, "first picture's number is -1"),
    ],
)
def test_settings_out_of_range_are_refused(
    tiny: Backbone, settings: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UserError) as error:
        generate(tiny, PROMPT, **settings)
    assert expected in str(error.value) and str(error.value).endswith(".")


def test_progress_is_shown_only_on_request(
    tiny: Backbone, capsys: pytest.CaptureFixture[str]
) -> None:
    draw: Callable[..., Any] = generate
    draw(tiny, PROMPT, num_images=1)
    assert capsys.readouterr().err == ""
    draw(tiny, PROMPT, num_images=1, progress=True)
    assert "drawing" in capsys.readouterr().err
