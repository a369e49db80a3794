"""Files and values that people write, read safely: whole and right, or refused in one sentence."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from sude_lab.errors import UserError, one_line

MOST_BYTES = 1 << 18
"""The longest text that is read: what people write by hand is a hundred times shorter."""


is_file, is_dir = os.path.isfile, os.path.isdir
"""As `pathlib`'s, but False also for what can be no name: too long, or with a NUL."""


def read_text(path: Path | str, what: str, instead: str) -> str:
    """Return the text of a file in UTF-8, of at most `MOST_BYTES`.

    In the sentence `what` is what it should be, "The grid sweep.yaml", and `instead` what to name
    in its place, "a YAML file".
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
    """Return the content of a YAML text: texts, numbers, lists and mappings, never objects."""
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
