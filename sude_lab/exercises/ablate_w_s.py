"""Checks of the exercises to lesson 05, a sweep over w_s of arXiv 2403.06775, eq. 10."""

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sude_lab.exercises.evaluating import bootstrap_quantiles
from sude_lab.exercises.judging import Draw, Trial, check, interval, named

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


def _means(rows: pd.DataFrame, measure: str, how: str = "mean") -> pd.DataFrame:
    return rows.groupby(["subject", "weight_sude"])[measure].agg(how).unstack()


@check
def check_by_weight(draw: Draw) -> list[Trial]:
    """Check by_weight(table, measure): means, subjects in rows, w_s in columns, as in Fig. 7."""
    table, trials = made_up_sweep(draw.seed), []
    changed = table[table["attribute"].notna()]
    first = changed[changed["seed"] == 0]
    for measure, other in (MEASURES[:2], MEASURES[1::-1]):
        right = _means(changed, measure)
        slips = {
            "Rows without an attribute are of the plain prompt: out.": _means(table, measure),
            "Those are sums: means are asked for.": _means(changed, measure, "sum"),
            "Those are medians: means are asked for.": _means(changed, measure, "median"),
            "That is the first seed alone: average all.": _means(first, measure),
            "You took another column than `measure`.": _means(changed, other),
            "Subjects go in rows, w_s in columns.": right.T,
        }
        trials.append(Trial((table, measure), right, slips))
    return trials


@check
def check_paired_gains(draw: Draw) -> Trial:
    """Check paired_gains(means): what every w_s > 0 wins over w_s = 0, for each subject."""
    means = _means(made_up_sweep(draw.seed).dropna(subset="attribute"), MEASURES[0])
    plain, rest = means[0.0], means.drop(columns=0.0)
    right = rest.sub(plain, axis=0)
    slips = {
        "Plain minus SuDe: a gain is SuDe minus plain.": -right,
        "Not the mean over all subjects: each one is compared with itself.": rest - plain.mean(),
        "Those are ratios: differences are asked for.": rest.div(plain, axis=0),
        "Leave the column of w_s = 0 out: it is 0 by construction.": means.sub(plain, axis=0),
        "Compare with w_s = 0, not with the w_s before.": means.diff(axis=1).drop(columns=0.0),
    }
    return Trial((means,), right, slips)


@check
def check_cluster_interval(draw: Draw) -> Trial:
    """Check cluster_interval(values, subjects, rng): a 95 % bootstrap interval over subjects."""
    counts = np.array([9, 2, 3, 2, 4, 2])
    own = np.array([1.5, -0.5, 0.2, 0.0, -1.0, 0.4]) + 0.1 * draw.rng.standard_normal(6)
    subjects = np.repeat(np.array(list("abcdef")), counts)
    values = np.repeat(own, counts) + 0.2 * draw.rng.standard_normal(counts.sum())
    means = np.array([values[subjects == name].mean() for name in "abcdef"])
    low, high = bootstrap_quantiles(values, subjects)
    narrow = bootstrap_quantiles(values, subjects, level=0.9)
    slips = {
        "You drew single values: one subject's come together.": bootstrap_quantiles(values),
        "You averaged every subject first: take all values.": bootstrap_quantiles(means),
        "That is a 90 % interval: 95 % lie from 0.025 to 0.975.": narrow,
        "Lower end first.": (high, low),
    }
    call, room = interval(draw, values, subjects), 0.04 * (high - low)
    return Trial(call, torch.tensor((low, high)), slips, tolerance=room)


@check
def check_front(draw: Draw) -> Trial:
    """Check front(alignment, fidelity): which settings no other one beats (Pareto), bool (N,)."""
    x = torch.tensor([0.2, 0.4, 0.4, 0.6, 0.8, 0.8, 0.7, 0.9, 0.5]).double()
    y = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.5, 0.3, 0.2, 0.4]).double()
    order = torch.randperm(9, generator=draw.generator)
    x, y = (v[order] + 0.05 * float(draw.uniform(0, 1)) for v in (x, y))
    x_wins, y_wins, y_loses = x[None] > x[:, None], y[None] > y[:, None], y[None] < y[:, None]
    as_good = ~x_wins.T & ~y_wins.T
    others = ~torch.eye(9, dtype=torch.bool)
    right = ~(as_good & (x_wins | y_wins)).any(1)
    both, low = x_wins & y_wins, ~x_wins.T & ~y_loses.T & (x_wins | y_loses)
    slips = {
        "Those are the ones that are beaten.": ~right,
        "Equal in one and worse in one is beaten, too: not better in both.": ~both.any(1),
        "Two equal settings do not beat each other.": ~(as_good & others).any(1),
        "A setting is as good as itself in both: it does not beat itself.": ~as_good.any(1),
        "Larger is better in both: you looked for low fidelity.": ~low.any(1),
        "The largest sum is one of them: the front has all not beaten.": x + y == (x + y).max(),
    }
    return Trial((x, y), right, slips)


@check
def check_best_weight(draw: Draw) -> Trial:
    """Check best_weight(alignment, fidelity, keep): the best allowed w_s, a Series by subject."""
    table = {
        "dog": ([0.3, 0.5, 0.7, 0.8, 0.9], [0.80, 0.79, 0.76, 0.74, 0.60]),
        "cat": ([0.4, 0.6, 0.8, 0.8, 0.9], [0.74, 0.73, 0.72, 0.70, 0.50]),
        "candle": ([0.6, 0.5, 0.5, 0.4, 0.3], [0.90, 0.90, 0.90, 0.95, 0.99]),
        "bowl": ([0.7, 0.9, 0.9, 0.9, 1.0], [0.90, 0.88, 0.86, 0.84, 0.30]),
        "teapot": ([0.2, 0.4, 0.5, 0.6, 0.7], [0.74, 0.73, 0.70, 0.67, 0.60]),
    }
    order = [list(table)[k] for k in torch.randperm(5, generator=draw.generator)]
    index, columns = pd.Index(order, name="subject"), pd.Index(WEIGHTS, name="weight_sude")
    alignment, fidelity = (
        pd.DataFrame([table[name][k] for name in order], index, columns) for k in (0, 1)
    )

    def best(allowed: pd.DataFrame, of: pd.DataFrame = alignment) -> pd.Series:
        return of.where(allowed).idxmax(axis=1)

    keep = 0.9
    allowed = fidelity.ge(keep * fidelity[0.0], axis=0)
    of_mean, largest = fidelity >= keep * fidelity[0.0].mean(), 0 * alignment + WEIGHTS
    slips = {
        "The rule is missing: a w_s may cost at most a tenth of the fidelity.": best(fidelity > 0),
        "Compare with the subject's own fidelity at w_s = 0, not with the mean.": best(of_mean),
        "Of equals take the smallest w_s.": best(allowed, alignment[WEIGHTS[::-1]]),
        "That is the largest w_s allowed: the best alignment is asked for.": best(allowed, largest),
        "That is the alignment: its w_s is asked for.": alignment.where(allowed).max(axis=1),
    }
    return Trial((alignment, fidelity, keep), best(allowed), slips)


@check
def check_naive_and_honest(draw: Draw) -> Trial:
    """Check naive_and_honest(gains): the gain of the chosen w_s on old and new seeds; (S, W, K)."""
    gains = draw.normal(5, 4, 3)
    subjects, means = torch.arange(5), gains.mean(2)

    def left_out(slip: str = "") -> Tensor:
        parts = []
        for k in range(3):
            itself, others = gains[:, :, k], (gains.sum(2) - gains[:, :, k]) / 2
            together = others.mean(0).expand(5, 4)
            by = {"all": means, "itself": itself, "together": together}.get(slip, others)
            read = others if slip == "read the others" else itself
            parts.append(read[subjects, by.argmax(1)].mean())
        return torch.stack(parts).mean()

    naive = {
        "Naive: average over the seeds before you choose, one w_s a subject.": gains.amax(1).mean(),
        "Naive: each subject has a w_s: you chose one w_s for all.": means.mean(0).max(),
        "Naive: that is the best single run of each subject.": gains.amax((1, 2)).mean(),
        "Naive: that is the mean over all settings: nothing was chosen.": gains.mean(),
        "Naive and honest are exchanged: the naive one comes first.": left_out(),
    }
    honest = {
        "all": "Honest: you chose with all seeds, also the one that is left out.",
        "itself": "Honest: you chose by the seed that is left out, not the others.",
        "read the others": "Honest: read the gain off the seed left out, not the others.",
        "together": "Honest: each subject has a w_s: you chose one w_s for all.",
    }
    right, slips = (means.amax(1).mean(), left_out()), (naive, named(left_out, honest))
    return Trial((gains,), right, slips, two="two numbers, the naive gain and the honest one")
