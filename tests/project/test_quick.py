"""`pytest -q -m quick tests` reaches every equation, every method and every command."""

import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from sude_lab import cli
from sude_lab.methods import METHODS

TESTS = Path(__file__).resolve().parents[1]
COMMANDS = {
    "demo": "project/test_demo.py::test_results_are_tidy",
    "tune": "project/test_cli.py::test_tune_then_generate",
    "generate": "project/test_cli.py::test_tune_then_generate",
    "evaluate": "evaluate/test_evaluate.py::test_the_command_does_the_same",
    "sweep": "sweep/test_sweep.py::test_a_dry_run_imports_nothing_that_takes_seconds",
    "bench": "sweep/test_bench.py::test_the_command_names_the_file_that_is_not_there",
    "classify": "project/test_cli.py::test_a_picture_is_classified",
    "export": "project/test_cli.py::test_a_run_is_exported",
    "lab": "project/test_cli.py::test_lab_says_where_the_notebooks_should_be",
    # The copies themselves need nbgrader and half a minute: test_released_copies_...
    "release": "lessons/test_exercises.py::test_a_folder_that_is_not_empty_is_refused",
    "--help": "project/test_cli.py::test_help_names_the_commands_and_ends_well",
}
"""A quick test of every command, which says the command's name or leaves it to a helper beside."""


@pytest.fixture(scope="module")
def quick() -> set[str]:
    """What `-m quick` collects from the core and from the files of the commands."""
    files = sorted({test.partition("::")[0] for test in COMMANDS.values()})
    how = ("--collect-only", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", "quick")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *how, *(str(TESTS / name) for name in ("core", *files))],
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return set(re.findall(r"^tests/(\S+::.+)$", done.stdout, re.M))


@pytest.mark.parametrize("number", range(1, 15))
def test_every_equation_is_quick(number: int, quick: set[str]) -> None:
    start = f"core/test_equations.py::test_eq_{number:02}_"
    assert any(test.startswith(start) for test in quick)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_tuned_saved_and_read_quickly(method: str, quick: set[str]) -> None:
    name = "test_a_word_of_several_vectors_is_trained_saved_and_read_by_plain_diffusers"
    assert f"core/test_methods.py::{name}[{method}]" in quick


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_quick(command: str, quick: set[str]) -> None:
    assert COMMANDS[command] in quick
    file, _, _ = COMMANDS[command].partition("::")
    assert f'"{command}"' in (TESTS / file).read_text(encoding="utf-8")


def test_no_command_is_forgotten() -> None:
    names = {command.__name__.lower() for command in get_args(cli.Command)}
    assert names == COMMANDS.keys() - {"--help"}
