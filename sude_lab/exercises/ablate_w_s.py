"""Checks of the exercises to lesson 05: a sweep over w_s, its intervals, its front, its winner."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sude_lab.exercises.evaluating import bootstrap_quantiles
from sude_lab.exercises.judging import Answer, Trial, ask, check, interval_of, judge, twice, two_of
from sude_lab.exercises.worlds import normal, uniform

# name: how many attributes it is asked for, alignment of plain tuning, how fast SuDe helps, what
# fidelity plain tuning has, what one unit of w_s costs of it
SUBJECTS = {
    "dog": (4, 0.30, 0.9, 0.75, 0.05),
    "cat": (3, 0.45, 0.7, 0.70, 0.04),
    "candle": (2, 0.60, 0.2, 0.80, 0.09),
    "bowl": (1, 0.80, 0.5, 0.85, 0.16),
}


def made_up_sweep(seed: int = 0) -> pd.DataFrame:
    """Return a made-up sweep over w_s, a row a picture, as `data/results` has it.

    Four subjects, w_s of arXiv 2403.06775, eq. 10, from 0 to 4, three seeds; the attribute is
    missing where the prompt asked for none. Alignment rises with w_s and fidelity falls, for each
    subject in its own way. These are no measurements.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for name, (count, start, gain, look, cost) in SUBJECTS.items():
        for w_s in (0.0, 0.5, 1.0, 2.0, 4.0):
            for of_seed in range(3):
                luck = 0.04 * rng.standard_normal()
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
                aligned = 1 - (1 - start) * np.exp(-gain * w_s) + luck
                for attribute in (None, *(f"attribute {k + 1}" for k in range(count))):
                    of_picture = 0.03 * rng.standard_normal(3)
                    alignment = 0.95 if attribute is None else aligned
                    values = np.clip(
                        np.array([alignment, look - cost * w_s, 0.9]) + of_picture, 0, 1
                    )
                    names = ("attribute_alignment", "subject_fidelity", "category_alignment")
                    measured = dict(zip(names, values.round(4).tolist(), strict=True))
                    rows.append(common | {"attribute": attribute} | measured)
    return pd.DataFrame(rows)


@check
def check_by_weight(seed: int) -> list[Trial]:
    """Check by_weight(table, measure): means of a measure, subjects in rows, w_s in columns.

    Over the pictures that were asked for an attribute, and all seeds. No equation: the axes of
    Fig. 7 of arXiv 2403.06775.
    """
    table, keys = made_up_sweep(seed), ["subject", "weight_sude"]
    changed, trials = table[table["attribute"].notna()], []
    for measure, other in (
        ("attribute_alignment", "subject_fidelity"),
        ("subject_fidelity", "attribute_alignment"),
    ):
        groups = changed.groupby(keys)[measure]
        right = groups.mean().unstack()
        first = changed[changed["seed"] == 0]
        slips = {
            "Rows without an attribute are pictures of the plain prompt: leave them out.": (
                table.groupby(keys)[measure].mean().unstack()
            ),
            "Those are sums: means are asked for.": groups.sum().unstack(),
            "Those are medians: means are asked for.": groups.median().unstack(),
            "That is the first seed alone: average all.": (
                first.groupby(keys)[measure].mean().unstack()
            ),
            "You took another column than `measure`.": changed.groupby(keys)[other]
            .mean()
            .unstack(),
            "Subjects go in rows, w_s in columns.": right.T,
        }
        trials.append(Trial((table, measure), right, slips))
    return trials


@check
def check_paired_gains(seed: int) -> Trial:
    """Check paired_gains(means): what every w_s > 0 wins over w_s = 0, subject by subject.

    means: as `check_by_weight`. The result has the same rows, and no column 0. No equation.
    """
    changed = made_up_sweep(seed).dropna(subset="attribute")
    means = changed.groupby(["subject", "weight_sude"])["attribute_alignment"].mean().unstack()
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


def check_cluster_interval(answer: Answer, *, seed: int = 0) -> None:
    """Check cluster_interval(values, subjects, rng): a 95 % bootstrap interval over subjects.

    10,000 times draw as many subjects as there are, with replacement, take *all* values of the
    drawn ones, and their mean; the interval goes from the 2.5 % to the 97.5 % quantile. values:
    (N,); subjects: (N,), whose value each is. Right within 4 % of the interval's width. No
    equation; the studies use Student's t, `sude_lab.evaluate.statistics.mean_interval`.
    """
    rng = np.random.default_rng(seed)
    own, counts = np.array([1.5, -0.5, 0.2, 0.0, -1.0, 0.4]), np.array([9, 2, 3, 2, 4, 2])
    own = own + 0.1 * rng.standard_normal(6)
    subjects = np.repeat(np.array(list("abcdef")), counts)
    values = np.repeat(own, counts) + 0.2 * rng.standard_normal(counts.sum())

    def interval(of: np.ndarray, clusters: np.ndarray | None = None, level: float = 0.95) -> Tensor:
        return torch.tensor(bootstrap_quantiles(of, clusters, level=level)).double()

    right = interval(values, subjects)
    given = ask(answer, values.copy(), subjects.copy(), np.random.default_rng(seed))
    judge(
        interval_of(given),
        right,
        {
            "You drew single values: one subject's come together, or not at all.": interval(values),
            "You averaged every subject first: take all values of those drawn, so that subjects "
            "with more of them count more.": interval(
                np.array([values[subjects == name].mean() for name in "abcdef"])
            ),
            "That is a 90 % interval: 95 % lie between the quantiles 0.025 and 0.975.": interval(
                values, subjects, level=0.9
            ),
            "Lower end first.": right.flip(0),
        },
        tolerance=0.04 * float(right[1] - right[0]),
    )


@check
def check_front(seed: int) -> Trial:
    """Check front(alignment, fidelity): which settings no other one beats, bool (N,).

    One beats another where it is at least as good in both and better in one (Pareto). Equal
    settings do not beat each other. alignment, fidelity: (N,), larger is better. No equation.
    """
    g = torch.Generator().manual_seed(seed)
    x = torch.tensor([0.2, 0.4, 0.4, 0.6, 0.8, 0.8, 0.7, 0.9, 0.5]).double()
    y = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.5, 0.3, 0.2, 0.4]).double()
    order = torch.randperm(9, generator=g)
    x, y = (v[order] + 0.05 * float(uniform(g, 0, 1)) for v in (x, y))

    def beaten(better: Tensor) -> Tensor:
        return better.any(1)

    as_good = (x[None] >= x[:, None]) & (y[None] >= y[:, None])
    better = (x[None] > x[:, None]) | (y[None] > y[:, None])
    both = (x[None] > x[:, None]) & (y[None] > y[:, None])
    others = ~torch.eye(9, dtype=torch.bool)
    lower = (x[None] >= x[:, None]) & (y[None] <= y[:, None])
    slips = {
        "Those are the ones that are beaten.": beaten(as_good & better),
        "Equal in one and worse in one is beaten, too: not better in both.": ~beaten(both),
        "Two settings with the same two numbers do not beat each other.": ~beaten(as_good & others),
        "A setting is as good as itself in both: it does not beat itself.": ~beaten(as_good),
        "Larger is better in both columns: you looked for low fidelity.": (
            ~beaten(lower & ((x[None] > x[:, None]) | (y[None] < y[:, None])))
        ),
        "The largest sum is one of them: the front has all not beaten.": x + y == (x + y).max(),
    }
    return Trial((x, y), ~beaten(as_good & better), slips)


@check
def check_best_weight(seed: int) -> Trial:
    """Check best_weight(alignment, fidelity, keep): a w_s for every subject, by a rule.

    Of the w_s whose fidelity is at least `keep` times that of w_s = 0, the one with the highest
    alignment; of equal ones the smallest. Tables as of `check_by_weight`; a Series by subject. No
    equation: arXiv 2403.06775, section 5, chooses by eye.
    """
    weights, names = [0.0, 0.5, 1.0, 2.0, 4.0], ["dog", "cat", "candle", "bowl", "teapot"]
    aligned = [
        [0.3, 0.5, 0.7, 0.8, 0.9],
        [0.4, 0.6, 0.8, 0.8, 0.9],
        [0.6, 0.5, 0.5, 0.4, 0.3],
        [0.7, 0.9, 0.9, 0.9, 1.0],
        [0.2, 0.4, 0.5, 0.6, 0.7],
    ]
    faithful = [
        [0.80, 0.79, 0.76, 0.74, 0.60],
        [0.74, 0.73, 0.72, 0.70, 0.50],
        [0.90, 0.90, 0.90, 0.95, 0.99],
        [0.90, 0.88, 0.86, 0.84, 0.30],
        [0.74, 0.73, 0.70, 0.67, 0.60],
    ]
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(5, generator=g).tolist()
    index = pd.Index([names[k] for k in order], name="subject")
    columns = pd.Index(weights, name="weight_sude")
    alignment, fidelity = (
        pd.DataFrame([table[k] for k in order], index, columns) for table in (aligned, faithful)
    )

    def best(allowed: pd.DataFrame, of: pd.DataFrame = alignment) -> pd.Series:
        return of.where(allowed).idxmax(axis=1)

    keep = 0.9
    allowed = fidelity.ge(keep * fidelity[0.0], axis=0)
    everything = fidelity > -1
    slips = {
        "The rule is missing: a w_s may cost at most a tenth of the fidelity.": best(everything),
        "Compare with the subject's own fidelity at w_s = 0, not with the mean of all.": (
            best(fidelity >= keep * fidelity[0.0].mean())
        ),
        "Of equals take the smallest w_s.": best(allowed[weights[::-1]], alignment[weights[::-1]]),
        "That is the largest w_s that the rule allows: the one with the best alignment is asked "
        "for.": allowed.apply(lambda row: max(w for w in weights if row[w]), axis=1),
        "That is the alignment: its w_s is asked for.": alignment.where(allowed).max(axis=1),
    }
    return Trial((alignment, fidelity, keep), best(allowed), slips)


@twice
def check_naive_and_honest(answer: Answer, *, seed: int = 0) -> None:
    """Check naive_and_honest(gains): what the chosen w_s wins, on the same data and on new data.

    gains: (S, W, K), subjects, settings of w_s, seeds. Naive: for each subject the setting with the
    highest mean over its seeds, and that mean. Honest: leave a seed out, choose by the mean of the
    others, read off the seed left out; the mean over all seeds. Both: the mean over subjects. No
    equation.
    """
    gains = normal(torch.Generator().manual_seed(seed), 5, 4, 3)
    subjects, number = torch.arange(5), gains.shape[2]
    means = gains.mean(2)

    def left_out(how: str) -> Tensor:
        parts = []
        for k in range(number):
            others = (gains.sum(2) - gains[:, :, k]) / (number - 1)
            by = {"all": means, "itself": gains[:, :, k], "together": others.mean(0).expand(5, 4)}
            chosen = by.get(how, others).argmax(1)
            read = others if how == "read the others" else gains[:, :, k]
            parts.append(read[subjects, chosen].mean())
        return torch.stack(parts).mean()

    naive, honest = means.max(1).values.mean(), left_out("honest")
    given = ask(answer, gains)
    two_of(given, "two numbers, the naive gain and the honest one")
    judge(
        given[0],
        naive,
        {
            "Naive: average over the seeds before you choose, one w_s a subject.": (
                gains.amax(1).mean()
            ),
            "Naive: each subject has a w_s: you chose one w_s for all.": means.mean(0).max(),
            "Naive: that is the best single run of each subject.": gains.flatten(1).amax(1).mean(),
            "Naive: that is the mean over all settings: nothing was chosen.": gains.mean(),
            "Naive and honest are exchanged: the naive one comes first.": honest,
        },
    )
    judge(
        given[1],
        honest,
        {
            "Honest: you chose with all seeds, also the one that is left out.": left_out("all"),
            "Honest: you chose by the seed that is left out, not the others.": left_out("itself"),
            "Honest: read the gain off the seed left out, not the others.": (
                left_out("read the others")
            ),
            "Honest: each subject has a w_s: you chose one w_s for all.": left_out("together"),
        },
    )
