"""Flow matching and diffusion are one process in two languages: the same losses, in float64.

Oracles: closed forms of the signal-to-noise ratio, conditional Gaussians, a mixture of Gaussians,
diffusers' own scheduler, and the embedded UNet asked as a flow model.
"""

from typing import Any

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor
from torch.testing import assert_close

from sude_lab.backbone import Condition
from sude_lab.classifier import class_log_ratio
from sude_lab.diffusion import (
    PREDICTION_TYPES,
    Schedule,
    add_noise,
    alpha_bars,
    posterior_mean,
    posterior_variance,
    reverse_mean,
    to_eps,
    to_x_0,
    training_target,
)
from sude_lab.io.opening import open_backbone
from sude_lab.losses import WEIGHTINGS, output_weight, sude_loss, sude_weight
from sude_lab.sude import SudeTerms, ask, sude_terms
from sude_lab.world.mixture import GaussianMixture

pytestmark = pytest.mark.quick

T = 50
SIGMAS = torch.linspace(1 / T, 1, T, dtype=torch.float64)
FLOW = Schedule.from_sigmas(SIGMAS)
EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-12}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def like(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (x.ndim - 1))


# --- the table ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"shift": 3.0}, {"use_dynamic_shifting": True, "shift": 3.0}, {"num_train_timesteps": 40}],
)
def test_the_table_is_the_one_that_training_reads(settings: dict[str, Any]) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**settings)
    sigmas, times = scheduler.sigmas.clone(), scheduler.timesteps.clone()
    x_0, eps = normal(3, 2, 2).float(), normal(3, 2, 2, seed=1).float()
    number = len(sigmas)
    t = torch.tensor([0, number // 2, number - 1])
    noised = scheduler.scale_noise(x_0, times.flip(0)[t], eps)
    # Drawing writes over the scheduler's own sigmas, and the next training must not notice.
    scheduler.set_timesteps(5, **({"mu": 1.0} if scheduler.config.use_dynamic_shifting else {}))
    assert len(scheduler.sigmas) == 6
    schedule = Schedule.from_scheduler(scheduler)
    assert schedule.prediction_type == "flow" and schedule.num_timesteps == number
    assert schedule.sigmas is not None
    assert_close(schedule.sigmas, sigmas.double().flip(0), rtol=0, atol=0)
    assert_close(schedule.to_time(torch.arange(number)), times.flip(0), rtol=0, atol=0)
    assert_close(add_noise(x_0, eps, t, schedule), noised, rtol=0, atol=1e-6)
    assert torch.equal(schedule.from_time(times), torch.arange(number).flip(0))
    assert torch.equal(
        schedule.from_time(times[[3, 7]] + 0.2 / number), number - 1 - torch.tensor([3, 7])
    )


def test_times_of_a_diffusion_are_its_timesteps() -> None:
    schedule, t = Schedule.from_scheduler(DDPMScheduler()), torch.tensor([3, 999])
    assert torch.equal(schedule.to_time(t), t) and torch.equal(schedule.from_time(t), t)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Schedule.from_sigmas(torch.tensor([0.5, 1.2])), "end at 1"),
        (lambda: Schedule.from_sigmas(torch.tensor([0.0, 0.5])), "decrease strictly"),
        (lambda: Schedule.from_sigmas(torch.tensor([0.5, 0.5])), "decrease strictly"),
        (lambda: Schedule.from_sigmas(torch.tensor([[0.5]])), "shape"),
        (lambda: Schedule.from_sigmas(torch.tensor([0.5]), "v_prediction"), "use flow"),
        (lambda: Schedule.from_scheduler(EDMEulerScheduler()), "no alphas_cumprod"),
        (
            lambda: Schedule.from_scheduler(
                UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
            ),
            "prediction_type",
        ),
    ],
)
def test_what_is_no_flow_is_refused(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


# --- the process ----------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", [p for p in PREDICTION_TYPES if p != "v_prediction"])
def test_outputs_name_the_picture_and_the_noise(prediction_type: str) -> None:
    schedule = Schedule.from_sigmas(SIGMAS, prediction_type)
    t = torch.arange(T - 1)
    x_0, eps = normal(T - 1, 2, 3), normal(T - 1, 2, 3, seed=1)
    s = like(SIGMAS[t], x_0)
    x_t = add_noise(x_0, eps, t, schedule)
    assert_close(x_t, (1 - s) * x_0 + s * eps)
    output = training_target(x_0, eps, t, schedule)
    assert_close(output, {"epsilon": eps, "sample": x_0, "flow": eps - x_0}[prediction_type])
    assert_close(to_x_0(output, x_t, t, schedule), x_0, **EXACT)
    assert_close(to_eps(output, x_t, t, schedule), eps, **EXACT)


def test_the_step_is_the_conditional_gaussian_of_the_markov_chain() -> None:
    """q(x_{t-1} | x_t, x_0) by conditioning the two jointly Gaussian variables on each other."""
    t = torch.arange(1, T)
    a, b, a_prev, b_prev = 1 - SIGMAS[t], SIGMAS[t], 1 - SIGMAS[t - 1], SIGMAS[t - 1]
    x_0, x_t = normal(T - 1, 4), normal(T - 1, 4, seed=1)
    covariance = a / a_prev * b_prev**2
    mean = like(a_prev, x_0) * x_0 + like(covariance / b**2, x_0) * (x_t - like(a, x_0) * x_0)
    assert_close(posterior_mean(x_t, x_0, t, FLOW), mean, **EXACT)
    variance = b_prev**2 - covariance**2 / b**2
    assert_close(posterior_variance(t, FLOW), variance, **EXACT)
    first = torch.zeros(T - 1, dtype=torch.long)
    assert_close(posterior_mean(x_t, x_0, first, FLOW), x_0, rtol=0, atol=1e-12)
    assert not posterior_variance(first, FLOW).any()


def test_weights_are_closed_forms_of_the_snr() -> None:
    t = torch.arange(1, T - 1)
    s = SIGMAS[t]
    snr, snr_prev = ((1 - x).square() / x.square() for x in (s, SIGMAS[t - 1]))
    exact = {
        "epsilon": 0.5 * (snr_prev / snr - 1),
        "sample": 0.5 * (snr_prev - snr),
        "flow": 0.5 * s**2 * (snr_prev - snr),
    }
    for kind, weight in exact.items():
        assert_close(output_weight(t, Schedule.from_sigmas(SIGMAS, kind)), weight, **EXACT)
    assert_close(sude_weight(t, FLOW), exact["epsilon"], **EXACT)
    assert torch.equal(output_weight(t, FLOW, "simple"), torch.ones(len(t), dtype=torch.float64))
    assert_close(output_weight(t, Schedule.from_sigmas(SIGMAS, "sample"), "simple"), snr, **EXACT)
    # The slope of the mean in the output: s (1 - s') (1 - R), over the variance s'^2 (1 - R).
    ratio = snr / snr_prev
    slope, variance = s * (1 - SIGMAS[t - 1]) * (1 - ratio), SIGMAS[t - 1] ** 2 * (1 - ratio)
    assert_close(slope**2 / (2 * variance), exact["flow"], **EXACT)
    assert_close(posterior_variance(t, FLOW), variance, **EXACT)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_all_is_finite_where_nothing_is_left_of_the_picture(weighting: str) -> None:
    t = torch.tensor([0, T // 2, T - 1])
    x_t, category, null = (normal(3, 4, 3, seed=k) for k in range(3))
    subject = (null + 0.4 * (category - null)).requires_grad_()
    assert FLOW.alphas_cumprod[-1] == 0
    terms = sude_terms(subject, category, null, x_t, t, FLOW, weighting=weighting)
    terms.gated.sum().backward()
    assert subject.grad is not None
    for values in (terms.loss, terms.threshold, terms.gated, terms.rho, subject.grad):
        assert values.isfinite().all()
    assert_close(terms.rho, torch.full((3,), 0.4, dtype=torch.float64))
    for values in (to_x_0(subject, x_t, t, FLOW), to_eps(subject, x_t, t, FLOW)):
        assert values.isfinite().all()


# --- eq. 5-9 --------------------------------------------------------------------------------------

WORLD = GaussianMixture(
    torch.tensor([0.3, 0.3, 0.2, 0.2], dtype=torch.float64),
    normal(4, 3, seed=5),
    torch.tensor([0.2, 0.4, 0.3, 0.5], dtype=torch.float64),
    torch.tensor([0, 0, 1, 1]),
)


def mixture_output(x_s: Tensor, t: Tensor, schedule: Schedule, label: int | None) -> Tensor:
    """v = E[eps - x_0 | x_s, c] of the mixture, by its components: none of our code."""
    assert schedule.sigmas is not None
    s, world = schedule.sigmas[t].unsqueeze(1), WORLD.given(label)
    total = (1 - s) ** 2 * world.variances + s**2
    means = (1 - s).unsqueeze(2) * world.means
    squares = (x_s.unsqueeze(1) - means).square().sum(2)
    share = (world.weights.log() - 1.5 * total.log() - squares / (2 * total)).softmax(1)
    gain = ((1 - s) * world.variances / total).unsqueeze(2)
    x_0 = (share.unsqueeze(2) * (world.means + gain * (x_s.unsqueeze(1) - means))).sum(1)
    return (x_s - x_0) / s


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_eq_07_in_v_is_eq_07_in_log_densities(variance_type: str) -> None:
    """In means, eq. 7 is a difference of two log densities of eq. 6; in v it is the same number."""
    schedule = Schedule(FLOW.alphas_cumprod, "flow", variance_type, SIGMAS)
    t = torch.arange(1, T)
    x_s = normal(T - 1, 3)
    subject, category, null = (mixture_output(x_s, t, schedule, c) for c in (0, 1, None))
    means = [reverse_mean(v, x_s, t, schedule) for v in (subject, category, null)]
    variance = posterior_variance(t, schedule)
    ratio = class_log_ratio(*means, variance)
    direct = sude_loss(subject, category, null, 0.5 / output_weight(t, schedule))
    assert_close(direct, -ratio, rtol=1e-7, atol=1e-9)
    terms = sude_terms(subject, category, null, x_s, t, schedule, weighting="exact")
    assert_close(3 * terms.loss, -ratio, rtol=1e-7, atol=1e-9)


def test_eq_05_is_bayes_rule_as_steps_get_short() -> None:
    """log p(c | x_{t-1}) - log p(c | x_t) of the mixture, exactly, for the Markov step in flow."""
    errors = []
    for number in (100, 1000):
        s = torch.linspace(1 / number, 1, number, dtype=torch.float64)
        schedule = Schedule.from_sigmas(s)
        t = torch.full((2000,), number // 2 - 1)
        x_t = add_noise(normal(2000, 3, seed=6), normal(2000, 3, seed=7), t, schedule)
        null, dog = (mixture_output(x_t, t, schedule, c) for c in (None, 1))
        mean, variance = reverse_mean(null, x_t, t, schedule), posterior_variance(t, schedule)
        x_prev = mean + variance.sqrt().unsqueeze(1) * normal(2000, 3, seed=8)
        ratio = class_log_ratio(x_prev, reverse_mean(dog, x_t, t, schedule), mean, variance)
        scale, scale_prev = (torch.hypot(1 - s[k], s[k]).unsqueeze(1) for k in (t, t - 1))
        as_vp = (
            WORLD.class_log_posterior(x_t / scale, t, schedule),
            WORLD.class_log_posterior_prev(x_prev / scale_prev, t, schedule),
        )
        change = (as_vp[1] - as_vp[0])[:, 1]
        errors.append(((ratio - change).square().mean() / change.square().mean()).sqrt().item())
    assert errors[0] < 0.2 and errors[1] < errors[0] / 2.5


# --- the same model, asked in both languages ------------------------------------------------------


@pytest.fixture(scope="module")
def embedded() -> Any:
    backbone = open_backbone("embedded", device="cpu")
    backbone.unet.double()
    backbone.text_encoder.double()
    return backbone


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_embedded_unet_says_the_same_as_a_flow_model(embedded: Any, weighting: str) -> None:
    vp = embedded.schedule
    abar = vp.alphas_cumprod
    s = (1 - abar).sqrt() / (abar.sqrt() + (1 - abar).sqrt())
    flow = Schedule.from_sigmas(s)
    t = torch.tensor([5, 300, 700, 999])
    x_vp = normal(4, embedded.unet.config.in_channels, 16, 16)
    size = like(torch.hypot(1 - s[t], s[t]), x_vp)
    with torch.no_grad():
        null, dog, cat = embedded.encode_prompts(["", "photo of a dog", "photo of a cat"]).hidden

    def eps_of(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return embedded.unet(x, t, condition.hidden).sample

    def u_of(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """eps - x_0 at eq. 1's x_t = a x_0 + b eps."""
        a, b = (like(table[t], x) for table in (abar.sqrt(), (1 - abar).sqrt()))
        eps = eps_of(x, t, condition)
        return eps - (x - b * eps) / a

    def v_of(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The change of variables: v = (eps - x_s) / (1 - s)."""
        eps = eps_of(x / like(torch.hypot(1 - s[t], s[t]), x), t, condition)
        return (eps - x) / like(1 - s[t], x)

    found: list[tuple[SudeTerms, Tensor]] = []
    asked = [
        (eps_of, vp, x_vp),
        (u_of, Schedule(abar, "flow"), x_vp),
        (v_of, flow, size * x_vp),
    ]
    if weighting == "simple":  # which is the MSE of the output: eps and eps - x_0 weigh other steps
        del asked[0]
    for predict, schedule, x in asked:
        subject = cat.clone().requires_grad_()
        uncond, category = ask(predict, x, t, Condition(null[None]), Condition(dog[None]))
        output = predict(x, t, Condition(subject[None]).expand(4))
        terms = sude_terms(output, category, uncond, x, t, schedule, weighting=weighting)
        terms.gated.sum().backward()
        assert subject.grad is not None
        found.append((terms, subject.grad))
    (first, gradient), *others = found
    assert gradient.abs().max() > 1e-6 and first.gate.any()
    for terms, same in others:
        for name in ("loss", "threshold", "gated", "rho"):
            # Up to 1 - abar of a table of abar, which is where the last digits go.
            assert_close(getattr(terms, name), getattr(first, name), rtol=1e-8, atol=1e-12)
        assert torch.equal(terms.gate, first.gate)
        assert (same - gradient).abs().max() < 1e-8 * gradient.abs().max()
    assert_close(alpha_bars(t, flow)[0], abar[t], rtol=1e-12, atol=1e-15)
