"""The one kind of error that is meant for the person at the keyboard, and the check of settings."""

from __future__ import annotations

import numbers
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


class UserError(ValueError):
    """An error whose message is one clear sentence that says what to do.

    The command line prints the message, without a traceback, and exits with code 2; in a notebook
    it is an ordinary `ValueError`. Line breaks, which messages quoted from libraries often carry,
    become spaces, so that one sentence stays one line. What a terminal would obey, control
    characters in a file's name for example, is shown in place of being sent; a message that quotes
    a whole file is cut in the middle.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def machine_failure(error: BaseException) -> str | None:
    """Say what happened where the machine is at fault, memory or device; None: it is not.

    PyTorch tells of these by a class of its own on a device, in words alone on the CPU.
    """
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError" or "MPS backend out of memory" in text:
        return "The device ran out of memory"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        return "The machine ran out of memory"
    device = ("CUDA error", "HIP error", "CUDNN_STATUS", "CUBLAS_STATUS", "NCCL error")
    if isinstance(error, RuntimeError) and any(words in text for words in device):
        return f"The device failed or is gone ({one_line(text, 160)})"
    return None


@contextmanager
def machine_failures() -> Iterator[None]:
    """Say in one sentence what a run can do where the machine is at fault: memory, or device."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        failure = machine_failure(error)
        if failure is None:
            raise
        advice = (
            "use --train lora, --gradient-checkpointing, --optimizer adamw8bit, --dtype bfloat16, "
            "or a smaller --train-batch-size with --gradient-accumulation-steps, or a smaller "
            "--resolution"
        )
        if "memory" not in failure:
            advice = "see whether it is still there, and continue with --resume"
        raise UserError(f"{failure}: {advice}.") from error


def one_line(text: str, most: int = 2000) -> str:
    """Return a text as one line that is safe to print, of about `most` characters at the most."""
    text = " ".join(text.split())
    if len(text) > most:
        text = f"{text[: most // 2]} ... {text[-most // 2 :]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


# --- what a setting may be ------------------------------------------------------------------------


def flag(name: str) -> str:
    """Return a field's name as the command line has it, without the dashes in front."""
    return name.replace("_", "-")


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
            raise UserError(f"--{flag(f.name)} is {value!r}: it takes {taken(kinds)}.")


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
