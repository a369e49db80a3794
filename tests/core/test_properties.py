"""What must hold of every formula, whatever the schedule, the shape, the timestep and the values.

The tests of each room compare formulas with numbers and with other libraries; these draw hundreds
of cases (the same in every run, see `refusals.generated`) and ask for what the equations imply.
"""

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refusals import generated
from torch import Tensor
from torch.distributions import Normal
from torch.testing import assert_close

from studies.guidance_tables import summarize
from sude_lab.classifier import (
    checked_variance,
    class_log_posterior,
    class_log_ratio,
    reverse_log_prob,
    squared_distance,
)
from sude_lab.diffusion import (
    PREDICTION_TYPES,
    VARIANCE_TYPES,
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
from sude_lab.evaluate import metrics as m
from sude_lab.evaluate.statistics import Interval, drawings_interval, mean_interval
from sude_lab.losses import (
    WEIGHTINGS,
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

CLOSE: dict[str, Any] = {"rtol": 1e-7, "atol": 1e-7}
seeds = st.integers(0, 2**31 - 1)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    betas = draw(st.lists(st.floats(1e-3, 0.6), min_size=1, max_size=12))
    table = torch.cumprod(1 - torch.tensor(betas, dtype=torch.float64), 0)
    kind, variance = st.sampled_from(PREDICTION_TYPES), st.sampled_from(VARIANCE_TYPES)
    return Schedule(table, draw(kind), draw(variance))


class Case:
    """A batch of samples of one shape, of any size, in float64."""

    def __init__(self, shape: tuple[int, ...], seed: int, schedule: Schedule | None) -> None:
        self.shape, self.batch = shape, shape[0]
        self._generator = torch.Generator().manual_seed(seed)
        if schedule is not None:
            self.schedule = schedule
            self.t = torch.randint(schedule.num_timesteps, shape[:1], generator=self._generator)

    def normal(self, *shape: int) -> Tensor:
        made = torch.randn(shape or self.shape, generator=self._generator, dtype=torch.float64)
        return made * 10 ** (2 * torch.rand((), generator=self._generator).item() - 1)

    def positive(self) -> Tensor:
        return 0.05 + torch.rand(self.batch, generator=self._generator, dtype=torch.float64)

    def number(self) -> float:
        return 3 * torch.rand((), generator=self._generator).item()

    def like(self, values: Tensor) -> Tensor:
        """(B,) as (B, 1, ...)."""
        return values.reshape(-1, *[1] * (len(self.shape) - 1))

    def triple(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.normal(), self.normal(), self.normal(), self.positive()


shapes = st.lists(st.integers(1, 4), min_size=2, max_size=4).map(tuple)
samples = st.builds(Case, shapes, seeds, st.none())
noised = st.builds(Case, shapes, seeds, schedules())
many = generated(60)


# --- diffusion.py --------------------------------------------------------------------------------


@many
@given(noised)
def test_signal_falls_from_step_to_step(case: Case) -> None:
    current, previous = alpha_bars(case.t, case.schedule)
    assert ((current >= 0) & (current < previous) & (previous <= 1)).all()
    assert_close(previous == 1, case.t == 0)
    later = case.t > 0
    assert_close(alpha_bars(case.t[later] - 1, case.schedule)[0], previous[later], rtol=0, atol=0)


@many
@given(noised)
def test_noising_is_a_rotation_of_picture_and_noise(case: Case) -> None:
    """With v as the other leg, ||x_t||^2 + ||v||^2 = ||x_0||^2 + ||eps||^2."""
    x_0, eps, zero = case.normal(), case.normal(), torch.zeros(case.shape, dtype=torch.float64)
    by_v = Schedule(case.schedule.alphas_cumprod, "v_prediction")
    x_t, v = add_noise(x_0, eps, case.t, by_v), training_target(x_0, eps, case.t, by_v)
    whole = squared_distance(x_0, zero) + squared_distance(eps, zero)
    assert_close(squared_distance(x_t, zero) + squared_distance(v, zero), whole, **CLOSE)
    assert_close(add_noise(zero, zero, case.t, by_v), zero)
    abar, _ = alpha_bars(case.t, by_v)
    assert_close(squared_distance(add_noise(x_0, zero, case.t, by_v), zero),
                 abar * squared_distance(x_0, zero), **CLOSE)  # fmt: skip


@many
@given(noised)
def test_a_right_prediction_gives_picture_noise_and_mean(case: Case) -> None:
    x_0, eps, schedule = case.normal(), case.normal(), case.schedule
    x_t = add_noise(x_0, eps, case.t, schedule)
    output = training_target(x_0, eps, case.t, schedule)
    size = float(x_0.abs().max() + eps.abs().max())
    near = {"rtol": 1e-7, "atol": 1e-8 * size / float(schedule.alphas_cumprod[-1])}
    assert_close(to_x_0(output, x_t, case.t, schedule), x_0, **near)
    assert_close(to_eps(output, x_t, case.t, schedule), eps, **near)
    mean = posterior_mean(x_t, x_0, case.t, schedule)
    assert_close(reverse_mean(output, x_t, case.t, schedule), mean, **near)


@many
@given(noised)
def test_any_prediction_splits_x_t_into_its_picture_and_its_noise(case: Case) -> None:
    """Whatever a network says: noising its picture with its noise gives x_t back."""
    x_t, output, schedule = case.normal(), case.normal(), case.schedule
    x_0, eps = (f(output, x_t, case.t, schedule) for f in (to_x_0, to_eps))
    size = max(1.0, float(x_0.abs().max()), float(eps.abs().max()))
    assert_close(add_noise(x_0, eps, case.t, schedule), x_t, rtol=0, atol=1e-10 * size)


@many
@given(noised)
def test_the_mean_of_a_mixture_of_predictions_is_the_mixture_of_their_means(case: Case) -> None:
    """At one x_t the mean is an affine map of the prediction: guidance may be done in either."""
    x_t, a, b = case.normal(), case.normal(), case.normal()
    w = 4 * case.number() - 4
    mean_a, mean_b, mixed = (
        reverse_mean(output, x_t, case.t, case.schedule) for output in (a, b, w * a + (1 - w) * b)
    )
    size = 1 + float(mean_a.abs().max() + mean_b.abs().max())
    assert_close(mixed, w * mean_a + (1 - w) * mean_b, rtol=0, atol=1e-9 * size)


@many
@given(noised)
def test_the_posterior_is_bayes_of_its_two_gaussians(case: Case) -> None:
    """Precisions add: of the prior N(sqrt(abar') x_0, 1 - abar') and of the step to x_t."""
    schedule, later = Schedule(case.schedule.alphas_cumprod), case.t > 0
    x_0, x_t = case.normal(), case.normal()
    mean = posterior_mean(x_t, x_0, case.t, schedule)
    variance = posterior_variance(case.t, schedule)
    assert_close(mean[~later], x_0[~later], rtol=1e-12, atol=1e-12)
    assert (variance[~later] == 0).all() and (variance[later] > 0).all()
    abar, previous = (v[later] for v in alpha_bars(case.t, schedule))
    alpha = abar / previous
    precision = 1 / (1 - previous) + alpha / (1 - alpha)
    assert_close(variance[later], 1 / precision, **CLOSE)
    of_x_0 = case.like(previous.sqrt() / (1 - previous) / precision)
    of_x_t = case.like(alpha.sqrt() / (1 - alpha) / precision)
    expected = of_x_0 * x_0[later] + of_x_t * x_t[later]
    assert_close(mean[later], expected, **CLOSE)


@many
@given(noised)
def test_the_larger_variance_is_the_noise_that_the_step_adds(case: Case) -> None:
    small, large = (
        posterior_variance(case.t, Schedule(case.schedule.alphas_cumprod, variance_type=kind))
        for kind in VARIANCE_TYPES
    )
    assert ((small >= 0) & (small < large) & (large < 1)).all()
    abar, previous = alpha_bars(case.t, case.schedule)
    assert_close(large * previous + abar, previous, **CLOSE)


# --- classifier.py -------------------------------------------------------------------------------


@many
@given(samples)
def test_the_log_density_is_torchs(case: Case) -> None:
    x, mean, variance = case.normal(), case.normal(), case.positive()
    deviation = case.like(variance.sqrt()).expand(case.shape)
    expected = Normal(mean, deviation).log_prob(x).flatten(1).sum(1)
    assert_close(reverse_log_prob(x, mean, variance), expected, **CLOSE)


@many
@given(samples)
def test_log_ratios_are_differences_of_log_densities_and_add_up(case: Case) -> None:
    x, a, b, variance = case.triple()
    c = case.normal()
    of = {
        name: reverse_log_prob(x, mean, variance)
        for name, mean in zip("abc", (a, b, c), strict=True)
    }
    ratio = class_log_ratio(x, a, b, variance)
    size = 1 + float(sum(v.abs().max() for v in of.values()))
    assert_close(ratio, of["a"] - of["b"], rtol=0, atol=1e-10 * size)
    assert_close(ratio, -class_log_ratio(x, b, a, variance), rtol=0, atol=0)
    chain = class_log_ratio(x, a, c, variance) + class_log_ratio(x, c, b, variance)
    assert_close(ratio, chain, rtol=0, atol=1e-10 * size)
    assert (class_log_ratio(a, a, b, variance) >= 0).all()  # nothing is nearer to a than a


@many
@given(samples, st.integers(1, 5), st.booleans())
def test_the_posterior_is_a_distribution_over_the_prompts(case: Case, k: int, own: bool) -> None:
    x, variance = case.normal(), case.positive()
    means = case.normal(case.batch, k, *case.shape[1:])
    prior = case.normal(case.batch, k) if own else case.normal(k)
    log_p = class_log_posterior(x, means, variance, prior)
    assert_close(log_p.exp().sum(1), torch.ones(case.batch, dtype=torch.float64), **CLOSE)
    assert_close(class_log_posterior(x, means, variance, prior + 7), log_p, rtol=1e-9, atol=1e-8)
    order = torch.arange(k).flip(0)
    turned = class_log_posterior(x, means[:, order], variance, prior[..., order])
    assert_close(turned, log_p[:, order], rtol=1e-9, atol=1e-9)
    even = class_log_posterior(x, means, variance)
    beforehand = torch.log_softmax(even + prior, dim=1)  # Bayes: what was known is added
    assert_close(log_p, beforehand, rtol=1e-8, atol=1e-8)
    for j in range(k):  # the odds of two prompts are their ratio, whoever else is asked
        pair = class_log_ratio(x, means[:, j], means[:, 0], variance)
        size = 1 + float(pair.abs().max() + even.abs().max())
        assert_close(even[:, j] - even[:, 0], pair, rtol=0, atol=1e-10 * size)


@many
@given(samples)
def test_distances_are_those_of_a_norm(case: Case) -> None:
    a, b, c, variance = case.triple()
    ab, bc, ac = (squared_distance(*pair).sqrt() for pair in ((a, b), (b, c), (a, c)))
    assert (squared_distance(a, a) == 0).all() and (ab <= ac + bc + 1e-9).all()
    assert_close(squared_distance(b, a), ab**2, **CLOSE)
    assert_close(squared_distance(3 * a, 3 * b), 9 * ab**2, **CLOSE)
    assert_close(squared_distance(a + c, b + c), ab**2, rtol=1e-6, atol=1e-6)
    assert checked_variance(variance, a.half()).dtype == torch.float32
    with pytest.raises(ValueError, match="positive"):
        checked_variance(variance - variance[0], a)


# --- losses.py -----------------------------------------------------------------------------------


def gradient_of(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), x)[0]


@many
@given(samples)
def test_sude_is_what_the_classifier_says_with_the_sign_turned(case: Case) -> None:
    """Eq. 7 is affine in the subject, and eq. 8 is its value at the category."""
    x, category, uncond, variance = case.triple()
    loss = sude_loss(x, category, uncond, variance)
    assert_close(loss, -class_log_ratio(x, category, uncond, variance), rtol=0, atol=0)
    other, w = case.normal(), case.number()
    mixed = sude_loss(w * x + (1 - w) * other, category, uncond, variance)
    both = w * loss + (1 - w) * sude_loss(other, category, uncond, variance)
    size = 1 + float(sum(squared_distance(v, category).max() for v in (x, other, uncond)))
    near = {"rtol": 0, "atol": 1e-7 * size / float(variance.min())}
    assert_close(mixed, both, **near)
    tau = sude_threshold(category, uncond, variance)
    assert (tau <= 0).all()
    assert_close(sude_loss(category, category, uncond, variance), tau, rtol=0, atol=0)
    assert_close(sude_loss(uncond, category, uncond, variance), -tau, **near)
    x.requires_grad_()
    push = gradient_of(sude_loss(x, category, uncond, variance), x)
    assert_close(push, -(category - uncond) / case.like(variance), rtol=1e-6, atol=near["atol"])


@many
@given(samples)
def test_the_gate_is_open_where_the_subject_has_gone_less_far_than_its_category(case: Case) -> None:
    x, category, uncond, variance = case.triple()
    loss = sude_loss(x, category, uncond, variance)
    tau = sude_threshold(category, uncond, variance)
    rho = guidance_projection(x, category, uncond)
    length = squared_distance(category, uncond)
    size = 1 + float(loss.abs().max() + tau.abs().max())
    assert_close(loss - tau, length * (1 - rho) / variance, rtol=1e-7, atol=1e-9 * size)
    clear = (1 - rho).abs() > 1e-6
    is_open = gate(loss, tau)
    assert_close(is_open[clear], (rho < 1)[clear])
    kept = truncate(loss, tau)
    assert_close(kept, torch.where(is_open, loss, torch.zeros_like(loss)), rtol=0, atol=0)
    hinge = hinge_loss(x, category, uncond, variance)
    assert (hinge >= 0).all()
    expected = torch.relu(loss - tau)
    assert_close(hinge[clear], expected[clear], rtol=1e-7, atol=1e-9 * size)


@many
@given(samples)
def test_truncation_and_hinge_push_alike(case: Case) -> None:
    x, category, uncond, variance = case.triple()
    x.requires_grad_()
    rho = guidance_projection(x, category, uncond)
    loss, tau = sude_loss(x, category, uncond, variance), sude_threshold(category, uncond, variance)
    pushes = [
        gradient_of(truncate(loss, tau), x),
        gradient_of(hinge_loss(x, category, uncond, variance), x),
    ]
    clear = (1 - rho).abs() > 1e-6
    size = 1 + float(pushes[1].abs().max())
    assert_close(pushes[0][clear], pushes[1][clear], rtol=1e-6, atol=1e-6 * size)
    shut = clear & (rho > 1)
    assert (pushes[0][shut] == 0).all() and (pushes[1][shut] == 0).all()


@many
@given(samples)
def test_rho_reads_the_place_on_the_way_from_no_prompt_to_the_category(case: Case) -> None:
    """Steps across the way do not count, and neither origin nor unit matters."""
    across, category, uncond, _ = case.triple()
    d = category - uncond
    length = case.like(squared_distance(category, uncond)).clamp_min(1e-300)
    far = case.number() - 1
    beside = across - case.like((across * d).flatten(1).sum(1)) / length * d
    x = uncond + far * d + beside
    # Digits are lost where the way is short beside what stands across it.
    size = float(((beside**2).flatten(1).sum(1) / length.flatten()).max().sqrt()) + 1
    size += float(((uncond**2).flatten(1).sum(1) / length.flatten()).max().sqrt())
    near = {"rtol": 0, "atol": 1e-10 * size}
    one = torch.ones(case.batch, dtype=torch.float64)
    assert_close(guidance_projection(x, category, uncond), far * one, **near)
    moved = [2.5 * v + across for v in (x, category, uncond)]
    assert_close(guidance_projection(*moved), far * one, rtol=0, atol=1e-7 * size)
    assert_close(guidance_projection(x, uncond, uncond), one, rtol=0, atol=0)


@many
@given(samples, st.booleans())
def test_no_other_move_costs_less_than_the_move(case: Case, truncated: bool) -> None:
    x, category, uncond, variance = case.triple()
    weight, d = case.number(), category - uncond
    length = squared_distance(category, uncond)

    def cost(s: Tensor) -> Tensor:
        there = x + case.like(s) * d
        pull = hinge_loss if truncated else sude_loss
        return s**2 * length + weight * pull(there, category, uncond, variance)

    best = sude_move(x, category, uncond, variance, weight, truncated=truncated)
    assert (best >= 0).all()
    lowest = cost(best)
    for step in (-1.0, -0.1, -0.01, 0.01, 0.1, 1.0):
        assert (cost(best + step) >= lowest - 1e-8 * (1 + lowest.abs())).all()


@many
@given(noised)
def test_rho_is_one_number_in_eps_in_x_0_in_v_and_in_the_mean(case: Case) -> None:
    schedule, x_t = case.schedule, case.normal()
    outputs = [case.normal() for _ in range(3)]
    expected = guidance_projection(*outputs)
    apart = squared_distance(outputs[1], outputs[2]).min().item()
    for change in (to_eps, to_x_0, reverse_mean):
        there = [change(output, x_t, case.t, schedule) for output in outputs]
        size = 1 + max(float(v.abs().max()) for v in there)
        near = {"rtol": 1e-6, "atol": 1e-6 * size / min(1.0, apart)}
        # At t = 0 the mean is x_0; everywhere else a multiple of it, and a shift.
        if float(squared_distance(there[1], there[2]).min()) > 1e-12:
            assert_close(guidance_projection(*there), expected, **near)


@many
@given(noised)
def test_the_exact_weight_is_eq_7_of_the_means_in_eps(case: Case) -> None:
    table, variance_type = case.schedule.alphas_cumprod, case.schedule.variance_type
    schedule = Schedule(table, "epsilon", variance_type)
    x_t, subject, category, uncond = (case.normal() for _ in range(4))
    variance = posterior_variance(case.t, schedule)
    defined = variance > 0  # not at t = 0 of fixed_small, where the weight is 0
    weight = sude_weight(case.t, schedule)
    assert (weight[~defined] == 0).all() and (weight[defined] > 0).all()
    means = [
        reverse_mean(eps, x_t, case.t, schedule)[defined] for eps in (subject, category, uncond)
    ]
    in_eps = sude_loss(subject, category, uncond, 1 / (2 * weight))
    assert (in_eps[~defined] == 0).all()
    size = float(
        squared_distance(subject, category).max() + squared_distance(subject, uncond).max()
    )
    near = {"rtol": 1e-5, "atol": 1e-5 * size * (1 + float(weight.max()))}
    if bool(defined.any()):
        assert_close(in_eps[defined], sude_loss(*means, variance[defined]), **near)


@many
@given(noised, st.sampled_from(WEIGHTINGS))
def test_weights_are_finite_and_never_push_away(case: Case, weighting: str) -> None:
    weight = sude_weight(case.t, case.schedule, weighting)
    assert weight.dtype == torch.float64 and weight.shape == case.t.shape
    assert ((weight >= 0) & weight.isfinite()).all()
    if weighting == "simple":
        assert (weight == 1).all()
    if weighting == "reference":  # whatever the variance of the schedule is
        table = case.schedule.alphas_cumprod
        for kind in VARIANCE_TYPES:
            other = sude_weight(case.t, Schedule(table, variance_type=kind), weighting)
            assert_close(other, weight, rtol=0, atol=0)
        abar, previous = alpha_bars(case.t, case.schedule)
        larger = torch.where(case.t == 0, torch.ones_like(abar), (1 - abar) / (1 - previous))
        expected = larger * previous.sqrt() / (2 * abar)
        assert_close(weight, expected, rtol=1e-6, atol=1e-9)


@many
@given(samples)
def test_the_objective_is_the_weighted_sum_of_losses_that_are_never_negative(case: Case) -> None:
    a, b, c, _ = case.triple()
    first, last = subject_loss(a, b), class_regularizer(a, c)
    assert (first >= 0).all() and (last >= 0).all() and (class_regularizer(c, c) == 0).all()
    assert_close(first, (a - b).flatten(1).norm(dim=1) ** 2, **CLOSE)
    assert_close(last, squared_distance(a, c), rtol=0, atol=0)
    middle, w_s, w_r = case.normal(case.batch), case.number(), case.number()
    total = total_loss(first, middle, last, w_s, w_r)
    assert_close(total, first + w_s * middle + w_r * last, **CLOSE)
    assert_close(total_loss(first, middle, last, 0.0, 0.0), first, rtol=0, atol=0)
    a.requires_grad_()
    assert_close(gradient_of(class_regularizer(a, c), a), 2 * (a.detach() - c), **CLOSE)
    c.requires_grad_()
    with pytest.raises(RuntimeError, match="in the graph"):
        gradient_of(class_regularizer(a, c), c)


# --- metrics.py ----------------------------------------------------------------------------------


def array(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


@many
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 8), seeds)
def test_similarities_know_directions_alone(n: int, k: int, dim: int, seed: int) -> None:
    a, b = array(seed, n, dim), array(seed + 1, k, dim)
    table = m.cosines(a, b)
    assert table.shape == (n, k) and (np.abs(table) <= 1 + 1e-12).all()
    lengths = 0.1 + np.abs(array(seed + 2, n, 1))
    np.testing.assert_allclose(m.cosines(lengths * a, 3 * b), table, atol=1e-12)
    np.testing.assert_allclose(m.cosines(-a, b), -table, atol=1e-12)
    np.testing.assert_allclose(m.cosines(b, a), table.T, atol=1e-12)
    np.testing.assert_allclose(np.diag(m.cosines(a, a)), 1)
    np.testing.assert_allclose(m.image_similarity(a, b), table.mean(1))
    texts = array(seed + 3, n, dim)
    np.testing.assert_allclose(m.text_similarity(a, texts), np.diag(m.cosines(a, texts)))


@many
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12), seeds, st.floats(0.1, 10))
def test_an_interval_holds_its_mean_and_moves_with_the_values(
    values: list[float], seed: int, scale: float
) -> None:
    x, few = np.array(values), {"resamples": 200, "seed": seed}
    near = {"rtol": 1e-9, "atol": 1e-9 * (1 + np.abs(x).max()) * scale}
    nothing = np.zeros(len(x))

    def of_drawings(y: np.ndarray, level: float = 0.95) -> Interval:
        return drawings_interval(y, np.arange(len(y)), nothing, level=level, **few)

    for rule in (mean_interval, of_drawings):
        interval = rule(x)
        ends = np.array([interval.low, interval.high])
        assert ends[0] - 1e-9 <= ends[1]
        moved, mirrored = rule(scale * x + 5), rule(-x)
        np.testing.assert_allclose([moved.low, moved.high], scale * ends + 5, **near)
        np.testing.assert_allclose([mirrored.low, mirrored.high], -ends[::-1], **near)
    drawn, narrow, subjects = of_drawings(x), of_drawings(x, level=0.5), mean_interval(x)
    assert drawn.low - 1e-9 <= narrow.low <= narrow.high + 1e-9 <= drawn.high + 2e-9
    assert x.min() - 1e-9 <= drawn.low <= drawn.high <= x.max() + 1e-9
    assert subjects.low - 1e-9 <= x.mean() <= subjects.high + 1e-9
    twice = mean_interval(np.repeat(x, 3), np.repeat(np.arange(len(x)), 3))
    np.testing.assert_allclose([twice.low, twice.high], [subjects.low, subjects.high], **near)


@st.composite
def results(draw: st.DrawFn) -> pd.DataFrame:
    """A row a picture: some subjects, seeds and attributes, plain and with SuDe; holes in it."""
    subjects, runs = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(seeds))
    rows = [
        {"subject": f"s{who}", "category": "dog", "method": "dreambooth", "variant": variant,
         "seed": seed, "attribute": attribute}
        for who in range(subjects)
        for seed in range(runs)
        for variant in ("plain", "sude")
        for attribute in ("", "running", "red")
        if attribute != "running" or rng.random() < 0.9
    ]  # fmt: skip
    table = pd.DataFrame(rows)
    for name in m.MEASURES:
        table[name] = rng.random(len(table))
    return table


@many
@given(results(), st.floats(-0.5, 0.5), seeds)
def test_gains_are_differences_of_means_whatever_the_order_of_the_rows(
    table: pd.DataFrame, shift: float, seed: int
) -> None:
    """Every run has its partner here, so the mean gain is the difference of the means."""
    told = summarize(table).set_index("variant")
    asked = table[table["attribute"] != ""]
    assert len(m.per_run(table)) == len(asked.drop_duplicates(["subject", "seed", "variant"]))
    for name in m.MEASURES:
        gain = told.loc["sude", name] - told.loc["plain", name]
        assert told.loc["sude", f"{name}_gain"] == pytest.approx(gain, abs=1e-12)
        if table["subject"].nunique() > 1:
            low, high = told.loc["sude", [f"{name}_low", f"{name}_high"]]
            assert low - 1e-12 <= high
    mixed = table.sample(frac=1, random_state=seed % 2**31)
    again = summarize(mixed).set_index("variant")
    for name in m.MEASURES:
        assert again.loc["sude", f"{name}_gain"] == pytest.approx(
            told.loc["sude", f"{name}_gain"], abs=1e-12
        )
    raised = table.assign(
        **{n: table[n] + shift * (table["variant"] == "sude") for n in m.MEASURES}
    )
    moved = m.gains(raised[raised["attribute"] != ""]).set_index(["variant", "measure"])
    for name in m.MEASURES:
        assert moved.loc[("sude", name), "gain"] == pytest.approx(
            told.loc["sude", f"{name}_gain"] + shift, abs=1e-9
        )
        assert math.isnan(moved.loc[("plain", name), "gain"])


@st.composite
def evaluations(draw: st.DrawFn) -> pd.DataFrame:
    """A row a picture and metric, of runs that were asked the same."""
    subjects, runs, prompts, pictures = (draw(st.integers(1, 3)) for _ in range(4))
    rng = np.random.default_rng(draw(seeds))
    rows = [
        {"run": f"{who}-{tuning}-{variant}", "settings": "dreambooth", "variant": variant,
         "subject": f"s{who}", "tuning_seed": tuning, "number": number, "kind": "attribute",
         "caption": f"c{number}", "seed": 0, "picture": picture, "metric": metric,
         "value": rng.random()}
        for who in range(subjects)
        for tuning in range(runs)
        for variant in ("plain", "SuDe")
        for number in range(prompts)
        for picture in range(pictures)
        for metric in ("CLIP-T", "attribute_alignment")
    ]  # fmt: skip
    return pd.DataFrame(rows)


@many
@given(evaluations(), st.floats(-0.5, 0.5))
def test_comparisons_are_of_pairs_and_move_with_one_side(
    scores: pd.DataFrame, shift: float
) -> None:
    keys = ["variant", "metric"]
    told = m.compare(scores).set_index(keys)
    moved = scores.assign(value=scores["value"] + shift * (scores["variant"] == "SuDe"))
    after = m.compare(moved).set_index(keys)
    for metric in scores["metric"].unique():
        mine, base = told.loc[("SuDe", metric)], told.loc[("plain", metric)]
        assert mine["pairs"] == mine["pictures"] == base["pictures"]
        assert mine["difference"] == pytest.approx(mine["mean"] - base["mean"], abs=1e-12)
        assert math.isnan(base["difference"])
        for name in ("difference", "difference_low", "difference_high"):
            expected = pytest.approx(mine[name] + shift, abs=1e-9, nan_ok=True)
            assert after.loc[("SuDe", metric), name] == expected
    several = scores["subject"].nunique() > 1
    assert told["over"].str.contains("subjects").all() == several
