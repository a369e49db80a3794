"""Files and values that people write, read safely: whole and right, or refused in one sentence."""

from __future__ import annotations

import json
import numbers
import os
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from sude_lab.errors import UserError, one_line

MOST_BYTES = 1 << 18
"""The longest text that is read: what people write by hand is a hundred times shorter."""

# --- files ---------------------------------------------------------------------------------------


def is_file(path: Path | str) -> bool:
    """Whether there is a file of this name; False also for what can be no name of a file."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # too long, or with a NUL
        return False


def is_dir(path: Path | str) -> bool:
    """Whether there is a folder of this name; False also for what can be no name of a folder."""
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):
        return False


def read_text(path: Path | str, what: str, instead: str) -> str:
    """Return the text of a file in UTF-8, of at most `MOST_BYTES`.

    Args:
        path: The file.
        what: What it should be, for the sentence: "The grid sweep.yaml".
        instead: What to name in its place, for the sentence: "a YAML file".

    Raises:
        UserError: there is no such file, it is none (a pipe may never end), it may not be read, is
            too long, or is not UTF-8.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            why = "it is a folder" if path.is_dir() else "it is not a regular file"
        elif path.stat().st_size > MOST_BYTES:
            why = f"it has more than {MOST_BYTES:,} bytes"
        else:
            return path.read_text(encoding="utf-8-sig")  # some editors begin with a mark
    except OSError as error:
        why = error.strerror or str(error)
    except ValueError as error:
        why = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else "its name has a NUL"
    raise UserError(f"{what} cannot be read ({why}): name {instead}.")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON in UTF-8, or is nested too deeply.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply.") from None


def read_yaml(text: str, what: str) -> Any:
    """Return the content of a YAML text: texts, numbers, lists and mappings, never objects.

    A key said twice, and aliases that stand for a hundred times what is written, are refused.

    Raises:
        UserError: it is no such YAML.
    """
    from omegaconf import OmegaConf

    try:
        return OmegaConf.to_container(OmegaConf.create(text))
    except Exception as error:  # numbers too long, nested too deeply: errors of any class
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        reason = str(getattr(error, "problem", None) or error).split(". ")[0]
        raise UserError(
            f"{what} is not readable YAML ({line}{one_line(reason, 200)}): correct it."
        ) from error


# --- values --------------------------------------------------------------------------------------


def check_types(settings: Any) -> None:
    """Check that every field of a dataclass holds what its type says; a whole number is a number.

    Raises:
        UserError: one does not; the sentence names its flag.
    """
    kind: Any = type(settings)
    hints = _hints(kind)
    for f in fields(settings):
        value = getattr(settings, f.name)
        kinds = kinds_of(hints[f.name])
        if not any(_fits(value, kind) for kind in kinds):
            flag = f.name.replace("_", "-")
            raise UserError(f"--{flag} is {value!r}: it takes {taken(kinds)}.")


_NAMES: dict[Any, str] = {
    **{float: "a number", int: "a whole number", bool: "on or off"},
    **{str: "a text", Path: "the name of a file"},
}


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def kinds_of(hint: Any) -> tuple[Any, ...]:
    """Return what a type may be: (int, None's type) for int | None."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def taken(kinds: tuple[Any, ...]) -> str:
    """Say what a setting of these kinds takes: its choices, or the first kind in words."""
    choices = [c for kind in kinds for c in get_args(kind) if get_origin(kind) is Literal]
    return ", ".join(map(str, choices)) or _NAMES.get(kinds[0], "another kind of value")


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if get_origin(kind) is tuple:  # tuple[str, ...]
        return isinstance(value, tuple) and all(isinstance(v, get_args(kind)[0]) for v in value)
    if kind in (float, int):
        number = numbers.Real if kind is float else numbers.Integral
        return isinstance(value, number) and not isinstance(value, bool)
    if kind is Path:
        return isinstance(value, os.PathLike)
    return isinstance(value, NoneType if kind is None else kind)
