"""The checks of the exercises in `notebooks/exercises`, shared with pytest, and what they hand out.

A check calls an answer on small random inputs that depend on its seed, and returns None where the
answer is right; a wrong one gets a `Mistake`, whose sentence names the slip if it is a typical one.
Checks print nothing and keep nothing. `check_rho` is the check of `rho` in one of the modules,
which are imported when the first one is used.
"""

from importlib import import_module
from typing import Any


def _names() -> dict[str, Any]:
    names: dict[str, Any] = {}
    for name in ("formulas", "statistics", "training", "worlds", "judging"):
        own = vars(import_module(f"{__name__}.{name}"))
        names |= {n: x for n, x in own.items() if getattr(x, "__module__", "").endswith(name)}
        names |= {f"check_{n}": x for n, x in own.items() if type(x).__name__ == "Check"}
    return {n: x for n, x in names.items() if n[0] != "_"}


def __getattr__(name: str) -> Any:
    if name.startswith("__") or name not in (names := _names()):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return names[name]


def __dir__() -> list[str]:
    return sorted(_names())
