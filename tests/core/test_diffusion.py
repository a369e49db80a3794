"""The schedule and the maps between eps, x_0, v and the mean, against diffusers."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler
from torch.testing import assert_close

from sude_lab.diffusion import (
    PREDICTION_TYPES,
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
from sude_lab.losses import sude_weight

pytestmark = pytest.mark.quick

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
EXACT = {"rtol": 1e-11, "atol": 1e-11}


OF_DIFFUSERS = [kind for kind in PREDICTION_TYPES if kind != "flow"]
"""What DDPMScheduler steps with."""


def ddpm(prediction_type="epsilon", variance_type="fixed_small", exact=True):
    """DDPMScheduler; exact: its own formulas, run on its table in float64 instead of float32."""
    scheduler = DDPMScheduler(
        prediction_type=prediction_type, variance_type=variance_type, clip_sample=False, **SD
    )
    if exact:
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    return scheduler


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_from_scheduler_reads_table_and_types():
    scheduler = ddpm("v_prediction", "fixed_large", exact=False)
    schedule = Schedule.from_scheduler(scheduler)
    assert schedule.num_timesteps == 1000
    assert schedule.prediction_type == "v_prediction"
    assert schedule.variance_type == "fixed_large"
    assert schedule.alphas_cumprod.dtype == torch.float64
    assert_close(schedule.alphas_cumprod, scheduler.alphas_cumprod.double(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("fixed_small", "fixed_small"),
        ("fixed_small_log", "fixed_small"),
        ("fixed_large", "fixed_large"),
        ("fixed_large_log", "fixed_large"),
    ],
)
def test_from_scheduler_maps_variance_names(name, expected):
    assert Schedule.from_scheduler(ddpm(variance_type=name)).variance_type == expected


@pytest.mark.parametrize("kind", [PNDMScheduler, DDIMScheduler])
def test_from_scheduler_without_variance_is_fixed_small(kind):
    assert Schedule.from_scheduler(kind(**SD)).variance_type == "fixed_small"


def test_from_scheduler_refuses_what_has_no_meaning():
    with pytest.raises(ValueError, match="learned"):
        Schedule.from_scheduler(ddpm(variance_type="learned_range"))
    with pytest.raises(ValueError, match="prediction_type"):
        Schedule.from_scheduler(PNDMScheduler(prediction_type="flow_prediction"))


@pytest.mark.parametrize(
    "table",
    [torch.ones(2, 2) / 2, torch.tensor([0.5, 0.6]), torch.tensor([1.0, 0.5]), torch.ones(0)],
)
def test_schedule_refuses_a_table_that_is_none(table):
    with pytest.raises(ValueError, match="alphas_cumprod"):
        Schedule(table)


def test_schedule_is_frozen_and_keeps_float64():
    schedule = Schedule(torch.tensor([0.9, 0.5]))
    assert schedule.alphas_cumprod.dtype == torch.float64
    with pytest.raises(AttributeError):
        schedule.variance_type = "fixed_large"
    with pytest.raises(ValueError, match="variance_type"):
        Schedule(torch.tensor([0.9, 0.5]), variance_type="learned")


@pytest.mark.parametrize(
    "t, message",
    [
        (torch.tensor(3), "shape"),
        (torch.tensor([[3]]), "shape"),
        (torch.tensor([3.0]), "LongTensor"),
        (torch.tensor([3], dtype=torch.int32), "LongTensor"),
        (torch.tensor([-1]), "0 ... 999"),
        (torch.tensor([1000]), "0 ... 999"),
    ],
)
def test_t_is_checked(t, message):
    schedule = Schedule.from_scheduler(ddpm())
    with pytest.raises(ValueError, match=message):
        posterior_variance(t, schedule)


def test_t_must_have_one_entry_for_each_sample():
    schedule = Schedule.from_scheduler(ddpm())
    with pytest.raises(ValueError, match="one for each"):
        add_noise(normal(4, 3), normal(4, 3), torch.tensor([5]), schedule)


def test_alpha_bar_before_the_first_step_is_one():
    schedule = Schedule.from_scheduler(ddpm())
    current, previous = alpha_bars(torch.tensor([0, 1, 999]), schedule)
    assert_close(current, schedule.alphas_cumprod[[0, 1, 999]], rtol=0, atol=0)
    assert previous[0] == 1
    assert_close(previous[1:], schedule.alphas_cumprod[[0, 998]], rtol=0, atol=0)


def test_add_noise_and_velocity_agree_with_diffusers():
    scheduler = ddpm("v_prediction")
    schedule = Schedule.from_scheduler(scheduler)
    x_0, eps, t = normal(4, 3, 5), normal(4, 3, 5, seed=1), torch.tensor([0, 1, 500, 999])
    assert_close(add_noise(x_0, eps, t, schedule), scheduler.add_noise(x_0, eps, t), **EXACT)
    assert_close(
        training_target(x_0, eps, t, schedule), scheduler.get_velocity(x_0, eps, t), **EXACT
    )


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_training_target_is_what_the_maps_invert(prediction_type):
    schedule = Schedule.from_scheduler(ddpm(prediction_type))
    x_0, eps, t = normal(4, 3, 5), normal(4, 3, 5, seed=1), torch.tensor([0, 1, 500, 999])
    x_t = add_noise(x_0, eps, t, schedule)
    output = training_target(x_0, eps, t, schedule)
    assert_close(to_x_0(output, x_t, t, schedule), x_0, **EXACT)
    assert_close(to_eps(output, x_t, t, schedule), eps, **EXACT)
    assert_close(
        reverse_mean(output, x_t, t, schedule), posterior_mean(x_t, x_0, t, schedule), **EXACT
    )


@pytest.mark.parametrize("t", [0, 1, 2, 500, 999])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction_type", OF_DIFFUSERS)
def test_reverse_step_agrees_with_diffusers(prediction_type, variance_type, t):
    scheduler = ddpm(prediction_type, variance_type)
    schedule = Schedule.from_scheduler(scheduler)
    output, x_t = normal(1, 3, 5), normal(1, 3, 5, seed=1)
    ts = torch.tensor([t])
    assert scheduler.previous_timestep(t) == t - 1

    step = scheduler.step(output, t, x_t, generator=torch.Generator().manual_seed(2))
    assert_close(to_x_0(output, x_t, ts, schedule), step.pred_original_sample, **EXACT)
    noise = normal(1, 3, 5, seed=2) if t > 0 else torch.zeros(1, 3, 5, dtype=torch.float64)
    ours = reverse_mean(output, x_t, ts, schedule)
    ours = ours + posterior_variance(ts, schedule).sqrt() * noise
    assert_close(ours, step.prev_sample, **EXACT)


@pytest.mark.parametrize("prediction_type", OF_DIFFUSERS)
def test_reverse_step_agrees_with_diffusers_as_shipped(prediction_type):
    # diffusers' table is float32: 1 - abar_t / abar_{t-1} keeps about four digits, hence 1e-5 here.
    scheduler = ddpm(prediction_type, exact=False)
    schedule = Schedule.from_scheduler(scheduler)
    for t in (100, 500, 999):
        output, x_t = (normal(1, 3, 5, seed=s, dtype=torch.float32) for s in (0, 1))
        step = scheduler.step(output, t, x_t, generator=torch.Generator().manual_seed(2))
        ours = reverse_mean(output, x_t, torch.tensor([t]), schedule)
        variance = posterior_variance(torch.tensor([t]), schedule).float()
        ours = ours + variance.sqrt() * normal(1, 3, 5, seed=2, dtype=torch.float32)
        assert_close(ours, step.prev_sample, rtol=1e-5, atol=1e-5)


def test_posterior_variance_agrees_with_diffusers_except_at_zero():
    t = torch.arange(1, 1000)
    for variance_type in ("fixed_small", "fixed_large"):
        scheduler = ddpm(variance_type=variance_type)
        schedule = Schedule.from_scheduler(scheduler)
        theirs = torch.stack([scheduler._get_variance(int(i)) for i in t])
        assert_close(posterior_variance(t, schedule), theirs, rtol=1e-11, atol=0)
    zero = torch.tensor([0])
    small, large = (
        Schedule.from_scheduler(ddpm(variance_type=f"fixed_{s}")) for s in ("small", "large")
    )
    assert posterior_variance(zero, small).item() == 0
    assert ddpm()._get_variance(0).item() == pytest.approx(1e-20)
    beta_0 = 1 - large.alphas_cumprod[:1]
    assert_close(posterior_variance(zero, large), beta_0, rtol=0, atol=0)


def test_posterior_mean_of_the_last_step_is_x_0():
    schedule = Schedule.from_scheduler(ddpm())
    x_0, x_t = normal(2, 7), normal(2, 7, seed=1)
    assert_close(posterior_mean(x_t, x_0, torch.tensor([0, 0]), schedule), x_0, rtol=0, atol=0)


def test_posterior_is_bayes_of_two_gaussians():
    """q(x_{t-1}|x_t,x_0) by completing the square: precisions add, no DDPM formula used."""
    schedule = Schedule.from_scheduler(ddpm())
    t = torch.tensor([1, 10, 500, 999])
    abar, abar_prev = schedule.alphas_cumprod[t], schedule.alphas_cumprod[t - 1]
    alpha = abar / abar_prev
    x_0, x_t = normal(4, 1), normal(4, 1, seed=1)
    precision = 1 / (1 - abar_prev) + alpha / (1 - alpha)
    pull = abar_prev.sqrt() / (1 - abar_prev) * x_0[:, 0] + alpha.sqrt() / (1 - alpha) * x_t[:, 0]
    assert_close(posterior_variance(t, schedule), 1 / precision, **EXACT)
    assert_close(posterior_mean(x_t, x_0, t, schedule)[:, 0], pull / precision, **EXACT)


def test_zero_terminal_snr_is_open_for_v_and_refused_for_epsilon():
    table = torch.tensor([0.9, 0.4, 0.0], dtype=torch.float64)
    last = torch.tensor([2, 2])
    x_t, output = normal(2, 4), normal(2, 4, seed=1)
    with pytest.raises(ValueError, match="zero terminal SNR"):
        to_x_0(output, x_t, last, Schedule(table))
    v = Schedule(table, prediction_type="v_prediction")
    assert_close(to_x_0(output, x_t, last, v), -output, rtol=0, atol=0)
    assert_close(to_eps(output, x_t, last, v), x_t, rtol=0, atol=0)
    assert bool(reverse_mean(output, x_t, last, v).isfinite().all())


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_every_sample_is_alone(prediction_type):
    schedule = Schedule.from_scheduler(ddpm(prediction_type))
    output, x_t, t = normal(4, 2, 3), normal(4, 2, 3, seed=1), torch.tensor([0, 7, 400, 999])
    whole = reverse_mean(output, x_t, t, schedule)
    parts = [
        reverse_mean(output[i : i + 1], x_t[i : i + 1], t[i : i + 1], schedule) for i in range(4)
    ]
    assert_close(whole, torch.cat(parts), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtype_in_is_dtype_out(dtype):
    t = torch.tensor([3, 900])
    x, y = normal(2, 4, dtype=torch.float64).to(dtype), normal(2, 4, seed=1).to(dtype)
    for prediction_type in PREDICTION_TYPES:
        schedule = Schedule.from_scheduler(ddpm(prediction_type))
        for function in (add_noise, training_target, to_x_0, to_eps, posterior_mean, reverse_mean):
            assert function(x, y, t, schedule).dtype == dtype
    assert posterior_variance(t, schedule).dtype == torch.float64


def test_coefficients_keep_their_digits_in_float32():
    """1 - abar_t of a float32 table would already be rounded; ours is rounded once, at the end."""
    abar = torch.tensor([1 - 1e-9, 0.5], dtype=torch.float64)
    schedule = Schedule(abar)
    x_0, eps = torch.zeros(1, 1), torch.ones(1, 1)
    x_t = add_noise(x_0, eps, torch.tensor([0]), schedule)
    assert_close(x_t, torch.tensor([[1e-9**0.5]]), rtol=1e-6, atol=0)


def test_a_scheduler_that_does_not_say_what_it_predicts_predicts_epsilon() -> None:
    quiet = SimpleNamespace(alphas_cumprod=ddpm().alphas_cumprod, config=SimpleNamespace())
    schedule = Schedule.from_scheduler(quiet)
    assert (schedule.prediction_type, schedule.variance_type) == ("epsilon", "fixed_small")
    with pytest.raises(ValueError, match=r"^SimpleNamespace has no alphas_cumprod.*DDPMScheduler"):
        Schedule.from_scheduler(SimpleNamespace(config=None))


def test_a_table_that_stands_still_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^alphas_cumprod must decrease strictly"):
        Schedule(torch.tensor([0.9, 0.5, 0.5]))


def test_on_a_device_nothing_waits_for_a_value():
    # A meta tensor has no values: whoever asks for one fails.
    scheduler = ddpm(exact=False)
    schedule = Schedule.from_scheduler(scheduler)
    assert not schedule.reaches_zero
    x, t = torch.empty(2, 4, 8, 8, device="meta"), torch.empty(2, dtype=torch.long, device="meta")
    for name in ("alphas_cumprod", "signal", "noise"):
        object.__setattr__(schedule, name, getattr(schedule, name).to("meta"))
    for function in (add_noise, training_target, to_x_0, to_eps, posterior_mean, reverse_mean):
        assert function(x, x, t, schedule).shape == x.shape
    assert sude_weight(t, schedule, "exact").device == t.device


def test_the_table_can_lie_elsewhere_and_says_the_same():
    schedule = Schedule.from_scheduler(ddpm(exact=False)).to(torch.device("cpu"))
    assert schedule.to(torch.device("mps")) is schedule  # no float64 there
    zero = Schedule(torch.tensor([0.5, 0.0]))
    assert zero.reaches_zero and zero.to(torch.device("cpu")).reaches_zero
