"""Checks of the exercises to lesson 08, the measures of arXiv 2403.06775, section 5."""

from collections.abc import Callable

import numpy as np
import torch

from sude_lab.evaluate.metrics import cosines, image_similarity
from sude_lab.evaluate.prompts import caption
from sude_lab.exercises.baselines import WORDS
from sude_lab.exercises.judging import Draw, Trial, check, choice, interval, named
from sude_lab.prompts import article

STUDIES = 400


@check
def check_judged_text(draw: Draw) -> list[Trial]:
    """Check judged_text(prompt, category): what CLIP-T compares a picture with, `caption`."""
    (category, attribute), trials = WORDS[draw.seed % 3], []
    for prompt in (
        f"photo of {article(attribute)} {attribute} {{S*}} {category}",
        "photo of a {S*} on the beach",
        f"photo of a {{S*}} {category} in the snow",
    ):
        nobody = " ".join(prompt.replace("{S*}", "").split())
        slips = {
            "{S*} is still there: an encoder reads it as letters that mean nothing.": prompt,
            "Now nobody says what it is: no category stands behind this {S*}.": nobody,
            "It stands there twice: drop {S*} before it.": prompt.replace("{S*}", category),
            "Two spaces are left where {S*} was.": prompt.replace("{S*}", ""),
        }
        trials.append(Trial((prompt, category), caption(prompt, category), slips))
    return trials


@check
def check_image_score(draw: Draw) -> Trial:
    """Check image_score(pictures, references): mean cosines, (N, D), (M, D) -> (N,); numpy."""
    pictures, references = (0.5 + draw.rng.standard_normal((n, 6)) for n in (4, 3))
    pictures = pictures * draw.rng.uniform(1, 3, (4, 1))
    references = references * draw.rng.uniform(1, 3, (3, 1))
    p, r = (x / np.linalg.norm(x, axis=0, keepdims=True) for x in (pictures, references))
    table = cosines(pictures, references)
    to_mean = cosines(pictures, references.mean(0, keepdims=True))[:, 0]
    unequal = (table * np.linalg.norm(references, axis=1)).mean(1)
    slips = {
        "Those are inner products: divide by both lengths.": (pictures @ references.T).mean(1),
        "You normalised the columns: a picture is a row, axis=1.": (p @ r.T).mean(1),
        "The references are not normalised.": unequal,
        "That is the cosine with the mean reference: the mean of the cosines is asked.": to_mean,
        "That is the nearest reference: the mean over all is asked for.": table.max(1),
        "That is the whole table: average over the references.": table,
        "One number a picture: you averaged over the pictures, too.": table.mean(),
        "You averaged over the pictures: one number a picture is asked for.": table.mean(0),
    }
    return Trial((pictures, references), image_similarity(pictures, references), slips)


def bootstrap_quantiles(
    values: np.ndarray, clusters: np.ndarray | None = None, *, level: float = 0.95
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a mean, as two exercises ask for it.

    40,000 resamples of values, or of whole clusters. With few values it is too narrow: the studies
    use `sude_lab.evaluate.statistics.mean_interval`.
    """
    names = np.arange(len(values)) if clusters is None else clusters
    index = np.unique(names, return_inverse=True)[1]
    sums, counts = np.bincount(index, weights=values), np.bincount(index)
    drawn = np.random.default_rng(0).integers(len(sums), size=(40_000, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@check
def check_paired_interval(draw: Draw) -> Trial:
    """Check paired_interval(a, b, rng): a 95 % bootstrap interval of mean(a - b), in pairs."""
    b = draw.rng.uniform(0.2, 0.8, 12)
    a = b + 0.15 + 0.12 * draw.rng.standard_normal(12)
    draws = draw.rng.integers(12, size=(2, 40_000, 12))
    apart = np.quantile(a[draws[0]].mean(1) - b[draws[1]].mean(1), [0.025, 0.975])
    low, high = bootstrap_quantiles(a - b)
    slips = {
        "You drew a and b apart: draw pairs, both of a subject at once.": apart,
        "b minus a: a minus b is asked for.": (-high, -low),
        "That is the interval of a alone: of the differences, please.": bootstrap_quantiles(a),
        "Lower end first.": (high, low),
    }
    call, room = interval(draw, a, b), 0.05 * (high - low)
    return Trial(call, torch.tensor((low, high)), slips, tolerance=room)


@check
def check_spearman(draw: Draw) -> Trial:
    """Check spearman(a, b): the correlation of the ranks, ties sharing their mean; (N,) -> ()."""
    a = np.array([0.2, 0.2, 0.5, 0.9, 0.9, 0.9, 0.4, 3.0])
    b = a + 0.3 * draw.rng.standard_normal(8)
    order = draw.rng.permutation(8)
    a, b = a[order], np.round(b[order], 1)

    def correlation(of: Callable[[np.ndarray], np.ndarray]) -> float:
        return float(np.corrcoef(of(a), of(b))[0, 1])

    def ranks(x: np.ndarray) -> np.ndarray:
        below, equal = (x[:, None] > x).sum(1), (x[:, None] == x).sum(1)
        return below + (equal + 1) / 2

    def order_of(x: np.ndarray) -> np.ndarray:
        return x.argsort(kind="stable")

    i, j = np.triu_indices(8, 1)
    agree = np.sign(a[i] - a[j]) * np.sign(b[i] - b[j])
    gap = ((ranks(a) - ranks(b)) ** 2).sum()
    first_come = correlation(lambda x: order_of(order_of(x)))
    slips = {
        "That is the correlation of the values: take ranks first.": correlation(np.copy),
        "`argsort` lists who comes first, and is not yet the rank of each.": correlation(order_of),
        "Equal values must have equal ranks, as `pandas.Series.rank()` gives.": first_come,
        "1 - 6 sum d^2 / (n^3 - n) holds without ties: correlate ranks.": 1 - 6 * gap / (8**3 - 8),
        "That is Kendall's tau, which counts pairs: correlate the ranks.": agree.mean(),
    }
    return Trial((a, b), correlation(ranks), slips)


check_fooled = choice(
    "b",
    "which metric praises a model that draws its one picture again, whatever it is asked.",
    a="CLIP-T compares with the prompt: a sitting dog is no running dog.",
    c="BLIP-T compares with the prompt, too, and was trained to notice small things.",
    d="One of them is fooled completely: which compares with the pictures alone?",
)


@check
def check_detects(draw: Draw) -> Trial:
    """Check detects(gain, between, within, subjects, seeds, rng): the share that finds it."""
    settings = (0.15, 0.2, 0.3, 5, 3)

    def share(slip: str = "") -> float:
        gain, between, within, subjects, seeds = settings
        rng = np.random.default_rng(draw.seed)
        own = gain + between * rng.standard_normal((STUDIES, subjects))
        runs = own[:, :, None] + within * rng.standard_normal((STUDIES, subjects, seeds))
        means = runs.reshape(STUDIES, -1) if slip == "runs" else runs.mean(2)
        means = runs[:, :, 0] if slip == "one seed" else means
        error = means.std(1, ddof=0 if slip == "n" else 1)
        error = error if slip == "spread" else error / np.sqrt(means.shape[1])
        return float((means.mean(1) - 1.96 * error > 0).mean())

    slips = {
        "runs": "You took the runs for independent: average the seeds of a subject first.",
        "n": "The standard deviation of few numbers divides by n - 1: `ddof=1`.",
        "one seed": "You used one seed of each subject: average over all of them.",
        "spread": "s is the spread of subjects; the mean's is s / sqrt(subjects).",
    }
    wrong = named(share, slips) | {
        "That is the share that finds nothing.": 1 - share(),
        "That is how many studies find it: their share is asked for.": STUDIES * share(),
    }
    return Trial((*settings, np.random.default_rng(draw.seed)), share(), wrong)
