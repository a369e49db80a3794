"""What a backbone's name stands for, whatever happens to the name: its files, or its commit."""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from sude_lab.io.opening import all_files, hub_id, resolve_source


def hash_of(content: Any) -> str:
    """Return the SHA-256 of what JSON can say; other values as their text."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def digest(content: Path | bytes) -> str:
    """Return the SHA-256 of bytes, or of a file's."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def backbone_identity(source: str) -> str:
    """Return a hash of a pipeline folder's files, or a hub id with the commit that it stands for.

    Where neither the hub nor its cache knows the id, the id itself.
    """
    return _identity(resolve_source(source)) or source


def is_known(source: str) -> bool:
    """Whether it is known what a backbone stands for: a folder, or a commit of a hub id."""
    return _identity(resolve_source(source)) is not None


@cache
def _identity(source: str) -> str | None:
    folder = Path(source)
    if folder.is_dir():
        kinds = (".json", ".txt", ".safetensors", ".model")
        files = [path for path in sorted(all_files(folder)) if path.suffix in kinds]
        return hash_of([(p.relative_to(folder).as_posix(), digest(p)) for p in files])
    name, revision = hub_id(source) or ("", None)
    if re.fullmatch("[0-9a-f]{40}", revision or ""):
        return source
    from huggingface_hub import HfApi, try_to_load_from_cache

    with suppress(Exception):  # no connection, no such model: errors of any class
        return f"{name}@{HfApi().model_info(name, revision=revision, timeout=10).sha}"
    with suppress(ValueError):  # no id of a repository at all
        cached = try_to_load_from_cache(name, "model_index.json", revision=revision)
        if isinstance(cached, str):
            return f"{name}@{Path(cached).parent.name}"
    return None
