"""The explorer of lesson 03 without a browser: its grid, its numbers, its figure, its sliders."""

import time
from collections.abc import Callable
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from sude_lab.backbone import Backbone
from sude_lab.classify.probe import decode
from sude_lab.diffusion import add_noise, to_x_0
from sude_lab.errors import UserError
from sude_lab.view.thresholds import Grid, ThresholdExplorer, ask

CATEGORIES, TIMES, SEEDS = ("dog", "candle"), (50, 400, 900), (3, 4)
PICTURE = Image.new("RGB", (32, 32), "olive")
PROMPT = "photo of a running dog"


@pytest.fixture(scope="module")
def models(_opened: Backbone) -> tuple[Backbone, Backbone]:
    """A judge, and a model that says something else."""
    judge, tuned = _opened.copy(), _opened.copy()
    with torch.no_grad():
        for k, p in enumerate(tuned.unet.parameters()):
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(k))
    return judge, tuned


@pytest.fixture(scope="module")
def grid(models: tuple[Backbone, Backbone]) -> Grid:
    return ask(*models, PICTURE, PROMPT, CATEGORIES, TIMES, SEEDS)


@pytest.fixture
def explorer(models: tuple[Backbone, Backbone], grid: Grid) -> ThresholdExplorer:
    return ThresholdExplorer(models[0], grid)


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(png)).convert("RGB"), dtype=int)


def test_the_grid_holds_one_call_at_a_time(models: tuple[Backbone, Backbone], grid: Grid) -> None:
    judge, tuned = models
    x_0, _ = judge.encode_pictures([PICTURE])
    for n, m, k in ((0, 0, 0), (1, 2, 1)):
        generator = torch.Generator().manual_seed(SEEDS[n] * 1_000_003)
        noise = torch.randn((len(TIMES), *x_0.shape[1:]), generator=generator)[m]
        t = torch.tensor([TIMES[m]])
        x_t = add_noise(x_0, noise[None], t, judge.schedule)
        torch.testing.assert_close(grid.x_t[n, m], x_t[0])
        with torch.no_grad():
            for model, prompt, said in (
                (tuned, PROMPT, grid.subject[n, m]),
                (judge, "", grid.uncond[n, m]),
                (judge, f"photo of a {CATEGORIES[k]}", grid.category[n, m, k]),
            ):
                eps = model.predict(x_t, t, model.encode_prompts([prompt]))
                torch.testing.assert_close(said, eps[0], rtol=1e-3, atol=1e-4)


def test_the_numbers_are_those_of_the_equations(explorer: ThresholdExplorer, grid: Grid) -> None:
    seen = set()
    abar = explorer.judge.schedule.alphas_cumprod
    for n, seed in enumerate(SEEDS):
        for m, t in enumerate(TIMES):
            for k, category in enumerate(CATEGORIES):
                got = explorer.update(t, category, seed, 2.0)
                sub, null, cate = (
                    x.double().numpy().ravel()
                    for x in (grid.subject[n, m], grid.uncond[n, m], grid.category[n, m, k])
                )
                # The reference weighting, written out: k_t / c1_t.
                a, before = float(abar[t]), float(abar[t - 1])
                beta = 1 - a / before
                k_t = beta / (2 * (a / before) * (1 - before))
                w = k_t * (1 - a) / (before**0.5 * beta)
                loss = w * (((sub - cate) ** 2).mean() - ((sub - null) ** 2).mean())
                tau = -w * ((cate - null) ** 2).mean()
                rho = (sub - null) @ (cate - null) / ((cate - null) @ (cate - null))
                assert got.loss == pytest.approx(loss, rel=1e-3, abs=1e-6)
                assert got.threshold == pytest.approx(tau, rel=1e-3, abs=1e-6)
                assert got.rho == pytest.approx(rho, rel=1e-3, abs=1e-3)
                assert got.open is bool(loss > tau) is bool(rho < 1)
                assert got.move == pytest.approx(min(2 * w, max(0, 1 - rho)), rel=1e-3, abs=1e-3)
                seen.add(got.open)
    assert seen == {True, False}  # else half of the above was never looked at


def open_position(explorer: ThresholdExplorer) -> tuple[int, str, int]:
    n, m, k = explorer.gate.nonzero()[0].tolist()
    return TIMES[m], CATEGORIES[k], SEEDS[n]


def test_every_slider_changes_the_figure(explorer: ThresholdExplorer) -> None:
    t, category, seed = open_position(explorer)
    start = {"t": t, "category": category, "seed": seed, "weight_sude": 0.25}
    for name, slider in explorer.sliders.items():
        slider.value = start[name]
    before = explorer.picture()
    others = {"t": TIMES, "category": CATEGORIES, "seed": SEEDS, "weight_sude": (0.0, 0.25)}
    for name, options in others.items():
        explorer.sliders[name].value = next(x for x in options if x != start[name])
        assert np.abs(pixels(explorer.picture()) - pixels(before)).max() > 50, name
        explorer.sliders[name].value = start[name]
        assert explorer.picture() == before, name


def test_the_pictures_are_beliefs_and_the_push_is_their_difference(
    explorer: ThresholdExplorer, grid: Grid
) -> None:
    t, category, seed = open_position(explorer)
    n, m, k = SEEDS.index(seed), TIMES.index(t), CATEGORIES.index(category)
    reading = explorer.update(t, category, seed, 4.0)
    assert reading.open and reading.move > 0
    canvas = np.asarray(explorer._strip.get_array())
    side, width = 32, 32 + 3
    shown = [canvas[:side, j * width : j * width + side] for j in range(5)]
    eps = grid.subject[n, m] + reading.move * (grid.category[n, m, k] - grid.uncond[n, m])
    schedule = explorer.judge.schedule
    for place, latent in ((0, None), (1, grid.subject[n, m]), (3, eps)):
        x_t = grid.x_t[n, m : m + 1]
        x_0 = x_t if latent is None else to_x_0(latent[None], x_t, torch.tensor([t]), schedule)
        (expected,) = decode(explorer.judge, x_0)
        assert np.abs(shown[place].astype(int) - np.asarray(expected, dtype=int)).max() <= 1
    push = 128 + 2 * (shown[3].astype(int) - shown[1].astype(int))
    assert np.array_equal(shown[4], push.clip(0, 255).astype(np.uint8))


def test_without_weight_or_behind_a_shut_gate_nothing_moves(explorer: ThresholdExplorer) -> None:
    t, category, seed = open_position(explorer)
    n, m, k = (~explorer.gate).nonzero()[0].tolist()
    shut = (TIMES[m], CATEGORIES[k], SEEDS[n], 4.0)
    for position in ((t, category, seed, 0.0), shut):
        assert explorer.update(*position).move == 0
        canvas = np.asarray(explorer._strip.get_array())
        assert (canvas[:32, 4 * 35 : 4 * 35 + 32] == 128).all()


def test_a_move_of_a_slider_takes_less_than_a_fifth_of_a_second(
    explorer: ThresholdExplorer,
) -> None:
    """Processor time, so that a busy machine does not fail it; the best of some, likewise."""
    taken = []
    for weight in (0.25, 0.5, 1.0):  # every one draws a push that was not drawn before
        for t in TIMES:
            started = time.process_time()
            explorer.sliders["weight_sude"].value = weight
            explorer.sliders["t"].value = t
            taken.append(time.process_time() - started)
    assert sorted(taken)[len(taken) // 2] < 2 * 0.2  # two moves each


def test_the_sliders_stand_in_the_widget(explorer: ThresholdExplorer) -> None:
    sliders = explorer.widget().children
    assert [slider.description for slider in sliders] == ["t", "category", "noise", "w_s"]
    assert explorer.picture()[:4] == b"\x89PNG"


def test_it_opens_where_the_gate_is_widest_open(explorer: ThresholdExplorer) -> None:
    rhos = [explorer.update(t, CATEGORIES[0], SEEDS[0], 1.0).rho for t in TIMES]
    assert explorer.sliders["t"].value == TIMES[int(np.argmin(rhos))]


@pytest.mark.parametrize("where", [(51, "dog", 3), (50, "cat", 3), (50, "dog", 9)])
def test_a_position_off_the_grid_is_an_error(
    explorer: ThresholdExplorer, where: tuple[int, str, int]
) -> None:
    with pytest.raises(UserError, match="grid holds no"):
        explorer.update(*where, 1.0)


@pytest.mark.parametrize(("categories", "seeds"), [((), (1,)), (("dog",), ())])
def test_nothing_to_ask_is_an_error(
    fresh: Callable[[], Backbone], categories: tuple[str, ...], seeds: tuple[int, ...]
) -> None:
    model = fresh()
    with pytest.raises(UserError, match="at least one"):
        ask(model, model, PICTURE, PROMPT, categories, TIMES, seeds)
