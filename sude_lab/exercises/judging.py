"""How an answer is judged: against the right values, then against typical slips, by name.

Whatever judges raises `Mistake` where the answer is wrong, and returns None where it is right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

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


class Draw:
    """Where a check's inputs come from: the same numbers for the same seed."""

    def __init__(self, seed: int) -> None:
        self.seed, self.generator = seed, torch.Generator().manual_seed(seed)
        self.rng = np.random.default_rng(seed)

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal numbers of a shape, float64."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Return numbers between `low` and `high`, float64."""
        unit = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return low + (high - low) * unit

    def fresh(self, after: int = 0) -> torch.Generator:
        """Return a new generator with the seed `after` places later."""
        return torch.Generator().manual_seed(self.seed + after)


@dataclass(frozen=True)
class Trial:
    """One question to an answer, the right result, and those of typical slips by what to say.

    `call`: the arguments, or a function that runs the answer. Where `two` says what two results
    are asked for, `right` and `slips` are pairs. `learns` and `fixed` name the first arguments:
    a gradient must reach those that learn, and not those that are fixed.
    """

    call: tuple[Any, ...] | Callable[[Answer], Any]
    right: Any
    slips: Any
    tolerance: float = 1e-6
    hint: str = ""
    two: str = ""
    learns: Sequence[str] = ()
    fixed: Sequence[str] = ()

    def judge(self, answer: Answer) -> None:
        """Try an answer."""
        given = self.call(answer) if callable(self.call) else ask(answer, *self.call)
        parts = [(given, self.right, self.slips)]
        if self.two:
            if not isinstance(given, tuple | list) or len(given) != 2:
                raise Mistake(f"Return {self.two}.")
            parts = list(zip(given, self.right, self.slips, strict=True))
        for value, right, slips in parts:
            if isinstance(right, str | list):
                judge_words(value, right, slips)
            elif isinstance(right, Table):
                judge_table(value, right, slips)
            else:
                judge(value, right, slips, self.tolerance, self.hint)
        if self.learns and not callable(self.call):
            judge_gradients(answer, self.call, self.learns, self.fixed)


def check(trials: Callable[[Draw], Trial | list[Trial]]) -> Callable[..., None]:
    """Make a check, called as check(answer, *, seed=0), of a function that draws its trials.

    It tries two seeds: what is right by chance is wrong at once, not only when graded.
    """

    def checked(answer: Answer, *, seed: int = 0) -> None:
        for each in (seed, seed + 10):
            drawn = trials(Draw(each))
            for trial in [drawn] if isinstance(drawn, Trial) else drawn:
                trial.judge(answer)

    for name in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(checked, name, getattr(trials, name))
    return checked


def choice(right: str, about: str, **reasons: str) -> Callable[[str], None]:
    """Make the check of a question with letters; `reasons`: what to say to every wrong one."""

    def checked(letter: Any) -> None:
        chosen = str(letter).strip().lower()
        if chosen != right:
            letters = ", ".join(sorted([right, *reasons]))
            says = f"Answer with one of the letters {letters}, in quotes."
            raise Mistake(reasons.get(chosen, says))

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


def judge(
    given: Any, right: Any, slips: Mapping[str, Any], tolerance: float = 1e-6, hint: str = ""
) -> None:
    """Accept the right values, name a slip by its values, else say where the first difference is.

    Values are the same to four digits and in shape; `tolerance` is how far they may be apart
    besides, for answers with chance in them. `hint` is said of values that are no known slip.
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
    for says, wrong in [*slips.items(), *_usual(right)]:
        if _same(given, torch.as_tensor(wrong).detach().double(), tolerance):
            raise Mistake(says)
    if given.shape != right.shape:
        shapes = f"{tuple(right.shape)} is expected, yours is {tuple(given.shape)}"
        raise Mistake(f"The shape {shapes}: which axis is summed, and which is kept?")
    where = tuple((~torch.isclose(given, right, rtol=1e-4, atol=tolerance)).nonzero()[0].tolist())
    place = f" at {list(where)}" if where else ""
    says = f"The value{place} is {given[where]:.5g} and should be {right[where]:.5g}."
    raise Mistake(f"{says} {hint}".strip())


def judge_table(given: Any, right: Table, slips: Mapping[str, Table]) -> None:
    """As `judge`, for tables of pandas; their rows and columns may come in any order."""
    if type(given) is not type(right):
        raise Mistake(f"A pandas {type(right).__name__} is expected, not a {type(given).__name__}.")

    def values(table: Table) -> Tensor:
        same = all(set(a) == set(b) for a, b in zip(table.axes, right.axes, strict=True))
        ordered = table.reindex_like(right) if same else table
        return torch.as_tensor(ordered.to_numpy(dtype=float, copy=True))

    judge(values(given), values(right), {says: values(wrong) for says, wrong in slips.items()})


def judge_words(given: Any, right: str | list[str], slips: Mapping[str, str | list[str]]) -> None:
    """As `judge`, for a text or a list of texts."""
    kind, lines = ("text", [right]) if isinstance(right, str) else ("list of texts", right)
    texts = [given] if isinstance(given, str) and isinstance(right, str) else given
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise Mistake(f"A {kind} is expected, your answer is a {type(given).__name__}.")
    if list(texts) == lines:
        return
    for says, wrong in slips.items():
        if list(texts) == ([wrong] if isinstance(wrong, str) else wrong):
            raise Mistake(says)
    if len(texts) != len(lines):
        raise Mistake(f"{len(lines)} texts are expected, you gave {len(texts)}.")
    text, line = next(pair for pair in zip(texts, lines, strict=True) if pair[0] != pair[1])
    raise Mistake(f"You gave “{text}”; it should be “{line}”.")


def judge_gradients(
    answer: Answer, arguments: Sequence[Any], learns: Sequence[str], fixed: Sequence[str]
) -> None:
    """Check that a gradient of answer(*arguments) reaches `learns` and not `fixed`, the first."""
    names = [*learns, *fixed]
    leaves = {n: x.clone().requires_grad_() for n, x in zip(names, arguments, strict=False)}
    rest, reached = arguments[len(names) :], set()
    value = ask(lambda: answer(*leaves.values(), *rest))  # as they are: a copy would be no leaf
    if isinstance(value, Tensor) and value.requires_grad:
        slopes = torch.autograd.grad(
            value.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True
        )
        reached = {name for name, slope in zip(names, slopes, strict=True) if slope.any()}
    for name in set(learns) - reached:
        says = f"no gradient reaches {name}, which is what learns."
        raise Mistake(f"The values are right, but {says}")
    if reached & set(fixed):
        says = f"a gradient reaches {' or '.join(fixed)}: the bar over theta means `.detach()`."
        raise Mistake(f"The values are right, but {says}")


def interval(draw: Draw, *arguments: Any) -> Callable[[Answer], Tensor]:
    """Return what runs an answer that draws, answer(*arguments, rng): (low, high) as a tensor."""

    def given(answer: Answer) -> Tensor:
        ends = ask(answer, *arguments, np.random.default_rng(draw.seed))
        try:
            return torch.as_tensor(np.asarray(ends, dtype=float)).reshape(2)
        except (TypeError, ValueError, RuntimeError):
            raise Mistake("Return two numbers, the interval's lower and upper end.") from None

    return given


def named(made: Callable[[str], Any], slips: Mapping[str, str]) -> dict[str, Any]:
    """Return made(slip) by what to say of it; slips: what to say, by the slip's short name."""
    return {says: made(slip) for slip, says in slips.items()}


def of_variance(right: Tensor, variance: Tensor, equation: str) -> dict[str, Tensor]:
    """Return the slips of what is divided by sigma_t^2; right: (B,) or (B, D), variance: (B,)."""
    each = variance.reshape(-1, *[1] * (right.dim() - 1))
    slips = {
        f"You divided by sigma: {equation} has its square, `variance`.": right * each.sqrt(),
        "`variance` is sigma^2 already: you squared it once more.": right / each,
        f"Divide by sigma^2, as {equation} does.": right * each,
    }
    if right.dim() > 1:
        says = "`variance` is one number a sample, you spread it over the last axis: use (B, 1)."
        slips[says] = right * each / variance
    return slips


def _copied(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.clone()
    return argument.copy() if isinstance(argument, np.ndarray | Table | list) else argument


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
        own = "every sample has its own value."
        slips |= {
            f"You averaged over the batch: {own}": right.mean(0),
            f"Every row is the batch's mean: {own}": right.mean(0).expand_as(right),
            f"You summed over the batch: {own}": right.sum(0),
            "All are there, in the opposite order.": right.flip(0),
        }
    if right.dim() > 1:
        slips["Rows and columns are exchanged."] = right.transpose(0, 1)
    if right.dim() == 1:
        slips["One number a sample, (B,), and not (B, 1)."] = right[:, None]
    return [(says, wrong) for says, wrong in slips.items() if bool(wrong.isfinite().all())]


def _same(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=tolerance)
