"""Similarities of features, and means, intervals and paired differences of results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

MEASURES = ("attribute_alignment", "subject_fidelity", "category_alignment")
TRUTH = {
    "CLIP-T": "attribute_alignment",
    "CLIP-L-T": "attribute_alignment",
    "BLIP-T": "attribute_alignment",
    "CLIP-I": "subject_fidelity",
    "CLIP-L-I": "subject_fidelity",
    "DINO-I": "subject_fidelity",
    "DINOv2-I": "subject_fidelity",
}
"""What the drawn world's oracle knows of what each learned metric is meant to measure."""


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the cosine of every row of `a` (N, D) with every row of `b` (M, D): (N, M).

    cos(a, b) = <a, b> / (|a| |b|).
    """
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    return a @ b.T


def image_similarity(pictures: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Return each picture's mean cosine with all references: CLIP-I, DINO-I (arXiv 2208.12242).

    Args: features (N, D) and (M, D). Returns (N,); its mean is the mean over all pairs.
    """
    return cosines(pictures, references).mean(1)


def text_similarity(pictures: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Return each picture's cosine with its own text: CLIP-T, BLIP-T.

    Args: features (N, D), a text a picture. Returns (N,).
    """
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (pictures, texts))
    return (a * b).sum(1)


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    clusters: Sequence[object] | np.ndarray | None = None,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a mean.

    With `clusters` (the subject of each value) whole clusters are drawn, because the seeds of one
    subject are not independent of each other. One cluster alone gives no interval: (nan, nan).
    """
    x = np.asarray(values, dtype=float)
    groups = np.arange(len(x)) if clusters is None else pd.factorize(np.asarray(clusters))[0]
    number = int(groups.max()) + 1 if len(x) else 0
    if number < 2:
        return float("nan"), float("nan")
    sums = np.bincount(groups, weights=x)
    counts = np.bincount(groups)
    drawn = np.random.default_rng(seed).integers(number, size=(resamples, number))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def per_run(table: pd.DataFrame) -> pd.DataFrame:
    """Return one row a run: means over the pictures of attributes the subject does not show."""
    asked = table[table["attribute"].fillna("") != ""]
    keys = [k for k in ("subject", "category", "method", "variant", "seed") if k in asked]
    return asked.groupby(keys, as_index=False)[list(MEASURES)].mean()


def summarize(table: pd.DataFrame, *, against: str = "plain") -> pd.DataFrame:
    """Return a row a (method, variant): means and paired differences with 95 % intervals.

    Pairs share subject, method and seed; intervals are bootstrapped over subjects.
    """
    runs = per_run(table)
    rows = []
    for (method, variant), group in runs.groupby(["method", "variant"], sort=False):
        row: dict[str, object] = {
            "method": method,
            "variant": variant,
            "subjects": group["subject"].nunique(),
            "runs": len(group),
        }
        base = runs[(runs["method"] == method) & (runs["variant"] == against)]
        pairs = group.merge(base, on=["subject", "seed"], suffixes=("", "_base"))
        for name in MEASURES:
            row[name] = group[name].mean()
            if variant != against and len(pairs):
                difference = pairs[name] - pairs[f"{name}_base"]
                low, high = bootstrap_interval(difference.to_numpy(), pairs["subject"].to_numpy())
                row[f"{name}_gain"] = difference.mean()
                row[f"{name}_low"], row[f"{name}_high"] = low, high
        rows.append(row)
    return pd.DataFrame(rows)


def gains(
    table: pd.DataFrame,
    measures: Sequence[str] = MEASURES,
    *,
    by: Sequence[str] = ("method",),
    against: str = "plain",
) -> pd.DataFrame:
    """Return a row a (`by`, variant, measure): mean, paired gain over a variant, 95 % interval.

    `table` has a row a picture. A run's value is the mean over its pictures, pairs share `by`,
    subject and seed, and the interval is bootstrapped over subjects. The variant that is compared
    with has no gain (nan).
    """
    keys = [*by, "subject", "seed"]
    runs = table.groupby([*keys, "variant"], as_index=False, sort=False)[list(measures)].mean()
    base = runs[runs["variant"] == against].drop(columns="variant")
    pairs = runs.merge(base, on=keys, how="left", suffixes=("", "_base"))
    rows = []
    for names, group in pairs.groupby([*by, "variant"], sort=False):
        for measure in measures:
            row: dict[str, object] = dict(zip([*by, "variant"], names, strict=True))
            row |= {"measure": measure, "mean": group[measure].mean()}
            gain = (group[measure] - group[f"{measure}_base"]).dropna()
            if row["variant"] == against or gain.empty:
                row |= dict.fromkeys(("gain", "low", "high"), float("nan"))
            else:
                subjects = group.loc[gain.index, "subject"].to_numpy()
                low, high = bootstrap_interval(gain.to_numpy(), subjects)
                row |= {"gain": gain.mean(), "low": low, "high": high}
            row |= {"subjects": group["subject"].nunique(), "runs": len(group)}
            rows.append(row)
    return pd.DataFrame(rows)


# --- evaluations: a row a picture and metric ---

PAIR = ["subject", "tuning_seed", "number", "caption", "seed", "picture"]
"""What makes pictures of two runs a pair: they were asked the same, from the same noise."""


def crossed_interval(
    values: Sequence[float] | np.ndarray,
    rows: Sequence[object] | np.ndarray,
    columns: Sequence[object] | np.ndarray,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the bootstrap interval of a mean over two crossed factors, such as prompts and seeds.

    Both are resampled, independently of each other, and a value counts as often as its row was
    drawn times its column: pictures of one prompt resemble each other, and so do pictures that
    begin with the same noise. This is A. B. Owen's pigeonhole bootstrap (doi 10.1214/07-AOAS122),
    which errs to the wide side. A factor with one level alone is not resampled; where neither has
    two, there is no interval: (nan, nan).
    """
    x = np.asarray(values, dtype=float)
    levels: list[tuple[np.ndarray, int]] = []
    drawn: list[np.ndarray] = []
    rng = np.random.default_rng(seed)
    for factor in (rows, columns):
        index = pd.factorize(np.asarray(factor))[0]
        number = int(index.max()) + 1 if len(x) else 0
        levels.append((index, number))
        if number > 1:
            drawn.append(rng.multinomial(number, np.full(number, 1 / number), size=resamples))
        else:
            drawn.append(np.ones((resamples, number)))
    (i, n), (j, m) = levels
    if max(n, m) < 2:
        return float("nan"), float("nan")
    sums, counts = np.zeros((n, m)), np.zeros((n, m))
    np.add.at(sums, (i, j), x)
    np.add.at(counts, (i, j), 1)
    totals, weights = (((drawn[0] @ table) * drawn[1]).sum(1) for table in (sums, counts))
    # Where cells are empty a resample may hit nothing but those: it says nothing.
    means = totals[weights > 0] / weights[weights > 0]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def factors(table: pd.DataFrame) -> tuple[str, pd.Series, str, pd.Series]:
    """Return what the intervals of an evaluation are taken over: names and levels, a row a value.

    Prompts and noises; with several subjects the subjects stand for their prompts, and with
    several seeds of tuning those stand for the noises, because what is drawn within one of them
    is not independent.
    """
    if table["subject"].nunique() > 1:
        first, asked = "subjects", table["subject"]
    else:
        first, asked = "prompts", table["number"].astype(str) + table["caption"]
    if table["tuning_seed"].nunique() > 1:
        return first, asked, "tuning seeds", table["tuning_seed"]
    return first, asked, "noises", table["seed"].astype(str) + "-" + table["picture"].astype(str)


def _over(names: tuple[str, pd.Series, str, pd.Series]) -> str:
    """Say over what an interval is taken: "4 prompts x 8 noises"; one level alone is none."""
    counts = ((names[1].nunique(), names[0]), (names[3].nunique(), names[2]))
    return " x ".join(f"{number} {name}" for number, name in counts if number > 1)


def compare(scores: pd.DataFrame, *, resamples: int = 10_000) -> pd.DataFrame:
    """Return a row a (settings, variant, kind, metric): mean, 95 % interval, paired difference.

    Variants are compared with "plain" of the same settings, or where there is none with the first
    variant of all. Differences are taken picture by picture over the pairs that both have.

    Args: scores: a row a picture and metric, with the columns of `PAIR`, `settings`, `variant`,
    `kind`, `metric` and `value`.
    """
    result: list[dict[str, Any]] = []
    runs = scores[["settings", "variant"]].drop_duplicates()
    first = tuple(runs.iloc[0])
    known = set(runs.itertuples(index=False, name=None))
    for keys, group in scores.groupby(["settings", "variant", "kind", "metric"], sort=False):
        settings, variant, kind, metric = keys
        names = factors(group)
        row = dict(zip(("settings", "variant", "kind", "metric"), keys, strict=True))
        row |= {
            "pictures": len(group),
            "over": _over(names),
            "mean": group["value"].mean(),
        }
        row["low"], row["high"] = crossed_interval(
            group["value"], names[1], names[3], resamples=resamples
        )
        base = (settings, "plain") if (settings, "plain") in known else first
        if base != (settings, variant):
            other = scores[(scores["settings"] == base[0]) & (scores["variant"] == base[1])]
            other = other[(other["kind"] == kind) & (other["metric"] == metric)]
            pairs = group.merge(other[[*PAIR, "value"]], on=PAIR, suffixes=("", "_base"))
            row |= {"against": ", ".join(filter(None, base)), "pairs": len(pairs)}
            if len(pairs):
                difference = pairs["value"] - pairs["value_base"]
                names = factors(pairs)
                row["difference"] = difference.mean()
                row["difference_low"], row["difference_high"] = crossed_interval(
                    difference, names[1], names[3], resamples=resamples
                )
        result.append(row)
    return pd.DataFrame(result)


def rank_agreement(scores: pd.DataFrame) -> pd.DataFrame:
    """Return how well each learned metric ranks the runs as the oracle does (`TRUTH`).

    Spearman's rho: the correlation of the ranks of the runs' means, 1 for the same order. A metric
    with fewer than three runs, or none that differ, has no row.
    """
    means = scores.groupby(["run", "metric"])["value"].mean().unstack("metric")
    rows = []
    for metric, truth in TRUTH.items():
        if metric in means and truth in means:
            both = means[[metric, truth]].dropna()
            if len(both) >= 3 and (both.nunique() > 1).all():
                ranks = both.rank()
                rho = np.corrcoef(ranks[metric], ranks[truth])[0, 1]
                rows.append({"metric": metric, "oracle": truth, "runs": len(both), "rho": rho})
    return pd.DataFrame(rows, columns=["metric", "oracle", "runs", "rho"])
