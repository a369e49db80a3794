"""Classification with the model itself: loops, an exact world, coverage, and what pruning keeps."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sude_lab.backbone import Backbone, Condition
from sude_lab.classify.implicit import (
    ImplicitClassifier,
    ask_in_rounds,
    compare,
    posterior,
    spread_times,
    step_weights,
)
from sude_lab.diffusion import Schedule
from sude_lab.errors import UserError
from sude_lab.world.mixture import GaussianMixture

pytestmark = pytest.mark.quick

PROMPTS = ["photo of a dog", "photo of a cat", "photo of a candle", "", "photo of a running dog"]


@pytest.fixture
def pictures() -> list[Image.Image]:
    rows = np.linspace(0, 255, 32).astype(np.uint8)
    ramp = np.stack(
        [np.tile(rows, (32, 1)), np.tile(rows[:, None], (1, 32)), np.full((32, 32), 90)]
    )
    first = np.moveaxis(ramp, 0, -1).astype(np.uint8)
    return [Image.fromarray(first), Image.fromarray(255 - first)]


def schedule(steps: int = 1000) -> Schedule:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    table = (1 - betas).cumprod(0)
    return Schedule(table[:: 1000 // steps])


# --- what it computes ----------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["elbo", "simple"])
def test_it_is_a_loop_over_pairs_and_prompts(
    weighting: str, tiny: Backbone, pictures: list[Image.Image]
) -> None:
    classifier = ImplicitClassifier(
        tiny, PROMPTS, num_pairs=3, weighting=weighting, prune=False, seed=4
    )
    (_, verdict) = classifier.classify(pictures)

    abar = np.asarray(tiny.pipeline.scheduler.alphas_cumprod, dtype=np.float64)
    before = np.concatenate([[1.0], abar[:-1]])
    beta = 1 - abar / before
    if weighting == "elbo":  # beta_t / (2 alpha_t (1 - abar_{t-1})), none at t = 0
        w = np.concatenate([[0.0], (beta / (2 * (1 - beta) * np.maximum(1 - before, 1e-9)))[1:]])
    else:
        w = np.full(1000, 1e-3)
    generator = torch.Generator().manual_seed(4 * 1_000_003 + 1)
    shift = torch.rand((), generator=generator, dtype=torch.float64).item()
    noise = torch.randn((3, 4, 8, 8), generator=generator)
    total, x_0 = np.zeros(len(PROMPTS)), tiny.encode_pictures(pictures[1:])[0]
    for i, part in enumerate([2, 1, 0]):  # the thirds that hold 3/4, 1/2, 1/4
        t = int(np.argmax(np.cumsum(w) > (part + shift) / 3 * w.sum()))
        x_t = math.sqrt(abar[t]) * x_0 + math.sqrt(1 - abar[t]) * noise[i]
        for k, prompt in enumerate(PROMPTS):
            with torch.no_grad():
                words = tiny.encode_prompts([prompt]).hidden
                guess = tiny.unet(x_t, torch.tensor([t]), encoder_hidden_states=words).sample
            total[k] += w.sum() * float(((noise[i] - guess) ** 2).double().sum()) / 3
    scores = np.exp(total.min() - total)
    expected = scores / scores.sum()
    assert verdict.probability.numpy() == pytest.approx(expected, rel=2e-3)
    assert verdict.order == np.argsort(-expected).tolist()
    assert verdict.best == PROMPTS[int(expected.argmax())]
    assert verdict.pairs.sum() == 3 * 5
    assert 0.2 < verdict.probability.max() < 0.999  # the case is no degenerate one


def test_the_batch_changes_nothing(tiny: Backbone, pictures: list[Image.Image]) -> None:
    found = [
        ImplicitClassifier(tiny, PROMPTS, num_pairs=6, batch_size=size).losses(pictures)[0]
        for size in (1, 7, 64)
    ]
    assert found[0].isnan().any() and not found[0].isnan().all()
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-3, equal_nan=True)


def test_a_picture_meets_the_same_pairs_in_any_company(
    tiny: Backbone, pictures: list[Image.Image]
) -> None:
    (first, _), (alone,), (other,) = (
        ImplicitClassifier(tiny, PROMPTS[:2], num_pairs=2, seed=seed).classify(asked)
        for asked, seed in ((pictures, 0), (pictures[:1], 0), (pictures[:1], 1))
    )
    torch.testing.assert_close(first.probability, alone.probability, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(alone.probability, other.probability, rtol=1e-3)


def test_the_weights_are_the_bound_s() -> None:
    """k_t is half the fall of log SNR for short steps, and the simple ones are alike."""
    known = schedule()
    snr = known.alphas_cumprod / (1 - known.alphas_cumprod)
    fall = -snr.log().diff() / 2
    elbo = step_weights(known, "elbo")
    assert elbo[0] == 0
    torch.testing.assert_close(elbo[101:], fall[100:], rtol=0.02, atol=0)
    assert step_weights(known, "simple").tolist() == [1e-3] * 1000
    with pytest.raises(ValueError, match="must be one of"):
        step_weights(known, "best")


def test_times_are_spread_and_drawn_in_proportion_to_the_weights() -> None:
    weights = torch.tensor([0.0, 4.0, 2.0, 1.0, 1.0])
    shifts = (torch.arange(1000) + 0.5) / 1000
    for number in (2, 6, 7):
        drawn = torch.stack([spread_times(number, weights, shift.item()) for shift in shifts])
        shares = torch.bincount(drawn.flatten(), minlength=5) / drawn.numel()
        assert shares.tolist() == pytest.approx([0, 0.5, 0.25, 0.125, 0.125], abs=0.002)
    even = spread_times(8, torch.ones(800), 0.305)
    assert even.tolist() == [630, 430, 230, 730, 530, 330, 130, 30]
    for number in range(2, 70):
        parts = spread_times(number, torch.ones(100 * number), 0.5) // 100
        assert sorted(parts.tolist()) == list(range(number))


# --- an exact world ------------------------------------------------------------------------------


class World:
    """What the classifier asks of a backbone, with a mixture's closed forms in its place."""

    device = torch.device("cpu")

    def __init__(self, mixture: GaussianMixture, known: Schedule) -> None:
        self.mixture, self.schedule = mixture, known

    def encode_prompts(self, prompts: list[str]) -> Condition:
        return Condition(torch.tensor([[float(prompt)] for prompt in prompts]))

    def encode_pictures(self, pictures: list[torch.Tensor]) -> tuple[torch.Tensor, None]:
        return torch.stack(pictures), None

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        labels, output = condition.hidden[:, 0].long(), torch.zeros_like(x_t)
        for label in labels.unique().tolist():
            mine = labels == label
            eps = self.mixture.eps(x_t[mine].double(), t[mine], self.schedule, label)
            output[mine] = eps.to(output)
        return output


def test_in_an_exact_world_it_is_the_exact_posterior() -> None:
    generator = torch.Generator().manual_seed(3)
    mixture = GaussianMixture(
        weights=torch.tensor([2, 2, 1, 1], dtype=torch.float64) / 6,  # labels as likely as others
        means=1.2 * torch.randn((4, 3), generator=generator, dtype=torch.float64),
        variances=torch.tensor([0.6, 0.8, 0.7, 0.9], dtype=torch.float64),
        labels=torch.tensor([0, 1, 2, 2]),
    )
    x_0, _ = mixture.sample(6, generator)
    known = schedule()
    exact = mixture.class_log_posterior_prev(x_0, torch.zeros(6, dtype=torch.long), known).exp()
    world: Any = World(mixture, known)
    told = {"num_pairs": 2048, "prune": False, "batch_size": 8192}
    classifier = ImplicitClassifier(world, ["0", "1", "2"], **told)
    found = classifier.classify([x.float() for x in x_0])  # type: ignore[misc]
    p = torch.stack([verdict.probability for verdict in found])
    error = torch.stack([verdict.standard_error for verdict in found])
    assert ((p - exact).abs() <= 4 * error + 0.01).all()
    assert error.max() < 0.05
    apart = exact.sort(1).values.diff().min(1).values > 0.1
    assert apart.sum() >= 3
    assert torch.equal(p.argsort(1)[apart], exact.argsort(1)[apart])


# --- standard errors -----------------------------------------------------------------------------


def draw_losses(
    generator: torch.Generator, number: int, gaps: torch.Tensor, noise: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses whose differences change with t, smoothly and much, and by noise; mean gap `gaps`."""
    shift = torch.rand((), generator=generator).item()
    times = spread_times(number, torch.ones(100_000), shift)
    common = 50 * torch.randn((number, 1), generator=generator, dtype=torch.float64)
    curve = torch.cos(2 * math.pi * times / 100_000).unsqueeze(1)
    own = noise * torch.randn((number, len(gaps)), generator=generator, dtype=torch.float64)
    return common + gaps * (1 + 3 * curve) + own, times


def test_standard_errors_say_how_far_the_probabilities_are_off() -> None:
    """Of 300 draws of 32 pairs about 95 % lie within 1.96 errors of the truth."""
    generator = torch.Generator().manual_seed(0)
    gaps = torch.tensor([0.0, 0.4, 0.8, 1.5], dtype=torch.float64)
    found = [posterior(*draw_losses(generator, 32, gaps)) for _ in range(300)]
    p, error = (torch.stack(part) for part in zip(*found, strict=True))
    truth = (-gaps).softmax(0)
    covered = ((p - truth).abs() <= 1.96 * error).double().mean(0)
    assert ((covered > 0.90) & (covered < 0.99)).all(), covered
    ratio = error.mean(0) / p.std(0)
    assert ((ratio > 0.85) & (ratio < 1.2)).all(), ratio


def test_standard_errors_shrink_like_one_over_the_root_of_the_number() -> None:
    generator = torch.Generator().manual_seed(1)
    gaps = torch.tensor([0.0, 0.3, 0.9], dtype=torch.float64)
    few, many = (
        torch.stack([posterior(*draw_losses(generator, n, gaps))[1] for _ in range(40)]).mean(0)
        for n in (32, 512)
    )
    assert (few / many).tolist() == pytest.approx([4.0] * 3, rel=0.12)


def test_a_wide_lead_that_is_uncertain_is_not_called_certain() -> None:
    times = torch.arange(4)
    losses = torch.tensor([[0.0, 40.0], [0.0, -22.0], [0.0, 36.0], [0.0, -14.0]])
    p, error = posterior(losses, times)
    assert p[0] > 0.999 and error[0] > 0.3
    sure, small = posterior(
        torch.tensor([[0.0, 9.9], [0.0, 10.1], [0.0, 10.0], [0.0, 10.0]]), times
    )
    assert sure[0] > 0.999 and small[0] < 1e-4


def test_what_all_prompts_share_cancels() -> None:
    generator = torch.Generator().manual_seed(2)
    losses, times = draw_losses(generator, 16, torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    shared = 1e4 * torch.randn((16, 1), generator=generator, dtype=torch.float64)
    torch.testing.assert_close(posterior(losses + shared, times), posterior(losses, times))


def test_where_nothing_differs_all_prompts_are_as_likely() -> None:
    p, error = posterior(torch.full((4, 3), 7.0), torch.arange(4))
    assert p.tolist() == pytest.approx([1 / 3] * 3) and error.tolist() == [0, 0, 0]


# --- pruning -------------------------------------------------------------------------------------


def prune(losses: torch.Tensor, times: torch.Tensor, **told: Any) -> torch.Tensor:
    return ask_in_rounds(lambda rows: losses[rows.unbind(1)], times, losses.shape[2], **told)


@pytest.mark.parametrize("pairs", [2, 5, 10, 37])
def test_pruning_keeps_the_winner_where_the_differences_are_large(pairs: int) -> None:
    generator = torch.Generator().manual_seed(pairs)
    gaps = 5 + 20 * torch.rand((40, 20), generator=generator, dtype=torch.float64)
    best = torch.randint(20, (40,), generator=generator)
    gaps[torch.arange(40), best] = 0
    drawn = [draw_losses(generator, pairs, mine, noise=0.3) for mine in gaps]
    losses = torch.stack([x for x, _ in drawn]) - gaps.unsqueeze(1) * 3 * torch.stack(
        [torch.cos(2 * math.pi * t / 100_000) for _, t in drawn]
    ).unsqueeze(2)
    times = torch.stack([t for _, t in drawn])
    kept = prune(losses, times)
    assert torch.equal(losses[~kept.isnan()], kept[~kept.isnan()])
    for n in range(40):
        p, error = posterior(kept[n], times[n])
        assert int(p.argmax()) == best[n]
        assert p.sum().item() == pytest.approx(1) and bool(error.isfinite().all())
    asked = (~kept.isnan()).double().mean()
    assert asked <= (0.75 if pairs == 2 else 0.4)
    assert not prune(losses, times, prune=False).isnan().any()


def test_what_was_dropped_never_comes_out_best() -> None:
    """Noise as large as the differences: whatever was dropped stands behind what stayed."""
    generator = torch.Generator().manual_seed(8)
    losses = 3 * torch.randn((60, 20, 12), generator=generator, dtype=torch.float64)
    losses += 2 * torch.rand((60, 1, 12), generator=generator, dtype=torch.float64)
    times = torch.stack([torch.randperm(20, generator=generator) for _ in range(60)])
    kept = prune(losses, times)
    for n in range(60):
        counts = (~kept[n].isnan()).sum(0)
        best = int(posterior(kept[n], times[n])[0].argmax())
        assert counts[best] == counts.max()
        seen = ~kept[n].isnan()
        assert torch.equal(seen.cummin(0).values, seen)  # always the first few pairs
    assert kept.isnan().any()


def test_a_real_run_prunes_as_the_rule_says(tiny: Backbone, pictures: list[Image.Image]) -> None:
    full = ImplicitClassifier(tiny, PROMPTS, num_pairs=6, prune=False)
    losses, times = full.losses(pictures)
    kept, same = replace(full, prune=True).losses(pictures)
    assert torch.equal(times, same)
    torch.testing.assert_close(kept, prune(losses, times), rtol=1e-4, atol=1e-3, equal_nan=True)
    (verdict, _) = replace(full, prune=True).classify(pictures)
    assert verdict.pairs.tolist() == (~kept[0].isnan()).sum(0).tolist()
    assert verdict.pairs.sum() < 6 * 5


def test_more_caution_asks_more() -> None:
    generator = torch.Generator().manual_seed(5)
    losses = 2 * torch.randn((30, 20, 8), generator=generator, dtype=torch.float64)
    losses += torch.arange(8)
    times = torch.arange(20).expand(30, -1)
    asked = [(~prune(losses, times, caution=c).isnan()).sum().item() for c in (0.5, 2.0, 8.0)]
    assert asked[0] < asked[1] < asked[2] <= losses.numel()


def test_a_prompt_that_was_asked_once_has_the_noise_of_the_others() -> None:
    losses = torch.tensor([[0.0, 1.0, 9.0], [0.0, 3.0, torch.nan], [0.0, 2.0, torch.nan]])
    differences, parts, noise = compare(losses, torch.tensor([0, 2, 1]))
    assert differences.tolist() == [0, 2, 9]
    # 1, 2, 3 in the order of t: ends -1 / sqrt 2 and 1 / sqrt 2, middle 0, variance 1 / 3 * 1
    assert noise.item() == pytest.approx((0.5 + 0.5) / 9 * 3 / 2)
    assert parts[0, 2].item() == pytest.approx(math.sqrt(9 * noise.item()))


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"prompts": ["photo of a dog"]}, "at least two"),
        ({"prompts": []}, "at least two"),
        ({"prompts": ["photo of a dog", "photo  of a dog "]}, "given twice"),
        ({"prompts": ["photo of a {S*}", "photo of a dog"]}, "plain words"),
        ({"num_pairs": 1}, "--num-pairs is 1"),
        ({"num_pairs": 10_001}, "--num-pairs is 10,001"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"seed": -1}, "--seed is -1"),
        ({"caution": 0.0}, "--caution"),
        ({"caution": math.nan}, "--caution"),
        ({"weighting": "best"}, "elbo or simple"),
    ],
)
def test_what_cannot_be_asked_is_refused(settings: dict[str, Any], expected: str) -> None:
    told: dict[str, Any] = {"prompts": PROMPTS[:2]} | settings
    nothing: Any = SimpleNamespace()
    with pytest.raises(UserError, match=expected):
        ImplicitClassifier(nothing, **told)


def test_no_picture_and_no_number_are_refused(tiny: Backbone, pictures: list[Image.Image]) -> None:
    classifier = ImplicitClassifier(tiny, PROMPTS[:2], num_pairs=2)
    with pytest.raises(UserError, match="at least one picture"):
        classifier.classify([])
    with torch.no_grad():
        tiny.unet.conv_out.bias.fill_(math.nan)
    with pytest.raises(UserError, match="not finite"):
        classifier.classify(pictures)


def test_prompts_that_the_model_reads_as_the_same_are_refused(
    tiny: Backbone, pictures: list[Image.Image]
) -> None:
    long = " ".join(["a running dog on the"] * 20)
    classifier = ImplicitClassifier(tiny, [f"{long} dog", f"{long} cat"])
    with pytest.raises(UserError, match="as far as the model reads"):
        classifier.classify(pictures)
