"""Checks of the exercises to lesson 08, the measures of arXiv 2403.06775, section 5."""

from typing import Any

import numpy as np
import pandas as pd

from sude_lab.exercises.baselines import WORDS
from sude_lab.exercises.judging import Call, Draw, check, interval
from sude_lab.prompts import article


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
    gain: float,
    between: float,
    within: float,
    subjects: int,
    seeds: int,
    rng: np.random.Generator,
) -> float:
    """Check detects(gain, between, within, subjects, seeds, rng): the share that finds it."""
    own = gain + between * rng.standard_normal((400, subjects))
    runs = own[:, :, None] + within * rng.standard_normal((400, subjects, seeds))
    means = runs.mean(2)
    error = means.std(1, ddof=1) / np.sqrt(subjects)
    return (means.mean(1) - 1.96 * error > 0).mean()
