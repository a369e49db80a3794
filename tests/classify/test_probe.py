"""The zero-shot classifier, against sums written out and against the embedded model's own world."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from sude_lab.backbone import Backbone
from sude_lab.classifier import class_log_posterior
from sude_lab.classify.probe import decode, prompt_errors, thresholds
from sude_lab.diffusion import add_noise, posterior_mean, posterior_variance, reverse_mean
from sude_lab.errors import UserError
from sude_lab.losses import sude_weight
from sude_lab.prompts import photo_of

pytestmark = pytest.mark.quick

PICTURE = Image.new("RGB", (32, 32))
PROMPTS = ["photo of a dog", "photo of a cat", ""]


@pytest.fixture
def pictures() -> list[Image.Image]:
    return [Image.new("RGB", (32, 32), c) for c in ("red", "green", "navy")]


def noise_of(n: int, m: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + n)
    return torch.randn((2, 4, 8, 8), generator=generator)[m]


def test_it_is_the_mean_squared_error_of_one_call_at_a_time(
    tiny: Backbone, pictures: list[Image.Image]
) -> None:
    errors = prompt_errors(tiny, pictures, PROMPTS, [10, 700], batch_size=5)
    assert errors.shape == (3, 2, 3)
    for n, m, k in ((0, 0, 0), (2, 1, 1), (1, 1, 2)):
        x_0, _ = tiny.encode_pictures([pictures[n]])
        t, eps = torch.tensor([[10, 700][m]]), noise_of(n, m)[None]
        x_t = add_noise(x_0, eps, t, tiny.schedule)
        with torch.no_grad():
            guess = tiny.predict(x_t, t, tiny.encode_prompts([PROMPTS[k]]))
        expected = torch.nn.functional.mse_loss(guess, eps)
        assert errors[n, m, k].item() == pytest.approx(expected.item(), rel=1e-4)


def test_weighted_it_is_the_implicit_classifier_of_one_step(
    tiny: Backbone, pictures: list[Image.Image]
) -> None:
    """eq. 5 with eq. 6 at x_{t-1} = mean of q(x_{t-1}|x_t,x_0): the means and the errors agree."""
    t, schedule = torch.tensor([400]), tiny.schedule
    errors = prompt_errors(tiny, pictures[:1], PROMPTS, [400]).double()
    x_0, _ = tiny.encode_pictures(pictures[:1])
    generator = torch.Generator().manual_seed(0)
    x_t = add_noise(x_0, torch.randn((1, 4, 8, 8), generator=generator), t, schedule)
    with torch.no_grad():
        outputs = [tiny.predict(x_t, t, tiny.encode_prompts([p])) for p in PROMPTS]
    means = torch.stack(
        [reverse_mean(o.double(), x_t.double(), t, schedule) for o in outputs], dim=1
    )
    x_prev = posterior_mean(x_t.double(), x_0.double(), t, schedule)
    expected = class_log_posterior(x_prev, means, posterior_variance(t, schedule))
    weight = sude_weight(t, schedule, "exact") * x_0[0].numel()
    torch.testing.assert_close(
        torch.log_softmax(-weight * errors[:, 0], dim=1), expected, rtol=1e-3, atol=1e-4
    )


def test_a_picture_s_errors_depend_on_its_place_and_the_seed_alone(
    tiny: Backbone, pictures: list[Image.Image]
) -> None:
    both = prompt_errors(tiny, pictures, PROMPTS, [300], batch_size=2)
    alone = prompt_errors(tiny, pictures[:1], PROMPTS[:2], [300], batch_size=64)
    torch.testing.assert_close(both[:1, :, :2], alone, rtol=1e-4, atol=1e-6)
    other = prompt_errors(tiny, pictures[:1], PROMPTS[:2], [300], seed=1)
    assert not torch.allclose(alone, other, rtol=1e-3)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("weighting", ["exact", "simple", "reference"])
def test_the_threshold_is_minus_the_size_of_the_guidance_direction(
    tiny: Backbone, pictures: list[Image.Image], weighting: str, batch_size: int
) -> None:
    tau = thresholds(
        tiny, pictures[:2], "dog", [200, 800], weighting=weighting, batch_size=batch_size
    )
    assert tau.shape == (2, 2)
    x_0, _ = tiny.encode_pictures(pictures[:2])
    t = torch.tensor([800, 800])
    eps = torch.stack([noise_of(0, 1), noise_of(1, 1)])
    x_t = add_noise(x_0, eps, t, tiny.schedule)
    with torch.no_grad():
        null, dog = (
            tiny.predict(x_t, t, tiny.encode_prompts([p, p])) for p in ("", "photo of a dog")
        )
    size = (dog - null).square().flatten(1).sum(1).double()
    expected = -sude_weight(t, tiny.schedule, weighting) * size
    torch.testing.assert_close(tau[:, 1].double(), expected, rtol=1e-3, atol=1e-9)


def test_decoding_an_encoded_picture_is_what_the_autoencoder_makes_of_it(
    tiny: Backbone, pictures: list[Image.Image]
) -> None:
    mean, _ = tiny.encode_pictures(pictures[:1])
    (seen,) = decode(tiny, mean)
    vae = tiny.pipeline.vae
    with torch.no_grad():
        y = vae.decode(mean / vae.config.scaling_factor).sample[0].clamp(-1, 1)
    expected = ((y / 2 + 0.5).permute(1, 2, 0).numpy() * 255).round().astype("uint8")
    assert (np.asarray(seen) == expected).all()


@pytest.mark.parametrize(
    ("pictures_", "prompts", "timesteps"),
    [
        ([], ["a"], [1]),
        ([Image.new("RGB", (32, 32))], [], [1]),
        ([Image.new("RGB", (32, 32))], ["a"], []),
    ],
)
def test_nothing_to_ask_is_an_error(
    tiny: Backbone, pictures_: list[Image.Image], prompts: list[str], timesteps: list[int]
) -> None:
    with pytest.raises(UserError, match="at least one"):
        prompt_errors(tiny, pictures_, prompts, timesteps)


@pytest.mark.parametrize("t", [-1, 1000])
def test_a_timestep_out_of_range_is_an_error(
    tiny: Backbone, pictures: list[Image.Image], t: int
) -> None:
    with pytest.raises(UserError, match="0 and 999"):
        prompt_errors(tiny, pictures, PROMPTS, [t])


def test_the_embedded_model_names_its_own_drawings(fresh: Callable[[], Backbone]) -> None:
    import random

    from sude_lab.io.opening import open_backbone
    from sude_lab.world import drawing as world

    base, rng = open_backbone(device="cpu"), random.Random("to be named")
    scenes = [world.sample_scene(rng, c) for c in ("dog", "candle", "teapot", "rabbit")]
    prompts = [photo_of(c) for c in world.CATEGORIES]
    errors = prompt_errors(base, [world.draw(s) for s in scenes], prompts, [100, 300, 500, 700])
    named = [world.CATEGORIES[k] for k in errors.mean(1).argmin(1).tolist()]
    assert named == ["dog", "candle", "teapot", "rabbit"]
