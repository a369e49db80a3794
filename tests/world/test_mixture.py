"""The exact world, against quadrature, autograd, Bayes' rule and torch.distributions."""

import pytest
import torch
from diffusers import DDPMScheduler
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from torch.testing import assert_close

from sude_lab.diffusion import Schedule, add_noise, posterior_mean, posterior_variance
from sude_lab.world.mixture import GaussianMixture, implicit_classifier_error

pytestmark = pytest.mark.quick

EXACT = {"rtol": 1e-10, "atol": 1e-10}
SCHEDULE = Schedule.from_scheduler(
    DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
)
T = torch.tensor([0, 1, 300, 999])


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixture(dimensions=3):
    """Five components in three classes; classes 0 and 1 are themselves mixtures."""
    return GaussianMixture(
        weights=torch.tensor([0.1, 0.3, 0.2, 0.15, 0.25], dtype=torch.float64),
        means=normal(5, dimensions, seed=7),
        variances=torch.tensor([0.2, 0.05, 0.5, 0.1, 0.3], dtype=torch.float64),
        labels=torch.tensor([0, 0, 1, 1, 2]),
    )


def marginal(world, abar, label):
    """p(x_t | c) as torch.distributions would write it, for one abar."""
    keep = torch.ones(5, dtype=torch.bool) if label is None else world.labels == label
    std = (abar * world.variances[keep] + 1 - abar).sqrt()[:, None].expand_as(world.means[keep])
    components = Independent(Normal(abar.sqrt() * world.means[keep], std), 1)
    return MixtureSameFamily(Categorical(world.weights[keep]), components)


@pytest.mark.parametrize("label", [None, 0, 1, 2])
def test_log_prob_is_the_noised_mixture(label):
    world, x = mixture(), normal(4, 3)
    expected = torch.stack(
        [marginal(world, SCHEDULE.alphas_cumprod[t], label).log_prob(x[i]) for i, t in enumerate(T)]
    )
    assert_close(world.log_prob(x, T, SCHEDULE, label), expected, **EXACT)


@pytest.mark.parametrize("label", [None, 0, 2])
def test_eps_is_the_score(label):
    """Tweedie by autograd: E[eps | x_t, c] = -sqrt(1 - abar_t) grad log p(x_t | c)."""
    world, x = mixture(), normal(4, 3).requires_grad_()
    (score,) = torch.autograd.grad(world.log_prob(x, T, SCHEDULE, label).sum(), x)
    noise = (1 - SCHEDULE.alphas_cumprod[T]).sqrt()[:, None]
    assert_close(world.eps(x, T, SCHEDULE, label), -noise * score, **EXACT)


@pytest.mark.parametrize("label", [None, 0, 2])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_x_0_mean_by_quadrature(label, prediction_type):
    """E[x_0 | x_t, c] in one dimension, integrated; what the network predicts is no matter."""
    world, x = mixture(1), normal(4, 1)
    schedule = Schedule(SCHEDULE.alphas_cumprod, prediction_type)
    keep = torch.ones(5, dtype=torch.bool) if label is None else world.labels == label
    grid = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
    prior = sum(
        w * Normal(m, v.sqrt()).log_prob(grid).exp()
        for w, m, v in zip(
            world.weights[keep], world.means[keep, 0], world.variances[keep], strict=True
        )
    )
    expected = []
    for i, t in enumerate(T):
        abar = SCHEDULE.alphas_cumprod[t]
        likelihood = Normal(abar.sqrt() * grid, (1 - abar).sqrt()).log_prob(x[i]).exp()
        expected.append((grid * prior * likelihood).sum() / (prior * likelihood).sum())
    actual = world.x_0_mean(x, T, schedule, label)[:, 0]
    assert_close(actual, torch.stack(expected), **EXACT)


def test_class_posteriors_are_bayes():
    world, x = mixture(), normal(4, 3)
    prior = torch.tensor([0.4, 0.35, 0.25], dtype=torch.float64)
    for abars, actual in (
        (SCHEDULE.alphas_cumprod[T], world.class_log_posterior(x, T, SCHEDULE)),
        (
            torch.cat([torch.ones(1, dtype=torch.float64), SCHEDULE.alphas_cumprod[T[1:] - 1]]),
            world.class_log_posterior_prev(x, T, SCHEDULE),
        ),
    ):
        joint = torch.stack(
            [
                torch.stack([marginal(world, a, c).log_prob(x[i]) for c in range(3)]) + prior.log()
                for i, a in enumerate(abars)
            ]
        )
        assert_close(actual, joint - joint.logsumexp(1, keepdim=True), **EXACT)


@pytest.mark.parametrize("label", [None, 0, 2])
def test_reverse_step_is_bayes(label):
    """p(x_{t-1}|x_t,c) = q(x_t|x_{t-1}) p(x_{t-1}|c) / p(x_t|c): no DDPM formula in the oracle."""
    world, x_t = mixture(), normal(4, 3)
    t = torch.tensor([1, 2, 300, 999])
    x_prev = x_t + 0.1 * normal(4, 3, seed=1)
    alpha = SCHEDULE.alphas_cumprod[t] / SCHEDULE.alphas_cumprod[t - 1]
    forward = Normal(alpha.sqrt()[:, None] * x_prev, (1 - alpha).sqrt()[:, None].expand(4, 3))
    expected = (
        forward.log_prob(x_t).sum(1)
        + world.log_prob(x_prev, t - 1, SCHEDULE, label)
        - world.log_prob(x_t, t, SCHEDULE, label)
    )
    actual = world.reverse_log_prob_exact(x_prev, x_t, t, SCHEDULE, label)
    assert_close(actual, expected, **EXACT)


def test_the_truth_knows_nothing_of_the_network_s_types():
    """What a network predicts, and which variance one samples with, change no exact quantity."""
    world, x_t = mixture(), normal(4, 3)
    x_prev, t = x_t + 0.1 * normal(4, 3, seed=1), torch.tensor([1, 2, 300, 999])
    other = Schedule(SCHEDULE.alphas_cumprod, "v_prediction", "fixed_large")
    for exact in (world.eps, world.x_0_mean, world.reverse_mean_exact):
        assert_close(exact(x_t, t, other), exact(x_t, t, SCHEDULE), rtol=0, atol=0)
    steps = [world.reverse_log_prob_exact(x_prev, x_t, t, s) for s in (other, SCHEDULE)]
    assert_close(*steps, rtol=0, atol=0)


@pytest.mark.parametrize("t", [0, 1, 300, 999])
@pytest.mark.parametrize("label", [None, 0])
def test_reverse_step_is_a_density_with_the_exact_mean(t, label):
    world = mixture(1)
    grid = torch.linspace(-12, 12, 10_001, dtype=torch.float64)
    ts, x_t = torch.full((len(grid),), t), torch.full((len(grid), 1), 0.4, dtype=torch.float64)
    log_prob = world.reverse_log_prob_exact(grid[:, None], x_t, ts, SCHEDULE, label)
    one = torch.tensor(1.0, dtype=torch.float64)
    assert_close(torch.trapezoid(log_prob.exp(), grid), one, **EXACT)
    mean = world.reverse_mean_exact(x_t[:1], ts[:1], SCHEDULE, label)[0, 0]
    assert_close(torch.trapezoid(grid * log_prob.exp(), grid), mean, **EXACT)


def test_a_long_step_of_a_mixed_class_is_not_gaussian():
    """Where eq. 6 fails: from deep noise in a single step, class 0's two components show."""
    world = GaussianMixture(
        weights=torch.tensor([0.5, 0.5], dtype=torch.float64),
        means=torch.tensor([[-2.0], [2.0]], dtype=torch.float64),
        variances=torch.tensor([0.01, 0.01], dtype=torch.float64),
        labels=torch.tensor([0, 0]),
    )
    long = Schedule(torch.tensor([0.9, 0.01]))
    x_t, t = torch.zeros(1, 1, dtype=torch.float64), torch.tensor([1])
    mean = world.reverse_mean_exact(x_t, t, long, 0)
    between = world.reverse_log_prob_exact(mean, x_t, t, long, 0)
    at_a_mode = world.reverse_log_prob_exact(mean + 2 * 0.9**0.5, x_t, t, long, 0)
    assert_close(mean, torch.zeros_like(mean), **EXACT)
    assert at_a_mode.item() - between.item() > 10  # the mean of eq. 6 is where there is no mass


def implicit_errors(variance_type):
    """Mean |error| and mean |signal| of eq. 5-6 for finer and finer steps at the same noise."""
    world, x_t, noise = mixture(), normal(500, 3), normal(500, 3, seed=1)
    rows = []
    for steps in (25, 50, 100, 200, 400, 800, 1600, 3200):
        time = torch.arange(1, steps + 1, dtype=torch.float64) / steps
        schedule = Schedule((-4 * time**2).exp(), variance_type=variance_type)
        t = torch.full((500,), int(0.4 * steps) - 1)  # time 0.4: abar = 0.53 for every `steps`
        std = posterior_variance(t, schedule).sqrt()[:, None]
        x_prev = world.reverse_mean_exact(x_t, t, schedule) + std * noise
        error = implicit_classifier_error(world, x_prev, x_t, t, schedule, label=0)
        signal = (
            world.class_log_posterior_prev(x_prev, t, schedule)
            - world.class_log_posterior(x_t, t, schedule)
        )[:, 0]
        rows.append((steps, error.abs().mean().item(), signal.abs().mean().item()))
    return rows


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_the_gaussian_of_eq_6_becomes_exact_as_steps_shrink(variance_type):
    rows = implicit_errors(variance_type)
    for steps, error, signal in rows:
        print(f"{variance_type}: T={steps:5d}  |error|={error:.2e}  |signal|={signal:.2e}")
    errors = torch.tensor([row[1] for row in rows])
    signals = torch.tensor([row[2] for row in rows])
    assert bool((errors.diff() < 0).all())
    # Halving the step halves the error (rate 1) and divides the signal by sqrt 2 (rate 1/2).
    rates = torch.log2(errors[:-1] / errors[1:])
    signal_rates = torch.log2(signals[:-1] / signals[1:])
    print(f"{variance_type}: rates {rates.tolist()}, of the signal {signal_rates.tolist()}")
    assert_close(rates[3:], torch.ones(4), rtol=0, atol=0.05)
    assert_close(signal_rates[3:], torch.full((4,), 0.5), rtol=0, atol=0.05)
    assert bool(((errors / signals).diff() < 0).all())


def test_one_gaussian_a_class_with_one_width_still_has_the_error_of_the_marginal():
    """Eq. 5's denominator p(x_{t-1}|x_t) stays a mixture, whatever the classes are."""
    world = GaussianMixture(
        weights=torch.tensor([0.5, 0.5], dtype=torch.float64),
        means=torch.tensor([[-1.0], [1.0]], dtype=torch.float64),
        variances=torch.tensor([0.1, 0.1], dtype=torch.float64),
        labels=torch.tensor([0, 1]),
    )
    x_t, t = normal(4, 1), torch.tensor([300, 400, 500, 600])
    x_prev = world.reverse_mean_exact(x_t, t, SCHEDULE)
    error = implicit_classifier_error(world, x_prev, x_t, t, SCHEDULE, label=1)
    assert bool((error.abs() > 1e-8).all() and (error.abs() < 1e-2).all())


def test_one_component_has_nothing_to_classify():
    world = GaussianMixture(
        weights=torch.ones(1, dtype=torch.float64),
        means=normal(1, 3),
        variances=torch.ones(1, dtype=torch.float64),
        labels=torch.zeros(1, dtype=torch.long),
    )
    t, zeros = torch.tensor([1, 2, 300, 999]), torch.zeros(4, dtype=torch.float64)
    x_prev, x_t = normal(4, 3), normal(4, 3, seed=1)
    error = implicit_classifier_error(world, x_prev, x_t, t, SCHEDULE, label=0)
    assert_close(error, zeros, rtol=0, atol=0)


def test_restrict_conditions_one_after_another():
    world = mixture()
    a = torch.tensor([True, True, True, False, False])
    b = torch.tensor([False, True, True, True, False])
    both = world.restrict(a).restrict(b)
    expected = torch.tensor([0.0, 0.6, 0.4, 0.0, 0.0], dtype=torch.float64)
    assert_close(both.weights, expected, **EXACT)
    assert_close(both.weights, world.restrict(a & b).weights, **EXACT)
    log_posterior = world.restrict(a).class_log_posterior(normal(4, 3), T, SCHEDULE)
    assert bool((log_posterior[:, 2] == -torch.inf).all())
    assert_close(log_posterior.exp().sum(1), torch.ones(4, dtype=torch.float64), **EXACT)


def test_sample_has_the_mixture_s_moments():
    world, generator = mixture(), torch.Generator().manual_seed(0)
    n = 200_000
    x_0, labels = world.sample(n, generator)
    assert x_0.dtype == torch.float64 and x_0.shape == (n, 3) and labels.shape == (n,)
    share = torch.bincount(labels, minlength=3).double() / n
    # Monte Carlo: five standard errors, 5 * sqrt(0.25 / n) and 5 * sd / sqrt(n).
    expected = torch.tensor([0.4, 0.35, 0.25], dtype=torch.float64)
    assert_close(share, expected, rtol=0, atol=5 * (0.25 / n) ** 0.5)
    mean = (world.weights[:, None] * world.means).sum(0)
    within = (world.weights * world.variances).sum()
    variance = within + (world.weights[:, None] * (world.means - mean) ** 2).sum(0)
    error = 5 * (variance.max().item() / n) ** 0.5
    assert_close(x_0.mean(0), mean, rtol=0, atol=error)
    assert_close(x_0.var(0), variance, rtol=0.02, atol=0)
    again, _ = world.sample(n, torch.Generator().manual_seed(0))
    assert_close(again, x_0, rtol=0, atol=0)
    _, only = world.sample(100, generator, label=1)
    assert bool((only == 1).all())


def test_a_perfect_network_removes_the_noise_on_average():
    """E[eps | x_t, c] is the regression of the noise that eq. 1 added: no better linear fix."""
    world, generator = mixture(), torch.Generator().manual_seed(1)
    n = 100_000
    x_0, _ = world.sample(n, generator, label=0)
    eps = torch.randn((n, 3), generator=generator, dtype=torch.float64)
    t = torch.full((n,), 300)
    x_t = add_noise(x_0, eps, t, SCHEDULE)
    residual = eps - world.eps(x_t, t, SCHEDULE, 0)
    for feature in (torch.ones(n, 1), x_t, x_t.square(), torch.tanh(2 * x_t)):
        product = residual * feature
        error = product.std(0) / n**0.5
        assert bool((product.mean(0).abs() < 5 * error).all())


def test_every_sample_is_alone():
    world, x_t = mixture(), normal(4, 3)
    x_prev, t = x_t + 0.1 * normal(4, 3, seed=1), torch.tensor([1, 2, 300, 999])

    def everything(b):
        x, y, s = x_t[b], x_prev[b], t[b]
        return torch.cat(
            [
                world.eps(x, s, SCHEDULE, 1),
                world.x_0_mean(x, s, SCHEDULE),
                world.reverse_mean_exact(x, s, SCHEDULE, 0),
                world.class_log_posterior(x, s, SCHEDULE),
                world.class_log_posterior_prev(y, s, SCHEDULE),
                world.log_prob(x, s, SCHEDULE, 0)[:, None],
                world.reverse_log_prob_exact(y, x, s, SCHEDULE, 1)[:, None],
                implicit_classifier_error(world, y, x, s, SCHEDULE, 0)[:, None],
            ],
            dim=1,
        )

    parts = torch.cat([everything(slice(i, i + 1)) for i in range(4)])
    assert parts.dtype == torch.float64
    assert_close(everything(slice(0, 4)), parts, **EXACT)


def test_reverse_mean_is_the_posterior_mean_of_x_0():
    world, x_t = mixture(), normal(4, 3)
    x_0 = world.x_0_mean(x_t, T, SCHEDULE, 1)
    expected = posterior_mean(x_t, x_0, T, SCHEDULE)
    assert_close(world.reverse_mean_exact(x_t, T, SCHEDULE, 1), expected, rtol=0, atol=0)
    assert_close(world.reverse_mean_exact(x_t, T, SCHEDULE, 1)[0], x_0[0], rtol=0, atol=0)


def test_what_is_refused():
    w, m, v, y = (getattr(mixture(), f) for f in ("weights", "means", "variances", "labels"))
    for bad, message in (
        ((w[:4], m, v, y), "must be"),
        ((w, m[:4], v, y), "must be"),
        ((w, m[:, 0], v, y), "must be"),
        ((w, m, -v, y), "variances"),
        ((w, m, v, y.float()), "LongTensor"),
        ((w, m, v, y - 1), "LongTensor"),
        ((2 * w, m, v, y), "sum to one"),
    ):
        with pytest.raises(ValueError, match=message):
            GaussianMixture(*bad)
    with pytest.raises(ValueError, match="weight"):
        mixture().eps(normal(4, 3), T, SCHEDULE, label=3)
    with pytest.raises(ValueError, match="bool"):
        mixture().restrict(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="t = 0"):
        implicit_classifier_error(mixture(), normal(4, 3), normal(4, 3), T, SCHEDULE, 0)
