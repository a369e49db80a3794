"""SuDe asked in every k-th step with k times the weight: the same gradient on average."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from sude_lab import SudeRegularizer, Tuning
from sude_lab.backbone import Backbone
from sude_lab.config import TuningConfig
from sude_lab.draws import Batch
from sude_lab.errors import UserError
from sude_lab.tuning import Classifier, Step

Fresh = Callable[[], Backbone]


@dataclass
class Same:
    """Draws the same samples in every step, so that steps differ in what they ask alone."""

    size: tuple[int, ...] = (4, 8, 8)

    def draw(self, size: int, generator: torch.Generator) -> Batch:
        own = torch.Generator().manual_seed(0)
        x_0, eps = torch.randn(2, size, *self.size, generator=own)
        return Batch(x_0, eps, torch.arange(size) * 300 + 50, torch.zeros(size, dtype=torch.long))


@pytest.fixture
def picture(subject_picture: Path) -> Image.Image:
    return Image.open(subject_picture).convert("RGB")


def config(**settings: Any) -> TuningConfig:
    shared: dict[str, Any] = {"weight_sude": 0.4, "max_train_steps": 6, "seed": 5}
    return TuningConfig(Path("dog.png"), "dog", **shared | settings)


def gradients(tuning: Tuning, number: int) -> list[list[Tensor]]:
    """The gradients of some steps."""
    return [
        [p.grad.clone() for p in next(tuning).method.parameters.values() if p.grad is not None]
        for _ in range(number)
    ]


@pytest.mark.quick
@pytest.mark.parametrize("k", [2, 3])
def test_the_mean_gradient_of_k_steps_is_that_of_asking_in_each(
    k: int, fresh: Fresh, picture: Image.Image
) -> None:
    # Weights that do not move, and no clipping, which would cut the larger gradients more.
    still: dict[str, Any] = {"learning_rate": 1e-30, "max_grad_norm": 0.0, "train_batch_size": 3}
    each = Tuning(config(**still), fresh(), picture, draws=Same())
    lazy = Tuning(config(**still, sude_every=k), fresh(), picture, draws=Same())
    plain = Tuning(config(**still | {"weight_sude": 0.0}), fresh(), picture, draws=Same())
    (whole,), parts, (without,) = gradients(each, 1), gradients(lazy, k), gradients(plain, 1)
    for g, g_plain, *of_steps in zip(whole, without, *parts, strict=True):
        assert_close(torch.stack(of_steps).mean(0), g, rtol=1e-4, atol=1e-7)
        assert_close(of_steps[0] - g_plain, k * (g - g_plain), rtol=1e-3, atol=1e-6)
        assert torch.equal(of_steps[1], g_plain)  # a step that does not ask is a plain one


def test_every_step_asks_by_default_and_k_of_1_is_the_default(
    fresh: Fresh, picture: Image.Image
) -> None:
    runs = [list(Tuning(c, fresh(), picture)) for c in (config(), config(sude_every=1))]
    assert [s.row() for s in runs[0]] == [s.row() for s in runs[1]]
    assert all(s.rho.isfinite().all() for s in runs[0])
    one, other = (run[-1].method.state_dict() for run in runs)
    assert all(torch.equal(one[name], other[name]) for name in one)


class Counting:
    """Answers eq. 5 by noise, and counts the questions."""

    def __init__(self) -> None:
        self.questions = 0

    def __call__(self, x_t: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        self.questions += 1
        return torch.zeros_like(x_t), torch.ones_like(x_t)


def test_steps_that_do_not_ask_show_that_nothing_was_computed(
    fresh: Fresh, picture: Image.Image
) -> None:
    classifier = Counting()
    asked: Classifier = classifier
    steps: list[Step] = list(Tuning(config(sude_every=4), fresh(), picture, classifier=asked))
    assert classifier.questions == 2
    for name in ("loss_sude", "tau", "rho", "gate"):
        given = [getattr(s, name) is not None for s in steps]
        assert given == [True, *[False] * 3, True, False], name
    rows = [s.row() for s in steps]
    for name in ("loss_sude", "tau", "rho", "open_gates"):
        assert [row[name] == row[name] for row in rows] == [True, *[False] * 3, True, False], name


def test_a_lazy_run_continues_with_the_same_bits(fresh: Fresh, picture: Image.Image) -> None:
    settings = config(sude_every=3)
    whole = list(Tuning(settings, fresh(), picture))
    first = Tuning(settings, fresh(), picture)
    state = [next(first) for _ in range(2)][-1].state_dict()
    rest = list(Tuning(settings, fresh(), picture, state=state))
    assert str([s.row() for s in rest]) == str([s.row() for s in whole[2:]])
    one, other = whole[-1].method.state_dict(), rest[-1].method.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_plug_asks_in_every_kth_call_and_means_the_same(tiny: Backbone) -> None:
    with torch.no_grad():
        null, dog = (tiny.encode_prompts([p]).hidden for p in ("", "photo of a dog"))
    tiny.unet.requires_grad_(True)
    x, t = (
        torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)),
        torch.tensor([9, 500]),
    )
    output = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    each, lazy = (
        SudeRegularizer(tiny.unet, tiny.pipeline.scheduler, dog, null, every=k) for k in (1, 3)
    )
    losses = torch.stack([lazy(x, t, output) for _ in range(6)])
    assert torch.equal(losses[[1, 2, 4, 5]], torch.zeros(4, 2))
    assert torch.equal(losses[0], 3 * each(x, t, output)) and lazy.calls == 6
    assert_close(losses.mean(0), each(x, t, output))


@pytest.mark.parametrize("k", [0, -1])
def test_never_to_ask_is_refused(k: int, tiny: Backbone) -> None:
    with pytest.raises(UserError, match="--sude-every"):
        replace(config(), sude_every=k)
    embeds = torch.zeros(1, 2, 32)
    with pytest.raises(ValueError, match="every must be at least 1"):
        SudeRegularizer(tiny.unet, tiny.pipeline.scheduler, embeds, embeds, every=k)
