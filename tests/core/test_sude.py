"""SuDe as a plug: in another loop it gives the gradients of `tune()`; the old UNet answers on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from peft import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from PIL import Image
from torch import Tensor, nn

from studies.embedded.dataset import vocabulary
from sude_lab.backbone import Backbone, Condition
from sude_lab.config import TuningConfig
from sude_lab.diffusion import (
    PREDICTION_TYPES,
    VARIANCE_TYPES,
    Schedule,
    posterior_variance,
    reverse_mean,
)
from sude_lab.draws import FreshDraws
from sude_lab.errors import UserError
from sude_lab.frozen import FrozenUNet, without_adapters
from sude_lab.losses import guidance_projection, sude_loss, sude_threshold
from sude_lab.methods import configure
from sude_lab.runs.prepare import prepared_tuning as tune
from sude_lab.sude import SudeRegularizer, sude_terms
from sude_lab.tuning import Tuning

pytestmark = pytest.mark.quick

Fresh = Callable[[], Backbone]
LORA = LoraConfig(r=8, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"])


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def train_part(unet: Any, train: str) -> dict[str, nn.Parameter]:
    """Open a part of the UNet as users' scripts do; return what is trained."""
    unet.requires_grad_(False)
    if train == "lora":
        unet.add_adapter(LORA)
    for name, p in unet.named_parameters():
        chosen = {"unet": True, "attention": ".attn" in name, "lora": ".lora_" in name}
        p.requires_grad_(chosen[train])
    return {name: p for name, p in unet.named_parameters() if p.requires_grad}


# --- in a loop of one's own ----------------------------------------------------------------------


@pytest.fixture
def picture(subject_picture: Path) -> Image.Image:
    return Image.open(subject_picture).convert("RGB")


@pytest.fixture
def predicting(fresh: Fresh) -> Callable[[str], Backbone]:
    """A fresh backbone with the scheduler of a user's loop, and an opinion of its prompts.

    As it is made, the tiny model hardly listens to words: SuDe would drown in rounding.
    """

    def make(prediction_type: str) -> Backbone:
        backbone = fresh()
        with torch.no_grad():
            for name, p in backbone.unet.named_parameters():
                if name.endswith("attn2.to_out.0.weight"):
                    p.mul_(30)
        backbone.pipeline.scheduler = DDPMScheduler.from_config(
            backbone.pipeline.scheduler.config, prediction_type=prediction_type
        )
        return backbone

    return make


@pytest.mark.parametrize("train", ["unet", "attention", "lora"])
@pytest.mark.parametrize("prior", ["pretrained", "current"])
@pytest.mark.parametrize(
    ("prediction_type", "truncate"),
    [("epsilon", False), ("v_prediction", False), ("epsilon", True)],
)
def test_a_loop_of_ones_own_has_the_gradients_of_tune(
    train: Any,
    prior: Any,
    prediction_type: str,
    truncate: bool,
    predicting: Callable[[str], Backbone],
    picture: Image.Image,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draws: list[Any] = []
    draw = FreshDraws.draw
    monkeypatch.setattr(FreshDraws, "draw", lambda *a: draws.append(draw(*a)) or draws[-1])
    weight_sude = 0.7
    settings = TuningConfig(
        image=Path("dog.png"),
        category="dog",
        train=train,
        prior=prior,
        weight_sude=weight_sude,
        truncate=truncate,
        prompt="photo of a {S*}",
        learning_rate=2e-6 if truncate else 1e-3,
        train_batch_size=16 if truncate else 4,
        max_train_steps=2,
        max_grad_norm=0.0,
    )
    # Near the category's own direction: some samples are before it, some beyond. The model's random
    # weights hang on the versions of what draws them, and which word does it hangs on those.
    for initializer in (f"dog dog {word}" for word in ("cat", *vocabulary())):
        weights, gradients = [], []
        draws.clear()
        here = replace(settings, initializer=initializer)
        for step in tune(here, predicting(prediction_type), picture):
            weights.append(step.state_dict()["trained"])
            assert all(p.grad is not None for p in step.method.parameters.values())
            gradients.append({n: p.grad.clone() for n, p in step.method.parameters.items()})  # type: ignore[union-attr]
        if not truncate or 0 < step.gate.sum() < 16:
            break
    else:
        pytest.fail("no gate is shut, or none is open")
    # Step 2: what is tuned has moved, so that the two priors differ, and LoRA's A has a gradient.
    moved, expected, drawn = weights[0], gradients[1], draws[1]

    user = predicting(prediction_type)
    user.add_token("<sks>", initializer)
    unet, noise_scheduler = user.unet, user.pipeline.scheduler
    trained = train_part(unet, train)
    embed = lambda text: user.text_encoder(user.tokenize([text]))[0]  # noqa: E731
    # The first of the added lines: before training begins.
    sude = SudeRegularizer(
        unet,
        noise_scheduler,
        embed("photo of a dog"),
        embed(""),
        prior=prior,
        truncated=truncate,
    )
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(moved[f"unet.{name}"])

    def loop_step(weight: float) -> dict[str, Tensor]:
        """One step of a training script, as those of diffusers are written."""
        latents, noise, timesteps = drawn.x_0, drawn.eps, drawn.t
        noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
        encoder_hidden_states = embed("photo of a <sks>").expand(len(latents), -1, -1)
        model_pred = unet(noisy_latents, timesteps, encoder_hidden_states).sample
        if noise_scheduler.config.prediction_type == "epsilon":
            target = noise
        else:
            target = noise_scheduler.get_velocity(latents, noise, timesteps)
        loss = F.mse_loss(model_pred.float(), target.float(), reduction="mean")
        loss = loss + weight * sude(noisy_latents, timesteps, model_pred).mean()
        unet.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in trained.items()}  # type: ignore[union-attr]

    seen, without = loop_step(weight_sude), loop_step(0.0)
    assert {f"unet.{name}" for name in seen} == set(expected)
    largest = max(g.abs().max().item() for g in expected.values())
    for name, gradient in seen.items():
        # The scheduler rounds x_t and v in float32, we in float64; no more than that.
        error = (gradient - expected[f"unet.{name}"]).norm().item()
        assert error < 1e-4 * gradient.norm().item() + 1e-6 * largest, name
    assert max((seen[n] - without[n]).abs().max().item() for n in seen) > 1e-2 * largest


def test_the_two_priors_differ_once_the_model_has_moved(tiny: Backbone) -> None:
    trained = train_part(tiny.unet, "attention")
    dog, null = (tiny.encode_prompts([text]) for text in ("photo of a dog", ""))
    both = [
        SudeRegularizer(tiny.unet, tiny.schedule, dog, null, prior=prior)
        for prior in ("pretrained", "current")
    ]
    x, t, output = (
        normal(3, 4, 8, 8, seed=0),
        torch.tensor([10, 400, 900]),
        normal(3, 4, 8, 8, seed=1),
    )
    before = [sude(x, t, output) for sude in both]
    assert torch.equal(*before)
    with torch.no_grad():
        for p in trained.values():
            p.add_(0.1)
    after = [sude(x, t, output) for sude in both]
    assert torch.equal(after[0], before[0]) and not torch.allclose(after[1], before[1])


def test_the_category_and_the_null_prompt_are_asked_in_one_call_without_gradients() -> None:
    """SDXL's further conditions are repeated for every sample, in the order of the rows."""
    asked: list[dict[str, Any]] = []

    def unet(x: Tensor, t: Tensor, **told: Any) -> Any:
        asked.append({"x": x, "t": t, "grad": torch.is_grad_enabled(), **told})
        return SimpleNamespace(sample=told["encoder_hidden_states"].mean((1, 2))[:, None] * x)

    null, dog = (
        Condition(torch.full((1, 3, 2), v), torch.full((1, 5), v), torch.full((1, 6), v))
        for v in (0.0, 1.0)
    )
    schedule = Schedule(torch.linspace(0.99, 0.01, 100))
    sude = SudeRegularizer(unet, schedule, dog, null, prior="current", weighting="simple")
    x, t = normal(2, 7, seed=0), torch.tensor([3, 60])
    output = normal(2, 7, seed=1).requires_grad_()
    loss = sude(x, t, output)
    (told,) = asked
    assert not told["grad"] and torch.equal(told["x"], torch.cat([x, x]))
    assert torch.equal(told["t"], torch.tensor([3, 60, 3, 60]))
    rows = torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert torch.equal(told["encoder_hidden_states"], rows[:, None, None].expand(4, 3, 2))
    added = told["added_cond_kwargs"]
    assert torch.equal(added["text_embeds"], rows[:, None].expand(4, 5))
    assert torch.equal(added["time_ids"], rows[:, None].expand(4, 6))
    # The model says x of a dog and 0 of nothing: eq. 7 and 9 by hand.
    by_hand = (output - x).square().mean(1) - output.square().mean(1)
    by_hand = by_hand * (by_hand > -x.square().mean(1))
    torch.testing.assert_close(loss, by_hand)
    (gradient,) = torch.autograd.grad(loss.sum(), output)
    assert gradient.abs().sum() > 0


class Wrapped(nn.Module):
    """As a model is wrapped for several processes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


@pytest.mark.parametrize("prior", ["pretrained", "current"])
@pytest.mark.parametrize("wrap", [Wrapped, lambda unet: get_peft_model(unet, LORA)])
def test_a_wrapped_unet_serves_as_well(prior: Any, wrap: Callable[..., Any], fresh: Fresh) -> None:
    backbone, other = fresh(), fresh()
    train_part(backbone.unet, "attention")
    dog, null = (other.encode_prompts([text]).hidden for text in ("photo of a dog", ""))
    plain = SudeRegularizer(other.unet, other.schedule, dog, null, prior="current")
    wrapped = SudeRegularizer(wrap(backbone.unet), backbone.schedule, dog, null, prior=prior)
    x, t, output = normal(2, 4, 8, 8, seed=0), torch.tensor([30, 700]), normal(2, 4, 8, 8, seed=1)
    torch.testing.assert_close(wrapped(x, t, output), plain(x, t, output))


def test_a_prior_that_is_not_there_is_refused(tiny: Backbone) -> None:
    dog = tiny.encode_prompts(["photo of a dog"])
    with pytest.raises(ValueError, match="'frozen'"):
        SudeRegularizer(tiny.unet, tiny.schedule, dog, dog, prior="frozen")  # type: ignore[arg-type]


# --- the terms -----------------------------------------------------------------------------------


def schedule_of(prediction_type: str, variance_type: str) -> Schedule:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    return Schedule((1 - betas).cumprod(0), prediction_type, variance_type)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_the_terms_are_eq_7_to_9_of_the_means(prediction_type: str, variance_type: str) -> None:
    schedule = schedule_of(prediction_type, variance_type)
    t = torch.tensor([1, 7, 100, 500, 900, 999])
    x_t, category, null = (normal(6, 4, 3, 3, seed=k, dtype=torch.float64) for k in range(3))
    # Subjects before, at and beyond their category, and far to the side of it.
    reach = torch.tensor([-0.5, 0.2, 0.9, 1.1, 3.0, 0.5], dtype=torch.float64)
    subject = null + reach[:, None, None, None] * (category - null)
    subject = (subject + 0.1 * normal(6, 4, 3, 3, seed=9, dtype=torch.float64)).requires_grad_()
    terms = sude_terms(subject, category, null, x_t, t, schedule, weighting="exact")

    means = [reverse_mean(output, x_t, t, schedule) for output in (subject, category, null)]
    variance = posterior_variance(t, schedule)
    loss = sude_loss(*means, variance) / 36
    threshold = sude_threshold(*means[1:], variance) / 36
    torch.testing.assert_close(terms.loss, loss, rtol=1e-7, atol=0)
    torch.testing.assert_close(terms.threshold, threshold, rtol=1e-7, atol=0)
    torch.testing.assert_close(terms.rho, guidance_projection(*means), rtol=1e-7, atol=1e-10)
    assert terms.gate.tolist() == [True, True, True, False, False, True]
    assert torch.equal(terms.gate, loss > threshold)
    assert torch.equal(terms.gated, torch.where(terms.gate, terms.loss, 0.0))
    assert {x.dtype for x in (terms.loss, terms.threshold, terms.gated)} == {torch.float64}
    # The gradient too, of every sample, and none behind a shut gate.
    (seen,) = torch.autograd.grad(terms.gated.sum(), subject, retain_graph=True)
    (expected,) = torch.autograd.grad((loss * terms.gate).sum(), subject)
    torch.testing.assert_close(seen, expected, rtol=1e-7, atol=1e-12)
    assert not seen[3:5].any() and all(seen[k].any() for k in (0, 1, 2, 5))


@pytest.mark.parametrize("weighting", ["simple", "reference"])
def test_other_weightings_replace_the_factor_over_t_alone(weighting: str) -> None:
    schedule = schedule_of("epsilon", "fixed_small")
    t = torch.tensor([0, 1, 500, 999])
    x_t, subject, category, null = (normal(4, 5, seed=k, dtype=torch.float64) for k in range(4))
    terms = sude_terms(subject, category, null, x_t, t, schedule, weighting=weighting)
    abar = schedule.alphas_cumprod
    before = torch.cat([torch.ones(1, dtype=torch.float64), abar])[t]
    beta = 1 - abar[t] / before
    c1 = before.sqrt() * beta / (1 - abar[t])
    small = beta / (2 * (1 - beta) * (1 - before))
    factor = torch.ones(4, dtype=torch.float64)
    if weighting == "reference":
        factor = torch.where(t == 0, 1 / (2 * abar[0]), small / c1)
    distance = (subject - category).square().mean(1) - (subject - null).square().mean(1)
    torch.testing.assert_close(terms.loss, factor * distance)
    torch.testing.assert_close(terms.threshold, -factor * (category - null).square().mean(1))


def test_where_eq_7_has_no_value_nothing_is_asked() -> None:
    """At t = 0 with fixed_small the reverse step is a point mass."""
    schedule = schedule_of("epsilon", "fixed_small")
    x_t, subject, category, null = (normal(2, 5, seed=k) for k in range(4))
    subject.requires_grad_()
    terms = sude_terms(
        subject, category, null, x_t, torch.tensor([0, 1]), schedule, weighting="exact"
    )
    assert terms.loss[0] == terms.threshold[0] == terms.gated[0] == 0
    assert not terms.gate[0] and terms.loss[1] != 0
    (gradient,) = torch.autograd.grad(terms.gated.sum(), subject)
    assert torch.isfinite(gradient).all() and not gradient[0].any()


def test_without_truncation_the_loss_passes_a_shut_gate() -> None:
    schedule = schedule_of("epsilon", "fixed_small")
    x_t, category, null = (normal(1, 5, seed=k) for k in range(3))
    beyond = null + 2 * (category - null)
    t = torch.tensor([300])
    cut, free = (
        sude_terms(beyond, category, null, x_t, t, schedule, truncated=truncated)
        for truncated in (True, False)
    )
    assert not cut.gate and not free.gate and cut.gated == 0
    assert torch.equal(free.gated, free.loss) and free.loss < free.threshold < 0


def test_only_the_subjects_output_receives_a_gradient() -> None:
    schedule = schedule_of("v_prediction", "fixed_small")
    x_t, *outputs = (normal(2, 5, seed=k) for k in range(4))
    for output in outputs:
        output.requires_grad_()
    subject, category, null = outputs
    terms = sude_terms(subject, category, null, x_t, torch.tensor([5, 800]), schedule)
    terms.loss.sum().backward()
    assert subject.grad is not None and category.grad is None and null.grad is None


# --- the old UNet --------------------------------------------------------------------------------


@pytest.fixture
def probe() -> tuple[Tensor, Tensor]:
    return normal(2, 4, 8, 8, seed=7), torch.tensor([20, 700])


@pytest.mark.parametrize("train", ["unet", "attention", "lora"])
def test_a_frozen_unet_answers_as_before_after_the_weights_moved(
    train: str, tiny: Backbone, probe: tuple[Tensor, Tensor]
) -> None:
    condition = tiny.encode_prompts(["photo of a dog"]).expand(2)
    before = tiny.predict(*probe, condition).detach()
    trained = train_part(tiny.unet, train)
    frozen = FrozenUNet(tiny.unet)
    size = 0 if train == "lora" else sum(4 * p.numel() for p in trained.values())
    assert frozen.num_bytes == size
    for k, p in enumerate(trained.values()):
        with torch.no_grad():
            p.add_(0.1 * normal(*p.shape, seed=k))
    with torch.no_grad():
        now = tiny.predict(*probe, condition)
    assert (now - before).norm() > 0.01 * before.norm()
    seen = tiny.predict(*probe, condition, frozen)
    assert torch.equal(seen, before) and not seen.requires_grad
    # Asking changes nothing: neither the answer of the model itself, nor what has a gradient.
    assert {n for n, p in tiny.unet.named_parameters() if p.requires_grad} == set(trained)
    again = tiny.predict(*probe, condition)
    assert torch.equal(again, now)
    again.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained.values())


def test_a_frozen_unet_survives_an_optimiser_and_gradients_of_its_question(
    tiny: Backbone, probe: tuple[Tensor, Tensor]
) -> None:
    """Asked between a forward pass and its backward pass, it leaves that graph whole."""
    trained = train_part(tiny.unet, "lora")
    condition = tiny.encode_prompts(["photo of a dog"]).expand(2)
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(0.1 * normal(*p.shape, seed=len(name)))

    def gradients(ask: bool) -> dict[str, Tensor]:
        tiny.unet.zero_grad()
        output = tiny.predict(*probe, condition)
        if ask:
            FrozenUNet(tiny.unet)(*probe, **condition.arguments)
        output.square().sum().backward()
        return {name: p.grad.clone() for name, p in trained.items()}  # type: ignore[union-attr]

    plain, asked = gradients(False), gradients(True)
    assert all(torch.equal(plain[name], asked[name]) for name in plain)


def test_adapters_that_come_later_are_left_out_too(
    tiny: Backbone, probe: tuple[Tensor, Tensor]
) -> None:
    condition = tiny.encode_prompts(["photo of a dog"]).expand(2)
    before = tiny.predict(*probe, condition)
    frozen = FrozenUNet(tiny.unet)
    for p in train_part(tiny.unet, "lora").values():
        nn.init.constant_(p, 0.1)
    assert not torch.equal(tiny.predict(*probe, condition), before)
    assert torch.equal(tiny.predict(*probe, condition, frozen), before)


def test_adapters_are_switched_on_again_even_after_an_error(tiny: Backbone) -> None:
    trained = train_part(tiny.unet, "lora")
    some = set(list(trained)[::2])  # what the user chose to leave frozen stays frozen
    for name, p in trained.items():
        p.requires_grad_(name in some)
    layers = [m for m in tiny.unet.modules() if hasattr(m, "adapter_layer_names")]
    assert layers
    with pytest.raises(KeyboardInterrupt), without_adapters(tiny.unet):
        assert all(layer.disable_adapters for layer in layers)
        raise KeyboardInterrupt
    assert not any(layer.disable_adapters for layer in layers)
    assert {n for n, p in tiny.unet.named_parameters() if p.requires_grad} == some
    # Adapters that were off stay off.
    tiny.unet.disable_adapters()
    with without_adapters(tiny.unet):
        pass
    assert all(layer.disable_adapters for layer in layers)


def test_a_unet_that_nothing_trains_is_kept_for_nothing(tiny: Backbone) -> None:
    tiny.unet.requires_grad_(False)
    assert FrozenUNet(tiny.unet).num_bytes == 0


@pytest.mark.parametrize("truncate_at", [0.0, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("weighting", ["exact", "simple", "reference"])
def test_the_gate_shuts_at_the_rho_that_is_asked_for(truncate_at: float, weighting: str) -> None:
    schedule = Schedule.from_scheduler(DDPMScheduler())
    category, uncond, x_t = (normal(9, 4, 4, 4, seed=k, dtype=torch.float64) for k in range(3))
    rho = torch.tensor([-1.0, -0.1, 0.1, 0.4, 0.6, 0.9, 1.1, 1.4, 1.6], dtype=torch.float64)
    side = normal(9, 4, 4, 4, seed=3, dtype=torch.float64)
    d = category - uncond
    flat = (side * d).flatten(1).sum(1) / (d * d).flatten(1).sum(1)
    across = side - flat[:, None, None, None] * d  # moves no rho
    subject = (uncond + rho[:, None, None, None] * d + across).requires_grad_()
    t = torch.linspace(1, 999, 9).long()
    terms = sude_terms(
        subject, category, uncond, x_t, t, schedule, weighting=weighting, truncate_at=truncate_at
    )
    torch.testing.assert_close(terms.rho.detach(), rho)
    assert terms.gate.tolist() == (rho < truncate_at).tolist()
    (gradient,) = torch.autograd.grad(terms.gated.sum(), subject)
    assert (gradient.flatten(1).abs().sum(1) > 0).tolist() == terms.gate.tolist()
    paper = sude_terms(subject, category, uncond, x_t, t, schedule, weighting=weighting)
    torch.testing.assert_close(terms.loss, paper.loss)
    torch.testing.assert_close(terms.threshold, paper.threshold)  # tau_t itself does not move


# --- zero terminal SNR ---------------------------------------------------------------------------


def dark(prediction_type: str, variance_type: str = "fixed_small") -> Schedule:
    """A schedule from a real configuration whose last step holds nothing of the picture."""
    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=prediction_type,
        variance_type=variance_type,
        rescale_betas_zero_snr=True,
    )
    schedule = Schedule.from_scheduler(scheduler)
    assert schedule.alphas_cumprod[-1] == 0
    return schedule


@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("weighting", ["exact", "simple", "reference"])
def test_v_and_x_0_have_a_value_at_zero_terminal_snr(
    prediction_type: str, variance_type: str, weighting: str
) -> None:
    schedule = dark(prediction_type, variance_type)
    t = torch.tensor([1, 500, 998, 999])
    x_t, category, null = (normal(4, 4, 3, 3, seed=k, dtype=torch.float64) for k in range(3))
    subject = (null + 0.4 * (category - null)).requires_grad_()
    terms = sude_terms(subject, category, null, x_t, t, schedule, weighting=weighting)
    torch.testing.assert_close(terms.rho, torch.full_like(terms.rho, 0.4))
    assert all(torch.isfinite(x).all() for x in (terms.loss, terms.threshold))
    terms.gated.sum().backward()
    assert subject.grad is not None and torch.isfinite(subject.grad).all()
    # `simple` is an eps-space weight: what eps does not know of at the last step is not asked.
    assert terms.gate.tolist() == [True, True, True, weighting != "simple"]
    if weighting == "exact":  # eq. 7 of the means, which are there for v and x_0
        means = [reverse_mean(u, x_t, t, schedule) for u in (subject, category, null)]
        expected = sude_loss(*means, posterior_variance(t, schedule)) / 36
        torch.testing.assert_close(terms.loss, expected, rtol=1e-7, atol=0)


def test_eps_has_none_there() -> None:
    outputs = [normal(1, 5, seed=k) for k in range(4)]
    with pytest.raises(ValueError, match="zero terminal SNR"):
        sude_terms(*outputs, torch.tensor([999]), dark("epsilon"), weighting="exact")


def test_a_run_that_predicts_noise_is_refused_there_before_its_first_step(
    predicting: Callable[[str], Backbone], picture: Image.Image
) -> None:
    backbone = predicting("epsilon")
    backbone.pipeline.scheduler = DDPMScheduler.from_config(
        backbone.pipeline.scheduler.config, rescale_betas_zero_snr=True
    )
    config = TuningConfig(Path("dog.png"), "dog", weighting="exact")
    with pytest.raises(UserError, match=r"zero terminal SNR.*--weighting simple"):
        configure(config, backbone)
    assert configure(replace(config, weighting="simple"), backbone)
    assert configure(replace(config, weight_sude=0.0), backbone)


def test_a_run_with_zero_terminal_snr_takes_its_last_step_of_noise(
    predicting: Callable[[str], Backbone], picture: Image.Image
) -> None:
    backbone = predicting("v_prediction")
    backbone.pipeline.scheduler = DDPMScheduler.from_config(
        backbone.pipeline.scheduler.config, rescale_betas_zero_snr=True
    )

    class AtTheEnd(FreshDraws):
        def draw(self, size: int, generator: torch.Generator) -> Any:
            return replace(super().draw(size, generator), t=torch.full((size,), 999))

    small = picture.resize((32, 32))
    draws = AtTheEnd([backbone.encode_pictures([small])], 1000)
    settings = TuningConfig(Path("dog.png"), "dog", max_train_steps=2, learning_rate=1e-3)
    steps = list(Tuning(settings, backbone, picture, draws=draws))
    assert all(torch.isfinite(step.loss_sude).all() for step in steps)
    assert not torch.equal(steps[0].rho, torch.ones(2))


# --- the plug in other people's loops ------------------------------------------------------------


def plug(backbone: Backbone, **settings: Any) -> SudeRegularizer:
    null, dog = (backbone.encode_prompts([text]) for text in ("", "photo of a dog"))
    return SudeRegularizer(backbone.unet, backbone.pipeline.scheduler, dog, null, **settings)


def called(sude: SudeRegularizer) -> Tensor:
    return sude(normal(2, 4, 8, 8, seed=0), torch.tensor([30, 700]), normal(2, 4, 8, 8, seed=1))


def test_made_before_parts_are_opened_it_says_where_to_make_it(tiny: Backbone) -> None:
    sude = plug(tiny)
    called(sude)
    train_part(tiny.unet, "attention")
    with pytest.raises(UserError, match="is trained and was not kept: make this after parts are"):
        called(sude)
    called(plug(tiny))


def test_made_before_the_attention_processors_it_says_so(tiny: Backbone) -> None:
    from diffusers.models.attention_processor import CustomDiffusionAttnProcessor2_0

    sude = plug(tiny)
    processors = dict(tiny.unet.attn_processors)
    name = next(n for n in processors if n.endswith("attn2.processor"))
    width = tiny.unet.get_submodule(name.removesuffix(".processor")).to_q.in_features
    processors[name] = CustomDiffusionAttnProcessor2_0(
        hidden_size=width, cross_attention_dim=tiny.text_encoder.config.hidden_size
    )
    tiny.unet.set_attn_processor(processors)
    with pytest.raises(UserError, match="was added and was not kept"):
        called(sude)


def test_a_lora_that_replaces_forward_needs_a_callable(tiny: Backbone) -> None:
    class Kohya(nn.Module):
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            self.original, self.scale = layer.forward, 1.0
            self.down = nn.Linear(layer.in_features, layer.out_features, bias=False)
            layer.forward = self.forward

        def forward(self, x: Tensor) -> Tensor:
            return self.original(x) + self.scale * self.down(x)

    early = plug(tiny)
    before = called(early)
    layer = next(m for n, m in tiny.unet.named_modules() if n.endswith("attn2.to_k"))
    lora = Kohya(layer)
    for make in (lambda: called(early), lambda: plug(tiny)):
        with pytest.raises(UserError, match="answers through a Kohya"):
            make()

    def frozen(*args: Any, **kwargs: Any) -> Any:
        lora.scale = 0.0
        try:
            return tiny.unet(*args, **kwargs)
        finally:
            lora.scale = 1.0

    torch.testing.assert_close(called(plug(tiny, prior=frozen)), before)
    assert not torch.allclose(called(plug(tiny, prior="current")), before)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
def test_a_lora_that_changes_the_frozen_weights_is_refused(start: Any, tiny: Backbone) -> None:
    tiny.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=start))
    with pytest.raises(UserError, match=f"starts by {start}"):
        plug(tiny)


def test_a_lora_that_says_something_already_is_refused(tiny: Backbone) -> None:
    """As after `--resume_from_checkpoint`: `pretrained` would ask the model without it."""
    trained = train_part(tiny.unet, "lora")
    called(plug(tiny))
    with torch.no_grad():
        for p in trained.values():
            p.add_(0.1)
    with pytest.raises(UserError, match="already changes its answers"):
        plug(tiny)
    called(plug(tiny, prior="current"))


@pytest.mark.parametrize("kind", [LoHaConfig, LoKrConfig, IA3Config])
def test_an_adapter_of_any_kind_that_speaks_is_refused(kind: Any, tiny: Backbone) -> None:
    targets = {"target_modules": ["to_k", "to_v"]}
    more = {"feedforward_modules": []} if kind is IA3Config else {"init_weights": True}
    inject_adapter_in_model(kind(**targets, **more), tiny.unet)
    if kind is not IA3Config:  # of which nothing tells whether it speaks
        plug(tiny)
    with torch.no_grad():
        for name, p in tiny.unet.named_parameters():
            if any(part in name for part in ("hada_", "lokr_", "ia3_")):
                p.add_(0.1)
    with pytest.raises(UserError, match="already changes its answers"):
        plug(tiny)
    called(plug(tiny, prior="current"))


def test_an_adapter_around_what_was_kept_is_refused(tiny: Backbone) -> None:
    train_part(tiny.unet, "unet")
    sude = plug(tiny)
    tiny.unet.add_adapter(LORA)
    with pytest.raises(UserError, match="make this after"):
        called(sude)


def test_the_mean_is_over_what_the_unet_gives_not_what_it_takes() -> None:
    """An inpainting UNet takes nine channels and gives four."""
    null, dog = (Condition(torch.full((1, 3, 2), v)) for v in (0.0, 1.0))

    def unet(x: Tensor, t: Tensor, encoder_hidden_states: Tensor) -> Any:
        of = encoder_hidden_states.mean((1, 2))[:, None, None, None]
        return SimpleNamespace(sample=of * x[:, :4])

    schedule = Schedule(torch.linspace(0.99, 0.01, 100))
    x, t, output = normal(2, 9, 3, 3, seed=0), torch.tensor([3, 60]), normal(2, 4, 3, 3, seed=1)
    settings: dict[str, Any] = {"prior": "current", "weighting": "simple", "truncated": False}
    loss = SudeRegularizer(unet, schedule, dog, null, **settings)(x, t, output)
    by_hand = (output - x[:, :4]).square().mean((1, 2, 3)) - output.square().mean((1, 2, 3))
    torch.testing.assert_close(loss, by_hand)


def test_the_scheduler_is_asked_at_the_call(tiny: Backbone) -> None:
    sude = plug(tiny)
    before = called(sude)
    tiny.pipeline.scheduler.register_to_config(prediction_type="v_prediction")
    assert not torch.allclose(called(sude), before)
    torch.testing.assert_close(called(sude), called(plug(tiny)))


def test_a_batch_of_several_categories_is_judged_by_each_ones_own(tiny: Backbone) -> None:
    sude = plug(tiny, truncated=False)
    x, t, output = normal(2, 4, 8, 8, seed=0), torch.tensor([30, 700]), normal(2, 4, 8, 8, seed=1)
    both = tiny.encode_prompts(["photo of a dog", "photo of a cat"]).hidden
    loss = sude(x, t, output, both)
    torch.testing.assert_close(loss[0], sude(x, t, output)[0], rtol=1e-3, atol=1e-6)
    cat = SudeRegularizer(
        tiny.unet, tiny.schedule, both[1:], tiny.encode_prompts([""]), truncated=False
    )
    torch.testing.assert_close(loss[1], cat(x, t, output)[1], rtol=1e-3, atol=1e-6)
