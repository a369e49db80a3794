"""The settings of a run can be read, and the command line asked for help, without torch."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import get_type_hints as hints

import numpy as np
import pytest

import sude_lab
from sude_lab import tuning
from sude_lab.config import CompleteConfig, TuningConfig, read_settings
from sude_lab.errors import UserError, kinds_of
from sude_lab.methods import METHODS

pytestmark = pytest.mark.quick

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


def test_every_public_name_is_there_and_only_those_are_listed() -> None:
    for name in sude_lab.__all__:
        assert getattr(sude_lab, name) is not None
    assert set(sude_lab.__all__) <= set(dir(sude_lab))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sude_lab.nothing  # noqa: B018
    assert sude_lab.Tuning is tuning.Tuning


def test_what_a_complete_configuration_fills_is_what_may_be_none_before() -> None:
    """One list of names: that of the dataclass."""
    names = [f.name for f in fields(TuningConfig)]
    assert [f.name for f in fields(CompleteConfig)] == names
    filled = {name for name in names if hints(TuningConfig)[name] != hints(CompleteConfig)[name]}
    for name in names:
        may_be_none = NoneType in kinds_of(hints(TuningConfig)[name])
        stays = ("initializer", "prompt", "class_images", "resolution", "regularizer_file")
        assert (name in filled) == (may_be_none and name not in stays)
    said = {f.name for f in fields(TuningConfig) if f.metadata.get("usual") is not None}
    for method in METHODS.values():
        assert said | method.defaults.keys() == filled


def test_settings_of_a_file_are_read_with_their_types() -> None:
    values = {"image": "dog.png", "category": "dog", "more_subjects": ["cat=<c>=c.png"]}
    settings = TuningConfig(**read_settings(values | {"prior_preservation": "teacher"}))
    assert settings.image == Path("dog.png") and settings.more_subjects == ("cat=<c>=c.png",)
    assert settings.prior_preservation == "teacher"
    with pytest.raises(UserError, match="no setting 'learning_speed'"):
        read_settings({"learning_speed": 1})


def test_settings_may_be_written_as_people_write_python() -> None:
    """Paths as texts, numbers of numpy: what is kept is what a file can hold."""
    plain = TuningConfig(Path("dog.png"), "dog", seed=3, weight_sude=0.5, class_images=Path("dogs"))
    given = TuningConfig(
        "dog.png",  # type: ignore[arg-type]
        "dog",
        seed=np.int64(3),  # type: ignore[arg-type]
        weight_sude=np.float32(0.5),  # type: ignore[arg-type]
        class_images="dogs",  # type: ignore[arg-type]
    )
    assert given == plain and type(given.seed) is int and type(given.weight_sude) is float
    with pytest.raises(UserError, match="it takes a tuple of texts"):
        TuningConfig(Path("dog.png"), "dog", more_subjects="cat=<c>=c.png")  # type: ignore[arg-type]
