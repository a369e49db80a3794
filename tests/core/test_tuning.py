"""What a step computes, what settings resolve to, and that a run depends on its seed alone."""

import copy
import math
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from sude_lab import sude as regularizer
from sude_lab import tuning
from sude_lab.backbone import Backbone, Condition
from sude_lab.classify.implicit import ImplicitClassifier
from sude_lab.config import PRESETS, TuningConfig
from sude_lab.diffusion import add_noise, posterior_variance, reverse_mean
from sude_lab.draws import Batch, FreshDraws, side_of, step_generator
from sude_lab.errors import UserError
from sude_lab.io.opening import open_backbone
from sude_lab.io.pictures import load_picture
from sude_lab.losses import sude_loss, sude_threshold, sude_weight
from sude_lab.methods import METHODS, DreamBooth, configure
from sude_lab.runs.prepare import WithClassImages, class_latents
from sude_lab.runs.prepare import prepared_tuning as tune
from sude_lab.tuning import Step

Fresh = Callable[[], Backbone]
TENSORS = ("t", "loss_subject", "loss_sude", "tau", "gate", "rho")


@pytest.fixture
def picture(subject_picture: Path) -> Image.Image:
    return Image.open(subject_picture).convert("RGB")


def config(**settings: Any) -> TuningConfig:
    chosen = {"image": Path("dog.png"), "category": "dog", "max_train_steps": 2, "seed": 5}
    return TuningConfig(**chosen | settings)


Pictures = Image.Image | list[Image.Image]


def run(settings: TuningConfig, backbone: Backbone, picture: Pictures) -> list[Step]:
    return list(tune(settings, backbone, picture))


def trained(steps: list[Step]) -> dict[str, Tensor]:
    return steps[-1].state_dict()["trained"]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- a step --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_step_holds_a_finite_number_a_sample(
    method: str, fresh: Fresh, picture: Image.Image
) -> None:
    # Some methods keep their prior by default: class images are another test's.
    steps = run(config(method=method, train_batch_size=3, prior_loss_weight=0.0), fresh(), picture)
    assert [step.number for step in steps] == [1, 2]
    for step in steps:
        for name in TENSORS:
            value = getattr(step, name)
            assert value.shape == (3,), name
            assert torch.isfinite(value.float()).all(), name
            assert not value.requires_grad
        assert step.t.dtype == torch.long and bool(((step.t >= 0) & (step.t < 1000)).all())
        assert step.gate.dtype == torch.bool
        assert torch.equal(step.gate, step.loss_sude > step.tau)
        assert bool((step.tau <= 0).all()) and bool((step.loss_subject > 0).all())
        assert step.loss_regularizer == 0.0
        row = step.row()
        assert row["loss_sude"] == pytest.approx(step.loss_sude.mean().item())
        assert row["open_gates"] == pytest.approx(step.gate.float().mean().item())
        assert row["loss_own"] == step.loss_own
        assert set(row) > {"step", "t", "loss_subject", "tau", "rho", "learning_rate"}


def test_rho_says_where_the_gate_shuts(fresh: Fresh, picture: Image.Image) -> None:
    (step,) = run(config(train_batch_size=16, max_train_steps=1), fresh(), picture)
    assert torch.equal(step.gate, step.rho < 1)


def test_without_sude_its_numbers_are_not_there_and_watching_it_changes_no_weight(
    fresh: Fresh, picture: Image.Image
) -> None:
    plain = run(config(weight_sude=0.0), fresh(), picture)
    watched = run(config(weight_sude=0.0, monitor_sude=True), fresh(), picture)
    for step in plain:
        assert (step.loss_sude, step.tau, step.rho) == (None, None, None)
        assert step.gate.shape == (2,) and not step.gate.any()
        row = step.row()
        assert all(math.isnan(row[name]) for name in ("loss_sude", "tau", "rho"))
        assert row["open_gates"] == 0
    assert all(torch.isfinite(step.loss_sude).all() for step in watched)
    assert same(trained(plain), trained(watched))


def by_hand(
    settings: TuningConfig, fresh: Fresh, picture: Image.Image
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """t, L_sub, L_sude and tau of step 1, in float64 and in the space of the means."""
    backbone = fresh()
    settings = configure(settings, backbone)
    assert settings.train_batch_size is not None
    generator = step_generator(settings.seed, 1)
    size = settings.train_batch_size
    mean, std = backbone.encode_pictures([picture.resize((32, 32), Image.Resampling.LANCZOS)])
    torch.randint(1, (size,), generator=generator)
    x_0 = mean + std * torch.randn((size, 4, 8, 8), generator=generator)
    eps = torch.randn((size, 4, 8, 8), generator=generator)
    t = torch.randint(1000, (size,), generator=generator)
    schedule = backbone.schedule
    with torch.no_grad():
        null, category = backbone.encode_prompts([""]), backbone.encode_prompts(["photo of a dog"])
        backbone.add_token(settings.token, settings.initializer or settings.category)
        text = "photo of a <sks> dog" if settings.method == "dreambooth" else "photo of a <sks>"
        subject = backbone.encode_prompts([text])
        x_t = add_noise(x_0, eps, t, schedule)
        eps_of = [
            backbone.predict(x_t, t, c.expand(size)).double() for c in (subject, category, null)
        ]
    subject_mean, class_mean, null_mean = (
        reverse_mean(e, x_t.double(), t, schedule) for e in eps_of
    )
    variance = posterior_variance(t, schedule)
    loss = sude_loss(subject_mean, class_mean, null_mean, variance) / x_0[0].numel()
    tau = sude_threshold(class_mean, null_mean, variance) / x_0[0].numel()
    return t, (eps_of[0] - eps).square().mean((1, 2, 3)), loss, tau


@pytest.mark.quick
@pytest.mark.parametrize("method", ["dreambooth", "textual_inversion"])
def test_the_exact_loss_is_eq_7_of_the_means(
    method: str, fresh: Fresh, picture: Image.Image
) -> None:
    settings = config(
        method=method,
        weighting="exact",
        prior="pretrained",
        train_batch_size=8,
        max_train_steps=1,
        initializer="cat",
    )
    (step,) = run(settings, fresh(), picture)
    t, loss_subject, loss_sude, tau = by_hand(settings, fresh, picture)
    assert torch.equal(step.t, t)
    torch.testing.assert_close(step.loss_subject.double(), loss_subject, rtol=1e-4, atol=1e-7)
    # Float32 predictions differ by rounding between batch shapes: relative to the larger square.
    scale = loss_sude.abs().max().item()
    torch.testing.assert_close(step.loss_sude.double(), loss_sude, rtol=2e-3, atol=1e-4 * scale)
    torch.testing.assert_close(step.tau.double(), tau, rtol=2e-3, atol=1e-4 * scale)
    assert tau.abs().max() > 1e-6  # the two conditions do differ


@pytest.mark.quick
def test_the_three_terms_are_added_and_averaged_over_the_batch(
    fresh: Fresh, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, ...]] = []
    total = tuning.total_loss

    def watch(subject: Tensor, sude: Tensor, regularizer: Tensor, *weights: float) -> Tensor:
        result = total(subject, sude, regularizer, *weights)
        seen.append((subject, sude, regularizer, result))
        assert weights == (0.7, 0.5)
        return result

    monkeypatch.setattr(tuning, "total_loss", watch)
    settings = config(
        weight_sude=0.7, prior_loss_weight=0.5, num_class_images=2, max_train_steps=1, train="unet"
    )
    backbone = fresh()
    (step,) = run(settings, backbone, picture)
    subject, sude, regularizer, result = (value.detach() for value in seen[0])
    assert torch.equal(subject, step.loss_subject)
    assert torch.equal(sude, step.loss_sude * step.gate)
    assert regularizer.mean().item() == pytest.approx(step.loss_regularizer)
    torch.testing.assert_close(result, subject + 0.7 * sude + 0.5 * regularizer)
    # The gradient that AdamW met is that of the mean, not of the sum.
    grads = {n: p.grad for n, p in step.method.parameters.items() if p.grad is not None}
    assert set(grads) == set(step.method.parameters)


def gradients(settings: TuningConfig, backbone: Backbone, picture: Pictures) -> list[Tensor]:
    """The unclipped gradients of the first step."""
    settings = replace(settings, max_train_steps=1, max_grad_norm=0.0)
    (step,) = run(settings, backbone, picture)
    return [p.grad.clone() for p in step.method.parameters.values() if p.grad is not None]


def test_the_gradient_of_a_batch_is_the_mean_of_its_samples(
    fresh: Fresh, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = FreshDraws.draw
    settings = config(train_batch_size=2, truncate=True)
    whole = gradients(settings, fresh(), picture)
    parts = []
    for k in range(2):

        def one(self: FreshDraws, size: int, generator: torch.Generator, k: int = k) -> Batch:
            return draw(self, 2, generator).rows(slice(k, k + 1))

        monkeypatch.setattr(FreshDraws, "draw", one)
        parts.append(gradients(replace(settings, train_batch_size=1), fresh(), picture))
    for both, first, second in zip(whole, *parts, strict=True):
        torch.testing.assert_close(both, (first + second) / 2, rtol=1e-3, atol=1e-6)


@pytest.mark.quick
def test_truncation_takes_the_gradient_of_samples_whose_gate_is_shut(
    fresh: Fresh, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = gradients(config(weight_sude=0.0), fresh(), picture)
    full = gradients(config(truncate=False), fresh(), picture)
    assert any(not torch.equal(a, b) for a, b in zip(plain, full, strict=True))
    for shut in (True, False):  # force every gate one way through the threshold
        bound = math.inf if shut else -math.inf
        monkeypatch.setattr(
            regularizer, "sude_threshold", lambda c, n, v, bound=bound: torch.full_like(v, bound)
        )
        expected = plain if shut else full
        seen = gradients(config(truncate=True), fresh(), picture)
        for a, b in zip(seen, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
        free = gradients(config(truncate=False), fresh(), picture)
        for a, b in zip(free, full, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_sude_reaches_the_lora_adapters(fresh: Fresh, picture: Image.Image) -> None:
    """Asking the old model switches the adapters off for a moment: gradients must survive it."""
    settings = config(train="lora", prior="pretrained", truncate=False, max_train_steps=3)
    sude = run(settings, fresh(), picture)
    plain = run(replace(settings, weight_sude=0.0), fresh(), picture)
    moved = [n for n, v in trained(sude).items() if not torch.equal(v, trained(plain)[n])]
    assert len(moved) == len(trained(sude))
    # With the adapters at their start (B = 0) old and current model are one.
    current = run(replace(settings, prior="current", max_train_steps=1), fresh(), picture)
    first = run(replace(settings, max_train_steps=1), fresh(), picture)
    for name, value in trained(current).items():
        torch.testing.assert_close(value, trained(first)[name])


@pytest.mark.parametrize(("method", "equal"), [("textual_inversion", True), ("dreambooth", False)])
def test_the_priors_differ_only_where_the_model_changes(
    method: str, equal: bool, fresh: Fresh, picture: Image.Image
) -> None:
    steps = {
        prior: run(
            # Without truncation the loss counts in every step, whatever this random model says.
            config(method=method, prior=prior, max_train_steps=3, truncate=False),
            fresh(),
            picture,
        )
        for prior in ("current", "pretrained")
    }
    assert same(trained(steps["current"]), trained(steps["pretrained"])) == equal
    first = [steps[prior][0].tau for prior in ("current", "pretrained")]
    torch.testing.assert_close(first[0], first[1])  # nothing has changed yet
    last = [steps[prior][-1].tau for prior in ("current", "pretrained")]
    assert torch.equal(last[0], last[1]) == equal


def drawn(backbone: Backbone, picture: Image.Image, step: int, seed: int = 5) -> Any:
    """What that step draws for a batch of two."""
    latents = backbone.encode_pictures([picture.resize((32, 32), Image.Resampling.LANCZOS)])
    return FreshDraws([latents], 1000).draw(2, step_generator(seed, step))


def test_a_trained_text_encoder_moves_the_category_of_the_current_prior_alone(
    fresh: Fresh, picture: Image.Image
) -> None:
    """The old model's opinion rests on its own reading of the category's prompt."""
    settings = config(train_text_encoder=True, prior="pretrained", max_train_steps=3)
    changed = run(settings, fresh(), picture)
    backbone, expected = fresh(), []
    null, category = backbone.encode_prompts([""]), backbone.encode_prompts(["photo of a dog"])
    for step in changed:
        batch = drawn(backbone, picture, step.number)
        x_t = add_noise(batch.x_0, batch.eps, batch.t, backbone.schedule)
        of = [backbone.predict(x_t, batch.t, c.expand(2)) for c in (category, null)]
        expected.append(
            -(of[0] - of[1]).square().mean((1, 2, 3)).double()
            * sude_weight(batch.t, backbone.schedule, "reference")
        )
    for step, tau in zip(changed, expected, strict=True):
        torch.testing.assert_close(step.tau.double(), tau, rtol=1e-3, atol=1e-7)


def test_horizontal_flip_uses_the_mirrored_picture_half_of_the_time(
    fresh: Fresh, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = picture.resize((32, 32), Image.Resampling.LANCZOS)
    left, _ = fresh().encode_pictures([small])
    right, _ = fresh().encode_pictures([ImageOps.mirror(small)])
    assert not torch.allclose(left, right)
    seen: dict[bool, list[Tensor]] = {True: [], False: []}
    draw = FreshDraws.draw
    for flip in (True, False):

        def watch(self: FreshDraws, *rest: Any, flip: bool = flip) -> Batch:
            still = [(mean, torch.zeros_like(std)) for mean, std in self.latents]
            batch = draw(replace(self, latents=still), *rest)
            seen[flip].append(batch.x_0)
            return batch

        monkeypatch.setattr(FreshDraws, "draw", watch)
        settings = config(horizontal_flip=flip, train_batch_size=24, weight_sude=0.0)
        run(replace(settings, max_train_steps=1, train="attention"), fresh(), picture)
    mirrored = [(x - right[0]).norm() < (x - left[0]).norm() for x in seen[True][0]]
    assert 4 <= sum(mirrored) <= 20
    for x in [*seen[True][0], *seen[False][0]]:
        assert min((x - right[0]).norm(), (x - left[0]).norm()) < 1e-4
    assert all(torch.allclose(x, left[0], atol=1e-5) for x in seen[False][0])


def test_prior_preservation_adds_a_regulariser(fresh: Fresh, picture: Image.Image) -> None:
    plain = run(config(), fresh(), picture)
    kept = run(config(prior_loss_weight=1.0, num_class_images=2), fresh(), picture)
    assert all(step.loss_regularizer > 0 for step in kept)
    assert torch.equal(kept[0].loss_subject, plain[0].loss_subject)  # the same draws
    assert not same(trained(kept), trained(plain))


def test_warm_up_raises_the_learning_rate(fresh: Fresh, picture: Image.Image) -> None:
    steps = run(config(lr_warmup_steps=4, learning_rate=4e-3, max_train_steps=5), fresh(), picture)
    assert [step.learning_rate for step in steps] == pytest.approx([1e-3, 2e-3, 3e-3, 4e-3, 4e-3])


def test_gradient_checkpointing_changes_no_gradient(fresh: Fresh, picture: Image.Image) -> None:
    plain = gradients(config(), fresh(), picture)
    saved = gradients(config(gradient_checkpointing=True), fresh(), picture)
    for a, b in zip(plain, saved, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"train": "attention", "token_learning_rate": 1e-3},
        {"train": "lora"},
        {"train": "attention", "prior_loss_weight": 1.0, "num_class_images": 2},
    ],
)
def test_accumulated_batches_are_one_batch_so_many_times_as_large(
    settings: dict[str, Any], fresh: Fresh, picture: Image.Image
) -> None:
    chosen = config(max_train_steps=3, train_batch_size=2, **settings)
    parts = run(replace(chosen, gradient_accumulation_steps=2), fresh(), picture)
    whole = run(replace(chosen, train_batch_size=4), fresh(), picture)
    for a, b in zip(parts, whole, strict=True):
        assert torch.equal(a.t, b.t) and a.t.shape == (4,)
        for name in ("loss_subject", "loss_sude", "tau", "rho"):
            torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-3, atol=1e-5)
        assert a.loss_regularizer == pytest.approx(b.loss_regularizer, rel=1e-3)
    # The gradients are the same; Adam's root makes more of their rounding where they are small.
    pairs = zip(
        gradients(replace(chosen, gradient_accumulation_steps=2), fresh(), picture),
        gradients(replace(chosen, train_batch_size=4), fresh(), picture),
        strict=True,
    )
    for a, b in pairs:
        assert (a - b).norm() <= 1e-5 * b.norm()
    once = run(chosen, fresh(), picture)
    start = run(replace(chosen, max_train_steps=1), fresh(), picture)
    # All weights together: a tensor whose gradients are all rounding would move by rounding alone.
    ends = [torch.cat([v.flatten() for v in trained(x).values()]) for x in (parts, whole, once)]
    moved = (ends[0] - torch.cat([v.flatten() for v in trained(start).values()])).norm()
    assert (ends[0] - ends[1]).norm() < 2e-3 * moved
    assert (ends[0] - ends[2]).norm() > 0.1 * moved


# --- eq. 14 with the model before tuning as the teacher ------------------------------------------


@pytest.mark.quick
def test_the_teachers_regulariser_is_eq_14(fresh: Fresh, picture: Image.Image) -> None:
    settings = config(
        train="attention",
        prior_loss_weight=1.0,
        num_class_images=3,
        prior_preservation="teacher",
        max_train_steps=3,
    )
    teacher, pupil = fresh(), fresh()
    resolved = configure(settings, teacher)
    of_dogs = class_latents(resolved, teacher, "dog")
    assert of_dogs.shape == (3, 4, 8, 8)
    with torch.no_grad():
        category = teacher.encode_prompts(["photo of a dog"]).expand(2)
    latents = teacher.encode_pictures([picture.resize((32, 32), Image.Resampling.LANCZOS)])
    losses = []
    for step in tune(settings, fresh(), picture):
        generator = step_generator(5, step.number)
        batch = WithClassImages(FreshDraws([latents], 1000), [of_dogs]).draw(2, generator)
        assert batch.z_0 is not None and batch.noise is not None
        z_t = add_noise(batch.z_0, batch.noise, batch.t, teacher.schedule)
        with torch.no_grad():
            says, said = (b.predict(z_t, batch.t, category) for b in (pupil, teacher))
        expected = (says - said).square().mean().item()
        assert step.loss_regularizer == pytest.approx(expected, rel=1e-4)
        losses.append(step.loss_regularizer)
        weights = {n.removeprefix("unet."): v for n, v in step.method.state_dict().items()}
        assert not pupil.unet.load_state_dict(weights, strict=False).unexpected_keys
    assert losses[0] == 0.0  # nothing has moved yet
    assert losses[1] > 0 and losses[2] > 0


def test_a_teacher_that_agrees_pulls_nowhere_and_one_that_does_not_pulls(
    fresh: Fresh, picture: Image.Image
) -> None:
    plain = config(train="attention", max_train_steps=3)
    taught = replace(
        plain, prior_loss_weight=10.0, num_class_images=2, prior_preservation="teacher"
    )
    states: list[list[dict[str, Tensor]]] = [
        [step.state_dict()["trained"] for step in tune(settings, fresh(), picture)]
        for settings in (plain, taught)
    ]
    assert same(states[0][0], states[1][0])
    assert not same(states[0][2], states[1][2])


# --- several subjects ----------------------------------------------------------------------------

SECOND = ("candle=<wax>=candle.png",)


@pytest.fixture
def two_pictures(picture: Image.Image) -> list[Image.Image]:
    return [picture, Image.new("RGB", (64, 64), "teal")]


def test_every_sample_has_its_own_prompt_picture_and_category(
    fresh: Fresh, two_pictures: list[Image.Image]
) -> None:
    settings = config(
        more_subjects=SECOND,
        train_batch_size=8,
        max_train_steps=1,
        prior="pretrained",
        weighting="simple",
        token_learning_rate=1e-3,
    )
    (step,) = run(settings, fresh(), two_pictures)
    # By hand, one sample at a time, with everything of the one subject, then of the other.
    backbone = fresh()
    generator = step_generator(5, 1)
    which = torch.randint(2, (8,), generator=generator)
    torch.randint(1, (8,), generator=generator)
    z, eps = (torch.randn((8, 4, 8, 8), generator=generator) for _ in range(2))
    t = torch.randint(1000, (8,), generator=generator)
    assert torch.equal(step.t, t)
    assert 2 <= which.sum() <= 6  # both subjects are there
    schedule = backbone.schedule
    with torch.no_grad():
        null = backbone.encode_prompts([""])
        categories = [backbone.encode_prompts([f"photo of a {c}"]) for c in ("dog", "candle")]
        for token, start in (("<sks>", "sks"), ("<wax>", "pll")):
            backbone.add_token(token, start)
        prompts = [
            backbone.encode_prompts([text])
            for text in ("photo of a <sks> dog", "photo of a <wax> candle")
        ]

        def by_hand(k: int, prompt: int, image: int, category: int) -> tuple[float, float, float]:
            small = two_pictures[image].resize((32, 32), Image.Resampling.LANCZOS)
            mean, std = backbone.encode_pictures([small])
            row = slice(k, k + 1)
            x_t = add_noise(mean + std * z[row], eps[row], t[row], schedule)
            subject, of, zero = (
                backbone.predict(x_t, t[row], c).double()
                for c in (prompts[prompt], categories[category], null)
            )
            sude = (subject - of).square().mean() - (subject - zero).square().mean()
            loss = (subject - eps[row]).square().mean()
            return loss.item(), sude.item(), -(of - zero).square().mean().item()

        for k, who in enumerate(which.tolist()):
            seen = (step.loss_subject[k].item(), step.loss_sude[k].item(), step.tau[k].item())
            right, other = by_hand(k, who, who, who), 1 - who
            assert seen == tuple(pytest.approx(value, rel=1e-3, abs=1e-6) for value in right)
            # With the prompt, picture or category of the other one it would be farther off.
            by_picture = by_hand(k, who, other, who)[0]
            by_prompt = by_hand(k, other, who, who)[1]
            by_category = by_hand(k, who, who, other)[2]
            for value, own, wrong in zip(
                seen, right, (by_picture, by_prompt, by_category), strict=True
            ):
                assert abs(value - own) < 0.05 * abs(wrong - own)


def test_a_method_is_told_whose_sample_it_sees(
    fresh: Fresh, two_pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Condition, Tensor]] = []
    predict = DreamBooth.predict

    def watch(self: DreamBooth, x_t: Tensor, t: Tensor, c: Condition, which: Tensor) -> Tensor:
        seen.append((c, which))
        return predict(self, x_t, t, c, which)

    monkeypatch.setattr(DreamBooth, "predict", watch)
    backbone = fresh()
    settings = config(more_subjects=SECOND, train_batch_size=6)
    run(settings, backbone, two_pictures)
    with torch.no_grad():
        own = backbone.encode_prompts(["photo of a <sks> dog", "photo of a <wax> candle"]).hidden
    assert not torch.equal(own[0], own[1])
    assert len(seen) == 2
    for condition, which in seen:
        assert 0 < which.sum() < 6
        assert torch.equal(condition.hidden, own[which])


@pytest.mark.parametrize("method", ["dreambooth", "textual_inversion"])
def test_the_tokens_stay_apart(method: str, fresh: Fresh, two_pictures: list[Image.Image]) -> None:
    settings = config(
        method=method,
        more_subjects=SECOND,
        train_batch_size=1,
        max_train_steps=6,
        token_learning_rate=1e-2,
    )
    backbone, turns = fresh(), []
    before = backbone.text_encoder.get_input_embeddings().weight.detach().clone()
    for step in tune(settings, backbone, two_pictures):
        who = int(torch.randint(2, (1,), generator=step_generator(5, step.number)))
        gradient = step.method.tokens["text_encoder"].vectors.grad
        assert gradient is not None and gradient.shape == (2, before.shape[1])
        assert not gradient[1 - who].any()
        assert gradient[who].norm() > 0
        turns.append(who)
    assert set(turns) == {0, 1}
    ids = [backbone.tokenizer.convert_tokens_to_ids(token) for token in ("<sks>", "<wax>")]
    after = backbone.text_encoder.get_input_embeddings().weight.detach()
    assert ids == [len(before), len(before) + 1]
    starts = ("sks", "pll") if method == "dreambooth" else ("dog", "candle")
    for index, word in zip(ids, starts, strict=True):
        (start,) = backbone.tokenizer(word, add_special_tokens=False).input_ids
        assert not torch.equal(after[index], before[start])
    assert not torch.equal(after[ids[0]], after[ids[1]])
    assert torch.equal(after[: len(before)], before)


def test_class_images_are_those_of_each_samples_own_category() -> None:
    generator = step_generator(0, 1)
    which = torch.tensor([0, 1, 1, 0, 1])
    zeros = torch.zeros(5, 4, 2, 2)
    drawn = SimpleNamespace(
        draw=lambda size, generator: Batch(zeros, zeros, torch.zeros(size, dtype=torch.long), which)
    )
    dogs = torch.arange(3.0).reshape(3, 1, 1, 1).expand(3, 4, 2, 2)
    seen = WithClassImages(drawn, [dogs, dogs + 100]).draw(5, generator)
    assert seen.z_0 is not None and seen.noise is not None
    assert torch.equal(seen.z_0[:, 0, 0, 0] >= 100, which == 1)
    assert torch.equal(seen.which, which) and seen.noise.std() > 0.5


def test_a_run_of_one_draws_as_before_there_were_several(tiny: Backbone) -> None:
    """What step k draws must not change: stored results and checkpoints rest on it."""
    mean, std = torch.full((1, 4, 2, 2), 3.0), torch.full((1, 4, 2, 2), 0.5)
    batch = FreshDraws([(mean, std)], 1000).draw(2, step_generator(7, 3))
    generator = step_generator(7, 3)
    torch.randint(1, (2,), generator=generator)
    x_0 = mean + std * torch.randn((2, 4, 2, 2), generator=generator)
    assert torch.equal(batch.x_0, x_0)
    assert torch.equal(batch.eps, torch.randn((2, 4, 2, 2), generator=generator))
    assert torch.equal(batch.t, torch.randint(1000, (2,), generator=generator))
    assert not batch.which.any()


@pytest.mark.parametrize("number", [1, 3])
def test_every_subject_needs_a_picture(number: int, fresh: Fresh, picture: Image.Image) -> None:
    with pytest.raises(UserError, match=f"2 subjects and {number} pictures"):
        run(config(more_subjects=SECOND), fresh(), [picture] * number)


@pytest.mark.parametrize("text", ["", "candle", "candle=<wax>", "candle=<wax>=", "=<wax>=a.png"])
def test_a_further_subject_that_is_not_told_whole_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="must read category=token=picture"):
        config(more_subjects=(text,))


def test_further_subjects_are_read_checked_and_need_their_own_token(tiny: Backbone) -> None:
    given = config(more_subjects=(" stuffed  animal =<bear>=a=b.png", "cat=<cat-1>=cat.png"))
    seen = configure(given, tiny).subjects
    assert [(s.category, s.token, str(s.image)) for s in seen] == [
        ("dog", "<sks>", "dog.png"),
        ("stuffed animal", "<bear>", "a=b.png"),
        ("cat", "<cat-1>", "cat.png"),
    ]
    with pytest.raises(UserError, match="never met the word 'okapi'"):
        configure(config(more_subjects=("okapi=<o>=o.png",)), tiny)
    with pytest.raises(UserError, match="token of its own"):
        config(more_subjects=("candle=<sks>=candle.png",))


def test_a_tuning_prompt_is_read_to_its_end_or_refused(fresh: Fresh, picture: Image.Image) -> None:
    long = f"photo of a {{S*}} {'running on the ' * 9} dog"
    with pytest.raises(UserError, match="shorten the tuning prompt"):
        next(tune(config(prompt=long), fresh(), picture))


def pictures_as_people_have_them(picture: Image.Image) -> dict[str, Any]:
    grey = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    turned, coloured, hidden = picture.copy(), picture.copy(), picture.convert("RGBA")
    turned.getexif()[0x0112] = 6
    coloured.info["icc_profile"] = ImageCms.ImageCmsProfile(
        ImageCms.createProfile("sRGB")
    ).tobytes()
    hidden.putalpha(Image.linear_gradient("L").resize((64, 64)))
    oblong = picture.resize((96, 64))
    return {
        "16 bit": Image.fromarray(grey),
        "numpy, 16 bit": grey,
        "numpy": np.asarray(picture),
        "hidden": hidden,
        "turned": turned,
        "coloured": coloured,
        "oblong": oblong,
    }


@pytest.mark.parametrize("name", list(pictures_as_people_have_them(Image.new("RGB", (64, 64)))))
def test_every_door_takes_care_of_a_picture_or_refuses_it(
    name: str, fresh: Fresh, picture: Image.Image
) -> None:
    given = pictures_as_people_have_them(picture)[name]
    cared = load_picture(given, resolution=32).image
    assert trained(run(config(), fresh(), given)).keys()  # `prepared_tuning` takes care
    assert same(trained(run(config(), fresh(), given)), trained(run(config(), fresh(), cared)))
    assert len(list(tuning.Tuning(config(), fresh(), cared))) == config().max_train_steps
    for refuse in (
        lambda: tuning.Tuning(config(), fresh(), given),
        lambda: ImplicitClassifier(fresh(), ["a dog", "a cat"], num_pairs=2).classify([given]),
    ):
        if name == "oblong" and refuse.__code__.co_names[0] != "tuning":
            continue  # a classifier may be asked of any shape
        with pytest.raises(UserError, match="load_picture of"):
            refuse()


# --- precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_computes_and_the_weights_stay_in_float32(
    dtype: str, fresh: Fresh, picture: Image.Image, tiny_folder: Path
) -> None:
    settings = config(train="attention", train_batch_size=4, token_learning_rate=1e-3)
    half = open_backbone(tiny_folder, device="cpu", dtype=dtype)
    steps, full = run(settings, half, picture), run(settings, fresh(), picture)
    for name, value in trained(steps).items():
        assert value.dtype == torch.float32
        assert torch.isfinite(value).all(), name
    for a, b in zip(steps, full, strict=True):
        assert torch.equal(a.t, b.t)
        torch.testing.assert_close(a.loss_subject, b.loss_subject, rtol=0.03, atol=0)
        assert not torch.equal(a.loss_subject, b.loss_subject)
        assert a.loss_sude.dtype == torch.float32
    # The step goes where the full one goes.
    start = run(replace(settings, learning_rate=1e-12, token_learning_rate=1e-12), fresh(), picture)
    for name, value in trained(steps).items():
        a, b = value - trained(start)[name], trained(full)[name] - trained(start)[name]
        assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.8, name
    assert bool(steps[-1].state_dict()["scaler"]) == (dtype == "float16")


def test_a_step_whose_gradient_overflows_in_float16_is_left_out(
    picture: Image.Image, tiny_folder: Path
) -> None:
    def half() -> Backbone:
        return open_backbone(tiny_folder, device="cpu", dtype="float16")

    settings = config(max_train_steps=3)
    state = next(tune(settings, half(), picture)).state_dict()
    # A scale at which float32 itself overflows.
    state["scaler"]["scale"] = 2.0**127
    for step in tune(settings, half(), picture, state=state):
        assert torch.isfinite(step.loss_subject).all()
        now = step.state_dict()
        assert same(now["trained"], state["trained"])
        assert now["scaler"]["scale"] == 2.0 ** (128 - step.number)  # halved at every attempt
    assert step.number == 3


def test_a_run_in_float16_continues_with_the_same_bits(
    picture: Image.Image, tiny_folder: Path
) -> None:
    def half() -> Backbone:
        return open_backbone(tiny_folder, device="cpu", dtype="float16")

    states = [step.state_dict() for step in tune(config(max_train_steps=3), half(), picture)]
    *_, last = tune(config(max_train_steps=3), half(), picture, state=states[0])
    assert same(last.state_dict()["trained"], states[-1]["trained"])
    assert last.state_dict()["scaler"] == states[-1]["scaler"]


# --- optimisers ----------------------------------------------------------------------------------


def test_8_bit_adamw_without_its_package_is_an_error(
    fresh: Fresh, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="pip install bitsandbytes") as error:
        run(config(optimizer="adamw8bit"), fresh(), picture)
    assert "--optimizer adamw8bit" in str(error.value) and "\n" not in str(error.value)


def test_8_bit_adamw_is_taken_where_it_is_installed(
    fresh: Fresh, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[dict[str, Any]] = []

    class AdamW8bit(torch.optim.AdamW):
        def __init__(self, groups: Any, **settings: Any) -> None:
            made.append(settings)
            super().__init__(groups, **settings)

    package, module = ModuleType("bitsandbytes"), ModuleType("bitsandbytes.optim")
    module.AdamW8bit = AdamW8bit  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
    settings = config(adam_weight_decay=0.03)
    eight = run(replace(settings, optimizer="adamw8bit"), fresh(), picture)
    assert made == [{"weight_decay": 0.03}]
    as_torch = replace(settings, optimizer="adamw")
    assert same(trained(eight), trained(run(as_torch, fresh(), picture)))


def test_fused_adamw_takes_the_same_steps(fresh: Fresh, picture: Image.Image) -> None:
    settings = config(max_train_steps=3, optimizer="adamw")
    fused = config(max_train_steps=3)
    start = {f"unet.{name}": p for name, p in fresh().unet.named_parameters()}
    expected = trained(run(settings, fresh(), picture))
    states = [step.state_dict() for step in tune(fused, fresh(), picture)]
    apart = moved = 0.0
    for name, value in states[-1]["trained"].items():
        apart += (value - expected[name]).square().sum().item()
        moved += (expected[name] - start[name]).square().sum().item()
    assert 0 < apart < 1e-6 * moved  # rounding alone, but it is another way through the weights
    *_, last = tune(fused, fresh(), picture, state=states[0])
    assert same(last.state_dict()["trained"], states[-1]["trained"])


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_a_number_stops_the_run(
    value: float, fresh: Fresh, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = tuning.total_loss
    monkeypatch.setattr(
        tuning, "total_loss", lambda *a: total(*a) * (value if len(seen) == 1 else 1.0)
    )
    seen: list[Step] = []
    backbone = fresh()
    t = ", ".join(map(str, drawn(fresh(), picture, 2).t.tolist()))
    with pytest.raises(
        UserError, match=rf"became -?{value} at step 2 \(t = {t}\): lower --learning-rate"
    ) as error:
        for step in tune(config(max_train_steps=3), backbone, picture):
            seen.append(step)
    assert len(seen) == 1
    assert "\n" not in str(error.value)


def test_the_error_names_the_t_of_the_sample_that_went_wrong(
    fresh: Fresh, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = tuning.total_loss
    spoilt = torch.tensor([1.0, math.nan])
    monkeypatch.setattr(tuning, "total_loss", lambda *a: total(*a) * spoilt)
    t = drawn(fresh(), picture, 1).t.tolist()
    assert t[0] != t[1]
    with pytest.raises(UserError, match=rf"loss became nan at step 1 \(t = {t[1]}\)"):
        run(config(), fresh(), picture)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_gradient_that_is_not_a_number_leaves_the_last_good_weights(
    accumulate: int, fresh: Fresh, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss itself is fine: the root of zero has a value, and no gradient."""
    total = tuning.total_loss
    seen: list[Step] = []

    def spoil(*args: Any) -> Tensor:
        loss = total(*args)
        return loss + (loss * 0).sqrt() if len(seen) == 2 else loss

    monkeypatch.setattr(tuning, "total_loss", spoil)
    settings = config(max_train_steps=4, gradient_accumulation_steps=accumulate)
    good: dict[str, Tensor] = {}
    with pytest.raises(UserError, match=r"gradient became nan at step 3 \(t = \d+, \d+") as error:
        for step in tune(settings, fresh(), picture):
            seen.append(step)
            good = step.state_dict()["trained"]
    assert len(seen) == 2 and "lower --learning-rate" in str(error.value)
    assert same(seen[-1].method.state_dict(), good)


def test_no_memory_left_names_the_switches_that_help(
    fresh: Fresh, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr(tuning, "total_loss", full)
    with pytest.raises(UserError, match="ran out of memory") as error:
        run(config(), fresh(), picture)
    text = str(error.value)
    assert "\n" not in text
    names = {f"--{f.name.replace('_', '-')}" for f in fields(TuningConfig)}
    flags = {word.strip(",.") for word in text.split() if word.startswith("--")}
    assert len(flags) >= 5 and flags <= names


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "textual_inversion", "token_learning_rate": 0.0},
        {"learning_rate": 0.0},
    ],
)
def test_nothing_to_train_is_an_error(
    settings: dict[str, Any], fresh: Fresh, picture: Image.Image
) -> None:
    with pytest.raises(UserError, match="Nothing would be trained"):
        run(config(**settings), fresh(), picture)


def test_a_size_the_autoencoder_cannot_take_is_an_error(fresh: Fresh, picture: Image.Image) -> None:
    with pytest.raises(UserError, match="--resolution 30 must be a multiple of 4"):
        run(config(resolution=30), fresh(), picture)


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"max_train_steps": 0}, "--max-train-steps is 0"),
        ({"train_batch_size": 0}, "--train-batch-size is 0"),
        ({"weight_sude": -0.1}, "--weight-sude is -0.1"),
        ({"weight_sude": math.nan}, "--weight-sude is nan"),
        ({"weight_sude": math.inf}, "--weight-sude is inf"),
        ({"prior_loss_weight": math.nan}, "--prior-loss-weight is nan"),
        ({"learning_rate": -1e-3}, "--learning-rate is -0.001"),
        ({"learning_rate": math.inf}, "--learning-rate is inf"),
        ({"token_learning_rate": math.nan}, "--token-learning-rate is nan"),
        ({"lora_rank": 0}, "--lora-rank is 0"),
        ({"seed": -1}, "--seed is -1"),
        ({"resolution": 0}, "--resolution is 0"),
        ({"max_grad_norm": math.nan}, "--max-grad-norm is nan"),
        ({"prompt": "photo of a dog"}, "must contain {S*}"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], flag: str) -> None:
    with pytest.raises(UserError) as error:
        config(**settings)
    assert flag in str(error.value) and str(error.value).endswith(".")


# --- settings ------------------------------------------------------------------------------------


def test_settings_resolve_from_the_given_then_the_folder_then_the_method_then_all(
    tiny: Backbone,
) -> None:
    tiny.facts = copy.deepcopy(tiny.facts)
    tiny.facts["tuning"]["dreambooth"] = {"learning_rate": 2e-4, "weighting": "simple"}
    seen = configure(TuningConfig(image=Path("x.png"), category=" dog ", weight_sude=0.25), tiny)
    assert seen.weight_sude == 0.25  # given
    assert seen.learning_rate == 2e-4  # the folder's, where the method says 5e-6
    assert seen.weighting == "simple"  # the folder's, where all say otherwise
    assert seen.max_train_steps == METHODS["dreambooth"].defaults["max_train_steps"]
    assert seen.prior == "pretrained"  # all's
    assert seen.category == "dog"
    missing = [f.name for f in fields(seen) if getattr(seen, f.name) is None]
    assert missing == ["regularizer_file", "initializer", "prompt", "class_images", "resolution"]
    assert side_of(seen, tiny) == 32  # the model's own
    assert configure(seen, tiny) == seen


def test_every_setting_given_survives_resolving(tiny: Backbone) -> None:
    given = config(
        weight_sude=0.0, learning_rate=0.0, token_learning_rate=0.0, prior_loss_weight=0.0
    )
    seen = configure(given, tiny)
    assert (seen.weight_sude, seen.learning_rate, seen.token_learning_rate) == (0.0, 0.0, 0.0)


def test_tune_resolves_what_is_left_open(fresh: Fresh, picture: Image.Image) -> None:
    partly = config(max_train_steps=1, train_batch_size=1)
    backbone = fresh()
    assert same(
        trained(run(partly, fresh(), picture)),
        trained(run(configure(partly, backbone), backbone, picture)),
    )


def test_presets_fill_what_is_not_given(tiny: Backbone) -> None:
    paper = configure(config(), tiny, preset="paper")
    assert (paper.prior, paper.weighting) == ("pretrained", "simple")  # eq. 11-12
    given = config(weighting="simple", max_train_steps=7)
    reference = configure(given, tiny, preset="reference")
    assert reference.weighting == "simple" and reference.max_train_steps == 7
    for name, value in PRESETS["reference"].items():
        if name not in ("weighting", "max_train_steps"):
            assert getattr(reference, name) == value, name
    assert configure(config(), tiny, preset="default") == configure(config(), tiny)
    with pytest.raises(UserError, match="default, paper or reference"):
        configure(config(), tiny, preset="best")


# --- the same again ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_gives_the_same_bits_and_another_gives_others(
    method: str, fresh: Fresh, picture: Image.Image
) -> None:
    torch.manual_seed(1)
    first = run(config(method=method), fresh(), picture)
    torch.manual_seed(2)
    again = run(config(method=method), fresh(), picture)
    other = run(config(method=method, seed=6), fresh(), picture)
    assert same(trained(first), trained(again))
    for a, b in zip(first, again, strict=True):
        assert a.row() == b.row()
    assert not same(trained(first), trained(other))
    assert not torch.equal(first[0].t, first[1].t)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "textual_inversion"},
        {"train": "lora"},
        {"prior_loss_weight": 1.0, "num_class_images": 1},
    ],
)
def test_tuning_leaves_the_global_generator_alone(
    settings: dict[str, Any], fresh: Fresh, picture: Image.Image
) -> None:
    before = torch.get_rng_state()
    run(config(**settings), fresh(), picture)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.quick
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "textual_inversion"},
        {"train": "lora", "token_learning_rate": 1e-3, "lr_warmup_steps": 3},
        {"train_text_encoder": True, "prior": "current"},
        {"gradient_accumulation_steps": 3},
        {
            "more_subjects": SECOND,
            "token_learning_rate": 1e-2,
            "gradient_accumulation_steps": 2,
            "prior_loss_weight": 0.5,
            "prior_preservation": "teacher",
            "num_class_images": 2,
        },
    ],
)
def test_a_run_continued_from_a_state_ends_with_the_same_bits(
    settings: dict[str, Any], fresh: Fresh, two_pictures: list[Image.Image]
) -> None:
    chosen = config(**{"max_train_steps": 4} | settings)
    picture = two_pictures[: len(chosen.subjects)]
    states, rows = [], []
    for step in tune(chosen, fresh(), picture):
        states.append(step.state_dict())  # kept while the run goes on: it must not change
        rows.append(step.row())
    for _ in range(2):  # twice: continuing must not change the state either
        numbers = []
        for step, row in zip(
            tune(chosen, fresh(), picture, state=states[1]), rows[2:], strict=True
        ):
            numbers.append(step.number)
            assert step.row() == row
            assert same(step.state_dict()["trained"], states[step.number - 1]["trained"])
        assert numbers == [3, 4]
