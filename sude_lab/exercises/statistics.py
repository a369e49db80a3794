"""Checks of what tables of results allow to say, the exercises to lessons 00, 05 and 08-10."""

from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sude_lab.evaluate.metrics import MEASURES
from sude_lab.exercises.judging import Call, Draw, check, interval
from sude_lab.exercises.worlds import WORDS
from sude_lab.prompts import article

# name: how many attributes it is asked for, alignment of plain tuning, how fast SuDe helps, what
# fidelity plain tuning has, what one unit of w_s costs of it
SUBJECTS = {
    "dog": (4, 0.30, 0.9, 0.75, 0.05),
    "cat": (3, 0.45, 0.7, 0.70, 0.04),
    "candle": (2, 0.60, 0.2, 0.80, 0.09),
    "bowl": (1, 0.80, 0.5, 0.85, 0.16),
}
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


def _study_call(draw: Draw) -> Call:
    table = made_up_sweep(draw.seed).query("weight_sude <= 0.5").replace("weight_sude=0.5", "sude")
    return (table.sample(frac=1.0, random_state=draw.seed, ignore_index=True),)


@check(_study_call)
def paired_gain(table: pd.DataFrame) -> pd.Series:
    """Check paired_gain(table): alignment that SuDe wins over plain, a Series by subject."""
    changed = table[table["attribute"].notna()]
    pairs = changed.groupby(["subject", "variant"])["attribute_alignment"]
    means = pairs.mean().unstack("variant")
    return means["sude"] - means["plain"]


@check(lambda draw: [(made_up_sweep(draw.seed), measure) for measure in MEASURES[:2]])
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


def _prompts(draw: Draw) -> list[Call]:
    category, attribute = WORDS[draw.seed % 3]
    asked = f"photo of {article(attribute)} {attribute} {{S*}} {category}"
    beside = ("photo of a {S*} on the beach", f"photo of a {{S*}} {category} in the snow")
    return [(prompt, category) for prompt in (asked, *beside)]


@check(_prompts)
def judged_text(prompt: str, category: str) -> str:
    """Check judged_text(prompt, category): what CLIP-T compares a picture with."""
    named = prompt.replace(f"{{S*}} {category}", category)
    return named.replace("{S*}", category)


def _features_call(draw: Draw) -> Call:
    sides = draw.rng.uniform(1, 3, (7, 1)) * (0.5 + draw.rng.standard_normal((7, 6)))
    return sides[:4], sides[4:]


@check(_features_call)
def image_score(pictures: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Check image_score(pictures, references): mean cosines, (N, D), (M, D) -> (N,); numpy."""
    p = pictures / np.linalg.norm(pictures, axis=1, keepdims=True)
    r = references / np.linalg.norm(references, axis=1, keepdims=True)
    return (p @ r.T).mean(1)


def _pairs_call(draw: Draw) -> Call:
    b = draw.rng.uniform(0.2, 0.8, 12)
    a = b + 0.15 + 0.12 * draw.rng.standard_normal(12)
    return a, b, np.random.default_rng(draw.seed)


@check(_pairs_call, run=interval, tolerance=0.007)
def paired_interval(a: np.ndarray, b: np.ndarray, rng: np.random.Generator) -> Any:
    """Check paired_interval(a, b, rng): a 95 % bootstrap interval of mean(a - b), in pairs."""
    gains = a - b
    drawn = rng.integers(len(gains), size=(10_000, len(gains)))
    return np.quantile(gains[drawn].mean(1), [0.025, 0.975])


def _metrics_call(draw: Draw) -> Call:
    a = np.array([0.2, 0.2, 0.5, 0.9, 0.9, 0.9, 0.4, 3.0])
    order = draw.rng.permutation(8)
    return a[order], np.round((a + 0.3 * draw.rng.standard_normal(8))[order], 1)


@check(_metrics_call)
def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Check spearman(a, b): the correlation of the ranks, ties sharing their mean; (N,) -> ()."""
    x, y = pd.Series(a).rank(), pd.Series(b).rank()
    return np.corrcoef(x, y)[0, 1]


def _plan_call(draw: Draw) -> Call:
    gain, between, within = (draw.number(low, low + 0.05) for low in (0.12, 0.2, 0.3))
    more = draw.seed // 10
    return gain, between, within, 5 + 2 * more, 3 + more, np.random.default_rng(draw.seed)


@check(_plan_call)
def detects(
    gain: float, between: float, within: float, subjects: int, seeds: int, rng: np.random.Generator
) -> float:
    """Check detects(gain, between, within, subjects, seeds, rng): the share that finds it."""
    own = gain + between * rng.standard_normal((400, subjects))
    runs = own[:, :, None] + within * rng.standard_normal((400, subjects, seeds))
    means = runs.mean(2)
    error = means.std(1, ddof=1) / np.sqrt(subjects)
    return (means.mean(1) - 1.96 * error > 0).mean()


def made_up_lines(number: int = 12, seed: int = 0) -> tuple[np.ndarray, dict[str, Any]]:
    """Return made-up strengths and lines, (S, N) alignments and fidelities of each arm's subjects.

    Fidelity falls with the strength and alignment rises, for each subject in its own way, and where
    most of it is kept "SuDe" is ahead by 0.05 in the mean. No measurements.
    """
    rng, strength = np.random.default_rng(seed), np.linspace(0, 1, 6)
    look, hard = rng.uniform(0.55, 0.7, (number, 1)), rng.uniform(0.1, 0.3, (number, 1))
    ahead: dict[str, Any] = {"fewer steps": 0.0, "SuDe": rng.normal(0.05, 0.06, (number, 1))}
    return strength, {
        name: (0.45 - hard + 0.5 * strength**0.7 + by * (1 - strength), look - 0.25 * strength)
        for name, by in ahead.items()
    }


def _line(draw: Draw) -> tuple[np.ndarray, np.ndarray]:
    fidelity = np.array([0.62, 0.58, 0.53, 0.47, 0.42, 0.36]) + 0.02 * draw.rng.uniform(size=6)
    alignment = np.array([0.5, 0.55, 0.72, 0.66, 0.95, 0.88]) + 0.02 * draw.rng.uniform(size=6)
    return alignment, fidelity


@check(lambda draw: (*_line(draw), draw.number(0.551, 0.556) + 0.02 * (draw.seed < 10)))
def at_fidelity(alignment: np.ndarray, fidelity: np.ndarray, goal: float) -> float:
    """Check at_fidelity(alignment, fidelity, goal): alignment where a rule keeps `goal`."""
    return np.interp(goal, fidelity[::-1], alignment[::-1])


def _kept_calls(draw: Draw) -> list[Call]:
    alignment, fidelity = _line(draw)  # once the best of all is kept, once not
    goal = draw.number(0.44, 0.445) + 0.112 * (draw.seed > 5)
    return [(one, fidelity, goal) for one in (alignment, alignment[[0, 3, 4, 2, 1, 5]])]


@check(_kept_calls)
def best_kept(alignment: np.ndarray, fidelity: np.ndarray, goal: float) -> float:
    """Check best_kept(alignment, fidelity, goal): the best alignment of those that keep `goal`."""
    return alignment[fidelity >= goal].max()


@check(lambda draw: (*_line(draw), draw.number(0.4, 0.43), draw.number(0.54, 0.57)))
def area(alignment: np.ndarray, fidelity: np.ndarray, low: float, high: float) -> float:
    """Check area(alignment, fidelity, low, high): the line's mean alignment between fidelities."""
    goals = np.linspace(low, high, 101)
    return np.interp(goals, fidelity[::-1], alignment[::-1]).mean()


def _studies_call(draw: Draw) -> Call:
    studies = draw.rng.normal(0.1, 0.2, (500, 5 + draw.seed // 10))
    return studies, draw.number(0.12, 0.17), draw.number(2.2, 2.8)


@check(_studies_call)
def covers(studies: np.ndarray, truth: float, factor: float) -> float:
    """Check covers(studies, truth, factor): the share of mean -+ factor s / sqrt(n) with truth."""
    middle, n = studies.mean(1), studies.shape[1]
    half = factor * studies.std(1, ddof=1) / np.sqrt(n)
    return (abs(middle - truth) <= half).mean()


def _verdict_calls(draw: Draw) -> list[Call]:
    noise, late = draw.rng.normal(size=8), draw.seed > 5
    noise = (noise - noise.mean()) / noise.std(ddof=1)
    means = {0.2: 0.05, -0.2: 0.05, 0.005: 0.02, 0.02: 0.15, 0.07: 0.1, 0.08: 0.08}  # their spreads
    rule = (2.36 + 1.14 * late, 0.04 - 0.02 * late)
    return [(mean + spread * noise, *rule) for mean, spread in means.items()]


@check(_verdict_calls)
def decided(gains: np.ndarray, factor: float, margin: float) -> str:
    """Check decided(gains, factor, margin): what an interval of mean gains, (N,), allows to say."""
    half = factor * gains.std(ddof=1) / np.sqrt(len(gains))
    low, high = gains.mean() - half, gains.mean() + half
    if low > 0:
        return "SuDe"
    if high < 0:
        return "less tuning"
    return "no difference" if -margin < low and high < margin else "cannot tell"


@check(lambda draw: [(np.round(draw.rng.normal(0.1, 0.2, n), 2),) for n in (5, 8)])
def sign_flip(gains: np.ndarray) -> float:
    """Check sign_flip(gains): the share of all 2^N sign changes with a mean as far from 0, (N,)."""
    signs = np.array(list(product([1, -1], repeat=len(gains))))
    means = abs((signs * gains).mean(1))
    return (means >= abs(gains.mean()) - 1e-12).mean()
