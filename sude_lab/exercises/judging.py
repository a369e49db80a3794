"""How an answer is judged: against the right values, then against typical slips, by name.

Whatever judges raises `Mistake` where the answer is wrong, and returns None where it is right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
import torch
from torch import Tensor

Answer = Callable[..., Any]
Table: TypeAlias = pd.Series | pd.DataFrame


class Mistake(AssertionError):
    """A wrong answer, and what to think about; a notebook shows that sentence alone."""

    def _render_traceback_(self) -> list[str]:
        """Return what IPython prints in place of a traceback, which would point into our code."""
        return [f"\x1b[31mNot yet.\x1b[0m {self}"]


class Trial(NamedTuple):
    """What an answer is called with, the right result, and those of typical slips by what to say.

    A text, or a list of them, is compared by `judge_words`, a table of pandas by `judge_table`, all
    else by `judge`.
    """

    arguments: tuple[Any, ...]
    right: Any
    slips: Mapping[str, Any]
    tolerance: float = 1e-6


def twice(check: Callable[..., None]) -> Callable[..., None]:
    """Let a check try two seeds: what is right by chance is wrong at once, not only when graded."""

    @wraps(check)
    def checked(answer: Answer, *, seed: int = 0) -> None:
        for each in (seed, seed + 10):
            check(answer, seed=each)

    return checked


def check(trials: Callable[[int], Trial | list[Trial]]) -> Callable[..., None]:
    """Make a check, called as check(answer, *, seed=0), of a function from a seed to its trials."""

    def checked(answer: Answer, *, seed: int = 0) -> None:
        several = trials(seed)
        for trial in [several] if isinstance(several, Trial) else several:
            given = ask(answer, *trial.arguments)
            if isinstance(trial.right, str | list):
                judge_words(given, trial.right, trial.slips)
            elif isinstance(trial.right, Table):
                judge_table(given, trial.right, trial.slips)
            else:
                judge(given, trial.right, trial.slips, tolerance=trial.tolerance)

    for name in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(checked, name, getattr(trials, name))
    return twice(checked)


def choice(right: str, about: str, reasons: Mapping[str, str]) -> Callable[[str], None]:
    """Make the check of a question with letters; `reasons`: what to say to every wrong one."""

    def checked(letter: Any) -> None:
        chosen = str(letter).strip().lower()
        if chosen != right:
            letters = ", ".join(sorted([right, *reasons]))
            raise Mistake(
                reasons.get(chosen, f"Answer with one of the letters {letters}, in quotes.")
            )

    checked.__doc__ = f"Check {about}"
    return checked


def ask(answer: Answer, *arguments: Any) -> Any:
    """Return answer(*arguments), with copies, so that no answer spoils the next.

    An error inside the answer is not touched: its traceback is what helps.
    """
    if not callable(answer):
        raise Mistake("Give the function itself, without calling it.")
    copies = [_copied(argument) for argument in arguments]
    try:
        given = answer(*copies)
    except NotImplementedError:
        raise Mistake("Still to be written: replace `raise NotImplementedError()`.") from None
    if given is None:
        raise Mistake("Your function returns nothing: end it with `return ...`.")
    return given


def judge(given: Any, right: Any, slips: Mapping[str, Any], *, tolerance: float = 1e-6) -> None:
    """Accept the right values, name a slip by its values, else say where the first difference is.

    Values are the same to four digits (float32 is welcome) and in shape; `tolerance` is how far
    they may be apart besides, for answers with chance in them. `slips`: what to say, and the values
    that a typical wrong answer gives.
    """
    right = torch.as_tensor(right).detach().double()
    try:
        given = torch.as_tensor(given).detach().double()
    except (TypeError, ValueError, RuntimeError):
        raise Mistake(f"A tensor is expected, your answer is a {type(given).__name__}.") from None
    if right.dim() == 0 and given.numel() == 1:
        given = given.reshape(())
    if _same(given, right, tolerance):
        return
    values = {says: torch.as_tensor(wrong).detach().double() for says, wrong in slips.items()}
    for says, wrong in [*values.items(), *_usual(right)]:
        if _same(given, wrong, tolerance):
            raise Mistake(says)
    if given.shape != right.shape:
        raise Mistake(
            f"The shape {tuple(right.shape)} is expected, yours is {tuple(given.shape)}: which "
            "axis is summed, and which is kept?"
        )
    off = ~torch.isclose(given, right, rtol=1e-4, atol=tolerance)
    where = tuple(off.nonzero()[0].tolist())
    place = f" at {list(where)}" if where else ""
    raise Mistake(f"The value{place} is {given[where]:.5g} and should be {right[where]:.5g}.")


def judge_table(given: Any, right: Table, slips: Mapping[str, Table]) -> None:
    """As `judge`, for tables of pandas; their rows and columns may come in any order."""
    if type(given) is not type(right):
        raise Mistake(f"A pandas {type(right).__name__} is expected, not a {type(given).__name__}.")

    def values(table: Table) -> Tensor:
        same = all(set(a) == set(b) for a, b in zip(table.axes, right.axes, strict=True))
        ordered = table.reindex_like(right) if same else table
        return torch.as_tensor(ordered.to_numpy(dtype=float, copy=True))

    judge(values(given), values(right), {says: values(wrong) for says, wrong in slips.items()})


def judge_words(
    given: Any, right: str | Sequence[str], slips: Mapping[str, str | Sequence[str]]
) -> None:
    """As `judge`, for a text or a list of texts."""
    if isinstance(right, str):
        kind, lines = "text", [right]
    else:
        kind, lines = "list of texts", list(right)
    texts = [given] if isinstance(given, str) and isinstance(right, str) else given
    if not isinstance(texts, list | tuple) or not all(isinstance(x, str) for x in texts):
        raise Mistake(f"A {kind} is expected, your answer is a {type(given).__name__}.")
    if list(texts) == lines:
        return
    for says, wrong in slips.items():
        if list(texts) == ([wrong] if isinstance(wrong, str) else list(wrong)):
            raise Mistake(says)
    if len(texts) != len(lines):
        raise Mistake(f"{len(lines)} texts are expected, you gave {len(texts)}.")
    text, line = next(pair for pair in zip(texts, lines, strict=True) if pair[0] != pair[1])
    raise Mistake(f"You gave “{text}”; it should be “{line}”.")


def judge_gradients(
    answer: Answer, learning: Mapping[str, Tensor], fixed: Mapping[str, Tensor], *rest: Any
) -> None:
    """Check that answer(*learning, *fixed, *rest) has gradients in all of `learning` alone."""
    leaves = {k: x.clone().requires_grad_() for k, x in (dict(learning) | dict(fixed)).items()}
    value = ask(lambda: answer(*leaves.values(), *rest))  # as they are: a copy would be no leaf
    slopes: Sequence[Tensor | None] = [None] * len(leaves)
    if isinstance(value, Tensor) and value.requires_grad:
        slopes = torch.autograd.grad(value.sum(), list(leaves.values()), allow_unused=True)
    reached = {
        k for k, slope in zip(leaves, slopes, strict=True) if slope is not None and slope.any()
    }
    for name in learning:
        if name not in reached:
            raise Mistake(
                f"The values are right, but no gradient reaches {name}, which is what learns."
            )
    if reached & set(fixed):
        raise Mistake(
            f"The values are right, but a gradient reaches {' or '.join(fixed)}: the bar over "
            "theta in eq. 7 means `.detach()`."
        )


def interval_of(given: object) -> Tensor:
    """Return (low, high) as a tensor."""
    try:
        return torch.as_tensor(np.asarray(given, dtype=float)).reshape(2)
    except (TypeError, ValueError, RuntimeError):
        raise Mistake("Return two numbers, the interval's lower and upper end.") from None


def two_of(given: object, what: str) -> Sequence[Any]:
    """Return an answer that must be a pair."""
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise Mistake(f"Return {what}.")
    return given


def of_variance(right: Tensor, variance: Tensor, equation: str) -> dict[str, Tensor]:
    """Return the slips of what is divided by sigma_t^2; right: (B,) or (B, D), variance: (B,)."""
    each = variance.reshape(-1, *[1] * (right.dim() - 1))
    slips = {
        f"You divided by sigma; {equation} has its square, and `variance` is that square.": (
            right * each.sqrt()
        ),
        "`variance` is sigma^2 already: you squared it once more.": right / each,
        f"Divide by sigma^2, as {equation} does.": right * each,
    }
    if right.dim() > 1:
        spread = "`variance` is one number a sample, and you spread it over the last axis: make it "
        slips[f"{spread}(B, 1)."] = right * each / variance
    return slips


def of_norm(right: Tensor, difference: Tensor, equation: str) -> dict[str, Tensor]:
    """Return the slips of what is a squared norm of a difference, (B, ...), times a factor."""
    difference = difference.flatten(1)
    square = difference.square().sum(1)
    return {
        f"{equation} has the squared length, not the length.": right / square.sqrt(),
        f"You averaged over the dimensions: the norm of {equation} is a sum.": (
            right / difference.shape[1]
        ),
        "You added before you squared: squares first.": right * difference.sum(1).square() / square,
        "Those are absolute values: it has squares.": right * difference.abs().sum(1) / square,
    }


def _copied(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.clone()
    kinds = np.ndarray | pd.Series | pd.DataFrame | list
    return argument.copy() if isinstance(argument, kinds) else argument


def _usual(right: Tensor) -> list[tuple[str, Tensor]]:
    """Slips that may happen in any answer, after those of the task itself."""
    slips = {
        "The sign is turned.": -right,
        "Twice as large as it should be: is a 2 missing that divides, or one too many?": 2 * right,
        "Half as large as it should be: is a 2 missing, or does one divide too much?": right / 2,
        "Upside down: these are one divided by the right values.": 1 / right,
        "Take the logarithm: these are the exponentials of the right values.": right.exp(),
        "These are the logarithms of the right values.": right.log(),
        "These are the squares of the right values.": right.square(),
        "These are the roots of the right values.": right.sqrt(),
        "Nothing but zeros: is a result lost on the way?": torch.zeros_like(right),
    }
    if right.dim():
        slips |= {
            "You averaged over the batch: every sample has its own value.": right.mean(0),
            "You averaged over the batch: every sample has its own value. (The mean stands in "
            "every row.)": right.mean(0).expand_as(right),
            "You summed over the batch: every sample has its own value.": right.sum(0),
            "All are there, in the opposite order.": right.flip(0),
        }
    if right.dim() > 1:
        slips["Rows and columns are exchanged."] = right.transpose(0, 1)
    if right.dim() == 1:
        slips["One number a sample, (B,), and not (B, 1)."] = right[:, None]
    return [(says, wrong) for says, wrong in slips.items() if bool(wrong.isfinite().all())]


def _same(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=tolerance)
