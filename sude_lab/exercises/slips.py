"""A right answer with one thing changed: what a typical slip is, and what to say of it.

The right answer is a function in this package. Its source is changed at one place at a time; where
the changed function has the values of a student's, that change is what slipped. All sentences, and
most of the changes, stand in `slips.txt`.
"""

from __future__ import annotations

import ast
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from importlib.resources import files
from itertools import accumulate, combinations, pairwise
from typing import Any

Answer = Callable[..., Any]
Changes = Iterator[tuple[str, str]]
"""What to say, and the new code."""

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
    lines = inspect.getsource(right).splitlines()
    first = next(k for k, line in enumerate(lines) if line.startswith("def "))
    return "\n".join(lines[first:])


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
