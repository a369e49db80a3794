"""A regulariser of one's own: a file of Python that defines it, run where somebody tunes with it.

    def regularizer(x_t, t, output, frozen): ...    # a loss a sample, (B,); see `Tuning`

Nothing else of this library runs such a file: not a run that is opened, drawn, measured or
exported, though its copy lies in the run's folder.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sude_lab.errors import UserError, machine_failure, one_line
from sude_lab.io.reading import read_text

NAME = "regularizer.py"
"""The copy in a run's folder."""


@dataclass(frozen=True)
class OwnRegularizer:
    """The function of a file; an error in it is a UserError that names the file and the line."""

    file: Path
    source: bytes
    function: Callable[..., Tensor]

    def __call__(self, *batch: Any) -> Tensor:
        """Return what the function says of x_t, t, output and `sude_lab.tuning.Frozen`."""
        try:
            loss = self.function(*batch)
        except Exception as error:  # anybody's code: errors of any class
            if isinstance(error, UserError) or machine_failure(error):
                raise
            raise _failed(self.file, error) from error
        shape = tuple(batch[1].shape)
        if not isinstance(loss, Tensor) or loss.shape != shape:
            what = f"the shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise UserError(
                f"{self.file} returned {what[:80]}: its regularizer must return a loss a sample, a "
                f"Tensor {shape}."
            )
        if not bool(loss.isfinite().all()):
            raise UserError(f"{self.file} returned {loss.tolist()} at t = {batch[1].tolist()}.")
        return loss


def load_regularizer(file: Path | None) -> OwnRegularizer | None:
    """Run a file and return the `regularizer` that it defines; None where no file is named."""
    if file is None:
        return None
    text = read_text(file, f"The regularizer {file}", "a file of Python")
    names: dict[str, Any] = {"__name__": "regularizer", "__file__": str(file)}
    try:
        # Not imported: what is run are the very text that is kept, and nothing is written.
        exec(compile(text, str(file), "exec"), names)
    except (Exception, SystemExit) as error:
        raise _failed(file, error) from error
    if not callable(names.get("regularizer")):
        cure = "write def regularizer(x_t, t, output, frozen)"
        raise UserError(f"{file} defines no function named regularizer: {cure}.")
    return OwnRegularizer(file, text.encode(), names["regularizer"])


def _failed(file: Path, error: BaseException) -> UserError:
    own = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
    line = getattr(error, "lineno", None) or (own[-1] if own else None)
    where = f"{file}, line {line}" if line else str(file)
    return UserError(one_line(f"{where}: {type(error).__name__}: {error}", 300))
