"""The settings of a run can be read, and the command line asked for help, without torch."""

import subprocess
import sys

import pytest

from sude_lab import config, tuning

HEAVY = (
    *("accelerate", "diffusers", "matplotlib", "numpy", "pandas", "peft", "PIL", "pyarrow", "ray"),
    *("safetensors", "tensorboard", "torch", "transformers", "yaml"),
)


@pytest.mark.parametrize(
    "code",
    [
        "import sude_lab",
        "import sude_lab.config",
        "from sude_lab.cli import main; main(['--help'])",
        "from sude_lab.cli import main; main(['tune', '--help'])",
        "from sude_lab.cli import main; assert main(['tune', 'dog.png']) == 2",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_used(code: str) -> None:
    code = (
        "import sys\n"
        "try:\n"
        f"    {code}\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code\n"
        f"found = sorted(set({HEAVY!r}) & set(sys.modules))\n"
        "assert not found, found\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_tuning_gives_the_same_names() -> None:
    for name in ("PRESETS", "Subject", "TuningConfig", "with_preset"):
        assert getattr(tuning, name) is getattr(config, name)
