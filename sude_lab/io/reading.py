"""Files and values that people write, read safely: whole and right, or refused in one sentence."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from sude_lab.errors import UserError, one_line

MOST_BYTES = 1 << 18
"""The longest text that is read: what people write by hand is a hundred times shorter."""


is_file, is_dir = os.path.isfile, os.path.isdir
"""As `pathlib`'s, but False also for what can be no name: too long, or with a NUL."""


def no_file(path: Path) -> str | None:
    """Say why nothing is read from a path; None: it is a regular file."""
    try:
        if path.is_file():
            return None
        if path.is_dir():
            return "is a folder"
        return "is not a regular file" if path.exists() else "does not exist"
    except OSError as error:  # a name too long, a folder without permission
        return f"cannot be opened ({error.strerror})"


def hash_of(content: Any) -> str:
    """Return the SHA-256 of what JSON can say; other values as their text."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def digest(content: Path | bytes) -> str:
    """Return the SHA-256 of bytes, or of a file's."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text(path: Path | str, what: str, instead: str) -> str:
    """Return the text of a file in UTF-8, of at most `MOST_BYTES`.

    In the sentence `what` is what it should be, "The grid sweep.yaml", and `instead` what to name
    in its place, "a YAML file".
    """
    path = Path(path)
    why = no_file(path)
    try:
        if why is None and path.stat().st_size <= MOST_BYTES:
            return path.read_text(encoding="utf-8-sig")  # some editors begin with a mark
        why = why or f"has more than {MOST_BYTES:,} bytes"
    except OSError as error:
        why = f"cannot be opened ({error.strerror})"
    except UnicodeDecodeError:
        why = "is not UTF-8"
    raise UserError(f"{what} cannot be read (it {why}): name {instead}.")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        OSError, ValueError: it cannot be read, or is no JSON in UTF-8, or nested too deeply.
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
        reason = f"{line}{one_line(reason, 200)}"
        raise UserError(f"{what} is not readable YAML ({reason}): correct it.") from error
