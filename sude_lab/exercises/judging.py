"""How an answer is judged: against the right values, then against typical slips, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import torch
from torch import Tensor

Answer = Callable[..., Any]


class Mistake(AssertionError):
    """A wrong answer, and what to think about; a notebook shows that sentence alone."""

    def _render_traceback_(self) -> list[str]:
        """Return what IPython prints in place of a traceback, which would point into our code."""
        return [f"\x1b[31mNot yet.\x1b[0m {self}"]


def ask(answer: Answer, *arguments: Any) -> Any:
    """Return answer(*arguments), with copies of the tensors, so that no answer spoils the next.

    An error inside the answer is not touched: its traceback is what helps.

    Raises:
        Mistake: the answer is no function, is still a stub, or returns nothing.
    """
    if not callable(answer):
        raise Mistake("Give the function itself, without calling it.")
    copies = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    try:
        given = answer(*copies)
    except NotImplementedError:
        raise Mistake("Still to be written: replace `raise NotImplementedError()`.") from None
    if given is None:
        raise Mistake("Your function returns nothing: end it with `return ...`.")
    return given


def judge(
    given: Any, right: Tensor, slips: Mapping[str, Tensor], *, tolerance: float = 1e-6
) -> None:
    """Accept the right values, name a slip by its values, else say where the first difference is.

    Values are the same to four digits (float32 is welcome) and in shape; `tolerance` is how far
    they may be apart besides, for answers with chance in them. `slips`: what to say, and the values
    that a typical wrong answer gives.

    Raises:
        Mistake: the answer is wrong.
    """
    right = right.detach().double()
    try:
        given = torch.as_tensor(given).detach().double()
    except (TypeError, ValueError, RuntimeError):
        raise Mistake(f"A tensor is expected, your answer is a {type(given).__name__}.") from None
    if _same(given, right, tolerance):
        return
    for says, wrong in slips.items():
        if _same(given, wrong.detach().double(), tolerance):
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


Table: TypeAlias = pd.Series | pd.DataFrame


def judge_table(given: Any, right: Table, slips: Mapping[str, Table]) -> None:
    """As `judge`, for tables of pandas; their rows and columns may come in any order.

    Raises:
        Mistake: the answer is wrong.
    """
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
    """As `judge`, for a text or a list of texts.

    Raises:
        Mistake: the answer is wrong.
    """
    if isinstance(right, str):
        kind, lines = "text", [right]
    else:
        kind, lines = "list of texts", list(right)
    told = [given] if isinstance(given, str) and isinstance(right, str) else given
    if not isinstance(told, list | tuple) or not all(isinstance(x, str) for x in told):
        raise Mistake(f"A {kind} is expected, your answer is a {type(given).__name__}.")
    if list(told) == lines:
        return
    for says, wrong in slips.items():
        if list(told) == ([wrong] if isinstance(wrong, str) else list(wrong)):
            raise Mistake(says)
    if len(told) != len(lines):
        raise Mistake(f"{len(lines)} texts are expected, you gave {len(told)}.")
    mine, theirs = next(pair for pair in zip(told, lines, strict=True) if pair[0] != pair[1])
    raise Mistake(f"You gave “{mine}”; it should be “{theirs}”.")


def interval_of(given: object) -> Tensor:
    """Return (low, high) as a tensor.

    Raises:
        Mistake: these are not two numbers.
    """
    try:
        return torch.as_tensor(np.asarray(given, dtype=float)).reshape(2)
    except (TypeError, ValueError, RuntimeError):
        raise Mistake("Return two numbers, the interval's lower and upper end.") from None


def choose(letter: Any, right: str, slips: Mapping[str, str]) -> None:
    """Accept the right letter of several; `slips`: what to say to every other one.

    Raises:
        Mistake: the letter is another, or none of those to choose from.
    """
    chosen = str(letter).strip().lower()
    if chosen == right:
        return
    letters = ", ".join(sorted([right, *slips]))
    raise Mistake(slips.get(chosen, f"Answer with one of the letters {letters}, in quotes."))


def _same(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=tolerance)
