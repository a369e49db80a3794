"""Means, intervals and paired differences of results."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

MEASURES = ("attribute_alignment", "subject_fidelity", "category_alignment")


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
