"""The implicit classifier, against torch.distributions."""

import math

import pytest
import torch
from torch.distributions import Normal
from torch.testing import assert_close

from sude_lab.classifier import (
    checked_variance,
    class_log_posterior,
    class_log_ratio,
    reverse_log_prob,
    squared_distance,
)

pytestmark = pytest.mark.quick

EXACT = {"rtol": 1e-11, "atol": 1e-11}
VARIANCE = torch.tensor([0.3, 2.0, 1e-3, 0.7], dtype=torch.float64)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def oracle(x_prev, mean, variance):
    std = variance.sqrt().reshape(-1, *[1] * (mean.ndim - 1))
    return Normal(mean, std.expand_as(mean)).log_prob(x_prev).flatten(1).sum(1)


def test_reverse_log_prob_is_the_normalised_gaussian():
    x, mean = normal(4, 3, 2), normal(4, 3, 2, seed=1)
    assert_close(reverse_log_prob(x, mean, VARIANCE), oracle(x, mean, VARIANCE), **EXACT)


def test_reverse_log_prob_integrates_to_one():
    grid = torch.linspace(-30, 30, 4001, dtype=torch.float64)
    ones = torch.ones(4001, dtype=torch.float64)
    density = reverse_log_prob(grid[:, None], 0.4 * ones[:, None], 1.7 * ones).exp()
    one = torch.tensor(1.0, dtype=torch.float64)
    assert_close(torch.trapezoid(density, grid), one, **EXACT)


def test_class_log_ratio_is_a_ratio_of_densities():
    x, c, u = (normal(4, 3, 2, seed=s) for s in range(3))
    expected = oracle(x, c, VARIANCE) - oracle(x, u, VARIANCE)
    # The normalisers cancel only to rounding in the oracle, and VARIANCE reaches 1e-3.
    assert_close(class_log_ratio(x, c, u, VARIANCE), expected, rtol=1e-11, atol=1e-9)


def test_class_log_ratio_prefers_what_is_nearer():
    x = normal(4, 5)
    near, far = x + 0.1, x - 0.2
    assert bool((class_log_ratio(x, near, far, VARIANCE) > 0).all())
    same = class_log_ratio(x, near, near, VARIANCE)
    assert_close(same, torch.zeros(4, dtype=torch.float64), rtol=0, atol=0)


@pytest.mark.parametrize("prior_shape", [None, (5,), (4, 5)])
def test_class_log_posterior_is_bayes(prior_shape):
    x, means = normal(4, 3, 2), normal(4, 5, 3, 2, seed=1)
    prior = None if prior_shape is None else normal(*prior_shape, seed=2)
    joint = torch.stack([oracle(x, means[:, k], VARIANCE) for k in range(5)], dim=1)
    joint = joint if prior is None else joint + prior
    expected = joint - joint.logsumexp(1, keepdim=True)
    actual = class_log_posterior(x, means, VARIANCE, prior)
    assert_close(actual, expected, rtol=1e-11, atol=1e-9)
    assert_close(actual.exp().sum(1), torch.ones(4, dtype=torch.float64), **EXACT)


def test_class_log_posterior_of_two_is_the_pair_ratio():
    x, c, u = (normal(4, 3, seed=s) for s in range(3))
    both = class_log_posterior(x, torch.stack([c, u], 1), VARIANCE)
    assert_close(both[:, 0] - both[:, 1], class_log_ratio(x, c, u, VARIANCE), **EXACT)


def test_class_log_posterior_survives_where_densities_underflow():
    """16,384 dimensions and a tiny variance: every density is exp(-1e8), the posterior is fine."""
    x = torch.zeros(1, 16384)
    means = torch.stack([x + 0.1, x + 0.2], 1)
    out = class_log_posterior(x, means, torch.tensor([1e-6]))
    assert bool(out.isfinite().all()) and out[0, 0] == 0 and out[0, 1] < -1e6


def test_every_sample_is_alone():
    x, means, prior = normal(4, 3), normal(4, 5, 3, seed=1), normal(4, 5, seed=2)
    whole = class_log_posterior(x, means, VARIANCE, prior)
    log_prob = reverse_log_prob(x, means[:, 0], VARIANCE)
    ratio = class_log_ratio(x, means[:, 0], means[:, 1], VARIANCE)
    for i in range(4):
        b = slice(i, i + 1)
        v = VARIANCE[b]
        assert_close(class_log_posterior(x[b], means[b], v, prior[b]), whole[b], **EXACT)
        assert_close(reverse_log_prob(x[b], means[b, 0], v), log_prob[b], **EXACT)
        assert_close(class_log_ratio(x[b], means[b, 0], means[b, 1], v), ratio[b], **EXACT)


def test_log_ratio_has_gradient_for_every_argument():
    x, c, u = (normal(4, 3, seed=s).requires_grad_() for s in range(3))
    assert torch.autograd.gradcheck(lambda *args: class_log_ratio(*args, VARIANCE), (x, c, u))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_raised_to_float32(dtype):
    x, y = torch.full((1, 16384), 3.0, dtype=dtype), torch.zeros(1, 16384, dtype=dtype)
    total = squared_distance(x, y)  # 147,456: beyond float16
    assert_close(total, torch.tensor([9.0 * 16384]), rtol=0, atol=0)
    assert reverse_log_prob(x, y, torch.ones(1, dtype=torch.float64)).dtype == torch.float32


def test_what_is_refused():
    x = normal(4, 3)
    with pytest.raises(ValueError, match="positive"):
        reverse_log_prob(x, x, torch.tensor([1.0, 0.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match="positive"):
        class_log_ratio(x, x, x, -VARIANCE)
    with pytest.raises(ValueError, match="positive"):
        checked_variance(VARIANCE * math.nan, x)
    with pytest.raises(ValueError, match="shape"):
        reverse_log_prob(x, x, VARIANCE[:1])
    with pytest.raises(ValueError, match="equal"):
        class_log_ratio(x, x[:1], x, VARIANCE)
    with pytest.raises(ValueError, match="means"):
        class_log_posterior(x, x, VARIANCE)
    with pytest.raises(ValueError, match="log_prior"):
        class_log_posterior(x, normal(4, 5, 3), VARIANCE, normal(3))


def test_samples_have_at_least_one_dimension_of_their_own() -> None:
    with pytest.raises(ValueError, match=r"means must be \(B, K, \.\.\.\), got \(3, 2\)"):
        class_log_posterior(normal(3), normal(3, 2), VARIANCE[:3])
    one = class_log_posterior(normal(3, 1), normal(3, 2, 1, seed=1), VARIANCE[:3])
    logits = Normal(normal(3, 2, 1, seed=1)[..., 0], VARIANCE[:3, None].sqrt()).log_prob(
        normal(3, 1)
    )
    assert_close(one, logits.log_softmax(1), **EXACT)


@pytest.mark.parametrize("shape", [(), (3,)])
def test_a_distance_is_between_batches_of_samples(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError):
        squared_distance(torch.ones(shape), torch.ones(shape))
