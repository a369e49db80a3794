"""A right answer with one thing changed: what a typical slip is, and what to say of it.

The right answer is a function in this package. Its source is changed at one place at a time; where
the changed function has the values of a student's, that change is what slipped.
"""

from __future__ import annotations

import ast
import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, combinations, pairwise
from typing import Any

Answer = Callable[..., Any]

BINARY: dict[type[ast.operator], Sequence[tuple[str, str]]] = {
    ast.Sub: (
        ("A sign is turned: `{a}` minus `{b}` is asked for, and not the reverse.", "({b}) - ({a})"),
        ("You added `{b}`: subtract it.", "({a}) + ({b})"),
        ("`{b}` is missing: subtract it.", "{a}"),
        ("`{a}` is missing, from which `{b}` is subtracted.", "-({b})"),
        ("That is the quotient of `{a}` and `{b}`: their difference is asked for.", "{a} / ({b})"),
    ),
    ast.Add: (
        ("You subtracted `{b}`: add it.", "({a}) - ({b})"),
        ("`{b}` is missing: add it.", "{a}"),
        ("`{a}` is missing: add it.", "{b}"),
        ("You multiplied `{a}` and `{b}`: add them.", "({a}) * ({b})"),
    ),
    ast.Mult: (
        ("The factor `{b}` is missing.", "{a}"),
        ("The factor `{a}` is missing.", "{b}"),
        ("You divided by `{b}`: multiply.", "({a}) / ({b})"),
        ("You added `{a}` and `{b}`: multiply them.", "({a}) + ({b})"),
    ),
    ast.Div: (
        ("It is not divided by `{b}` yet.", "{a}"),
        ("You multiplied by `{b}`: divide.", "({a}) * ({b})"),
        ("Upside down: divide `{a}` by `{b}`.", "({b}) / ({a})"),
        ("`{a}` is missing above the line.", "1 / ({b})"),
    ),
    ast.BitOr: (
        ("`{a}` or `{b}` is enough: you asked for both.", "({a}) & ({b})"),
        ("`{b}` is not asked, beside `{a}`.", "{a}"),
    ),
    ast.BitAnd: (
        ("Both are asked for, `{a}` and `{b}`: one was enough for you.", "({a}) | ({b})"),
        ("`{b}` is not asked, beside `{a}`.", "{a}"),
        ("`{a}` is not asked, beside `{b}`.", "{b}"),
    ),
    ast.Pow: (
        ("The exponent `{b}` is missing.", "{a}"),
        ("You multiplied by `{b}`: it is an exponent.", "({a}) * ({b})"),
    ),
}
COMPARE: dict[type[ast.cmpop], Sequence[str]] = {  # itself, other ways, with or without equals
    ast.Eq: ("==", "!=", "!=", "=="),
    ast.Gt: (">", "<=", "<", ">="),
    ast.GtE: (">=", "<", "<=", ">"),
    ast.Lt: ("<", ">=", ">", "<="),
    ast.LtE: ("<=", ">", ">=", "<"),
}
MEASURES = {
    "sum": "a sum",
    "mean": "a mean",
    "median": "a median",
    "amax": "the largest",
    "max": "the largest",
    "any": "whether any",
    "all": "whether all",
}
EVERYWHERE = (
    (r"\.sum\(1\b", ".mean(1", "You averaged over the dimensions: a sum is asked for."),
    (r"\.mean\(1\b", ".sum(1", "You summed over the dimensions: a mean is asked for."),
    (r"\.sum\(1[^)]*\)", ".sum()", "You summed over the whole batch: every sample has its own."),
    (r"\.square\(\)(\.\w+\(1[^)]*\))", r".square()\1.sqrt()", "That is the length: square it."),
    (r"\.square\(\)", ".abs()", "Those are absolute values: squares are asked for."),
    (r"\.square\(\)", "", "The squares are missing."),
)
NAMED = (
    ("The sign of `{x}` is turned.", "(-{x})"),
    ("You squared `{x}`, which stands there as it is.", "({x}) ** 2"),
    ("You took the root of `{x}`, which stands there as it is.", "({x}) ** 0.5"),
    ("`{x}` counts twice: a factor 2 too many.", "(2 * {x})"),
    ("`{x}` counts half: a 2 divides that should not, or one is missing.", "({x} / 2)"),
    ("`{x}` is one too late.", "({x} + 1)"),
    ("`{x}` is one too early.", "({x} - 1)"),
    ("`{x}` is not used.", "1"),
    ("`{x}` is lost: nothing of it is in your result.", "(0 * {x})"),
    ("You averaged `{x}` over the batch: every sample has its own.", "{x}.mean(0, keepdim=True)"),
    ("You took the logarithm of `{x}`, which is one already, or none is asked for.", "{x}.log()"),
    ("You took the exponential of `{x}`: leave it as it is.", "{x}.exp()"),
)


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

    def changed(nodes: Iterable[ast.AST], names: Sequence[str]) -> Iterator[tuple[str, Answer]]:
        for node in nodes:
            start, end = span(node)
            for says, new in _changes(node, of, names):
                yield says, made(right, f"{text[:start]}({new}){text[end:]}")

    yield from changed(places, [])
    for old, new, says in EVERYWHERE:
        if re.search(old, text):
            yield says, made(right, re.sub(old, new, text))
    for (start, middle), (after, end) in pairwise(map(span, function.body[1:])):
        between, one, other = text[middle:after], text[start:middle], text[after:end]
        says = f"The order is wrong: `{one.split()[0]}...` comes before `{other.split()[0]}...`."
        yield says, made(right, text[:start] + other + between + one + text[end:])
    for one, other in combinations(arguments, 2):
        yield f"You exchanged `{one}` and `{other}`.", begun(f"{one}, {other} = {other}, {one}")
    yield from changed(places, list(dict.fromkeys([*arguments, *stored])))
    for x in arguments:
        yield from ((says.format(x=x), begun(f"{x} = {new.format(x=x)}")) for says, new in NAMED)


def _changes(
    node: ast.AST, of: Callable[[Any], str], names: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Yield what to say, and the new code, of the slips at one place."""
    match node:
        case ast.Name(x, ast.Load()):
            if x in names:
                yield from ((says.format(x=x), new.format(x=x)) for says, new in NAMED)
            for other in names if x in names else ():
                if other != x:
                    yield f"You took `{other}` in the place of `{x}`.", other
        case _ if names:
            return
        case ast.BinOp(left, op, right):
            for says, new in BINARY.get(type(op), ()):
                a, b = of(left), of(right)
                yield says.format(a=a, b=b), new.format(a=f"({a})", b=b)
        case ast.UnaryOp(op, x):
            minus = isinstance(op, ast.USub)
            yield (
                f"{'A minus is missing before' if minus else 'Not these, all but'} `{of(x)}`.",
                of(x),
            )
        case ast.Compare(left, [op], [right]) if type(op) in COMPARE:
            a, b, (sign, *others, equal) = of(left), of(right), COMPARE[type(op)]
            for other in others:
                yield f"The wrong way round: `{a} {sign} {b}` is asked for.", f"({a}) {other} ({b})"
            yield f"Where `{a}` equals `{b}` it goes the other way.", f"({a}) {equal} ({b})"
            yield f"`{a} {sign} {b}` is not looked at: here it always holds.", f"({a}) == ({a})"
            yield f"`{a} {sign} {b}` is not looked at: here it never holds.", f"({a}) != ({a})"
            own = "You averaged over the batch before you compared: every sample has its own"
            for one, other in (((a), f"({b}).mean()"), (f"({a}).mean()", b)):
                yield f"{own} value.", f"({one}) {sign} ({other})"
            yield f"{own}.", f"({a}).mean() {sign} ({b}).mean()"
            yield f"You compared with 0, and not with `{b}`.", f"({a}) {sign} 0"
        case ast.Call(ast.Attribute(_, method) as function, given):
            x, call = of(function)[: -len(method) - 1], of(node)[len(of(function)) :]
            yield f"`.{method}(...)` is missing at `{x}`.", x
            if method in MEASURES:
                yield "A root too many: squares are asked for, not a length.", f"{of(node)} ** 0.5"
            for other in MEASURES.keys() - {method} if method in MEASURES else ():
                says = f"You took {MEASURES[other]}: {MEASURES[method]} is asked for."
                yield says, f"{x}.{other}{call}"
            if method in MEASURES and given:
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


def _arguments(node: ast.Call, of: Callable[[Any], str]) -> Iterator[tuple[str, str]]:
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
