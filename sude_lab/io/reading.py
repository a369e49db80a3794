"""Files and values that people write, read safely: whole and right, or refused in one sentence."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

from sude_lab.errors import UserError

MOST_BYTES = 1 << 18
"""The longest text that is read: what people write by hand is a hundred times shorter."""
MOST_VALUES = 100_000
"""The most values of a YAML file, aliases written out: a few lines of them can mean billions."""

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

    Raises:
        UserError: it is no such YAML, or says more than `MOST_VALUES` values.
    """
    import yaml

    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            twice = _said_twice(node, set())
            if twice is not None:
                raise UserError(
                    f"{what} says {twice.value!r} twice, again in line "
                    f"{twice.start_mark.line + 1}: leave one of them out."
                )
            # Before anything is made of it: an alias costs a letter and may stand for a million.
            if _size(node, {}) > MOST_VALUES:
                raise UserError(
                    f"{what} says more than {MOST_VALUES:,} values, aliases written out: make it "
                    "shorter."
                )
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except UserError:
        raise
    except RecursionError:
        raise UserError(f"{what} is nested too deeply: write it flatter.") from None
    except Exception as error:  # dates that are none, numbers too long: errors of any class
        raise UserError(f"{what} is not readable YAML ({error}): correct it.") from error


def _said_twice(node: Any, seen: set[int]) -> Any:
    """Return a key that stands in one mapping twice, of which YAML would take the last; or None."""
    import yaml

    if isinstance(node, yaml.ScalarNode) or id(node) in seen:
        return None
    seen.add(id(node))
    parts = node.value
    if isinstance(node, yaml.MappingNode):
        keys: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in keys:
                    return key
                keys.add((key.tag, key.value))
        parts = chain.from_iterable(node.value)
    return next((k for part in parts if (k := _said_twice(part, seen)) is not None), None)


def _size(node: Any, known: dict[int, int]) -> int:
    """Return how many values a node means, each alias counted with all that it stands for."""
    import yaml

    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = MOST_VALUES + 1  # what it counts as inside itself: such a list has no end
        pairs = isinstance(node, yaml.MappingNode)
        parts = chain.from_iterable(node.value) if pairs else node.value
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]
