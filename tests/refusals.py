"""What the tests of bad input share: a command in this process, a folder's content, many cases.

Generated cases are the same in every run. `SUDE_LAB_FUZZ=20 pytest tests/project/test_bad_input.py`
makes 20 times as many, and others every time; a failure prints the line that repeats it.
"""

import hashlib
import io
import os
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings

from sude_lab.cli import main

_TIMES = int(os.environ.get("SUDE_LAB_FUZZ", "0"))


def generated(number: int) -> Callable[[Any], Any]:
    """Settings of a test with `number` generated cases."""
    return settings(
        max_examples=number * max(1, _TIMES),
        derandomize=not _TIMES,
        database=None,
        deadline=None,
        print_blob=True,
        # Finding the smallest case that fails takes minutes: it is for whoever looks for one.
        phases=list(Phase) if _TIMES else [Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


@dataclass(frozen=True)
class Said:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The one sentence of a refusal; anything else is an error of the test."""
        assert self.code == 2, self
        lines = self.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("sude-lab: "), self
        assert self.out == "" and "Traceback" not in self.err, self
        assert lines[0].isprintable() and len(lines[0]) < 2500, self
        assert lines[0].endswith((".", ".)", '."')), self
        return lines[0]


def say(*words: object) -> Said:
    """Give a command, as in a terminal."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(word) for word in words])
    return Said(code, out.getvalue(), err.getvalue())


def content(folder: Path) -> dict[str, str]:
    """What is in a folder: every name, and a hash of every file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(folder.rglob("*"))
    }
