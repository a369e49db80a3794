"""Checks of the exercises to lesson 10: lines compared at equal fidelity, and what may be said."""

from itertools import product
from typing import Any

import numpy as np

from sude_lab.exercises.judging import Call, Draw, check


def made_up_lines(
    number: int = 12, seed: int = 0
) -> tuple[np.ndarray, dict[str, tuple[np.ndarray, np.ndarray]]]:
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


def _line_call(draw: Draw) -> Call:
    fidelity = np.array([0.62, 0.58, 0.53, 0.47, 0.42, 0.36]) + 0.02 * draw.rng.uniform(size=6)
    alignment = np.array([0.5, 0.55, 0.72, 0.66, 0.86, 0.9]) + 0.02 * draw.rng.uniform(size=6)
    return alignment, fidelity, draw.number(0.44, 0.445) + 0.112 * (draw.seed > 5)


def _kept_calls(draw: Draw) -> list[Call]:
    alignment, *rest = _line_call(draw)  # once the best of all is kept, once not
    return [(alignment, *rest), (alignment[[0, 3, 5, 2, 1, 4]], *rest)]


@check(_kept_calls)
def best_kept(alignment: np.ndarray, fidelity: np.ndarray, goal: float) -> float:
    """Check best_kept(alignment, fidelity, goal): the best alignment of those that keep `goal`."""
    return alignment[fidelity >= goal].max()


@check(lambda draw: (*_line_call(draw)[:2], draw.number(0.4, 0.43), draw.number(0.54, 0.57)))
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
