"""How an answer is judged: beside a right one, then beside that one with a slip put into it.

Whatever judges raises `Mistake` where the answer is wrong, and returns None where it is right. The
source of the right one is changed at one place at a time: where the changed function has the values
of a student's, that change is what slipped. All sentences, and most changes, stand in `slips.txt`.
"""

from __future__ import annotations

import ast
import copy
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from itertools import accumulate, combinations, pairwise
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import torch
from torch import Tensor

Answer: TypeAlias = Callable[..., Any]
Changes: TypeAlias = Iterator[tuple[str, str]]
"""What to say, and the new code."""
Call: TypeAlias = tuple[Any, ...]
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

    def near(self, values: Sequence[float], by: float = 0.05) -> Tensor:
        """Return these values, each moved by a number from 0 to `by`, float64, (N,)."""
        return torch.tensor(values).double() + by * self.uniform(0, 1, len(values))

    def number(self, low: float, high: float) -> float:
        """Return one number between `low` and `high`."""
        return float(self.uniform(low, high))


def ask(answer: Answer, call: Call) -> Any:
    """Return answer(*call), with copies, so that no answer spoils the next.

    An error inside the answer is not touched: its traceback is what helps.
    """
    if not callable(answer):
        raise Mistake("Give the function itself, without calling it.")
    try:
        given = answer(*(x.clone() if isinstance(x, Tensor) else copy.deepcopy(x) for x in call))
    except NotImplementedError:
        raise Mistake("Still to be written: replace `raise NotImplementedError()`.") from None
    if given is None:
        raise Mistake("Your function returns nothing: end it with `return ...`.")
    return given


def interval(answer: Answer, call: Call) -> Tensor:
    """Return the two ends that an answer gives as a tensor, (2,)."""
    try:
        return torch.as_tensor(np.asarray(ask(answer, call), dtype=float)).reshape(2)
    except (TypeError, ValueError, RuntimeError):
        raise Mistake("Return two numbers, the interval's lower and upper end.") from None


@dataclass(frozen=True, kw_only=True)
class Check:
    """The check of a task, called as check(answer, *, seed=0); `right` is a right answer.

    `draws` makes the calls it is tried with, and `run` asks an answer in one of them. A wrong one
    is compared with the slips of its task, and of any code and result. Where `two` says what two
    results are asked for, each is judged by itself. `learns` and `fixed` name the first arguments:
    a gradient must reach those that learn, and not those that are fixed.
    """

    right: Answer
    draws: Callable[[Draw], Call | list[Call]]
    run: Callable[[Answer, Call], Any] = ask
    tolerance: float = 1e-6
    hint: str = ""
    two: str = ""
    learns: Sequence[str] = ()
    fixed: Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "__doc__", self.right.__doc__)

    def calls(self, seed: int = 0) -> list[Call]:
        """Return all calls for a seed: of two seeds, so that nothing is right by chance."""
        drawn = [self.draws(Draw(each)) for each in (seed, seed + 10)]
        return [call for part in drawn for call in (part if isinstance(part, list) else [part])]

    def __call__(self, answer: Answer, *, seed: int = 0) -> None:
        """Raise `Mistake` with what slipped if an answer is wrong."""
        calls = self.calls(seed)
        right = [self._parts(self.run(self.right, call)) for call in calls]
        given = [self._read(answer, *pair) for pair in zip(calls, right, strict=True)]
        for k, call in enumerate(calls):
            for part, (one, its) in enumerate(zip(given[k], right[k], strict=True)):
                if not same(one, value := read(its, its), self.tolerance):
                    its_own, should = ([row[part] for row in rows] for rows in (given, right))
                    for says, wrong in self.wrong(answer, calls, part, right):
                        if self._match(its_own, should, wrong):
                            raise Mistake(says)
                    raise Mistake(f"{difference(one, value, self.tolerance)} {self.hint}".strip())
            if self.learns:
                self._judge_gradients(answer, call)

    def _read(self, answer: Answer, call: Call, right: list[Any]) -> list[Any]:
        given = self._parts(self.run(answer, call))
        return [read(*pair) for pair in zip(given, right, strict=True)]

    def _match(self, given: list[Any], right: list[Any], wrong: Iterator[Any]) -> bool:
        """Say whether all results are those of a slip; a change may be no code that runs."""
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                return all(
                    same(one, read(its, should), self.tolerance)
                    for one, its, should in zip(given, wrong, right, strict=True)
                )
        except Exception:
            return False

    def wrong(
        self, answer: Answer, calls: list[Call], part: int, right: list[list[Any]]
    ) -> Iterator[tuple[str, Iterator[Any]]]:
        """Yield what to say of every slip, and its results of all calls."""
        text, names = source_of(self.right), list(inspect.signature(self.right).parameters)

        def results(slip: Answer, calls: list[Call] = calls) -> Iterator[Any]:
            return (self._parts(self.run(slip, call))[part] for call in calls)

        def of_right(change: str) -> Iterator[Any]:
            values = (read(parts[part], parts[part]) for parts in right)
            return (eval(change, {"torch": torch, "right": value}) for value in values)

        for change, says in slips_of(self.right.__name__):
            if "->" in change:
                yield says, results(made(self.right, changed(text, change)))
            else:
                yield says, of_right(change)
        yield from ((says, results(slip)) for says, slip in one_change_slips(self.right))
        yield from ((says, of_right(change)) for change, says in slips_of("the result"))
        for k, name in enumerate(names if len(names) == len(calls[0]) else ()):
            values = {call[k] for call in calls if isinstance(call[k], int | float | str)}
            if len(values) > 1:  # the same answer, asked with another number: no change?
                others = [(*call[:k], min(values - {call[k]}), *call[k + 1 :]) for call in calls]
                says = "makes no difference: is it used, or does a number of your own stand there?"
                yield f"`{name}` {says}", results(answer, others)

    def _judge_gradients(self, answer: Answer, call: Call) -> None:
        """Check that a gradient of answer(*call) reaches what learns and not what is fixed."""
        names = [*self.learns, *self.fixed]
        leaves = {n: x.clone().requires_grad_() for n, x in zip(names, call, strict=False)}
        value, reached = answer(*leaves.values(), *call[len(names) :]), set()
        if isinstance(value, Tensor) and value.requires_grad:
            slopes = torch.autograd.grad(
                value.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True
            )
            reached = {name for name, slope in zip(names, slopes, strict=True) if slope.any()}
        for name in set(self.learns) - reached:
            says = f"no gradient reaches {name}, which is what learns."
            raise Mistake(f"The values are right, but {says}")
        if reached & set(self.fixed):
            says = f"a gradient reaches {' or '.join(self.fixed)}: the bar over theta means"
            raise Mistake(f"The values are right, but {says} `.detach()`.")

    def _parts(self, given: Any) -> list[Any]:
        if not self.two:
            return [given]
        if not isinstance(given, tuple | list) or len(given) != 2:
            raise Mistake(f"Return {self.two}.")
        return list(given)


def check(draws: Callable[[Draw], Call | list[Call]], **settings: Any) -> Callable[[Answer], Check]:
    """Make the `Check` of a task out of its right answer."""
    return lambda right: Check(right=right, draws=draws, **settings)


def check_letter(letter: Any, right: str = "", **reasons: str) -> None:
    """Check a choice: that it is a letter from a to d, and with `right` that it is the right one.

    Only the hidden checks know `right` and what to say of the others, `reasons`: trying all four
    wins nothing.
    """
    chosen = str(letter).strip().lower()
    if chosen not in ("a", "b", "c", "d"):
        raise Mistake("Answer with one of the letters a, b, c, d, in quotes.")
    if right and chosen != right:
        raise Mistake(reasons[chosen])


def read(given: Any, right: Any) -> Any:
    """Return a result in the form of the right one: texts in a list, all else a float64 tensor."""
    if isinstance(right, str | list):
        kind, texts = ("text", [given]) if isinstance(right, str) else ("list of texts", given)
        if not isinstance(texts, list | tuple) or not all(isinstance(x, str) for x in texts):
            raise Mistake(f"A {kind} is expected, your answer is a {type(given).__name__}.")
        return list(texts)
    if isinstance(right, Table):
        if type(given) is not type(right):
            kinds = f"{type(right).__name__} is expected, not a {type(given).__name__}"
            raise Mistake(f"A pandas {kinds}.")
        alike = all(set(a) == set(b) for a, b in zip(given.axes, right.axes, strict=True))
        given = (given.reindex_like(right) if alike else given).to_numpy(dtype=float, copy=True)
    try:
        value = torch.as_tensor(given).detach().double()
    except (TypeError, ValueError, RuntimeError):
        raise Mistake(f"A tensor is expected, your answer is a {type(given).__name__}.") from None
    scalar = torch.as_tensor(right).dim() == 0 if not isinstance(right, Table) else False
    return value.reshape(()) if scalar and value.numel() == 1 else value


def same(one: Any, other: Any, tolerance: float = 1e-6) -> bool:
    """Say whether texts are equal, or numbers to four digits (and `tolerance`) and in shape."""
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return one == other
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=tolerance)


def difference(given: Any, right: Any, tolerance: float = 1e-6) -> str:
    """Say where two results, as `read` has them, differ first."""
    if isinstance(right, list):
        if len(given) != len(right):
            return f"{len(right)} texts are expected, you gave {len(given)}."
        text, line = next(pair for pair in zip(given, right, strict=True) if pair[0] != pair[1])
        return f"You gave “{text}”; it should be “{line}”."
    if given.shape != right.shape:
        shapes = f"{tuple(right.shape)} is expected, yours is {tuple(given.shape)}"
        return f"The shape {shapes}: which axis is summed, and which is kept?"
    where = tuple((~torch.isclose(given, right, rtol=1e-4, atol=tolerance)).nonzero()[0].tolist())
    place = f" at {list(where)}" if where else ""
    return f"The value{place} is {given[where]:.5g} and should be {right[where]:.5g}."


# --- a right answer with one thing changed --------------------------------------------------------

COMPARE: dict[type[ast.cmpop], Sequence[str]] = {  # itself, other ways, with or without equals
    ast.Eq: ("==", "!=", "!=", "=="),
    ast.Gt: (">", "<=", "<", ">="),
    ast.GtE: (">=", "<", "<=", ">"),
    ast.Lt: ("<", ">=", ">", "<="),
    ast.LtE: ("<=", ">", ">=", "<"),
}


@lru_cache
def slips_of(what: str) -> list[list[str]]:
    """Return the rows of a task, or of a kind of code, in `slips.txt`: a change, what to say."""
    table = files("sude_lab.exercises").joinpath("slips.txt").read_text(encoding="utf-8")
    section = re.search(rf"^\[{what}\]\n((?:.+\n)*)", table, re.M)
    return [row.split("  # ") for row in section[1].splitlines()] if section else []


def changed(text: str, changes: str) -> str:
    """Return a source with "old -> new; old -> new" done in it, or its result: "return -> new"."""
    for change in changes.split("; "):
        old, new = (part.strip() for part in change.split("->"))
        if old == "return":
            old, new = text[text.rindex("return ") :], f"return {new}"
        assert old in text, (old, text)
        text = text.replace(old, new)
    return text


def source_of(right: Answer) -> str:
    """Return a function's source, from `def` on."""
    source = inspect.getsource(right)
    return source[source.index("def ") :].rstrip()


def made(right: Answer, text: str) -> Answer:
    """Return the function that `text` defines, a changed source of `right`, in its module."""
    scope = dict(right.__globals__)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(text, "<a slip>", "exec", dont_inherit=True), scope)
    return scope[right.__name__]


def one_change_slips(right: Answer) -> Iterator[tuple[str, Answer]]:
    """Yield what to say, and the wrong answer, of every single change of a right answer."""
    text = source_of(right)
    (function,) = ast.parse(text).body
    assert isinstance(function, ast.FunctionDef)
    starts = list(accumulate((len(line) for line in text.splitlines(keepends=True)), initial=0))

    def span(node: Any) -> tuple[int, int]:
        first = starts[node.lineno - 1] + node.col_offset
        return first, starts[node.end_lineno - 1] + node.end_col_offset

    def of(node: ast.AST) -> str:
        return text[slice(*span(node))]

    body = [node for part in function.body[1:] for node in ast.walk(part)]
    quoted = {id(n) for f in body if isinstance(f, ast.JoinedStr) for n in ast.walk(f)}
    places = [node for node in body if hasattr(node, "lineno") and id(node) not in quoted]
    places.sort(key=lambda node: not isinstance(node, ast.Compare))
    arguments = [each.arg for each in function.args.args]
    stored = [n.id for n in places if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    first = span(function.body[1])[0]

    def begun(line: str) -> Answer:
        return made(right, f"{text[:first]}{line}\n    {text[first:]}")

    def at_places(names: Sequence[str]) -> Iterator[tuple[str, Answer]]:
        for node in places:
            start, end = span(node)
            for says, new in _changes(node, of, names):
                yield says, made(right, f"{text[:start]}({new}){text[end:]}")

    yield from at_places([])
    for change, says in slips_of("the text"):
        old, new = (part.strip() for part in change.split("->"))
        if re.search(old, text):
            yield says, made(right, re.sub(old, new, text))
    for (start, middle), (after, end) in pairwise(map(span, function.body[1:])):
        between, one, other = text[middle:after], text[start:middle], text[after:end]
        says = f"The order is wrong: `{one.split()[0]}...` comes before `{other.split()[0]}...`."
        yield says, made(right, text[:start] + other + between + one + text[end:])
    for one, other in combinations(arguments, 2):
        yield f"You exchanged `{one}` and `{other}`.", begun(f"{one}, {other} = {other}, {one}")
    yield from at_places(list(dict.fromkeys([*arguments, *stored])))
    for x in arguments:
        yield from ((says, begun(f"{x} = {new}")) for says, new in _rows("a name", x=x))


def _rows(section: str, **parts: str) -> Changes:
    """Yield the changes of a kind of code in `slips.txt`, with the parts of a place put in."""
    return ((says.format(**parts), new.format(**parts)) for new, says in slips_of(section))


def _changes(node: ast.AST, of: Callable[[Any], str], names: Sequence[str]) -> Changes:
    """Yield the slips at one place; with `names`, those in which names are taken."""
    match node:
        case ast.Name(x, ast.Load()):
            if x in names:
                yield from _rows("a name", x=x)
                others = [other for other in names if other != x]
                yield from ((f"You took `{o}` in the place of `{x}`.", o) for o in others)
        case _ if names:
            return
        case ast.BinOp(left, op, right):
            yield from _rows(f"a {type(op).__name__} b", a=of(left), b=of(right))
        case ast.UnaryOp(op, x):
            yield from _rows("USub a" if isinstance(op, ast.USub) else "Not a", a=of(x))
        case ast.Compare(left, [op], [right]) if type(op) in COMPARE:
            signs = dict(
                zip(("sign", "turned", "mirrored", "equal"), COMPARE[type(op)], strict=True)
            )
            yield from _rows("a compared with b", a=of(left), b=of(right), **signs)
        case ast.Call(ast.Attribute(_, method) as function, given):
            x, call = of(function)[: -len(method) - 1], of(node)[len(of(function)) :]
            measures = dict(slips_of("a measure"))
            yield f"`.{method}(...)` is missing at `{x}`.", x
            if method in measures:
                yield "A root too many: squares are asked for, not a length.", f"{of(node)} ** 0.5"
                its = measures.pop(method)
                for other, that in measures.items():
                    yield f"You took {that}: {its} is asked for.", f"{x}.{other}{call}"
                if given:
                    yield f"You took `.{method}` of the whole batch at once.", f"{x}.{method}()"
                    if x.endswith(".square()"):
                        inner = x.removesuffix(".square()")
                        says = "First the squares, then their sum: you squared a sum."
                        yield says, f"{inner}.{method}{call}.square()"
            yield from _arguments(node, of)
        case ast.Call():
            yield from _arguments(node, of)
        case ast.Subscript(x, at):
            yield f"`[{of(at)}]` is missing at `{of(x)}`.", of(x)
        case ast.Tuple(parts, ast.Load()) | ast.List(parts, ast.Load()) if not any(
            isinstance(part, ast.Slice) for part in parts
        ):
            turned = ", ".join(of(part) for part in reversed(parts))
            yield f"In the wrong order: `{of(node)}` is asked for.", f"[{turned}]"
        case ast.Expr(x):
            yield f"`{of(x)}` is missing.", "None"


def _arguments(node: ast.Call, of: Callable[[Any], str]) -> Changes:
    """Yield the slips in what a function is given."""
    name, parts = of(node.func), [of(each) for each in [*node.args, *node.keywords]]
    for k, part in enumerate(parts):
        left, rest = parts[:k], parts[k + 1 :]
        if re.fullmatch(r"(dim=|axis=)?[01]", part):
            other = part[:-1] + str(1 - int(part[-1]))
            says = f"`{name}({part})` is asked for: you took the other axis, `{other}`."
            yield says, f"{name}({', '.join([*left, other, *rest])})"
        if "=" in part:
            yield f"`{part}` is missing.", f"{name}({', '.join([*left, *rest])})"
        elif rest and "=" not in rest[0]:
            turned = ", ".join([*left, rest[0], part, *rest[1:]])
            yield f"You exchanged `{part}` and `{rest[0]}` in `{name}`.", f"{name}({turned})"
        else:
            yield f"`{part}` is missing in `{name}(...)`.", f"{name}({', '.join(left)})"
        if name.endswith("where"):
            yield f"That is `{part}` in all cases: `{name}` is missing.", part
