"""One test for each equation of arXiv 2403.06775, each against an oracle that is not our code.

Read it beside the paper: diffusers gives the process, torch.distributions the densities, autograd
the gradients, quadrature the expectations, and an exact mixture world the identities.
"""

import pytest
import torch
from diffusers import DDPMScheduler
from torch.distributions import Normal
from torch.testing import assert_close

from sude_lab.classifier import class_log_posterior, class_log_ratio, reverse_log_prob
from sude_lab.diffusion import Schedule, add_noise, posterior_variance, reverse_mean
from sude_lab.losses import (
    class_regularizer,
    subject_loss,
    sude_loss,
    sude_threshold,
    total_loss,
    truncate,
)
from sude_lab.world.mixture import GaussianMixture

pytestmark = pytest.mark.quick

EXACT = {"rtol": 1e-10, "atol": 1e-10}
VARIANCE = torch.tensor([0.3, 2.0, 0.05, 0.7], dtype=torch.float64)


def scheduler(prediction_type="epsilon", variance_type="fixed_small"):
    """diffusers' DDPM with Stable Diffusion's table, its own formulas run in float64."""
    made = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        variance_type=variance_type,
        clip_sample=False,
    )
    made.alphas_cumprod = made.alphas_cumprod.double()
    return made


SCHEDULE = Schedule.from_scheduler(scheduler())
T = torch.tensor([1, 50, 500, 999])


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_density(x, mean, variance):
    """log N(x; mean, variance I) by torch.distributions, (B,)."""
    std = variance.sqrt().reshape(-1, *[1] * (x.ndim - 1)).expand_as(x)
    return Normal(mean, std).log_prob(x).flatten(1).sum(1)


def world(dimensions=2):
    """Six components: labels are categories, and the `subject` is a few components of several."""
    return GaussianMixture(
        weights=torch.tensor([0.1, 0.2, 0.15, 0.15, 0.3, 0.1], dtype=torch.float64),
        means=normal(6, dimensions, seed=7),
        variances=torch.tensor([0.2, 0.1, 0.5, 0.1, 0.3, 0.2], dtype=torch.float64),
        labels=torch.tensor([0, 0, 0, 1, 1, 2]),
    )


SUBJECT = torch.tensor([True, False, True, True, False, True])


def test_eq_01_forward_process():
    x_0, eps = normal(4, 3, 5), normal(4, 3, 5, seed=1)
    expected = scheduler().add_noise(x_0, eps, T)
    assert_close(add_noise(x_0, eps, T, SCHEDULE), expected, **EXACT)


def test_eq_02_denoising_objective_is_least_at_the_mean_of_the_reverse_step():
    """E||x_{t-1} - m||^2 over p(x_{t-1}|x_t,c), integrated on a grid, is least at our x_theta."""
    mixture, t, label = world(1), 300, 0
    x_t = torch.tensor(0.4, dtype=torch.float64)
    abar, abar_prev = SCHEDULE.alphas_cumprod[t], SCHEDULE.alphas_cumprod[t - 1]
    grid = torch.linspace(-6, 6, 10_001, dtype=torch.float64)
    keep = mixture.labels == label
    std = (abar_prev * mixture.variances[keep] + 1 - abar_prev).sqrt()
    prior = Normal(abar_prev.sqrt() * mixture.means[keep, 0], std).log_prob(grid[:, None]).exp()
    alpha = abar / abar_prev
    step = Normal(alpha.sqrt() * grid, (1 - alpha).sqrt()).log_prob(x_t).exp()
    density = (prior @ mixture.weights[keep]) * step
    density = density / density.sum()

    x = x_t.reshape(1, 1)
    eps = mixture.eps(x, torch.tensor([t]), SCHEDULE, label)
    ours = reverse_mean(eps, x, torch.tensor([t]), SCHEDULE).squeeze().requires_grad_()
    objective = (density * (grid - ours) ** 2).sum()
    (slope,) = torch.autograd.grad(objective, ours)
    assert_close(slope, torch.zeros_like(slope), **EXACT)
    worse = (density * (grid - ours.detach() - 0.1) ** 2).sum()
    assert_close(worse - objective.detach(), torch.tensor(0.01, dtype=torch.float64), **EXACT)


def test_eq_03_subject_loss():
    """Two steps of diffusers with the same noise differ by the difference of their means."""
    for prediction_type in ("epsilon", "sample", "v_prediction"):
        theirs = scheduler(prediction_type)
        ours = Schedule.from_scheduler(theirs)
        for t in (1, 500, 999):
            x_t, outputs = normal(1, 3, 5), (normal(1, 3, 5, seed=1), normal(1, 3, 5, seed=2))
            steps = [
                theirs.step(o, t, x_t, generator=torch.Generator().manual_seed(3)).prev_sample
                for o in outputs
            ]
            means = [reverse_mean(o, x_t, torch.tensor([t]), ours) for o in outputs]
            expected = torch.nn.functional.mse_loss(*steps, reduction="sum").reshape(1)
            assert_close(subject_loss(*means), expected, **EXACT)


def test_eq_04_sude_asks_for_the_category():
    """-log p(c | x_{t-1}) with p by Bayes over densities that torch.distributions computes."""
    x_sub, means, log_prior = normal(4, 6), normal(4, 3, 6, seed=1), normal(4, 3, seed=2)
    joint = torch.stack([log_density(x_sub, means[:, k], VARIANCE) for k in range(3)], dim=1)
    probability = (joint + log_prior).softmax(1)
    ours = -class_log_posterior(x_sub, means, VARIANCE, log_prior)
    assert_close(ours, -probability.log(), rtol=1e-10, atol=1e-8)


def test_eq_05_bayes():
    """Exact in the mixture; and in the Gaussian form it is a ratio of densities."""
    mixture, x_t = world(), normal(4, 2)
    x_prev = x_t + 0.1 * normal(4, 2, seed=1)
    left = mixture.class_log_posterior_prev(x_prev, T, SCHEDULE)
    log_c_t = mixture.class_log_posterior(x_t, T, SCHEDULE)
    without = mixture.reverse_log_prob_exact(x_prev, x_t, T, SCHEDULE)
    for c in range(3):
        given = mixture.reverse_log_prob_exact(x_prev, x_t, T, SCHEDULE, c)
        assert_close(left[:, c], log_c_t[:, c] + given - without, **EXACT)

    c, u = normal(4, 2, seed=2), normal(4, 2, seed=3)
    expected = log_density(x_prev, c, VARIANCE) - log_density(x_prev, u, VARIANCE)
    assert_close(class_log_ratio(x_prev, c, u, VARIANCE), expected, **EXACT)


def test_eq_06_reverse_step_is_a_gaussian():
    """Mean and variance are diffusers', the density torch.distributions'."""
    for variance_type in ("fixed_small", "fixed_large"):
        theirs = scheduler(variance_type=variance_type)
        ours = Schedule.from_scheduler(theirs)
        eps, x_t, x_prev = normal(4, 3), normal(4, 3, seed=1), normal(4, 3, seed=2)
        variance = torch.stack([theirs._get_variance(int(t)) for t in T])
        noise = normal(1, 3, seed=3)
        mean = torch.cat(
            [
                theirs.step(
                    eps[i : i + 1], int(t), x_t[i : i + 1], torch.Generator().manual_seed(3)
                ).prev_sample
                - variance[i].sqrt() * noise
                for i, t in enumerate(T)
            ]
        )
        actual = reverse_log_prob(
            x_prev, reverse_mean(eps, x_t, T, ours), posterior_variance(T, ours)
        )
        assert_close(actual, log_density(x_prev, mean, variance), **EXACT)


def test_eq_07_sude_loss():
    x_sub, c, u = (normal(4, 2, 3, seed=s) for s in range(3))
    expected = log_density(x_sub, u, VARIANCE) - log_density(x_sub, c, VARIANCE)
    assert_close(sude_loss(x_sub, c, u, VARIANCE), expected, **EXACT)


def test_eq_08_threshold():
    """Eq. 7 with c_sub := c_cate, where the class's own density is at its peak."""
    c, u = normal(4, 2, 3, seed=1), normal(4, 2, 3, seed=2)
    expected = log_density(c, u, VARIANCE) - log_density(c, c, VARIANCE)
    assert_close(sude_threshold(c, u, VARIANCE), expected, **EXACT)


def test_eq_09_truncation():
    """Sample by sample in plain Python, on both sides of the threshold and on it."""
    loss = torch.tensor([-3.0, -1.0, -2.0, 4.0], dtype=torch.float64, requires_grad=True)
    tau = torch.tensor([-2.0, -2.0, -2.0, -2.0], dtype=torch.float64)
    expected = [0.0 if x <= y else x for x, y in zip(loss.tolist(), tau.tolist(), strict=True)]
    actual = truncate(loss, tau)
    assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=0)
    (slope,) = torch.autograd.grad(actual.sum(), loss)
    open_gates = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    assert_close(slope, open_gates, rtol=0, atol=0)


def test_eq_10_total():
    """The total is the weighted sum, and each term's gradient arrives with its weight."""
    terms = [normal(4, seed=s).requires_grad_() for s in range(3)]
    total = total_loss(*terms, weight_sude=0.4, prior_loss_weight=2.0)
    rows = zip(*(term.tolist() for term in terms), strict=True)
    expected = [a + 0.4 * b + 2.0 * c for a, b, c in rows]
    assert_close(total, torch.tensor(expected, dtype=torch.float64), **EXACT)
    slopes = torch.autograd.grad(total.mean(), terms)
    for slope, weight in zip(slopes, (1.0, 0.4, 2.0), strict=True):
        assert_close(slope, torch.full((4,), weight / 4, dtype=torch.float64), **EXACT)


def test_eq_11_both_losses_are_one_likelihood():
    """L_sub + L_sude = -log [p(x_{t-1}|x_t,c_sub) p(c_cate|x_{t-1})], up to what only t knows."""
    x_prev, sub, c, u = (normal(4, 6, seed=s) for s in range(4))
    c_t = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    in_nats = subject_loss(sub, x_prev) / (2 * VARIANCE)  # eq. 3 leaves 1 / (2 sigma_t^2) out
    ours = in_nats + sude_loss(x_prev, c, u, VARIANCE)
    category = log_density(x_prev, c, VARIANCE) - log_density(x_prev, u, VARIANCE) + c_t.log()
    likelihood = log_density(x_prev, sub, VARIANCE) + category
    only_t = -3 * (2 * torch.pi * VARIANCE).log() + c_t.log()  # D / 2 = 3
    assert_close(ours, -likelihood + only_t, **EXACT)


def test_eq_12_joint_condition():
    """-log [p(x_{t-1}|x_t,sub) p(cate|x_{t-1},sub)] = -log p(x_{t-1}|x_t,sub,cate) + S_t."""
    subject, category = world().restrict(SUBJECT), 0
    x_t = normal(1, 2).expand(4, 2)
    t = torch.full((4,), 300)
    x_prev = x_t + 0.3 * normal(4, 2, seed=1)  # four x_{t-1} of one x_t
    left = -(
        subject.reverse_log_prob_exact(x_prev, x_t, t, SCHEDULE)
        + subject.class_log_posterior_prev(x_prev, t, SCHEDULE)[:, category]
    )
    joint = -subject.reverse_log_prob_exact(x_prev, x_t, t, SCHEDULE, category)
    s_t = -subject.class_log_posterior(x_t, t, SCHEDULE)[:, category]
    assert_close(left, joint + s_t, **EXACT)
    # S_t knows nothing of x_{t-1}: the two sides differ by the same number for each of them.
    assert_close(left - joint, (left - joint)[:1].expand(4), **EXACT)
    assert bool((joint.diff().abs() > 1e-3).all())


def test_eq_13_other_weights_keep_the_order():
    """w_s L_sude = -log p_ws, p_ws = p^{w_s}: another scale, the same order and direction."""
    mixture, t = world(), torch.full((50,), 300)
    log_p = mixture.class_log_posterior_prev(normal(50, 2), t, SCHEDULE)[:, 0]
    zeros = torch.zeros_like(log_p)
    for w_s in (0.4, 1.5, 2.0):
        weighted = total_loss(zeros, -log_p, zeros, weight_sude=w_s, prior_loss_weight=1.0)
        p_ws = (-weighted).exp()
        assert_close(p_ws, log_p.exp() ** w_s, **EXACT)
        assert p_ws.argsort().tolist() == log_p.argsort().tolist()


def test_eq_14_class_regularizer():
    prediction, pretrained = normal(4, 2, 3).requires_grad_(), normal(4, 2, 3, seed=1)
    ours = class_regularizer(prediction, pretrained.requires_grad_())
    theirs = torch.nn.MSELoss(reduction="none")(prediction, pretrained).sum((1, 2))
    assert_close(ours, theirs, **EXACT)
    slopes = torch.autograd.grad(ours.sum(), (prediction, pretrained), allow_unused=True)
    assert_close(slopes[0], 2 * (prediction - pretrained).detach(), **EXACT)
    assert slopes[1] is None
