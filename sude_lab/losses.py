"""The losses: subject, SuDe, its threshold and truncation, the regulariser, the total.

Eq. 3, 7-10 and 14 of arXiv 2403.06775, per sample: (B, ...) in, (B,) out, squares **summed** over
dimensions as the paper's norms are. Training may divide every term by the same number D of
dimensions (the usual MSE): that scales the learning rate, and changes neither the balance of the
terms nor the truncation. Reduce over the batch last, after `truncate`. Each function raises a
ValueError where shapes disagree or a variance is not positive (fixed_small at t = 0).

"mean" in these arguments is x_theta(x_t, c, t), the mean of p(x_{t-1} | x_t, c). The losses are
equally right in eps-space: mean differences are c_t times eps differences, so
    sude_loss(eps_subject, eps_class, eps_uncond, variance=1 / (2 w_t)),  w_t = `sude_weight`,
is eq. 7, and likewise eq. 8 and 9. Tuning uses this form, because neighbouring means agree in most
of their digits and their difference would lose them in float32 or bfloat16.
"""

import torch
from torch import Tensor

from sude_lab.classifier import checked_variance, class_log_ratio, squared_distance
from sude_lab.diffusion import Schedule, alpha_bars, to_device

WEIGHTINGS = ("exact", "simple", "reference")


def subject_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Learn the private attributes of the subject.

    L_sub = ||x_{t-1} - x_theta(x_t, c_sub, t)||^2, arXiv 2403.06775, eq. 3.

    Args: prediction, target: (B, ...) in the same space: means, eps, x_0 or v. In eps-space this is
    eq. 3 without its weight over t (eq. 2's w_t), DDPM's simple loss, and what training uses.
    Returns (B,), a sum of squares; divide by D for the MSE.
    """
    return squared_distance(prediction, target)


def sude_loss(x_prev: Tensor, mean_class: Tensor, mean_uncond: Tensor, variance: Tensor) -> Tensor:
    """Ask the subject to be a member of its category: L_sude = -log p(c_cate | x_{t-1}) + log C_t.

    1/(2 sigma_t^2) [||x_theta(c_sub) - x_theta_bar(c_cate)||^2
                     - ||x_theta(c_sub) - x_theta_bar(null)||^2], arXiv 2403.06775, eq. 7.

    Linear in x_prev and unbounded below; its gradient is the constant -(mean_class - mean_uncond) /
    sigma_t^2, a push along the category's guidance direction. Hence eq. 9.

    Args:
        x_prev: x_theta(x_t, c_sub, t), (B, ...); the only argument that receives a gradient.
        mean_class: x_theta_bar(x_t, c_cate, t), (B, ...), detached here.
        mean_uncond: x_theta_bar(x_t, null, t), (B, ...), detached here.
        variance: sigma_t^2, (B,); in eps-space 1 / (2 sude_weight), see the module's docstring.

    Returns:
        Nats, (B,).
    """
    mean_class, mean_uncond = _bar_over_theta(mean_class, mean_uncond)
    return -class_log_ratio(x_prev, mean_class, mean_uncond, variance)


def sude_threshold(mean_class: Tensor, mean_uncond: Tensor, variance: Tensor) -> Tensor:
    """The value of eq. 7 that the category itself has: below it, the subject overdoes it.

    tau_t = -1/(2 sigma_t^2) ||x_theta_bar(c_cate) - x_theta_bar(null)||^2,
    arXiv 2403.06775, eq. 8: eq. 7 with c_sub := c_cate.

    Args: mean_class, mean_uncond: (B, ...), detached here; variance: (B,).
    Returns nats, (B,), never above 0.
    """
    mean_class, mean_uncond = _bar_over_theta(mean_class, mean_uncond)
    variance = checked_variance(variance, mean_class)
    return -squared_distance(mean_class, mean_uncond) / (2 * variance)


def gate(loss: Tensor, threshold: Tensor) -> Tensor:
    """Is SuDe still at work on this sample?

    lambda_tau = 0 if L_sude <= tau_t else 1, arXiv 2403.06775, eq. 9, as a bool tensor (B,).
    Open (True) exactly where rho < 1, see `guidance_projection`; per sample, never of a batch mean.
    """
    _same_batch(loss, threshold)
    return loss > threshold


def truncate(loss: Tensor, threshold: Tensor) -> Tensor:
    """Stop pulling a sample once it is as much its category as the category itself.

    lambda_tau L_sude, lambda_tau of `gate`, arXiv 2403.06775, eq. 9; (B,). No gradient flows
    through the gate (a comparison has none), nor into the threshold.
    """
    # A product, not torch.where: a loss that is not a number stays visible behind a shut gate.
    return loss * gate(loss, threshold).to(loss.dtype)


def guidance_projection(x_prev: Tensor, mean_class: Tensor, mean_uncond: Tensor) -> Tensor:
    """How far the subject has gone along its category's guidance direction: rho.

    rho = <a, d> / ||d||^2, a = x_theta(c_sub) - x_theta_bar(null), d = x_theta_bar(c_cate) -
    x_theta_bar(null); derived from arXiv 2403.06775, eq. 7-8: L_sude - tau_t = ||d||^2 (1 - rho) /
    sigma_t^2. rho = 0 is the null prompt, rho = 1 the category, where eq. 9 shuts its gate. No
    variance enters, and eps, x_0, v and the mean all give the same rho.

    Where d = 0 the category has no direction and rho has no value; we return 1, since there
    L_sude = tau_t = 0 and eq. 9 shuts its gate.

    Args: as `sude_loss`; (B, ...). Returns (B,), no unit.
    """
    mean_class, mean_uncond = _bar_over_theta(mean_class, mean_uncond)
    length = squared_distance(mean_class, mean_uncond)
    if x_prev.shape != mean_class.shape:
        raise ValueError(
            f"Shapes must be equal, got {tuple(x_prev.shape)} and {tuple(mean_class.shape)}."
        )
    a = x_prev.to(length.dtype) - mean_uncond.to(length.dtype)
    d = mean_class.to(length.dtype) - mean_uncond.to(length.dtype)
    inner = (a * d).flatten(1).sum(1)
    # Divide by 1 where d = 0, so that not even the branch that is thrown away makes a nan gradient.
    defined = length > 0
    rho = inner / torch.where(defined, length, torch.ones_like(length))
    return torch.where(defined, rho, torch.ones_like(rho))


def hinge_loss(x_prev: Tensor, mean_class: Tensor, mean_uncond: Tensor, variance: Tensor) -> Tensor:
    """Truncated SuDe, seen as a hinge.

    (||d||^2 / sigma_t^2) max(0, 1 - rho) = lambda_tau (L_sude - tau_t), derived from
    arXiv 2403.06775, eq. 7-9. It has the gradient of `truncate`, and where eq. 9 jumps from tau_t
    to 0 as its gate shuts, the hinge falls to 0 without a jump: plot this one.

    Args: as `sude_loss`. Returns nats, (B,), >= 0.
    """
    rho = guidance_projection(x_prev, mean_class, mean_uncond)
    threshold = sude_threshold(mean_class, mean_uncond, variance)
    # relu, not clamp: at rho = 1 its gradient is 0, as eq. 9 has it.
    return -2 * threshold * torch.relu(1 - rho)


def class_regularizer(mean_class: Tensor, mean_class_pretrained: Tensor) -> Tensor:
    """DreamBooth's prior preservation: keep saying of the class what the pretrained model says.

    L_reg = ||x_theta_bar_pretrained(c_cate) - x_theta(c_cate)||^2, arXiv 2403.06775, eq. 14.

    Args: mean_class: (B, ...), trained; mean_class_pretrained: (B, ...), detached here. DreamBooth
    uses the noise of pictures that the pretrained model drew in place of its prediction.
    Returns (B,), a sum of squares.
    """
    (mean_class_pretrained,) = _bar_over_theta(mean_class_pretrained)
    return squared_distance(mean_class, mean_class_pretrained)


def total_loss(
    subject: Tensor, sude: Tensor, regularizer: Tensor, weight_sude: float, prior_loss_weight: float
) -> Tensor:
    """The whole objective of a sample; its mean over the batch is what tuning minimises.

    L_sub + w_s L_sude + w_r L_reg, arXiv 2403.06775, eq. 10 before the expectation.

    Args: subject: `subject_loss`; sude: `sude_loss` after `truncate`; regularizer:
    `class_regularizer`, zeros where there is none; all (B,) and all sums, or all means, over
    dimensions. weight_sude: w_s; prior_loss_weight: w_r. Returns (B,).
    """
    _same_batch(subject, sude)
    _same_batch(subject, regularizer)
    return subject + weight_sude * sude + prior_loss_weight * regularizer


def sude_weight(t: Tensor, schedule: Schedule, weighting: str = "exact") -> Tensor:
    """The factor w_t of SuDe in eps-space.

    eq. 7 of arXiv 2403.06775 = w_t [||eps_sub - eps_class||^2 - ||eps_sub - eps_uncond||^2]:

    - exact, the paper's text: w_t = k_t = (d mean / d eps)^2 / (2 sigma_t^2), that is
      beta_t / (2 alpha_t (1 - abar_{t-1})) for fixed_small, beta_t / (2 alpha_t (1 - abar_t)) for
      fixed_large. At t = 0 with fixed_small sigma_t^2 = 0: p(x_{-1} | x_0) is a point mass and
      eq. 7 has no value; the weight is 0 there, so SuDe is not applied at that step.
    - simple: w_t = 1, as DDPM's simple loss drops the same factor; w_s is then relative to the
      eps-MSE.
    - reference, the authors' released code: w_t = k_t(fixed_small) / c1_t with c1_t =
      sqrt(abar_{t-1}) beta_t / (1 - abar_t), about 1 / (2 sqrt(abar_t)) for t >> 1, whatever
      ``schedule.variance_type`` is: it weights large t, where layout is decided. At t = 0 their
      code is finite only through a 1e-6 (about 850 with Stable Diffusion's schedule); we take
      k_0(fixed_large) / c1_0 = 1 / (2 abar_0) there.

    Where w_t = 0, variance = 1 / (2 w_t) is infinite, and eq. 7, eq. 8 and the hinge come out 0
    with the gate shut: such samples need no case of their own.

    Returns (B,), no unit, float64, on t's device (float32 on MPS).

    Raises:
        ValueError: the weighting is unknown, or abar_t = 0 (zero terminal SNR), where eps does not
            determine the mean; "simple" alone allows it.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting must be one of {WEIGHTINGS}, got {weighting!r}.")
    abar, abar_prev = alpha_bars(t, schedule)
    if weighting == "simple":
        return to_device(torch.ones_like(abar), t.device)
    if schedule.reaches_zero and bool((abar == 0).any()):
        raise ValueError(
            f"weighting {weighting!r} has no value where alphas_cumprod is 0 (zero terminal SNR): "
            "draw t below that step, or use 'simple'."
        )
    alpha = abar / abar_prev
    beta = 1 - alpha
    first = abar_prev == 1  # t = 0
    k_large = beta / (2 * alpha * (1 - abar))
    k_small = beta / (2 * alpha * torch.where(first, torch.ones_like(abar), 1 - abar_prev))
    if weighting == "reference":
        c1 = abar_prev.sqrt() * beta / (1 - abar)
        return to_device(torch.where(first, k_large, k_small) / c1, t.device)
    if schedule.variance_type == "fixed_large":
        return to_device(k_large, t.device)
    return to_device(torch.where(first, torch.zeros_like(abar), k_small), t.device)


def output_weight(t: Tensor, schedule: Schedule, weighting: str = "exact") -> Tensor:
    """The factor of SuDe in the network's own output space: eps, x_0, v or flow.

    eq. 7 of arXiv 2403.06775 = w'_t [||u_sub - u_class||^2 - ||u_sub - u_uncond||^2] for outputs u,
    w'_t = w_t (d eps / d u)^2, derived from eq. 1: (d eps / d u)^2 is 1 for eps, abar_t for v,
    abar_t / (1 - abar_t) for x_0, (1 - s_t)^2 for flow. In w'_t of the last three the 1 / abar_t of
    w_t is gone, so that they have a value at zero terminal SNR (abar_t = 0, s_t = 1):

    - exact: A_t^2 / (2 sigma_t^2) with the slope A_t of the mean in u, for x_0
      A_t = sqrt(abar_{t-1}) beta_t / (1 - abar_t), for others d x_0 / d u times that; for flow this
      is s_t^2 / 2 (SNR_{t-1} - SNR_t);
    - reference: the same over c1_t, which is A_t of x_0; at t = 0 as `sude_weight`;
    - simple: (d eps / d u)^2 itself, the weight of the eps-MSE; 0 at abar_t = 0, where SuDe is not
      applied. For flow 1: the usual loss there is the MSE of the output, and w_s is relative to it.

    Returns and raises as `sude_weight`; zero terminal SNR is refused for eps alone.
    """
    if schedule.prediction_type == "epsilon":
        return sude_weight(t, schedule, weighting)
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting must be one of {WEIGHTINGS}, got {weighting!r}.")
    abar, abar_prev = alpha_bars(t, schedule)
    noise, signal = schedule.noise / schedule.output[2], schedule.signal / schedule.output[2]
    of_x_0, of_eps = (table.square()[t.to(table.device)] for table in (noise, signal))
    if weighting == "simple":
        is_flow = schedule.prediction_type == "flow"
        return to_device(torch.ones_like(abar) if is_flow else of_eps, t.device)
    beta, first = 1 - abar / abar_prev, abar_prev == 1
    slope = abar_prev.sqrt() * beta / (1 - abar)
    small = beta * torch.where(first, torch.ones_like(abar), 1 - abar_prev) / (1 - abar)
    if weighting == "reference":
        return to_device(of_x_0 * slope / (2 * torch.where(first, beta, small)), t.device)
    if schedule.variance_type == "fixed_large":
        return to_device(of_x_0 * slope.square() / (2 * beta), t.device)
    exact = of_x_0 * slope.square() / (2 * small)
    return to_device(torch.where(first, torch.zeros_like(abar), exact), t.device)


def _bar_over_theta(*means: Tensor) -> tuple[Tensor, ...]:
    """The bar over theta in eq. 7, 8 and 14: the one place where gradients are stopped."""
    return tuple(mean.detach() for mean in means)


def _same_batch(a: Tensor, b: Tensor) -> None:
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(
            f"Per-sample losses must share one shape (B,), got {tuple(a.shape)} and "
            f"{tuple(b.shape)}."
        )
