"""The diffusion process: eq. 1-3 and the mean and variance of eq. 6 (arXiv 2403.06775).

The paper writes x_theta(x_t, c, t) for the **mean of p(x_{t-1} | x_t, c)**. Networks predict
epsilon, x_0 or v instead; at a fixed x_t each is an affine map of that mean, and the maps are here.

Notation: abar_t = ``alphas_cumprod[t]``, alpha_t = abar_t / abar_{t-1}, beta_t = 1 - alpha_t.
Timesteps count from 0 as in diffusers, and abar_{-1} = 1 (x_{-1} is the clean picture).

Flow matching is the same process in another language (derived): x_t = a_t x_0 + b_t eps with
a_t = 1 - s_t, b_t = s_t in place of a_t = sqrt(abar_t), b_t = sqrt(1 - abar_t). Divided by
scale_t = sqrt(a_t^2 + b_t^2) it is eq. 1 with abar_t = a_t^2 / scale_t^2. What depends on the
signal-to-noise ratio abar_t / (1 - abar_t) alone, as the weights of eq. 7 do, is the same in both.

Shapes: samples are (B, ...), ``t`` is a LongTensor (B,). Every coefficient is computed in float64
and cast to the sample's dtype at the last moment, because 1 - abar_t / abar_{t-1} loses digits.
Values are checked on the CPU alone: to check them on a GPU, the CPU would have to wait for it.
Each function raises a ValueError where ``t`` is no LongTensor (B,) with values in 0 ... T-1, or the
batches differ.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow")
VARIANCE_TYPES = ("fixed_small", "fixed_large")


# eq=False: comparing tensors with == has no single truth value, so schedules compare by identity.
@dataclass(frozen=True, eq=False)
class Schedule:
    """How fast pictures turn into noise, and what the network predicts.

    abar_t = prod_{s <= t} (1 - beta_s) of eq. 1, arXiv 2403.06775.

    Args:
        alphas_cumprod: abar, shape (T,), decreasing, in [0, 1); kept in float64, as all tables.
        prediction_type: what the network outputs: epsilon | sample (x_0) | v_prediction | flow
            (eps - x_0).
        variance_type: sigma_t^2 of eq. 6: fixed_small (posterior variance) | fixed_large (beta_t).
        sigmas: s of flow matching, (T,), which `from_sigmas` fills in; None: the process of eq. 1.

    Raises:
        ValueError: alphas_cumprod is not such a table, or a type is unknown.
    """

    alphas_cumprod: Tensor
    prediction_type: str = "epsilon"
    variance_type: str = "fixed_small"
    sigmas: Tensor | None = None
    signal: Tensor = field(init=False, repr=False)
    noise: Tensor = field(init=False, repr=False)
    """a and b of x_t = a_t x_0 + b_t eps, (T,) each."""
    reaches_zero: bool = field(init=False, repr=False)
    """Whether the last abar is 0 (zero terminal SNR)."""

    def __post_init__(self) -> None:
        table, s = self.alphas_cumprod.detach().to(torch.float64), self.sigmas
        if table.ndim != 1 or len(table) == 0:
            raise ValueError(f"alphas_cumprod must have shape (T,), got {tuple(table.shape)}.")
        if not bool(((table >= 0) & (table < 1)).all() and (table.diff() < 0).all()):
            raise ValueError("alphas_cumprod must decrease strictly and stay in [0, 1).")
        for name, types in (("prediction", PREDICTION_TYPES), ("variance", VARIANCE_TYPES)):
            value = getattr(self, f"{name}_type")
            if value not in types:
                raise ValueError(f"{name}_type must be one of {types}, got {value!r}.")
        if s is not None and self.prediction_type == "v_prediction":
            raise ValueError("v_prediction is defined for the process of eq. 1: use flow.")
        object.__setattr__(self, "alphas_cumprod", table)
        object.__setattr__(self, "reaches_zero", bool(table[-1] == 0))
        object.__setattr__(self, "signal", table.sqrt() if s is None else 1 - s)
        object.__setattr__(self, "noise", (1 - table).sqrt() if s is None else s)

    @property
    def output(self) -> tuple[Tensor, Tensor, Tensor]:
        """p and q of the network's output u = p_t eps - q_t x_0, and D = p a + q b; (T,) each.

        With eq. 1 of arXiv 2403.06775, x_0 = (p_t x_t - b_t u) / D_t and eps = (q_t x_t + a_t u) /
        D_t. D is 1 for v and flow, and 0 for epsilon where x_t holds nothing of x_0.
        """
        one, a, b = torch.ones_like(self.signal), self.signal, self.noise
        pairs = {"epsilon": (one, 0 * one), "sample": (0 * one, -one), "v_prediction": (a, b)}
        p, q = pairs.get(self.prediction_type, (one, one))
        return p, q, p * a + q * b

    @property
    def num_timesteps(self) -> int:
        """T, the number of timesteps; valid t are 0 ... T-1."""
        return len(self.alphas_cumprod)

    def to(self, device: torch.device) -> "Schedule":
        """Return the schedule with its table on a device; MPS has no float64: it stays there."""
        if device.type == "mps":
            return self
        sigmas = None if self.sigmas is None else self.sigmas.to(device)
        return replace(self, alphas_cumprod=self.alphas_cumprod.to(device), sigmas=sigmas)

    @classmethod
    def from_sigmas(cls, sigmas: Tensor, prediction_type: str = "flow") -> "Schedule":
        """Return the schedule of flow matching: x_t = (1 - s_t) x_0 + s_t eps.

        Args: sigmas: s, (T,), increasing, in (0, 1].

        Raises:
            ValueError: it is no such table, or v_prediction is asked for.
        """
        s = sigmas.detach().to(torch.float64)
        if bool((s > 1).any()):
            raise ValueError(f"sigmas of flow matching end at 1, got {s.max()}.")
        a, b = (1 - s).square(), s.square()
        return cls(a / (a + b), prediction_type, sigmas=s)

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> "Schedule":
        """Read the schedule of a diffusers scheduler.

        The scheduler's own (float32) abar table, eq. 1 of arXiv 2403.06775, with which its model
        was trained, its prediction_type (absent: epsilon) and variance_type (``_log`` ones are the
        same; absent: fixed_small). Of flow matching the sigmas that training reads, made anew,
        because drawing (`set_timesteps`) writes over the scheduler's own.

        Raises:
            ValueError: the scheduler has neither table, or learns its variance, or predicts
                something other than epsilon, x_0, v or flow.
        """
        if any(kind.__name__.startswith("FlowMatch") for kind in type(scheduler).__mro__):
            return cls.from_sigmas(type(scheduler).from_config(scheduler.config).sigmas.flip(0))
        table = getattr(scheduler, "alphas_cumprod", None)
        if table is None:
            name, known = (
                type(scheduler).__name__,
                "DDPMScheduler or FlowMatchEulerDiscreteScheduler",
            )
            raise ValueError(f"{name} has no alphas_cumprod: use a scheduler such as {known}.")
        # Schedulers with no variance of their own (PNDM, DDIM, ...) have no such entry, or None.
        variance_type = getattr(scheduler.config, "variance_type", None) or "fixed_small"
        if variance_type.removesuffix("_log") not in VARIANCE_TYPES:
            known = " or ".join(VARIANCE_TYPES)
            raise ValueError(f"variance_type {variance_type!r} is not fixed: eq. 6 needs {known}.")
        prediction_type = getattr(scheduler.config, "prediction_type", "epsilon")
        return cls(torch.as_tensor(table), prediction_type, variance_type.removesuffix("_log"))

    def to_time(self, t: Tensor) -> Tensor:
        """Return the time that diffusers tells the network, (B,): t, or T s_t in flow matching."""
        if self.sigmas is None:
            return t
        return (self.num_timesteps * self.sigmas[t.to(self.sigmas.device)]).float().to(t.device)

    def from_time(self, time: Tensor) -> Tensor:
        """Return the t of such times, (B,): in flow matching that of the nearest s_t."""
        if self.sigmas is None:
            return time
        s = time.double().to(self.sigmas.device).unsqueeze(-1) / self.num_timesteps
        return (s - self.sigmas).abs().argmin(-1).to(time.device)


def alpha_bars(t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """abar_t and abar_{t-1} (1 where t = 0), the only two numbers a step needs.

    abar_t of eq. 1, arXiv 2403.06775; shapes (B,), float64, on the schedule's device.
    """
    t, table = _checked(t, schedule), schedule.alphas_cumprod
    return table[t], torch.cat([table.new_ones(1), table])[t]


def add_noise(x_0: Tensor, eps: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """Noise a clean sample.

    x_t = a_t x_0 + b_t eps: sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, arXiv 2403.06775, eq. 1;
    (1 - s_t) x_0 + s_t eps in flow matching.

    Args: x_0, eps: (B, ...); t: (B,). Returns x_t, (B, ...).
    """
    t = _checked(t, schedule)
    return _like(schedule.signal[t], x_0) * x_0 + _like(schedule.noise[t], x_0) * eps


def training_target(x_0: Tensor, eps: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """What the network should output for x_t = add_noise(x_0, eps, t, schedule).

    eps, x_0, v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0 or flow = eps - x_0, by
    ``schedule.prediction_type``: the target of eq. 2, arXiv 2403.06775, in the network's own units;
    (B, ...).
    """
    t, (p, q, _) = _checked(t, schedule), schedule.output
    return _like(p[t], eps) * eps - _like(q[t], x_0) * x_0


def to_x_0(model_output: Tensor, x_t: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """The clean sample that a model output stands for.

    Inverts eq. 1 of arXiv 2403.06775: x_0 = (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t) for
    epsilon, the output itself for sample, x_0 = sqrt(abar_t) x_t - sqrt(1 - abar_t) v for
    v_prediction, x_0 = x_t - s_t u for flow; (B, ...).

    Raises:
        ValueError: epsilon meets abar_t = 0 (zero terminal SNR), where x_t holds nothing of x_0.
    """
    t, (p, _, whole) = _checked(t, schedule), schedule.output
    if schedule.prediction_type == "sample":
        return model_output
    if schedule.reaches_zero and bool((whole[t] == 0).any()):
        nothing = "epsilon says nothing of x_0 where alphas_cumprod is 0 (zero terminal SNR)"
        raise ValueError(f"{nothing}: draw t below that step, or use a v_prediction model.")
    of_output = _like(schedule.noise[t], x_t) * model_output
    return (_like(p[t], x_t) * x_t - of_output) / _like(whole[t], x_t)


def to_eps(model_output: Tensor, x_t: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """The noise that a model output stands for.

    Inverts eq. 1 of arXiv 2403.06775: the output itself for epsilon, (x_t - sqrt(abar_t) x_0) /
    sqrt(1 - abar_t) for sample, sqrt(1 - abar_t) x_t + sqrt(abar_t) v for v_prediction,
    x_t + (1 - s_t) u for flow; (B, ...). Never singular.
    """
    t, (_, q, whole) = _checked(t, schedule), schedule.output
    if schedule.prediction_type == "epsilon":
        return model_output
    of_output = _like(schedule.signal[t], x_t) * model_output
    return (_like(q[t], x_t) * x_t + of_output) / _like(whole[t], x_t)


def posterior_mean(x_t: Tensor, x_0: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """Mean of q(x_{t-1} | x_t, x_0), the target x_{t-1} of eq. 2 and 3 without its noise.

    [sqrt(abar_{t-1}) beta_t x_0 + sqrt(alpha_t) (1 - abar_{t-1}) x_t] / (1 - abar_t), the mean in
    arXiv 2403.06775, eq. 6 (derived in DDPM, arXiv 2006.11239, eq. 7); (B, ...). In flow matching
    x_t / scale_t takes the place of x_t, and the mean is scale_{t-1} times that.
    At t = 0 the coefficients are exactly 1 and 0: the mean is x_0.
    """
    abar, abar_prev = alpha_bars(t, schedule)
    alpha = abar / abar_prev
    of_x_0 = abar_prev.sqrt() * (1 - alpha) / (1 - abar)
    of_x_t = alpha.sqrt() * (1 - abar_prev) / (1 - abar)
    scale, scale_prev = _scales(t, schedule)
    of_x_0, of_x_t = scale_prev * of_x_0, scale_prev * of_x_t / scale
    return _like(of_x_0, x_0) * x_0 + _like(of_x_t, x_t) * x_t


def posterior_variance(t: Tensor, schedule: Schedule) -> Tensor:
    """sigma_t^2 of the reverse step, by ``schedule.variance_type``.

    fixed_small: beta_t (1 - abar_{t-1}) / (1 - abar_t), the variance of q(x_{t-1} | x_t, x_0);
    fixed_large: beta_t; arXiv 2403.06775, eq. 6; in flow matching scale_{t-1}^2 times that. Shape
    (B,), float64, on t's device (float32 on MPS, which has no float64).
    At t = 0, fixed_small is exactly 0: the last step is a point mass (diffusers clamps it to 1e-20;
    we do not). fixed_large is beta_0 there.
    """
    abar, abar_prev = alpha_bars(t, schedule)
    beta = 1 - abar / abar_prev
    _, scale_prev = _scales(t, schedule)
    if schedule.variance_type == "fixed_large":
        return to_device(scale_prev**2 * beta, t.device)
    return to_device(scale_prev**2 * beta * (1 - abar_prev) / (1 - abar), t.device)


def reverse_mean(model_output: Tensor, x_t: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """x_theta(x_t, c, t) of the paper: the mean of p(x_{t-1} | x_t, c) for a model output.

    posterior_mean(x_t, to_x_0(model_output)), arXiv 2403.06775, eq. 2, 6; (B, ...). As `to_x_0`.
    """
    return posterior_mean(x_t, to_x_0(model_output, x_t, t, schedule), t, schedule)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Move float64 coefficients to a device; MPS has no float64, so float32 there."""
    return (values.float() if device.type == "mps" else values).to(device)


def _checked(t: Tensor, schedule: Schedule) -> Tensor:
    """Return t on the schedule's device, if it is a LongTensor (B,) with values in 0 ... T-1."""
    if t.ndim != 1 or t.dtype != torch.long:
        wrong = f"got {tuple(t.shape)}, {t.dtype}; use t.long().expand(batch_size)"
        raise ValueError(f"t must be a LongTensor of shape (B,), {wrong}.")
    t = t.to(schedule.alphas_cumprod.device)
    if t.device.type == "cpu" and bool(((t < 0) | (t >= schedule.num_timesteps)).any()):
        last = schedule.num_timesteps - 1
        raise ValueError(f"t must be in 0 ... {last}, got {t.min()} ... {t.max()}.")
    return t


def _scales(t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """scale_t = sqrt(a_t^2 + b_t^2) and scale_{t-1}, (B,) each; 1 for the process of eq. 1."""
    scale = torch.ones_like(schedule.signal)
    if schedule.sigmas is not None:
        scale = torch.hypot(schedule.signal, schedule.noise)
    t = t.to(scale.device)
    return scale[t], torch.cat([scale.new_ones(1), scale])[t]


def _like(coefficient: Tensor, sample: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1) in the sample's dtype and device, ready to multiply (B, ...)."""
    if len(coefficient) != len(sample):
        counts = f"{len(coefficient)} timesteps for a batch of {len(sample)} samples"
        raise ValueError(f"t holds {counts}: give one for each.")
    shape = (-1,) + (1,) * (sample.ndim - 1)
    return coefficient.to(sample.dtype).to(sample.device).reshape(shape)
