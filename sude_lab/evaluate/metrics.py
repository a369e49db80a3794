"""Similarities of features, and tables of means and paired differences of results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sude_lab.evaluate.statistics import Interval, drawings_interval, mean_interval

if TYPE_CHECKING:  # a second, which drawing need not wait for
    import pandas as pd

MEASURES = ("attribute_alignment", "subject_fidelity", "category_alignment")


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return <a, b> / (|a| |b|) of every row of `a` (N, D) with every row of `b` (M, D): (N, M)."""
    return _unit(a) @ _unit(b).T


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def image_similarity(pictures: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Return each picture's mean cosine with all references: CLIP-I, DINO-I (arXiv 2208.12242).

    Args: features (N, D) and (M, D). Returns (N,); its mean is the mean over all pairs.
    """
    return cosines(pictures, references).mean(1)


def text_similarity(pictures: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Return each picture's cosine with its own text: CLIP-T, BLIP-T.

    Args: features (N, D), a text a picture. Returns (N,).
    """
    return (_unit(pictures) * _unit(texts)).sum(1)


def per_run(table: pd.DataFrame) -> pd.DataFrame:
    """Return one row a run: means over the pictures of attributes the subject does not show."""
    edits = table[table["attribute"].fillna("") != ""]
    keys = [k for k in ("subject", "category", "method", "variant", "seed") if k in edits]
    return edits.groupby(keys, as_index=False)[list(MEASURES)].mean()


def gains(
    table: pd.DataFrame,
    measures: Sequence[str] = MEASURES,
    *,
    by: Sequence[str] = ("method",),
    against: str = "plain",
) -> pd.DataFrame:
    """Return a row a (`by`, variant, measure): mean, paired gain over a variant, 95 % interval, p.

    `table` has a row a picture. A run's value is the mean over its pictures, pairs share `by`,
    subject and seed, and a subject counts once: mean, interval and p are those of
    `statistics.mean_interval`. Where there is no gain, as for the variant that is
    compared with, it is nan.
    """
    import pandas as pd

    keys = [*by, "subject", "seed"]
    runs = table.groupby([*keys, "variant"], as_index=False, sort=False)[list(measures)].mean()
    base = runs[runs["variant"] == against].drop(columns="variant")
    pairs = runs.merge(base, on=keys, how="left", suffixes=("", "_base"))
    rows = []
    for names, group in pairs.groupby([*by, "variant"], sort=False):
        for measure in measures:
            row: dict[str, object] = dict(zip([*by, "variant"], names, strict=True))
            row |= {"measure": measure, "mean": group.groupby("subject")[measure].mean().mean()}
            gain = (group[measure] - group[f"{measure}_base"]).dropna()
            gain = gain[:0] if row["variant"] == against else gain
            ends = mean_interval(gain, group.loc[gain.index, "subject"])  # nan of nothing
            row |= {"gain": ends.mean, "low": ends.low, "high": ends.high, "p": ends.p}
            rows.append(row | {"subjects": group["subject"].nunique(), "runs": len(group)})
    return pd.DataFrame(rows)


# --- evaluations: a row a picture and metric ---

PAIR = ["subject", "tuning_seed", "number", "caption", "seed", "picture"]
"""What makes pictures of two runs a pair: they were asked the same, from the same noise."""


def interval_of(table: pd.DataFrame, values: pd.Series) -> tuple[Interval, str]:
    """Return the interval of an evaluation's values, and over what it is taken.

    Several subjects: over them ("5 subjects", `mean_interval`). One: over its prompts and noises,
    or over its seeds of tuning where there are several ("4 prompts x 8 noises",
    `drawings_interval`): it speaks of other drawings, not of other subjects.
    """
    subjects = table["subject"].nunique()
    if subjects > 1:
        return mean_interval(values, table["subject"]), f"{subjects} subjects"
    prompts = table["number"].astype(str) + table["caption"]
    name, noises = "noises", table["seed"].astype(str) + "-" + table["picture"].astype(str)
    if table["tuning_seed"].nunique() > 1:
        name, noises = "tuning seeds", table["tuning_seed"]
    counts = {"prompts": prompts.nunique(), name: noises.nunique()}
    over = " x ".join(f"{number} {what}" for what, number in counts.items() if number > 1)
    return drawings_interval(values, prompts, noises), over


def compare(scores: pd.DataFrame) -> pd.DataFrame:
    """Return a row a (settings, variant, kind, metric): mean, 95 % interval, paired difference.

    Variants are compared with "plain" of the same settings, or where there is none with the first
    variant of all. Differences are taken picture by picture over the pairs that both have; of
    several subjects each counts once, see `interval_of`.

    Args: scores: a row a picture and metric, with the columns of `PAIR`, `settings`, `variant`,
    `kind`, `metric` and `value`.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    names = ["settings", "variant", "kind", "metric"]
    groups = dict(iter(scores.groupby(names, sort=False)))
    variants = list(dict.fromkeys(keys[:2] for keys in groups))
    for keys, group in groups.items():
        row = dict(zip(names, keys, strict=True))
        ends, over = interval_of(group, group["value"])
        row |= {"pictures": len(group), "over": over}
        row |= {"mean": ends.mean, "low": ends.low, "high": ends.high}
        plain = (keys[0], "plain")
        base = plain if plain in variants else variants[0]
        if base != keys[:2]:
            other = groups.get((*base, *keys[2:]), scores[:0])
            pairs = group.merge(other[[*PAIR, "value"]], on=PAIR, suffixes=("", "_base"))
            row |= {"against": ", ".join(filter(None, base)), "pairs": len(pairs)}
            if len(pairs):
                change, _ = interval_of(pairs, pairs["value"] - pairs["value_base"])
                row |= {"difference": change.mean}
                row |= {"difference_low": change.low, "difference_high": change.high}
        rows.append(row)
    return pd.DataFrame(rows)
