"""The losses: linearity, gradients, truncation, the hinge, and the weight in eps-space."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch.testing import assert_close

from sude_lab import losses
from sude_lab.diffusion import (
    PREDICTION_TYPES,
    Schedule,
    add_noise,
    posterior_variance,
    reverse_mean,
    to_eps,
)
from sude_lab.losses import (
    class_regularizer,
    gate,
    guidance_projection,
    hinge_loss,
    subject_loss,
    sude_loss,
    sude_threshold,
    sude_weight,
    total_loss,
    truncate,
)
from sude_lab.view.thresholds import sude_move

pytestmark = pytest.mark.quick

EXACT = {"rtol": 1e-11, "atol": 1e-11}
VARIANCE = torch.tensor([0.3, 2.0, 1e-2, 0.7], dtype=torch.float64)
SD = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def world():
    """c_sub, c_cate and null predictions (4, 2, 3); the gate of samples 0 and 2 is shut."""
    mean_class, mean_uncond = normal(4, 2, 3, seed=1), normal(4, 2, 3, seed=2)
    along = torch.tensor([1.5, 0.25, 1.01, -2.0], dtype=torch.float64).reshape(4, 1, 1)
    d = mean_class - mean_uncond
    across = normal(4, 2, 3, seed=3)
    across = across - (across * d).sum((1, 2), True) / d.square().sum((1, 2), True) * d
    return mean_uncond + along * d + across, mean_class, mean_uncond


def schedule(prediction_type="epsilon", variance_type="fixed_small"):
    return Schedule(SD.alphas_cumprod, prediction_type, variance_type)


def test_subject_loss_is_a_sum_of_squares():
    a, b = normal(4, 2, 3), normal(4, 2, 3, seed=1)
    mse = torch.nn.functional.mse_loss(a, b, reduction="none").mean((1, 2))
    assert_close(subject_loss(a, b), 6 * mse, **EXACT)


def test_sude_loss_is_linear_in_the_subject():
    x, c, u = world()
    y = normal(4, 2, 3, seed=9)
    for s in (-3.0, 0.2, 5.0):
        mixed = sude_loss(s * x + (1 - s) * y, c, u, VARIANCE)
        parts = s * sude_loss(x, c, u, VARIANCE) + (1 - s) * sude_loss(y, c, u, VARIANCE)
        assert_close(mixed, parts, rtol=1e-11, atol=1e-9)
    d, a = c - u, x - u
    expected = (d.square() - 2 * a * d).sum((1, 2)) / (2 * VARIANCE)
    assert_close(sude_loss(x, c, u, VARIANCE), expected, rtol=1e-11, atol=1e-10)


def test_sude_gradient_is_the_guidance_direction():
    x, c, u = world()
    x.requires_grad_()
    sude_loss(x, c, u, VARIANCE).sum().backward()
    assert_close(x.grad, -(c - u) / VARIANCE.reshape(4, 1, 1), **EXACT)


def test_sude_is_unbounded_below_without_truncation():
    _, c, u = world()
    values = [sude_loss(u + s * (c - u), c, u, VARIANCE) for s in (1.0, 1e3, 1e6)]
    assert bool((values[0] > values[1]).all() and (values[1] > values[2]).all())
    assert bool((values[2] < -1e5 * values[0].abs()).all())


def test_only_the_subject_receives_a_gradient():
    x, c, u = (v.requires_grad_() for v in world())
    for value in (
        sude_loss(x, c, u, VARIANCE),
        hinge_loss(x, c, u, VARIANCE),
        guidance_projection(x, c, u),
        truncate(sude_loss(x, c, u, VARIANCE), sude_threshold(c, u, VARIANCE)),
    ):
        grads = torch.autograd.grad(value.sum(), (x, c, u), allow_unused=True)
        assert bool((grads[0] != 0).any()) and grads[1] is None and grads[2] is None
    assert not sude_threshold(c, u, VARIANCE).requires_grad


def test_gradient_reaches_the_subject_alone_when_one_network_makes_all_three():
    """As in training: a shared weight gets the gradient of eq. 7 through c_sub only."""
    weight = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    x, c, u = world()
    sude_loss(weight * x, weight * c, weight * u, VARIANCE).sum().backward()
    expected = (-1.3 * (c - u) / VARIANCE.reshape(4, 1, 1) * x).sum()
    assert weight.grad is not None
    assert_close(weight.grad, expected.detach(), **EXACT)


def test_threshold_is_the_loss_of_the_category_to_the_last_bit():
    for dtype in (torch.float32, torch.float64):
        _, c, u = (v.to(dtype) for v in world())
        loss, threshold = sude_loss(c, c, u, VARIANCE), sude_threshold(c, u, VARIANCE)
        assert_close(loss, threshold, rtol=0, atol=0)
        assert not bool(gate(loss, threshold).any())


def test_gate_is_per_sample_and_shuts_at_rho_one():
    x, c, u = world()
    loss, threshold = sude_loss(x, c, u, VARIANCE), sude_threshold(c, u, VARIANCE)
    assert gate(loss, threshold).tolist() == [False, True, False, True]
    assert_close(guidance_projection(x, c, u), torch.tensor([1.5, 0.25, 1.01, -2.0]).double())
    assert gate(loss, threshold).tolist() == (guidance_projection(x, c, u) < 1).tolist()
    # A batch mean would have opened every gate: here is the case that tells the two apart.
    assert bool(loss.mean() > threshold.mean())


def test_truncate_values_and_gradient():
    x, c, u = world()
    x.requires_grad_()
    loss, threshold = sude_loss(x, c, u, VARIANCE), sude_threshold(c, u, VARIANCE)
    truncated = truncate(loss, threshold)
    is_open = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    assert_close(truncated, is_open * loss, rtol=0, atol=0)
    (grad,) = torch.autograd.grad(truncated.sum(), x)
    expected = -(c - u) / VARIANCE.reshape(4, 1, 1) * is_open.reshape(4, 1, 1)
    assert_close(grad, expected, **EXACT)


def test_truncate_passes_no_gradient_to_the_threshold():
    loss = torch.tensor([1.0, -1.0], requires_grad=True)
    threshold = torch.tensor([0.0, 0.0], requires_grad=True)
    grads = torch.autograd.grad(
        truncate(loss, threshold).sum(), (loss, threshold), allow_unused=True
    )
    assert_close(grads[0], torch.tensor([1.0, 0.0]))
    assert grads[1] is None


def test_truncate_does_not_hide_what_is_not_a_number():
    out = truncate(torch.tensor([math.nan, 1.0]), torch.zeros(2))
    assert bool(out[0].isnan()) and out[1] == 1


def test_hinge_has_the_gradient_and_the_value_of_truncation():
    x, c, u = world()
    x.requires_grad_()
    loss, threshold = sude_loss(x, c, u, VARIANCE), sude_threshold(c, u, VARIANCE)
    hinge = hinge_loss(x, c, u, VARIANCE)
    of_truncated = torch.autograd.grad(truncate(loss, threshold).sum(), x)[0]
    of_hinge = torch.autograd.grad(hinge.sum(), x)[0]
    assert_close(of_hinge, of_truncated, **EXACT)
    expected = (loss - threshold) * gate(loss, threshold)
    assert_close(hinge, expected, rtol=1e-11, atol=1e-10)
    d2, rho = (c - u).square().sum((1, 2)), guidance_projection(x, c, u)
    assert_close(loss - threshold, d2 * (1 - rho) / VARIANCE, rtol=1e-11, atol=1e-10)


def test_hinge_pushes_no_more_at_the_category_itself():
    _, c, u = world()
    x = c.clone().requires_grad_()
    hinge_loss(x, c, u, VARIANCE).sum().backward()
    assert_close(x.grad, torch.zeros_like(x), rtol=0, atol=0)


@pytest.mark.parametrize("weight_sude", [0.0, 0.1, 1.0, 50.0])
@pytest.mark.parametrize("truncated", [True, False])
def test_the_move_minimises_what_it_costs_and_what_it_gains(weight_sude, truncated):
    x, c, u = world()
    d, variance = c - u, torch.tensor([0.3, 2.0, 0.7, 0.7], dtype=torch.float64)
    gain = hinge_loss if truncated else sude_loss

    def cost(s):
        moved = x + s.reshape(-1, 1, 1) * d
        return subject_loss(moved, x) + weight_sude * gain(moved, c, u, variance)

    move = sude_move(x.requires_grad_(), c, u, variance, weight_sude, truncated=truncated)
    assert not move.requires_grad
    assert bool((move[1] > 0) == (weight_sude > 0))  # its gate is open
    assert not truncated or bool((move[[0, 2]] == 0).all())  # theirs are shut
    best = cost(move)
    for other in torch.linspace(-2, 120, 245, dtype=torch.float64):
        assert bool((cost(other.expand(4)) >= best - 1e-9).all()), other


def test_no_direction_means_a_shut_gate():
    c = normal(4, 3)
    x = normal(4, 3, seed=1).requires_grad_()
    zeros = torch.zeros(4, dtype=torch.float64)
    loss, threshold = sude_loss(x, c, c, VARIANCE), sude_threshold(c, c, VARIANCE)
    assert_close(loss, zeros, rtol=0, atol=0)
    assert not bool(gate(loss, threshold).any())
    assert_close(guidance_projection(x, c, c), zeros + 1, rtol=0, atol=0)
    hinge = hinge_loss(x, c, c, VARIANCE)
    assert_close(hinge, zeros, rtol=0, atol=0)
    hinge.sum().backward()
    assert_close(x.grad, torch.zeros_like(x), rtol=0, atol=0)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_rho_and_the_gate_are_free_of_parametrisation(prediction_type, variance_type):
    s = schedule(prediction_type, variance_type)
    t = torch.tensor([1, 50, 500, 999])
    x_t = add_noise(normal(4, 2, 3), normal(4, 2, 3, seed=5), t, s)
    outputs = world()
    means = [reverse_mean(output, x_t, t, s) for output in outputs]
    noises = [to_eps(output, x_t, t, s) for output in outputs]
    rho = guidance_projection(*outputs)
    # Neighbouring means agree in their first digits: their differences keep fewer.
    assert_close(guidance_projection(*means), rho, rtol=1e-8, atol=1e-8)
    assert_close(guidance_projection(*noises), rho, rtol=1e-8, atol=1e-8)
    variance = posterior_variance(t, s)
    is_open = gate(sude_loss(*means, variance), sude_threshold(*means[1:], variance))
    assert is_open.tolist() == [False, True, False, True]


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_exact_weight_is_eq_7_in_eps_space(variance_type):
    s = schedule(variance_type=variance_type)
    t = torch.tensor([1, 2, 500, 999] if variance_type == "fixed_small" else [0, 2, 500, 999])
    x_t, eps = normal(4, 2, 3, seed=5), world()
    means = [reverse_mean(e, x_t, t, s) for e in eps]
    variance, weight = posterior_variance(t, s), sude_weight(t, s, "exact")
    in_mean_space = sude_loss(*means, variance)
    squares = [(eps[0] - e).square().sum((1, 2)) for e in eps[1:]]
    assert_close(weight * (squares[0] - squares[1]), in_mean_space, rtol=1e-8, atol=1e-8)
    # The form that tuning uses, for eq. 7, 8 and the hinge of eq. 9.
    pseudo = 1 / (2 * weight)
    assert_close(sude_loss(*eps, pseudo), in_mean_space, rtol=1e-8, atol=1e-8)
    thresholds = sude_threshold(*eps[1:], pseudo), sude_threshold(*means[1:], variance)
    assert_close(*thresholds, rtol=1e-8, atol=1e-8)
    hinges = hinge_loss(*eps, pseudo), hinge_loss(*means, variance)
    assert_close(*hinges, rtol=1e-8, atol=1e-8)


def test_exact_weight_by_the_formulas_of_the_derivation():
    t = torch.arange(1, 1000)
    abar = SD.alphas_cumprod.double()
    alpha = abar[1:] / abar[:-1]
    small = (1 - alpha) / (2 * alpha * (1 - abar[:-1]))
    large = (1 - alpha) / (2 * alpha * (1 - abar[1:]))
    assert_close(sude_weight(t, schedule(), "exact"), small, rtol=1e-12, atol=0)
    s = schedule(variance_type="fixed_large")
    assert_close(sude_weight(t, s, "exact"), large, rtol=1e-12, atol=0)


def test_exact_weight_of_a_point_mass_is_zero():
    """t = 0 with fixed_small: eq. 7 has no value, and SuDe is not applied. No 1e-6 anywhere."""
    t = torch.tensor([0, 1])
    weight = sude_weight(t, schedule(), "exact")
    assert weight[0] == 0 and weight[1] > 0.5
    x, c, u = (v[:2] for v in world())
    with pytest.raises(ValueError, match="t = 0"):
        sude_loss(x, c, u, posterior_variance(t, schedule()))
    with pytest.raises(ValueError, match="t = 0"):
        sude_threshold(c, u, posterior_variance(t, schedule()))
    with pytest.raises(ValueError, match="t = 0"):
        hinge_loss(x, c, u, posterior_variance(t, schedule()))


def test_weight_zero_is_an_infinite_variance_that_switches_sude_off():
    weight = sude_weight(torch.tensor([0, 0, 1, 1]), schedule(), "exact")
    variance = 1 / (2 * weight)
    assert variance.isinf().tolist() == [True, True, False, False]
    x, c, u = world()
    x.requires_grad_()
    loss, threshold = sude_loss(x, c, u, variance), sude_threshold(c, u, variance)
    assert gate(loss, threshold).tolist() == [False, False, False, True]
    off = torch.zeros(2, dtype=torch.float64)
    for value in (loss, truncate(loss, threshold), hinge_loss(x, c, u, variance)):
        assert_close(value[:2], off, rtol=0, atol=0)
        (grad,) = torch.autograd.grad(value.sum(), x, retain_graph=True)
        assert bool((grad[:2] == 0).all() and (grad[3] != 0).all())


def test_simple_weight_is_one():
    t = torch.tensor([0, 1, 999])
    assert_close(sude_weight(t, schedule(), "simple"), torch.ones(3).double(), rtol=0, atol=0)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_reference_weight_has_the_published_shape(variance_type):
    s = schedule(variance_type=variance_type)
    abar = s.alphas_cumprod
    weight = sude_weight(torch.arange(1000), s, "reference")
    assert weight[0].item() == pytest.approx(0.5 / abar[0].item(), rel=1e-12)
    assert round(weight[30].item(), 1) == 0.5
    assert round(weight[999].item(), 1) == 7.4
    assert_close(weight[100:], 1 / (2 * abar[100:].sqrt()), rtol=0.02, atol=0)
    # Where the authors multiply: eq. 7 on means, fixed_small, times 1 / c1_t.
    t = torch.tensor([1, 2, 500, 999])
    x_t, eps = normal(4, 2, 3, seed=5), world()
    means = [reverse_mean(e, x_t, t, s) for e in eps]
    c1 = abar[t - 1].sqrt() * (1 - abar[t] / abar[t - 1]) / (1 - abar[t])
    theirs = sude_loss(*means, posterior_variance(t, schedule())) / c1
    assert_close(sude_loss(*eps, 1 / (2 * weight[t])), theirs, rtol=1e-8, atol=1e-8)


def test_weights_are_float64_and_per_sample():
    t = torch.tensor([0, 3, 500, 999])
    for weighting in losses.WEIGHTINGS:
        weight = sude_weight(t, schedule(), weighting)
        assert weight.dtype == torch.float64 and weight.shape == (4,)
        parts = [sude_weight(t[i : i + 1], schedule(), weighting) for i in range(4)]
        assert_close(weight, torch.cat(parts), rtol=0, atol=0)


def test_weight_refusals():
    t = torch.tensor([2])
    with pytest.raises(ValueError, match="weighting"):
        sude_weight(t, schedule(), "paper")
    dark = Schedule(torch.tensor([0.9, 0.4, 0.0]))
    for weighting in ("exact", "reference"):
        with pytest.raises(ValueError, match="zero terminal SNR"):
            sude_weight(t, dark, weighting)
    assert sude_weight(t, dark, "simple").item() == 1


def test_every_sample_is_alone():
    x, c, u = world()

    def everything(b):
        args = (x[b], c[b], u[b], VARIANCE[b])
        loss, threshold = sude_loss(*args), sude_threshold(*args[1:])
        return torch.stack(
            [
                loss,
                threshold,
                truncate(loss, threshold),
                hinge_loss(*args),
                guidance_projection(*args[:3]),
                subject_loss(x[b], c[b]),
                class_regularizer(c[b], u[b]),
                total_loss(subject_loss(x[b], c[b]), loss, class_regularizer(c[b], u[b]), 2.0, 0.5),
            ]
        )

    whole = everything(slice(0, 4))
    parts = torch.cat([everything(slice(i, i + 1)) for i in range(4)], dim=1)
    assert whole.dtype == torch.float64
    assert_close(whole, parts, **EXACT)


def test_bfloat16_predictions_are_raised_to_float32():
    x, c, u = (v.to(torch.bfloat16) for v in world())
    assert sude_loss(x, c, u, VARIANCE).dtype == torch.float32
    assert guidance_projection(x, c, u).dtype == torch.float32
    expected = guidance_projection(x.double(), c.double(), u.double())
    assert_close(guidance_projection(x, c, u).double(), expected, rtol=1e-5, atol=1e-5)


def test_what_is_refused():
    x, c, u = world()
    with pytest.raises(ValueError, match="equal"):
        sude_loss(x, c[:1], u, VARIANCE)
    with pytest.raises(ValueError, match="equal"):
        guidance_projection(x[:1], c, u)
    with pytest.raises(ValueError, match="positive"):
        sude_loss(x, c, u, -VARIANCE)
    with pytest.raises(ValueError, match="Per-sample"):
        truncate(VARIANCE.mean(), VARIANCE.mean())
    with pytest.raises(ValueError, match="Per-sample"):
        gate(VARIANCE, VARIANCE[:1])
    with pytest.raises(ValueError, match="Per-sample"):
        total_loss(VARIANCE, VARIANCE, VARIANCE[:, None], 1.0, 1.0)


def test_what_is_not_said_is_eq_6_and_eq_9() -> None:
    t, schedule = torch.tensor([5, 500]), Schedule.from_scheduler(SD)
    assert torch.equal(sude_weight(t, schedule), sude_weight(t, schedule, "exact"))
    a = [normal(4, 3, seed=k) for k in range(3)]
    assert torch.equal(sude_move(*a, VARIANCE, 50.0), sude_move(*a, VARIANCE, 50.0, truncated=True))
    far = sude_move(*a, VARIANCE, 50.0, truncated=False)
    assert not torch.equal(sude_move(*a, VARIANCE, 50.0), far)
