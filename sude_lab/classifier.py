"""The implicit classifier: a conditional diffusion model tells how likely a condition is.

Bayes turns p(x_{t-1} | x_t, c), eq. 6, into p(c | x_{t-1}), eq. 5 of arXiv 2403.06775; no
classifier is trained.
Shapes: x_prev (B, ...), variance (B,), results per sample.
"""

import math

import torch
from torch import Tensor


def reverse_log_prob(x_prev: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Log-density of the reverse step.

    log N(x_{t-1}; x_theta(x_t, c, t), sigma_t^2 I)
    = -||x_{t-1} - x_theta||^2 / (2 sigma_t^2) - D/2 log(2 pi sigma_t^2), arXiv 2403.06775, eq. 6.

    Args: x_prev, mean: (B, ...); variance: sigma_t^2, (B,). Returns nats, (B,), summed over the D
    dimensions of a sample. Half precision is raised to float32.
    """
    variance = checked_variance(variance, x_prev)
    dimensions = math.prod(x_prev.shape[1:])
    normaliser = 0.5 * dimensions * torch.log(2 * math.pi * variance)
    return -squared_distance(x_prev, mean) / (2 * variance) - normaliser


def class_log_ratio(
    x_prev: Tensor, mean_class: Tensor, mean_uncond: Tensor, variance: Tensor
) -> Tensor:
    """How much more likely the class has become by this step: log p(c | x_{t-1}) - log C_t.

    log p(x_{t-1} | x_t, c) - log p(x_{t-1} | x_t)
    = -1/(2 sigma_t^2) [||x_{t-1} - x_theta(c)||^2 - ||x_{t-1} - x_theta(null)||^2],
    arXiv 2403.06775, eq. 5 with eq. 6; C_t = p(c | x_t) does not depend on x_{t-1}.

    Where did the Gaussian's normaliser go? (2 pi sigma_t^2)^(-D/2) depends on t alone, not on the
    condition: it stands in the numerator and in the denominator of eq. 5 and cancels. This
    would fail for a learned variance that depends on c.

    Args: x_prev, mean_class, mean_uncond: (B, ...); variance: (B,). Returns nats, (B,). Gradients
    flow into every argument; the bar over theta is the business of `sude_lab.losses`.
    """
    variance = checked_variance(variance, x_prev)
    to_class = squared_distance(x_prev, mean_class)
    to_uncond = squared_distance(x_prev, mean_uncond)
    return -(to_class - to_uncond) / (2 * variance)


def class_log_posterior(
    x_prev: Tensor, means: Tensor, variance: Tensor, log_prior: Tensor | None = None
) -> Tensor:
    """Which of K prompts explains the step best: log p(c_k | x_{t-1}) among K candidates.

    log softmax_k [log p(c_k | x_t) - ||x_{t-1} - x_theta(c_k)||^2 / (2 sigma_t^2)],
    arXiv 2403.06775, eq. 5 with eq. 6 for K conditions: p(x_{t-1} | x_t) is now the sum over
    the candidates, so no null prompt is needed. The Gaussian's normaliser is the same for every k
    and cancels in the softmax, as in `class_log_ratio`.

    Args:
        x_prev: (B, ...).
        means: x_theta(x_t, c_k, t), (B, K, ...).
        variance: sigma_t^2, (B,).
        log_prior: log p(c_k | x_t) up to a constant, (K,) or (B, K); None: all alike.

    Returns:
        Nats, (B, K); its exponentials sum to one over K.
    """
    variance = checked_variance(variance, x_prev)
    if means.ndim < 3 or means.shape[:1] + means.shape[2:] != x_prev.shape:
        raise ValueError(f"means must be (B, K, ...), got {tuple(means.shape)}.")
    batch, candidates = means.shape[:2]
    repeated = x_prev.unsqueeze(1).expand_as(means)
    distances = squared_distance(repeated.flatten(0, 1), means.flatten(0, 1))
    logits = -distances.reshape(batch, candidates) / (2 * variance.unsqueeze(1))
    if log_prior is not None:
        if log_prior.shape not in ((candidates,), (batch, candidates)):
            raise ValueError(f"log_prior must be (K,) or (B, K), got {tuple(log_prior.shape)}.")
        logits = logits + log_prior.to(logits)
    return torch.log_softmax(logits, dim=1)


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """||a - b||^2 summed over all dimensions but the first; the norm of arXiv 2403.06775, eq. 2.

    Shapes (B, ...) -> (B,). Half precision is raised to float32, where the sum of 16,384 squares of
    a latent would overflow or lose its digits.
    """
    if a.shape != b.shape or a.ndim < 2:
        raise ValueError(
            f"Shapes must be equal and (B, ...), got {tuple(a.shape)} and {tuple(b.shape)}."
        )
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return (a.to(dtype) - b.to(dtype)).square().flatten(1).sum(1)


def checked_variance(variance: Tensor, sample: Tensor) -> Tensor:
    """sigma_t^2 of arXiv 2403.06775, eq. 6, in the dtype the squares are summed in; (B,) -> (B,).

    Raises:
        ValueError: not (B,), or, on the CPU, not positive everywhere.
    """
    if variance.shape != sample.shape[:1]:
        raise ValueError(f"variance must have shape ({len(sample)},), got {tuple(variance.shape)}.")
    if variance.device.type == "cpu" and not bool((variance > 0).all()):
        raise ValueError(
            "variance must be positive: at t = 0 fixed_small gives a point mass, whose density "
            "has no value; draw t from 1 or use fixed_large."
        )
    dtype = torch.promote_types(sample.dtype, torch.float32)
    return variance.to(dtype).to(sample.device)
