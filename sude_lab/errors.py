"""The one kind of error that is meant for the person at the keyboard, and checks that raise it.

Every function of this package raises a `UserError` where what it is given, or finds on the disk, is
not what its text and types say. `Raises:` stands where there is more to say.
"""

from __future__ import annotations

import numbers
import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


class UserError(ValueError):
    """An error whose message is one clear sentence that says what to do, on one line.

    The command line prints it without a traceback and exits with code 2; in a notebook it is an
    ordinary `ValueError`.
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


_TUNING = (
    "use --train lora, --gradient-checkpointing, --optimizer adamw8bit, --dtype bfloat16, or a "
    "smaller --train-batch-size with --gradient-accumulation-steps, or a smaller --resolution"
)


@contextmanager
def machine_failures(when: str = "", memory: str = _TUNING) -> Iterator[None]:
    """Say in one sentence what a run can do where the machine is at fault: memory, or device."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        failure = machine_failure(error)
        if failure is None:
            raise
        device = "see whether it is still there, and continue with --resume"
        advice = memory if "memory" in failure else device
        raise UserError(f"{failure}{when}: {advice}.") from error


@contextmanager
def explained(what: str, cure: str) -> Iterator[None]:
    """Say "WHAT (the reason): CURE." of an error of any class, but for a failure of the machine.

    Loaders, decoders and clients of the network have no class of errors in common.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or machine_failure(error):
            raise
        reason = f"{type(error).__name__}: {str(error)[:160]}"
        raise UserError(f"{what} ({reason}): {cure}.") from error


def one_line(text: str, most: int = 2000) -> str:
    """Return a text as one line of about `most` characters, with nothing a terminal would obey."""
    text = " ".join(text.split())
    if len(text) > most:
        text = f"{text[: most // 2]} ... {text[-most // 2 :]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


# --- what a setting may be ------------------------------------------------------------------------


def flag(name: str) -> str:
    """Return a field's name as the command line has it, without the dashes in front."""
    return name.replace("_", "-")


_hints = cache(get_type_hints)


def check_types(settings: Any) -> None:
    """Check that every field of a dataclass holds what its type says; a whole number is a number.

    A path may be a text, and a number one of numpy's, which no file could hold: they are replaced.
    """
    hints = _hints(settings.__class__)
    for f in fields(settings):
        value, kinds = getattr(settings, f.name), kinds_of(hints[f.name])
        if isinstance(value, numbers.Number) and hasattr(value, "item"):
            object.__setattr__(settings, f.name, value.item())
        elif isinstance(value, str) and Path in kinds:
            object.__setattr__(settings, f.name, Path(value))
        elif not any(_fits(value, kind) for kind in kinds):
            choices = [c for kind in kinds for c in get_args(kind) if get_origin(kind) is Literal]
            taken = ", ".join(map(str, choices)) or _NAMES.get(kinds[0], "another kind of value")
            raise UserError(f"--{flag(f.name)} is {value!r}: it takes {taken}.")


def check_whole(what: str, value: Any, least: int, most: int | None = None) -> None:
    """Check a whole number that a call was given; `what` is how the sentence begins."""
    whole = _fits(value, int)
    if not whole or value < least or (most is not None and value > most):
        end = f", and at most {most:,}" if most is not None else ""
        shown = f"{value:,}" if whole else repr(value)
        raise UserError(f"{what} is {shown}: it must be a whole number of at least {least}{end}.")


_NAMES: dict[Any, str] = {
    **{float: "a number", int: "a whole number", bool: "on or off"},
    **{str: "a text", Path: "the name of a file", tuple[str, ...]: "a tuple of texts"},
}


def kinds_of(hint: Any) -> tuple[Any, ...]:
    """Return what a type may be: (int, None's type) for int | None."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


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


# --- what a call is handed ------------------------------------------------------------------------


def listed(texts: str | Sequence[str]) -> list[str]:
    """Return texts as a list; a single one is no sequence of letters."""
    given = [texts] if isinstance(texts, str) else texts
    if not isinstance(given, Iterable) or not all(isinstance(text, str) for text in given):
        raise UserError(f"{texts!r} is no text, and no list of texts.")
    return list(given)


def check_tokens(tokens: Sequence[str], number: int) -> None:
    """Check that a pipeline would read each token as all its `number` vectors, once each.

    It puts <sks> <sks>_1 <sks>_2 in place of <sks>, in small letters, wherever that stands.
    """
    for token in tokens:
        small = token == unicodedata.normalize("NFC", token).lower()
        if number > 1 and (not small or token[:1].isalnum() or token[-1:].isalnum()):
            cannot = f"The token {token!r} cannot stand for {number} vectors"
            raise UserError(f"{cannot}: write it in small letters between two marks, like <sks>.")
        for other in set(tokens) - {token}:
            if other == f"{token}_1" or (number > 1 and token in other):
                raise UserError(f"{token!r} would be read as a part of {other!r}: choose others.")


def checked_picture(image: Any, *, square: bool = False) -> Any:
    """Return a picture as it is, if nothing of it would be clipped, hidden, turned or squeezed."""
    plain = getattr(image, "mode", None) == "RGB" and "icc_profile" not in image.info
    if not plain or image.getexif().get(0x0112, 1) != 1 or (square and len(set(image.size)) > 1):
        plain = "RGB, upright and without a colour profile, and to tune on a square"
        cure = "load_picture of sude_lab.io.pictures makes one"
        raise UserError(f"A picture must be {plain}: {cure}.")
    return image
