"""The README names what is really there."""

import ast
import importlib
import pkgutil
import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

import studies.embedded
from sude_lab import cli, world

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["demo", "test"])
def test_ci_runs_the_readme_command(name: str) -> None:
    block = re.search(rf"<!-- ci: {name} -->\n```bash\n(.+?)```", README, re.S)
    assert block and "pip install -e" in block[1]
    assert f" {name}" in (ROOT / ".ci" / "run").read_text()


def test_every_picture_and_link_is_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_the_map_names_real_functions_and_tests() -> None:
    tests = (ROOT / "tests" / "core" / "test_equations.py").read_text(encoding="utf-8")
    rows = [line for line in README.splitlines() if "`test_" in line]
    assert len(rows) >= 9
    for row in rows:
        module = None
        for name in re.findall(r"`([a-z_]+\.)?([A-Za-z_]+)`", row.split("|")[2]):
            module = (
                importlib.import_module(f"sude_lab.{name[0].rstrip('.')}") if name[0] else module
            )
            assert hasattr(module, name[1]), name
        for number in re.findall(r"test_eq_(\d\d)\*", row):
            assert f"def test_eq_{number}_" in tests


def options() -> set[str]:
    """What may be said to `sude-lab`, to every study, to every benchmark."""
    known = {"help"}
    known |= {name for command in cli._COMMANDS for name in command.__dataclass_fields__}
    packages = (studies, studies.embedded, world)
    names = [m.name for p in packages for m in pkgutil.iter_modules(p.__path__, f"{p.__name__}.")]
    for name in names:
        if name == "studies.embedded":
            continue
        found = vars(importlib.import_module(name))
        types = [c for c in found.values() if isinstance(c, type) and is_dataclass(c)]
        configs = [c for c in types if c.__module__.startswith(("sude_lab.", "studies."))]
        known |= {field.name for config in configs for field in fields(config)}
    for path in (ROOT / "benchmarks").glob("*.py"):
        nodes = ast.parse(path.read_text(encoding="utf-8")).body
        (asked,) = [n for n in nodes if isinstance(n, ast.ClassDef) and n.name == "Benchmark"]
        known |= {f.target.id for f in asked.body if isinstance(f, ast.AnnAssign)}
    known.add("debug")  # of every command: taken out before they are parsed
    return known


def test_every_readme_flag_exists() -> None:
    others = r"tensorboard --logdir|^(?:#SBATCH|srun|helm|kubectl) .*$"  # other programs'
    ours = re.sub(others, "", README, flags=re.M)
    flags = {flag.replace("-", "_") for flag in re.findall(r"--(?:no-)?([a-z][a-z-]+)", ours)}
    assert flags <= options()
