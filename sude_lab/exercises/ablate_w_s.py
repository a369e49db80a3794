"""Checks of the exercises to lesson 05, a sweep over w_s of arXiv 2403.06775, eq. 10."""

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sude_lab.exercises.judging import Call, Draw, check, interval

# name: how many attributes it is asked for, alignment of plain tuning, how fast SuDe helps, what
# fidelity plain tuning has, what one unit of w_s costs of it
SUBJECTS = {
    "dog": (4, 0.30, 0.9, 0.75, 0.05),
    "cat": (3, 0.45, 0.7, 0.70, 0.04),
    "candle": (2, 0.60, 0.2, 0.80, 0.09),
    "bowl": (1, 0.80, 0.5, 0.85, 0.16),
}
MEASURES = ("attribute_alignment", "subject_fidelity", "category_alignment")
WEIGHTS = [0.0, 0.5, 1.0, 2.0, 4.0]


def made_up_sweep(seed: int = 0) -> pd.DataFrame:
    """Return a made-up sweep over w_s, a row a picture, as `data/results` has it: no measurements.

    Alignment rises with w_s and fidelity falls, for each of four subjects in its own way, with
    three seeds; the attribute is missing where the prompt asked for none.
    """
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for name, (count, start, gain, look, cost) in SUBJECTS.items():
        for w_s, of_seed in ((w_s, of_seed) for w_s in WEIGHTS for of_seed in range(3)):
            common = {
                "subject": name,
                "method": "dreambooth",
                "variant": f"weight_sude={w_s:g}" if w_s else "plain",
                "seed": of_seed,
                "weight_sude": w_s,
                "truncate": True,
                "truncate_at": 1.0,
                "prior": "pretrained",
                "open_gates": round(0.4 * np.exp(-w_s / 2), 3) if w_s else 0.0,
                "rho": round(1.2 - 0.4 * np.exp(-w_s), 3) if w_s else np.nan,
            }
            aligned = 1 - (1 - start) * np.exp(-gain * w_s) + 0.04 * rng.standard_normal()
            for attribute in (None, *(f"attribute {k + 1}" for k in range(count))):
                means = np.array([aligned if attribute else 0.95, look - cost * w_s, 0.9])
                values = np.clip(means + 0.03 * rng.standard_normal(3), 0, 1).round(4).tolist()
                measured = dict(zip(MEASURES, values, strict=True))
                rows.append(common | {"attribute": attribute} | measured)
    return pd.DataFrame(rows)


@check(
    lambda draw: [
        (made_up_sweep(draw.seed), measure)
        for measure in ("attribute_alignment", "subject_fidelity")
    ],
)
def by_weight(table: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Check by_weight(table, measure): means, subjects in rows, w_s in columns, as in Fig. 7."""
    changed = table[table["attribute"].notna()]
    return changed.groupby(["subject", "weight_sude"])[measure].mean().unstack()


@check(lambda draw: (by_weight.right(made_up_sweep(draw.seed), "attribute_alignment"),))
def paired_gains(means: pd.DataFrame) -> pd.DataFrame:
    """Check paired_gains(means): what every w_s > 0 wins over w_s = 0, for each subject."""
    return means.drop(columns=0.0).sub(means[0.0], axis=0)


def _clusters_call(draw: Draw) -> Call:
    counts = np.array([9, 2, 3, 2, 4, 2])
    own = np.array([1.5, -0.5, 0.2, 0.0, -1.0, 0.4]) + 0.1 * draw.rng.standard_normal(6)
    values = np.repeat(own, counts) + 0.2 * draw.rng.standard_normal(counts.sum())
    return values, np.repeat(np.array(list("abcdef")), counts), np.random.default_rng(draw.seed)


@check(_clusters_call, run=interval, tolerance=0.07)
def cluster_interval(values: np.ndarray, subjects: np.ndarray, rng: np.random.Generator) -> Any:
    """Check cluster_interval(values, subjects, rng): a 95 % bootstrap interval over subjects."""
    numbers = pd.factorize(subjects)[0]
    sums, counts = np.bincount(numbers, weights=values), np.bincount(numbers)
    drawn = rng.integers(len(sums), size=(10_000, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    return np.quantile(means, [0.025, 0.975])


def _settings_call(draw: Draw) -> Call:
    x = torch.tensor([0.2, 0.4, 0.4, 0.6, 0.8, 0.8, 0.7, 0.9, 0.5]).double()
    y = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.5, 0.3, 0.2, 0.4]).double()
    order = torch.randperm(9, generator=draw.generator)
    return x[order] + draw.number(0, 0.05), y[order] + draw.number(0, 0.05)


@check(_settings_call)
def front(alignment: Tensor, fidelity: Tensor) -> Tensor:
    """Check front(alignment, fidelity): which settings no other one beats (Pareto), bool (N,)."""
    x, y = alignment, fidelity
    as_good = (x[None] >= x[:, None]) & (y[None] >= y[:, None])
    better = (x[None] > x[:, None]) | (y[None] > y[:, None])
    return ~(as_good & better).any(1)


RULE = {
    "dog": ([0.3, 0.5, 0.7, 0.8, 0.9], [0.80, 0.79, 0.76, 0.74, 0.60]),
    "cat": ([0.4, 0.6, 0.8, 0.8, 0.9], [0.74, 0.73, 0.72, 0.70, 0.50]),
    "candle": ([0.6, 0.5, 0.5, 0.4, 0.3], [0.90, 0.90, 0.90, 0.95, 0.99]),
    "bowl": ([0.7, 0.9, 0.9, 0.9, 1.0], [0.90, 0.88, 0.86, 0.84, 0.30]),
    "teapot": ([0.2, 0.4, 0.5, 0.6, 0.7], [0.70, 0.78, 0.65, 0.60, 0.50]),
}


def _rule_calls(draw: Draw) -> list[Call]:
    order = [list(RULE)[k] for k in torch.randperm(5, generator=draw.generator)]
    index, columns = pd.Index(order, name="subject"), pd.Index(WEIGHTS, name="weight_sude")
    tables = [pd.DataFrame([RULE[name][k] for name in order], index, columns) for k in (0, 1)]
    return [(*tables, 0.9), (*tables, 0.78)]


@check(_rule_calls)
def best_weight(alignment: pd.DataFrame, fidelity: pd.DataFrame, keep: float) -> pd.Series:
    """Check best_weight(alignment, fidelity, keep): the best allowed w_s, a Series by subject."""
    allowed = fidelity.ge(keep * fidelity[0.0], axis=0)
    return alignment.where(allowed).idxmax(axis=1)


@check(
    lambda draw: [(draw.normal(5, 4, 3),), (draw.normal(6, 3, 4),)],
    two="two numbers, the naive gain and the honest one",
)
def naive_and_honest(gains: Tensor) -> tuple[Tensor, Tensor]:
    """Check naive_and_honest(gains): the gain of the chosen w_s on old and new seeds; (S, W, K)."""
    subjects, seeds, honest = torch.arange(len(gains)), gains.shape[2], []
    naive = gains.mean(2).amax(1).mean()
    for k in range(seeds):
        left_out = gains[:, :, k]
        others = (gains.sum(2) - left_out) / (seeds - 1)
        honest.append(left_out[subjects, others.argmax(1)].mean())
    return naive, torch.stack(honest).mean()
