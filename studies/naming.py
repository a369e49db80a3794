"""Drawings named in every way that `studies/classify.py` compares; a row a picture and way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from studies.classify_tables import (
    ALL,
    ATTRIBUTES,
    CATEGORIES,
    CAUTIONS,
    FIRST,
    ONE_STEP,
    ONE_STEP_MEAN,
    ORACLE,
    PRUNED,
)
from sude_lab.backbone import Backbone
from sude_lab.classifier import class_log_posterior, squared_distance
from sude_lab.classify.implicit import ImplicitClassifier, ask_in_rounds, posterior, spread_times
from sude_lab.classify.probe import encode_all, latents_of, noise_generator, predictions
from sude_lab.diffusion import posterior_mean, posterior_variance, reverse_mean, training_target
from sude_lab.prompts import photo_of
from sude_lab.world import drawing as world
from sude_lab.world.oracle import HEADS, Oracle

Weighting = Literal["elbo", "simple"]
SHOWN = tuple((c, a) for c in world.CATEGORIES for a in world.ATTRIBUTES[c])[::2]
"""The (category, attribute) of the 20 prompts."""


def name_attributes(
    backbone: Backbone,
    pictures: Sequence[Image.Image],
    first: int,
    *,
    num_pairs: int,
    weighting: Weighting = "elbo",
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Return a row for each of the pictures `first`, `first` + 1, ... and each way of asking."""
    classifier = ImplicitClassifier(
        backbone,
        [photo_of(f"{a} {c}") for c, a in SHOWN],
        num_pairs=num_pairs,
        weighting=weighting,
        prune=False,
        seed=1000 * seed + first,
    )
    losses, times = classifier.losses(pictures)
    pruned = {form: replay(losses, times, caution) for form, caution in CAUTIONS.items()}
    paid = -(-(~pruned[PRUNED].isnan()).sum((1, 2)) // len(SHOWN))
    rows = []
    for n in range(len(pictures)):
        few = slice(None, max(1, int(paid[n])))
        ways = {ALL: losses[n], FIRST: losses[n, few]}
        ways |= {form: kept[n] for form, kept in pruned.items()}
        for form, some in ways.items():
            p, error = posterior(some, times[n, : len(some)])
            rows.append(_row(first + n, ATTRIBUTES, form, p, error, (~some.isnan()).sum()))
    return rows


def replay(losses: Tensor, times: Tensor, caution: float = 2.5) -> Tensor:
    """Prune as `ImplicitClassifier` does, with answers that are known already; (N, M, K), nan."""

    def losses_of(rows: Tensor) -> Tensor:
        return losses[rows.unbind(1)]

    return ask_in_rounds(losses_of, times, losses.shape[2], caution=caution)


@torch.no_grad()
def name_categories(
    backbone: Backbone,
    pictures: Sequence[Image.Image],
    first: int,
    *,
    num_times: int,
    weighting: Weighting = "elbo",
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Return a row for each picture: all steps of the grid together, and eq. 5 at each."""
    schedule = backbone.schedule
    prompts = [photo_of(c) for c in world.CATEGORIES]
    classifier = ImplicitClassifier(backbone, prompts, weighting=weighting)
    weights = classifier.weights
    # The middles of equal parts of the sum of the weights; no density has a value at t = 0.
    parts = (torch.arange(num_times) + 0.5) / num_times
    grid = torch.stack([spread_times(1, weights, p.item())[0] for p in parts]).clamp_min(1)
    x_0 = latents_of(backbone, pictures)
    shape = (2, num_times, *x_0.shape[1:])
    drawn = [
        torch.randn(shape, generator=noise_generator(seed, 500_000 + first + n))
        for n in range(len(pictures))
    ]
    noise, again = torch.stack(drawn, dim=1)
    times = grid.expand(len(pictures), -1)
    sizes = (len(pictures), len(grid), len(prompts))
    rows = torch.cartesian_prod(*(torch.arange(size) for size in sizes))
    about = (backbone, x_0, times, noise, encode_all(backbone, prompts))
    result = []
    losses = torch.zeros(sizes, dtype=torch.float64)
    for n, part in enumerate(rows.split(len(grid) * len(prompts))):  # a picture a batch
        batch = predictions(*about, part)
        x_t, eps, t = batch.x_t, batch.eps, batch.t
        target = training_target(x_0[n].expand_as(eps), eps, t, schedule)
        distance = squared_distance(batch.output, target).double().cpu()
        losses[n] = weights.sum() * distance.reshape(sizes[1:])
        means = reverse_mean(batch.output.double().cpu(), x_t.double().cpu(), t.cpu(), schedule)
        means = means.unflatten(0, sizes[1:])
        variance = posterior_variance(grid, schedule)
        one_x_t = x_t.double().cpu()[:: len(prompts)]
        middle = posterior_mean(one_x_t, x_0[n].double().cpu().expand_as(one_x_t), grid, schedule)
        step = variance.sqrt().reshape(-1, 1, 1, 1) * again[n].double()
        for form, x_prev in ((ONE_STEP, middle + step), (ONE_STEP_MEAN, middle)):
            for m, p in enumerate(class_log_posterior(x_prev, means, variance).exp()):
                row = _row(first + n, CATEGORIES, form, p, None, len(prompts))
                result.append(row | {"t": int(grid[m])})
    for n in range(len(pictures)):
        p, error = posterior(losses[n], grid)
        result.append(_row(first + n, CATEGORIES, ALL, p, error, losses[n].numel()))
    return result


def name_by_oracle(
    oracle: Oracle, pictures: Sequence[Image.Image], first: int
) -> list[dict[str, Any]]:
    """Return the oracle's answers among the same prompts, two rows a picture."""
    probabilities = oracle.read(list(pictures))
    category = probabilities["category"]
    index = [(HEADS["category"].index(c), HEADS["attribute"].index(a)) for c, a in SHOWN]
    both = torch.stack([category[:, c] * probabilities["attribute"][:, a] for c, a in index], dim=1)
    rows = []
    for n in range(len(pictures)):
        p = both[n] / both[n].sum()
        rows.append(_row(first + n, ATTRIBUTES, ORACLE, p, None, 0))
        rows.append(_row(first + n, CATEGORIES, ORACLE, category[n], None, 0))
    return rows


def _row(
    picture: int, prompts: str, form: str, p: Tensor, error: Tensor | None, evaluations: Any
) -> dict[str, Any]:
    shown = picture % len(SHOWN)
    names = [f"{a} {c}" for c, a in SHOWN] if prompts == ATTRIBUTES else list(world.CATEGORIES)
    truth = shown if prompts == ATTRIBUTES else world.CATEGORIES.index(SHOWN[shown][0])
    best = int(p.argmax())
    return {
        "picture": picture,
        "prompts": prompts,
        "form": form,
        "t": "",
        "truth": names[truth],
        "named": names[best],
        "right": int(best == truth),
        "probability": round(p[best].item(), 4),
        "standard_error": "" if error is None else round(error[best].item(), 4),
        "evaluations": int(evaluations),
    }
