"""An exact world: a mixture of Gaussians, in which every quantity of the paper has a closed form.

The data are x_0 ~ sum_n w_n N(m_n, s_n^2 I), and a condition c is a set of components (a label).
Noising a Gaussian gives a Gaussian, so eps, p(x_{t-1} | x_t, c) and p(c | x_t) are all exact, and
eq. 4-7 and 11-13 of arXiv 2403.06775 can be checked, not believed.

Only eq. 6 is an approximation here: p(x_{t-1} | x_t, c) is a mixture with one Gaussian for each
component that c allows, far from N(mean, sigma_t^2 I) where there are many, or steps are long; as
steps get shorter the difference vanishes (`implicit_classifier_error`).
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sude_lab import diffusion
from sude_lab.classifier import class_log_ratio
from sude_lab.diffusion import Schedule, alpha_bars


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """Components with isotropic variance and a label each.

    p(x_0) = sum_n w_n N(x_0; m_n, s_n^2 I): the data behind eq. 1, arXiv 2403.06775.

    Its methods take x_t and x_prev, (B, D), and a class's label, or None for no condition, and
    answer in nats, (B,), where nothing else is said. They raise ValueError where ``t`` is not a
    LongTensor (B,) of the schedule's steps, or no component has the label.

    Args:
        weights: w, (N,), non-negative, summing to one.
        means: m, (N, D).
        variances: s^2, (N,), positive.
        labels: class of each component, LongTensor (N,), from 0; a class may hold many components.

    Raises:
        ValueError: shapes, dtypes or ranges are not these.
    """

    weights: Tensor
    means: Tensor
    variances: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        count = (len(self.weights),)
        shapes = {x.shape for x in (self.weights, self.variances, self.labels)}
        if shapes != {count} or self.means.ndim != 2 or self.means.shape[:1] != count:
            raise ValueError("weights, variances and labels must be (N,), means (N, D).")
        if self.labels.dtype != torch.long or bool((self.labels < 0).any()):
            raise ValueError("labels must be a LongTensor counting from 0.")
        if not bool((self.variances > 0).all()):
            raise ValueError("variances must be positive.")
        if bool((self.weights < 0).any()) or abs(float(self.weights.sum()) - 1) > 1e-6:
            raise ValueError("weights must be non-negative and sum to one.")

    @property
    def num_classes(self) -> int:
        """C, the number of labels."""
        return int(self.labels.max()) + 1

    def restrict(self, members: Tensor) -> "GaussianMixture":
        """The mixture given that the component is one of ``members``.

        w_n -> w_n [n in members] / sum, Bayes' rule for a condition c of arXiv 2403.06775, eq. 5.
        Components keep their places and labels, so a condition on a condition is
        ``restrict(a).restrict(b)`` (c_sub and c_cate of eq. 12).

        Args: members: bool (N,).

        Raises:
            ValueError: not bool (N,), or no member has weight.
        """
        if members.dtype != torch.bool or members.shape != self.weights.shape:
            raise ValueError(f"members must be a bool tensor {tuple(self.weights.shape)}.")
        kept = torch.where(members, self.weights, torch.zeros_like(self.weights))
        if not bool(kept.sum() > 0):
            raise ValueError("No component of these members has any weight.")
        return replace(self, weights=kept / kept.sum())

    def given(self, label: int | None) -> "GaussianMixture":
        """The mixture of one class, p(x_0 | c) of arXiv 2403.06775, eq. 5; None: no condition."""
        return self if label is None else self.restrict(self.labels == label)

    def log_prob(
        self, x_t: Tensor, t: Tensor, schedule: Schedule, label: int | None = None
    ) -> Tensor:
        """log p(x_t | c) = log sum_n w_n N(x_t; sqrt(abar_t) m_n, (abar_t s_n^2 + 1 - abar_t) I).

        The marginal of arXiv 2403.06775, eq. 1.
        """
        log_joint, _, _ = self.given(label)._components(x_t, alpha_bars(t, schedule)[0])
        return log_joint.logsumexp(1)

    def class_log_posterior(self, x_t: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
        """log p(c | x_t), (B, C): log C_t of arXiv 2403.06775, eq. 5; -inf without weight."""
        return self._class_log_posterior(x_t, alpha_bars(t, schedule)[0])

    def class_log_posterior_prev(self, x_prev: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
        """log p(c | x_{t-1}), (B, C): the left side of arXiv 2403.06775, eq. 5, exactly.

        x_t adds nothing once x_{t-1} is known (Markov): p(c | x_{t-1}, x_t) = p(c | x_{t-1}).
        At t = 0, x_{-1} is the clean sample.
        """
        return self._class_log_posterior(x_prev, alpha_bars(t, schedule)[1])

    def x_0_mean(
        self, x_t: Tensor, t: Tensor, schedule: Schedule, label: int | None = None
    ) -> Tensor:
        """E[x_0 | x_t, c], (B, D), what a perfect x_0-network outputs for eq. 2, arXiv 2403.06775.

        sum_n p(n | x_t, c) [m_n + sqrt(abar_t) s_n^2 / v_n (x_t - sqrt(abar_t) m_n)],
        v_n = abar_t s_n^2 + 1 - abar_t.
        """
        log_joint, x_0, _ = self.given(label)._components(x_t, alpha_bars(t, schedule)[0])
        return (log_joint.softmax(1).unsqueeze(2) * x_0).sum(1)

    def eps(self, x_t: Tensor, t: Tensor, schedule: Schedule, label: int | None = None) -> Tensor:
        """E[eps | x_t, c], (B, D), what a perfect eps-network outputs.

        (x_t - sqrt(abar_t) E[x_0 | x_t, c]) / sqrt(1 - abar_t), arXiv 2403.06775, eq. 1 solved for
        eps: also -sqrt(1 - abar_t) grad log p(x_t | c).
        """
        of_x_0 = replace(schedule, prediction_type="sample")
        return diffusion.to_eps(self.x_0_mean(x_t, t, schedule, label), x_t, t, of_x_0)

    def reverse_mean_exact(
        self, x_t: Tensor, t: Tensor, schedule: Schedule, label: int | None = None
    ) -> Tensor:
        """E[x_{t-1} | x_t, c], (B, D): x_theta(x_t, c, t) of a perfect network, exactly.

        posterior_mean(x_t, E[x_0 | x_t, c]), the minimiser of arXiv 2403.06775, eq. 2: the mean of
        q(x_{t-1} | x_t, x_0) is linear in x_0.
        """
        x_0 = self.x_0_mean(x_t, t, schedule, label)
        return diffusion.posterior_mean(x_t, x_0, t, schedule)

    def reverse_log_prob_exact(
        self, x_prev: Tensor, x_t: Tensor, t: Tensor, schedule: Schedule, label: int | None = None
    ) -> Tensor:
        """log p(x_{t-1} | x_t, c), which arXiv 2403.06775, eq. 6, takes for a Gaussian.

        sum_n p(n | x_t, c) N(x_{t-1}; posterior_mean(x_t, E[x_0 | x_t, n]), u_n I), with
        u_n = (variance of q(x_{t-1} | x_t, x_0)) + b^2 s_n^2 (1 - abar_t) / v_n,
        b = sqrt(abar_{t-1}) beta_t / (1 - abar_t) the weight of x_0 in the posterior mean.
        """
        abar, abar_prev = alpha_bars(t, schedule)
        log_joint, x_0, variance = self.given(label)._components(x_t, abar)
        # One row for each (sample, component): the reverse step of that component alone.
        many, t_many = (x.repeat_interleave(x_0.shape[1], 0) for x in (x_t, t))
        means = diffusion.posterior_mean(many, x_0.flatten(0, 1), t_many, schedule)
        b = (abar_prev.sqrt() * (1 - abar / abar_prev) / (1 - abar)).to(x_t).unsqueeze(1)
        small = replace(schedule, variance_type="fixed_small")
        q_variance = diffusion.posterior_variance(t, small).to(x_t).unsqueeze(1)
        x_0_variance = self.variances * (1 - abar).to(x_t).unsqueeze(1) / variance
        centred = x_prev.unsqueeze(1) - means.view_as(x_0)
        density = _log_normal(centred, q_variance + b**2 * x_0_variance)
        return (log_joint.log_softmax(1) + density).logsumexp(1)

    def sample(
        self, n: int, generator: torch.Generator, label: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw clean samples and their labels: x_0 (n, D) and labels (n,).

        x_0 ~ p(x_0 | c) = sum_n w_n N(m_n, s_n^2 I), the data of arXiv 2403.06775, eq. 1.
        """
        component = torch.multinomial(self.given(label).weights, n, True, generator=generator)
        noise = torch.empty_like(self.means[component]).normal_(generator=generator)
        x_0 = self.means[component] + self.variances[component].sqrt().unsqueeze(1) * noise
        return x_0, self.labels[component]

    def _components(self, x: Tensor, abar: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each component noised: log w_n + log N(x; sqrt(abar) m_n, v_n I), E[x_0 | x, n] and v_n.

        Shapes (B, N), (B, N, D), (B, N), with v_n = abar s_n^2 + 1 - abar.
        """
        abar = abar.unsqueeze(1)
        variance = abar.to(x) * self.variances + (1 - abar).to(x)
        centred = x.unsqueeze(1) - abar.sqrt().to(x).unsqueeze(2) * self.means
        gain = abar.sqrt().to(x) * self.variances / variance
        log_joint = self.weights.log() + _log_normal(centred, variance)
        return log_joint, self.means + gain.unsqueeze(2) * centred, variance

    def _class_log_posterior(self, x: Tensor, abar: Tensor) -> Tensor:
        """log p(c | x) from the components' posterior, (B, C)."""
        log_posterior = self._components(x, abar)[0].log_softmax(1)
        of_class = self.labels == torch.arange(self.num_classes, device=x.device).unsqueeze(1)
        return log_posterior.unsqueeze(1).masked_fill(~of_class, -math.inf).logsumexp(2)


def implicit_classifier_error(
    mixture: GaussianMixture, x_prev: Tensor, x_t: Tensor, t: Tensor, schedule: Schedule, label: int
) -> Tensor:
    """What eq. 5 loses by taking eq. 6 for a Gaussian: estimated minus exact log p(c | x_{t-1}).

    log C_t + class_log_ratio(x_{t-1}; exact means, sigma_t^2) - log p(c | x_{t-1}),
    arXiv 2403.06775, eq. 5 with eq. 6; all but the Gaussian is exact. With x_{t-1} drawn from the
    reverse step it shrinks with the step beta_t, i.e. with 1/T, while the signal
    log p(c | x_{t-1}) - log C_t shrinks with its square root. Returns nats, (B,), signed.

    Raises:
        ValueError: as the mixture's methods, or the variance is zero (fixed_small at t = 0).
    """
    mean_class = mixture.reverse_mean_exact(x_t, t, schedule, label)
    mean_uncond = mixture.reverse_mean_exact(x_t, t, schedule)
    variance = diffusion.posterior_variance(t, schedule)
    log_ratio = class_log_ratio(x_prev, mean_class, mean_uncond, variance)
    log_prior = mixture.class_log_posterior(x_t, t, schedule)[:, label]
    exact = mixture.class_log_posterior_prev(x_prev, t, schedule)[:, label]
    return log_prior + log_ratio - exact


def _log_normal(centred: Tensor, variance: Tensor) -> Tensor:
    """log N(centred; 0, variance I) over the last dimension; (B, N, D), (B, N) -> (B, N)."""
    normaliser = 0.5 * centred.shape[-1] * torch.log(2 * math.pi * variance)
    return -centred.square().sum(-1) / (2 * variance) - normaliser
