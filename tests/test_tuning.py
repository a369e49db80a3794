"""What a step computes, what settings resolve to, and that a run depends on its seed alone."""

import copy
import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sude_lab import tuning
from sude_lab.backbone import Backbone
from sude_lab.diffusion import add_noise, posterior_variance, reverse_mean
from sude_lab.errors import UserError
from sude_lab.losses import sude_loss, sude_threshold
from sude_lab.methods import METHODS
from sude_lab.tuning import PRESETS, Step, TuningConfig, resolve, step_generator, tune, with_preset

Fresh = Callable[[], Backbone]
TENSORS = ("t", "loss_subject", "loss_sude", "tau", "gate", "rho")


@pytest.fixture
def picture(subject_picture: Path) -> Image.Image:
    return Image.open(subject_picture).convert("RGB")


def config(**settings: Any) -> TuningConfig:
    chosen = {"image": Path("dog.png"), "category": "dog", "max_train_steps": 2, "seed": 5}
    return TuningConfig(**chosen | settings)


def run(settings: TuningConfig, backbone: Backbone, picture: Image.Image) -> list[Step]:
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
    steps = run(config(method=method, train_batch_size=3), fresh(), picture)
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
        assert set(row) > {"step", "t", "loss_subject", "tau", "rho", "learning_rate"}


def test_rho_says_where_the_gate_shuts(fresh: Fresh, picture: Image.Image) -> None:
    (step,) = run(config(train_batch_size=16, max_train_steps=1), fresh(), picture)
    assert torch.equal(step.gate, step.rho < 1)


def test_without_sude_its_numbers_are_nan_and_watching_it_changes_no_weight(
    fresh: Fresh, picture: Image.Image
) -> None:
    plain = run(config(weight_sude=0.0), fresh(), picture)
    watched = run(config(weight_sude=0.0, monitor_sude=True), fresh(), picture)
    for step in plain:
        assert step.loss_sude.shape == step.tau.shape == step.rho.shape == (2,)
        assert all(torch.isnan(v).all() for v in (step.loss_sude, step.tau, step.rho))
        assert not step.gate.any()
    assert all(torch.isfinite(step.loss_sude).all() for step in watched)
    assert same(trained(plain), trained(watched))


def by_hand(
    settings: TuningConfig, fresh: Fresh, picture: Image.Image
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """t, L_sub, L_sude and tau of step 1, in float64 and in the space of the means."""
    backbone = fresh()
    settings = resolve(settings, backbone)
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
        null, category = backbone.encode_prompts(["", "photo of a dog"])
        backbone.add_token(settings.token, settings.initializer or settings.category)
        text = "photo of a <sks> dog" if settings.method == "dreambooth" else "photo of a <sks>"
        subject = backbone.encode_prompts([text])[0]
        x_t = add_noise(x_0, eps, t, schedule)
        eps_of = [
            backbone.predict(x_t, t, c.expand(size, -1, -1)).double()
            for c in (subject, category, null)
        ]
    subject_mean, class_mean, null_mean = (
        reverse_mean(e, x_t.double(), t, schedule) for e in eps_of
    )
    variance = posterior_variance(t, schedule)
    loss = sude_loss(subject_mean, class_mean, null_mean, variance) / x_0[0].numel()
    tau = sude_threshold(class_mean, null_mean, variance) / x_0[0].numel()
    return t, (eps_of[0] - eps).square().mean((1, 2, 3)), loss, tau


@pytest.mark.parametrize("method", METHODS)
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


def gradients(settings: TuningConfig, backbone: Backbone, picture: Image.Image) -> list[Tensor]:
    """The unclipped gradients of the first step."""
    settings = replace(settings, max_train_steps=1, max_grad_norm=0.0)
    (step,) = run(settings, backbone, picture)
    return [p.grad.clone() for p in step.method.parameters.values() if p.grad is not None]


def test_the_gradient_of_a_batch_is_the_mean_of_its_samples(
    fresh: Fresh, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = tuning._draw
    settings = config(train_batch_size=2, truncate=True)
    whole = gradients(settings, fresh(), picture)
    parts = []
    for k in range(2):

        def one(*args: Any, k: int = k) -> tuple[Tensor, ...]:
            mean, std, _, timesteps, generator = args
            return tuple(v[k : k + 1] for v in draw(mean, std, 2, timesteps, generator))

        monkeypatch.setattr(tuning, "_draw", one)
        parts.append(gradients(replace(settings, train_batch_size=1), fresh(), picture))
    for both, first, second in zip(whole, *parts, strict=True):
        torch.testing.assert_close(both, (first + second) / 2, rtol=1e-3, atol=1e-6)


def test_truncation_takes_the_gradient_of_samples_whose_gate_is_shut(
    fresh: Fresh, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = gradients(config(weight_sude=0.0), fresh(), picture)
    full = gradients(config(truncate=False), fresh(), picture)
    assert any(not torch.equal(a, b) for a, b in zip(plain, full, strict=True))
    for shut in (True, False):  # force every gate one way through the threshold
        bound = math.inf if shut else -math.inf
        monkeypatch.setattr(
            tuning, "sude_threshold", lambda c, n, v, bound=bound: torch.full_like(v, bound)
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
        prior: run(config(method=method, prior=prior, max_train_steps=3), fresh(), picture)
        for prior in ("current", "pretrained")
    }
    assert same(trained(steps["current"]), trained(steps["pretrained"])) == equal
    first = [steps[prior][0].tau for prior in ("current", "pretrained")]
    torch.testing.assert_close(first[0], first[1])  # nothing has changed yet
    last = [steps[prior][-1].tau for prior in ("current", "pretrained")]
    assert torch.equal(last[0], last[1]) == equal


def test_a_trained_text_encoder_moves_the_category_of_the_current_prior_alone(
    fresh: Fresh, picture: Image.Image
) -> None:
    """The old model's opinion rests on its own reading of the category's prompt."""
    settings = config(train_text_encoder=True, prior="pretrained", max_train_steps=3)
    changed = run(settings, fresh(), picture)
    backbone, expected = fresh(), []
    null, category = backbone.encode_prompts(["", "photo of a dog"])
    for step in changed:
        generator = step_generator(5, step.number)
        mean, std = backbone.encode_pictures([picture.resize((32, 32), Image.Resampling.LANCZOS)])
        x_0, eps, t = tuning._draw(mean, std, 2, 1000, generator)
        x_t = add_noise(x_0, eps, t, backbone.schedule)
        of = [backbone.predict(x_t, t, c.expand(2, -1, -1)) for c in (category, null)]
        expected.append(
            -(of[0] - of[1]).square().mean((1, 2, 3)).double()
            * tuning.sude_weight(t, backbone.schedule, "reference")
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
    draw = tuning._draw
    for flip in (True, False):

        def watch(mean: Tensor, std: Tensor, *rest: Any, flip: bool = flip) -> Any:
            x_0, eps, t = draw(mean, torch.zeros_like(std), *rest)
            seen[flip].append(x_0)
            return x_0, eps, t

        monkeypatch.setattr(tuning, "_draw", watch)
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
    with pytest.raises(UserError, match=r"step 2: lower --learning-rate") as error:
        for step in tune(config(max_train_steps=3), backbone, picture):
            seen.append(step)
    assert len(seen) == 1
    assert "\n" not in str(error.value)


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
    seen = resolve(TuningConfig(image=Path("x.png"), category=" dog ", weight_sude=0.25), tiny)
    assert seen.weight_sude == 0.25  # given
    assert seen.learning_rate == 2e-4  # the folder's, where the method says 5e-6
    assert seen.weighting == "simple"  # the folder's, where all say otherwise
    assert seen.max_train_steps == METHODS["dreambooth"].defaults["max_train_steps"]
    assert seen.prior == tuning.GENERAL_DEFAULTS["prior"]
    assert seen.resolution == 32  # the model's own
    assert seen.category == "dog"
    missing = [f.name for f in fields(seen) if getattr(seen, f.name) is None]
    assert missing == ["prompt"]
    assert resolve(seen, tiny) == seen


def test_every_setting_given_survives_resolving(tiny: Backbone) -> None:
    given = config(
        weight_sude=0.0, learning_rate=0.0, token_learning_rate=0.0, prior_loss_weight=0.0
    )
    seen = resolve(given, tiny)
    assert (seen.weight_sude, seen.learning_rate, seen.token_learning_rate) == (0.0, 0.0, 0.0)


def test_tune_resolves_what_is_left_open(fresh: Fresh, picture: Image.Image) -> None:
    partly = config(max_train_steps=1, train_batch_size=1)
    backbone = fresh()
    assert same(
        trained(run(partly, fresh(), picture)),
        trained(run(resolve(partly, backbone), backbone, picture)),
    )


def test_presets_fill_what_is_not_given(tiny: Backbone) -> None:
    paper = resolve(with_preset(config(), "paper"), tiny)
    assert (paper.prior, paper.weighting) == ("pretrained", "exact")
    given = with_preset(config(weighting="simple", max_train_steps=7), "reference")
    reference = resolve(given, tiny)
    assert reference.weighting == "simple" and reference.max_train_steps == 7
    for name, value in PRESETS["reference"].items():
        if name not in ("weighting", "max_train_steps"):
            assert getattr(reference, name) == value, name
    assert with_preset(config(), "default") == config()
    with pytest.raises(UserError, match="default, paper or reference"):
        with_preset(config(), "best")


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


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "textual_inversion"},
        {"train": "lora", "token_learning_rate": 1e-3, "lr_warmup_steps": 3},
        {"train_text_encoder": True, "prior": "current"},
    ],
)
def test_a_run_continued_from_a_state_ends_with_the_same_bits(
    settings: dict[str, Any], fresh: Fresh, picture: Image.Image
) -> None:
    chosen = config(**{"max_train_steps": 4} | settings)
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
