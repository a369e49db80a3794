"""How well the classifier inside the embedded model names drawings, and what pruning saves.

    python -m studies.classify --out data/results/classify.csv
    python -m studies.classify --backbone embedded-flow --num-pictures 200 --num-pairs 20 \\
        --beside data/results/classify.csv --out data/results/classify_flow.csv

writes the table and, beside it, the report `classify.md`; with `--beside` another model's answers
to the same drawings are compared. Drawings follow from (group, number)
alone: "development" ones chose the settings, "reported" ones are reported. Each shows one of 20
prompts (every second attribute of the 9 categories) in turn, with a look, background and companion
of its own. Asked are

- "attributes": the 20 prompts, "photo of a running dog", ...: all pairs (t, eps), and `pruned`, the
  rule of `sude_lab.classify.implicit` replayed on the same pairs, as the same answers would have
  led it, with more and with less caution, too; and `first pairs`, all prompts with as many pairs
  as the evaluations of pruning would have paid for, rounded up;
- "categories": the 9 prompts "photo of a dog", ... at a grid of t, all together (`all pairs`), and
  eq. 5 of arXiv 2403.06775 at each t alone: `one step` with x_{t-1} drawn from
  q(x_{t-1} | x_t, x_0), `one step, mean` with x_{t-1} at that distribution's mean;
- the oracle, on the same drawings, among the same prompts.

Finished drawings are never asked again: give the command again to continue. (No run is tuned here,
so there is no grid to sweep.) The tables are those of `studies/classify_tables.py`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
import tyro
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

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
    beside,
    report,
)
from sude_lab.backbone import Backbone
from sude_lab.classifier import class_log_posterior, squared_distance
from sude_lab.classify.implicit import ImplicitClassifier, ask_in_rounds, posterior, spread_times
from sude_lab.classify.probe import encode_all, latents_of, noise_generator, predictions
from sude_lab.config import EMBEDDED
from sude_lab.diffusion import posterior_mean, posterior_variance, reverse_mean, training_target
from sude_lab.errors import UserError
from sude_lab.io.files import atomic_write
from sude_lab.io.opening import open_backbone
from sude_lab.prompts import photo_of
from sude_lab.world import drawing as world
from sude_lab.world.oracle import HEADS, Oracle, load_oracle

SHOWN = tuple((c, a) for c in world.CATEGORIES for a in world.ATTRIBUTES[c])[::2]
"""The (category, attribute) of the 20 prompts."""


@dataclass(frozen=True)
class ClassifyConfig:
    """Which drawings to name, and with how many pairs."""

    out: Path
    """CSV file of the results; drawings that are there are not asked again."""
    num_pictures: int = 500
    group: Literal["development", "reported"] = "reported"
    num_pairs: int = 10
    """Pairs for each of the 20 prompts."""
    num_times: int = 6
    """Timesteps of the grid for the 9 categories, one pair each; 0 leaves them out."""
    weighting: Literal["elbo", "simple"] = "elbo"
    seed: int = 0
    """Seed of the noise."""
    device: str = "auto"
    backbone: str = EMBEDDED
    beside: Path | None = None
    """Table of another model: its answers to the same drawings stand beside these."""


def scene(group: str, number: int) -> world.Scene:
    """Return drawing `number` of a group: category and attribute in turn, the rest at random."""
    rng = random.Random(f"classify-{group}-{number}")
    category, attribute = SHOWN[number % len(SHOWN)]
    return replace(world.sample_scene(rng, category), attribute=attribute)


def name_attributes(
    backbone: Backbone, pictures: Sequence[Image.Image], config: ClassifyConfig, first: int
) -> list[dict[str, Any]]:
    """Return a row for each of the pictures `first`, `first` + 1, ... and each way of asking."""
    classifier = ImplicitClassifier(
        backbone,
        [photo_of(f"{a} {c}") for c, a in SHOWN],
        num_pairs=config.num_pairs,
        weighting=config.weighting,
        prune=False,
        seed=1000 * config.seed + first,
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
    backbone: Backbone, pictures: Sequence[Image.Image], config: ClassifyConfig, first: int
) -> list[dict[str, Any]]:
    """Return a row for each picture: all steps of the grid together, and eq. 5 at each."""
    schedule = backbone.schedule
    prompts = [photo_of(c) for c in world.CATEGORIES]
    classifier = ImplicitClassifier(backbone, prompts, weighting=config.weighting)
    weights = classifier.weights
    # The middles of equal parts of the sum of the weights; no density has a value at t = 0.
    parts = (torch.arange(config.num_times) + 0.5) / config.num_times
    grid = torch.stack([spread_times(1, weights, p.item())[0] for p in parts]).clamp_min(1)
    x_0 = latents_of(backbone, pictures)
    shape = (2, config.num_times, *x_0.shape[1:])
    drawn = [
        torch.randn(shape, generator=noise_generator(config.seed, 500_000 + first + n))
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


def run_study(config: ClassifyConfig, chunk: int = 5) -> pd.DataFrame:
    """Name the drawings that are missing, keep every result at once, return all rows."""
    table = pd.read_csv(config.out) if config.out.is_file() else pd.DataFrame()
    done = set(table["picture"]) if len(table) else set()
    missing = [k for k in range(config.num_pictures) if k not in done]
    if config.num_pairs < 2 or config.num_times == 1:
        raise UserError("--num-pairs must be at least 2, and --num-times 0 or at least 2.")
    if not missing:
        return table
    backbone, oracle = open_backbone(config.backbone, device=config.device), load_oracle()
    backbone.denoiser.to(memory_format=torch.channels_last)  # a sixth faster on a CPU
    with tqdm(total=len(missing), desc="naming", unit="picture") as bar:
        for start in range(0, config.num_pictures, chunk):
            numbers = range(start, min(start + chunk, config.num_pictures))
            if not set(numbers) & set(missing):
                continue
            pictures = [world.draw(scene(config.group, k)) for k in numbers]
            rows = name_by_oracle(oracle, pictures, start)
            rows += name_attributes(backbone, pictures, config, start)
            if config.num_times:
                rows += name_categories(backbone, pictures, config, start)
            rows = [row for row in rows if row["picture"] not in done]
            table = pd.concat([table, pd.DataFrame(rows)], ignore_index=True)
            with atomic_write(config.out) as path:
                table.to_csv(path, index=False)
            bar.update(len(set(numbers) - done))
    return pd.read_csv(config.out)


def main(config: ClassifyConfig) -> None:
    """Run what is missing, write the report beside the table and print it."""
    table, text = run_study(config), ""
    if config.beside:
        text = beside(table, pd.read_csv(config.beside), str(config.beside))
    text = report(table) + text
    with atomic_write(config.out.with_suffix(".md")) as path:
        path.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main(tyro.cli(ClassifyConfig))
