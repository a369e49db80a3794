"""One family of statistics, in which the unit is the subject.

Values of one subject (its seeds, prompts and pictures) are averaged first, so that a subject with
more of them weighs no more. What is said about other subjects follows from these means alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

Values = Sequence[float] | np.ndarray
Labels = Sequence[object] | np.ndarray

AGREES, DISAGREES = "agrees", "disagrees"
NO_DIFFERENCE, CANNOT_TELL = "no difference", "cannot tell"


@dataclass(frozen=True)
class Interval:
    """A mean with its interval, over `number` subjects; nan ends where there is no interval."""

    mean: float
    low: float
    high: float
    number: int

    def __str__(self) -> str:
        return self.words("+.2f")

    @property
    def p(self) -> float:
        """The two-sided p of Student's t that the mean is 0; nan without an interval by t."""
        half = (self.high - self.low) / 2
        if not half > 0:
            return math.nan if math.isnan(half) else float(self.mean == 0)
        return 1 - t_within(self.mean / half * t_quantile(self.number - 1), self.number - 1)

    def words(self, form: str) -> str:
        """Return "+0.24 [-0.03, +0.51]" for "+.2f", or "+0.24" without an interval."""
        mean, low, high = (format(x, form) for x in (self.mean, self.low, self.high))
        return mean if math.isnan(self.low) else f"{mean} [{low}, {high}]"


# --- Student's t: exact for whole degrees of freedom ---


def t_within(t: float, degrees: int) -> float:
    """Return P(|T| <= t) of Student's t, a finite sum (Abramowitz and Stegun, 26.7.3 and 26.7.4).

    With theta = arctan(t / sqrt(nu)): sin theta (1 + 1/2 cos^2 theta + (1 3)/(2 4) cos^4 theta
    + ...) up to cos^(nu - 2) for even nu, and for odd nu the like sum over odd powers, plus theta,
    times 2 / pi.
    """
    theta = math.atan(abs(t) / math.sqrt(degrees))
    sin, cos = math.sin(theta), math.cos(theta)
    if degrees % 2 == 0:
        k = np.arange(1, degrees // 2)
        return float(sin * (1 + np.cumprod((2 * k - 1) / (2 * k) * cos**2).sum()))
    k = np.arange(1, (degrees - 1) // 2)
    rest = cos * (1 + np.cumprod(2 * k / (2 * k + 1) * cos**2).sum()) if degrees > 1 else 0.0
    return float(2 / math.pi * (theta + sin * rest))


@lru_cache(maxsize=1024)
def t_quantile(degrees: int, level: float = 0.95) -> float:
    """Return the t with P(|T| <= t) = `level`: 2.776 for 4 degrees of freedom and 0.95."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):  # bisection in the angle, which is bounded
        middle = (low + high) / 2
        inside = t_within(math.sqrt(degrees) * math.tan(middle), degrees)
        low, high = (middle, high) if inside < level else (low, middle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)


# --- means over subjects ---


def subject_means(values: Values, subjects: Labels | None = None) -> np.ndarray:
    """Return one mean a subject, by the order of their names; without `subjects` the values.

    Args: values (N,), subjects (N,), whose value each is. Returns (number of subjects,).
    """
    x = np.asarray(values, dtype=float)
    if subjects is None:
        return x
    names, index = np.unique(np.asarray(subjects), return_inverse=True)
    return np.bincount(index, weights=x, minlength=len(names)) / np.bincount(index)


def mean_interval(values: Values, subjects: Labels | None = None) -> Interval:
    """Return the mean of the subjects' means and its 95 % interval, mean -+ t_(n - 1) s / sqrt(n).

    s is the standard deviation (n - 1) of the n subjects' means. In 4,000 simulated studies "95 %"
    held the truth in 95 % for normal subjects; where their effects are skewed (exponential), in
    90 % (n = 5) and 94 % (n = 30). One subject: no interval, nan.
    """
    means = subject_means(values, subjects)
    n = len(means)
    mean = float(means.mean()) if n else math.nan
    if n < 2:
        return Interval(mean, math.nan, math.nan, n)
    half = t_quantile(n - 1) * float(means.std(ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def jackknife_interval(read: Callable[[np.ndarray], float], number: int) -> Interval:
    """Return what is read off all subjects together, with Student's t on the pseudo-values.

    theta_i = n theta - (n - 1) theta without subject i (Tukey, 1958); of a mean, the values.

    Args: `read` returns the number for subjects (indices) of 0, ..., n - 1; `number` is n.
    """
    everyone = np.arange(number)
    whole = read(everyone)
    if number < 2:
        return Interval(whole, math.nan, math.nan, number)
    without = np.array([read(np.delete(everyone, i)) for i in everyone])
    spread = mean_interval(number * whole - (number - 1) * without)
    half = (spread.high - spread.low) / 2
    return Interval(whole, whole - half, whole + half, number)


# --- what may be concluded ---


def sign_flip_p(
    values: Values, subjects: Labels | None = None, *, draws: int = 100_000, seed: int = 0
) -> float:
    """Return the two-sided p of the sign-flip test that differences scatter evenly around 0.

    The share of sign patterns of the subjects' means whose |sum| is at least the observed one: of
    all 2^n for n <= 20 (five subjects: never below 1/16), else of `draws` and the observed one.
    """
    means = subject_means(values, subjects)
    observed = abs(means.sum()) * (1 - 1e-12)  # the same sum in another order counts as equal
    if len(means) <= 20:
        sums = np.zeros(1)
        for mean in means:
            sums = np.concatenate([sums + mean, sums - mean])
        return float((np.abs(sums) >= observed).mean())
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (draws, len(means)))
    return (1 + int((np.abs(signs @ means) >= observed).sum())) / (1 + draws)


def holm(p: Values) -> np.ndarray:
    """Return Holm's (1979) adjusted p-values, in the order given: max over j <= i of (m - j) p_(j).

    Comparing them with 0.05 keeps the chance of any false claim among all m below 0.05. A nan (a
    question that was asked and could not be answered) counts among the m, and stays nan.
    """
    x = np.asarray(p, dtype=float)
    order = x.argsort(kind="stable")  # nan last
    stepped = np.fmax.accumulate(x[order] * (len(x) - np.arange(len(x))))
    adjusted = np.empty_like(x)
    adjusted[order] = stepped.clip(max=1)
    return np.where(np.isnan(x), math.nan, adjusted)


def verdict(interval: Interval, *, p: float | None = None, margin: float | None = None) -> str:
    """Return what an interval says of the claim that the mean is above 0.

    "agrees" or "disagrees" where it lies on one side of 0; with `p`, the corrected one, only where
    that is below 0.05, too. With `margin` the claim is that it is no different from 0: "disagrees"
    where it lies below 0, "no difference" where it lies within -+ `margin`. Else "cannot tell".
    """
    sure = p is None or p < 0.05
    if interval.high < 0 and sure:
        return DISAGREES
    if margin is not None:
        is_within = -margin < interval.low and interval.high < margin
        return NO_DIFFERENCE if is_within else CANNOT_TELL
    return AGREES if interval.low > 0 and sure else CANNOT_TELL


# --- shares of independent trials ---

Z = 1.959963984540054
"""The normal 97.5 % quantile."""


def wilson_interval(right: int, number: int) -> Interval:
    """Return a share with Wilson's (1927) 95 % interval, which has a width at 0 and at 1, too.

    (p + z^2/2n -+ z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n). The trials are independent, such
    as drawings of different scenes.
    """
    share, extra = right / number, Z**2 / number
    middle = share + extra / 2
    half = Z * math.sqrt(share * (1 - share) / number + extra / (4 * number))
    return Interval(share, (middle - half) / (1 + extra), (middle + half) / (1 + extra), number)


# --- one run ---


def drawings_interval(
    values: Values,
    prompts: Labels,
    noises: Labels,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Return the mean over drawings of one run, with an interval over other prompts and noises.

    Pictures of one prompt resemble each other, and so do those that begin with the same noise: both
    factors are resampled, independently, and a value counts as often as its prompt was drawn times
    its noise (A. B. Owen's pigeonhole bootstrap, doi 10.1214/07-AOAS122; with few prompts somewhat
    narrow, as every percentile bootstrap). A factor with one level is not resampled; where neither
    has two, there is no interval: nan. `number` is the number of values.
    """
    x = np.asarray(values, dtype=float)
    rng = np.random.default_rng(seed)
    factors = [np.unique(np.asarray(f), return_inverse=True) for f in (prompts, noises)]
    shape = [len(levels) for levels, _ in factors]
    mean = float(x.mean()) if len(x) else math.nan
    if max(shape) < 2:
        return Interval(mean, math.nan, math.nan, len(x))
    weights = [rng.multinomial(n, np.full(n, 1 / n), resamples) for n in shape]
    sums, counts = np.zeros(shape), np.zeros(shape)
    cells = tuple(index for _, index in factors)
    np.add.at(sums, cells, x)
    np.add.at(counts, cells, 1)
    totals, numbers = (((weights[0] @ each) * weights[1]).sum(1) for each in (sums, counts))
    # Where cells are empty a resample may hit nothing but those: it says nothing.
    means = totals[numbers > 0] / numbers[numbers > 0]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high), len(x))
