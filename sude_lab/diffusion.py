"""The diffusion process: eq. 1-3 and the mean and variance of eq. 6 (arXiv 2403.06775).

The paper writes x_theta(x_t, c, t) for the **mean of p(x_{t-1} | x_t, c)**. Networks predict
epsilon, x_0 or v instead; at a fixed x_t each is an affine map of that mean, and the maps are here.

Notation: abar_t = ``alphas_cumprod[t]``, alpha_t = abar_t / abar_{t-1}, beta_t = 1 - alpha_t.
Timesteps count from 0 as in diffusers, and abar_{-1} = 1 (x_{-1} is the clean picture).
Shapes: samples are (B, ...), ``t`` is a LongTensor (B,). Every coefficient is computed in float64
and cast to the sample's dtype at the last moment, because 1 - abar_t / abar_{t-1} loses digits.
Values are checked on the CPU alone: to check them on a GPU, the CPU would have to wait for it.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
VARIANCE_TYPES = ("fixed_small", "fixed_large")

# How diffusers spells the two. Schedulers with no variance of their own (PNDM, DDIM, ...) have no
# such entry or None: they get the posterior variance, which is DDPMScheduler's default too.
_DIFFUSERS_VARIANCE_TYPES = {
    None: "fixed_small",
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "fixed_large_log": "fixed_large",
}


# eq=False: comparing tensors with == has no single truth value, so schedules compare by identity.
@dataclass(frozen=True, eq=False)
class Schedule:
    """How fast pictures turn into noise, and what the network predicts.

    abar_t = prod_{s <= t} (1 - beta_s) of eq. 1, arXiv 2403.06775.

    Args:
        alphas_cumprod: abar, shape (T,), decreasing, in [0, 1); kept in float64.
        prediction_type: what the network outputs: epsilon | sample (x_0) | v_prediction.
        variance_type: sigma_t^2 of eq. 6: fixed_small (posterior variance) | fixed_large (beta_t).

    Raises:
        ValueError: alphas_cumprod is not such a table, or a type is unknown.
    """

    alphas_cumprod: Tensor
    prediction_type: str = "epsilon"
    variance_type: str = "fixed_small"

    def __post_init__(self) -> None:
        table = self.alphas_cumprod.detach().to(torch.float64)
        object.__setattr__(self, "alphas_cumprod", table)
        if table.ndim != 1 or len(table) == 0:
            raise ValueError(f"alphas_cumprod must have shape (T,), got {tuple(table.shape)}.")
        if not bool(((table >= 0) & (table < 1)).all() and (table.diff() < 0).all()):
            raise ValueError("alphas_cumprod must decrease strictly and stay in [0, 1).")
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"prediction_type must be one of {PREDICTION_TYPES}, got {self.prediction_type!r}."
            )
        if self.variance_type not in VARIANCE_TYPES:
            raise ValueError(
                f"variance_type must be one of {VARIANCE_TYPES}, got {self.variance_type!r}."
            )

    @property
    def num_timesteps(self) -> int:
        """T, the number of timesteps; valid t are 0 ... T-1."""
        return len(self.alphas_cumprod)

    @cached_property
    def reaches_zero(self) -> bool:
        """Whether the last abar is 0 (zero terminal SNR)."""
        return bool(self.alphas_cumprod[-1] == 0)

    def to(self, device: torch.device) -> "Schedule":
        """Return the schedule with its table on a device; MPS has no float64: it stays there."""
        if device.type == "mps":
            return self
        return replace(self, alphas_cumprod=self.alphas_cumprod.to(device))

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> "Schedule":
        """Read the schedule of a diffusers scheduler.

        Takes the scheduler's own (float32) abar table, eq. 1 of arXiv 2403.06775, because that is
        what its model was trained with, and config.prediction_type (absent: epsilon) and
        config.variance_type (``_log`` variants name the same variance; absent: fixed_small).

        Raises:
            ValueError: the scheduler has no alphas_cumprod (flow matching), or learns its variance,
                or predicts something other than epsilon, x_0 or v.
        """
        table = getattr(scheduler, "alphas_cumprod", None)
        if table is None:
            raise ValueError(
                f"{type(scheduler).__name__} has no alphas_cumprod: use a diffusion scheduler such "
                "as DDPMScheduler."
            )
        variance_type = getattr(scheduler.config, "variance_type", None)
        if variance_type not in _DIFFUSERS_VARIANCE_TYPES:
            raise ValueError(
                f"variance_type {variance_type!r} is not fixed: eq. 6 needs one of "
                f"{VARIANCE_TYPES}."
            )
        return cls(
            alphas_cumprod=torch.as_tensor(table),
            prediction_type=getattr(scheduler.config, "prediction_type", "epsilon"),
            variance_type=_DIFFUSERS_VARIANCE_TYPES[variance_type],
        )


def alpha_bars(t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """abar_t and abar_{t-1} (1 where t = 0), the only two numbers a step needs.

    abar_t of eq. 1, arXiv 2403.06775; shapes (B,), float64, on the schedule's device.

    Raises:
        ValueError: ``t`` is not a LongTensor (B,) with values in 0 ... T-1.
    """
    if t.ndim != 1:
        raise ValueError(f"t must have shape (B,), got {tuple(t.shape)}; use t.expand(batch_size).")
    if t.dtype != torch.long:
        raise ValueError(f"t must be a LongTensor, got {t.dtype}; use t.long().")
    t = t.to(schedule.alphas_cumprod.device)
    if t.device.type == "cpu" and bool(((t < 0) | (t >= schedule.num_timesteps)).any()):
        raise ValueError(
            f"t must be in 0 ... {schedule.num_timesteps - 1}, got {t.min()} ... {t.max()}."
        )
    current = schedule.alphas_cumprod[t]
    previous = schedule.alphas_cumprod[(t - 1).clamp(min=0)]
    return current, torch.where(t == 0, torch.ones_like(previous), previous)


def add_noise(x_0: Tensor, eps: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """Noise a clean sample.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, arXiv 2403.06775, eq. 1.

    Args: x_0, eps: (B, ...); t: (B,). Returns x_t, (B, ...).

    Raises:
        ValueError: ``t`` is not a valid LongTensor (B,), or the batches differ.
    """
    abar, _ = alpha_bars(t, schedule)
    return _like(abar.sqrt(), x_0) * x_0 + _like((1 - abar).sqrt(), x_0) * eps


def training_target(x_0: Tensor, eps: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """What the network should output for x_t = add_noise(x_0, eps, t, schedule).

    eps, x_0 or v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0, by ``schedule.prediction_type``: the
    target of eq. 2, arXiv 2403.06775, in the network's own units; (B, ...).

    Raises:
        ValueError: ``t`` is not a valid LongTensor (B,), or the batches differ.
    """
    abar, _ = alpha_bars(t, schedule)
    if schedule.prediction_type == "epsilon":
        return eps
    if schedule.prediction_type == "sample":
        return x_0
    return _like(abar.sqrt(), x_0) * eps - _like((1 - abar).sqrt(), x_0) * x_0


def to_x_0(model_output: Tensor, x_t: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """The clean sample that a model output stands for.

    Inverts eq. 1 of arXiv 2403.06775: x_0 = (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t) for
    epsilon, the output itself for sample, x_0 = sqrt(abar_t) x_t - sqrt(1 - abar_t) v for
    v_prediction; (B, ...).

    Raises:
        ValueError: ``t`` is not a valid LongTensor (B,), the batches differ, or epsilon meets
            abar_t = 0 (zero terminal SNR), where x_t holds nothing of x_0.
    """
    abar, _ = alpha_bars(t, schedule)
    if schedule.prediction_type == "sample":
        return model_output
    signal, noise = _like(abar.sqrt(), x_t), _like((1 - abar).sqrt(), x_t)
    if schedule.prediction_type == "v_prediction":
        return signal * x_t - noise * model_output
    if schedule.reaches_zero and bool((abar == 0).any()):
        raise ValueError(
            "epsilon says nothing of x_0 where alphas_cumprod is 0 (zero terminal SNR): draw t "
            "below that step, or use a v_prediction model."
        )
    return (x_t - noise * model_output) / signal


def to_eps(model_output: Tensor, x_t: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """The noise that a model output stands for.

    Inverts eq. 1 of arXiv 2403.06775: the output itself for epsilon,
    eps = (x_t - sqrt(abar_t) x_0) / sqrt(1 - abar_t) for sample,
    eps = sqrt(1 - abar_t) x_t + sqrt(abar_t) v for v_prediction; (B, ...). Never singular.

    Raises:
        ValueError: ``t`` is not a valid LongTensor (B,), or the batches differ.
    """
    abar, _ = alpha_bars(t, schedule)
    if schedule.prediction_type == "epsilon":
        return model_output
    signal, noise = _like(abar.sqrt(), x_t), _like((1 - abar).sqrt(), x_t)
    if schedule.prediction_type == "v_prediction":
        return noise * x_t + signal * model_output
    return (x_t - signal * model_output) / noise


def posterior_mean(x_t: Tensor, x_0: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """Mean of q(x_{t-1} | x_t, x_0), the target x_{t-1} of eq. 2 and 3 without its noise.

    [sqrt(abar_{t-1}) beta_t x_0 + sqrt(alpha_t) (1 - abar_{t-1}) x_t] / (1 - abar_t), the mean in
    arXiv 2403.06775, eq. 6 (derived in DDPM, arXiv 2006.11239, eq. 7); (B, ...).
    At t = 0 the coefficients are exactly 1 and 0: the mean is x_0.

    Raises:
        ValueError: ``t`` is not a valid LongTensor (B,), or the batches differ.
    """
    abar, abar_prev = alpha_bars(t, schedule)
    alpha = abar / abar_prev
    of_x_0 = abar_prev.sqrt() * (1 - alpha) / (1 - abar)
    of_x_t = alpha.sqrt() * (1 - abar_prev) / (1 - abar)
    return _like(of_x_0, x_0) * x_0 + _like(of_x_t, x_t) * x_t


def posterior_variance(t: Tensor, schedule: Schedule) -> Tensor:
    """sigma_t^2 of the reverse step, by ``schedule.variance_type``.

    fixed_small: beta_t (1 - abar_{t-1}) / (1 - abar_t), the variance of q(x_{t-1} | x_t, x_0);
    fixed_large: beta_t; arXiv 2403.06775, eq. 6. Shape (B,), float64, on t's device (float32 on
    MPS, which has no float64).
    At t = 0, fixed_small is exactly 0: the last step is a point mass (diffusers clamps it to 1e-20;
    we do not). fixed_large is beta_0 there.

    Raises:
        ValueError: ``t`` is not a valid LongTensor (B,).
    """
    abar, abar_prev = alpha_bars(t, schedule)
    beta = 1 - abar / abar_prev
    if schedule.variance_type == "fixed_large":
        return to_device(beta, t.device)
    return to_device(beta * (1 - abar_prev) / (1 - abar), t.device)


def reverse_mean(model_output: Tensor, x_t: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """x_theta(x_t, c, t) of the paper: the mean of p(x_{t-1} | x_t, c) for a model output.

    posterior_mean(x_t, to_x_0(model_output)), arXiv 2403.06775, eq. 2 and 6; (B, ...).

    Raises:
        ValueError: as `to_x_0`.
    """
    return posterior_mean(x_t, to_x_0(model_output, x_t, t, schedule), t, schedule)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Move float64 coefficients to a device; MPS has no float64, so float32 there."""
    return (values.float() if device.type == "mps" else values).to(device)


def _like(coefficient: Tensor, sample: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1) in the sample's dtype and device, ready to multiply (B, ...)."""
    if len(coefficient) != len(sample):
        raise ValueError(
            f"t holds {len(coefficient)} timesteps for a batch of {len(sample)} samples: give one "
            "for each."
        )
    shape = (-1,) + (1,) * (sample.ndim - 1)
    return coefficient.to(sample.dtype).to(sample.device).reshape(shape)
